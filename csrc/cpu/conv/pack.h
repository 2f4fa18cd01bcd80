// Reading images and filters: masked, widened, zero outside, or spread over the windows of a max-pool. Images come either into a packed block
// (direct and large filters), or column by column into registers (tiles). Internal linkage
// throughout: see common/dtype.h.
#pragma once

#include "cpu/conv/layout.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

// An image that is read, and the output of the activation whose backward masks it, if any.
struct Source {
  View x, mask;
  double negative_slope;
  bool channels_last;
  int64_t channels, height, width;
  Range range;
  int64_t padding;    // pixels on each side of the image that outputs see
  int64_t reflected;  // of these mirror others; zeros, else
  Winners winners;
};
// The row or column of `size` that stands at i; -1: zeros.
inline int64_t standing_at(int64_t i, int64_t size, int64_t reflected) {
  const int64_t from = i < 0 ? -i : i < size ? i : 2 * (size - 1) - i;
  return i >= -reflected && i < size + reflected ? from : -1;
}
// Of x, which a filter's gradient reads without a mask.
template <typename Args>
Source source_of(const Args& a) {
  Source s{.x = a.x,
           .mask = {},
           .negative_slope = 0,
           .channels_last = a.x_channels_last,
           .channels = a.in_channels,
           .height = a.height,
           .width = a.width,
           .range = a.range,
           .padding = a.padding,
           .reflected = a.reflect ? a.padding : 0,
           .winners = {}};
  if constexpr (requires { a.x_mask; }) {
    s.mask = a.x_mask;
    s.winners = a.x_winners;
    s.negative_slope = a.negative_slope;
  }
  return s;
}
// One channel of an image.
template <typename T>
Source channel_of(const Source& s, int64_t c) {
  Source one = s;
  one.channels = 1;
  one.x.data = const_cast<T*>(at<T>(s.x, 0, c, 0, 0));
  if (s.mask.data) one.mask.data = const_cast<T*>(at<T>(s.mask, 0, c, 0, 0));
  return one;
}
inline Source grad_source_of(const FilterGradArgs& a) {
  return {.x = a.grad,
          .mask = a.grad_mask,
          .negative_slope = a.negative_slope,
          .channels_last = a.grad_channels_last,
          .channels = a.out_channels,
          .height = a.out_height(),
          .width = a.out_width(),
          .range = a.grad_range,
          .padding = 0,
          .reflected = 0,
          .winners = a.grad_winners};
}

// As pack(), of a contiguous image, all of whose columns are in the block, from the column `left` of it on; of
// its rows [first, last), zeros in the others.
template <typename T, typename S, typename M>
void pack_line(const Source& s, M masked, const Block& block, int64_t first, int64_t last,
               int64_t left, S* out, int64_t stride) {
  constexpr int L = lanes<S>;
  const View &x = s.x, &mask = s.mask;
  for (int64_t r = 0; r < block.rows; ++r) {
    S* row = out + r * block.columns * stride;
    const bool inside = first <= r && r < last;
    const int64_t before = inside ? left * stride : block.columns * stride,
                  behind = (left + s.width) * stride;
    for (int64_t i = 0; i < before; ++i) row[i] = S(0);
    for (int64_t i = inside ? behind : before; i < block.columns * stride; ++i) row[i] = S(0);
  }
  const int64_t count = (last - first) * s.width;
  for (int64_t c0 = 0; c0 < stride; c0 += L) {
    const int into = int(min(L, stride - c0)), from_channels = int(min(L, s.channels - c0));
    int64_t column = 0;
    S* to = out + (first * block.columns + left) * stride + c0;
    for (int64_t i = 0; i < count; i += L) {
      const int valid = int(min(L, count - i));
      Vec<S> tile[L];
      for (int c = 0; c < L; ++c) {
        tile[c] = Vec<S>{};
        if (c >= from_channels) continue;
        tile[c] = load_first<S>(at<T>(x, block.n, c0 + c, block.h + first, 0) + i, valid);
        if (mask.data)
          tile[c] = masked(
              tile[c], load_first<S>(at<T>(mask, block.n, c0 + c, block.h + first, 0) + i, valid));
      }
      transpose<S>(tile);
      for (int j = 0; j < valid; ++j, to += stride) {
        if (column == s.width) {
          column = 0;
          to += (block.columns - s.width) * stride;
        }
        ++column;
        if (into == L) {
          store_vec(to, tile[j]);
        } else {
          store_first<S>(to, tile[j], into);
        }
      }
    }
  }
}

// out[(r * columns + q)][0, stride) = mask(g, x)[block.n, :, block.h + r, block.w + q], zero
// outside the image and in channels past the last.
template <typename T, typename S, typename M>
void pack(const Source& s, M masked, const Block& block, S* out, int64_t stride) {
  constexpr int L = lanes<S>;
  const View &x = s.x, &mask = s.mask;
  const int64_t channels = s.channels, height = s.height, width = s.width;
  const int64_t begin = min(block.columns, max(0, -block.w)),
                end = max(begin, min(block.columns, width - block.w));
  // All rows of a contiguous image that the block has, whole: one line of pixels.
  if (!s.channels_last && stride > 1 && s.reflected == 0 && end - begin == width && x.w == 1 &&
      x.h == width && (!mask.data || (mask.w == 1 && mask.h == width))) {
    const int64_t first = min(block.rows, max(0, -block.h)),
                  last = max(first, min(block.rows, height - block.h));
    pack_line<T>(s, masked, block, first, last, begin, out, stride);
    return;
  }
  // A row of the image as it will be packed.
  const bool in_a_row = (s.channels_last || channels == 1) && channels == stride && x.w == stride &&
                        (!mask.data || mask.w == stride);
  for (int64_t r = 0; r < block.rows; ++r, out += block.columns * stride) {
    const int64_t h = standing_at(block.h + r, height, s.reflected);
    if (h < 0) {
      for (int64_t i = 0; i < block.columns * stride; ++i) out[i] = S(0);
      continue;
    }
    for (int64_t i = 0; i < begin * stride; ++i) out[i] = S(0);
    for (int64_t i = end * stride; i < block.columns * stride; ++i) out[i] = S(0);
    if (in_a_row) {
      const T* from = at<T>(x, block.n, 0, h, block.w + begin);
      const T* g = mask.data ? at<T>(mask, block.n, 0, h, block.w + begin) : nullptr;
      const int64_t count = (end - begin) * stride;
      for (int64_t i = 0; i < count; i += L) {
        const int valid = int(min(L, count - i));
        Vec<S> v = load_first<S>(from + i, valid);
        if (g) v = masked(v, load_first<S>(g + i, valid));
        store_first<S>(out + begin * stride + i, v, valid);
      }
      continue;
    }
    if (s.channels_last) {
      for (int64_t q = begin; q < end; ++q) {
        const T* from = at<T>(x, block.n, 0, h, block.w + q);
        const T* g = mask.data ? at<T>(mask, block.n, 0, h, block.w + q) : nullptr;
        S* to = out + q * stride;
        for (int64_t c = 0; c < stride; c += L) {
          const int valid = int(min(L, channels - c));
          Vec<S> v = valid > 0 ? load_first<S>(from + c, valid) : Vec<S>{};
          if (g && valid > 0) v = masked(v, load_first<S>(g + c, valid));
          if (stride - c >= L) {
            store_vec(to + c, v);
          } else {
            store_first<S>(to + c, v, int(stride - c));
          }
        }
      }
      continue;
    }
    for (int64_t c0 = 0; c0 < stride; c0 += L) {
      const int into = int(min(L, stride - c0)), from_channels = int(min(L, channels - c0));
      for (int64_t q = begin; q < end; q += L) {
        const int valid = int(min(L, end - q));
        if (into == 1) {  // one channel: nothing to turn
          Vec<S> v = load_first<S>(at<T>(x, block.n, c0, h, block.w + q), valid);
          if (mask.data)
            v = masked(v, load_first<S>(at<T>(mask, block.n, c0, h, block.w + q), valid));
          if (stride == 1) {
            store_first<S>(out + q, v, valid);
            continue;
          }
          for (int i = 0; i < valid; ++i) out[(q + i) * stride + c0] = v[i];
          continue;
        }
        Vec<S> tile[L];
        for (int c = 0; c < L; ++c) {
          tile[c] = Vec<S>{};
          if (c >= from_channels) continue;
          tile[c] = load_first<S>(at<T>(x, block.n, c0 + c, h, block.w + q), valid);
          if (mask.data)
            tile[c] =
                masked(tile[c], load_first<S>(at<T>(mask, block.n, c0 + c, h, block.w + q), valid));
        }
        transpose<S>(tile);
        for (int i = 0; i < valid; ++i) {
          if (into == L) {
            store_vec(out + (q + i) * stride + c0, tile[i]);
          } else {
            store_first<S>(out + (q + i) * stride + c0, tile[i], into);
          }
        }
      }
    }
  }
}

// As pack(), of a pooled gradient: every entry of a window that did not win is zero.
template <typename T, typename S>
void pack_winners(const Source& s, const Block& block, S* out, int64_t stride) {
  constexpr int L = lanes<S>;
  const Winners& w = s.winners;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t h = block.h + r, y = h / w.size;
    for (int64_t q = 0; q < block.columns; ++q, out += stride) {
      const int64_t column = block.w + q, x = column / w.size;
      if (h < 0 || column < 0 || y >= w.height || x >= w.width) {
        for (int64_t c = 0; c < stride; ++c) out[c] = S(0);
        continue;
      }
      const int place = int((h - y * w.size) * w.size + column - x * w.size);
      const T* from = at<T>(s.x, block.n, 0, y, x);
      const uint8_t* places = w.places + ((block.n * w.height + y) * w.width + x) * s.channels;
      int64_t c = 0;
      for (; c + L <= s.channels; c += L) {
        const IntVec<S> won = load_bytes<S>(places + c, L) == place;
        store_vec(out + c, won ? load_first<S>(from + c, L) : Vec<S>{});
      }
      if (c == stride) continue;
      const int valid = int(s.channels - c), into = int(min(L, stride - c));
      const IntVec<S> won = load_bytes<S>(places + c, valid) == place;
      store_first<S>(out + c, won ? load_first<S>(from + c, valid) : Vec<S>{}, into);
      for (c += into; c < stride; ++c) out[c] = S(0);
    }
  }
}

template <typename T, typename S>
void pack(const Source& s, const Block& block, S* out, int64_t stride) {
  if (s.winners.places) return pack_winners<T, S>(s, block, out, stride);
  with_relu_mask<S>(s.negative_slope, [&](auto mask) { pack<T, S>(s, mask, block, out, stride); });
  for (int64_t q = 0; s.reflected > 0 && q < block.columns; ++q) {
    const int64_t from = standing_at(block.w + q, s.width, s.reflected);
    if (from < 0 || from == block.w + q) continue;
    for (int64_t r = 0; r < block.rows; ++r)
      pack<T, S>(s, {block.n, block.h + r, from, 1, 1}, out + (r * block.columns + q) * stride,
                 stride);
  }
}

#if FASTDA_SIMD

// Loads `R` rows from y0 and `columns` columns from x0 of channels [c, c + VL) and hands each
// column's R vectors to `f`. Outside of the image, and past the last channel, zeros, or what an image
// without a mask mirrors there. strip: [R][VL][VL] floats.
template <typename T, int R, typename F>
FASTDA_INLINE void each_column(const Source& s, int64_t image, int64_t c, int64_t y0, int64_t x0,
                               int64_t columns, float* strip, F&& f) {
  const bool masked = s.mask.data != nullptr;
  const T* x = static_cast<const T*>(s.x.data) + image * s.x.n + c * s.x.c;
  const T* g = static_cast<const T*>(s.mask.data) + (masked ? image * s.mask.n + c * s.mask.c : 0);
  const int64_t sx = s.x.w, sg = s.mask.w;
  int64_t rows[R];
  for (int r = 0; r < R; ++r) rows[r] = standing_at(y0 + r, s.height, s.reflected);
  if (s.channels_last) {
    const int64_t first = max(x0, 0), last = min(x0 + columns, s.width);
    const Mask m = mask_of(0, s.channels - c);
    F32 d[R];
    // Column i, where column `from` stands.
    const auto column = [&](int64_t i, int64_t from) {
#pragma GCC unroll 10
      for (int r = 0; r < R; ++r) {
        d[r] = broadcast(0.0f);
        if (from < 0 || rows[r] < 0) continue;
        d[r] = load_vec(x + rows[r] * s.x.h + from * sx, m);
        if (masked)
          with_relu_mask<float>(s.negative_slope, [&](auto mask) {
            d[r] = mask(d[r], load_vec(g + rows[r] * s.mask.h + from * sg, m));
          });
      }
      f(i - x0, d);
    };
    for (int64_t i = x0; i < first; ++i) column(i, standing_at(i, s.width, s.reflected));
    for (int64_t i = last; i < x0 + columns; ++i) column(i, standing_at(i, s.width, s.reflected));
    if (y0 >= 0 && y0 + R <= s.height && c + VL <= s.channels) {
      if (!masked) {
        for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 10
          for (int r = 0; r < R; ++r) d[r] = load_vec(x + (y0 + r) * s.x.h + i * sx);
          f(i - x0, d);
        }
      } else {
        with_relu_mask<float>(s.negative_slope, [&](auto mask) __attribute__((always_inline)) {
          for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 10
            for (int r = 0; r < R; ++r)
              d[r] = mask(load_vec(x + (y0 + r) * s.x.h + i * sx),
                          load_vec(g + (y0 + r) * s.mask.h + i * sg));
            f(i - x0, d);
          }
        });
      }
    } else {
      for (int64_t i = first; i < last; ++i) column(i, i);
    }
    return;
  }
  const int64_t channels = min(VL, s.channels - c);
  for (int64_t i = 0; i < columns; i += VL) {
    const int64_t width = min(VL, columns - i);
    const int64_t first = max(0, -(x0 + i)), last = min(width, s.width - (x0 + i));
    const Mask m = mask_of(first, last);
    for (int r = 0; r < R; ++r) {
      float* line = strip + r * VL * VL;
      if (rows[r] < 0) {
        for (int k = 0; k < VL; ++k) store_vec(line + k * VL, broadcast(0.0f));
        continue;
      }
      const T* row = x + rows[r] * s.x.h + x0 + i;
      const T* mask_row = masked ? g + rows[r] * s.mask.h + x0 + i : nullptr;
      F32 v[VL];
      if (!masked) {
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k)
          v[k] = k < channels ? load_vec(row + k * s.x.c, m) : broadcast(0.0f);
      } else {
        with_relu_mask<float>(s.negative_slope, [&](auto mask) __attribute__((always_inline)) {
#pragma GCC unroll 16
          for (int k = 0; k < VL; ++k)
            v[k] = k < channels
                       ? mask(load_vec(row + k * s.x.c, m), load_vec(mask_row + k * s.mask.c, m))
                       : broadcast(0.0f);
        });
      }
      transpose<float>(v);
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k) store_vec(line + k * VL, v[k]);
      if (s.reflected == 0 || (first == 0 && last == width)) continue;
      for (int64_t j = 0; j < width; ++j) {
        const int64_t from = standing_at(x0 + i + j, s.width, s.reflected);
        if (from < 0 || (first <= j && j < last)) continue;
        for (int64_t k = 0; k < channels; ++k)
          line[j * VL + k] = load(x + rows[r] * s.x.h + k * s.x.c + from);
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      F32 d[R];
#pragma GCC unroll 10
      for (int r = 0; r < R; ++r) d[r] = load_vec(strip + (r * VL + j) * VL);
      f(i + j, d);
    }
  }
}

// -- 3 x 3 filters

// The taps of VL output channels from k on, of one input channel; zeros past the last output
// channel.
using Taps = float[9][VL];

// A filter whose 3 x 3 taps lie side by side, in their order (1) or, rotated, in the other (-1).
int64_t adjacent(const View& filter) {
  return filter.h == 3 && filter.w == 1 ? 1 : filter.h == -3 && filter.w == -1 ? -1 : 0;
}

// Of `count` (at most VL) input channels from c on.
template <typename T>
void load_taps(const View& filter, int64_t k, int64_t outputs, int64_t c, int64_t count,
               Taps* taps) {
  const int64_t valid = min(VL, outputs - k), order = adjacent(filter);
  const T* from = static_cast<const T*>(filter.data) + k * filter.n + c * filter.c;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (filter.n == 1 || filter.c == 1) {
      for (int t = 0; t < 9; ++t) {
        const T* tap = from + t / 3 * filter.h + t % 3 * filter.w;
        if (filter.n == 1) {
          for (int64_t i = 0; i < count; ++i)
            store_vec(taps[i][t], load_vec(tap + i * filter.c, mask_of(0, valid)));
          continue;
        }
        F32 v[VL];
        const Mask m = mask_of(0, count);
        for (int i = 0; i < VL; ++i)
          v[i] = i < valid ? load_vec(tap + i * filter.n, m) : broadcast(0.0f);
        transpose<float>(v);
        for (int i = 0; i < VL; ++i) {
          if (i >= count) break;
          store_vec(taps[i][t], v[i]);
        }
      }
      return;
    }
    if (order != 0) {
      const int64_t first = order > 0 ? 0 : -8;  // of the nine in memory
      for (int64_t i = 0; i < count; ++i) {
        const T* row = from + i * filter.c + first;
        F32 v[VL];
        const Mask m = mask_of(0, 9);
        for (int j = 0; j < VL; ++j)
          v[j] = j < valid ? load_vec(row + j * filter.n, m) : broadcast(0.0f);
        transpose<float>(v);
        for (int t = 0; t < (VL < 9 ? VL : 9); ++t) store_vec(taps[i][order > 0 ? t : 8 - t], v[t]);
        for (int t = VL; t < 9; ++t)
          for (int64_t j = 0; j < VL; ++j)
            taps[i][order > 0 ? t : 8 - t][j] = j < valid ? row[j * filter.n + t] : 0.0f;
      }
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i)
    for (int t = 0; t < 9; ++t)
      for (int64_t j = 0; j < VL; ++j)
        taps[i][t][j] =
            j < valid
                ? load(from + i * filter.c + j * filter.n + t / 3 * filter.h + t % 3 * filter.w)
                : 0.0f;
}

template <typename T>
void store_taps(const View& filter, int64_t k, int64_t outputs, int64_t c, const Taps& taps) {
  const int64_t valid = min(VL, outputs - k);
  T* to = static_cast<T*>(filter.data) + k * filter.n + c * filter.c;
  if constexpr (sizeof(T) == sizeof(float) && VL > 9) {
    if (adjacent(filter) == 1) {
      F32 v[VL];
      for (int t = 0; t < VL; ++t) v[t] = t < 9 ? load_vec(taps[t]) : broadcast(0.0f);
      transpose<float>(v);
      for (int i = 0; i < VL; ++i) {
        if (i >= valid) break;
        store_vec(to + i * filter.n, v[i], mask_of(0, 9));
      }
      return;
    }
  }
  for (int64_t i = 0; i < valid; ++i)
    for (int t = 0; t < 9; ++t)
      store(to + i * filter.n + t / 3 * filter.h + t % 3 * filter.w, taps[t][i]);
}

#endif

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
