// 3x3 convolution, stride 1, zero padding 1, by Winograd F(4x4, 3x3) with everything around it fused. No
// torch.
//
// The output is cut into 4x4 tiles, numbered through rows and images; six neighbouring tiles form a group,
// which is the unit of scheduling. Any split of the groups over threads gives the same bits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastda::cpu {

// A view of an [N, C, H, W] tensor (float32, or bfloat16/float16 where `dtype` says so). Fast where stride_c
// or stride_w is 1 (channels_last, contiguous, and views of them); right for every other stride as well. data
// == nullptr: absent.
struct WinogradView {
  void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;  // in elements
  DType dtype = DType::f32;
};

// output = epilogue(conv3x3(input * gate(input_gate), weights)), where gate(g) is 0 where g <= 0 and 1
// elsewhere (a NaN passes, as in PyTorch's threshold_backward), and the epilogue is, in this order,
//   + bias + residual * gate(residual_gate), relu, * gate(output_gate).
// Forward:       input = x, weights = packed(rotate = false), channels_in = C, channels_out = K.
// Data gradient: input = gy, input_gate = y, weights = packed(rotate = true), channels_in = K, channels_out =
// C. No view may overlap `output` partially; residual or a gate that is exactly `output` is allowed, input is
// not.
struct WinogradConv {
  int64_t n = 0, channels_in = 0, channels_out = 0, height = 0, width = 0;
  WinogradView input, input_gate;
  const float* weights = nullptr;  // from transform_weights, 64-byte aligned
  const float* bias = nullptr;     // [channels_out] or absent
  WinogradView residual, residual_gate, output_gate;
  WinogradView output;
  bool relu = false;
};

// weight gradient of output = conv3x3(input): d_weight[k, c, r, s] = sum grad[n, k, i, j] * input[n, c, i + r
// - 1, j + s - 1], grad = grad_output * gate(grad_gate); d_bias[k] = sum grad[n, k, i, j].
struct WinogradWeightGradient {
  int64_t n = 0, channels_in = 0, channels_out = 0, height = 0, width = 0;
  WinogradView input;                   // [N, channels_in, H, W]
  WinogradView grad_output, grad_gate;  // [N, channels_out, H, W]
};

struct WinogradKernels {
  // False where no vector instruction set was compiled in (base): then the other members are null.
  bool available;

  // Floats of a packed weight for channels_in -> channels_out.
  int64_t (*weights_size)(int64_t channels_in, int64_t channels_out);
  // w[k, c, r, s] lies at k * strides[0] + c * strides[1] + r * strides[2] + s * strides[3]; K x C filters.
  // rotate = false packs K <- C for the forward pass; true packs C <- K, turned by 180 degrees, for the data
  // gradient. Packs the output channel vectors [begin, end) of `weight_vectors(channels_out)`, so that
  // threads can share the work.
  void (*transform_weights)(DType dtype, const void* w, const int64_t* strides, int64_t K, int64_t C,
                            bool rotate, float* packed, int64_t begin, int64_t end);
  int64_t (*weight_vectors)(int64_t channels_out);

  // Groups of six tiles in the whole problem.
  int64_t (*groups)(int64_t n, int64_t height, int64_t width);
  // Floats of workspace that one call of `conv` needs for up to `groups` groups (more groups than fit in the
  // cache do not need more). Contents are irrelevant before and after; 64-byte aligned.
  int64_t (*conv_workspace)(const WinogradConv& p, int64_t groups);
  void (*conv)(const WinogradConv& p, int64_t group_begin, int64_t group_end, float* workspace);

  // Weight gradient in two steps. The problem falls into weight_gradient_chunks chunks, whose number depends
  // on the shape alone. Each chunk fills its own partial sum of weight_gradient_partial floats; `finish` adds
  // the partials in order of their number, for the input channels [c_begin, c_end), and turns them into
  // d_weight (float32, contiguous [K, C, 3, 3], null when not wanted) and d_bias ([K], null when not wanted;
  // written by the call with c_begin == 0). partials: [chunks, weight_gradient_partial], 64-byte aligned,
  // uninitialised.
  int64_t (*weight_gradient_chunks)(const WinogradWeightGradient& p);
  int64_t (*weight_gradient_partial)(const WinogradWeightGradient& p);
  int64_t (*weight_gradient_workspace)(const WinogradWeightGradient& p);
  void (*weight_gradient)(const WinogradWeightGradient& p, int64_t chunk, float* partial, float* workspace);
  void (*weight_gradient_finish)(const WinogradWeightGradient& p, const float* partials, int64_t chunks,
                                 int64_t c_begin, int64_t c_end, float* d_weight, float* d_bias);
};
FASTDA_DECLARE_KERNELS(WinogradKernels, winograd)

}  // namespace fastda::cpu
