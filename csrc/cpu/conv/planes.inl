// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// A few input channels to many, of contiguous images: first layers, and the data gradient of a last one. The
// lanes are pixels of a row, so that nothing has to be turned:
//
//   x block with halo -> packed [channel][row][column]
//   sums [outputs][vectors of pixels] in registers: x of a tap times a broadcast weight -> epilogue
//
// and, for the filter's gradient, sums [outputs][taps of a row] of lanes of x times the gradient, which is
// read where it lies.
#include <type_traits>

#include "cpu/conv/epilogue.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

// Bytes of a block that are read again and again: its packed input and, in the filter's gradient, up to 8
// planes of the gradient.
constexpr int64_t block_budget = 32 << 10;
// Outputs and vectors of pixels whose sums are in registers.
constexpr int outputs = vector_registers == 32 ? 8 : 4, pixel_vectors = 3;
// In the filter's gradient: outputs, for some taps of a row.
constexpr int most_taps = 7;
constexpr int outputs_with(int taps) {
  return int(min(8, (vector_registers == 32 ? 25 : 12) / taps));
}

template <typename Args>
constexpr int64_t extra = std::is_same_v<Args, FilterGradArgs> ? 8 : 0;

template <typename S, typename Args>
struct Sizes {
  int64_t taps;
  Blocking blocking;
  explicit Sizes(const Args& a)
      : taps(a.kernel * a.kernel),
        blocking(block_image(a.batch, a.out_height(), a.out_width(),
                             (a.in_channels + extra<Args>)*int64_t(sizeof(S)), block_budget)) {}
  // Of a channel of the packed block, with room for the last vectors to run into.
  int64_t plane(const Args& a) const {
    return (blocking.rows + a.kernel - 1) * (blocking.columns + a.kernel - 1) +
           pixel_vectors * lanes<S>;
  }
  int64_t packed(const Args& a) const { return a.in_channels * plane(a); }
};

template <typename T, typename S, typename Args>
void pack_planes(const Args& a, const Block& block, S* packed, int64_t plane) {
  const int64_t halo = a.kernel - 1;
  const Source source = source_of(a);
  const Block input{block.n, block.h - a.padding, block.w - a.padding, block.rows + halo,
                    block.columns + halo};
  for (int64_t c = 0; c < a.in_channels; ++c, packed += plane) {
    pack<T, S>(channel_of<T>(source, c), input, packed, 1);
    for (int64_t i = input.rows * input.columns; i < plane; ++i) packed[i] = S(0);
  }
}

// Many outputs, so few inputs that there is little to add up.
bool serves(const ConvProblem& p) {
  return p.in_channels > 0 && p.in_channels <= 4 && p.out_channels >= 8 && p.kernel <= most_taps;
}

int64_t prepared_bytes(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return Arena::bytes<S>(round_up(a.out_channels, outputs) * a.in_channels * a.kernel * a.kernel);
  });
}
// [outputs][input channel][tap][output]
void prepare(const ConvArgs& a, void* prepared) {
  with_types(a.dtype, [&]<typename T, typename S>() {
    S* to = static_cast<S*>(prepared);
    for (int64_t k0 = 0; k0 < a.out_channels; k0 += outputs)
      for (int64_t c = 0; c < a.in_channels; ++c)
        for (int64_t t = 0; t < a.kernel * a.kernel; ++t)
          for (int64_t k = k0; k < k0 + outputs; ++k)
            *to++ = k < a.out_channels ? S(load(at<T>(a.filter, k, c, t / a.kernel, t % a.kernel)))
                                       : S(0);
  });
}
int64_t conv_scratch_bytes(const ConvArgs& args) {
  const ConvArgs a = flat(args);
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return Arena::bytes<S>(Sizes<S, ConvArgs>(a).packed(a));
  });
}
int64_t conv_tasks(const ConvArgs& args) {
  const ConvArgs a = flat(args);
  return with_types(a.dtype,
                    [&]<typename T, typename S>() { return Sizes<S, ConvArgs>(a).blocking.tasks; });
}

// sums [outputs][V] to one row from column w on. Outputs one after another and not inlined: an epilogue for
// every register would be most of this file's code.
template <typename T, typename S, int V>
[[gnu::noinline]] void store_row(const ConvArgs& a, const Epilogue<T, S>& e,
                                 const Vec<S> (*sums)[V], int64_t k0, int64_t w, int64_t left) {
  constexpr int L = lanes<S>;
  for (int64_t k = k0; k < min(k0 + outputs, a.out_channels); ++k, ++sums)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const int valid = int(min(L, left - v * L));
      if (valid > 0) store_result<T, S>(a, e, (*sums)[v], valid, k, w + v * L);
    }
}

// Columns [w, w + V vectors) of one row of `outputs` outputs.
template <typename T, typename S, int V>
void sum_row(const ConvArgs& a, const Epilogue<T, S>& e, const S* x, int64_t plane, int64_t columns,
             const S* filter, int64_t k0, int64_t w, int64_t left) {
  constexpr int L = lanes<S>;
  Vec<S> sum[outputs][V] = {};
  for (int64_t c = 0; c < a.in_channels; ++c, x += plane)
    for (int64_t i = 0; i < a.kernel; ++i)
      for (int64_t j = 0; j < a.kernel; ++j, filter += outputs) {
        const S* from = x + i * columns + j;
        Vec<S> d[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) d[v] = load_vec(from + v * L);
#pragma GCC unroll 8
        for (int k = 0; k < outputs; ++k) {
          Vec<S> b = broadcast(filter[k]);
          if (V > 1) in_register(b);
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) sum[k][v] += d[v] * b;
        }
      }
  const T* bias = static_cast<const T*>(a.bias);
  Vec<S> done[outputs][V];
#pragma GCC unroll 8
  for (int k = 0; k < outputs; ++k) {
    if (k0 + k >= a.out_channels) break;
    const Vec<S> b = broadcast(bias ? S(load(bias + k0 + k)) : S(0));
    T* const out = e.out + (k0 + k) * a.out.c + w;
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const int valid = int(min(L, left - v * L));
      if (!e.plain)
        done[k][v] = sum[k][v] + b;
      else if (valid > 0)
        store_first<S>(out + v * L, clamp_min(sum[k][v] + b, e.low), valid);
    }
  }
  if (!e.plain) store_row<T, S, V>(a, e, done, k0, w, left);
}

bool conv(const ConvArgs& args, int64_t task, void* memory) {
  const ConvArgs a = flat(args);
  with_types(a.dtype, [&]<typename T, typename S>() {
    constexpr int L = lanes<S>;
    const Sizes<S, ConvArgs> sizes(a);
    const Block block = sizes.blocking.block(task, a.out_height(), a.out_width());
    S* packed = Arena(memory).take<S>(sizes.packed(a));
    const int64_t plane = sizes.plane(a), columns = block.columns + a.kernel - 1;
    pack_planes<T, S>(a, block, packed, plane);
    const S* filter = static_cast<const S*>(a.prepared);
    for (int64_t k = 0; k < a.out_channels;
         k += outputs, filter += outputs * a.in_channels * sizes.taps)
      for (int64_t r = 0; r < block.rows; ++r) {
        const Epilogue<T, S> e(a, block.n, 0, block.h + r, block.w);
        for (int64_t w = 0; w < block.columns;) {
          const S* x = packed + r * columns + w;
          const int64_t left = block.columns - w;
          if (left > 2 * L) {
            sum_row<T, S, 3>(a, e, x, plane, columns, filter, k, w, left);
          } else if (left > L) {
            sum_row<T, S, 2>(a, e, x, plane, columns, filter, k, w, left);
          } else {
            sum_row<T, S, 1>(a, e, x, plane, columns, filter, k, w, left);
          }
          w += pixel_vectors * L;
        }
      }
  });
  return true;
}

// Filter gradient: sums [output][input channel][tap] of vectors, whose lanes are added up at the end.

template <typename S>
int64_t sum_count(const FilterGradArgs& a) {
  return round_up(a.out_channels, 8) * a.in_channels * a.kernel * a.kernel * lanes<S>;
}
int64_t sum_bytes(const FilterGradArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return Arena::bytes<S>(sum_count<S>(a)) + Arena::bytes<double>(a.out_channels);
  });
}
int64_t chunks(const FilterGradArgs& args) {
  const FilterGradArgs a = flat(args);
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return chunk_count(Sizes<S, FilterGradArgs>(a).blocking.tasks, sum_bytes(a));
  });
}
int64_t filter_grad_scratch_bytes(const FilterGradArgs& args) {
  const FilterGradArgs a = flat(args);
  return with_types(a.dtype, [&]<typename T, typename S>() {
    const Sizes<S, FilterGradArgs> sizes(a);
    return Arena::bytes<S>(sizes.packed(a)) +
           Arena::bytes<S>(8 * sizes.blocking.rows * sizes.blocking.columns);
  });
}

// Rows of planes, `plane` elements from one to the next.
template <typename S>
struct Rows {
  const S* at;
  int64_t row, plane;
};

// sums[k][t] += x[t] times grad[k] for `Taps` taps side by side, of `rows` rows of `columns` pixels;
// `stride` elements from output to output in `sums`.
template <typename S, int Taps>
void add_products(Rows<S> x, Rows<S> grad, int64_t rows, int64_t columns, S* sums, int64_t stride) {
  constexpr int L = lanes<S>, K = outputs_with(Taps);
  Vec<S> sum[K][Taps] = {};
  const auto step = [&](int64_t q, auto&& load_lanes) __attribute__((always_inline)) {
    Vec<S> g[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) g[k] = load_lanes(grad.at + k * grad.plane + q);
#pragma GCC unroll 7
    for (int t = 0; t < Taps; ++t) {
      const Vec<S> d = load_lanes(x.at + q + t);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sum[k][t] += d * g[k];
    }
  };
  for (int64_t r = 0; r < rows; ++r, x.at += x.row, grad.at += grad.row) {
    int64_t q = 0;
    for (; q + L <= columns; q += L)
      step(q, [](const S* p) __attribute__((always_inline)) { return load_vec(p); });
    if (q < columns)
      step(q, [n = int(columns - q)](const S* p)
                  __attribute__((always_inline)) { return load_first<S>(p, n); });
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 7
    for (int t = 0; t < Taps; ++t) {
      S* to = sums + k * stride + t * L;
      store_vec(to, load_vec(to) + sum[k][t]);
    }
}

template <typename T, typename S, int Taps>
void add_block(const FilterGradArgs& a, const Block& block, const S* packed, int64_t plane, S* room,
               S* sums, double* bias) {
  constexpr int L = lanes<S>, K = outputs_with(Taps);
  const int64_t columns = block.columns + a.kernel - 1, taps = a.kernel * a.kernel;
  const Source source = grad_source_of(a);
  for (int64_t k0 = 0; k0 < a.out_channels; k0 += K) {
    const int64_t count = min(K, a.out_channels - k0);
    Rows<S> grad{room, block.columns, block.rows * block.columns};
    bool in_place = false;
    if constexpr (std::is_same_v<T, S>) {
      in_place = count == K && !a.grad_mask.data;
      if (in_place) grad = {at<T>(a.grad, block.n, k0, block.h, block.w), a.grad.h, a.grad.c};
    }
    for (int64_t k = 0; k < K && !in_place; ++k) {
      S* to = room + k * grad.plane;
      if (k >= count) {
        for (int64_t i = 0; i < grad.plane; ++i) to[i] = S(0);
        continue;
      }
      pack<T, S>(channel_of<T>(source, k0 + k), block, to, 1);
    }
    for (int64_t k = 0; k < count; ++k) {
      Vec<S> sum = {};
      for (int64_t r = 0; r < block.rows; ++r) {
        const S* row = grad.at + k * grad.plane + r * grad.row;
        int64_t q = 0;
        for (; q + L <= block.columns; q += L) sum += load_vec(row + q);
        if (q < block.columns) sum += load_first<S>(row + q, int(block.columns - q));
      }
      for (int i = 0; i < L; ++i) bias[k0 + k] += double(sum[i]);
    }
    for (int64_t c = 0; c < a.in_channels && packed; ++c)
      for (int64_t i = 0; i < a.kernel; ++i)
        add_products<S, Taps>(
            {packed + c * plane + i * columns, columns, 0}, grad, block.rows, block.columns,
            sums + ((k0 * a.in_channels + c) * taps + i * a.kernel) * L, a.in_channels * taps * L);
  }
}

void filter_grad(const FilterGradArgs& args, int64_t chunk, void* sums_memory, void* memory) {
  const FilterGradArgs a = flat(args);
  with_types(a.dtype, [&]<typename T, typename S>() {
    const Sizes<S, FilterGradArgs> sizes(a);
    Arena memory_of_sums(sums_memory), scratch(memory);
    S* sums = memory_of_sums.take<S>(sum_count<S>(a));
    double* bias = memory_of_sums.take<double>(a.out_channels);
    S* packed = scratch.take<S>(sizes.packed(a));
    S* room = scratch.take<S>(8 * sizes.blocking.rows * sizes.blocking.columns);
    for (int64_t i = 0; i < sum_count<S>(a); ++i) sums[i] = S(0);
    for (int64_t k = 0; k < a.out_channels; ++k) bias[k] = 0;
    const int64_t tasks = sizes.blocking.tasks, count = chunks(args);
    for (int64_t task = tasks * chunk / count; task < tasks * (chunk + 1) / count; ++task) {
      const Block block = sizes.blocking.block(task, a.out_height(), a.out_width());
      if (a.x.data) pack_planes<T, S>(a, block, packed, sizes.plane(a));
      const auto add = [&]<int Taps>(std::integral_constant<int, Taps>) {
        add_block<T, S, Taps>(a, block, a.x.data ? packed : nullptr, sizes.plane(a), room, sums,
                              bias);
      };
      switch (a.kernel) {
        case 1: add(std::integral_constant<int, 1>{}); break;
        case 2: add(std::integral_constant<int, 2>{}); break;
        case 3: add(std::integral_constant<int, 3>{}); break;
        case 4: add(std::integral_constant<int, 4>{}); break;
        case 5: add(std::integral_constant<int, 5>{}); break;
        case 6: add(std::integral_constant<int, 6>{}); break;
        default: add(std::integral_constant<int, most_taps>{}); break;
      }
    }
  });
}

bool combine(const FilterGradArgs& args, const void* sums, void* d_bias) {
  const FilterGradArgs a = flat(args);
  const int64_t count = chunks(args), bytes = sum_bytes(args), taps = a.kernel * a.kernel;
  const char* parts = static_cast<const char*>(sums);
  with_types(a.dtype, [&]<typename T, typename S>() {
    constexpr int L = lanes<S>;
    for (int64_t i = 0; i < a.out_channels * a.in_channels * taps && a.d_filter.data; ++i) {
      double sum = 0;
      for (int64_t n = 0; n < count; ++n) {
        const S* part = reinterpret_cast<const S*>(parts + n * bytes) + i * L;
        for (int j = 0; j < L; ++j) sum += double(part[j]);
      }
      const int64_t t = i % taps, c = i / taps % a.in_channels, k = i / taps / a.in_channels;
      store(const_cast<T*>(at<T>(a.d_filter, k, c, t / a.kernel, t % a.kernel)), S(sum));
    }
    for (int64_t k = 0; k < a.out_channels && d_bias; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < count; ++n)
        sum += reinterpret_cast<const double*>(parts + n * bytes +
                                               Arena::bytes<S>(sum_count<S>(a)))[k];
      store(static_cast<T*>(d_bias) + k, S(sum));
    }
  });
  return true;
}

}  // namespace

extern const ConvKernels planes;
const ConvKernels planes = {
    .serves = serves,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .conv_scratch_bytes = conv_scratch_bytes,
    .conv_tasks = conv_tasks,
    .conv = conv,
    .chunks = chunks,
    .sum_bytes = sum_bytes,
    .filter_grad_scratch_bytes = filter_grad_scratch_bytes,
    .filter_grad = filter_grad,
    .combine = combine,
};

}  // namespace fastda::cpu::FASTDA_ISA
