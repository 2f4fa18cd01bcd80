// What a large value costs the outputs beside it. Winograd's transforms take differences of all that a
// tile reads, so that each of its outputs is rounded as the largest value there asks for, in the output's
// own window or not. The promise: no worse than if `most` times the largest value of its own window, or
// the usual one of the whole operand, were the largest there.
//
// The transforms note the images with a value beyond the limit that the usual one sets. Those are looked
// at once more, tile by tile, and what would break the promise goes to the direct kernels. Internal
// linkage throughout: see common/dtype.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/pool.h"
#include "cpu/conv/pack.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

// Eight of the 24 bits that a number has.
constexpr float most = 256;

// The largest magnitude of what is added; what is not finite is above all numbers.
struct Peak {
  IntVec<float> bits{};
  [[gnu::always_inline]] void add(F32 x) {
    const IntVec<float> a = IntVec<float>(x) & 0x7fffffff;
    bits = a > bits ? a : bits;
  }
  void note(const Range& range, int64_t image) const {
    int32_t limit;
    std::memcpy(&limit, &range.limit, sizeof limit);
    const IntVec<float> above = bits > limit;
    int32_t any = 0;
    for (int i = 0; i < lanes<float>; ++i) any |= above[i];
    if (any && range.beyond) __atomic_store_n(range.beyond + image, uint8_t(1), __ATOMIC_RELAXED);
  }
};
// `count`, a multiple of the lanes.
inline void note(const Range& range, const float* x, int64_t count, int64_t image) {
  Peak peak;
  for (int64_t i = 0; i < count; i += VL) peak.add(load_vec(x + i));
  peak.note(range, image);
}

// The upper quartile of the largest magnitudes of some tens of pixels from all over the images, each by some
// of its channels, and of more where few are not zero. Not of single values: behind a max-pool, a dropout and
// a batch norm, a gradient is large in one of sixteen, which every window has. Not the median: a leaky ReLU
// leaves half of a channel's values a hundred times smaller. 0: none was found.
template <typename T>
float usual_magnitude(const Source& s, int64_t batch) {
  constexpr int64_t drawn = 32, enough = 16, most_values = 1 << 16, most_channels = 16;
  float found[drawn];
  int64_t count = 0;
  const Winners& winners = s.winners;
  const int64_t height = winners.places ? winners.height : s.height,
                width = winners.places ? winners.width : s.width;
  const int64_t total = batch * height * width, channels = min(s.channels, most_channels),
                apart = s.channels / max(1, channels), at_most = most_values / max(1, channels);
  double place = 0;
  for (int64_t i = 0; i < at_most && count < drawn && (i < drawn || count < enough); ++i) {
    const int64_t index = min(int64_t(place * double(total)), total - 1);
    place += 0.6180339887498949;  // multiples of the golden ratio lie evenly in [0, 1)
    if (place >= 1) place -= 1;
    const int64_t row = index / width, w = index % width, n = row / height, h = row % height;
    float largest = 0;
    for (int64_t j = 0; j < channels; ++j) {
      const int64_t c = (i + j * apart) % s.channels;
      float x = load(at<T>(s.x, n, c, h, w));
      if (s.mask.data && load(at<T>(s.mask, n, c, h, w)) <= 0) x *= float(s.negative_slope);
      if (winners.places &&
          winners.places[((n * height + h) * width + w) * s.channels + c] == no_index)
        continue;
      largest = std::max(largest, x == x ? std::fabs(x) : __builtin_inff());
    }
    if (largest > 0) found[count++] = largest;
  }
  if (count == 0) return 0;
  std::nth_element(found, found + count * 3 / 4, found + count);
  return found[count * 3 / 4];
}

// A block of pixels, each by its largest magnitude, and room for a packed row of them.
struct Magnitudes {
  int64_t columns;
  float *at, *packed;
  static int64_t bytes(int64_t rows, int64_t columns, int64_t channels) {
    return Arena::bytes<float>(rows * columns) + Arena::bytes<float>(columns * padded(channels));
  }
  Magnitudes(Arena& scratch, int64_t rows, int64_t columns, int64_t channels)
      : columns(columns),
        at(scratch.take<float>(rows * columns)),
        packed(scratch.take<float>(columns * padded(channels))) {}

  template <typename T>
  void read(const Source& s, const Block& block) {
    const int64_t stride = padded(s.channels);
    for (int64_t r = 0; r < block.rows; ++r) {
      pack<T, float>(s, {block.n, block.h + r, block.w, 1, block.columns}, packed, stride);
      for (int64_t q = 0; q < block.columns; q += VL) {
        const int64_t pixels = min(VL, block.columns - q);
        F32 each[VL] = {};
        for (int64_t i = 0; i < pixels; ++i) {
          Peak peak;
          for (int64_t c = 0; c < stride; c += VL)
            peak.add(load_vec(packed + (q + i) * stride + c));
          each[i] = F32(peak.bits);
        }
        transpose<float>(each);
        Peak all;
        for (int c = 0; c < VL; ++c) all.add(each[c]);
        store_first<float>(at + r * columns + q, F32(all.bits), int(pixels));
      }
    }
  }
  float largest(int64_t h, int64_t w, int64_t rows, int64_t width) const {
    float m = 0;
    for (int64_t r = h; r < h + rows; ++r)
      for (int64_t q = w; q < w + width; ++q) m = std::max(m, at[r * columns + q]);
    return m;
  }
};

// Whether the promise holds for rows x columns outputs of a tile, whose input begins at column `from`.
inline bool keeps_promise(const Magnitudes& x, int64_t from, const Tile& tile, int64_t kernel,
                          int64_t rows, int64_t columns, float usual) {
  const float m = x.largest(0, from, tile.reach, tile.reach);
  if (m <= most * usual) return true;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t q = 0; q < columns; ++q)
      if (m > most * std::max(usual, x.largest(r, from + q, kernel, kernel))) return false;
  return true;
}

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
