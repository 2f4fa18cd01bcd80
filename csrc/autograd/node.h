// What the nodes of torch's C++ autograd graph share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastda::autograd {

using at::Tensor;
using c10::DispatchKey;
using torch::autograd::InputMetadata;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// The functions of the module, see module.cpp.
PyObject* grad_reverse(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* grad_reverse_linear(PyObject*, PyObject* const* args, Py_ssize_t count);

// Tracing, transforms and tensor modes see every operator; they have to go the general way.
inline const c10::DispatchKeySet kForeign(
    {DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::PythonDispatcher,
     DispatchKey::Functionalize, DispatchKey::FuncTorchDynamicLayerFrontMode,
     DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::FuncTorchGradWrapper,
     DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchVmapMode, DispatchKey::Batched,
     DispatchKey::VmapMode, DispatchKey::Tracer, DispatchKey::Conjugate, DispatchKey::ZeroTensor});

inline bool foreign_mode() {
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(kForeign);
}

// A plain strided tensor of a real floating dtype.
inline bool plain(const Tensor& t) {
  return t.defined() && t.layout() == c10::kStrided && at::isFloatingType(t.scalar_type()) &&
         !t.key_set().has_any(kForeign) && !t.is_inference() && !t._fw_grad(0).defined();
}

// Whether a backward pass may use raw kernels and write into its own memory: no graph of it is
// recorded, and no vmap over several gradients, mode or tensor subclass is watching.
inline bool unobserved(const Tensor& grad) {
  return !c10::GradMode::is_enabled() && !foreign_mode() && plain(grad);
}

// Compiled autograd puts into its graph a call of `function` on the node's gradients and its state.
inline variable_list compiled_call(const Node& node, const variable_list& grads,
                                   SwapSavedVariables& saved,
                                   torch::dynamo::autograd::functional_apply_t function,
                                   std::vector<c10::IValue> state) {
  using namespace torch::dynamo::autograd;
  std::vector<at::TypePtr> types;
  for (const auto& value : state)
    types.push_back(value.isTensor() ? at::TypePtr(at::TensorType::get()) : value.type());
  PyObject* compiler = saved.get_py_compiler();
  const auto& interface = getPyCompilerInterface();
  const auto name =
      interface->bind_function(compiler, node.name(), std::move(function), std::move(types),
                               /*is_custom_function=*/true);
  return interface->call_function(compiler, "apply_functional", name, grads, state,
                                  IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(
                                      get_input_metadata(node.next_edges())));
}

// torch keeps nodes in std::shared_ptr up to some version, in c10::intrusive_ptr later.
template <typename T, typename... Args>
auto make_node(Args&&... args) {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::shared_ptr<T>(new T(std::forward<Args>(args)...),
                              [](T* node) { deleteNode(node); });
  else
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
}

}  // namespace fastda::autograd
