// The CPU kernels without torch, every table of one instruction set against double loops. Which one
// FASTDA_CPU_ISA says; no argument, one line for each check that fails, and the count of all.
#include "common/isa.h"
#include "cpu/kernels/grad_reverse.h"
#include "cpu/kernels/peak.h"
#include "patch_loss.h"
#include "refiner_conv.h"

using namespace fastda;
using namespace fastda::harness;
using namespace fastda::cpu;

namespace {

void check_reversal(DType dtype) {
  constexpr int64_t size = 1003;
  Image a(dtype, 1, 1, 1, size), out(dtype, 1, 1, 1, size);
  a.fill();
  grad_reverse_kernels().negate_scale(dtype, a.data(), out.data(), size, 0.7);
  std::vector<double> reversed;
  for (int64_t i = 0; i < size; ++i) reversed.push_back(-0.7 * a.entry(i));
  compare("reversed gradient", out.values(), reversed, tolerance_of(dtype));
}

}  // namespace

int main() {
  // (N, C, K, H, W, kernel, padding): ragged vectors and tiles, few channels, few pixels; each way
  // of convolving serves some of them.
  const ConvProblem shapes[] = {
      {DType::f32, 1, 1, 1, 1, 1, 1, 0},     {DType::f32, 2, 3, 5, 7, 9, 3, 1},
      {DType::f32, 1, 7, 4, 3, 2, 5, 2},     {DType::f32, 1, 20, 33, 29, 27, 3, 1},
      {DType::f32, 2, 17, 70, 9, 7, 3, 1},   {DType::f32, 1, 16, 150, 12, 13, 3, 1},
      {DType::f32, 1, 16, 20, 13, 17, 7, 3}, {DType::f32, 1, 19, 16, 8, 9, 11, 5},
      {DType::f32, 2, 17, 20, 13, 11, 5, 2}, {DType::f32, 1, 16, 33, 10, 14, 5, 0},
      {DType::f32, 1, 20, 16, 7, 6, 5, 4},   {DType::f32, 1, 16, 17, 6, 9, 3, 0},
      {DType::f32, 1, 3, 5, 6, 5, 4, 1},     {DType::f32, 1, 4, 3, 5, 3, 2, 1},
      {DType::f32, 49, 16, 16, 7, 6, 5, 2},  {DType::f32, 2, 18, 33, 12, 23, 2, 0},
      {DType::f32, 1, 70, 16, 17, 11, 2, 1}, {DType::f32, 1, 18, 33, 31, 30, 3, 0},
      {DType::f32, 2, 16, 20, 20, 27, 3, 2}, {DType::f32, 2, 3, 33, 9, 14, 3, 1},
      {DType::f32, 1, 2, 20, 13, 11, 5, 0},  {DType::f32, 1, 3, 17, 17, 14, 7, 3},
      {DType::f32, 1, 5, 16, 22, 27, 11, 5}, {DType::f32, 1, 1, 20, 7, 40, 5, 2},
      {DType::f32, 1, 17, 1, 9, 11, 3, 1},   {DType::f32, 2, 16, 3, 13, 21, 1, 0},
      {DType::f32, 1, 20, 4, 10, 9, 5, 4},   {DType::f32, 1, 33, 2, 8, 13, 7, 3},
      {DType::f32, 49, 17, 16, 3, 4, 5, 4},  {DType::f32, 1, 16, 33, 7, 9, 5, 3}};
  for (ConvProblem p : shapes) {
    for (const DType dtype : dtypes) {
      p.dtype = dtype;
      for (const bool x_last : {false, true})
        for (const bool out_last : {false, true})
          for (const bool fused : {false, true}) {
            check_convolution(p, x_last, out_last, fused, x_last != out_last);
            check_filter_gradient(p, x_last, out_last, fused);
          }
    }
  }
  const ConvProblem strided[] = {{DType::f32, 2, 17, 33, 19, 22, 4, 1, false, 2},
                                 {DType::f32, 1, 16, 16, 30, 41, 4, 0, false, 2},
                                 {DType::f32, 1, 18, 70, 21, 17, 4, 3, false, 2}};
  for (const ConvProblem& p : strided)
    for (const bool x_last : {false, true}) {
      check_data_gradient(p, x_last);
      for (const bool out_last : {false, true})
        for (const bool fused : {false, true}) {
          check_convolution(p, x_last, out_last, fused, x_last != out_last);
          check_filter_gradient(p, x_last, out_last, fused);
        }
    }
  check_band(DType::f32);
  check_band(DType::f16);
  for (const DType dtype : dtypes) {
    for (const Kind kind : {Kind::softmax, Kind::bce, Kind::lsgan, Kind::hinge, Kind::wgan})
      for (const bool real : {false, true})
        for (const bool option : {false, true})
          check_loss(dtype, kind, real, kind <= Kind::lsgan && option ? 0.1 : 0, real != option,
                     option);
    for (const int64_t channels : {1, 5, 32, 67})
      for (const bool channels_last : {false, true}) check_head(dtype, channels, channels_last);
    check_l1_and_scale(dtype);
    check_reversal(dtype);
  }
  require("multiply_add counts its operations", peak_kernels().multiply_add(10) > 0);
  std::printf("%s: %d of %d checks failed; convolutions", isa_name(cpu_isa()), failures, checks);
  for (const auto& [method, count] : served) std::printf(" %s %d", method.c_str(), count);
  std::printf("\n");
  return failures != 0;
}
