// The losses as nodes of torch's C++ autograd graph: any operator whose results are a value, what
// is reported beside it, and the gradients of its first tensors.
//
// What this saves over the Python autograd.Function of fastda/ops/patch_loss.py, which does the
// same: half of what a call on a small map costs.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <mutex>
#include <string>

#include "autograd/node.h"

namespace fastda::autograd {
namespace {

constexpr size_t most_tensors = 4;

struct Operator {
  std::string name;
  size_t count;  // of the tensors that receive gradients, its first
  size_t tensors;
  std::vector<c10::IValue> options;

  c10::OperatorHandle handle() const {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("fastda::" + name).c_str(), "");
  }

  // All results; the last `count` are gradients, undefined where not needed.
  template <typename Tensors>
  std::vector<Tensor> run(const Tensors& arguments,
                          const std::array<bool, most_tensors>& needs) const {
    const auto op = handle();
    const size_t flags = op.schema().arguments().size() - tensors - options.size();
    torch::jit::Stack stack;
    stack.reserve(op.schema().arguments().size());
    for (size_t i = 0; i < tensors; ++i)
      stack.emplace_back(arguments[i].defined() ? c10::IValue(arguments[i]) : c10::IValue());
    for (const auto& option : options) stack.push_back(option);
    for (size_t i = 0; i < flags; ++i) {
      bool need = needs[i];
      // The last flag answers for the tensors that have none of their own.
      for (size_t j = i + 1; i + 1 == flags && j < count; ++j) need |= needs[j];
      stack.emplace_back(need);
    }
    {
      at::AutoDispatchBelowADInplaceOrView below;
      op.callBoxed(stack);
    }
    std::vector<Tensor> results;
    results.reserve(stack.size());
    for (auto& value : stack) results.push_back(std::move(value).toTensor());
    for (size_t i = 0; i < count; ++i)
      if (!needs[i]) results[results.size() - count + i] = Tensor();
    if (count == 4 && needs[2]) {
      // The head's filter: strides as DistributedDataParallel's buckets have them.
      Tensor& grad = results[results.size() - count + 2];
      if (grad.strides() != arguments[2].strides())
        grad = at::empty_like(arguments[2], grad.options()).copy_(grad);
    }
    return results;
  }
};

PyObject* to_python(const c10::IValue& option) {
  if (option.isBool()) return PyBool_FromLong(option.toBool());
  return option.isInt() ? PyLong_FromLongLong(option.toInt())
                        : PyFloat_FromDouble(option.toDouble());
}

c10::IValue from_python(PyObject* option) {
  if (PyBool_Check(option)) return option == Py_True;
  if (PyLong_Check(option)) return int64_t(PyLong_AsLongLong(option));
  return PyFloat_AsDouble(option);
}

void scale_(std::vector<Tensor>& grads, const Tensor& by) {
  if (by.dim() == 0 && by.is_cpu()) {
    // Without the dispatcher for the one factor that is usual.
    if (by.scalar_type() == at::kFloat && *by.const_data_ptr<float>() == 1.0f) return;
    if (by.scalar_type() == at::kDouble && *by.const_data_ptr<double>() == 1.0) return;
  }
  for (Tensor& g : grads)
    if (g.defined()) g.mul_(by);
}

struct LossBackward final : Node {
  variable_list apply(variable_list&& grads) override {
    const Tensor& grad = grads[0];
    if (!grad.defined()) return variable_list(op.count);
    if (c10::GradMode::is_enabled()) return differentiable(grad);
    variable_list own = take();
    if (unobserved(grad)) {
      scale_(own, grad);
    } else {
      for (Tensor& g : own)
        if (g.defined()) g = g.mul(grad);
    }
    return own;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
    held.clear();
  }

  void compiled_args(CompiledNodeArgs& args) const override {
    if (held.empty()) held = compute();
    for (const Tensor& g : held) args.collect(g);
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    for (Tensor& g : held) swap.before(g);
    std::vector<c10::IValue> state{int64_t(op.count)};
    for (size_t i = 0; i < op.count; ++i) {
      if (!held[i].defined()) continue;
      state.emplace_back(int64_t(i));
      state.emplace_back(held[i]);
    }
    const auto function = [](const variable_list& grads, const std::vector<c10::IValue>& state) {
      variable_list out(size_t(state[0].toInt()));
      for (size_t i = 1; i < state.size() && grads[0].defined(); i += 2)
        out[size_t(state[i].toInt())] = state[i + 1].toTensor().mul(grads[0]);
      return out;
    };
    auto out = compiled_call(*this, grads, swap, function, std::move(state));
    for (Tensor& g : held) swap.after(g);
    return out;
  }

  std::string name() const override { return "LossBackward"; }

  std::array<bool, most_tensors> needs() const {
    std::array<bool, most_tensors> out{};
    for (size_t i = 0; i < op.count; ++i) out[i] = task_should_compute_output(i);
    return out;
  }

  std::vector<Tensor> arguments() const {
    std::vector<Tensor> out;
    for (const auto& variable : saved) out.push_back(variable.unpack());
    return out;
  }

  variable_list compute() const {
    auto results = op.run(arguments(), needs());
    return {results.end() - std::ptrdiff_t(op.count), results.end()};
  }

  // Handed over, not kept: whoever receives a gradient may change it in place. A second backward
  // through a retained graph computes it again.
  variable_list take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return held.empty() ? compute() : std::exchange(held, {});
  }

  // For second derivatives: the gradients of the operator's reference, by Python.
  variable_list differentiable(const Tensor& grad) {
    std::vector<Tensor> tensors;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tensors = arguments();
    }
    const auto needed = needs();
    pybind11::gil_scoped_acquire gil;
    const auto checked = [](PyObject* object) {
      if (object == nullptr) throw python_error();
      return THPObjectPtr(object);
    };
    const auto tuple_of = [&](size_t size, auto&& item) {
      THPObjectPtr out = checked(PyTuple_New(Py_ssize_t(size)));
      for (size_t i = 0; i < size; ++i) PyTuple_SET_ITEM(out.get(), i, checked(item(i)).release());
      return out;
    };
    THPObjectPtr module = checked(PyImport_ImportModule("fastda.ops.patch_loss"));
    THPObjectPtr function = checked(PyObject_GetAttrString(module, "differentiable_gradients"));
    THPObjectPtr operator_name = checked(PyUnicode_FromString(op.name.c_str()));
    THPObjectPtr options =
        tuple_of(op.options.size(), [&](size_t i) { return to_python(op.options[i]); });
    THPObjectPtr arguments =
        tuple_of(op.tensors, [&](size_t i) { return THPVariable_Wrap(tensors[i]); });
    THPObjectPtr wanted =
        tuple_of(op.tensors, [&](size_t i) { return PyBool_FromLong(i < op.count && needed[i]); });
    THPObjectPtr dy = checked(THPVariable_Wrap(grad));
    THPObjectPtr result =
        checked(PyObject_CallFunctionObjArgs(function, operator_name.get(), options.get(),
                                             arguments.get(), wanted.get(), dy.get(), nullptr));
    variable_list out(op.count);
    for (size_t i = 0; i < op.count; ++i) {
      PyObject* item = PyList_GetItem(result, Py_ssize_t(i));
      if (item == nullptr) throw python_error();
      if (item != Py_None) out[i] = THPVariable_Unpack(item);
    }
    return out;
  }

  Operator op;
  std::vector<SavedVariable> saved;
  mutable variable_list held;
};

// The operator's results without gradients; the node that gives those is on the first.
std::vector<Tensor> recorded_call(Operator op, const std::array<Tensor, most_tensors>& tensors) {
  auto node = make_node<LossBackward>();
  std::array<bool, most_tensors> needs{};
  torch::autograd::edge_list edges;
  for (size_t i = 0; i < op.count; ++i) {
    needs[i] = tensors[i].defined() && tensors[i].requires_grad();
    edges.push_back(needs[i] ? torch::autograd::impl::gradient_edge(tensors[i])
                             : torch::autograd::Edge());
  }
  node->set_next_edges(std::move(edges));
  node->saved.reserve(op.tensors);
  for (size_t i = 0; i < op.tensors; ++i) node->saved.emplace_back(tensors[i], /*is_output=*/false);
  node->op = std::move(op);
  std::vector<Tensor> results;
  {
    pybind11::gil_scoped_release no_gil;
    results = node->op.run(tensors, needs);
  }
  const auto grads = results.end() - std::ptrdiff_t(node->op.count);
  node->held.assign(std::make_move_iterator(grads), std::make_move_iterator(results.end()));
  results.erase(grads, results.end());
  node->add_input_metadata(results[0]);
  torch::autograd::impl::set_gradient_edge(results[0], torch::autograd::Edge(std::move(node), 0));
  return results;
}

PyObject* as_tuple(std::vector<Tensor> results) {
  THPObjectPtr out(PyTuple_New(Py_ssize_t(results.size())));
  if (!out) throw python_error();
  for (size_t i = 0; i < results.size(); ++i)
    PyTuple_SET_ITEM(out.get(), i, THPVariable_Wrap(std::move(results[i])));
  return out.release();
}

// Position of the string in `names`, or -1.
template <size_t N>
int64_t index_of(PyObject* string, const char* const (&names)[N]) {
  if (PyUnicode_Check(string))
    for (size_t i = 0; i < N; ++i)
      if (PyUnicode_CompareWithASCIIString(string, names[i]) == 0) return int64_t(i);
  return -1;
}

// As fastda/ops/patch_loss.py numbers them.
constexpr const char* kinds[] = {"softmax", "bce", "lsgan", "hinge", "wgan"};
constexpr const char* reductions[] = {"mean", "sum", "batchmean"};

// A pair of tensors that the CPU's kernels take as they are, at least one of them recorded.
bool fit(PyObject* const* args, std::array<Tensor, most_tensors>& tensors) {
  if (foreign_mode() || !c10::GradMode::is_enabled()) return false;
  for (int i = 0; i < 2; ++i) {
    if (!THPVariable_CheckExact(args[i])) return false;
    tensors[i] = THPVariable_Unpack(args[i]);
    const auto type = tensors[i].scalar_type();
    if (!plain(tensors[i]) || !tensors[i].is_cpu() || type != tensors[0].scalar_type() ||
        (type != at::kFloat && type != at::kDouble && type != at::kHalf && type != at::kBFloat16))
      return false;
  }
  return tensors[0].requires_grad() || tensors[1].requires_grad();
}

}  // namespace

// loss(operator, count, options, *tensors or None) -> results without gradients, or None. Grad mode
// is on.
PyObject* loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Operator op{PyUnicode_AsUTF8(args[0]), size_t(PyLong_AsLong(args[1])), size_t(count) - 3, {}};
  if (op.tensors > most_tensors || foreign_mode()) Py_RETURN_NONE;
  std::array<Tensor, most_tensors> tensors;
  for (size_t i = 0; i < op.tensors; ++i) {
    PyObject* const t = args[3 + i];
    if (t == Py_None) continue;
    if (!THPVariable_CheckExact(t)) Py_RETURN_NONE;
    tensors[i] = THPVariable_Unpack(t);
    if (!plain(tensors[i])) Py_RETURN_NONE;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[2]); ++i)
    op.options.push_back(from_python(PyTuple_GET_ITEM(args[2], i)));
  return as_tuple(recorded_call(std::move(op), tensors));
  END_HANDLE_TH_ERRORS
}

// patch_discriminator_loss(real, fake, kind, reduction) -> loss and accuracies, or None.
PyObject* patch_discriminator_loss(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  std::array<Tensor, most_tensors> tensors;
  const int64_t kind = index_of(args[2], kinds), reduction = index_of(args[3], reductions);
  if (kind < 0 || reduction < 0 || !fit(args, tensors)) Py_RETURN_NONE;
  for (int i = 0; i < 2; ++i)
    if (tensors[i].dim() != 4 || tensors[i].size(1) != (kind == 0 ? 2 : 1)) Py_RETURN_NONE;
  return as_tuple(
      recorded_call({"patch_discriminator_loss", 2, 4, {kind, reduction, 0.0}}, tensors));
  END_HANDLE_TH_ERRORS
}

// self_regularization(refined, synthetic, scale, reduction) -> loss, or None.
PyObject* self_regularization(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  std::array<Tensor, most_tensors> tensors;
  const int64_t reduction = index_of(args[3], reductions);
  if (reduction < 0 || !PyFloat_Check(args[2]) || !fit(args, tensors) ||
      tensors[0].sizes() != tensors[1].sizes())
    Py_RETURN_NONE;
  auto results = recorded_call(
      {"self_regularization", 2, 3, {PyFloat_AS_DOUBLE(args[2]), reduction}}, tensors);
  return THPVariable_Wrap(std::move(results[0]));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastda::autograd
