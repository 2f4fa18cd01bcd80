"""Patch losses: the kernel gives the gradient together with the value, so that backward only scales it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function

from fastda import _torch, backend, reference
from fastda.ops.common import composite_backward, is_symbolic, laid_out_as, number, recordable
from fastda.reference.patch_loss import patch_terms
from fastda.registry.patch_loss import KINDS, REDUCTIONS, wide

_REDUCTIONS = (*REDUCTIONS, "none")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _weighted_terms(
    logits: Tensor, weight: Tensor | None, kind: str, real: bool, label_smoothing: float
) -> Tensor:
    if weight is None:
        return patch_terms(logits.to(wide(logits)), kind, real, label_smoothing)
    logits = logits.to(weight.dtype).masked_fill(weight == 0, 0.0)
    return patch_terms(logits, kind, real, label_smoothing) * weight


# By raw operator: how many of its tensors receive gradients, and the reference with the operator's arguments.
_OPERATORS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "patch_discriminator_loss": (
        2,
        lambda real, fake, real_weight, fake_weight, kind, reduction, label_smoothing: (
            reference.patch_discriminator_loss(
                real,
                fake,
                kind,
                reduction=reduction,
                label_smoothing=label_smoothing,
                real_weight=real_weight,
                fake_weight=fake_weight,
            )
        ),
    ),
    "patch_generator_loss": (
        1,
        lambda fake, weight, kind, reduction: reference.patch_generator_loss(
            fake, kind, reduction=reduction, weight=weight
        ),
    ),
    "patch_loss_map": (1, _weighted_terms),
    "self_regularization": (
        2,
        lambda refined, synthetic, scale_tensor, scale, reduction: reference.self_regularization(
            refined,
            synthetic,
            scale if scale_tensor is None else scale_tensor,
            reduction=reduction,
        ),
    ),
    "refiner_loss": (
        3,
        lambda fake, refined, synthetic, scale_tensor, scale, kind, reduction: reference.refiner_loss(
            fake,
            refined,
            synthetic,
            scale if scale_tensor is None else scale_tensor,
            kind,
            reduction=reduction,
        ),
    ),
    "patch_head_discriminator_loss": (
        4,
        lambda real, fake, weight, bias, kind, reduction, label_smoothing: (
            reference.patch_head_discriminator_loss(
                real,
                fake,
                weight,
                bias,
                kind,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
        ),
    ),
}


def _run(
    name: str,
    serving: str,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """The raw operator's results; the last ones are the gradients of its first tensors."""
    run = getattr(backend.kernels(serving), name)
    if name != "patch_head_discriminator_loss":
        return run(*tensors, *options, *needs)
    *results, d_weight, d_bias = run(*tensors, *options, needs[0], needs[1], needs[2] or needs[3])
    weight = tensors[2]
    if needs[2] and weight is not None:
        d_weight = laid_out_as(weight, d_weight)
    return (*results, d_weight, d_bias)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, serving: str, options: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = _OPERATORS[name][0]
        results = _run(name, serving, tensors, options, ctx.needs_input_grad[3 : 3 + count])
        outputs, grads = results[:-count], results[-count:]
        compiled = is_compiling()
        ctx.call = name, serving, options, compiled
        if compiled:
            ctx.save_for_backward(*tensors, *grads)
        else:
            ctx.save_for_backward(*tensors)
            ctx.grads = grads
            ctx.set_materialize_grads(False)  # zeros for the accuracies
        if len(outputs) > 1:
            ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        name, serving, options, compiled = ctx.call
        count, formula = _OPERATORS[name]
        needs = ctx.needs_input_grad[3:]
        grads: Any
        if grad is None:
            grads = (None,) * count
        elif compiled:
            saved = ctx.saved_tensors
            grads = [(g * grad).to(x.dtype) for g, x in zip(saved[-count:], saved, strict=False)]
        elif torch.is_grad_enabled():
            grads = composite_backward(lambda *t: formula(*t, *options), ctx.saved_tensors, needs, grad)
        else:
            # Handed over, not kept: whoever receives a gradient may change it in place. A second backward
            # through a retained graph computes it again.
            grads, ctx.grads = None if is_compiling() else ctx.grads, None
            if grads is None:
                grads = _run(name, serving, ctx.saved_tensors, options, needs[:count])[-count:]
            if is_compiling() or _torch.batched(grad):
                grads = [g * grad for g in grads]
            elif grad.dim() == 0:
                scale_ = backend.kernels(serving).patch_loss_scale_
                for i in range(0, count, 2):
                    scale_(grads[i], grads[i + 1] if i + 1 < count else grads[i][:0], grad)
            else:
                grads = [g.mul_(grad) for g in grads]
        given = [g if need else None for g, need in zip(grads, needs, strict=False)]
        return (None, None, None, *given, *(None,) * (len(needs) - count))


def _apply(name: str, serving: str, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The raw operator's results without its gradients, recorded where a gradient is wanted."""
    count = _OPERATORS[name][0]
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors[:count]]):
        return _Loss.apply(name, serving, options, *recordable(*tensors))
    return _run(name, serving, tensors, options, (False,) * count)[:-count]


def _check_options(op: str, kind: str, reduction: str, label_smoothing: float, reductions: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if reduction not in reductions:
        raise ValueError(f"{op}: reduction must be one of {', '.join(reductions)}, got {reduction!r}")
    if label_smoothing:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
        if kind in ("hinge", "wgan"):
            raise ValueError(f"{op}: kind={kind!r} has no labels to smooth, got {label_smoothing=}")


def _check_tensor(op: str, name: str, x: Tensor, like: Tensor | None = None, like_name: str = "") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if like is not None:
        if x.dtype != like.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {like_name}, {like.dtype}, got {x.dtype}")
        if x.device != like.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {like_name}, {like.device}, got {x.device}"
            )


def _check_logits(op: str, name: str, logits: Tensor, kind: str) -> None:
    channels = 2 if kind == "softmax" else 1
    if logits.dim() != 4 or logits.shape[1] != channels:
        raise ValueError(
            f"{op}: {name} must be (N, {channels}, H, W) for kind={kind!r}, got {tuple(logits.shape)}"
        )


def _expanded(op: str, name: str, weight: Tensor | None, logits: Tensor) -> Tensor | None:
    """A weight as the kernels want it: (N, 1, H, W) in the accumulator type, broadcast by its strides."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(weight).__name__}")
    if weight.is_complex():
        raise TypeError(f"{op}: {name} must be real, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError(
            f"{op}: {name} is a constant and must not require grad; pass {name}.detach() if that is meant"
        )
    if weight.device != logits.device:
        raise ValueError(f"{op}: {name} must be on the device {logits.device}, got {weight.device}")
    n, _, h, w = logits.shape
    shape = (n, 1, h, w)
    fits = weight.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(weight.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must be broadcastable to {shape}, got {tuple(weight.shape)}")
    return weight.to(wide(logits)).expand(shape)


def _scale(op: str, name: str, scale: float | Tensor, x: Tensor) -> tuple[Tensor | None, float]:
    """A scale as the kernels want it: on the host where it is there, else a tensor."""
    if isinstance(scale, Tensor):
        if not scale.is_floating_point():
            raise TypeError(f"{op}: {name} must be a float or a floating-point tensor, got {scale.dtype}")
        if scale.requires_grad:
            raise ValueError(
                f"{op}: {name} is a constant and must not require grad; pass {name}.detach() if that is meant"
            )
        if scale.dim() != 0:
            raise ValueError(
                f"{op}: {name} must be a float or a 0-dim tensor, got shape {tuple(scale.shape)}"
            )
        if _torch.value_known(scale):
            return None, scale.item()
        return scale.to(x.device), 0.0
    scale = number(scale)
    if not isinstance(scale, (float, int)):
        raise TypeError(f"{op}: {name} must be a float or a 0-dim tensor, got {type(scale).__name__}")
    if is_compiling():
        # A float in an operator's schema, or filling a tensor, would be compiled again for every value.
        return scale * torch.ones((), dtype=torch.float64, device=x.device), 0.0
    return None, float(scale)


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
    """How well a discriminator tells real patches from fake ones: loss, gradient and accuracies in one pass.

    Args:
        real_logits: (N, 2, H, W) for `softmax`, whose channel 1 is "fake"; else (N, 1, H, W), where a higher
            score means "real". float32, float64, bfloat16 or float16.
        fake_logits: likewise, of the same dtype; the number of images may differ.
        kind: per patch, with p the softmax over the channels and s the score,
            `softmax`: −log p₀(real) − log p₁(fake); `bce`: softplus(−s_real) + softplus(s_fake);
            `lsgan`: (s_real − 1)² + s_fake²; `hinge`: max(0, 1 − s_real) + max(0, 1 + s_fake);
            `wgan`: s_fake − s_real.
        reduction: `mean` over all patches of either batch, the two means added; `sum` (the paper's);
            `batchmean`: sum over patches, mean over images; `none`.
        label_smoothing: moves the targets from {0, 1} to {ε/2, 1 − ε/2} (softmax, bce, lsgan).
        real_weight, fake_weight: weights of patches or bool masks, broadcastable to (N, 1, H, W). They get no
            gradient. A patch of weight 0 is taken out, whatever its logits are; `mean` and the accuracies
            divide by the total weight.
        return_accuracy: also return the shares of real and of fake patches on their right side.

    Returns:
        The loss, 0-dim; for `none` a tuple of the two maps of terms (N, 1, H, W). With `return_accuracy`
        (loss, real accuracy, fake accuracy). Sums and results are float32, float64 for float64 logits.

    Where a gradient is wanted it is computed in the same pass and kept, with the logits, for backward. Double
    backward works; torch.func transforms take the reference.
    Raises ValueError for shapes, devices and options that do not fit, TypeError for dtypes.
    Source: SimGAN, arXiv 1612.07828, section 2.2 (softmax); LSGAN, arXiv 1611.04076; the hinge loss,
    arXiv 1705.02894; WGAN, arXiv 1701.07875.
    """
    if is_symbolic(real_logits) or is_symbolic(fake_logits):
        logits = (real_logits, fake_logits)
        return handle_torch_function(
            patch_discriminator_loss,
            logits,
            *logits,
            kind,
            reduction=reduction,
            label_smoothing=label_smoothing,
            real_weight=real_weight,
            fake_weight=fake_weight,
            return_accuracy=return_accuracy,
        )
    op = "patch_discriminator_loss"
    _check_options(op, kind, reduction, label_smoothing, _REDUCTIONS)
    _check_tensor(op, "real_logits", real_logits)
    _check_tensor(op, "fake_logits", fake_logits, real_logits, "real_logits")
    _check_logits(op, "real_logits", real_logits, kind)
    _check_logits(op, "fake_logits", fake_logits, kind)
    real_weight = _expanded(op, "real_weight", real_weight, real_logits)
    fake_weight = _expanded(op, "fake_weight", fake_weight, fake_logits)
    serving = backend.select(real_logits)
    if serving == "reference":
        return reference.patch_discriminator_loss(
            real_logits,
            fake_logits,
            kind,
            reduction=reduction,
            label_smoothing=label_smoothing,
            real_weight=real_weight,
            fake_weight=fake_weight,
            return_accuracy=return_accuracy,
        )
    smoothing = float(label_smoothing)
    if reduction == "none":
        real, real_accuracy = _apply(
            "patch_loss_map", serving, (kind, True, smoothing), real_logits, real_weight
        )
        fake, fake_accuracy = _apply(
            "patch_loss_map", serving, (kind, False, smoothing), fake_logits, fake_weight
        )
        return ((real, fake), real_accuracy, fake_accuracy) if return_accuracy else (real, fake)
    options = (kind, reduction, smoothing)
    results = _apply(op, serving, options, real_logits, fake_logits, real_weight, fake_weight)
    return results if return_accuracy else results[0]


def patch_generator_loss(
    fake_logits: Tensor, kind: str = "softmax", *, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    """How well fake patches pass for real ones, the generator's (or refiner's) adversarial loss.

    Per patch −log p₀ for `softmax`, softplus(−s) for `bce`, (s − 1)² for `lsgan`, −s for `hinge` and `wgan`.
    Arguments, result, what is saved, and errors: see `patch_discriminator_loss`.
    """
    if is_symbolic(fake_logits):
        return handle_torch_function(
            patch_generator_loss, (fake_logits,), fake_logits, kind, reduction=reduction, weight=weight
        )
    op = "patch_generator_loss"
    _check_options(op, kind, reduction, 0.0, _REDUCTIONS)
    _check_tensor(op, "fake_logits", fake_logits)
    _check_logits(op, "fake_logits", fake_logits, kind)
    weight = _expanded(op, "weight", weight, fake_logits)
    serving = backend.select(fake_logits)
    if serving == "reference":
        return reference.patch_generator_loss(fake_logits, kind, reduction=reduction, weight=weight)
    if reduction == "none":
        kind = "wgan" if kind == "hinge" else kind
        return _apply("patch_loss_map", serving, (kind, True, 0.0), fake_logits, weight)[0]
    return _apply(op, serving, (kind, reduction), fake_logits, weight)[0]


# From how many patches on `one_side_loss` was measured to be faster than PyTorch's own functions, on a CPU.
LEAST_PATCHES = {"softmax": 2**12, "bce": 2**14, "lsgan": 2**16, "hinge": 2**16, "wgan": 2**19}


def one_side_loss(logits: Tensor, kind: str, real: bool, label_smoothing: float = 0.0) -> Tensor:
    """The discriminator's mean loss on one batch alone, real or fake, for at least one patch."""
    none = logits.detach()[:0]
    batches = (logits, none) if real else (none, logits)
    loss = patch_discriminator_loss(*batches, kind, reduction="sum", label_smoothing=label_smoothing)
    return loss / (logits.numel() // logits.shape[1])


def _check_pair(op: str, refined: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
    _check_tensor(op, "refined", refined)
    _check_tensor(op, "synthetic", synthetic)
    if synthetic.device != refined.device:
        raise ValueError(
            f"{op}: synthetic must be on the device of refined, {refined.device}, got {synthetic.device}"
        )
    if synthetic.shape != refined.shape:
        raise ValueError(
            f"{op}: synthetic must have the shape of refined, {tuple(refined.shape)}, "
            f"got {tuple(synthetic.shape)}"
        )
    if synthetic.dtype != refined.dtype:  # under autocast the refiner's result is narrower than its input
        dtype = torch.promote_types(refined.dtype, synthetic.dtype)
        refined, synthetic = refined.to(dtype), synthetic.to(dtype)
    return refined, synthetic


def self_regularization(
    refined: Tensor, synthetic: Tensor, scale: float | Tensor = 1.0, *, reduction: str = "mean"
) -> Tensor:
    """scale · ‖refined − synthetic‖₁, which keeps a refined image close to the synthetic one.

    Args:
        refined, synthetic: of one shape, images or features of them; both receive gradients. Of different
            dtypes, the narrower one is widened.
        scale: a float or a 0-dim tensor, which may change its value without a recompilation. It gets no
            gradient.
        reduction: `mean` over all entries, `sum`, `batchmean` (sum over entries, mean over images), `none`.

    Returns:
        0-dim, for `none` the shape of `refined`; float32, float64 for float64 arguments. The derivative where
        the two agree is 0.

    Saved for backward: the gradients and both arguments. Double backward works.
    Raises ValueError for shapes, devices and options that do not fit, TypeError for dtypes.
    Source: SimGAN, arXiv 1612.07828, section 2.1, λ‖ψ(R(x)) − ψ(x)‖₁.
    """
    if is_symbolic(refined) or is_symbolic(synthetic):
        pair = (refined, synthetic)
        return handle_torch_function(self_regularization, pair, *pair, scale, reduction=reduction)
    op = "self_regularization"
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, none, got {reduction!r}")
    refined, synthetic = _check_pair(op, refined, synthetic)
    scale_tensor, scale = _scale(op, "scale", scale, refined)
    serving = backend.select(refined)
    if serving == "reference" or reduction == "none":
        factor = scale if scale_tensor is None else scale_tensor
        return reference.self_regularization(refined, synthetic, factor, reduction=reduction)
    return _apply(op, serving, (scale, reduction), refined, synthetic, scale_tensor)[0]


def refiner_loss(
    fake_logits: Tensor,
    refined: Tensor,
    synthetic: Tensor,
    reg_scale: float | Tensor,
    kind: str = "softmax",
    *,
    reduction: str = "mean",
) -> Tensor:
    """SimGAN's whole loss of the refiner, `patch_generator_loss` + `self_regularization`, in one op.

    `fake_logits` is the discriminator's answer to `refined`, or to another batch; `reg_scale` is λ. Each term
    is reduced on its own: by `mean` over patches here and over entries there, by `batchmean` over images.
    `none` is no choice, since the two maps have different shapes.

    Arguments, result, what is saved, and errors: see `patch_generator_loss` and `self_regularization`.
    Source: SimGAN, arXiv 1612.07828, equation 4.
    """
    if is_symbolic(fake_logits) or is_symbolic(refined):
        inputs = (fake_logits, refined, synthetic)
        return handle_torch_function(refiner_loss, inputs, *inputs, reg_scale, kind, reduction=reduction)
    op = "refiner_loss"
    _check_options(op, kind, reduction, 0.0, REDUCTIONS)
    _check_tensor(op, "fake_logits", fake_logits)
    _check_logits(op, "fake_logits", fake_logits, kind)
    refined, synthetic = _check_pair(op, refined, synthetic)
    if refined.device != fake_logits.device:
        raise ValueError(
            f"{op}: refined must be on the device of fake_logits, {fake_logits.device}, got {refined.device}"
        )
    scale_tensor, scale = _scale(op, "reg_scale", reg_scale, refined)
    serving = backend.select(fake_logits)
    if serving == "reference":
        factor = scale if scale_tensor is None else scale_tensor
        return reference.refiner_loss(fake_logits, refined, synthetic, factor, kind, reduction=reduction)
    options = (scale, kind, reduction)
    return _apply(op, serving, options, fake_logits, refined, synthetic, scale_tensor)[0]


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
    """The discriminator's last 1×1 convolution and `patch_discriminator_loss` in one op.

    Logits and their gradients are never both materialised: a block of patches goes through the convolution,
    the loss, and back through the convolution while it is in the cache.

    Args:
        real_features, fake_features: (N, C, H, W), contiguous or channels_last; the batches may differ.
        weight, bias: (K, C, 1, 1) and (K,) or None, with K = 2 for `softmax` (of which only the difference of
            the two filters counts), else 1; the dtype of the features. Under autocast all are cast, as
            `F.conv2d` casts its own.
        kind, reduction, label_smoothing, return_accuracy: as in `patch_discriminator_loss`. For `none` the
            reference serves.

    Returns: as `patch_discriminator_loss`. Where a gradient is wanted, those of features, weight and bias are
    computed in the same pass and kept, with the arguments, for backward. Double backward works.
    Raises ValueError for shapes, devices and options that do not fit, TypeError for dtypes.
    """
    if is_symbolic(real_features) or is_symbolic(fake_features):
        inputs = (real_features, fake_features, weight, bias)
        return handle_torch_function(
            patch_head_discriminator_loss,
            inputs,
            *inputs,
            kind,
            reduction=reduction,
            label_smoothing=label_smoothing,
            return_accuracy=return_accuracy,
        )
    op = "patch_head_discriminator_loss"
    _check_options(op, kind, reduction, label_smoothing, _REDUCTIONS)
    _check_tensor(op, "real_features", real_features)
    dtype = _torch.autocast_dtype(real_features.device.type)
    if dtype is not None and real_features.dtype != torch.float64:
        real_features, fake_features, weight = (t.to(dtype) for t in (real_features, fake_features, weight))
        bias = None if bias is None else bias.to(dtype)
    _check_tensor(op, "fake_features", fake_features, real_features, "real_features")
    _check_tensor(op, "weight", weight, real_features, "real_features")
    if bias is not None:
        _check_tensor(op, "bias", bias, real_features, "real_features")
    for name, t in (("real_features", real_features), ("fake_features", fake_features)):
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must be (N, C, H, W), got {tuple(t.shape)}")
    channels, rows = real_features.shape[1], 2 if kind == "softmax" else 1
    if fake_features.shape[1] != channels:
        raise ValueError(
            f"{op}: fake_features must have the {channels} channels of real_features, "
            f"got {tuple(fake_features.shape)}"
        )
    if weight.shape != (rows, channels, 1, 1):
        raise ValueError(
            f"{op}: weight must be {(rows, channels, 1, 1)} for kind={kind!r}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"{op}: bias must be {(rows,)} for kind={kind!r}, got {tuple(bias.shape)}")
    serving = backend.select(real_features)
    if serving == "reference" or reduction == "none":
        return reference.patch_head_discriminator_loss(
            real_features,
            fake_features,
            weight,
            bias,
            kind,
            reduction=reduction,
            label_smoothing=label_smoothing,
            return_accuracy=return_accuracy,
        )
    options = (kind, reduction, float(label_smoothing))
    results = _apply(op, serving, options, real_features, fake_features, weight, bias)
    return results if return_accuracy else results[0]
