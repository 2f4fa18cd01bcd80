// The epilogue: what happens between a sum and the output. Internal linkage throughout: see
// common/dtype.h.
//
//   sum + bias -> + residual, masked by ReLU -> ReLU -> masked by the ReLU of out -> T
//
// where ReLU may be leaky.
#pragma once

#include <type_traits>

#include "cpu/conv/transform.h"
#include "cpu/simd/stream.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

// The operands from element (n, c, h, w) on.
template <typename T, typename S>
struct Epilogue {
  const T *residual, *residual_mask, *out_mask;
  T* out;
  double negative_slope;
  Vec<S> low;         // of ReLU, or -infinity
  bool leaky, plain;  // plain: nothing but a limit
  // Of few input channels the products are so few that stores take the time; whole lines of what is too
  // large to be found in the cache later go past it.
  bool past_the_cache;

  Epilogue(const ConvArgs& a, int64_t n, int64_t c, int64_t h, int64_t w)
      : negative_slope(a.negative_slope),
        low(broadcast(a.relu ? S(0) : -S(__builtin_inf()))),
        leaky(a.relu && a.negative_slope != 0) {
    const auto operand = [&](const View& v) {
      return v.data ? const_cast<T*>(at<T>(v, n, c, h, w)) : nullptr;
    };
    residual = operand(a.residual);
    residual_mask = operand(a.residual_mask);
    out_mask = operand(a.out_mask);
    out = operand(a.out);
    plain = !residual && !out_mask && !leaky;
    past_the_cache = std::is_same_v<T, float> && vector_bytes == 64 && few_inputs(a) &&
                     a.out_channels_last && a.out_channels % lanes<float> == 0 &&
                     reinterpret_cast<uintptr_t>(a.out.data) % 64 == 0 &&
                     (a.out.w | a.out.h | a.out.n) % lanes<float> == 0 &&
                     a.batch * a.out_channels * a.out_height() * a.out_width() >= 3 << 19;
  }

  // Offsets are in elements; load_operand(pointer) loads as many lanes as there are.
  template <typename F>
  [[gnu::always_inline]] inline Vec<S> apply(Vec<S> x, int64_t at_residual,
                                             int64_t at_residual_mask, int64_t at_out_mask,
                                             F&& load_operand) const {
    const auto mask = [&](Vec<S>& v, const T* by) __attribute__((always_inline)) {
      const Vec<S> g = load_operand(by);
      with_relu_mask<S>(negative_slope,
                        [&](auto masked) __attribute__((always_inline)) { v = masked(v, g); });
    };
    if (residual) {
      Vec<S> r = load_operand(residual + at_residual);
      if (residual_mask) mask(r, residual_mask + at_residual_mask);
      x = x + r;
    }
    if (leaky) {
      x = leaky_relu_mask(x, x, broadcast(S(negative_slope)));
    } else {
      x = clamp_min(x, low);
    }
    if (out_mask) mask(x, out_mask + at_out_mask);
    return x;
  }
};

// One vector of results, of channel k and column w from those of the epilogue on.
template <typename T, typename S>
inline void store_result(const ConvArgs& a, const Epilogue<T, S>& e, Vec<S> sum, int valid,
                         int64_t k, int64_t w) {
  const auto offset = [=](const View& v) { return k * v.c + w * v.w; };
  if (e.plain) {
    T* to = e.out + offset(a.out);
    const Vec<S> result = clamp_min(sum, e.low);
    if constexpr (std::is_same_v<T, float>) {
      if (e.past_the_cache) {
        stream_vec(to, result);
        return;
      }
    }
    store_first<S>(to, result, valid);
    return;
  }
  const auto first = [=](const T* x) { return load_first<S>(x, valid); };
  const Vec<S> result =
      e.apply(sum, offset(a.residual), offset(a.residual_mask), offset(a.out_mask), first);
  store_first<S>(e.out + offset(a.out), result, valid);
}

// sums[r * columns + q][0, stride) to the output block at (block.h + r, block.w + q).
template <typename T, typename S>
void epilogue(const ConvArgs& a, const S* sums, int64_t columns, int64_t stride,
              const Block& block) {
  constexpr int L = lanes<S>;
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t r = 0; r < block.rows; ++r, sums += columns * stride) {
    const Epilogue<T, S> e(a, block.n, 0, block.h + r, block.w);
    if (a.out_channels_last) {
      for (int64_t q = 0; q < block.columns; ++q) {
        for (int64_t k = 0; k < a.out_channels; k += L) {
          const int valid = int(min(L, a.out_channels - k));
          Vec<S> v = load_vec(sums + q * stride + k);
          if (bias) v += load_first<S>(bias + k, valid);
          store_result<T, S>(a, e, v, valid, k, q);
        }
      }
      if (e.past_the_cache) stream_fence();
      continue;
    }
    for (int64_t k0 = 0; k0 < a.out_channels; k0 += L) {
      const int64_t channels = min(L, a.out_channels - k0);
      for (int64_t q = 0; q < block.columns; q += L) {
        const int valid = int(min(L, block.columns - q));
        Vec<S> tile[L];
        for (int i = 0; i < L; ++i)
          tile[i] = i < valid ? load_vec(sums + (q + i) * stride + k0) : Vec<S>{};
        transpose<S>(tile);
        for (int64_t k = 0; k < channels; ++k) {
          Vec<S> v = tile[k];
          if (bias) v += broadcast(S(load(bias + k0 + k)));
          store_result<T, S>(a, e, v, valid, k0 + k, q);
        }
      }
    }
  }
}

#if FASTDA_SIMD

// `finite` stays zero where every value of the block is finite, and becomes NaN otherwise: what is
// not finite in the points shows in the corners of the 4 x 4 pixels.
template <typename T, typename W = Winograd43>
void output_run(const ConvArgs& p, const Grid& grid, const Run& run, int64_t k, const Workspace& m,
                Scratch& scratch, F32& finite) {
  const Epilogue<T, float> e(p, run.image, k, run.row * tile_size, run.column * tile_size);
  const View &vr = p.residual, &vm = p.residual_mask, &vo = p.out_mask, &out = p.out;
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t channels = min(VL, p.out_channels - k);
  const int64_t rows = min(4, grid.height - run.row * 4);
  const int64_t width = min(run.count * 4, grid.width - run.column * 4);

  if (p.out_channels_last) {
    const Mask valid = mask_of(0, channels);
    const auto whole = [](const T* x) __attribute__((always_inline)) { return load_vec(x); };
    const auto part = [=](const T* x) __attribute__((always_inline)) { return load_vec(x, valid); };
    const F32 b = bias ? load_vec(bias + k, valid) : broadcast(0.0f);
    for (int64_t q = 0; q < run.count; ++q) {
      F32 y[4][4];
      output_tile<W>(m.at(run.position + q, 0, k), m.slot, y, finite);
      if (channels == VL && rows == 4 && width >= q * 4 + 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const int64_t x = q * 4 + j;
            const F32 result = e.apply(y[i][j] + b, i * vr.h + x * vr.w, i * vm.h + x * vm.w,
                                       i * vo.h + x * vo.w, whole);
            store_vec(e.out + i * out.h + x * out.w, result);
          }
      } else {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < min(4, width - q * 4); ++j) {
            const int64_t x = q * 4 + j;
            const F32 result = e.apply(y[i][j] + b, i * vr.h + x * vr.w, i * vm.h + x * vm.w,
                                       i * vo.h + x * vo.w, part);
            store_vec(e.out + i * out.h + x * out.w, result, valid);
          }
      }
    }
    return;
  }

  for (int64_t q = 0; q < run.count; q += VL / 4) {
    float* pixels = scratch.columns;  // [4 rows][VL pixels][VL channels]
    for (int64_t a = 0; a < min(VL / 4, run.count - q); ++a) {
      F32 y[4][4];
      output_tile<W>(m.at(run.position + q + a, 0, k), m.slot, y, finite);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_vec(pixels + ((i * VL) + a * 4 + j) * VL, y[i][j]);
    }
    const Mask valid = mask_of(0, width - q * 4);
    const auto part = [=](const T* x) __attribute__((always_inline)) { return load_vec(x, valid); };
    for (int64_t i = 0; i < rows; ++i) {
      F32 v[VL];
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j) v[j] = load_vec(pixels + (i * VL + j) * VL);
      transpose<float>(v);
      const int64_t x = q * 4;
#pragma GCC unroll 16
      for (int c = 0; c < VL; ++c) {
        if (c >= channels) break;
        const F32 b = bias ? broadcast(load(bias + k + c)) : broadcast(0.0f);
        const F32 result = e.apply(v[c] + b, i * vr.h + x + c * vr.c, i * vm.h + x + c * vm.c,
                                   i * vo.h + x + c * vo.c, part);
        T* to = e.out + i * out.h + x * out.w + c * out.c;
        if (out.w == 1) {
          store_vec(to, result, valid);
        } else {  // every second pixel
          alignas(64) float pixel[VL];
          store_vec(pixel, result);
          for (int64_t j = 0; j < min(VL, width - x); ++j) store(to + j * out.w, pixel[j]);
        }
      }
    }
  }
}

#endif

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
