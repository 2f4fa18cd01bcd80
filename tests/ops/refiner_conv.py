"""What the tests of the convolutions share."""

import torch

from fastda.tools.verify import lay_out
from tests.common import (
    draw,
)

F32 = torch.float32

CHANNELS_LAST = torch.channels_last


def conv(sizes, dtype=F32, **options):
    return draw("conv_same", sizes, dtype, **{"bias": True, "residual": None, "relu": True, **options})


def block(sizes, dtype=F32):
    return draw("refiner_block", sizes, dtype)


def images_as(arguments, layout):
    def lay(v):
        if not isinstance(v, torch.Tensor) or v.dim() != 4 or layout is None:
            return v
        return layout(v.detach()).requires_grad_(v.requires_grad)

    return {n: lay(v) for n, v in arguments.items()}


def inset(x):
    """A view of the middle of a larger image whose rim is NaN."""
    n, c, h, w = x.shape
    wide = x.new_full((n + 1, c + 2, h + 2, w + 3), torch.nan)
    view = wide[1:, 1:-1, 1:-1, 2:-1]
    return view.copy_(x)


def inset_channels_last(x):
    wide = x.new_full((x.shape[0], x.shape[2] + 2, x.shape[3] + 3, x.shape[1] + 2), torch.nan)
    view = wide[:, 1:-1, 2:-1, 1:-1].permute(0, 3, 1, 2)
    return view.copy_(x)


LAYOUTS = {
    "contiguous": lambda x: lay_out(x, "contiguous"),
    "channels_last": lambda x: lay_out(x, "channels_last"),
    "strided": lambda x: lay_out(x, "strided"),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "inset": inset,
    "inset channels_last": inset_channels_last,
}

X, W, B = torch.randn(2, 3, 7, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
