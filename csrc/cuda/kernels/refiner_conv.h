// Refiner convolutions: what the host side hands to the launches.
#pragma once

#include <cstdint>

#include "common/conv.h"

namespace fastda::cuda {

// How the products are computed: float32 as it stands, or rounded to TF32 on tensor cores; 16-bit
// types always on tensor cores; float64 as it stands.
struct Arithmetic {
  DType dtype;
  bool tf32 = false;
};

// out = mask(out_mask, relu?(filter * mask(x_mask, x) + bias + mask(residual_mask, residual))),
// zero padding k / 2. ReLU, the masks and negative_slope are those of common/conv.h. Views without
// data are absent.
struct Conv {
  Arithmetic arithmetic;
  int batch, in_channels, out_channels, height, width, kernel;
  View x, x_mask, filter, residual, residual_mask, out_mask, out;
  const void* bias = nullptr;
  bool relu = false;
  double negative_slope = 0;
  void* prepared = nullptr;  // prepared_bytes(), 16-byte aligned
};
int64_t prepared_bytes(const Conv& p);
void convolve(const Conv& p, void* stream);

// relu(x + filter2 * relu(filter1 * x + bias1) + bias2), in one launch; `inner` is written if it
// has data.
struct BlockConv {
  Arithmetic arithmetic;
  int batch, channels, inner_channels, height, width, kernel1, kernel2;
  View x, filter1, filter2, inner, out;
  const void *bias1 = nullptr, *bias2 = nullptr;
  void* prepared = nullptr;  // prepared_bytes(), 16-byte aligned
};
// Whether the current device holds both filters and a tile in the shared memory of one block.
bool block_fits(const BlockConv& p);
int64_t prepared_bytes(const BlockConv& p);
void convolve_block(const BlockConv& p, void* stream);

// d_weight = the sum over pixels of the masked grad times moved x, d_bias = that of the masked grad.
struct FilterGrad {
  Arithmetic arithmetic;
  int batch, in_channels, out_channels, height, width, kernel;
  View x, grad, mask;
  double negative_slope = 0;
  void* d_weight = nullptr;  // [K, C, k, k] or null
  void* d_bias = nullptr;    // [K] or null
  void* sums = nullptr;      // sum_bytes(), of any content
};
int64_t sum_bytes(const FilterGrad& p);
void filter_gradient(const FilterGrad& p, void* stream);

}  // namespace fastda::cuda
