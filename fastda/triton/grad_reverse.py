"""Gradient reversal, backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastda.triton.common import launch, operator, wide_tl

BLOCK = 1024


@triton.jit(do_not_specialize=["inner"])
def negate_scale_kernel(
    grad, scale, out, total, inner, PER_SAMPLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = -scale * grad[i] over `total` dense entries; the scale of entry i is scale[i // inner]."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    i = begin + tl.arange(0, BLOCK)
    inside = i < total
    g = tl.load(grad + i, mask=inside, other=0.0).to(WIDE)
    if PER_SAMPLE:
        sample = begin // inner + ((begin % inner).to(inner.dtype) + tl.arange(0, BLOCK)) // inner
        factor = tl.load(scale + sample, mask=inside, other=0.0).to(WIDE)
    else:
        factor = tl.load(scale).to(WIDE)
    tl.store(out + i, (-factor * g).to(out.dtype.element_ty), mask=inside)


@operator
def grad_reverse_backward(grad: Tensor, scale: Tensor) -> Tensor:
    """−scale · grad; `scale` is 0-dim, or one value per entry of dim 0, on grad's device."""
    per_sample = scale.dim() == 1
    dense = grad.is_contiguous() or (
        grad.dim() == 4 and grad.is_contiguous(memory_format=torch.channels_last)
    )
    wanted = grad
    if not dense:
        grad = grad.contiguous()
    out = torch.empty_like(grad)
    total = grad.numel()
    if total > 0:
        launch(
            negate_scale_kernel,
            (triton.cdiv(total, BLOCK),),
            *(grad, scale.contiguous(), out, total, total // grad.shape[0] if per_sample else 1),
            PER_SAMPLE=per_sample,
            WIDE=wide_tl(grad),
            BLOCK=BLOCK,
        )
    # As the operator declares it: a transposed gradient gives a transposed result.
    return out if dense else torch.empty_like(wanted).copy_(out)
