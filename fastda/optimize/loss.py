"""torch's mean losses in a model that exists, where their target turns out to be one number or one class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastda import _torch
from fastda.ops.patch_loss import one_side_loss
from fastda.optimize.stand_in import PLAIN, Found, StandIn, is_torchs, not_on_cpu

# From how many patches on a call was measured to be faster than torch's, with all that is checked.
LEAST_PATCHES = {"bce": 2**14, "softmax": 2**13}
# By torch's module: the kind of loss, its name in torch.nn.functional, and its method.
_KINDS: dict[type, tuple[str, str, Any, Any]] = {
    module: (kind, name, getattr(F, name), module.forward)
    for module, kind, name in (
        (nn.BCEWithLogitsLoss, "bce", "binary_cross_entropy_with_logits"),
        (nn.CrossEntropyLoss, "softmax", "cross_entropy"),
    )
}


def find(module: nn.Module) -> Iterator[Found]:
    """A loss module's stand-in, or why it is left."""
    if type(module) is nn.BCELoss:
        yield Found(
            "clamps the logarithms of probabilities, as no loss of logits does; if the logits are at hand: "
            "nn.BCEWithLogitsLoss() or fastda.patch_discriminator_loss"
        )
    elif type(module) in _KINDS and "forward" not in vars(module):
        kind, _, function, method = _KINDS[type(module)]
        reason = _refusal(module) or not_on_cpu(module)
        if not (is_torchs(function) and is_torchs(method)):
            reason = "torch's loss was patched before fastda was imported"
        target = "of two classes, all labels the same" if kind == "softmax" else "to one expanded label"
        what = f"mean {target} → patch loss {kind}, in calls of {LEAST_PATCHES[kind]:,} patches or more"
        yield Found(reason) if reason else Found(what, Loss(module))


def _refusal(loss: Any) -> str | None:
    """Why this module's settings are not served; None if they are."""
    if loss.reduction != "mean":
        return f"reduction {loss.reduction!r}"
    for name in ("weight", "pos_weight"):
        if getattr(loss, name, None) is not None:
            return f"has a {name}"
    for name, default in (("label_smoothing", 0), ("ignore_index", -100)):
        if getattr(loss, name, default) != default:
            return f"{name} {getattr(loss, name)}"
    return None


class Loss(StandIn):
    """The forward of one of torch's losses by patch_discriminator_loss."""

    method = "forward"

    def __call__(self, input: Tensor, target: Tensor) -> Any:
        loss = self.module
        kind, name, function, forward = _KINDS[type(loss)]
        y = None
        if (
            type(input) in PLAIN
            and type(target) in PLAIN
            and not is_compiling()  # a compiler fuses what the original is made of
            and input.numel() >= LEAST_PATCHES[kind] * (2 if kind == "softmax" else 1)
            and not (torch.jit.is_tracing() or _torch.modes_active() or _torch.transforms_active())
            and getattr(F, name) is function
            and type(loss).forward is forward
            and _refusal(loss) is None
            and input.is_cpu
            and target.is_cpu
            and input.dtype in (torch.float32, torch.float64)
            and input.layout is torch.strided
            and not input.is_nested
            and target.layout is torch.strided
            and not target.is_nested
            and input.is_contiguous()
        ):
            y = _of_classes(input, target) if kind == "softmax" else _of_labels(input, target)
        return y if self.count(y is not None) else type(loss).forward(loss, input, target)


def _is_tame(x: Tensor) -> bool:
    """Whether no square of x, nor their sum, overflows: beyond, torch's own NaN and infinities are kept."""
    flat = x.detach().view(-1)
    return math.isfinite(torch.dot(flat, flat).item())


def _of_labels(x: Tensor, target: Tensor) -> Tensor | None:
    """The mean BCE of logits, if the target is one number that was expanded."""
    if target.shape != x.shape or target.dtype != x.dtype or target.requires_grad:
        return None
    if any(stride for stride, n in zip(target.stride(), x.shape, strict=True) if n > 1):
        return None
    label = target.as_strided((), ()).item()
    if not 0 <= label <= 1 or not _is_tame(x):
        return None
    return one_side_loss(x.view(1, 1, 1, -1), "bce", label >= 0.5, 2 * min(label, 1 - label))


def _of_classes(x: Tensor, target: Tensor) -> Tensor | None:
    """The mean cross-entropy of two classes, if all targets are the same one."""
    if x.dim() < 2 or x.shape[1] != 2:
        return None
    if target.dtype != torch.int64 or target.shape != (x.shape[0], *x.shape[2:]):
        return None
    label = target.as_strided((), ()).item()
    if label not in (0, 1) or not bool((target == label).all()) or not _is_tame(x):
        return None
    # Rows of two logits are (1, 2, 1, rows) in channels_last; else images as they are.
    patches = x.t()[None, :, None] if x.dim() == 2 else x.view(x.shape[0], 2, 1, -1)
    return one_side_loss(patches, "softmax", label == 0)
