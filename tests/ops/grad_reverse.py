"""What the tests of gradient reversal share."""

from pathlib import Path

import pytest
import torch

from tests.common import (
    draw,
)

ROOT = Path(__file__).resolve().parents[2]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

independent = pytest.mark.isa_independent


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def grads_of(y, inputs, grad=None, **options):
    return torch.autograd.grad(y, inputs, torch.ones_like(y) if grad is None else grad, **options)


def scales(n, dtype=torch.float32):
    """Every form of a scale, each with its value as float64."""
    sample = torch.rand(n, dtype=dtype) + 0.5
    return {
        "float": (0.7, torch.tensor(0.7, dtype=torch.float64)),
        "int": (2, torch.tensor(2.0, dtype=torch.float64)),
        "0-dim": (torch.tensor(0.3), torch.tensor(0.3).double()),
        "0-dim float64": (torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)),
        "per sample": (sample, sample.double()),
        "per sample, strided": (sample.repeat_interleave(2)[::2], sample.double()),
        "negative": (-1.5, torch.tensor(-1.5, dtype=torch.float64)),
    }


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
}


def calls(scale):
    yield "grad_reverse", draw("grad_reverse", (5, 7), torch.float32, scale=scale)
    yield "grad_reverse_linear", draw("grad_reverse_linear", (5, 7, 3), torch.float32, bias=True, scale=scale)
