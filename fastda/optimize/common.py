"""What the families share: the class that a replaced module gets, reading code, and the proof of equality."""

from __future__ import annotations

import builtins
import dis
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastda import _torch

INTERNALS = frozenset(vars(nn.Module()))


class Refused(Exception):
    """What looked like a candidate is none; the message says why."""


class Optimized(nn.Module):
    """Stands before a module's own class in the bases of its new one. `_plan` is what its forward goes by."""

    _original: type
    _plan: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self) not in reduced[1][:1]:
            return reduced  # the author's own way of pickling
        return _rebuild, (type(self).__bases__[0], self._original, self._plan), *reduced[2:]

    @classmethod
    def subclass(cls, original: Any, plan: Any = None) -> type:
        """The class that takes the place of `original` in a module that is served according to `plan`."""
        kind: Any = cls
        return _subclass(kind, original, plan)

    def served(self) -> list[nn.Module]:
        """The modules whose work this one does."""
        return []

    @classmethod
    def methods(cls, original: type) -> dict[str, Any]:
        """What that class has beside the methods of `cls`."""
        return {}


@functools.cache
def _subclass(kind: Any, original: Any, plan: Any) -> type:
    namespace = {"__module__": original.__module__, "__doc__": original.__doc__}
    namespace |= {"_original": original, "_plan": plan, **kind.methods(original)}
    return type(f"Optimized{original.__name__}", (kind, original), namespace)


def _rebuild(kind: Any, original: Any, plan: Any) -> Any:
    module = original.__new__(original)
    module.__class__ = kind.subclass(original, plan)
    return module


def of_torch(value: Any) -> bool:
    """Whether a module, class or function is torch's or Python's own."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return (name or "").split(".")[0] in ("torch", "builtins", "math", "typing")


def own_functions(cls: type) -> Iterator[tuple[str, Any]]:
    """Name and function of all that the author of a module class wrote, overridden ones included."""
    for base in cls.__mro__:
        if not of_torch(base):
            for name, value in vars(base).items():
                yield name, value.fget if isinstance(value, property) else value


def instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Those of `code` and of the functions defined in it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from instructions(constant)


def is_pure(function: Any, *, may_set_attributes: bool) -> bool:
    """Whether a function reads its arguments and torch alone, and keeps nothing for later.

    Setting attributes is allowed where its first argument is the ctx of an autograd.Function.
    """
    if not isinstance(function, types.FunctionType):
        return False
    scope = function.__globals__
    keeps = {"STORE_GLOBAL", "DELETE_GLOBAL"}
    if not may_set_attributes:
        keeps |= {"STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR"}
    for i in instructions(function.__code__):
        if i.opname in keeps:
            return False
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            known = of_torch(scope[i.argval]) if i.argval in scope else hasattr(builtins, i.argval)
            if not known:
                return False
    return set(function.__code__.co_freevars) <= {"__class__"}


def entry(cls: type) -> str:
    """The method that a call of the module runs: forward, unless the author overrode __call__."""
    return "__call__" if any(name == "__call__" for name, _ in own_functions(cls)) else "forward"


def _reads_itself_alone(cls: type) -> bool:
    """Whether a call reads its arguments, the module and torch alone, and keeps nothing for later."""
    functions: dict[str, list[Any]] = {}
    for name, function in own_functions(cls):
        functions.setdefault(name, []).append(function)
    if functions.keys() & {"__getattr__", "__getattribute__"}:
        return False
    todo = [entry(cls)]
    seen = set(todo)
    while todo:
        for function in functions.get(todo.pop(), []):
            if isinstance(function, types.FunctionType):
                if not is_pure(function, may_set_attributes=False):
                    return False
                todo += {*function.__code__.co_names} - seen
                seen |= {*function.__code__.co_names}
    return True


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    plain = (bool, int, float, str, torch.dtype, type, types.FunctionType, types.BuiltinFunctionType)
    return value is None or isinstance(value, plain)


class Part(NamedTuple):
    """A module or one within it, as it was recognised; what it computes depends on its plain attributes."""

    path: tuple[str, ...]
    kind: Any
    names: tuple[str, ...]
    values: tuple[Any, ...]

    def holds(self, root: nn.Module) -> bool:
        """Whether it is still the same; `root` stands at the beginning of the path."""
        module: Any = root
        for name in self.path:
            module = getattr(module, "_modules", {}).get(name)
        if self.path and (type(module) is not self.kind or _torch.has_hooks(module)):
            return False
        state = vars(module)
        return all(state.get(n) == v for n, v in zip(self.names, self.values, strict=True))


def parts(module: nn.Module) -> tuple[Part, ...]:
    """The module and those in it: with parameters, buffers and arguments, all that a call depends on."""
    found = []
    for path, inner in module.named_modules():
        own = not of_torch(type(inner))
        if own and not _reads_itself_alone(type(inner)):
            raise Refused("its code reads or keeps more than its arguments and parameters")
        if path and _torch.has_hooks(inner):
            raise Refused(f"{path} has hooks")
        # The lists in torch's own layers derive from their other attributes.
        state = {n: v for n, v in vars(inner).items() if n not in INTERNALS and (own or type(v) is not list)}
        for name, value in state.items():
            if not _is_constant(value):
                raise Refused(f"its attribute {name} can change unseen")
        names = tuple(path.split(".")) if path else ()
        found.append(Part(names, type(inner), tuple(state), tuple(state.values())))
    return tuple(found)


def random(*shape: int) -> Tensor:
    """Standard normal float64; the same at every call, and the global generator is left alone."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def prove(
    op: str,
    original: Callable[..., Tensor],
    fast: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    like: Tensor,
) -> None:
    """Raise Refused unless `fast(**tensors)` agrees with `original(**tensors)`, values and gradients.

    Both run in float64 first, where a ReLU's gate does not fall to different sides; then their values are
    compared in the dtype and on the device of `like`, where `fast` may be off from float64 by the tolerance
    of `op`, or by a few times what the original is.
    """
    from fastda import testing

    def in_float64(call: Callable[..., Tensor]) -> dict[str, Tensor]:
        leaves = {n: t.detach().to("cpu", torch.float64).requires_grad_() for n, t in tensors.items()}
        y = call(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), random(*y.shape), materialize_grads=True)
        return {"value": y.detach(), **dict(zip(leaves, grads, strict=True))}

    def as_used(call: Callable[..., Tensor]) -> testing.Error:
        with torch.no_grad():
            return testing.error(call(**{n: t.to(like) for n, t in tensors.items()}), expected["value"])

    try:
        expected, got = in_float64(original), in_float64(fast)
        for what, right in expected.items():
            error = testing.error(got[what], right)
            if not error.within(testing.tolerance(op, what, torch.float64)):
                raise Refused(f"{what} differs: {error}")
        error = as_used(fast)
        if not error.within(testing.tolerance(op, "value", like.dtype)):
            own = as_used(original)
            if not error.within(testing.Tolerance(4 * own.relative_l2, 4 * own.max_over_rms)):
                raise Refused(f"value differs in {like.dtype}: {error}")
    except (RuntimeError, TypeError, ValueError) as problem:
        raise Refused(f"does not run: {problem}") from problem
