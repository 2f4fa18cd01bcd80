"""Gradient reversal in a model that exists: wherever code refers to a reversing `autograd.Function`.

The author's code stays as it is, with its schedules, attributes and signatures. A module that uses such a
Function gets copies of the methods in question, in which the Function's name leads to a stand-in for it.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastda.ops.grad_reverse import grad_reverse
from fastda.optimize.common import (
    INTERNALS,
    Optimized,
    instructions,
    is_pure,
    of_torch,
    own_functions,
    random,
)
from fastda.optimize.report import Entry, Report

_SCALES = (0.0, 1.0, 0.1, 0.3141, -2.5)


def serve(report: Report, path: str, module: nn.Module) -> None:
    """Exchange the reversing Functions that the module's methods and attributes refer to."""
    original = type(module)
    search = _Search()
    methods = search.in_class(original)
    attributes = {n: search.stand_in(v, depth=0) for n, v in vars(module).items() if n not in INTERNALS}
    report.left += [Entry(path, original.__name__, reason) for reason in dict.fromkeys(search.refused)]
    if not search.found:
        return
    names = ", ".join(sorted({reversal.function.__name__ for reversal in search.found}))
    what = f"gradient reversal: {names} → grad_reverse"
    if any(reversal.copies for reversal in search.found):
        what += ", a view where there was a copy"
    report.replaced.append(Entry(path, original.__name__, what))
    for name, stand_in in attributes.items():
        if stand_in is not None:
            report.change(path, module, name, stand_in)
    if methods:
        report.change(path, module, "__class__", _Reversing.subclass(original))


class Reversal:
    """Stands in for a reversing Function; what is out of the ordinary goes to that Function as before."""

    def __init__(self, function: type[Function], takes_scale: bool, copies: bool) -> None:
        self.function, self.takes_scale, self.copies = function, takes_scale, copies

    def apply(self, x: Any, *arguments: Any) -> Any:
        scale = arguments[0] if arguments else 1.0
        # Where no gradient is recorded, what grad_reverse returns could be changed in place and x with it.
        if (
            len(arguments) <= self.takes_scale
            and isinstance(x, Tensor)
            and x.requires_grad
            and torch.is_grad_enabled()
            and x.is_floating_point()
            and x.layout == torch.strided
        ):
            if isinstance(scale, Tensor):
                if scale.numel() == 1 and not scale.requires_grad and not scale.is_complex():
                    scale = scale.reshape(())
                    return grad_reverse(x, scale if scale.is_floating_point() else scale.to(x.dtype))
            elif isinstance(scale, (float, int)):
                return grad_reverse(x, scale)
        return self.function.apply(x, *arguments)

    __call__ = apply  # stands in for the Function's `apply` itself, too

    def __reduce__(self) -> Any:
        return _reversal, (self.function,)


@functools.cache
def _reversal(function: type[Function]) -> Reversal | str | None:
    """A reversing Function's stand-in; for one that resembles it, how it differs; None for any other."""
    forward, backward, setup = (
        getattr(vars(function).get(name), "__func__", None)
        for name in ("forward", "backward", "setup_context")
    )
    if not all(is_pure(f, may_set_attributes=True) for f in (forward, backward, setup or forward)):
        return None
    assert forward is not None
    takes_scale = forward.__code__.co_argcount - (setup is None) > 1  # beside ctx and x
    calls: list[tuple[Any, ...]] = [(s,) for s in _SCALES] if takes_scale else [()]
    if takes_scale and _factor(function, *calls[0]) is None:
        calls = [(torch.tensor(s, dtype=torch.float64),) for s in _SCALES]
    found = [f for f in (_factor(function, *call) for call in calls) if f is not None]
    if len(found) < len(calls):
        return None
    factors = [factor for factor, _ in found]
    wanted = [-s for s in _SCALES] if takes_scale else [-1.0]
    if all(abs(f - w) <= 1e-14 * abs(w) for f, w in zip(factors, wanted, strict=True)):
        return Reversal(function, takes_scale, any(copies for _, copies in found))
    if factors[0] >= 0 or len(set(factors)) > 1:
        return None
    return f"{function.__name__} multiplies the gradient by {factors[0]:g} whatever its scale"


def _factor(function: type[Function], *arguments: Any) -> tuple[float, bool] | None:
    """What `function` multiplies the gradient by and whether it copies; None if it is not the identity."""
    x, grad = random(3, 5).requires_grad_(), random(5, 3).t()
    try:
        y = function.apply(x, *arguments)
        (d_x,) = torch.autograd.grad(y, x, grad)
        factor = (d_x / grad).mean().item()
        if torch.equal(y, x) and torch.allclose(d_x, factor * grad, rtol=1e-14, atol=0):
            return factor, y.data_ptr() != x.data_ptr()
    except Exception:  # whatever foreign code raises: it is not what is looked for
        pass
    return None


class _Search:
    """Looks for reversing Functions in what code refers to: by class, by `apply`, through a function."""

    def __init__(self) -> None:
        self.found: list[Reversal] = []
        self.refused: list[str] = []

    def in_class(self, cls: type) -> dict[str, types.FunctionType]:
        """The methods that use one, rewritten."""
        methods: dict[str, types.FunctionType | None] = {}
        for name, function in own_functions(cls):
            if name not in methods and isinstance(function, types.FunctionType):
                methods[name] = self.rewritten(function)
        return {name: method for name, method in methods.items() if method is not None}

    def stand_in(self, value: Any, depth: int = 3) -> Any:
        """What to put in the place of `value`; None where it has nothing to do with a reversal."""
        if isinstance(value, (types.MethodType, types.BuiltinMethodType)) and value.__name__ == "apply":
            value = value.__self__
        if isinstance(value, type) and issubclass(value, Function):
            reversal = _reversal(value)
            if isinstance(reversal, Reversal):
                self.found.append(reversal)
                return reversal
            if reversal is not None:
                self.refused.append(reversal)
        elif isinstance(value, types.FunctionType) and depth and not of_torch(value):
            return self.rewritten(value, depth - 1)
        return None

    def rewritten(self, function: types.FunctionType, depth: int = 3) -> types.FunctionType | None:
        """A copy of `function` that refers to stand-ins; None where it refers to no reversal."""
        uses: dict[str, set[str]] = {}
        for i in instructions(function.__code__):
            uses.setdefault(i.argval if isinstance(i.argval, str) else "", set()).add(i.opname)
        names, cells = {}, {}
        for name, opnames in uses.items():
            # The table of names is one: a name that also stands for an attribute cannot be exchanged.
            if opnames == {"LOAD_GLOBAL"} and name in function.__globals__:
                names[name] = self.stand_in(function.__globals__[name], depth)
        for position, cell in enumerate(function.__closure__ or ()):
            with contextlib.suppress(ValueError):  # a cell without content
                cells[position] = self.stand_in(cell.cell_contents, depth)
        found = [tuple((k, v) for k, v in d.items() if v is not None) for d in (names, cells)]
        return _copied(function, *found) if any(found) else None


@functools.cache
def _copied(
    function: types.FunctionType, names: tuple[tuple[str, Any], ...], cells: tuple[tuple[int, Any], ...]
) -> types.FunctionType:
    """`function` with other objects behind some of its global names and in some of its cells.

    The globals remain those of its module, so that the copy sees what changes there. What is exchanged is put
    there too, under a name of its own, and the copy's code reads that name.
    """
    scope, own_names = function.__globals__, {}
    for name, value in names:
        own_names[name] = f"_fastda_{name}"
        while scope.setdefault(own_names[name], value) is not value:
            own_names[name] += "_"
    closure = list(function.__closure__ or ())
    for i, value in cells:
        closure[i] = types.CellType(value)
    code = function.__code__.replace(co_names=tuple(own_names.get(n, n) for n in function.__code__.co_names))
    new = types.FunctionType(code, scope, function.__name__, function.__defaults__, tuple(closure))
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    del new.__wrapped__  # type: ignore[attr-defined]
    return new


class _Reversing(Optimized):
    """A module whose methods use stand-ins for reversing Functions."""

    @classmethod
    def methods(cls, original: type) -> dict[str, Any]:
        return dict(_Search().in_class(original))
