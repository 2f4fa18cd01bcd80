"""Max-pooling in a model that exists: contiguous images, of which torch pools one channel after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastda import _torch
from fastda.ops.pool import NO_INDEX, relu_max_pool
from fastda.optimize.stand_in import PLAIN, Found, StandIn, is_alone, is_torchs, not_on_cpu

_FORWARD, _MAX_POOL2D = nn.MaxPool2d.forward, F.max_pool2d
# Where it was measured to be faster, on the CPU: from so many elements on, and up to this stride.
LEAST_ELEMENTS = 1 << 16
MOST_STRIDE = 2


def find(module: nn.Module) -> Iterator[Found]:
    """A pooling's stand-in, or why it is left."""
    if type(module) is nn.MaxPool2d and "forward" not in vars(module):
        reason = "has settings that are PyTorch's" if _settings(module) is None else not_on_cpu(module)
        if not (is_torchs(_FORWARD) and is_torchs(_MAX_POOL2D)):
            reason = "torch's max-pooling was patched before fastda was imported"
        what = f"max-pooling → relu_max_pool, of contiguous images of {LEAST_ELEMENTS:,} elements or more"
        yield Found(reason) if reason else Found(what, Pool(module))


def _settings(pool: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool] | None:
    """Kernel, stride, padding, ceil_mode; None if they are not what `relu_max_pool` is faster with."""
    kernel, stride, padding = _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)
    if kernel is None or stride is None or padding is None or _pair(pool.dilation) != (1, 1):
        return None
    fits = all(
        k >= 1 and 1 <= s <= MOST_STRIDE and 0 <= 2 * p <= k
        for k, s, p in zip(kernel, stride, padding, strict=True)
    )
    if not fits or kernel[0] * kernel[1] > NO_INDEX or type(pool.ceil_mode) is not bool:
        return None
    return None if pool.return_indices is not False else (kernel, stride, padding, pool.ceil_mode)


def _pair(value: Any) -> tuple[int, int] | None:
    if type(value) is int:
        return value, value
    plain = type(value) in (tuple, list) and len(value) == 2 and all(type(v) is int for v in value)
    return (value[0], value[1]) if plain else None


def side_by_side(pool: Any) -> int | None:
    """The size of its windows, where they are square and lie side by side."""
    if type(pool) is not nn.MaxPool2d or (settings := _settings(pool)) is None:
        return None
    kernel, stride, padding, ceil_mode = settings
    plain = kernel[0] == kernel[1] and stride == kernel and padding == (0, 0) and not ceil_mode
    return kernel[0] if plain else None


def windows(pool: Any) -> int | None:
    """The same, where nothing but its stand-in is called for it."""
    stand_in = vars(pool).get("forward")
    if not isinstance(stand_in, Pool) or stand_in.module is not pool or not is_alone(pool):
        return None
    torchs = type(pool).forward is _FORWARD and F.max_pool2d is _MAX_POOL2D
    return side_by_side(pool) if torchs else None


class Pool(StandIn):
    """`nn.MaxPool2d.forward` by relu_max_pool without the ReLU."""

    method = "forward"

    def __call__(self, input: Tensor) -> Any:
        pool = self.module
        settings = None
        if (
            type(input) in PLAIN
            and not is_compiling()  # a compiler has kernels of its own
            and not (torch.jit.is_tracing() or _torch.modes_active() or _torch.transforms_active())
            and type(pool).forward is _FORWARD
            and F.max_pool2d is _MAX_POOL2D
            and input.is_cpu
            and input.layout is torch.strided
            and not input.is_nested
            and input.dtype in (torch.float32, torch.float64)
            and input.dim() == 4
            and input.numel() >= max(1, LEAST_ELEMENTS)
            and input.is_contiguous()
            and not input.is_contiguous(memory_format=torch.channels_last)
        ):
            settings = _settings(pool)
        if settings is not None:
            kernel, _, padding, _ = settings
            if any(n + 2 * p < k for n, p, k in zip(input.shape[2:], padding, kernel, strict=True)):
                settings = None
        if not self.count(settings is not None):
            return type(pool).forward(pool, input)
        kernel, stride, padding, ceil_mode = settings  # type: ignore[misc]
        return relu_max_pool(input, kernel, stride, padding, ceil_mode=ceil_mode, relu=False)
