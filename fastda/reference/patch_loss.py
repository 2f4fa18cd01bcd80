"""Local-patch adversarial losses and self-regularisation (Shrivastava et al., arXiv 1612.07828, section 2).

Everything is computed in float32 or wider. Weights and scales are constants: no gradient reaches them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def patch_terms(logits: Tensor, kind: str, real: bool, label_smoothing: float = 0.0) -> Tensor:
    """The loss of every patch, (N, 1, H, W), for logits that are to be told real (or else fake)."""
    hit, miss = 1 - label_smoothing / 2, label_smoothing / 2
    y = logits if real else -logits
    if kind == "softmax":
        log_p = F.log_softmax(logits, dim=1)
        right, wrong = (log_p[:, :1], log_p[:, 1:]) if real else (log_p[:, 1:], log_p[:, :1])
    elif kind == "bce":
        right, wrong = F.logsigmoid(y), F.logsigmoid(-y)
    elif kind == "lsgan":
        return (logits - (hit if real else miss)) ** 2
    elif kind == "hinge":
        return F.relu(1 - y)
    else:
        return -y
    return -right if label_smoothing == 0 else -hit * right - miss * wrong


def patch_accuracy(logits: Tensor, weight: Tensor | None, kind: str, real: bool) -> Tensor:
    """The (weighted) share of patches on their right side; a patch whose loss is NaN is on none."""
    if kind == "softmax":
        score = logits[:, :1] - logits[:, 1:]
        score = score.masked_fill((logits == math.inf).any(1, keepdim=True), math.nan)
    else:
        score = logits - 0.5 if kind == "lsgan" else logits
    right = ((score if real else -score) > 0).to(logits.dtype)
    share = right.mean() if weight is None else (right * weight).sum() / weight.sum()
    return share.float()


def _side(
    logits: Tensor, weight: Tensor | None, kind: str, real: bool, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """The reduced loss of one side, and its accuracy."""
    logits = _wide(logits)
    if weight is not None:
        weight = weight.detach().to(logits.dtype).expand(logits.shape[0], 1, *logits.shape[2:])
        logits = logits.masked_fill(weight == 0, 0.0)  # a masked patch may hold anything
    terms = patch_terms(logits, kind, real, label_smoothing)
    count: Any = terms.numel()
    if weight is not None:
        terms, count = terms * weight, weight.sum()
    accuracy = patch_accuracy(logits.detach(), weight, kind, real)
    return _reduce(terms, reduction, count), accuracy


def _reduce(terms: Tensor, reduction: str, count: Any) -> Tensor:
    if reduction == "none":
        return terms
    total = terms.sum()
    if reduction == "mean":
        return total / count
    if reduction == "batchmean":
        return total / (terms.shape[0] if terms.dim() else 1)
    return total


def patch_discriminator_loss(
    real_logits: Tensor,
    fake_logits: Tensor,
    kind: str = "softmax",
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    real_weight: Tensor | None = None,
    fake_weight: Tensor | None = None,
    return_accuracy: bool = False,
) -> Any:
    """How well the discriminator tells real patches from fake ones; see `fastda.patch_discriminator_loss`."""
    real, real_right = _side(real_logits, real_weight, kind, True, label_smoothing, reduction)
    fake, fake_right = _side(fake_logits, fake_weight, kind, False, label_smoothing, reduction)
    loss = (real, fake) if reduction == "none" else real + fake
    return (loss, real_right, fake_right) if return_accuracy else loss


def patch_generator_loss(
    fake_logits: Tensor, kind: str = "softmax", *, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    """How well fake patches pass for real ones; see `fastda.patch_generator_loss`."""
    return _side(fake_logits, weight, "wgan" if kind == "hinge" else kind, True, 0.0, reduction)[0]


def self_regularization(
    refined: Tensor, synthetic: Tensor, scale: float | Tensor = 1.0, *, reduction: str = "mean"
) -> Tensor:
    """scale · ‖refined − synthetic‖₁; see `fastda.self_regularization`."""
    terms = (_wide(refined) - _wide(synthetic)).abs()
    if isinstance(scale, Tensor):
        scale = scale.detach().to(terms.dtype)
    return scale * _reduce(terms, reduction, terms.numel())


def refiner_loss(
    fake_logits: Tensor,
    refined: Tensor,
    synthetic: Tensor,
    reg_scale: float | Tensor,
    kind: str = "softmax",
    *,
    reduction: str = "mean",
) -> Tensor:
    """`patch_generator_loss` + `self_regularization`; see `fastda.refiner_loss`."""
    adversarial = patch_generator_loss(fake_logits, kind, reduction=reduction)
    return adversarial + self_regularization(refined, synthetic, reg_scale, reduction=reduction)


def patch_head_discriminator_loss(
    real_features: Tensor,
    fake_features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str = "softmax",
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    return_accuracy: bool = False,
) -> Any:
    """The last 1×1 convolution, then the loss; see `fastda.patch_head_discriminator_loss`."""
    bias = None if bias is None else _wide(bias)
    real, fake = (F.conv2d(_wide(x), _wide(weight), bias) for x in (real_features, fake_features))
    return patch_discriminator_loss(
        real,
        fake,
        kind,
        reduction=reduction,
        label_smoothing=label_smoothing,
        return_accuracy=return_accuracy,
    )
