// `fastda._autograd_<torch version>`: nodes of torch's C++ autograd graph, called through plain
// CPython functions. Each returns None for a call that it leaves alone; the Python that called it
// then goes the general way.
#include "autograd/node.h"

namespace {

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction as_method() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"grad_reverse", as_method<fastda::autograd::grad_reverse>(), METH_FASTCALL,
     "grad_reverse(x, scale) -> view of x, or None"},
    {"grad_reverse_linear", as_method<fastda::autograd::grad_reverse_linear>(), METH_FASTCALL,
     "grad_reverse_linear(x, weight, bias or None, scale) -> tensor, or None"},
    {nullptr, nullptr, 0, nullptr},
};

#define FASTDA_STRING_(x) #x
#define FASTDA_STRING(x) FASTDA_STRING_(x)
#define FASTDA_INIT_(name) PyInit_##name
#define FASTDA_INIT(name) FASTDA_INIT_(name)

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      FASTDA_STRING(TORCH_EXTENSION_NAME),
                      nullptr,
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC FASTDA_INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
