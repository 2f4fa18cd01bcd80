"""What the benchmarks time: each operator as a training uses it, and how people write the same in PyTorch.

A new benchmark is one entry of WORKLOADS; `fastda bench`, `python -m benchmarks` and the pytest suites take
it from there.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastda.nn import Refiner
from fastda.steps import DannStep, SimganStep, reverse

Call = Callable[[], object]
Sizes = tuple[int, ...]
Options = Mapping[str, Any]
Formula = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Workload:
    """An operator as a training uses it."""

    family: str
    op: str
    sizes: Sequence[Sizes]  # the first for --quick; read as by the operator's entry in verify.OPERATORS
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

    @property
    def name(self) -> str:
        kind = self.options.get("kind")
        return f"{self.op}.{kind}" if kind else self.op

    def show(self, sizes: Sizes) -> str:
        return self.shown.format(*sizes) if self.shown else "×".join(map(str, sizes))


def _reversed_linear(x: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:
    return F.linear(reverse(x, scale), weight, bias)


def _softmax_as_written(
    real_logits: Tensor, fake_logits: Tensor, kind: str, return_accuracy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, m, size = len(real_logits), len(fake_logits), real_logits.shape[2:]
    real = torch.zeros((n, *size), dtype=torch.long, device=real_logits.device)
    fake = torch.ones((m, *size), dtype=torch.long, device=fake_logits.device)
    loss = F.cross_entropy(real_logits, real) + F.cross_entropy(fake_logits, fake)
    right = [(x.argmax(1) == t).float().mean() for x, t in ((real_logits, real), (fake_logits, fake))]
    return loss, right[0], right[1]


def _discriminator(
    real_logits: Tensor, fake_logits: Tensor, kind: str, return_accuracy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if kind == "softmax":  # the cross-entropy of two classes is the softplus of their difference
        real, fake = (x[:, 0] - x[:, 1] for x in (real_logits, fake_logits))
    else:
        real, fake = real_logits, fake_logits
    edge = 0.0
    if kind in ("softmax", "bce"):
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
    elif kind == "lsgan":
        loss, edge = (real - 1).square().mean() + fake.square().mean(), 0.5
    else:
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return loss, (real > edge).float().mean(), (fake < edge).float().mean()


def _bce_as_written(
    real_logits: Tensor, fake_logits: Tensor, kind: str, return_accuracy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    loss = loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return loss, (real_logits > 0).float().mean(), (fake_logits < 0).float().mean()


def _generator(fake_logits: Tensor, kind: str) -> Tensor:
    return F.softplus(fake_logits[:, 1] - fake_logits[:, 0]).mean()


def _generator_as_written(fake_logits: Tensor, kind: str) -> Tensor:
    n, _, h, w = fake_logits.shape
    return F.cross_entropy(fake_logits, torch.zeros((n, h, w), dtype=torch.long, device=fake_logits.device))


def _l1(refined: Tensor, synthetic: Tensor, scale: float) -> Tensor:
    return scale * F.l1_loss(refined, synthetic)


def _refiner_loss(
    fake_logits: Tensor, refined: Tensor, synthetic: Tensor, kind: str, reg_scale: float
) -> Tensor:
    return _generator(fake_logits, kind) + _l1(refined, synthetic, reg_scale)


def _head(
    real_features: Tensor,
    fake_features: Tensor,
    weight: Tensor,
    bias: Tensor,
    kind: str,
    return_accuracy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    real, fake = (F.conv2d(x, weight, bias) for x in (real_features, fake_features))
    return _discriminator(real, fake, kind, return_accuracy)


def _head_as_written(
    real_features: Tensor,
    fake_features: Tensor,
    weight: Tensor,
    bias: Tensor,
    kind: str,
    return_accuracy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    real, fake = (F.conv2d(x, weight, bias) for x in (real_features, fake_features))
    return _softmax_as_written(real, fake, kind, return_accuracy)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2), inplace=True)


def _block(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    pad = weight1.shape[-1] // 2
    y = F.relu(F.conv2d(x, weight1, bias1, padding=pad), inplace=True)
    return F.conv2d(y, weight2, bias2, padding=pad).add_(x).relu_()


def _network(x: Tensor, **p: Tensor) -> Tensor:
    """Parameters by their names in `fastda.nn.Refiner`'s state_dict, dots written as underscores."""
    y = F.relu(F.conv2d(x, p["first_weight"], p["first_bias"], padding=1), inplace=True)
    for i in range((len(p) - 4) // 4):
        names = (f"blocks_{i}_{n}" for n in ("conv1_weight", "conv1_bias", "conv2_weight", "conv2_bias"))
        y = _block(y, *(p[name] for name in names))
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


def _conv_flops(n: int, c: int, k: int, size: int, h: int, w: int) -> float:
    return 2.0 * n * c * k * size * size * h * w


def _contenders(step: type[SimganStep] | type[DannStep]) -> dict[str, Callable[[Sizes], Call]]:
    return {
        "fastda": functools.partial(step, fused=True),
        "eager, usual code": functools.partial(step, usual=True, layout=torch.contiguous_format),
        "eager channels_last": step,
        "torch.compile channels_last": functools.partial(step, compiled=True),
    }


BLOCKS = ((3, 64, 3, 37, 53), (32, 64, 3, 35, 55), (2, 64, 3, 224, 224), (1, 64, 3, 35, 55))
MAPS = ((512, 512, 9, 14), (32, 32, 9, 14), (512, 512, 7, 7), (8, 8, 30, 30), (64, 64, 56, 56))
WORKLOADS = (
    Workload(
        "grad_reverse",
        "grad_reverse",
        ((128, 768), (128, 1024), (8, 64, 55, 35), (64, 512, 7, 7)),
        "the identity whose backward turns the gradient round: shape of the features",
        {"scale": 0.7},
        {"eager": reverse},
        around=lambda reverse: lambda x, scale: 2 * reverse(x, scale),
        floor=lambda x, scale: x,
        added=True,
    ),
    Workload(
        "grad_reverse",
        "grad_reverse_linear",
        ((128, 768, 100), (128, 320, 100), (128, 1024, 1024)),
        "reversal and the next linear layer in one: batch × inputs → outputs",
        {"bias": True, "scale": 0.7},
        {"eager": _reversed_linear},
        floor=lambda x, weight, bias, scale: F.linear(x, weight, bias),
        flops=lambda n, i, o: 2.0 * n * i * o,
        shown="{}×{}→{}",
    ),
    *(
        Workload(
            "patch_loss",
            "patch_discriminator_loss",
            MAPS if kind == "softmax" else (MAPS[0], MAPS[3], MAPS[4]),
            "loss of a patch discriminator with both accuracies: real + refined images, height × width",
            {"kind": kind, "return_accuracy": True},
            {"eager": _discriminator, **written},
            shown="{}+{} maps of {}×{}",
        )
        for kind, written in (
            ("softmax", {"eager, usual code": _softmax_as_written}),
            ("bce", {"eager, usual code": _bce_as_written}),
            ("lsgan", {}),
            ("hinge", {}),
        )
    ),
    Workload(
        "patch_loss",
        "patch_generator_loss",
        ((512, 9, 14), (8, 30, 30)),
        "loss of a refiner against a patch discriminator: images, height × width",
        {"kind": "softmax"},
        {"eager": _generator, "eager, usual code": _generator_as_written},
        shown="{} maps of {}×{}",
    ),
    Workload(
        "patch_loss",
        "self_regularization",
        ((512, 1, 35, 55), (32, 1, 35, 55)),
        "ℓ₁ distance of refined and synthetic images: images × channels × height × width",
        {"scale": 0.3},
        {"eager": _l1},
        grads=("refined",),
    ),
    Workload(
        "patch_loss",
        "refiner_loss",
        ((32, 1, 35, 55),),
        "both losses of a refiner in one: refined images × channels × height × width",
        {"kind": "softmax", "reg_scale": 0.3},
        {"eager": _refiner_loss},
        grads=("fake_logits", "refined"),
    ),
    Workload(
        "patch_loss",
        "patch_head_discriminator_loss",
        ((32, 32, 32, 9, 14), (512, 512, 32, 9, 14)),
        "last 1×1 convolution and loss in one: real + refined images, channels × height × width",
        {"kind": "softmax", "return_accuracy": True},
        {"eager": _head, "eager, usual code": _head_as_written},
        shown="{}+{} of {}×{}×{}",
    ),
    Workload(
        "refiner",
        "refiner_block",
        (*BLOCKS, (2, 64, 7, 112, 112)),
        "residual block of two convolutions: images × channels × height × width, filters' height × width",
        formulas={"eager": _block},
        modes=("forward", "backward"),
        two_threads=BLOCKS[1:2],
        flops=lambda n, c, size, h, w: 2 * _conv_flops(n, c, c, size, h, w),
        shown="{0}×{1}×{3}×{4}, {2}×{2}",
    ),
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
            _conv_flops(n, 1, 64, 3, h, w)
            + 2 * blocks * _conv_flops(n, 64, 64, 3, h, w)
            + _conv_flops(n, 64, 1, 1, h, w)
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
