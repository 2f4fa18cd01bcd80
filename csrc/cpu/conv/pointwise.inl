// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// 1 x 1 filters and contiguous images: a matrix product, whose pixels lie side by side as they are.
// A task is some panels of pixels, numbered through all images:
//
//   x -> packed [panel][input channel][panel_vectors vectors of pixels]
//   sums [6 outputs][pixels of a panel] = a panel times [input channel][6 outputs], broadcast
//     -> epilogue
#include <type_traits>

#include "cpu/conv/epilogue.h"
#include "cpu/conv/gemm.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

constexpr int outputs = 6;
// Bytes of the packed panels of a task, which the second-level cache keeps beside the filter that
// streams by.
constexpr int64_t block_budget = 768 << 10;
constexpr int64_t most_panels = 16;
// Of the packed gradient of a block of pixels.
constexpr int64_t grad_budget = 512 << 10;
// Products in a sum; then these are added up, which halves the rounding error of sums of 512.
constexpr int64_t longest = 128;

bool serves(const ConvProblem& p) {
  return p.kernel == 1 && p.padding == 0 && p.in_channels >= 16 && p.out_channels >= 8;
}

template <typename S>
struct Sizes {
  static constexpr int64_t width = panel_vectors * lanes<S>;  // pixels of a panel
  int64_t channels, pixels, block;                            // block: pixels of a task
  explicit Sizes(const ConvArgs& a)
      : channels(a.in_channels), pixels(a.batch * a.height * a.width) {
    const int64_t panels = block_budget / (channels * width * int64_t(sizeof(S)));
    block = max(1, min(panels, most_panels)) * width;
  }
  int64_t packed() const { return block * channels; }
  int64_t sums() const { return outputs * width + lanes<S>; }
};

int64_t prepared_bytes(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return Arena::bytes<S>(round_up(a.out_channels, outputs) * a.in_channels);
  });
}
// [outputs][input channel][output], some channels at a time: a transposed filter has each in a page
// of its own.
void prepare(const ConvArgs& a, void* prepared) {
  constexpr int64_t some = 16;
  with_types(a.dtype, [&]<typename T, typename S>() {
    for (int64_t c0 = 0; c0 < a.in_channels; c0 += some)
      for (int64_t k0 = 0; k0 < a.out_channels; k0 += outputs) {
        S* to = static_cast<S*>(prepared) + k0 * a.in_channels + c0 * outputs;
        for (int64_t c = c0; c < min(a.in_channels, c0 + some); ++c)
          for (int64_t k = k0; k < k0 + outputs; ++k)
            *to++ = k < a.out_channels ? S(load(at<T>(a.filter, k, c, 0, 0))) : S(0);
      }
  });
}
int64_t conv_scratch_bytes(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    const Sizes<S> sizes(a);
    return Arena::bytes<S>(sizes.packed()) + Arena::bytes<S>(sizes.sums());
  });
}
int64_t conv_tasks(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    const Sizes<S> sizes(a);
    return ceil_div(sizes.pixels, sizes.block);
  });
}

// A pixel of the images, by its number.
struct Pixel {
  int64_t n, h, w;
  Pixel(const ConvProblem& p, int64_t number)
      : n(number / p.width / p.height), h(number / p.width % p.height), w(number % p.width) {}
};

// Calls f(run of pixels of one row, how far it is from `first`) for `count` pixels, cut where a
// panel ends that begins with `first`.
template <typename S, typename F>
FASTDA_INLINE void each_run(const ConvProblem& p, Pixel first, int64_t count, F&& f) {
  constexpr int64_t width = panel_vectors * lanes<S>;
  for (int64_t done = 0; done < count;) {
    const int64_t of_panel = min(count - done, width - done % width);
    const int64_t columns = min(of_panel, p.width - first.w);
    f(Block{first.n, first.h, first.w, 1, columns}, done);
    done += columns;
    first.w += columns;
    if (first.w < p.width) continue;
    first.w = 0;
    if (++first.h == p.height) {
      first.h = 0;
      ++first.n;
    }
  }
}

// f(channel, place in the block, vector, how many lanes) of `count` pixels from `first` on, masked
// and widened, channel by channel, each fetched some channels before.
template <typename T, typename S, typename F>
FASTDA_INLINE void each_vector(const ConvProblem& p, const Source& s, Pixel first, int64_t count,
                               F&& f) {
  constexpr int64_t L = lanes<S>, far = 8;
  with_relu_mask<S>(s.negative_slope, [&](auto mask) __attribute__((always_inline)) {
    for (int64_t c = 0; c < s.channels; ++c) {
      const int64_t ahead = c + far < s.channels ? far * s.x.c : 0;
      each_run<S>(p, first, count,
                  [&](const Block& run, int64_t place) __attribute__((always_inline)) {
                    const T* x = at<T>(s.x, run.n, c, run.h, run.w);
                    const T* g = s.mask.data ? at<T>(s.mask, run.n, c, run.h, run.w) : nullptr;
                    for (int64_t i = 0; i < run.columns; i += L) {
                      const int valid = int(min(L, run.columns - i));
                      prefetch_first_level(x + i + ahead);
                      Vec<S> v = load_first<S>(x + i, valid);
                      if (g) v = mask(v, load_first<S>(g + i, valid));
                      f(c, place + i, v, valid);
                    }
                  });
    }
  });
}

template <typename T, typename S>
void pack_panels(const ConvArgs& a, Pixel first, int64_t count, S* packed) {
  constexpr int64_t width = Sizes<S>::width, L = lanes<S>;
  const auto place = [=](int64_t c, int64_t q) __attribute__((always_inline)) {
    return packed + (q / width * a.in_channels + c) * width + q % width;
  };
  each_vector<T, S>(a, source_of(a), first, count,
                    [&](int64_t c, int64_t q, Vec<S> v, int valid)
                        __attribute__((always_inline)) { store_first<S>(place(c, q), v, valid); });
  // Up to a whole vector, whose sums nobody wants; subnormal numbers would be slow.
  for (int64_t c = 0; c < a.in_channels; ++c)
    for (int64_t q = count; q % L > 0; ++q) *place(c, q) = S(0);
}

template <typename S>
MicroKernel<S> kernel_of(int64_t vectors) {
  switch (vectors) {
    case 1: return micro_kernel<S, outputs, 1>;
    case 2: return micro_kernel<S, outputs, 2>;
    case 3: return micro_kernel<S, outputs, min(3, panel_vectors)>;
    default: return micro_kernel<S, outputs, panel_vectors>;
  }
}

template <typename T, typename S>
void conv_block(const ConvArgs& a, int64_t task, void* memory) {
  constexpr int64_t width = Sizes<S>::width, L = lanes<S>;
  const Sizes<S> sizes(a);
  Arena scratch(memory);
  S* packed = scratch.take<S>(sizes.packed());
  S* sums = scratch.take<S>(sizes.sums());
  const int64_t begin = task * sizes.block, end = min(sizes.pixels, begin + sizes.block);
  pack_panels<T, S>(a, Pixel(a, begin), end - begin, packed);
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t none = 0, row[] = {0, 1, 2, 3, 4, 5};
  for (int64_t q = begin; q < end; q += width, packed += width * a.in_channels) {
    const Pixel first(a, q);
    const int64_t pixels = min(width, end - q);
    const MicroKernel<S> kernel = kernel_of<S>(ceil_div(pixels, L));
    const S* filter = static_cast<const S*>(a.prepared);
    for (int64_t k0 = 0; k0 < a.out_channels; k0 += outputs, filter += outputs * a.in_channels) {
      const int64_t count = min(outputs, a.out_channels - k0);
      each_run<S>(a, first, pixels, [&](const Block& run, int64_t) {
        const T* out = at<T>(a.out, run.n, k0, run.h, run.w);
        for (int64_t k = 0; k < count; ++k)
          for (int64_t i = 0; i < run.columns; i += 64 / int64_t(sizeof(T)))
            __builtin_prefetch(out + k * a.out.c + i, 1, 3);
      });
      for (int64_t c = 0; c < a.in_channels; c += longest)
        kernel(filter + c * outputs, row, outputs, &none, 1, min(longest, a.in_channels - c),
               outputs, packed + c * width, width, sums, width, c > 0);
      each_run<S>(a, first, pixels, [&](const Block& run, int64_t place) {
        const Epilogue<T, S> e(a, run.n, k0, run.h, run.w);
        for (int64_t k = 0; k < count; ++k) {
          const Vec<S> b = broadcast(bias == nullptr ? S(0) : S(load(&bias[k0 + k])));
          for (int64_t i = 0; i < run.columns; i += L)
            store_result<T, S>(a, e, load_vec(sums + k * width + place + i) + b,
                               int(min(L, run.columns - i)), k, i);
        }
      });
    }
  }
}
bool conv(const ConvArgs& args, int64_t task, void* memory) {
  const ConvArgs a = flat(args);
  with_types(a.dtype, [&]<typename T, typename S>() { conv_block<T, S>(a, task, memory); });
  return true;
}

// Filter gradient: a chunk takes blocks of pixels, through all images:
//
//   gradient -> packed [output][pixel]
//   a panel of x's channels -> packed [pixel][panel_vectors vectors of channels], turned
//   sums [panel][6 outputs][channels of a panel] += the gradient, broadcast, times the panel

template <typename S>
struct GradSizes {
  static constexpr int64_t width = panel_vectors * lanes<S>;
  int64_t pixels, block, blocks, panels, rows, sums;
  explicit GradSizes(const FilterGradArgs& a) : pixels(a.batch * a.height * a.width) {
    block = round_up(max(64, min(128, grad_budget / (a.out_channels * int64_t(sizeof(S))))), 64);
    blocks = ceil_div(pixels, block);
    panels = ceil_div(a.in_channels, width);
    rows = round_up(a.out_channels, outputs);
    sums = panels * rows * width;
  }
  int64_t grads(const FilterGradArgs& a) const { return a.out_channels * block; }
  int64_t panel() const { return (block + lanes<S>)*width; }
};

int64_t sum_bytes(const FilterGradArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return Arena::bytes<S>(GradSizes<S>(a).sums) + Arena::bytes<double>(a.out_channels);
  });
}
int64_t chunks(const FilterGradArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return chunk_count(GradSizes<S>(a).blocks, sum_bytes(a));
  });
}
int64_t filter_grad_scratch_bytes(const FilterGradArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    const GradSizes<S> sizes(a);
    return Arena::bytes<S>(sizes.grads(a)) + Arena::bytes<S>(sizes.panel());
  });
}

// [pixel][channel], zeros past the last channel.
template <typename T, typename S>
void pack_turned(const FilterGradArgs& a, const Source& s, Pixel first, int64_t count, S* to) {
  constexpr int64_t width = GradSizes<S>::width, L = lanes<S>;
  for (int64_t c0 = 0; c0 < round_up(s.channels, L); c0 += L) {
    const int64_t channels = min(L, s.channels - c0);
    // The next ones, which may be those of the next panel.
    const int64_t ahead = c0 + 2 * L <= s.channels ? L * s.x.c : 0;
    each_run<S>(a, first, count, [&](const Block& run, int64_t place) {
      const T* x = at<T>(s.x, run.n, c0, run.h, run.w);
      for (int64_t i = 0; i < run.columns; i += L) {
        const int valid = int(min(L, run.columns - i));
        Vec<S> tile[L];
        for (int64_t c = 0; c < L; ++c) {
          prefetch_first_level(x + i + c * s.x.c + ahead);
          tile[c] = c < channels ? load_first<S>(x + i + c * s.x.c, valid) : Vec<S>{};
        }
        transpose<S>(tile);
        for (int64_t q = 0; q < valid; ++q) store_vec(to + (place + i + q) * width + c0, tile[q]);
      }
    });
  }
}

template <typename T, typename S>
void add_block(const FilterGradArgs& a, int64_t block, S* grads, S* panel, S* sums, double* bias,
               bool first_block) {
  constexpr int64_t width = GradSizes<S>::width, L = lanes<S>;
  const GradSizes<S> sizes(a);
  const int64_t begin = block * sizes.block, count = min(sizes.block, sizes.pixels - begin);
  const Pixel first(a, begin);
  each_vector<T, S>(a, grad_source_of(a), first, count,
                    [&](int64_t k, int64_t q, Vec<S> v, int valid) __attribute__((always_inline)) {
                      store_first<S>(grads + k * sizes.block + q, v, valid);
                    });
  for (int64_t k = 0; k < a.out_channels; ++k) {
    const S* row = grads + k * sizes.block;
    Vec<S> sum = {};
    for (int64_t q = 0; q < count; q += L) sum += load_first<S>(row + q, int(min(L, count - q)));
    for (int i = 0; i < L; ++i) bias[k] += double(sum[i]);
  }
  if (!a.x.data) return;
  const int64_t none = 0;
  for (int64_t c0 = 0; c0 < a.in_channels; c0 += width, sums += sizes.rows * width) {
    Source s = channel_of<T>(source_of(a), c0);
    s.channels = min(width, a.in_channels - c0);
    pack_turned<T, S>(a, s, first, count, panel);
    const MicroKernel<S> kernel = kernel_of<S>(ceil_div(s.channels, L));
    for (int64_t k0 = 0; k0 < a.out_channels; k0 += outputs) {
      const int valid = int(min(outputs, a.out_channels - k0));
      int64_t row[outputs];
      for (int r = 0; r < outputs; ++r) row[r] = r < valid ? r * sizes.block : 0;
      kernel(grads + k0 * sizes.block, row, valid, &none, 1, count, 1, panel, width,
             sums + k0 * width, width, !first_block);
    }
  }
}

void filter_grad(const FilterGradArgs& args, int64_t chunk, void* sums_memory, void* memory) {
  const FilterGradArgs a = flat(args);
  const int64_t count = chunks(args);
  with_types(a.dtype, [&]<typename T, typename S>() {
    const GradSizes<S> sizes(a);
    Arena memory_of_sums(sums_memory), scratch(memory);
    S* sums = memory_of_sums.take<S>(sizes.sums);
    double* bias = memory_of_sums.take<double>(a.out_channels);
    S* grads = scratch.take<S>(sizes.grads(a));
    S* panel = scratch.take<S>(sizes.panel());
    for (int64_t k = 0; k < a.out_channels; ++k) bias[k] = 0;
    const int64_t begin = sizes.blocks * chunk / count, end = sizes.blocks * (chunk + 1) / count;
    for (int64_t block = begin; block < end; ++block)
      add_block<T, S>(a, block, grads, panel, sums, bias, block == begin);
  });
}

bool combine(const FilterGradArgs& a, const void* sums, void* d_bias) {
  const int64_t count = chunks(a), bytes = sum_bytes(a);
  const char* parts = static_cast<const char*>(sums);
  with_types(a.dtype, [&]<typename T, typename S>() {
    constexpr int64_t width = GradSizes<S>::width, L = lanes<S>;
    const GradSizes<S> sizes(a);
    for (int64_t k = 0; k < a.out_channels && a.d_filter.data; ++k)
      for (int64_t c = 0; c < a.in_channels; c += L) {
        const int valid = int(min(L, a.in_channels - c));
        const int64_t from = (c / width * sizes.rows + k) * width + c % width;
        Vec<S> sum = {};
        for (int64_t i = 0; i < count; ++i)
          sum += load_vec(reinterpret_cast<const S*>(parts + i * bytes) + from);
        T* to = const_cast<T*>(at<T>(a.d_filter, k, c, 0, 0));
        if (a.d_filter.c == 1) {
          store_first<S>(to, sum, valid);
        } else {
          for (int i = 0; i < valid; ++i) store(to + i * a.d_filter.c, S(sum[i]));
        }
      }
    for (int64_t k = 0; k < a.out_channels && d_bias; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < count; ++i)
        sum += reinterpret_cast<const double*>(parts + i * bytes + Arena::bytes<S>(sizes.sums))[k];
      store(static_cast<T*>(d_bias) + k, S(sum));
    }
  });
  return true;
}

}  // namespace

extern const ConvKernels pointwise;
const ConvKernels pointwise = {
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
