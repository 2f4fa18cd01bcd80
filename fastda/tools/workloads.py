"""What the benchmarks time: each operator as a training uses it, and how people write the same in PyTorch.

Those of single operators stand in `fastda.registry`. `fastda bench`, `python -m benchmarks` and the pytest
suites take all from here.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastda import registry
from fastda.nn import Refiner
from fastda.registry.refiner_conv import block, convolution_flops
from fastda.registry.row import Call, Options, Sizes, Workload
from fastda.tools.steps import DannStep, SimganStep


def _network(x: Tensor, **p: Tensor) -> Tensor:
    """Parameters by their names in `fastda.nn.Refiner`'s state_dict, dots written as underscores."""
    y = F.relu(F.conv2d(x, p["first_weight"], p["first_bias"], padding=1), inplace=True)
    for i in range((len(p) - 4) // 4):
        names = (f"blocks_{i}_{n}" for n in ("conv1_weight", "conv1_bias", "conv2_weight", "conv2_bias"))
        y = block(y, *(p[name] for name in names))
    return F.conv2d(y, p["last_weight"], p["last_bias"])


def _refiner(parameters: Mapping[str, Tensor]) -> Refiner:
    model = Refiner(1, 64, (len(parameters) - 4) // 4, 3)
    named = {name: parameters[name.replace(".", "_")] for name, _ in model.named_parameters()}
    model.load_state_dict(named, assign=True)
    return model


def _network_shapes(options: Options, n: int, blocks: int, h: int, w: int) -> dict[str, Sizes]:
    parameters = Refiner(1, 64, blocks, 3).named_parameters()
    shapes = {name.replace(".", "_"): tuple(p.shape) for name, p in parameters}
    return {"x": (n, 1, h, w), **shapes}


def _contenders(step: type[SimganStep] | type[DannStep]) -> dict[str, Callable[[Sizes], Call]]:
    return {
        "fastda": functools.partial(step, fused=True),
        "eager, usual code": functools.partial(step, usual=True, layout=torch.contiguous_format),
        "eager channels_last": step,
        "torch.compile channels_last": functools.partial(step, compiled=True),
    }


WORKLOADS = (
    *registry.WORKLOADS,
    Workload(
        "refiner",
        "refiner",
        ((1, 4, 35, 55), (32, 4, 35, 55)),
        "SimGAN's whole refiner: images × channels × height × width",
        formulas={"eager": _network},
        modes=("forward", "backward"),
        two_threads=((32, 4, 35, 55),),
        tensors=_network_shapes,
        fused=lambda x, **p: functools.partial(_refiner(p), x),
        flops=lambda n, blocks, h, w: (
            convolution_flops(n, 1, 64, 3, h, w)
            + 2 * blocks * convolution_flops(n, 64, 64, 3, h, w)
            + convolution_flops(n, 64, 1, 1, h, w)
        ),
        shown="{0}×1×{2}×{3}, {1} blocks",
    ),
    Workload(
        "step",
        "simgan_step",
        ((32, 1, 35, 55), (128, 1, 35, 55)),
        "SimGAN: two steps of the refiner, one of the discriminator: images × channels × height × width",
        modes=("step",),
        two_threads=((32, 1, 35, 55),),
        steps=_contenders(SimganStep),
        flops=SimganStep.flops,
    ),
    Workload(
        "step",
        "dann_step",
        ((128, 3, 28, 28),),
        "DANN's digit network: images of both domains × channels × height × width",
        modes=("step",),
        steps=_contenders(DannStep),
        flops=DannStep.flops,
    ),
)


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    workload: str  # Workload.name
    sizes: Sizes
    dtype: str = "float32"
    threads: int = 1
    # "forward", without gradients; "backward", a forward and all gradients; "step", one of a training
    mode: str = "backward"
    layout: str = "contiguous"  # what fastda is given; its peers have both

    @property
    def id(self) -> str:
        sizes = "x".join(map(str, self.sizes))
        layout = "" if self.layout == "contiguous" else f"-{self.layout}"
        return f"{self.workload}-{sizes}-{self.dtype}-{self.mode}-{self.threads}t{layout}"


def cases(
    names: Sequence[str] = (),
    *,
    shapes: Sequence[Sizes] = (),
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (),
    modes: Sequence[str] = (),
    layouts: Sequence[str] = ("contiguous",),
    quick: bool = False,
) -> list[Case]:
    """Cases of the families, operators or workloads in `names` (all), at their own sizes unless `shapes` says
    others. A shape is for the workloads that have as many sizes; ValueError if there are none. `quick` has
    one size of each operator; training steps, which are contiguous float32, only where they are named.
    """
    chosen = [w for w in WORKLOADS if not names or {w.family, w.op, w.name} & set(names)]
    found = []
    for w in chosen:
        own = w.sizes[:1] if quick else w.sizes
        lengths = {len(s) for s in w.sizes}
        sizes = [s for s in shapes if len(s) in lengths] if shapes else own
        if w.steps:
            usual = "float32" in dtypes and "contiguous" in layouts and (not modes or "step" in modes)
            if not usual or (quick and not names):
                continue
            axes = [w.modes, ("float32",), ("contiguous",)]
        else:
            default = w.modes[-1:] if quick else w.modes
            axes = [[m for m in modes if m != "step"] if modes else default, dtypes, layouts]
        for size in sizes:
            both = size in w.two_threads and not quick and (os.cpu_count() or 1) > 1
            for mode, dtype, layout in itertools.product(*axes):
                counts = threads or ((1, 2) if both else (1,))
                found += [Case(w.name, size, dtype, count, mode, layout) for count in counts]
    for s in shapes:
        if not any(len(s) == len(own) for w in chosen for own in w.sizes):
            known = ", ".join(f"{w.name} {'x'.join(map(str, w.sizes[0]))}" for w in chosen)
            raise ValueError(
                f"no operator takes the shape {'x'.join(map(str, s))}; shapes are as in: {known}"
            )
    return found
