"""Patch losses: value, gradient and accuracies in one pass over the logits.

Each program sums its own run of patches; a last kernel of one program adds those sums in their order.
Float atomics are never used, so that a result repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastda.triton.common import launch, operator, pieces, wide_dtype, wide_tl

# What is computed from a patch's score z, the difference of its two logits or its only one; y = SIGN * z.
LOG = tl.constexpr(0)  # softplus(y)
LOG_SMOOTH = tl.constexpr(1)  # HIT * softplus(y) + MISS * softplus(-y)
SQUARE = tl.constexpr(2)  # (z - TARGET)²
HINGE = tl.constexpr(3)  # max(0, 1 + y)
LINEAR = tl.constexpr(4)  # y

BLOCK = 1024
HEAD_PATCHES, HEAD_CHANNELS = 64, 32


@triton.jit
def term_and_slope(
    z,
    FORMULA: tl.constexpr,
    SIGN: tl.constexpr,
    HIT: tl.constexpr,
    MISS: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The loss of a patch with score z, and its derivative by z, NaN where PyTorch has NaN."""
    y = SIGN * z
    if FORMULA == LOG or FORMULA == LOG_SMOOTH:  # noqa: SIM109 (Triton knows no `in`)
        e = tl.exp(-tl.abs(y))
        u = 1 + e
        # log(1 + e) without the cancellation in u, whose rounding error u - 1 knows.
        log1p = tl.where(u == 1, e, tl.log(u) * (e / (u - 1)))
        sigmoid = tl.where(y >= 0, 1 / u, e / u)
        term = tl.where(y > 0, y, 0) + log1p
        slope = sigmoid
        if FORMULA == LOG_SMOOTH:
            term = HIT * term + MISS * (tl.where(y < 0, -y, 0) + log1p)
            slope = HIT * sigmoid - MISS * tl.where(y >= 0, e / u, 1 / u)
        slope *= SIGN
    elif FORMULA == SQUARE:
        d = z - TARGET
        term = d * d
        slope = 2 * d
    elif FORMULA == HINGE:
        margin = 1 + y
        term = tl.where(margin <= 0, 0, margin)
        slope = tl.where(margin <= 0, 0.0, tl.full(z.shape, SIGN, z.dtype))
    else:
        term = y
        slope = tl.full(z.shape, SIGN, z.dtype)
    return term, slope


@triton.jit(do_not_specialize=["total", "patches", "steps", "divisor", "count", "first"])
def patch_loss_kernel(
    logits,  # image, channel and patch strides below
    weight,  # or None
    total_weight,  # [] where the sums are divided by it, else None
    terms,  # [total], or None
    grad,  # or None
    losses,  # [programs of all sides]
    rights,  # [programs of all sides]
    total,  # patches of all images
    patches,  # of one image
    steps,  # blocks that one program walks
    divisor,  # of the loss, where total_weight does not say
    count,  # of the accuracy, likewise
    first,  # this side's first program among losses and rights
    logits_image,
    logits_channel,
    logits_patch,
    grad_image,
    grad_channel,
    grad_patch,
    weight_image,
    weight_patch,
    PAIR: tl.constexpr,
    FORMULA: tl.constexpr,
    SIGN: tl.constexpr,
    HIT: tl.constexpr,
    MISS: tl.constexpr,
    TARGET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    WEIGHTED_MEAN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    share = 1.0 / count.to(WIDE)
    factor = 1.0 / divisor.to(WIDE)
    if total_weight is not None:
        share = 1.0 / tl.load(total_weight).to(WIDE)
        if WEIGHTED_MEAN:
            factor = share
    loss = tl.zeros([BLOCK], WIDE)
    right = tl.zeros([BLOCK], WIDE)
    for step in range(steps):
        begin = (program.to(tl.int64) * steps + step) * BLOCK
        i = begin + tl.arange(0, BLOCK)
        inside = i < total
        # One division in 64 bits, the others within an image.
        patch = (begin % patches).to(patches.dtype) + tl.arange(0, BLOCK)
        image = begin // patches + patch // patches
        patch = (patch % patches).to(tl.int64)
        score = logits + image * logits_image + patch * logits_patch
        if PAIR:
            real = tl.load(score, mask=inside, other=0.0).to(WIDE)
            fake = tl.load(score + logits_channel, mask=inside, other=0.0).to(WIDE)
            # A softmax with an infinite logit has no value.
            infinite = (real == float("inf")) | (fake == float("inf"))
            z = tl.where(infinite, float("nan"), fake - real)
        else:
            z = tl.load(score, mask=inside, other=0.0).to(WIDE)
        term, slope = term_and_slope(z, FORMULA, SIGN, HIT, MISS, TARGET)
        slope *= factor
        hit = tl.where(SIGN * (z - THRESHOLD) < 0, 1.0, 0.0).to(WIDE)
        if weight is not None:
            w = tl.load(weight + image * weight_image + patch * weight_patch, mask=inside, other=0.0).to(WIDE)
            # A patch of weight zero is taken out, whatever its logits are.
            term = tl.where(w == 0, 0.0, term * w)
            slope = tl.where(w == 0, 0.0, slope * w)
            hit = tl.where(w == 0, 0.0, hit * w)
        loss += tl.where(inside, term, 0.0)
        right += tl.where(inside, hit, 0.0)
        if terms is not None:
            tl.store(terms + i, term, mask=inside)
        if grad is not None:
            g = grad + image * grad_image + patch * grad_patch
            if PAIR:
                tl.store(g, -slope, mask=inside)
                tl.store(g + grad_channel, slope, mask=inside)
            else:
                tl.store(g, slope, mask=inside)
    tl.store(losses + first + program, tl.sum(loss, 0) * factor)
    tl.store(rights + first + program, tl.sum(right, 0) * share)


@triton.jit(do_not_specialize=["total", "steps", "divisor", "first"])
def l1_kernel(
    a,
    b,
    grad_a,  # or None
    grad_b,  # or None
    scale_tensor,  # [] or None
    scale,
    losses,  # [programs of all terms]
    total,
    steps,
    divisor,
    first,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale / divisor * ‖a − b‖₁ over `total` dense entries, and its gradients."""
    program = tl.program_id(0)
    if scale_tensor is not None:
        factor = tl.load(scale_tensor).to(WIDE) / divisor.to(WIDE)
    else:
        factor = scale / divisor.to(WIDE)
    loss = tl.zeros([BLOCK], WIDE)
    for step in range(steps):
        i = (program.to(tl.int64) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = i < total
        d = tl.load(a + i, mask=inside, other=0.0).to(WIDE) - tl.load(b + i, mask=inside, other=0.0).to(WIDE)
        loss += tl.abs(d)
        slope = tl.where(d > 0, factor, tl.where(d < 0, -factor, 0.0))  # PyTorch's at NaN, too
        if grad_a is not None:
            tl.store(grad_a + i, slope, mask=inside)
        if grad_b is not None:
            tl.store(grad_b + i, -slope, mask=inside)
    tl.store(losses + first + program, tl.sum(loss, 0) * factor)


@triton.jit(do_not_specialize=["losses_count", "real_count", "rights_count"])
def finish_kernel(
    losses,
    rights,  # or None
    loss,  # []
    real_accuracy,  # [] or None
    fake_accuracy,  # [] or None
    losses_count,
    real_count,
    rights_count,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of losses, rights[:real_count] and rights[real_count:rights_count], by one program."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], WIDE)
    for start in range(0, losses_count, BLOCK):
        total += tl.load(losses + start + lane, mask=start + lane < losses_count, other=0.0)
    tl.store(loss, tl.sum(total, 0))
    if real_accuracy is not None:
        total = tl.zeros([BLOCK], WIDE)
        for start in range(0, real_count, BLOCK):
            total += tl.load(rights + start + lane, mask=start + lane < real_count, other=0.0)
        tl.store(real_accuracy, tl.sum(total, 0).to(tl.float32))
    if fake_accuracy is not None:
        total = tl.zeros([BLOCK], WIDE)
        for start in range(real_count, rights_count, BLOCK):
            total += tl.load(rights + start + lane, mask=start + lane < rights_count, other=0.0)
        tl.store(fake_accuracy, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["total", "patches", "divisor", "count", "first"])
def patch_head_kernel(
    x,  # image, channel and patch strides below
    weight,  # [1 or 2, C]
    bias,  # [1 or 2], or None
    grad,  # like x, or None
    sums,  # [programs of both sides, C + 1]: weight gradients, bias gradient; or None
    losses,  # [programs of both sides]
    rights,  # [programs of both sides]
    total,
    patches,
    channels,
    divisor,
    count,
    first,
    x_image,
    x_channel,
    x_patch,
    PAIR: tl.constexpr,
    FORMULA: tl.constexpr,
    SIGN: tl.constexpr,
    HIT: tl.constexpr,
    MISS: tl.constexpr,
    TARGET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The last 1×1 convolution and the loss. Two classes act as one channel, their weights' difference."""
    program = tl.program_id(0)
    begin = program.to(tl.int64) * BLOCK_P
    inside = begin + tl.arange(0, BLOCK_P) < total
    patch = (begin % patches).to(patches.dtype) + tl.arange(0, BLOCK_P)
    base = (begin // patches + patch // patches) * x_image + (patch % patches).to(tl.int64) * x_patch
    lane = tl.arange(0, BLOCK_C)
    z = tl.zeros([BLOCK_P], WIDE)
    if bias is not None:
        if PAIR:
            z += tl.load(bias + 1).to(WIDE) - tl.load(bias).to(WIDE)
        else:
            z += tl.load(bias).to(WIDE)
    for start in range(0, channels, BLOCK_C):
        c = start + lane
        known = c < channels
        w = tl.load(weight + c, mask=known, other=0.0).to(WIDE)
        if PAIR:
            w = tl.load(weight + channels + c, mask=known, other=0.0).to(WIDE) - w
        at = base[:, None] + c[None, :].to(tl.int64) * x_channel
        v = tl.load(x + at, mask=inside[:, None] & known[None, :], other=0.0).to(WIDE)
        z += tl.sum(v * w[None, :], 1)
    if PAIR:
        z += z - z  # infinite where both classes are: their loss is NaN
    term, slope = term_and_slope(z, FORMULA, SIGN, HIT, MISS, TARGET)
    factor = 1.0 / divisor.to(WIDE)
    slope = tl.where(inside, slope * factor, 0.0)
    hit = tl.where(inside & (SIGN * (z - THRESHOLD) < 0), 1.0, 0.0).to(WIDE)
    tl.store(losses + first + program, tl.sum(tl.where(inside, term, 0.0), 0) * factor)
    tl.store(rights + first + program, tl.sum(hit, 0) / count.to(WIDE))
    if grad is not None or sums is not None:
        for start in range(0, channels, BLOCK_C):
            c = start + lane
            known = c < channels
            at = base[:, None] + c[None, :].to(tl.int64) * x_channel
            both = inside[:, None] & known[None, :]
            if grad is not None:
                w = tl.load(weight + c, mask=known, other=0.0).to(WIDE)
                if PAIR:
                    w = tl.load(weight + channels + c, mask=known, other=0.0).to(WIDE) - w
                tl.store(grad + at, slope[:, None] * w[None, :], mask=both)
            if sums is not None:
                v = tl.load(x + at, mask=both, other=0.0).to(WIDE)
                row = sums + (first + program).to(tl.int64) * (channels + 1)
                tl.store(row + c, tl.sum(slope[:, None] * v, 0), mask=known)
        if sums is not None:
            row = sums + (first + program).to(tl.int64) * (channels + 1)
            tl.store(row + channels, tl.sum(slope, 0))


@triton.jit(do_not_specialize=["rows"])
def head_weight_kernel(
    sums,  # [rows, C + 1]
    grad_weight,  # [1 or 2, C]
    grad_bias,  # [1 or 2], or None
    rows,
    channels,
    PAIR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the rows in their order; of two classes the first gets the negative."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        both = (r < rows)[:, None] & (c <= channels)[None, :]
        total += tl.load(sums + r[:, None].to(tl.int64) * (channels + 1) + c[None, :], mask=both, other=0.0)
    g = tl.sum(total, 0)
    if PAIR:
        tl.store(grad_weight + c, -g, mask=c < channels)
        tl.store(grad_weight + channels + c, g, mask=c < channels)
    else:
        tl.store(grad_weight + c, g, mask=c < channels)
    if grad_bias is not None:
        if PAIR:
            tl.store(grad_bias + c - channels, -g, mask=c == channels)
            tl.store(grad_bias + c - channels + 1, g, mask=c == channels)
        else:
            tl.store(grad_bias + c - channels, g, mask=c == channels)


@triton.jit
def scale_kernel(x, factor, total, BLOCK: tl.constexpr):
    """x *= factor over `total` dense entries, which are not touched where the factor is 1."""
    f = tl.load(factor)
    if f != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + i, mask=i < total, other=0.0)
        tl.store(x + i, v * f.to(x.dtype.element_ty), mask=i < total)


FORMULAS = {"softmax": LOG, "bce": LOG, "lsgan": SQUARE, "hinge": HINGE, "wgan": LINEAR}


def _formula(kind: str, real: bool, smoothing: float) -> dict[str, object]:
    """The constants of the kernels for one side of a loss."""
    formula = FORMULAS[kind]
    if formula is LOG and smoothing > 0:
        formula = LOG_SMOOTH
    return {
        "PAIR": kind == "softmax",
        "FORMULA": formula.value,
        "SIGN": 1.0 if real == (kind == "softmax") else -1.0,
        "HIT": 1 - smoothing / 2,
        "MISS": smoothing / 2,
        "TARGET": 1 - smoothing / 2 if real else smoothing / 2,
        "THRESHOLD": 0.5 if kind == "lsgan" else 0.0,
    }


def _generator(kind: str) -> str:
    """The kind whose term of a real patch is the generator's."""
    return "wgan" if kind == "hinge" else kind


def _divisor(reduction: str, images: int, total: int) -> int:
    """What a sum is divided by."""
    return {"mean": total, "sum": 1, "batchmean": images}[reduction]


def _plane(x: Tensor) -> Tensor:
    """`x` (N, C, H, W), copied if H and W do not make one arithmetic sequence of addresses together."""
    _, _, h, w = x.shape
    return x if h <= 1 or w <= 1 or x.stride(2) == x.stride(3) * w else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of the image, the channel and the patch."""
    return x.stride(0), x.stride(1), x.stride(2) if x.shape[3] == 1 else x.stride(3)


def _absent(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=wide_dtype(x))


def _programs(logits: Tensor) -> int:
    return pieces(logits.shape[0] * logits.shape[2] * logits.shape[3], BLOCK)[0]


def _side(
    logits: Tensor,
    weight: Tensor | None,
    kind: str,
    real: bool,
    reduction: str,
    smoothing: float,
    need_grad: bool,
    losses: Tensor,
    rights: Tensor,
    first: int,
    terms: Tensor | None = None,
) -> Tensor:
    """Launch one side of a loss; the gradient, empty where it is not needed."""
    logits = _plane(logits)
    n, _, h, w = logits.shape
    total = n * h * w
    programs, steps = pieces(total, BLOCK)
    grad = torch.empty_like(logits, dtype=wide_dtype(logits)) if need_grad else None
    total_weight = None
    if weight is not None:
        weight = _plane(weight)
        total_weight = weight.sum()
    launch(
        patch_loss_kernel,
        (programs,),
        *(logits, weight, total_weight, terms, grad, losses, rights),
        *(total, max(1, h * w), steps, _divisor(reduction, n, total), total, first),
        *_strides(logits),
        *(_strides(grad) if grad is not None else (0, 0, 0)),
        *(_strides(weight)[::2] if weight is not None else (0, 0)),
        **_formula(kind, real, smoothing),
        WEIGHTED_MEAN=reduction == "mean",
        WIDE=wide_tl(logits),
        BLOCK=BLOCK,
    )
    return _absent(logits) if grad is None else grad


def _l1(
    refined: Tensor,
    synthetic: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    reduction: str,
    refined_grad: bool,
    synthetic_grad: bool,
    losses: Tensor,
    first: int,
) -> tuple[Tensor, Tensor]:
    """Launch the ℓ₁ term; the two gradients, empty where not needed."""
    last = torch.channels_last
    if not (
        refined.dim() == 4
        and refined.is_contiguous(memory_format=last)
        and synthetic.is_contiguous(memory_format=last)
    ):
        refined, synthetic = refined.contiguous(), synthetic.contiguous()
    wide = wide_dtype(refined)
    a = torch.empty_like(refined, dtype=wide) if refined_grad else None
    b = torch.empty_like(synthetic, dtype=wide) if synthetic_grad else None
    if scale_tensor is None and wide == torch.float64:  # a float argument of a kernel is float32
        scale_tensor = torch.full((), scale, dtype=wide, device=refined.device)
    total = refined.numel()
    programs, steps = pieces(total, BLOCK)
    images = refined.shape[0] if refined.dim() else 1
    launch(
        l1_kernel,
        (programs,),
        *(refined, synthetic, a, b, scale_tensor, float(scale), losses, total, steps),
        *(_divisor(reduction, images, total), first),
        WIDE=wide_tl(refined),
        BLOCK=BLOCK,
    )
    return _absent(refined) if a is None else a, _absent(synthetic) if b is None else b


def _finish(
    losses: Tensor, rights: Tensor | None, real_programs: int, accuracies: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and `accuracies` (0 to 2) accuracies."""
    loss = losses.new_empty(())
    real = losses.new_empty((), dtype=torch.float32) if accuracies > 0 else None
    fake = losses.new_empty((), dtype=torch.float32) if accuracies > 1 else None
    launch(
        finish_kernel,
        (1,),
        *(losses, rights, loss, real, fake, losses.shape[0], real_programs, losses.shape[0]),
        WIDE=wide_tl(losses),
        BLOCK=BLOCK,
    )
    return loss, real, fake


@operator
def patch_discriminator_loss(
    real: Tensor,
    fake: Tensor,
    real_weight: Tensor | None,
    fake_weight: Tensor | None,
    kind: str,
    reduction: str,
    label_smoothing: float,
    real_grad: bool,
    fake_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, accuracy on real and on fake patches, d loss / d real, d loss / d fake."""
    n, m = _programs(real), _programs(fake)
    losses = real.new_empty(n + m, dtype=wide_dtype(real))
    rights = torch.empty_like(losses)
    smooth = label_smoothing
    r = _side(real, real_weight, kind, True, reduction, smooth, real_grad, losses, rights, 0)
    f = _side(fake, fake_weight, kind, False, reduction, smooth, fake_grad, losses, rights, n)
    loss, real_accuracy, fake_accuracy = _finish(losses, rights, n, 2)
    assert real_accuracy is not None and fake_accuracy is not None
    return loss, real_accuracy, fake_accuracy, r, f


@operator
def patch_generator_loss(
    fake: Tensor, weight: Tensor | None, kind: str, reduction: str, grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss, d loss / d fake."""
    losses = fake.new_empty(_programs(fake), dtype=wide_dtype(fake))
    g = _side(fake, weight, _generator(kind), True, reduction, 0.0, grad, losses, torch.empty_like(losses), 0)
    return _finish(losses, None, 0, 0)[0], g


@operator
def patch_loss_map(
    logits: Tensor, weight: Tensor | None, kind: str, real: bool, label_smoothing: float, grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted terms (N, 1, H, W), accuracy, d term / d logits."""
    n, _, h, w = logits.shape
    terms = logits.new_empty((n, 1, h, w), dtype=wide_dtype(logits))
    losses = logits.new_empty(_programs(logits), dtype=terms.dtype)
    rights = torch.empty_like(losses)
    g = _side(logits, weight, kind, real, "sum", label_smoothing, grad, losses, rights, 0, terms)
    accuracy = _finish(losses, rights, losses.shape[0], 1)[1]
    assert accuracy is not None
    return terms, accuracy, g


@operator
def self_regularization(
    refined: Tensor,
    synthetic: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    reduction: str,
    refined_grad: bool,
    synthetic_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, d loss / d refined, d loss / d synthetic."""
    losses = refined.new_empty(pieces(refined.numel(), BLOCK)[0], dtype=wide_dtype(refined))
    a, b = _l1(refined, synthetic, scale_tensor, scale, reduction, refined_grad, synthetic_grad, losses, 0)
    return _finish(losses, None, 0, 0)[0], a, b


@operator
def refiner_loss(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Generator loss + scale · ‖refined − synthetic‖₁, its gradients by fake, refined and synthetic."""
    n = _programs(fake)
    wide = torch.promote_types(wide_dtype(fake), wide_dtype(refined))
    losses = fake.new_empty(n + pieces(refined.numel(), BLOCK)[0], dtype=wide)
    f = _side(
        fake, None, _generator(kind), True, reduction, 0.0, fake_grad, losses, torch.empty_like(losses), 0
    )
    a, b = _l1(refined, synthetic, scale_tensor, scale, reduction, refined_grad, synthetic_grad, losses, n)
    return _finish(losses, None, 0, 0)[0], f, a, b


@operator
def patch_head_discriminator_loss(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, two accuracies, gradients by real, fake, weight and bias."""
    weight = weight.contiguous()
    channels = real.shape[1]
    totals = [x.shape[0] * x.shape[2] * x.shape[3] for x in (real, fake)]
    programs = [max(1, triton.cdiv(total, HEAD_PATCHES)) for total in totals]
    wide = wide_dtype(real)
    losses = real.new_empty(sum(programs), dtype=wide)
    rights = torch.empty_like(losses)
    sums = real.new_empty((sum(programs), channels + 1), dtype=wide) if weight_grad else None
    grads = []
    for x, total, first, count, need_grad, is_real in (
        (real, totals[0], 0, programs[0], real_grad, True),
        (fake, totals[1], programs[0], programs[1], fake_grad, False),
    ):
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        grad = torch.empty_like(x, dtype=wide) if need_grad else None
        divisor = _divisor(reduction, x.shape[0], total)
        launch(
            patch_head_kernel,
            (count,),
            *(x, weight, None if bias is None else bias.contiguous(), grad, sums, losses, rights),
            *(total, max(1, x.shape[2] * x.shape[3]), channels, divisor, total, first),
            *_strides(x),
            **_formula(kind, is_real, label_smoothing),
            WIDE=wide_tl(x),
            BLOCK_P=HEAD_PATCHES,
            BLOCK_C=HEAD_CHANNELS,
        )
        grads.append(_absent(x) if grad is None else grad)
    loss, real_accuracy, fake_accuracy = _finish(losses, rights, programs[0], 2)
    assert real_accuracy is not None and fake_accuracy is not None
    grad_weight, grad_bias = _absent(weight), _absent(weight)
    if sums is not None:
        grad_weight = torch.empty_like(weight, dtype=wide)
        if bias is not None:
            grad_bias = torch.empty_like(bias, dtype=wide)
        launch(
            head_weight_kernel,
            (triton.cdiv(channels + 1, HEAD_CHANNELS),),
            *(sums, grad_weight, grad_bias if bias is not None else None, sums.shape[0], channels),
            PAIR=kind == "softmax",
            WIDE=wide_tl(weight),
            BLOCK_R=64,
            BLOCK_C=HEAD_CHANNELS,
        )
    return loss, real_accuracy, fake_accuracy, grads[0], grads[1], grad_weight, grad_bias


@operator(mutates=("first", "second"))
def patch_loss_scale_(first: Tensor, second: Tensor, factor: Tensor) -> None:
    """Multiplies both dense tensors by the 0-dim factor."""
    for x in (first, second):
        if x.numel() > 0:
            launch(scale_kernel, (triton.cdiv(x.numel(), BLOCK),), x, factor, x.numel(), BLOCK=BLOCK)
