// Every operator's schema on one page, and the Python module that carries them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "common/isa.h"
#include "common/tensor.h"

STABLE_TORCH_LIBRARY(fastda, m) {
  // Gradient reversal.
  // grad * -scale; scale is 0-dim, or one value per entry of dim 0.
  m.def("grad_reverse_backward(Tensor grad, Tensor scale) -> Tensor");

  // Refiner convolutions. Gradients that are not needed come back empty.
  // relu?(conv(x, weight) + bias + residual), stride 1, zero padding k // 2
  m.def("conv_same(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor");
  // output: that of a forward with relu, whose mask the gradient takes; -> gradients of x, weight, bias
  m.def(
      "conv_same_backward(Tensor grad, Tensor x, Tensor weight, Tensor? output, bool need_x, bool "
      "need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor)");
  // -> output, inner activation (empty unless keep_inner)
  m.def(
      "refiner_block(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, bool "
      "keep_inner) "
      "-> (Tensor, Tensor)");
  // inner None: computed again, with bias1; -> gradients of x, weight1, bias1, weight2, bias2
  m.def(
      "refiner_block_backward(Tensor grad, Tensor x, Tensor? inner, Tensor output, Tensor weight1, Tensor? "
      "bias1, "
      "Tensor weight2, bool need_x, bool need_weight1, bool need_bias1, bool need_weight2, bool need_bias2) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastda::isa_name(fastda::cpu_isa())); }

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set that the CPU kernels of this process use."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
