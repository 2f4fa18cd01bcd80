"""What the families share: what was found, counted calls, what stands in for a method of a module."""

from __future__ import annotations

import copy
import types
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

_TORCH = str(Path(torch.__file__).parent)


class Change:
    """Something that can be put in its place and taken back.

    It counts its calls since, and those that it served; not those that torch.compile has compiled.
    """

    calls = served = 0

    def count(self, served: bool) -> bool:
        if not is_compiling():
            self.calls += 1
            self.served += served
        return served

    def install(self) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        raise NotImplementedError

    def problem(self) -> str | None:
        """What stands in its place by now, if that is something else."""
        raise NotImplementedError


class Found(NamedTuple):
    """What was found in a module: what takes its place, or only why nothing does."""

    what: str
    change: Change | None = None


class StandIn(Change):
    """Stands in the attributes of one module for a method of its class, which serves what this one does not.

    Copies and pickles of the module have one of their own, DataParallel's replicas have none: what all of
    them are made by is in its attributes, too. The module is referred to weakly, since a cycle would keep its
    memory until the next garbage collection.
    """

    method: str

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> Any:
        if (module := self._module()) is not None:
            return module
        raise RuntimeError("fastda.optimize: called for a module that is gone")

    def install(self) -> None:
        vars(self.module).update(self._attributes())

    def _attributes(self) -> dict[str, Any]:
        return {
            self.method: self,
            "__reduce_ex__": self.reduce,
            "_replicate_for_data_parallel": self.replicate,
        }

    def remove(self) -> None:
        if (module := self._module()) is not None:
            for name in self._attributes():
                vars(module).pop(name, None)

    def problem(self) -> str | None:
        module = self._module()
        there = self if module is None else vars(module).get(self.method)
        return None if there is self else f"{self.method} was changed after fastda.optimize, to {there}"

    def reduce(self, protocol: Any) -> Any:
        """The module's own way of being copied, without this and with another of its kind."""
        own: Any = type(self.module).__reduce_ex__
        make, arguments, state, *rest = own(self.module, protocol)
        state = {name: v for name, v in state.items() if name not in self._attributes()}
        return _made_again, (type(self), make, arguments), state, *rest

    def replicate(self) -> nn.Module:
        """The module's own way of being replicated, without this: a replica has weights of its own."""
        own: Any = type(self.module)._replicate_for_data_parallel
        replica: nn.Module = own(self.module)
        for name in self._attributes():
            vars(replica).pop(name, None)
        return replica

    def __deepcopy__(self, memo: Any) -> StandIn:
        # A module that was parametrized since is copied attribute by attribute.
        return type(self)(copy.deepcopy(self.module, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def __wrapped__(self) -> Any:
        """The method of the module's class: what inspect.signature shows."""
        return getattr(type(self.module), self.method).__get__(self.module)

    @property
    def __code__(self) -> Any:
        """That method's code: where torch.export reads the arguments' names."""
        return getattr(type(self.module), self.method).__code__

    @property
    def __globals__(self) -> Any:
        # torch.jit.script asks for them; torch.fx takes none for an answer.
        raise AttributeError("fastda.optimize: call report.undo() before torch.jit.script")


def _made_again(kind: type[StandIn], make: Any, arguments: Any) -> nn.Module:
    module = make(*arguments)
    kind(module).install()
    return module


def is_torchs(function: Any) -> bool:
    """Whether what was found under a name of torch is torch's own, not somebody's patch."""
    if isinstance(function, types.BuiltinFunctionType):
        return True
    return isinstance(function, types.FunctionType) and function.__code__.co_filename.startswith(_TORCH)


def copies_of_its_own(kind: type, base: type) -> str | None:
    """The method by which a class copies or pickles otherwise than its base, if there is one."""
    names = ("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    return next((n for n in names if getattr(kind, n, None) is not getattr(base, n, None)), None)


# Not served are subclasses: quantized, distributed and fake tensors.
PLAIN = (Tensor, nn.Parameter)


def not_on_cpu(module: nn.Module) -> str | None:
    """Why a module is left because of where its tensors are; None if they are on the CPU or it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "cpu":
            return f"on {tensor.device.type}, where nothing was measured"
    return None


_METHODS: dict[type, dict[str, Any]] = {
    kind: {name: getattr(kind, name) for name in names}
    for kind, names in {
        nn.BatchNorm2d: ("forward", "_check_input_dim"),
        nn.InstanceNorm2d: ("forward", "_check_input_dim", "_get_no_batch_dim", "_apply_instance_norm"),
        nn.ReLU: ("forward",),
        nn.LeakyReLU: ("forward",),
        nn.ReflectionPad2d: ("forward",),
        nn.Conv2d: ("forward",),
        nn.Sequential: ("forward", "__iter__"),
        nn.Module: ("__call__", "_call_impl", "_wrapped_call_impl"),
    }.items()
}


def as_torch_has_it(module: Any, kind: type) -> bool:
    """Whether what torch's code calls of `kind` for this module is still torch's own; its `forward` apart."""
    attributes = vars(module)
    return all(
        getattr(type(module), name) is method and (name == "forward" or name not in attributes)
        for name, method in _METHODS[kind].items()
    )


def is_alone(module: Any) -> bool:
    """Whether a call of the module calls its `forward`, and nothing sees its argument and result."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or not as_torch_has_it(module, nn.Module)
    )
