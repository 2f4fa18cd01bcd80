"""Neighbours in an `nn.Sequential` that one operator serves: its code is the list of its modules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from fastda import _torch
from fastda.optimize import convolution, norm
from fastda.optimize.stand_in import PLAIN, Found, StandIn, as_torch_has_it

_Pair = tuple[str, tuple[type, ...], Callable[[Any, Any, Any], Any]]
_ACTIVATED: _Pair = ("normalisation + activation", (nn.ReLU, nn.LeakyReLU), norm.pair)
# By the first module: what the pair is, what the second may be, and what both make of an input; None, with
# nothing done, where each is to be called.
_PAIRS: dict[type, _Pair] = {
    nn.BatchNorm2d: _ACTIVATED,
    nn.InstanceNorm2d: _ACTIVATED,
    nn.ReflectionPad2d: ("reflection padding + convolution", (nn.Conv2d,), convolution.pair),
}


def find(module: nn.Module) -> Iterator[Found]:
    """The stand-in of a Sequential that holds a pair."""
    if type(module) is nn.Sequential and "forward" not in vars(module):
        kinds = [type(child) for child in module]
        pairs = [_PAIRS[a] for a, b in itertools.pairwise(kinds) if a in _PAIRS and b in _PAIRS[a][1]]
        if pairs:
            names = ", ".join(dict.fromkeys(name for name, *_ in pairs))
            yield Found(f"{names} → one operator, where the larger is served", Sequence(module))


class Sequence(StandIn):
    """`nn.Sequential.forward`, with some of two neighbours as one."""

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
        before: Any = None
        for module in sequence:
            if before is not None:
                _, seconds, together = _PAIRS[type(before)]
                if type(module) in seconds:
                    y = together(before, module, input)
                    if self.count(y is not None):
                        input, before = y, None
                        continue
                input = before(input)
                before = None
            if type(module) in _PAIRS:
                before = module
            else:
                input = module(input)
        return input if before is None else before(input)
