// Stride-1 "same" convolution with an odd square filter: forward, data gradient and weight gradient.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastda::cpu {

// A 4-D tensor and its strides in elements (of a filter: n = out channel, c = in channel, h, w = tap;
// negative strides are fine). No data: the operand is absent. Activations have a unit stride along c
// (channels_last) or w.
struct View {
  void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// out = gate(out_gate, relu(conv(gate(x_gate, x), filter) + bias + gate(residual_gate, residual))).
// gate(g, v) is v where g > 0 or g is NaN, else 0: the backward of ReLU, read off its output g.
// The data gradient is the same operation with the filter rotated by 180 degrees and its channels swapped.
struct ConvArgs {
  DType dtype;
  bool channels_last;  // of every activation below
  bool winograd;
  int64_t batch, in_channels, out_channels, height, width, kernel;
  View x, x_gate;
  const void* prepared;  // by prepare_filter
  const void* bias;      // [out_channels] or null
  View residual, residual_gate;
  bool relu;
  View out_gate, out;
};

// d filter[k, c, i, j] = sum over n, h, w of gate(grad_gate, grad)[n, k, h, w] * x[n, c, h + i - p, w + j -
// p], and d bias = sum of gate(grad_gate, grad). The work is cut into chunks, whatever the number of threads;
// each chunk sums into storage of its own, and combine() adds the chunks in their order.
struct FilterGradArgs {
  DType dtype;
  bool channels_last;
  bool winograd;
  int64_t batch, in_channels, out_channels, height, width, kernel;
  View x, grad, grad_gate;
  int64_t chunks;
};

struct RefinerConvKernels {
  // Bytes of the filter as the kernels want it, and of the scratch that one call of conv() needs.
  int64_t (*prepared_bytes)(const ConvArgs&);
  int64_t (*conv_scratch_bytes)(const ConvArgs&);
  void (*prepare_filter)(const ConvArgs&, const View& filter, void* prepared);
  int64_t (*conv_tasks)(const ConvArgs&);
  void (*conv)(const ConvArgs&, int64_t task, void* scratch);

  // Bytes of the sums of one chunk, and of the scratch that one call of filter_grad() needs.
  int64_t (*sum_bytes)(const FilterGradArgs&);
  int64_t (*filter_grad_scratch_bytes)(const FilterGradArgs&);
  int64_t (*filter_grad_tasks)(const FilterGradArgs&);
  void (*filter_grad)(const FilterGradArgs&, int64_t chunk, void* sums, void* scratch);
  // Either output may be absent (no data, null).
  void (*combine)(const FilterGradArgs&, const void* sums, const View& d_filter, void* d_bias);
};
FASTDA_DECLARE_KERNELS(RefinerConvKernels, refiner_conv)

}  // namespace fastda::cpu
