// Every operator's schema on one page, and the Python module that carries them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "common/isa.h"
#include "cpu/kernels/peak.h"
#include "host/tensor.h"

// clang-format off: one schema a line
STABLE_TORCH_LIBRARY(fastda, m) {
  // Gradient reversal.
  // grad * -scale; scale is 0-dim, or one value per entry of dim 0.
  m.def("grad_reverse_backward(Tensor grad, Tensor scale) -> Tensor");

  // Patch losses. kind and reduction are named in common/patch_term.h. Logits are (N, 2, H, W) for
  // softmax, else (N, 1, H, W); weights (N, 1, H, W), of any strides. Losses, gradients, and weights
  // are float32, or float64 for float64 logits; accuracies are float32. Gradients that are not
  // needed come back empty.
  // -> loss, accuracy on real and on fake patches, gradients of real and fake
  m.def("patch_discriminator_loss(Tensor real, Tensor fake, Tensor? real_weight, Tensor? fake_weight, str kind, str reduction, float label_smoothing, bool real_grad, bool fake_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // -> loss, gradient
  m.def("patch_generator_loss(Tensor fake, Tensor? weight, str kind, str reduction, bool grad) -> (Tensor, Tensor)");
  // -> weighted terms (N, 1, H, W), accuracy, d term / d logits
  m.def("patch_loss_map(Tensor logits, Tensor? weight, str kind, bool real, float label_smoothing, bool grad) -> (Tensor, Tensor, Tensor)");
  // scale * |refined - synthetic|; scale_tensor (0-dim) stands for scale where it is given.
  // -> loss, gradients of refined and synthetic
  m.def("self_regularization(Tensor refined, Tensor synthetic, Tensor? scale_tensor, float scale, str reduction, bool refined_grad, bool synthetic_grad) -> (Tensor, Tensor, Tensor)");
  // patch_generator_loss + self_regularization -> loss, gradients of fake, refined, synthetic
  m.def("refiner_loss(Tensor fake, Tensor refined, Tensor synthetic, Tensor? scale_tensor, float scale, str kind, str reduction, bool fake_grad, bool refined_grad, bool synthetic_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  // The discriminator's loss of conv2d(features, weight, bias), weight (2 or 1, C, 1, 1).
  // -> loss, two accuracies, gradients of real, fake, weight, bias
  m.def("patch_head_discriminator_loss(Tensor real, Tensor fake, Tensor weight, Tensor? bias, str kind, str reduction, float label_smoothing, bool real_grad, bool fake_grad, bool weight_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Both dense tensors times the 0-dim factor.
  m.def("patch_loss_scale_(Tensor(a!) first, Tensor(b!) second, Tensor factor) -> ()");

  // Refiner convolutions. Gradients that are not needed come back empty. tf32: a CUDA device may
  // round the factors of float32 products to TF32. negative_slope: of every ReLU; 0 or more.
  // relu?(conv(x, weight) + bias + residual), stride 1, padding k // 2: zeros or, reflect, the pixels of x
  // mirrored at its first and last ones
  m.def("conv_same(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu, bool tf32=False, float negative_slope=0.0, bool reflect=False) -> Tensor");
  // output: that of a forward with relu, whose mask the gradient takes; with reflect the gradient of x must
  // not be needed
  // -> gradients of x, weight, bias
  m.def("conv_same_backward(Tensor grad, Tensor x, Tensor weight, Tensor? output, bool need_x, bool need_weight, bool need_bias, bool tf32=False, float negative_slope=0.0, bool reflect=False) -> (Tensor, Tensor, Tensor)");
  // The same with any padding from 0 to k - 1 and any k, on the CPU.
  m.def("conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int padding, bool relu, float negative_slope=0.0) -> Tensor");
  m.def("conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? output, int padding, bool need_x, bool need_weight, bool need_bias, float negative_slope=0.0) -> (Tensor, Tensor, Tensor)");
  // (rectified) max-pool, with windows of size x size side by side, of conv(x, weight) + bias; indices as of
  // relu_max_pool, channels_last
  // -> output, indices (empty unless keep_indices)
  m.def("conv2d_max_pool(Tensor x, Tensor weight, Tensor? bias, int padding, int size, bool relu, bool keep_indices) -> (Tensor, Tensor)");
  // -> gradients of x, weight, bias
  m.def("conv2d_max_pool_backward(Tensor grad, Tensor indices, Tensor x, Tensor weight, int padding, int size, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  // conv(x, weight) + bias with 4x4 filters and a stride of 2, float32, on the CPU.
  m.def("conv2d_stride2(Tensor x, Tensor weight, Tensor? bias, int padding) -> Tensor");
  m.def("conv2d_stride2_backward(Tensor grad, Tensor x, Tensor weight, int padding, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  // -> output, inner activation (empty unless keep_inner)
  m.def("refiner_block(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, bool keep_inner, bool tf32=False, float negative_slope=0.0) -> (Tensor, Tensor)");
  // inner None: computed again, with bias1
  // -> gradients of x, weight1, bias1, weight2, bias2
  m.def("refiner_block_backward(Tensor grad, Tensor x, Tensor? inner, Tensor output, Tensor weight1, Tensor? bias1, Tensor weight2, bool need_x, bool need_weight1, bool need_bias1, bool need_weight2, bool need_bias2, bool tf32=False, float negative_slope=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Normalisation. act?((x - mean) / sqrt(variance + eps) weight + bias + residual), the statistics
  // those of a channel, per_image of one image's channel, or the running ones where they are given;
  // no negative_slope: no activation. mean, variance: float64, what was used.
  m.def("norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? residual, bool per_image, float eps, float? negative_slope) -> (Tensor, Tensor, Tensor)");
  // output: None without an activation, and where there was no residual; its mask is then computed
  // again. Gradients of weight and bias are float32, or float64.
  // -> gradients of x, weight, bias, residual, empty where not needed
  m.def("norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, Tensor? output, bool per_image, bool through_statistics, float eps, float? negative_slope, bool need_x, bool need_weight, bool need_bias, bool need_residual) -> (Tensor, Tensor, Tensor, Tensor)");

  // Max-pool of a (rectified) image. indices: uint8, an output's place in its window; 255 where ReLU left
  // nothing of it.
  // -> output, indices (empty unless keep_indices)
  m.def("relu_max_pool(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, bool relu, bool keep_indices) -> (Tensor, Tensor)");
  // -> gradient of x, whose height, width and layout are given
  m.def("relu_max_pool_backward(Tensor grad, Tensor indices, int[2] size, bool channels_last, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor");
}
// clang-format on

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(fastda::isa_name(fastda::cpu_isa()));
}

PyObject* cuda_architectures(PyObject*, PyObject*) {
#if !defined(FASTDA_CUDA_ARCHITECTURES)
#define FASTDA_CUDA_ARCHITECTURES ""
#endif
  return PyUnicode_FromString(FASTDA_CUDA_ARCHITECTURES);
}

PyObject* multiply_add(PyObject*, PyObject* rounds) {
  const long long n = PyLong_AsLongLong(rounds);
  if (n == -1 && PyErr_Occurred()) return nullptr;
  PyThreadState* released = PyEval_SaveThread();
  const int64_t flops = fastda::cpu::peak_kernels().multiply_add(n);
  PyEval_RestoreThread(released);
  return PyLong_FromLongLong(flops);
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS,
     "The instruction set that the CPU kernels of this process use."},
    {"cuda_architectures", cuda_architectures, METH_NOARGS,
     "Compute capabilities of the CUDA kernels in this binary, \"8.0 9.0+PTX\"; empty without "
     "CUDA."},
    {"multiply_add", multiply_add, METH_O,
     "Run that many rounds of float32 multiply-adds in registers; return the floating-point "
     "operations."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
