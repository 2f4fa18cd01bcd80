// What the convolution kernels share: tiles of pixels in shared memory, and products of such tiles.
//
// A row of shared memory holds 64 channels (16-bit types) or 32 (float32) of one pixel, or of one
// output channel's filter entries at one tap: 128 bytes, eight pieces of 16. Piece p of a row with
// key q stands at place p ^ (q % 8), so that the same piece of eight rows with consecutive keys
// lies in eight different groups of four banks, and ldmatrix reads it in one pass. A pixel's key
// counts along the tile without its halo,
//
//   key(py, px) = py · tile width + px
//
// so that eight neighbouring output pixels have consecutive keys at every tap, also across the
// tile's right edge.
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/refiner_conv.h"

namespace fastda::cuda {

constexpr int row_bytes = 128;
constexpr int filter_columns = 64;                        // output channels of one filter block
constexpr int filter_bytes = filter_columns * row_bytes;  // of one tap
template <typename T>
constexpr int row_channels = row_bytes / int(sizeof(T));

// As masked_wide, in the type of the images.
template <typename T>
FASTDA_DEVICE T masked(T mask, T v, typename Wide<T>::type slope) {
  if (slope == 0) return widen(mask) <= 0 ? T{} : v;  // without rounding
  return narrowed<T>(masked_wide(widen(mask), widen(v), slope));
}

// Pixels of one image, some of them outside: rows from y, columns from x.
struct Window {
  int image, y, x;
};
struct WindowShape {
  Divisor pixels, width;
  int key_width;        // of the tile without halo
  int height, columns;  // of the image
};

// Fills rows of `pieces` pieces, one for each pixel of the window, with channels [channel, channel
// + …) of a view; zeros outside the image and beyond its channels. `packs`: 16 bytes along the
// channels can be read at once, which is done by asynchronous copies where there is no mask.
template <typename T, int threads, int pieces, int key_shift>
FASTDA_DEVICE void load_window(unsigned char* rows, const View& view, const View& mask, float slope,
                               bool packs, int channel, int channels, Window at,
                               const WindowShape& shape) {
  constexpr int E = 16 / int(sizeof(T));
  const T* from = static_cast<const T*>(view.data) + at.image * view.n;
  const T* from_mask = static_cast<const T*>(mask.data) + at.image * mask.n;
  const uint32_t total = shape.pixels.value * pieces;
  struct Place {
    unsigned char* to;
    int y, x, c;
    bool inside;
  };
  const auto place = [&](uint32_t pixel, uint32_t piece) {
    const uint32_t row = shape.width.quotient(pixel), column = pixel - row * shape.width.value;
    const int y = at.y + int(row), x = at.x + int(column);
    const bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.columns;
    const uint32_t key = (row * uint32_t(shape.key_width) + column) << key_shift;
    return Place{rows + (pixel * pieces + (piece ^ (key & 7))) * 16, y, x, channel + int(piece) * E,
                 inside};
  };
  // Neighbouring threads read what is side by side in memory: pieces of a pixel, or pixels of a
  // channel.
  if (packs && mask.data == nullptr) {
    for (uint32_t i = threadIdx.x; i < total; i += threads) {
      const Place p = place(i / pieces, i % pieces);
      const bool known = p.inside && p.c < channels;
      copy_async(p.to, known ? from + (p.y * view.h + p.x * view.w + p.c) : from, known);
    }
  } else if (packs) {
    constexpr uint32_t ahead = 2;  // loads of so many pieces are under way at once
    using Pieces = Pack<T, E>;
    using Words = Pack<uint32_t, 4>;  // half the registers of single 16-bit values
    const auto words = [](const T* p) {
      return load_pack<4>(reinterpret_cast<const uint32_t*>(p));
    };
    FASTDA_NO_UNROLL
    for (uint32_t start = threadIdx.x; start < total; start += threads * ahead) {
      Words pack[ahead] = {}, its_mask[ahead] = {};
      unsigned char* to[ahead];
      FASTDA_UNROLL
      for (uint32_t u = 0; u < ahead; ++u) {
        const uint32_t i = start + u * threads;
        const Place p = place(i / pieces, i % pieces);
        to[u] = p.to;
        if (i < total && p.inside && p.c < channels) {
          pack[u] = words(from + (p.y * view.h + p.x * view.w + p.c));
          its_mask[u] = words(from_mask + (p.y * mask.h + p.x * mask.w + p.c));
        }
      }
      FASTDA_UNROLL
      for (uint32_t u = 0; u < ahead; ++u) {
        auto v = __builtin_bit_cast(Pieces, pack[u]);
        const auto g = __builtin_bit_cast(Pieces, its_mask[u]);
        FASTDA_UNROLL
        for (int e = 0; e < E; ++e) v.at[e] = masked(g.at[e], v.at[e], slope);
        if (start + u * threads < total) store_pack(reinterpret_cast<T*>(to[u]), v);
      }
    }
  } else {
    for (uint32_t i = threadIdx.x; i < total; i += threads) {
      const uint32_t piece = shape.pixels.quotient(i);
      const Place p = place(i - piece * shape.pixels.value, piece);
      // Loads of all channels of the piece are under way at once, and those of the mask.
      Pack<T, E> pack{}, its_mask{};
      const auto fetch = [&](const T* at, const View& v, Pack<T, E>& to) {
        at += p.y * v.h + p.x * v.w + p.c * v.c;
        FASTDA_UNROLL
        for (int e = 0; e < E; ++e) {
          if (p.inside && p.c + e < channels) to.at[e] = *at;
          at += v.c;
        }
      };
      fetch(from, view, pack);
      if (mask.data) {
        fetch(from_mask, mask, its_mask);
        FASTDA_UNROLL
        for (int e = 0; e < E; ++e) pack.at[e] = masked(its_mask.at[e], pack.at[e], slope);
      }
      store_pack(reinterpret_cast<T*>(p.to), pack);
    }
  }
}

// sum[16 i + …, 8 j + …] += pixels · filter over the channels of a row, on tensor cores: M tiles of
// 16 pixels, of which this lane points at row `row[i]`, and 8 N filter rows from `filter` on. Keys
// count on from tile to tile, so that `key`, the first one's, is all of them but for multiples of 8.
// Fragments as the PTX ISA has them for mma.m16n8k16 and, in TF32, mma.m16n8k8: both take 32 bytes
// of a row a step.
template <typename T, int M, int N>
FASTDA_DEVICE void multiply_rows(float (&sum)[M][N][4], const unsigned char* pixels,
                                 const uint32_t (&row)[M], uint32_t key,
                                 const unsigned char* filter) {
  const uint32_t lane = threadIdx.x % 32;
  const unsigned char* column = filter + ((lane & 7) + (lane >> 4) * 8) * row_bytes;
  FASTDA_UNROLL
  for (int step = 0; step < row_bytes / 32; ++step) {
    uint32_t a[M][4];
    FASTDA_UNROLL
    for (int i = 0; i < M; ++i) {
      load_matrices(a[i],
                    pixels + row[i] * row_bytes + (((step * 2 + (lane >> 4)) ^ (key & 7)) * 16));
      if (sizeof(T) == 4) {
        FASTDA_UNROLL
        for (int e = 0; e < 4; ++e) a[i][e] = round_tf32(float_of(a[i][e]));
      }
    }
    FASTDA_UNROLL
    for (int j = 0; j < N; j += 2) {
      uint32_t b[4];
      load_matrices(
          b, column + j * 8 * row_bytes + (((step * 2 + (lane >> 3 & 1)) ^ (lane & 7)) * 16));
      FASTDA_UNROLL
      for (int i = 0; i < M; ++i) {
        mma(T{}, sum[i][j], a[i], b[0], b[1]);
        mma(T{}, sum[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// The same in float32 without tensor cores: lane l of a warp has pixels 4 i + l / 8 and filter rows
// 8 j + l % 8, so that what eight lanes read together has eight consecutive keys; `key`: of i = 0.
FASTDA_DEVICE void multiply_rows_exactly(float (&sum)[8][8], const unsigned char* pixels,
                                         const uint32_t (&row)[8], uint32_t key,
                                         const unsigned char* filter) {
  const uint32_t lane = threadIdx.x % 32;
  FASTDA_NO_UNROLL
  for (uint32_t piece = 0; piece < 8; ++piece) {
    Pack<float, 4> a[8];
    FASTDA_UNROLL
    for (int i = 0; i < 8; ++i)
      a[i] = load_pack<4>(reinterpret_cast<const float*>(pixels + row[i] * row_bytes +
                                                         ((piece ^ ((key + i * 4) & 7)) * 16)));
    FASTDA_UNROLL
    for (int j = 0; j < 8; ++j) {
      const Pack<float, 4> b = load_pack<4>(reinterpret_cast<const float*>(
          filter + (j * 8 + (lane & 7)) * row_bytes + ((piece ^ (lane & 7)) * 16)));
      FASTDA_UNROLL
      for (int i = 0; i < 8; ++i) {
        FASTDA_UNROLL
        for (int e = 0; e < 4; ++e) sum[i][j] += a[i].at[e] * b.at[e];
      }
    }
  }
}

// Filters as the kernels read them: [64 output channels each][row of channels][tap] blocks of 64
// rows, zeros where there is no channel.
struct PrepareFilter {
  View filter;
  int out_channels, in_channels, kernel;
  void* prepared;
  int chunks;      // rows of channels
  int64_t pieces;  // of 16 bytes
};

struct PrepareFilters {
  PrepareFilter filter[2];  // one in each row of the grid
};

constexpr int prepare_threads = 256;

template <typename T>
FASTDA_KERNEL(prepare_threads)
prepare_filter_kernel(PrepareFilters both, bool to_tf32) {
  constexpr int E = 16 / int(sizeof(T));
  const PrepareFilter& p = both.filter[blockIdx.y];
  const int64_t i = int64_t(blockIdx.x) * prepare_threads + threadIdx.x;
  if (i >= p.pieces) return;
  const int taps = p.kernel * p.kernel;
  const int piece = int(i % 8), n = int(i / 8 % filter_columns);
  const auto block = i / (8 * filter_columns);
  const int tap = int(block % taps), chunk = int(block / taps % p.chunks);
  const int64_t k = block / taps / p.chunks * filter_columns + n;
  const T* from = static_cast<const T*>(p.filter.data) + k * p.filter.n +
                  tap / p.kernel * p.filter.h + tap % p.kernel * p.filter.w;
  Pack<T, E> pack{};
  FASTDA_UNROLL
  for (int e = 0; e < E; ++e) {
    const int64_t c = chunk * row_channels<T> + piece * E + e;
    if (k < p.out_channels && c < p.in_channels) pack.at[e] = from[c * p.filter.c];
    if constexpr (sizeof(T) == 4) {
      if (to_tf32) pack.at[e] = float_of(round_tf32(pack.at[e]));
    }
  }
  store_pack(static_cast<T*>(p.prepared) + ((i - piece) + (piece ^ (n & 7))) * E, pack);
}

}  // namespace fastda::cuda
