// Weight gradient: d_weight[k, c, tap] = Σ over pixels of grad[pixel, k] · x[pixel moved by tap,
// c], four warps a block.
//
//   block (three taps × 64 output × 64 input channels, a piece of all tiles)
//     for every tile of its piece
//       grad ─ tile, masked ───────┐ shared memory: a row per pixel, 64 channels; the next tile is
//       x ─ tile with halo ────────┤ copied while this one is used, where there is room for both
//                                  └─ registers: warp w has 32 × 32 channels at each of three taps
//   registers ─ sums[piece]; another launch adds the pieces in order
//
// The number of pieces depends on the shapes alone, so that the order of all sums does too.
#pragma once

#include "cuda/kernels/conv_tile.cuh"

namespace fastda::cuda {

constexpr int grad_threads = 128;
constexpr int grad_channels = 64;
constexpr int grad_taps = 3;
// Pixels of a tile, and pieces of 16 bytes in a row of 64 channels.
template <typename T>
constexpr int grad_pixels = sizeof(T) == 4 ? 64 : 128;
template <typename T>
constexpr int grad_pieces = grad_channels * int(sizeof(T)) / 16;
// Of two neighbouring pixels, float32 rows read two pieces each at once: keys go up in twos.
template <typename T>
constexpr int grad_key_shift = sizeof(T) == 4 ? 1 : 0;

struct FilterGradKernel {
  View x, grad, mask;
  float* sums;                                           // [pieces][taps][K][C]
  float* bias_sums;                                      // [pieces][K] or null
  int in_channels, out_channels, kernel, blocks_across;  // blocks_across: of input channels
  int tile_height, tile_pixels, tiles_total, tiles_per_piece;
  int stages;  // tiles in shared memory: 1 or 2
  Divisor tile_width, tiles, tiles_across;
  WindowShape window, core;  // with halo, without
  bool x_packs, grad_packs, weight;
  float slope;
};

template <typename T, bool exact>
FASTDA_KERNEL(grad_threads)
filter_grad_kernel(FilterGradKernel p) {
  constexpr int pixels = grad_pixels<T>, pieces = grad_pieces<T>, row = pieces * 16,
                shift = grad_key_shift<T>;
  FASTDA_DYNAMIC_SHARED(shared);
  // A stage: x [window pixels + one of zeros], grad [pixels], and of each pixel its row of x at the
  // first tap.
  const uint32_t zero_row = p.window.pixels.value;
  const uint32_t grad_start = (zero_row + 1) * row, row_of_start = grad_start + pixels * row;
  const uint32_t stage_bytes = row_of_start + pixels * 4;

  const int taps = p.kernel * p.kernel;
  const int groups = (taps + grad_taps - 1) / grad_taps;
  const int first_tap = int(blockIdx.x) % groups * grad_taps;
  const int c0 = int(blockIdx.x) / groups % p.blocks_across * grad_channels;
  const int k0 = int(blockIdx.x) / groups / p.blocks_across * grad_channels;
  const bool bias = p.bias_sums != nullptr && first_tap == 0 && c0 == 0;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;

  // Without tensor cores a thread has eight output channels and four input channels.
  constexpr int A = exact ? 8 : 2, B = exact ? 4 : 4;
  float sum[grad_taps][A][B][exact ? 1 : 4] = {};
  float bias_sum = 0;
  uint32_t move[grad_taps], turn[grad_taps];  // what a tap adds to a row and its key
  FASTDA_UNROLL
  for (int t = 0; t < grad_taps; ++t) {
    const int tap = first_tap + t < taps ? first_tap + t : first_tap;
    move[t] = uint32_t(tap / p.kernel) * p.window.width.value + uint32_t(tap % p.kernel);
    turn[t] = uint32_t(tap / p.kernel) * p.tile_width.value + uint32_t(tap % p.kernel);
  }
  for (int s = 0; s < p.stages; ++s) {
    unsigned char* stage = shared + uint32_t(s) * stage_bytes;
    for (int i = thread; i < row / 4; i += grad_threads)
      reinterpret_cast<float*>(stage + zero_row * row)[i] = 0;
    // What no pixel of a tile fills must count for nothing, even where x is not finite.
    for (int i = thread + p.tile_pixels * pieces; i < pixels * pieces; i += grad_threads)
      store_pack(reinterpret_cast<uint32_t*>(stage + grad_start + i * 16), Pack<uint32_t, 4>{});
  }

  const int first_tile = int(blockIdx.y) * p.tiles_per_piece;
  const int end = first_tile + p.tiles_per_piece < p.tiles_total ? first_tile + p.tiles_per_piece
                                                                 : p.tiles_total;
  const auto fetch = [&](int tile, unsigned char* stage) {
    const auto image = int(p.tiles.quotient(uint32_t(tile)));
    const uint32_t within = uint32_t(tile) - uint32_t(image) * p.tiles.value;
    const uint32_t down = p.tiles_across.quotient(within);
    const int y0 = int(down) * p.tile_height;
    const int x0 = int(within - down * p.tiles_across.value) * int(p.tile_width.value);
    const int half = p.kernel / 2;
    if (p.weight)
      load_window<T, grad_threads, pieces, shift>(stage, p.x, View{}, 0, p.x_packs, c0,
                                                  p.in_channels, {image, y0 - half, x0 - half},
                                                  p.window);
    load_window<T, grad_threads, pieces, shift>(stage + grad_start, p.grad, p.mask, p.slope,
                                                p.grad_packs, k0, p.out_channels, {image, y0, x0},
                                                p.core);
    for (int m = thread; m < pixels; m += grad_threads) {
      const uint32_t r = p.tile_width.quotient(uint32_t(m)),
                     c = uint32_t(m) - r * p.tile_width.value;
      const bool there =
          m < p.tile_pixels && y0 + int(r) < p.window.height && x0 + int(c) < p.window.columns;
      reinterpret_cast<int*>(stage + row_of_start)[m] =
          there ? int(r * p.window.width.value + c) : -1;
    }
    commit_copies();
  };
  const int ahead = p.stages - 1;
  uint32_t current = 0;  // where this tile's stage starts
  FASTDA_NO_UNROLL
  for (int tile = first_tile - ahead; tile < end; ++tile) {
    const uint32_t other = ahead ? stage_bytes - current : 0;
    if (ahead) wait_copies<0>();
    // This tile is there for all, where it was fetched ahead, and no warp reads the last one any
    // more.
    __syncthreads();
    if (tile + ahead < end) fetch(tile + ahead, shared + (tile < first_tile ? current : other));
    if (tile < first_tile) continue;
    if (!ahead) {
      wait_copies<0>();
      __syncthreads();
    }
    const unsigned char *x_rows = shared + current, *grad_rows = x_rows + grad_start;
    const auto* row_of = reinterpret_cast<const int*>(x_rows + row_of_start);
    current = other;

    const auto x_row = [&](int m, int t) {  // and the key of its pieces
      const int at = row_of[m];
      return at < 0 ? zero_row : uint32_t(at) + move[t];
    };
    if (bias) {
      const int k = thread % grad_channels, start = thread / grad_channels * (pixels / 2);
      constexpr int E = 16 / int(sizeof(T));
      for (int m = start; m < start + pixels / 2; ++m)
        bias_sum += widen(reinterpret_cast<const T*>(grad_rows + m * row +
                                                     ((k / E) ^ ((m << shift) & 7)) * 16)[k % E]);
    }
    if (p.weight) {
      if constexpr (exact) {
        const int ks = thread / 16, cs = thread % 16;  // packs of eight and of four channels
        FASTDA_NO_UNROLL
        for (int m = 0; m < pixels; ++m) {
          Pack<float, 4> a[2], b[grad_taps];
          FASTDA_UNROLL
          for (int i = 0; i < 2; ++i)
            a[i] = load_pack<4>(reinterpret_cast<const float*>(
                grad_rows + m * row + ((ks * 2 + i) ^ ((m << shift) & 7)) * 16));
          FASTDA_UNROLL
          for (int t = 0; t < grad_taps; ++t)
            b[t] = load_pack<4>(reinterpret_cast<const float*>(
                x_rows + x_row(m, t) * row +
                (uint32_t(cs) ^ (((uint32_t(m) + turn[t]) << shift) & 7)) * 16));
          FASTDA_UNROLL
          for (int t = 0; t < grad_taps; ++t) {
            FASTDA_UNROLL
            for (int i = 0; i < 8; ++i) {
              FASTDA_UNROLL
              for (int j = 0; j < 4; ++j) sum[t][i][j][0] += a[i / 4].at[i % 4] * b[t].at[j];
            }
          }
        }
      } else if constexpr (sizeof(T) == 2) {
        // Both factors lie pixel by pixel and are summed over pixels: ldmatrix transposes them on
        // the way.
        const uint32_t k = uint32_t(warp / 2 * 4), c = uint32_t(warp % 2 * 4);  // first pieces
        FASTDA_NO_UNROLL
        for (int step = 0; step < pixels / 16; ++step) {
          uint32_t a[2][4];
          const auto m_a = uint32_t(step * 16 + (lane & 7) + (lane >> 4) * 8);
          FASTDA_UNROLL
          for (int i = 0; i < 2; ++i)
            load_matrices_transposed(
                a[i],
                grad_rows + m_a * row + ((k + uint32_t(i) * 2 + (lane >> 3 & 1)) ^ (m_a & 7)) * 16);
          const int m_b = step * 16 + (lane & 15);
          FASTDA_UNROLL
          for (int t = 0; t < grad_taps; ++t) {
            const unsigned char* from = x_rows + x_row(m_b, t) * row;
            const uint32_t key = (uint32_t(m_b) + turn[t]) & 7;
            FASTDA_UNROLL
            for (int j = 0; j < 4; j += 2) {
              uint32_t b[4];
              load_matrices_transposed(b, from + ((c + uint32_t(j) + (lane >> 4)) ^ key) * 16);
              FASTDA_UNROLL
              for (int i = 0; i < 2; ++i) {
                mma(T{}, sum[t][i][j], a[i], b[0], b[1]);
                mma(T{}, sum[t][i][j + 1], a[i], b[2], b[3]);
              }
            }
          }
        }
      } else {
        // Entry (pixel, first channel + lane / 4 + 8 j) of rows lies 32 j bytes further, but for the
        // key, which turns what is added into an exclusive or.
        const uint32_t k = uint32_t(warp / 2 * 32 + lane / 4),
                       c = uint32_t(warp % 2 * 32 + lane / 4);
        const auto place = [&](uint32_t r, uint32_t key, uint32_t channel) {
          return r * row + ((channel / 4 ^ (key << shift & 7)) * 16 + channel % 4 * 4);
        };
        const auto entry = [&](const unsigned char* rows, uint32_t at, int j) {
          return round_tf32(*reinterpret_cast<const float*>(rows + (at ^ uint32_t(j * 32))));
        };
        FASTDA_NO_UNROLL
        for (int step = 0; step < pixels / 8; ++step) {
          uint32_t a[2][4];
          FASTDA_UNROLL
          for (int e = 0; e < 4; e += 2) {
            const auto m = uint32_t(step * 8 + lane % 4 + e * 2);
            const uint32_t at = place(m, m, k);
            FASTDA_UNROLL
            for (int i = 0; i < 2; ++i) {
              a[i][e] = entry(grad_rows, at, i * 2);
              a[i][e + 1] = entry(grad_rows, at, i * 2 + 1);
            }
          }
          FASTDA_UNROLL
          for (int t = 0; t < grad_taps; ++t) {
            uint32_t b[4][2];
            FASTDA_UNROLL
            for (int e = 0; e < 2; ++e) {
              const int m = step * 8 + lane % 4 + e * 4;
              const uint32_t at = place(x_row(m, t), uint32_t(m) + turn[t], c);
              FASTDA_UNROLL
              for (int j = 0; j < 4; ++j) b[j][e] = entry(x_rows, at, j);
            }
            FASTDA_UNROLL
            for (int j = 0; j < 4; ++j) {
              FASTDA_UNROLL
              for (int i = 0; i < 2; ++i) mma(T{}, sum[t][i][j], a[i], b[j][0], b[j][1]);
            }
          }
        }
      }
    }
  }

  const int64_t piece = blockIdx.y;
  if (bias) {
    auto* bias_halves = reinterpret_cast<float*>(shared);
    __syncthreads();  // no thread reads the last tile any more
    bias_halves[thread] = bias_sum;
    __syncthreads();
    if (thread < grad_channels && k0 + thread < p.out_channels)
      p.bias_sums[piece * p.out_channels + k0 + thread] =
          bias_halves[thread] + bias_halves[thread + grad_channels];
  }
  if (!p.weight) return;
  const auto add = [&](int t, int k, int c, float v) {
    if (first_tap + t >= taps) return;
    if (k0 + k >= p.out_channels || c0 + c >= p.in_channels) return;
    p.sums[((piece * taps + first_tap + t) * p.out_channels + k0 + k) * p.in_channels + c0 + c] = v;
  };
  FASTDA_UNROLL
  for (int t = 0; t < grad_taps; ++t) {
    FASTDA_UNROLL
    for (int i = 0; i < A; ++i) {
      FASTDA_UNROLL
      for (int j = 0; j < B; ++j) {
        if constexpr (exact) {
          add(t, thread / 16 * 8 + i, thread % 16 * 4 + j, sum[t][i][j][0]);
        } else {
          FASTDA_UNROLL
          for (int e = 0; e < 4; ++e)
            add(t, warp / 2 * 32 + i * 16 + lane / 4 + e / 2 * 8,
                warp % 2 * 32 + j * 8 + lane % 4 * 2 + e % 2, sum[t][i][j][e]);
        }
      }
    }
  }
}

struct DirectFilterGrad {
  View x, grad, mask;
  void *sums, *bias_sums;  // as above, in the wide type; either may be null
  int in_channels, out_channels, height, width, kernel;
  int64_t pixels, piece;  // of all images, of one piece
  double slope;
};

constexpr int direct_grad_threads = 128;

// One entry of the filter, or of the bias behind it, a thread.
template <typename T>
FASTDA_KERNEL(direct_grad_threads)
direct_filter_grad_kernel(DirectFilterGrad p) {
  using S = typename Wide<T>::type;
  const int taps = p.kernel * p.kernel;
  const int64_t entries = p.sums ? int64_t(taps) * p.out_channels * p.in_channels : 0;
  const int64_t i = int64_t(blockIdx.x) * direct_grad_threads + threadIdx.x;
  if (i >= entries + (p.bias_sums ? p.out_channels : 0)) return;
  const bool is_bias = i >= entries;
  const auto c = int(is_bias ? 0 : i % p.in_channels);
  const auto k = int(is_bias ? i - entries : i / p.in_channels % p.out_channels);
  const auto tap = int(is_bias ? 0 : i / p.in_channels / p.out_channels);
  const int dy = tap / p.kernel - p.kernel / 2, dx = tap % p.kernel - p.kernel / 2;
  const int64_t begin = int64_t(blockIdx.y) * p.piece;
  const int64_t end = begin + p.piece < p.pixels ? begin + p.piece : p.pixels;
  const auto* grad = static_cast<const T*>(p.grad.data);
  const auto* mask = static_cast<const T*>(p.mask.data);
  const auto* x = static_cast<const T*>(p.x.data);
  int64_t image = begin / (int64_t(p.height) * p.width);
  int64_t rest = begin - image * (int64_t(p.height) * p.width);
  int row = int(rest / p.width), column = int(rest - int64_t(row) * p.width);
  S sum = 0;
  FASTDA_NO_UNROLL
  for (int64_t m = begin; m < end; ++m) {
    T g = grad[image * p.grad.n + k * p.grad.c + row * p.grad.h + column * p.grad.w];
    if (mask)
      g = masked(mask[image * p.mask.n + k * p.mask.c + row * p.mask.h + column * p.mask.w], g,
                 S(p.slope));
    if (is_bias) {
      sum += widen(g);
    } else if (row + dy >= 0 && row + dy < p.height && column + dx >= 0 && column + dx < p.width) {
      sum += S(widen(g)) *
             S(widen(x[image * p.x.n + c * p.x.c + (row + dy) * p.x.h + (column + dx) * p.x.w]));
    }
    if (++column == p.width) {
      column = 0;
      if (++row == p.height) row = 0, ++image;
    }
  }
  if (is_bias) {
    static_cast<S*>(p.bias_sums)[blockIdx.y * int64_t(p.out_channels) + k] = sum;
  } else {
    static_cast<S*>(p.sums)[blockIdx.y * entries + i] = sum;
  }
}

struct AddPieces {
  const void *sums, *bias_sums;  // [pieces][taps][K][C], [pieces][K]; either may be null
  void *d_weight, *d_bias;       // [K][C][taps], [K]
  int pieces, in_channels, out_channels, taps;
};

constexpr int add_threads = 128;

template <typename T>
FASTDA_KERNEL(add_threads)
add_pieces_kernel(AddPieces p) {
  using S = typename Wide<T>::type;
  const int64_t entries = p.d_weight ? int64_t(p.taps) * p.out_channels * p.in_channels : 0;
  int64_t i = int64_t(blockIdx.x) * add_threads + threadIdx.x;
  const bool is_bias = i >= entries;
  const int64_t count = is_bias ? p.out_channels : entries;
  if (is_bias) i -= entries;
  if (i >= count || (is_bias && p.d_bias == nullptr)) return;
  const S* from = static_cast<const S*>(is_bias ? p.bias_sums : p.sums) + i;
  S sum = 0;
  FASTDA_UNROLL
  for (int piece = 0; piece < p.pieces; ++piece) sum += from[piece * count];
  if (is_bias) {
    static_cast<T*>(p.d_bias)[i] = narrowed<T>(sum);
    return;
  }
  const int64_t c = i % p.in_channels, k = i / p.in_channels % p.out_channels,
                tap = i / p.in_channels / p.out_channels;
  static_cast<T*>(p.d_weight)[(k * p.in_channels + c) * p.taps + tap] = narrowed<T>(sum);
}

}  // namespace fastda::cuda
