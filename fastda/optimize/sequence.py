"""Neighbours in an `nn.Sequential` that one operator serves: its code is the list of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from fastda import _torch
from fastda.optimize import convolution, norm
from fastda.optimize.stand_in import PLAIN, Found, StandIn, as_torch_has_it

_Run = tuple[str, tuple[tuple[type, ...], ...], Callable[..., Any]]
_ACTIVATED: _Run = ("normalisation + activation", ((nn.ReLU, nn.LeakyReLU),), norm.pair)
_PADDED: _Run = ("reflection padding + convolution", ((nn.Conv2d,),), convolution.pair)
_POOLED = "convolution + max-pooling"
# By the first module: what the run is, what the others may be, and what all make of an input; None, with
# nothing done, where each is to be called.
_RUNS: dict[type, tuple[_Run, ...]] = {
    nn.BatchNorm2d: (_ACTIVATED,),
    nn.InstanceNorm2d: (_ACTIVATED,),
    nn.ReflectionPad2d: (_PADDED,),
    nn.Conv2d: (
        (_POOLED, ((nn.ReLU,), (nn.MaxPool2d,)), convolution.pooled),
        (_POOLED, ((nn.MaxPool2d,),), convolution.pooled),
    ),
}


def _run_at(modules: list[Any], i: int) -> _Run | None:
    """The run that begins at module i, judged by types."""
    for run in _RUNS.get(type(modules[i]), ()):
        others = modules[i + 1 : i + 1 + len(run[1])]
        if len(others) == len(run[1]) and all(type(m) in k for m, k in zip(others, run[1], strict=True)):
            return run
    return None


def find(module: nn.Module) -> Iterator[Found]:
    """The stand-in of a Sequential that holds a pair."""
    if type(module) is nn.Sequential and "forward" not in vars(module):
        modules = list(module)
        runs = [
            run
            for i, first in enumerate(modules)
            if (run := _run_at(modules, i))
            and (type(first) is not nn.Conv2d or convolution.can_pool(first, modules[i + len(run[1])]))
        ]
        if runs:
            names = ", ".join(dict.fromkeys(name for name, *_ in runs))
            yield Found(f"{names} → one operator, where the larger is served", Sequence(module))


class Sequence(StandIn):
    """`nn.Sequential.forward`, with some neighbours as one."""

    method = "forward"

    def __call__(self, input: Any) -> Any:
        sequence = self.module
        if (
            type(input) not in PLAIN
            or is_compiling()
            or torch.jit.is_tracing()
            or _torch.global_module_hooks()
            or not as_torch_has_it(sequence, nn.Sequential)
        ):
            return type(sequence).forward(sequence, input)
        modules, i = list(sequence), 0
        while i < len(modules):
            if run := _run_at(modules, i):
                _, others, together = run
                y = together(*modules[i : i + 1 + len(others)], input)
                if self.count(y is not None):
                    input = y
                    i += 1 + len(others)
                    continue
            input = modules[i](input)
            i += 1
        return input
