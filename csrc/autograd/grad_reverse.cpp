// Gradient reversal as nodes of torch's C++ autograd graph.
//
// What this saves over a Python autograd.Function: the Function's call overhead, and an allocation
// of the size of the gradient, by multiplying in place one that nobody else holds. Bad arguments
// are left to fastda/ops/grad_reverse.py, which checks them.
#include <ATen/ScalarOps.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>

#include <mutex>

#include "autograd/node.h"

namespace fastda::autograd {
namespace {

// Whether autograd records `x` now.
bool recorded(const Tensor& x) { return c10::GradMode::is_enabled() && x.requires_grad(); }

// -scale, where the host knows it without waiting for a device.
std::optional<double> number_of(PyObject* scale) {
  if (PyFloat_Check(scale)) return -PyFloat_AS_DOUBLE(scale);
  if (!THPVariable_CheckExact(scale)) return std::nullopt;
  const Tensor& s = THPVariable_Unpack(scale);
  if (s.dim() != 0 || !s.is_cpu() || !plain(s) || s.requires_grad()) return std::nullopt;
  return -s.item<double>();
}

// -scale as it is now, in a tensor of its own: 0-dim, or shaped to broadcast over dim 0 of x.
Tensor factor_of(PyObject* scale, const Tensor& x) {
  // Multiplying by a 0-dim tensor is what PyTorch makes of multiplying by a number, every time
  // anew.
  if (const auto number = number_of(scale)) return c10::scalar_to_tensor(*number);
  if (!THPVariable_CheckExact(scale)) return {};
  const Tensor& s = THPVariable_Unpack(scale);
  if (!plain(s) || s.requires_grad() || s.dim() > 1 || s.device() != x.device()) return {};
  if (s.dim() == 0) return s.neg();
  if (x.dim() == 0 || s.size(0) != x.size(0)) return {};
  c10::DimVector shape(x.dim(), 1);
  shape[0] = s.size(0);
  return s.neg().view(shape);
}

// The rule by which the autograd engine itself adds into a gradient in place: nobody else sees the
// tensor or its memory. Memory that torch did not allocate may have owners which no count shows.
bool owned(const Tensor& grad) {
  return unobserved(grad) && grad.use_count() == 1 && grad.has_storage() &&
         grad.storage().use_count() == 1 && grad.storage().allocator() != nullptr &&
         grad.is_non_overlapping_and_dense();
}

Tensor times(Tensor grad, const Tensor& factor) {
  return owned(grad) ? grad.mul_(factor) : grad.mul(factor).to(grad.scalar_type());
}

struct GradReverseBackward final : Node {
  explicit GradReverseBackward(Tensor f) : factor(std::move(f)) {}

  variable_list apply(variable_list&& grads) override {
    variable_list out(1);
    if (grads[0].defined() && task_should_compute_output(0))
      out[0] = times(std::move(grads[0]), factor);
    return out;
  }

  void compiled_args(CompiledNodeArgs& args) const override { args.collect(factor); }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) override {
    saved.before(factor);
    const auto function = [](const variable_list& grads, const std::vector<c10::IValue>& state) {
      return variable_list{grads[0].defined() ? times(grads[0], state[0].toTensor()) : Tensor()};
    };
    auto out = compiled_call(*this, grads, saved, function, {factor});
    saved.after(factor);
    return out;
  }

  std::string name() const override { return "GradReverseBackward"; }

  Tensor factor;
};

// A view of x whose gradient is reversed; x requires grad.
Tensor reversed(const Tensor& x, Tensor factor) {
  auto node = make_node<GradReverseBackward>(std::move(factor));
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  Tensor y;
  {
    at::AutoDispatchBelowAutograd below;
    y = at::alias(x);
  }
  node->add_input_metadata(y);
  torch::autograd::impl::set_gradient_edge(y, torch::autograd::Edge(std::move(node), 0));
  // As for a view made in a custom Function: its history can't be rewritten, so a change of it in
  // place has to raise.
  torch::autograd::impl::get_view_autograd_meta(y)->set_creation_meta(
      torch::autograd::CreationMeta::IN_CUSTOM_FUNCTION);
  return y;
}

// Gradients of x, weight and bias where `needs` has bits 1, 2 and 4. x may be undefined if bit 2 is
// not set.
variable_list linear_backward(const Tensor& grad, const c10::IValue& factor, int64_t needs,
                              const Tensor& weight, const Tensor& x) {
  variable_list out(3);
  if (!grad.defined()) return out;
  const auto as_rows = [](const Tensor& t) {
    return t.dim() == 2 ? t : t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2);
  };
  const Tensor rows = as_rows(grad);
  if (needs & 1) {
    Tensor dx;
    if (unobserved(grad)) {
      dx = at::empty({rows.size(0), weight.size(1)}, grad.options());
      dx.addmm_(rows, weight, /*beta=*/0, /*alpha=*/factor.toScalar());
    } else {
      dx = at::mm(rows, weight).mul(factor.toScalar());
    }
    c10::SymDimVector shape(grad.sym_sizes());
    shape.back() = weight.sym_size(1);
    out[0] = grad.dim() == 2 ? dx : dx.view_symint(shape);
  }
  // For second derivatives x stands behind its reversal.
  if (needs & 2) {
    const Tensor columns = recorded(x) ? reversed(x, c10::scalar_to_tensor(factor.toScalar())) : x;
    out[1] = at::mm(rows.t(), as_rows(columns));
  }
  if (needs & 4) out[2] = rows.sum(0);
  return out;
}

struct GradReverseLinearBackward final : Node {
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return linear_backward(grads[0], factor, needs(), weight.unpack(), x.unpack());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    weight.reset_data();
  }

  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(factor);
    args.collect(weight, /*is_output=*/false);
    args.collect(x, /*is_output=*/false);
    args.collect(needs());
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) override {
    saved.before(factor);
    saved.before(weight);
    saved.before(x);
    std::vector<c10::IValue> state{factor, needs(), weight.unpack()};
    if (needs() & 2) state.emplace_back(x.unpack());
    const auto function = [](const variable_list& grads, const std::vector<c10::IValue>& state) {
      return linear_backward(grads[0], state[0], state[1].toInt(), state[2].toTensor(),
                             state.size() > 3 ? state[3].toTensor() : Tensor());
    };
    auto out = compiled_call(*this, grads, saved, function, std::move(state));
    saved.after(factor);
    saved.after(weight);
    saved.after(x);
    return out;
  }

  std::string name() const override { return "GradReverseLinearBackward"; }

  int64_t needs() const {
    int64_t bits = 0;
    for (int i = 0; i < 3; ++i) bits |= int64_t(task_should_compute_output(i)) << i;
    return bits;
  }

  c10::IValue factor = 0.0;
  SavedVariable x, weight;
};

}  // namespace

// grad_reverse(x, scale) -> view of x, or None.
PyObject* grad_reverse(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !THPVariable_CheckExact(args[0]) || foreign_mode()) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(args[0]);
  if (!plain(x) || !recorded(x)) Py_RETURN_NONE;
  Tensor factor = factor_of(args[1], x);
  if (!factor.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(reversed(x, std::move(factor)));
  END_HANDLE_TH_ERRORS
}

// grad_reverse_linear(x, weight, bias or None, scale) -> tensor, or None.
PyObject* grad_reverse_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4 || !THPVariable_CheckExact(args[0]) || !THPVariable_CheckExact(args[1]))
    Py_RETURN_NONE;
  if ((args[2] != Py_None && !THPVariable_CheckExact(args[2])) || foreign_mode()) Py_RETURN_NONE;
  Tensor x = THPVariable_Unpack(args[0]);
  Tensor weight = THPVariable_Unpack(args[1]);
  Tensor bias = args[2] == Py_None ? Tensor() : THPVariable_Unpack(args[2]);
  if (!plain(x) || !recorded(x) || !plain(weight) || (bias.defined() && !plain(bias)))
    Py_RETURN_NONE;
  const auto device_type = x.device().type();
  if (at::autocast::is_autocast_available(device_type) &&
      at::autocast::is_autocast_enabled(device_type)) {
    // What autocast would do to the operands of a linear layer, with its cache of cast weights.
    const auto dtype = at::autocast::get_autocast_dtype(device_type);
    for (Tensor* t : {&x, &weight, &bias}) *t = at::autocast::cached_cast(dtype, *t, device_type);
  }
  if (x.dim() == 0 || weight.dim() != 2 || weight.size(1) != x.size(-1) ||
      weight.scalar_type() != x.scalar_type() || weight.device() != x.device())
    Py_RETURN_NONE;
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != weight.size(0) ||
                         bias.scalar_type() != x.scalar_type() || bias.device() != x.device()))
    Py_RETURN_NONE;
  const auto factor = number_of(args[3]);
  if (!factor) Py_RETURN_NONE;

  auto node = make_node<GradReverseLinearBackward>();
  node->factor = *factor;
  node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
  if (node->should_compute_output(1)) node->x = SavedVariable(x, /*is_output=*/false);
  node->weight = SavedVariable(weight, /*is_output=*/false);
  Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    y = at::linear(x, weight, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
  }
  node->add_input_metadata(y);
  torch::autograd::impl::set_gradient_edge(y, torch::autograd::Edge(std::move(node), 0));
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastda::autograd
