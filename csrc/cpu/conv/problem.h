// Convolution with stride 1 and a square filter: forward, data gradient and filter gradient.
//
// Implementations of one table: `direct` serves every case; `winograd_tiles` and
// `winograd_panels` (3 x 3 filters; many tiles, many channels), `winograd_large` (7 x 7,
// 11 x 11, …), `winograd_5x5` and `winograd_2x2`, all in float32 arithmetic, are faster where they apply.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastda::cpu {

// A 4-D tensor and its strides in elements (of a filter: n = out channel, c = in channel, h, w =
// tap; negative strides are fine). No data: the operand is absent. Activations have a unit stride
// along c (channels_last) or w.
struct View {
  void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// height and width: of x, which lies between `padding` zeros on each side.
struct ConvProblem {
  DType dtype;
  int64_t batch, in_channels, out_channels, height, width, kernel, padding;
  int64_t out_height() const { return height + 2 * padding - (kernel - 1); }
  int64_t out_width() const { return width + 2 * padding - (kernel - 1); }
};

// out = mask(out_mask, relu(conv(mask(x_mask, x), filter) + bias + mask(residual_mask, residual))).
// mask(g, v) is v where g > 0 or g is NaN, else 0: the backward of ReLU, read off its output g. The
// data gradient is the same operation with the filter rotated by 180 degrees, its channels swapped,
// and a padding of kernel - 1 - padding.
struct ConvArgs : ConvProblem {
  bool x_channels_last, out_channels_last;  // of x and x_mask; of the other activations
  View x, x_mask, filter;
  const void* prepared;  // by prepare
  const void* bias;      // [out_channels] or null
  View residual, residual_mask;
  bool relu;
  View out_mask, out;
};

// d filter[k, c, i, j] = sum over n, h, w of mask(grad_mask, grad)[n, k, h, w] * x[n, c, h + i - p,
// w + j - p] with p = padding, and d bias = sum of mask(grad_mask, grad).
struct FilterGradArgs : ConvProblem {
  bool x_channels_last, grad_channels_last;
  View x, grad, grad_mask;
  const void* prepared;  // by prepare_grad
  View d_filter;         // no data: not wanted
};

struct ConvKernels {
  // Null where the instruction set has no such kernels.
  bool (*serves)(const ConvProblem&) = nullptr;

  // What all tasks share is made first: the filter, or the input, as the kernels want it.
  int64_t (*prepared_bytes)(const ConvArgs&);
  void (*prepare)(const ConvArgs&, void* prepared);
  int64_t (*conv_scratch_bytes)(const ConvArgs&);  // of one call of conv()
  int64_t (*conv_tasks)(const ConvArgs&);
  // False: an intermediate value was not finite, and the output is only right where it spreads that
  // no further than the definition does. Use `direct` instead.
  bool (*conv)(const ConvArgs&, int64_t task, void* scratch);

  // As above; null: nothing is shared.
  int64_t (*grad_prepared_bytes)(const FilterGradArgs&) = nullptr;
  void (*prepare_grad)(const FilterGradArgs&, void* prepared) = nullptr;
  // The work is cut into chunks, whatever the number of threads; each sums into storage of its own,
  // and combine() makes the results of the chunks in their order; false as for conv(). d_bias may
  // be null.
  int64_t (*chunks)(const FilterGradArgs&);
  int64_t (*sum_bytes)(const FilterGradArgs&);
  int64_t (*filter_grad_scratch_bytes)(const FilterGradArgs&);
  void (*filter_grad)(const FilterGradArgs&, int64_t chunk, void* sums, void* scratch);
  bool (*combine)(const FilterGradArgs&, const void* sums, void* d_bias);

  // The backward of two convolutions in turn, a few rows at a time. What lies between them is made
  // by `between`, is taken on to the input by `to_input`, and is the gradient in `to_filter`, by
  // the chunks of filter_grad(); it is channels_last, never whole, and the views of it in the three
  // are ignored. Null, or 0 bytes: better made whole. false as for conv().
  int64_t (*band_scratch_bytes)(const ConvArgs& between, const ConvArgs& to_input,
                                const FilterGradArgs& to_filter) = nullptr;
  bool (*band)(const ConvArgs& between, const ConvArgs& to_input, const FilterGradArgs& to_filter,
               int64_t chunk, void* sums, void* scratch) = nullptr;
};
FASTDA_DECLARE_KERNELS(ConvKernels, direct)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_tiles)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_panels)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_large)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_5x5)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_2x2)

}  // namespace fastda::cpu
