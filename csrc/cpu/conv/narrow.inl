// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// Many input channels to a few output channels, as the last layer of a network and the data gradient of
// its first: the direct kernels' vectors of output channels would be mostly empty. Here the lanes are
// input channels, added up at the end, or, of contiguous images, pixels:
//
//   x block with halo -> packed [pixel][channel]  -> a vector of sums for each pixel and output -> sums
//   x block with halo -> packed [channel][pixel]  -> sums of vectors of pixels
//   sums [pixel][output] -> epilogue
//
// Pixels are numbered on the grid of the packed block, as in direct.inl.
#include <type_traits>

#include "cpu/conv/epilogue.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

constexpr int most_outputs = 4;
// Bytes of a packed block, which the second-level cache keeps besides what streams through it.
constexpr int64_t block_budget = 192 << 10;
// Pixels that are summed up together, a power of two: their sums take 16 of 32 registers, or 8 of 16.
constexpr int together(int outputs) {
  return (vector_registers == 32 ? 16 : 8) / (outputs == 3 ? 4 : outputs);
}
// Vectors of pixels, whose sums are of two kinds.
constexpr int vectors_together(int outputs) {
  return int(max(2, (vector_registers == 32 ? 12 : 6) / outputs));
}

bool serves(const ConvProblem& p) { return p.out_channels <= most_outputs && p.in_channels >= 16; }

template <typename S>
struct Sizes {
  static constexpr int L = lanes<S>;
  int64_t channels, taps;
  Blocking blocking;
  int64_t packed, sums;
  explicit Sizes(const ConvArgs& a)
      : channels(padded<S>(a.in_channels)),
        taps(a.kernel * a.kernel),
        blocking(block_image(a.batch, a.out_height(), a.out_width(), channels * int64_t(sizeof(S)),
                             block_budget)) {
    const int64_t halo = a.kernel - 1;
    packed = channels * ((blocking.rows + halo) * (blocking.columns + halo) + L);
    sums = (blocking.rows * (blocking.columns + halo) + L) * padded<S>(a.out_channels);
  }
  int64_t filter(int64_t outputs) const { return outputs * taps * channels; }
  int64_t bytes() const {
    return Arena::bytes<S>(packed) + Arena::bytes<S>(sums) + Arena::bytes<int64_t>(taps);
  }
};

int64_t prepared_bytes(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return Arena::bytes<S>(Sizes<S>(a).filter(a.out_channels));
  });
}
// [output][tap][input channel]
template <typename T, typename S>
void pack_filter(const ConvArgs& a, S* out) {
  const Sizes<S> sizes(a);
  for (int64_t k = 0; k < a.out_channels; ++k)
    for (int64_t t = 0; t < sizes.taps; ++t)
      for (int64_t c = 0; c < sizes.channels; ++c)
        *out++ =
            c < a.in_channels ? S(load(at<T>(a.filter, k, c, t / a.kernel, t % a.kernel))) : S(0);
}
void prepare(const ConvArgs& a, void* prepared) {
  with_types(a.dtype,
             [&]<typename T, typename S>() { pack_filter<T, S>(a, static_cast<S*>(prepared)); });
}
int64_t conv_scratch_bytes(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() { return Sizes<S>(a).bytes(); });
}
int64_t conv_tasks(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() { return Sizes<S>(a).blocking.tasks; });
}

// Of the sums of a pixel: whole vectors, and of double some have fewer lanes than there are outputs.
template <typename S, int K>
constexpr int sum_stride = (K + lanes<S> - 1) / lanes<S> * lanes<S>;

// sums[q][k] of the pixels q < `pixels` from x[q][channel]; offset: of the taps, in pixels.
template <typename S, int K>
void sum_channels(const S* x, const S* filter, const Sizes<S>& sizes, const int64_t* offset,
                  int64_t pixels, S* sums) {
  constexpr int L = lanes<S>, P = int(min(L, together(K)));
  const int64_t channels = sizes.channels;
  for (int64_t q = 0; q < pixels; q += L) {
    Vec<S> lane_sums[K][L];
    for (int i = 0; i < L; i += P) {
      Vec<S> sum[P][K] = {};
      for (int64_t t = 0; t < sizes.taps; ++t) {
        const S* from = x + (q + i + offset[t]) * channels;
        const S* w = filter + t * channels;
        for (int64_t c = 0; c < channels; c += L) {
          Vec<S> b[K];
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) b[k] = load_vec(w + k * sizes.taps * channels + c);
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) {
            const Vec<S> a = load_vec(from + p * channels + c);
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) sum[p][k] += a * b[k];
          }
        }
      }
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) lane_sums[k][i + p] = sum[p][k];
    }
    for (int k = 0; k < K; ++k) {
      transpose<S>(lane_sums[k]);
      for (int step = L / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) lane_sums[k][i] += lane_sums[k][i + step];
      for (int i = 0; i < L; ++i) sums[(q + i) * sum_stride<S, K> + k] = lane_sums[k][0][i];
    }
  }
}

// The same of V vectors of pixels, or of `valid` in the only one, from x[channel][q], `plane` elements from channel to channel. Sums of
// some 64 products, and then of these, are half as far off as those of 576.
template <typename S, int K, int V>
void sum_pixels(const S* x, int64_t plane, int64_t inputs, const S* filter, const Sizes<S>& sizes,
                const int64_t* offset, int valid, S* sums) {
  constexpr int L = lanes<S>;
  const int64_t part = max(1, 64 / sizes.taps);
  Vec<S> total[V][K] = {};
  for (int64_t c0 = 0; c0 < inputs; c0 += part) {
    Vec<S> sum[V][K] = {};
    for (int64_t c = c0; c < min(inputs, c0 + part); ++c) {
      for (int64_t t = 0; t < sizes.taps; ++t) {
        const S* from = x + c * plane + offset[t];
        Vec<S> b[K];
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k)
          b[k] = broadcast(filter[(k * sizes.taps + t) * sizes.channels + c]);
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) {
          const Vec<S> a = V > 1 ? load_vec(from + v * L) : load_first<S>(from, valid);
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) sum[v][k] += a * b[k];
        }
      }
    }
#pragma GCC unroll 12
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) total[v][k] += sum[v][k];
  }
  for (int v = 0; v < V; ++v)
    for (int k = 0; k < K; ++k)
      for (int i = 0; i < L; ++i) sums[(v * L + i) * sum_stride<S, K> + k] = total[v][k][i];
}

// Whether a block's pixels lie in planes as they would be packed.
template <typename T, typename S>
bool lies_packed(const ConvArgs& a, const Block& block) {
  return std::is_same_v<T, S> && a.kernel == 1 && !a.x_mask.data &&
         (block.rows == 1 || a.x.h == block.columns);
}

template <typename T, typename S>
void conv_block(const ConvArgs& a, int64_t task, void* memory) {
  const Sizes<S> sizes(a);
  const Block block = sizes.blocking.block(task, a.out_height(), a.out_width());
  Arena scratch(memory);
  S* packed = scratch.take<S>(sizes.packed);
  S* sums = scratch.take<S>(sizes.sums);
  int64_t* offset = scratch.take<int64_t>(sizes.taps);
  const int64_t p = a.padding, halo = a.kernel - 1, columns = block.columns + halo;
  for (int64_t t = 0; t < sizes.taps; ++t) offset[t] = t / a.kernel * columns + t % a.kernel;
  const Block input{block.n, block.h - p, block.w - p, block.rows + halo, columns};
  const int64_t grid = input.rows * columns;
  int64_t plane = grid + lanes<S>;
  const S* planes = packed;
  const int64_t pixels = (block.rows - 1) * columns + block.columns;
  const S* filter = static_cast<const S*>(a.prepared);
  Source source = source_of(a);
  // What is read past the grid comes to sums that nobody wants; subnormal numbers would be slow.
  if (a.x_channels_last) {
    pack<T, S>(source, input, packed, sizes.channels);
    for (int64_t i = grid * sizes.channels; i < plane * sizes.channels; ++i) packed[i] = S(0);
  } else if (lies_packed<T, S>(a, block)) {
    planes = reinterpret_cast<const S*>(at<T>(a.x, block.n, 0, block.h, block.w));
    plane = a.x.c;
  } else {
    source.channels = 1;
    for (int64_t c = 0; c < a.in_channels; ++c) {
      source.x.data = const_cast<T*>(at<T>(a.x, 0, c, 0, 0));
      if (a.x_mask.data) source.mask.data = const_cast<T*>(at<T>(a.x_mask, 0, c, 0, 0));
      pack<T, S>(source, input, packed + c * plane, 1);
      for (int64_t i = grid; i < plane; ++i) packed[c * plane + i] = S(0);
    }
  }
  const auto sum = [&]<int K>(std::integral_constant<int, K>) {
    if (a.x_channels_last) {
      sum_channels<S, K>(packed, filter, sizes, offset, pixels, sums);
      return;
    }
    constexpr int L = lanes<S>, V = vectors_together(K);
    int64_t q = 0;
    for (; q + V * L <= pixels; q += V * L)
      sum_pixels<S, K, V>(planes + q, plane, a.in_channels, filter, sizes, offset, L,
                          sums + q * sum_stride<S, K>);
    for (; q < pixels; q += L)
      sum_pixels<S, K, 1>(planes + q, plane, a.in_channels, filter, sizes, offset,
                          int(min(L, pixels - q)), sums + q * sum_stride<S, K>);
  };
  switch (a.out_channels) {
    case 1: sum(std::integral_constant<int, 1>{}); break;
    case 2: sum(std::integral_constant<int, 2>{}); break;
    case 3: sum(std::integral_constant<int, 3>{}); break;
    default: sum(std::integral_constant<int, 4>{}); break;
  }
  epilogue<T, S>(a, sums, columns, padded<S>(a.out_channels), block);
}
bool conv(const ConvArgs& a, int64_t task, void* scratch) {
  with_types(a.dtype, [&]<typename T, typename S>() { conv_block<T, S>(a, task, scratch); });
  return true;
}

}  // namespace

extern const ConvKernels narrow;
const ConvKernels narrow = {
    .serves = serves,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .conv_scratch_bytes = conv_scratch_bytes,
    .conv_tasks = conv_tasks,
    .conv = conv,
};

}  // namespace fastda::cpu::FASTDA_ISA
