// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// channels_last: the lanes of a vector are channels, a window's elements whole vectors.
//
// Contiguous: the lanes are neighbouring outputs. A row of the input is split into one line for each
// column modulo the stride, so that a window's elements are vectors there; stride 2, padding 1:
//
//   row               x0 x1 x2 x3 x4
//   line 0   -inf  x1 x3 -inf          columns 0 and 2 of the windows: from entries 0 and 1 on
//   line 1     x0  x2 x4               column 1
//
// and backward the other way round: lines of a row's outputs, from which every column of the input
// takes what it won, and one row woven from the lines of sums. Lines of the rows that a window spans
// are kept from row to row.
#include "cpu/kernels/pool.h"

#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

// A number of lanes that is known to the compiler.
template <int n>
struct Known {
  constexpr operator int() const { return n; }
};

template <typename S, typename T>
FASTDA_INLINE Vec<S> load_lanes(const T* p, int n) {
  if constexpr (FASTDA_SIMD && sizeof(T) == 2)
    if (n == lanes<S>) return load_vec(p);
  return load_first<S>(p, n);
}
template <typename S, typename T>
FASTDA_INLINE void store_lanes(T* p, Vec<S> v, int n) {
  if constexpr (FASTDA_SIMD && sizeof(T) == 2)
    if (n == lanes<S>) return store_vec(p, v);
  store_first<S>(p, v, n);
}
// The largest elements so far and their places in the windows. As in PyTorch the first of equal ones
// stays, and the last NaN.
template <typename S>
struct Largest {
  Vec<S> value;
  IntVec<S> index;

  [[gnu::always_inline]] inline void see(Vec<S> v, int place) {
    const IntVec<S> wins = (v > value) | (v != v);
    value = wins ? v : value;
    index = wins ? IntVec<S>{} + place : index;
  }
};
// What is larger than zero or NaN passes ReLU; without it, the first element stands for a window of
// -inf alone.
template <typename S>
FASTDA_INLINE Largest<S> start(bool relu, IntVec<S> first) {
  if (relu) return {Vec<S>{}, IntVec<S>{} + no_index};
  return {broadcast(-S(__builtin_inf())), first};
}
// The part of a gradient that belongs to this place of its window.
template <typename S>
FASTDA_INLINE Vec<S> won(Vec<S> grad, IntVec<S> index, int place) {
  return index == place ? grad : Vec<S>{};
}

// Kernel and stride of both directions as constants where they are common ones; 0 otherwise.
template <int kernel, int step>
struct Sizes {
  const PoolProblem& p;
  int64_t kernel_h() const { return kernel ? kernel : p.kernel_h; }
  int64_t kernel_w() const { return kernel ? kernel : p.kernel_w; }
  int64_t stride_h() const { return step ? step : p.stride_h; }
  int64_t stride_w() const { return step ? step : p.stride_w; }
};

// lines[column][channel], `stride` from column to column, to out[channel][column], `plane` from channel
// to channel.
template <typename S, typename T>
void store_turned(const S* lines, int64_t stride, int64_t channels, int columns, T* out,
                  int64_t plane) {
  constexpr int L = lanes<S>;
  for (int64_t c = 0; c < channels; c += L) {
    Vec<S> tile[L];
    for (int i = 0; i < L; ++i) tile[i] = i < columns ? load_vec(lines + i * stride + c) : Vec<S>{};
    transpose<S>(tile);
    for (int64_t k = c; k < channels && k < c + L; ++k)
      store_first<S>(out + k * plane, tile[k - c], columns);
  }
}

template <typename T, int kernel, int step>
void forward_pixels(const PoolProblem& p, const T* x, T* y, uint8_t* indices, int64_t begin,
                    int64_t end, void* scratch) {
  using S = typename Acc<T>::type;
  constexpr int L = lanes<S>;
  const Sizes<kernel, step> s{p};
  const int64_t c = p.channels, line = p.width * c;
  const bool relu = p.relu, turned = p.out_contiguous;
  const int64_t padded_c = (c + L - 1) / L * L;
  S* lines = static_cast<S*>(scratch);  // of L columns
  for (int64_t row = begin; row < end; ++row) {
    const int64_t oh = row % p.out_height;
    const T* image = x + row / p.out_height * p.height * line;
    const PoolRange kh = pool_places(oh, s.kernel_h(), s.stride_h(), p.pad_h, p.height);
    for (int64_t ow = 0; ow < p.out_width; ++ow) {
      const PoolRange kw = pool_places(ow, s.kernel_w(), s.stride_w(), p.pad_w, p.width);
      const T* window =
          image + (oh * s.stride_h() - p.pad_h) * line + (ow * s.stride_w() - p.pad_w) * c;
      const int64_t out = (row * p.out_width + ow) * c;
      const int first = int(kh.begin * s.kernel_w() + kw.begin);
      const auto channels = [&](PoolRange kh, PoolRange kw, int64_t at, auto n)
                                __attribute__((always_inline)) {
                                  Largest<S> largest = start<S>(relu, IntVec<S>{} + first);
#pragma GCC unroll 3
                                  for (int64_t i = kh.begin; i < kh.end; ++i) {
#pragma GCC unroll 3
                                    for (int64_t j = kw.begin; j < kw.end; ++j)
                                      largest.see(load_lanes<S>(window + i * line + j * c + at, n),
                                                  int(i * s.kernel_w() + j));
                                  }
                                  if (indices) store_bytes<S>(indices + out + at, largest.index, n);
                                  if (!turned)
                                    return store_lanes<S>(y + out + at, largest.value, n);
                                  store_vec(lines + ow % L * padded_c + at, largest.value);
                                };
      int64_t at = 0;
      if (kernel && kh.end - kh.begin + kw.end - kw.begin == 2 * kernel) {
        for (; at + L <= c; at += L) channels({0, kernel}, {0, kernel}, at, Known<L>{});
      } else {
        for (; at + L <= c; at += L) channels(kh, kw, at, Known<L>{});
      }
      if (at < c) channels(kh, kw, at, int(c - at));
      if (turned && (ow % L == L - 1 || ow + 1 == p.out_width))
        store_turned(lines, padded_c, c, int(ow % L + 1),
                     y + (row / p.out_height * c * p.out_height + oh) * p.out_width + ow / L * L,
                     p.out_height * p.out_width);
    }
  }
}

template <typename T, int kernel, int step>
void backward_pixels(const PoolProblem& p, const T* grad, const uint8_t* indices, T* out,
                     int64_t begin, int64_t end) {
  using S = typename Acc<T>::type;
  constexpr int L = lanes<S>;
  const Sizes<kernel, step> s{p};
  const int64_t c = p.channels;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t ih = row % p.height, image = row / p.height * p.out_height;
    const PoolRange oh = pool_windows(ih, s.kernel_h(), s.stride_h(), p.pad_h, p.out_height);
    for (int64_t iw = 0; iw < p.width; ++iw) {
      const PoolRange ow = pool_windows(iw, s.kernel_w(), s.stride_w(), p.pad_w, p.out_width);
      const auto channels = [&](int64_t at, auto n) __attribute__((always_inline)) {
        Vec<S> sum{};
        for (int64_t i = oh.begin; i < oh.end; ++i) {
          int64_t from = ((image + i) * p.out_width + ow.begin) * c + at;
          int place = int((ih + p.pad_h - i * s.stride_h()) * s.kernel_w() + iw + p.pad_w -
                          ow.begin * s.stride_w());
          for (int64_t j = ow.begin; j < ow.end; ++j, from += c, place -= int(s.stride_w()))
            sum += won<S>(load_lanes<S>(grad + from, n), load_bytes<S>(indices + from, n), place);
        }
        store_lanes<S>(out + (row * p.width + iw) * c + at, sum, n);
      };
      int64_t at = 0;
      for (; at + L <= c; at += L) channels(at, Known<L>{});
      if (at < c) channels(at, int(c - at));
    }
  }
}

// Entries of a line of either direction, with a vector to spare on the right.
template <typename S>
int64_t line_length(const PoolProblem& p) {
  const int64_t columns = (p.width + 2 * p.pad_w) / p.stride_w + 1;
  const int64_t most = columns > p.out_width ? columns : p.out_width;
  return (most + (p.kernel_w - 1) / p.stride_w + 3 * lanes<S>) / lanes<S> * lanes<S>;
}

template <typename T, int kernel, int step>
void forward_planes(const PoolProblem& p, const T* x, T* y, uint8_t* indices, int64_t begin,
                    int64_t end, void* scratch) {
  using S = typename Acc<T>::type;
  constexpr int L = lanes<S>;
  const Sizes<kernel, step> s{p};
  const int64_t kernel_w = s.kernel_w(), stride = s.stride_w();
  const int64_t length = line_length<S>(p), pad = p.pad_w;
  const bool relu = p.relu;
  S* lines = static_cast<S*>(scratch);  // [kernel_h, stride, length]
  const auto line = [&](int64_t row, int64_t phase) {
    return lines + (row % s.kernel_h() * stride + phase) * length;
  };
  for (int64_t i = 0; i < s.kernel_h() * stride * length; ++i) lines[i] = -S(__builtin_inf());
  // [length] first column of a window within the input
  auto* first = reinterpret_cast<typename Bits<S>::type*>(lines + s.kernel_h() * stride * length);
  for (int64_t j = 0; j < length; ++j)
    first[j] = typename Bits<S>::type(j * stride < pad ? pad - j * stride : 0);

  const auto split = [&](const T* from, int64_t row) {
    if (stride == 1) {
      S* to = line(row, 0) + pad;
      int64_t i = 0;
      for (; i + L <= p.width; i += L) store_vec(to + i, load_lanes<S>(from + i, L));
      if (i < p.width)
        store_first<S>(to + i, load_lanes<S>(from + i, int(p.width - i)), int(p.width - i));
    } else if (stride == 2) {
      S *even = line(row, pad & 1) + pad / 2, *odd = line(row, (pad & 1) ^ 1) + (pad + 1) / 2;
      int64_t i = 0;
      for (; 2 * (i + L) <= p.width; i += L) {
        Vec<S> a = load_lanes<S>(from + 2 * i, L), b = load_lanes<S>(from + 2 * i + L, L);
        deinterleave<S>(a, b);
        store_vec(even + i, a);
        store_vec(odd + i, b);
      }
      if (const int n = int(p.width - 2 * i); n > 0) {
        Vec<S> a = load_lanes<S>(from + 2 * i, n < L ? n : L), b{};
        if (n > L) b = load_lanes<S>(from + 2 * i + L, n - L);
        deinterleave<S>(a, b);
        store_first<S>(even + i, a, (n + 1) / 2);
        if (n > 1) store_first<S>(odd + i, b, n / 2);
      }
    } else {
      for (int64_t i = 0; i < p.width; ++i)
        line(row, (i + pad) % stride)[(i + pad) / stride] = load(from + i);
    }
  };

  int64_t split_rows = 0, plane_before = -1;  // of this plane
  for (int64_t r = begin; r < end; ++r) {
    const int64_t plane = r / p.out_height, oh = r % p.out_height;
    const int64_t top = oh * s.stride_h() - p.pad_h;
    const PoolRange kh = pool_places(oh, s.kernel_h(), s.stride_h(), p.pad_h, p.height);
    if (plane != plane_before) split_rows = 0;
    plane_before = plane;
    if (split_rows < top + kh.begin) split_rows = top + kh.begin;
    for (; split_rows < top + kh.end; ++split_rows)
      split(x + (plane * p.height + split_rows) * p.width, split_rows);

    for (int64_t j = 0; j < p.out_width; j += L) {
      const int n = p.out_width - j < L ? int(p.out_width - j) : L;
      IntVec<S> places_before;
      std::memcpy(&places_before, first + j, sizeof places_before);
      Largest<S> largest = start<S>(relu, places_before + int(kh.begin * kernel_w));
      for (int64_t i = kh.begin; i < kh.end; ++i) {
        const S* base = line(top + i, 0) + j;
        int place = int(i * kernel_w);
        int64_t phase = 0, offset = 0;
        for (int64_t k = 0; k < kernel_w; ++k, ++place) {
          largest.see(load_vec(base + phase * length + offset), place);
          if (++phase == stride) phase = 0, ++offset;
        }
      }
      store_lanes<S>(y + r * p.out_width + j, largest.value, n);
      if (indices) store_bytes<S>(indices + r * p.out_width + j, largest.index, n);
    }
  }
}

template <typename T, int kernel, int step>
void backward_planes(const PoolProblem& p, const T* grad, const uint8_t* indices, T* out,
                     int64_t begin, int64_t end, void* scratch) {
  using S = typename Acc<T>::type;
  using I = typename Bits<S>::type;
  constexpr int L = lanes<S>;
  const Sizes<kernel, step> s{p};
  const int64_t kernel_w = s.kernel_w(), stride = s.stride_w();
  const int64_t length = line_length<S>(p), pad = p.pad_w, left = (kernel_w - 1) / stride;
  const int64_t kept = (s.kernel_h() + s.stride_h() - 1) / s.stride_h();
  S* grads = static_cast<S*>(scratch);  // [kept, length] from entry `left` on
  I* places_of = reinterpret_cast<I*>(grads + kept * length);  // likewise
  for (int64_t i = 0; i < kept * length; ++i) grads[i] = 0, places_of[i] = no_index;

  int64_t read_rows = 0, plane_before = -1;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t plane = r / p.height, ih = r % p.height;
    const PoolRange oh = pool_windows(ih, s.kernel_h(), s.stride_h(), p.pad_h, p.out_height);
    if (plane != plane_before) read_rows = 0;
    plane_before = plane;
    if (read_rows < oh.begin) read_rows = oh.begin;
    for (; read_rows < oh.end; ++read_rows) {
      const int64_t from = (plane * p.out_height + read_rows) * p.out_width;
      S* to = grads + read_rows % kept * length + left;
      I* to_places = places_of + read_rows % kept * length + left;
      for (int64_t j = 0; j < p.out_width; j += L) {
        const int n = p.out_width - j < L ? int(p.out_width - j) : L;
        store_first<S>(to + j, load_lanes<S>(grad + from + j, n), n);
        const IntVec<S> index = load_bytes<S>(indices + from + j, n);
        std::memcpy(to_places + j, &index, size_t(n) * sizeof(I));
      }
    }
    // Sums of the inputs with (column + pad) / stride from j on and that remainder.
    const auto sums = [&](int64_t phase, int64_t j) {
      Vec<S> sum{};
      for (int64_t i = oh.begin; i < oh.end; ++i) {
        const int place = int((ih + p.pad_h - i * s.stride_h()) * kernel_w + phase);
        const int64_t from = i % kept * length + left + j;
        for (int64_t q = (kernel_w - 1 - phase) / stride; q >= 0; --q) {
          if (phase >= kernel_w) break;
          IntVec<S> index;
          std::memcpy(&index, places_of + from - q, sizeof index);
          sum += won<S>(load_vec(grads + from - q), index, place + int(q * stride));
        }
      }
      return sum;
    };
    T* row = out + r * p.width;
    if (stride == 1) {
      for (int64_t i = 0; i < p.width; i += L)
        store_lanes<S>(row + i, sums(0, i + pad), p.width - i < L ? int(p.width - i) : L);
    } else if (stride == 2) {
      for (int64_t i = 0; 2 * i < p.width; i += L) {
        Vec<S> a = sums(pad & 1, i + pad / 2), b = sums((pad & 1) ^ 1, i + (pad + 1) / 2);
        interleave<S>(a, b);
        const int64_t n = p.width - 2 * i;
        store_lanes<S>(row + 2 * i, a, n < L ? int(n) : L);
        if (n > L) store_lanes<S>(row + 2 * i + L, b, n < 2 * L ? int(n - L) : L);
      }
    } else {
      for (int64_t phase = 0; phase < stride; ++phase)
        for (int64_t j = 0; j * stride + phase - pad < p.width; j += L) {
          S lane[L];
          store_vec(lane, sums(phase, j));
          for (int64_t i = 0; i < L; ++i) {
            const int64_t column = (j + i) * stride + phase - pad;
            if (column >= 0 && column < p.width) store(row + column, lane[i]);
          }
        }
    }
  }
}

// Calls f<kernel, stride>().
template <typename F>
void with_sizes(const PoolProblem& p, F&& f) {
  if (p.kernel_h == p.kernel_w && p.stride_h == 2 && p.stride_w == 2) {
    if (p.kernel_w == 2) return f.template operator()<2, 2>();
    if (p.kernel_w == 3) return f.template operator()<3, 2>();
  }
  f.template operator()<0, 0>();
}

int64_t scratch_bytes(const PoolProblem& p) {
  if (p.channels_last) return !p.out_contiguous ? 0 : (p.channels + 63) / 64 * 64 * vector_bytes;
  const int64_t lines = p.kernel_h * p.stride_w + 1, kept = 2 * (p.kernel_h / p.stride_h + 1);
  const int64_t most = lines > kept ? lines : kept;
  return p.dtype == DType::f64 ? most * line_length<double>(p) * 8
                               : most * line_length<float>(p) * 4;
}

void forward(const PoolProblem& p, const void* x, void* y, uint8_t* indices, int64_t begin,
             int64_t end, void* scratch) {
  dispatch(p.dtype, [&]<typename T>() {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    with_sizes(p, [&]<int kernel, int step>() {
      if (p.channels_last) {
        return forward_pixels<T, kernel, step>(p, from, to, indices, begin, end, scratch);
      }
      forward_planes<T, kernel, step>(p, from, to, indices, begin, end, scratch);
    });
  });
}

void backward(const PoolProblem& p, const void* grad, const uint8_t* indices, void* out,
              int64_t begin, int64_t end, void* scratch) {
  dispatch(p.dtype, [&]<typename T>() {
    const T* from = static_cast<const T*>(grad);
    T* to = static_cast<T*>(out);
    with_sizes(p, [&]<int kernel, int step>() {
      if (p.channels_last)
        return backward_pixels<T, kernel, step>(p, from, indices, to, begin, end);
      backward_planes<T, kernel, step>(p, from, indices, to, begin, end, scratch);
    });
  });
}

}  // namespace

extern const PoolKernels pool;
const PoolKernels pool = {scratch_bytes, forward, backward};

}  // namespace fastda::cpu::FASTDA_ISA
