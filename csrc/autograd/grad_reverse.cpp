// Gradient reversal as nodes of torch's C++ autograd graph, called through plain CPython functions.
//
// What this saves over a Python autograd.Function: the Function's call overhead, and an allocation of the
// size of the gradient, by multiplying in place one that nobody else holds. Every function here returns None
// for a call that it leaves alone; fastda/ops/grad_reverse.py then checks the arguments and goes the general
// way.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/version.h>

#include <mutex>
#include <optional>
#include <type_traits>

namespace {

using at::Tensor;
using c10::DispatchKey;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// -scale as it was at the forward pass: a number if the host knows it, else a tensor of its own, 0-dim or
// shaped to broadcast over dim 0.
struct Factor {
  double number = 0;
  Tensor tensor;
};

// Tracing, transforms and tensor modes see every operator; they have to go the general way.
const c10::DispatchKeySet kForeign({DispatchKey::Python, DispatchKey::PythonTLSSnapshot,
                                    DispatchKey::PythonDispatcher, DispatchKey::Functionalize,
                                    DispatchKey::FuncTorchDynamicLayerFrontMode,
                                    DispatchKey::FuncTorchDynamicLayerBackMode,
                                    DispatchKey::FuncTorchGradWrapper, DispatchKey::FuncTorchBatched,
                                    DispatchKey::FuncTorchVmapMode, DispatchKey::Tracer,
                                    DispatchKey::Conjugate});

bool foreign_mode() { return c10::impl::tls_local_dispatch_key_set().included_.has_any(kForeign); }

bool autocast() {
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(c10::autocast_dispatch_keyset);
}

// A plain strided tensor of a real floating dtype.
bool plain(const Tensor& t) {
  return t.defined() && t.layout() == c10::kStrided && at::isFloatingType(t.scalar_type()) &&
         !t.key_set().has_any(kForeign) && !t._fw_grad(0).defined();
}

// Whether autograd records `x` now.
bool recorded(const Tensor& x) { return c10::GradMode::is_enabled() && x.requires_grad(); }

std::optional<Factor> factor_of(PyObject* scale, const Tensor& x) {
  Factor factor;
  if (PyFloat_Check(scale)) {
    factor.number = -PyFloat_AS_DOUBLE(scale);
    return factor;
  }
  if (!THPVariable_CheckExact(scale)) return std::nullopt;
  const Tensor& s = THPVariable_Unpack(scale);
  if (!plain(s) || s.requires_grad() || s.dim() > 1) return std::nullopt;
  if (s.dim() == 0) {
    if (s.is_cpu()) {
      factor.number = -s.item<double>();
      return factor;
    }
    if (s.device() != x.device()) return std::nullopt;
    factor.tensor = (x.dim() == 0 ? s.to(x.scalar_type()) : s).neg();
    return factor;
  }
  if (x.dim() == 0 || s.device() != x.device() || s.size(0) != x.size(0)) return std::nullopt;
  c10::DimVector shape(x.dim(), 1);
  shape[0] = s.size(0);
  factor.tensor = s.neg().view(shape);
  return factor;
}

// The rule by which the autograd engine itself adds into a gradient in place: nobody else sees the tensor or
// its memory. Memory that torch did not allocate may have owners which no count shows.
bool owned(const Tensor& grad) {
  return !c10::GradMode::is_enabled() && grad.use_count() == 1 && grad.has_storage() &&
         grad.storage().use_count() == 1 && grad.storage().allocator() != nullptr &&
         grad.layout() == c10::kStrided && grad.is_non_overlapping_and_dense();
}

Tensor times(Tensor grad, const Factor& factor) {
  const bool in_place = owned(grad);
  if (!factor.tensor.defined()) return in_place ? grad.mul_(factor.number) : grad.mul(factor.number);
  if (in_place && (factor.tensor.dim() == 0 || factor.tensor.scalar_type() == grad.scalar_type()))
    return grad.mul_(factor.tensor);
  return grad.mul(factor.tensor).to(grad.scalar_type());
}

struct GradReverseBackward final : Node {
  explicit GradReverseBackward(Factor f) : factor(std::move(f)) {}

  variable_list apply(variable_list&& grads) override {
    variable_list out(1);
    if (grads[0].defined() && task_should_compute_output(0)) out[0] = times(std::move(grads[0]), factor);
    return out;
  }

  std::string name() const override { return "GradReverseBackward"; }

  Factor factor;
};

struct GradReverseLinearBackward final : Node {
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(3);
    const Tensor grad = std::move(grads[0]);
    if (!grad.defined()) return out;
    const bool differentiable = c10::GradMode::is_enabled();
    const Tensor rows = grad.dim() == 2 ? grad : grad.reshape({number_of_rows, grad.size(-1)});
    if (task_should_compute_output(0)) {
      const Tensor w = weight.unpack();
      TORCH_CHECK(w.defined(), released);
      Tensor dx;
      if (differentiable) {
        dx = at::mm(rows, w).mul(factor);
      } else {
        dx = at::empty({number_of_rows, w.size(1)}, grad.options());
        dx.addmm_(rows, w, /*beta=*/0, /*alpha=*/factor);
      }
      out[0] = grad.dim() == 2 ? dx : dx.view(x_shape);
    }
    if (task_should_compute_output(1)) {
      const Tensor saved = x.unpack();
      TORCH_CHECK(saved.defined(), released);
      out[1] = at::mm(rows.t(), saved.dim() == 2 ? saved : saved.reshape({number_of_rows, saved.size(-1)}));
    }
    if (task_should_compute_output(2)) out[2] = rows.sum(0);
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    weight.reset_data();
  }

  std::string name() const override { return "GradReverseLinearBackward"; }

  static constexpr const char* released = "grad_reverse_linear: the saved tensors are gone";
  double factor = 0;
  int64_t number_of_rows = 0;
  c10::DimVector x_shape;
  SavedVariable x, weight;
};

// torch keeps nodes in std::shared_ptr up to some version, in c10::intrusive_ptr later.
template <typename T, typename... Args>
auto make_node(Args&&... args) {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::shared_ptr<T>(new T(std::forward<Args>(args)...), [](T* node) { deleteNode(node); });
  else
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
}

// grad_reverse(x, scale) -> view of x, or None.
PyObject* grad_reverse(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !THPVariable_CheckExact(args[0]) || foreign_mode()) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(args[0]);
  if (!plain(x) || !recorded(x)) Py_RETURN_NONE;
  auto factor = factor_of(args[1], x);
  if (!factor) Py_RETURN_NONE;
  auto node = make_node<GradReverseBackward>(std::move(*factor));
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  Tensor y;
  {
    at::AutoDispatchBelowAutograd below;
    y = at::alias(x);
  }
  node->add_input_metadata(y);
  torch::autograd::impl::set_gradient_edge(y, torch::autograd::Edge(std::move(node), 0));
  // As for a view made in a custom Function: its history can't be rewritten, so a change of it in place has
  // to raise.
  torch::autograd::impl::get_view_autograd_meta(y)->set_creation_meta(
      torch::autograd::CreationMeta::IN_CUSTOM_FUNCTION);
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// grad_reverse_linear(x, weight, bias or None, scale) -> tensor, or None.
PyObject* grad_reverse_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4 || !THPVariable_CheckExact(args[0]) || !THPVariable_CheckExact(args[1])) Py_RETURN_NONE;
  if ((args[2] != Py_None && !THPVariable_CheckExact(args[2])) || foreign_mode()) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(args[0]);
  const Tensor& weight = THPVariable_Unpack(args[1]);
  const Tensor bias = args[2] == Py_None ? Tensor() : THPVariable_Unpack(args[2]);
  if (!plain(x) || !recorded(x) || !plain(weight) || (bias.defined() && !plain(bias))) Py_RETURN_NONE;
  if (x.dim() == 0 || weight.dim() != 2 || weight.size(1) != x.size(-1) ||
      weight.scalar_type() != x.scalar_type() || weight.device() != x.device() || autocast())
    Py_RETURN_NONE;
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != weight.size(0) ||
                         bias.scalar_type() != x.scalar_type() || bias.device() != x.device()))
    Py_RETURN_NONE;
  auto factor = factor_of(args[3], x);
  if (!factor || factor->tensor.defined()) Py_RETURN_NONE;

  auto node = make_node<GradReverseLinearBackward>();
  node->factor = factor->number;
  node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
  node->x_shape = x.sizes();
  node->number_of_rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) node->number_of_rows *= x.size(i);
  if (node->should_compute_output(1)) node->x = SavedVariable(x, /*is_output=*/false);
  node->weight = SavedVariable(weight, /*is_output=*/false);
  Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    at::AutoDispatchBelowADInplaceOrView below;
    y = at::linear(x, weight, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
  }
  node->add_input_metadata(y);
  torch::autograd::impl::set_gradient_edge(y, torch::autograd::Edge(std::move(node), 0));
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"grad_reverse", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(grad_reverse)), METH_FASTCALL,
     nullptr},
    {"grad_reverse_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(grad_reverse_linear)),
     METH_FASTCALL, nullptr},
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
