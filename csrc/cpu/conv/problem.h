// Convolution with stride 1 and a square filter: forward, data gradient and filter gradient.
//
// Implementations of one table: `direct` serves every case; `narrow` (to a few output channels) and, in
// float32 arithmetic, `winograd_tiles` and `winograd_panels` (3 x 3 filters; many tiles, many channels),
// `winograd_large` (7 x 7, 11 x 11, …), `winograd_5x5` and `winograd_2x2`, and from a few input channels
// `first_3x3`, `first_5x5`, `first_large` and, of contiguous images, `planes` and `pointwise` (1 x 1) are
// faster where they apply.
#pragma once

#include <cstdint>

#include "common/conv.h"
#include "common/isa.h"

namespace fastda::cpu {

// Outputs that are made together, size x size, from reach x reach pixels of the input.
struct Tile {
  int64_t size, reach;
};

// Activations have a unit stride along c (channels_last) or w.
struct ConvKernels {
  // Null where the instruction set has no such kernels.
  bool (*serves)(const ConvProblem&) = nullptr;
  // Null: every output is made by itself. Else the ranges of the operands are noted (outliers.h).
  Tile (*tile)(const ConvProblem&) = nullptr;

  // Whether gradients are read with the winners of a pool.
  bool reads_winners = false;

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
  int64_t (*chunks)(const FilterGradArgs&) = nullptr;  // null: no filter gradient of its own
  int64_t (*sum_bytes)(const FilterGradArgs&) = nullptr;
  int64_t (*filter_grad_scratch_bytes)(const FilterGradArgs&) = nullptr;
  void (*filter_grad)(const FilterGradArgs&, int64_t chunk, void* sums, void* scratch) = nullptr;
  bool (*combine)(const FilterGradArgs&, const void* sums, void* d_bias) = nullptr;

  // The backward of two convolutions in turn, a few rows at a time. What lies between them is made
  // by `between`, is taken on to the input by `to_input`, and is the gradient in `to_filter`, by
  // the chunks of filter_grad(); it is channels_last, never whole, and the views of it in the three
  // are ignored. Null, or 0 bytes: better made whole. false as for conv().
  int64_t (*band_scratch_bytes)(const ConvArgs& between, const ConvArgs& to_input,
                                const FilterGradArgs& to_filter) = nullptr;
  bool (*band)(const ConvArgs& between, const ConvArgs& to_input, const FilterGradArgs& to_filter,
               int64_t chunk, void* sums, void* scratch) = nullptr;
};

// What keeps large values to the outputs that they belong to: outliers.h.
struct OutlierKernels {
  // The usual magnitude of what a convolution or a gradient reads, and the limit to note.
  void (*set_range)(ConvArgs&);
  void (*set_ranges)(FilterGradArgs&, Tile);

  // Makes again, directly, what other kernels made worse than promised of a row of tiles of an image;
  // `prepared` as for `direct`.
  int64_t (*mend_scratch_bytes)(const ConvArgs&, Tile);
  void (*mend)(const ConvArgs&, Tile, int64_t image, int64_t tile_row, void* scratch);

  // Of a row of tiles of an image: how large the rounded products may be, and, for every tap, how large
  // they would be in a sum of its own. The filter's gradient keeps the promise where the former's sum is
  // at most `most` times the latter's.
  int64_t (*weigh_scratch_bytes)(const FilterGradArgs&, Tile);
  void (*weigh)(const FilterGradArgs&, Tile, int64_t image, int64_t tile_row, double* products,
                double* taps, void* scratch);
  double most;
};
FASTDA_DECLARE_KERNELS(OutlierKernels, outliers)
FASTDA_DECLARE_KERNELS(ConvKernels, direct)
FASTDA_DECLARE_KERNELS(ConvKernels, narrow)
FASTDA_DECLARE_KERNELS(ConvKernels, planes)
FASTDA_DECLARE_KERNELS(ConvKernels, pointwise)
FASTDA_DECLARE_KERNELS(ConvKernels, first_3x3)
FASTDA_DECLARE_KERNELS(ConvKernels, first_5x5)
FASTDA_DECLARE_KERNELS(ConvKernels, first_large)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_tiles)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_panels)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_large)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_5x5)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_2x2)
// Of 5 x 5 with more than half of it for padding, on small images. Where values are too large for the
// promise of outliers.h, others serve.
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_5x5_transposed)
// 4 x 4 filters with a stride of 2; and the data gradient of these, whose ConvArgs are those of the
// convolution, but that x is the output's gradient and out the input's.
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_stride2)
FASTDA_DECLARE_KERNELS(ConvKernels, winograd_stride2_data)

}  // namespace fastda::cpu
