"""The rows of the patch losses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastda.registry.row import (
    BF16,
    F16,
    F32,
    F64,
    LINEAR,
    Draw,
    Operator,
    Options,
    Sizes,
    Tolerance,
    Workload,
    clear_of_zero,
    grid,
)

KINDS = ("softmax", "bce", "lsgan", "hinge", "wgan")
REDUCTIONS = ("mean", "sum", "batchmean")  # or "none"

# What a patch costs and its slope: a few roundings in float32 or wider, whatever the dtype of the logits. A
# gradient is rounded once more to that dtype, which alone costs its largest entry, up to 12 times the rms
# where most patches are masked out, 2^-9 (bfloat16) or 2^-12 (float16) of itself.
TOLERANCES = {
    "value": {
        F64: Tolerance(2e-15, 2e-14),
        F32: Tolerance(6e-7, 6e-6),
        BF16: Tolerance(6e-7, 6e-6),
        F16: Tolerance(6e-7, 6e-6),
    },
    "grad": {
        F64: Tolerance(2e-15, 2e-14),
        F32: Tolerance(6e-7, 6e-6),
        BF16: Tolerance(4e-3, 6e-2),
        F16: Tolerance(5e-4, 8e-3),
    },
}


def wide(x: Tensor) -> torch.dtype:
    """The dtype that losses and their gradients are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scalar_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((), dtype=dtype or wide(x))


def _grad_like(x: Tensor, need: bool) -> Tensor:
    if not need:
        return x.new_empty(0, dtype=wide(x))
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(x.shape, dtype=wide(x), device=x.device, memory_format=memory_format)


def _patch_discriminator_loss(
    real: Tensor,
    fake: Tensor,
    real_weight: Tensor | None,
    fake_weight: Tensor | None,
    kind: str,
    reduction: str,
    label_smoothing: float,
    real_grad: bool,
    fake_grad: bool,
) -> tuple[Tensor, ...]:
    accuracies = (_scalar_like(real, torch.float32), _scalar_like(fake, torch.float32))
    return _scalar_like(real), *accuracies, _grad_like(real, real_grad), _grad_like(fake, fake_grad)


def _patch_generator_loss(
    fake: Tensor, weight: Tensor | None, kind: str, reduction: str, grad: bool
) -> tuple[Tensor, ...]:
    return _scalar_like(fake), _grad_like(fake, grad)


def _patch_loss_map(
    logits: Tensor, weight: Tensor | None, kind: str, real: bool, label_smoothing: float, grad: bool
) -> tuple[Tensor, ...]:
    n, _, h, w = logits.shape
    terms = logits.new_empty((n, 1, h, w), dtype=wide(logits))
    return terms, _scalar_like(logits, torch.float32), _grad_like(logits, grad)


def _pair_grads(
    refined: Tensor, synthetic: Tensor, refined_grad: bool, synthetic_grad: bool
) -> tuple[Tensor, Tensor]:
    """Laid out as both arguments are, or contiguous."""
    one, other = _grad_like(refined, True), _grad_like(synthetic, True)
    last = not one.is_contiguous() and not other.is_contiguous()
    grads = (one if last else one.contiguous(), other if last else other.contiguous())
    none = one.new_empty(0)
    return grads[0] if refined_grad else none, grads[1] if synthetic_grad else none


def _self_regularization(
    refined: Tensor,
    synthetic: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    reduction: str,
    refined_grad: bool,
    synthetic_grad: bool,
) -> tuple[Tensor, ...]:
    return _scalar_like(refined), *_pair_grads(refined, synthetic, refined_grad, synthetic_grad)


def _refiner_loss(
    fake: Tensor,
    refined: Tensor,
    synthetic: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    kind: str,
    reduction: str,
    fake_grad: bool,
    refined_grad: bool,
    synthetic_grad: bool,
) -> tuple[Tensor, ...]:
    loss = _scalar_like(fake, torch.promote_types(wide(fake), wide(refined)))
    pair = _pair_grads(refined, synthetic, refined_grad, synthetic_grad)
    return loss, _grad_like(fake, fake_grad), *pair


def _patch_head_discriminator_loss(
    real: Tensor,
    fake: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    reduction: str,
    label_smoothing: float,
    real_grad: bool,
    fake_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, ...]:
    accuracies = (_scalar_like(real, torch.float32), _scalar_like(fake, torch.float32))
    d_weight, d_bias = (
        x.new_empty(x.shape, dtype=wide(x)) if weight_grad and x is not None else _grad_like(weight, False)
        for x in (weight, bias)
    )
    grads = (_grad_like(real, real_grad), _grad_like(fake, fake_grad), d_weight, d_bias)
    return _scalar_like(real), *accuracies, *grads


def _patch_loss_scale_(first: Tensor, second: Tensor, factor: Tensor) -> None:
    return None


def _logits(kind: str, n: int, h: int, w: int) -> Sizes:
    return (n, 2 if kind == "softmax" else 1, h, w)


def _patch_weight(draw: Draw, *sizes: int) -> Tensor:
    return (draw(sizes[-3], 1, sizes[-2], sizes[-1]) - 0.5).relu()  # most patches are masked out


def _settle_head(a: dict[str, Any], margin: float) -> None:
    if a["kind"] == "hinge":
        scores = [F.conv2d(a[name], a["weight"], a["bias"]) for name in ("real_features", "fake_features")]
        edges = torch.cat([(scores[0] - 1).flatten(), (scores[1] + 1).flatten()])
        a["bias"] += clear_of_zero(edges[None, None], margin)


def _loss_terms(options: Options, *sizes: int) -> dict[str, float]:
    # A mean has terms of about one; what is summed instead has as many of them as patches or pixels.
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return {}
    n, per_image = sizes[0], math.prod(sizes[-2:])
    size = {"mean": 1.0, "batchmean": float(per_image), "sum": float(n * per_image)}[reduction]
    return {"value": size, "weight": size, "bias": size}


OPERATORS = (
    Operator(
        "patch_discriminator_loss",
        tensors=lambda options, real, fake, h, w: {
            "real_logits": _logits(options["kind"], real, h, w),
            "fake_logits": _logits(options["kind"], fake, h, w),
        },
        sizes=((1, 1, 1, 1), (3, 3, 9, 14), (2, 5, 37, 53)),
        tolerances=TOLERANCES,
        raw={
            "patch_discriminator_loss": _patch_discriminator_loss,
            "patch_loss_map": _patch_loss_map,
            "patch_loss_scale_": _patch_loss_scale_,
        },
        options=[
            *grid(kind=KINDS, reduction=(*REDUCTIONS, "none")),
            *grid(kind=("softmax", "bce", "lsgan"), label_smoothing=(0.1,), return_accuracy=(True,)),
            *grid(kind=KINDS, reduction=("mean", "none"), fake_weight=(_patch_weight,)),
            {"kind": "softmax", "real_weight": lambda draw, *sizes: draw(1, 1, sizes[-2], 1).abs()},
        ],
        large=((512, 512, 9, 14), (8, 8, 30, 30)),
        large_options={"kind": "softmax", "return_accuracy": True},
        magnitudes=_loss_terms,
    ),
    Operator(
        "patch_generator_loss",
        tensors=lambda options, n, h, w: {"fake_logits": _logits(options["kind"], n, h, w)},
        sizes=((1, 1, 1), (3, 9, 14), (2, 37, 53)),
        tolerances=TOLERANCES,
        raw={"patch_generator_loss": _patch_generator_loss},
        options=[
            *grid(kind=KINDS, reduction=(*REDUCTIONS, "none")),
            *grid(kind=KINDS, reduction=("mean", "none"), weight=(_patch_weight,)),
        ],
        large=((512, 9, 14), (8, 30, 30)),
        large_options={"kind": "softmax"},
        magnitudes=_loss_terms,
    ),
    Operator(
        "self_regularization",
        tensors=lambda options, n, c, h, w: {"refined": (n, c, h, w), "synthetic": (n, c, h, w)},
        sizes=((1, 1, 1, 1), (3, 1, 35, 55), (2, 3, 37, 53)),
        tolerances=TOLERANCES,
        raw={"self_regularization": _self_regularization},
        options=grid(scale=(1.0, 0.3), reduction=(*REDUCTIONS, "none")),
        large=((512, 1, 35, 55), (32, 1, 35, 55)),
        large_options={"scale": 0.3},
    ),
    Operator(
        "refiner_loss",
        tensors=lambda options, n, c, h, w: {
            "fake_logits": _logits(options["kind"], n, (h + 3) // 4, (w + 3) // 4),
            "refined": (n, c, h, w),
            "synthetic": (n, c, h, w),
        },
        sizes=((1, 1, 1, 1), (3, 1, 35, 55), (2, 3, 37, 53)),
        tolerances=TOLERANCES,
        raw={"refiner_loss": _refiner_loss},
        options=grid(kind=KINDS, reg_scale=(0.3,), reduction=("mean", "sum", "batchmean")),
        large=((512, 1, 35, 55), (32, 1, 35, 55)),
        large_options={"kind": "softmax", "reg_scale": 0.3},
        magnitudes=_loss_terms,
    ),
    Operator(
        "patch_head_discriminator_loss",
        tensors=lambda options, real, fake, c, h, w: {
            "real_features": (real, c, h, w),
            "fake_features": (fake, c, h, w),
            "weight": (2 if options["kind"] == "softmax" else 1, c, 1, 1),
            "bias": (2 if options["kind"] == "softmax" else 1,),
        },
        sizes=((1, 1, 1, 1, 1), (3, 3, 32, 9, 14), (2, 3, 7, 19, 23)),
        tolerances={**TOLERANCES, "weight": LINEAR["grad"], "bias": LINEAR["grad"]},
        raw={"patch_head_discriminator_loss": _patch_head_discriminator_loss},
        options=[
            *grid(kind=KINDS, reduction=("mean", "sum")),
            *grid(kind=("softmax", "bce", "lsgan"), label_smoothing=(0.1,), return_accuracy=(True,)),
        ],
        large=((512, 512, 32, 9, 14), (32, 32, 32, 9, 14)),
        large_options={"kind": "softmax", "return_accuracy": True},
        settle=_settle_head,
        magnitudes=_loss_terms,
    ),
)


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


def _both_losses(
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


MAPS = ((512, 512, 9, 14), (32, 32, 9, 14), (512, 512, 7, 7), (8, 8, 30, 30), (64, 64, 56, 56))
WORKLOADS = (
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
        {"eager": _both_losses},
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
)
