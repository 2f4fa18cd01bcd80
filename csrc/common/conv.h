// A convolution as the host side describes it to a device's kernels, without torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastda {

// A 4-D tensor and its strides in elements (of a filter: n = out channel, c = in channel, h, w =
// tap; negative strides are fine). No data: the operand is absent.
struct View {
  void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// height and width: of x, which lies between `padding` zeros on each side, or, `reflect`ed, between
// as many of its own pixels, mirrored at its first and last ones.
struct ConvProblem {
  DType dtype;
  int64_t batch, in_channels, out_channels, height, width, kernel, padding;
  bool reflect = false;
  int64_t stride = 1;
  int64_t out_height() const { return (height + 2 * padding - kernel) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - kernel) / stride + 1; }
};

// Images of an operand with values so large that they may spoil what others come to (the CPU's
// cpu/conv/outliers.h).
struct Range {
  float usual = 0, limit = 0;  // magnitude of its values; beyond which they are noted
  uint8_t* beyond = nullptr;   // [batch]: 1 where an image has such a value
};

// Of the gradient of a max-pool's result that stands for the gradient of what was pooled: the places of
// the entries that have it, as in common/pool.h, of windows of size x size side by side.
struct Winners {
  const uint8_t* places = nullptr;  // [batch, height, width, channels]; null: nothing was pooled
  int64_t size = 0, height = 0, width = 0;
};

// out = mask(out_mask, act(conv(mask(x_mask, x), filter) + bias + mask(residual_mask, residual))).
// act is ReLU, or leaky ReLU with a negative slope above 0. mask(g, v) is its backward, read off its
// output g: v where g > 0, else 0 (ReLU, which keeps v where g is NaN) or negative_slope v. The data
// gradient is the same operation with the filter rotated by 180 degrees, its channels swapped, and a
// padding of kernel - 1 - padding.
struct ConvArgs : ConvProblem {
  bool x_channels_last, out_channels_last;  // of x and x_mask; of the other activations
  View x, x_mask, filter;
  Winners x_winners;  // x is then [batch, channels, its height, its width], channels_last, unmasked
  const void* prepared;  // by the device, where it prepares anything
  Range range;           // of x, masked
  const void* bias;      // [out_channels] or null
  View residual, residual_mask;
  bool relu;  // whether there is an activation
  double negative_slope;
  View out_mask, out;
  bool by_one_thread;  // all tasks of it
};

// d filter[k, c, i, j] = sum over n, h, w of mask(grad_mask, grad)[n, k, h, w] * x[n, c, h + i - p,
// w + j - p] with p = padding, and d bias = sum of mask(grad_mask, grad).
struct FilterGradArgs : ConvProblem {
  bool x_channels_last, grad_channels_last;
  View x, grad, grad_mask;
  Winners grad_winners;  // likewise
  double negative_slope;
  const void* prepared;     // as above
  Range range, grad_range;  // likewise
  View d_filter;            // no data: not wanted
};

}  // namespace fastda
