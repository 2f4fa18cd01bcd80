"""What a row of the registry is made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Sizes = tuple[int, ...]
Options = Mapping[str, Any]
Draw = Callable[..., Tensor]
Formula = Callable[..., Any]
Call = Callable[[], object]


class Tolerance(NamedTuple):
    """Bounds on an error: `relative_l2` = ‖a − e‖₂ / ‖e‖₂ and `max_over_rms` = max|a − e| / rms(e)."""

    relative_l2: float
    max_over_rms: float


Tolerances = Mapping[str, Mapping[torch.dtype, Tolerance]]
# Products of matrices: what rounding and the order of summation cost PyTorch itself.
LINEAR: dict[str, dict[torch.dtype, Tolerance]] = {
    what: {
        F64: Tolerance(2e-15, 2e-14),
        F32: Tolerance(6e-7, 6e-6),
        BF16: Tolerance(8e-3, 8e-2),
        F16: Tolerance(1e-3, 1e-2),
    }
    for what in ("value", "grad")
}


@dataclass(frozen=True, eq=False)
class Operator:
    """How to call one public function, found by name in `fastda` and in `fastda.reference`, and its judge."""

    name: str
    # (options, *sizes) -> shape of every tensor argument that receives a gradient.
    tensors: Callable[..., dict[str, Sizes]]
    sizes: Sequence[Sizes]
    # Sizes that make several chunks of work, and the options to go with them.
    large: Sequence[Sizes]
    # By what is compared ("value", or the gradient's name; "grad" stands for every one not named) and dtype.
    tolerances: Tolerances
    # Its raw operators by name, and for a compiler what each of them returns, without computing it.
    raw: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    dtypes: Sequence[torch.dtype] = (F32, F64, BF16, F16)
    # Further arguments. A callable value draws a constant tensor: (draw, *sizes) -> Tensor. The value of an
    # option that `tensors` names too only says that this tensor is there.
    options: Sequence[Options] = ({},)
    large_options: Options | None = None
    # Moves the float64 arguments off points where a gradient jumps, such as the edge of a ReLU.
    settle: Callable[[dict[str, Any], float], None] | None = None
    # Results that are sums in which terms may cancel: (options, *sizes) -> the size of those terms, by name.
    magnitudes: Callable[..., dict[str, float]] = lambda options, *sizes: {}


@dataclass(frozen=True, eq=False)
class Workload:
    """An operator as a training uses it."""

    family: str
    op: str
    sizes: Sequence[Sizes]  # the first for --quick; read as by the operator's row
    about: str  # what it is and what its sizes are as `shown`, for who reads the results
    options: Options = field(default_factory=dict)
    # Ways to write it in plain PyTorch; "eager" is the leanest known, and what torch.compile gets.
    formulas: Mapping[str, Formula] = field(default_factory=dict)
    modes: Sequence[str] = ("backward",)
    two_threads: Sequence[Sizes] = ()  # sizes that are measured on two threads as well
    # Arguments that receive a gradient; None: all tensors that the operator differentiates.
    grads: Sequence[str] | None = None
    # What stands around the operator, for all contenders alike.
    around: Callable[[Formula], Formula] = lambda function: function
    # The same work without the operator; `added`: what contenders add to it is compared as well.
    floor: Formula | None = None
    added: bool = False
    # Floating-point operations of the forward pass as its definition counts them.
    flops: Callable[..., float] | None = None
    # For what is no operator: the shapes of its tensors, and what makes the call of `fastda` from them.
    tensors: Callable[..., dict[str, Sizes]] | None = None
    fused: Callable[..., Call] | None = None
    # Format of the sizes for readers, where they are not just joined by ×.
    shown: str = ""
    # For a whole training step, in place of formulas: what makes each contender's step from the sizes.
    steps: Mapping[str, Callable[[Sizes], Call]] = field(default_factory=dict)
    variant: str = ""  # tells workloads of one operator apart, where the kind of a loss does not

    @property
    def name(self) -> str:
        kind = self.options.get("kind", self.variant)
        return f"{self.op}.{kind}" if kind else self.op

    def show(self, sizes: Sizes) -> str:
        return self.shown.format(*sizes) if self.shown else "×".join(map(str, sizes))


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of the given options."""
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]


def clear_of_zero(activations: Tensor, margin: float = 1e-3) -> Tensor:
    """A bias per channel (dim 1) that keeps every value of `activations` [N, C, …] `margin` away from zero.

    A kernel that rounds differently may put an activation on the other side of a ReLU's edge; its gradient is
    then right and still far from the reference's. Zero goes to the most central gap that is wide enough, or
    below all values if none is.
    """
    values = activations.transpose(0, 1).flatten(1).sort(dim=1).values  # [C, n]
    n = values.shape[1]
    values = torch.cat([values[:, :1] - 4 * margin, values], dim=1)
    wide = values.diff(dim=1) >= 2 * margin
    off_centre = (torch.arange(n, device=values.device) - n / 2).abs()
    gap = torch.where(wide, off_centre, torch.inf).argmin(dim=1, keepdim=True)
    return -(values.gather(1, gap) + values.gather(1, gap + 1)).squeeze(1) / 2
