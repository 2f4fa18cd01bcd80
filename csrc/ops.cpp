// Every operator's schema on one page, and the Python module that carries them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "common/isa.h"
#include "common/tensor.h"

STABLE_TORCH_LIBRARY(fastda, m) {
  // Gradient reversal.
  // grad * -scale; scale is 0-dim, or one value per entry of dim 0.
  m.def("grad_reverse_backward(Tensor grad, Tensor scale) -> Tensor");
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
