"""Convolutions in a model that exists: what `nn.Conv2d.forward` calls with its input, weight and bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastda import _torch
from fastda.ops.refiner_conv import conv2d, conv2d_max_pool, conv_same
from fastda.optimize import norm
from fastda.optimize import pool as pooling
from fastda.optimize.stand_in import (
    PLAIN,
    Found,
    StandIn,
    as_torch_has_it,
    copies_of_its_own,
    is_alone,
    is_torchs,
    not_on_cpu,
)

_DTYPES = (torch.float32, torch.float64)
_CONV_FORWARD, _CONV2D, _PAD = nn.Conv2d._conv_forward, F.conv2d, F.pad

# Where the convolutions were measured to be faster than PyTorch's, on the CPU (docs/performance.md).
FAST_KERNELS = (1, 3, 5, 7)
LEAST_CHANNELS, LEAST_CHANNELS_DILATED = 16, 64
# Fewer channels: in first layers, by the kernel the least of them and of output channels; in last layers.
MOST_OF_FEW, FIRST_LAYERS, LAST_LAYERS = 4, {5: (3, 32), 7: (2, 16)}, (3, 5, 7)
LEAST_SIZE = 4
# Filters with which a max-pooling behind them is faster in one.
POOLED = (3, 5, 7)
# They go by tiles of 4×4 pixels, of which one pixel in so many must be wanted. And they have a fixed cost:
# a call must be of so many products of a tap.
WANTED_OF = 2
LEAST_PRODUCTS = 1 << 18
# 7×7 and float64 transform their filters at a higher cost: they must be few, and the pixels many.
LEAST_PIXELS = 2048
MOST_FILTERS = {3: 1 << 16, 7: 1 << 14}
LEAST_SIZE_OF_7 = 16
# 5×5 go by tiles of 3×3 pixels. At most so many filters may come to one pixel. Without padding half of the
# tiles' pixels must be wanted, and many pixels may have twice as many filters each; with it more of the
# tiles' pixels in small results, of which there must be many.
LEAST_SIZE_OF_5, LEAST_PIXELS_OF_5, FILTERS_OF_A_PIXEL, PIXELS_OF_MORE_FILTERS = 3, 256, 32, 512
LEAST_SIZE_OF_PADDED_5, SMALL_OF_5, MANY_OF_5, WANTED_OF_SMALL_5, LARGE_OF_5 = 6, 10, 1024, 0.7, 16
LEAST_PIXELS_OF_FIRST_5 = 400
# Fewer channels in and out, without padding: the least of them.
FEW_OF_5, LEAST_SIZE_OF_FEW_5 = (10, 20), 6
# 4×4 with a stride of 2, in float32: so many filters at most, and tiles of the result at least.
MOST_FILTERS_OF_STRIDE_2, LEAST_TILES = 1 << 15, 64
# 1×1 go by contiguous images alone, of so many channels and products. From 16 images on, or with several
# threads, PyTorch calls oneDNN, which is as fast on images of few pixels, and was not beaten with more
# filters.
LEAST_CHANNELS_OF_1, LEAST_PRODUCTS_OF_1, FILTERS_OF_A_PIXEL_OF_1 = 64, 1 << 27, 1 << 12
LEAST_AREA_OF_1, LEAST_AREA_BESIDE_ONEDNN, MOST_FILTERS_BESIDE_ONEDNN = 49, 196, 1 << 18


def find(module: nn.Module) -> Iterator[Found]:
    """A convolution's stand-in, or why it is left."""
    if isinstance(module, nn.Conv2d) and "_conv_forward" not in vars(module):
        if left := reason(module):
            yield Found(left)
        else:
            yield Found("convolution → conv_same", Convolution(module))


def reason(conv: nn.Conv2d) -> str | None:
    """Why this layer is left. Its weight is not looked at: reading a parametrised one may change it."""
    if isinstance(conv, nn.LazyConv2d):
        return "has no weight yet: call the model once before fastda.optimize"
    if not (is_torchs(_CONV_FORWARD) and is_torchs(_CONV2D)):
        return "torch's convolution was patched before fastda was imported"
    if type(conv)._conv_forward is not _CONV_FORWARD:
        return "its class has a _conv_forward of its own"
    kind = type(conv)
    if nn.utils.parametrize.is_parametrized(conv):
        kind = kind.__bases__[0]
    if own := copies_of_its_own(kind, nn.Conv2d):
        return f"its class has a {own} of its own"
    shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    refusal = _refusal(conv, shape) or not_on_cpu(conv)
    fast = _DTYPES if conv.stride == (1, 1) else (torch.float32,)
    dtypes = {parameter.dtype for parameter in conv.parameters()}
    return refusal or next((f"no faster in {dtype}" for dtype in dtypes if dtype not in fast), None)


def _refusal(conv: nn.Conv2d, weight: tuple[int, ...]) -> str | None:
    """Why `conv2d` does not serve this layer with a weight of this shape; None if it does."""
    out_channels, in_channels, k, width = weight
    halves = k == width == 4 and _is_pair_of(conv.stride, 2)
    if not halves and (k != width or k % 2 == 0):
        return f"kernel ({k}, {width}) is not square and odd"
    if not halves and not _is_pair_of(conv.stride, 1):
        return f"stride {conv.stride}"
    if not _is_pair_of(conv.dilation) or conv.dilation[0] == 0 or (halves and conv.dilation[0] > 1):
        return f"dilation {conv.dilation}"
    if type(conv.groups) is not int or conv.groups != 1:
        return f"groups {conv.groups}"
    dilation, padding = conv.dilation[0], _padding(conv, k)
    if halves and (min(out_channels, in_channels) < LEAST_CHANNELS or padding is None or padding >= k):
        return f"no faster from {in_channels} to {out_channels} channels with a padding of {conv.padding}"
    if halves and out_channels * in_channels > MOST_FILTERS_OF_STRIDE_2:
        return f"no faster with a stride of 2 from {in_channels} to {out_channels} channels"
    if halves:
        return None
    if dilation > 1 and (k != 3 or padding != dilation or conv.padding_mode != "zeros"):
        return f"dilation {conv.dilation} of another kernel than 3×3, or without zeros up to the same size"
    if padding is None or padding > dilation * (k // 2):
        return (
            f"padding {conv.padding} is more than half of the {k}×{k} kernel, or not the same on every side"
        )
    if k not in FAST_KERNELS:
        return f"no faster with {k}×{k} kernels"
    least = LEAST_CHANNELS_DILATED if dilation > 1 else LEAST_CHANNELS_OF_1 if k == 1 else LEAST_CHANNELS
    few = k == 5 and padding == 0 and in_channels >= FEW_OF_5[0] and out_channels >= FEW_OF_5[1]
    if min(out_channels, in_channels) < least and (dilation > 1 or not (few or _is_first_or_last(weight))):
        return f"no faster with less than {least} channels" + ", dilated" * (dilation > 1)
    return None


def _is_first_or_last(weight: tuple[int, ...]) -> bool:
    """Whether a layer from or to a few channels is faster all the same."""
    out_channels, in_channels, k, _ = weight
    if out_channels <= MOST_OF_FEW:
        return in_channels >= LEAST_CHANNELS and k in LAST_LAYERS
    least_in, least_out = FIRST_LAYERS.get(k, (MOST_OF_FEW + 1, 0))
    return least_in <= in_channels <= MOST_OF_FEW and out_channels >= least_out


def _padding(conv: nn.Conv2d, k: int) -> int | None:
    """How many pixels the layer pads on every side; None if not everywhere the same."""
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        padding, *others = conv._reversed_padding_repeated_twice
        return padding if type(padding) is int and others == [padding] * 3 else None
    if type(padding) is str:
        return {"same": conv.dilation[0] * (k // 2), "valid": 0}.get(padding)
    return padding[0] if _is_pair_of(padding) else None


def _is_pair_of(value: Any, number: int | None = None) -> bool:
    """Whether torch's setting is two equal ints, not of those that torch refuses or takes otherwise."""
    if type(value) is not tuple or len(value) != 2 or type(value[0]) is not int or type(value[1]) is not int:
        return False
    return value[0] == value[1] >= 0 and number in (None, value[0])


class Convolution(StandIn):
    """`nn.Conv2d._conv_forward` by conv_same or conv2d."""

    method = "_conv_forward"
    # Settings that were found to be served, and the padding that they mean.
    _fit: tuple[Any, ...] = (None,) * 7

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        conv = self.module
        padding = self._padding(conv, input, weight, bias)
        if self.count(padding is not None):
            return _convolve(conv, input, weight, bias, padding)
        return type(conv)._conv_forward(conv, input, weight, bias)

    def mirror(self, x: Any, p: int) -> Tensor | None:
        """The convolution of x with p mirrored pixels around it; None, nothing done, where it is torch's."""
        conv = self.module
        weight, bias = conv.weight, conv.bias
        if self._padding(conv, x, weight, bias, p) != 0 or weight.shape[2] != 2 * p + 1:
            return None
        if min(x.shape[2:]) <= p or not _reads_border(x, weight):
            return None
        self.count(True)
        return conv_same(x, weight, bias, padding_mode="reflect")

    def pool(self, x: Any, size: int, relu: bool) -> Tensor | None:
        """The convolution of x, (rectified,) and its max-pooling in windows side by side; None as above."""
        conv = self.module
        weight, bias = conv.weight, conv.bias
        padding = self._padding(conv, x, weight, bias)
        if padding is None or conv.padding_mode != "zeros" or not conv.stride == conv.dilation == (1, 1):
            return None
        k = weight.shape[2]
        least = min(x.shape[2:]) + 2 * padding + 1 - k
        if k not in POOLED or not 1 <= size <= 15 or least < size:
            return None
        self.count(True)
        return conv2d_max_pool(x, weight, bias, padding=padding, kernel_size=size, relu=relu)

    def _padding(self, conv: Any, x: Any, weight: Any, bias: Any, mirrored: int = 0) -> int | None:
        """The layer's padding, if this call gains and its result is torch's; None if not.

        mirrored: the padding of x that another layer was to add.
        """
        if type(x) not in PLAIN or type(weight) not in PLAIN or not (bias is None or type(bias) in PLAIN):
            return None
        compiling = is_compiling()
        # A small call is to lose no more than this much. A compiler may not know yet how large it is.
        if not compiling and (torch.jit.is_tracing() or x.numel() * weight.shape[0] < LEAST_PRODUCTS):
            return None
        if (
            type(conv)._conv_forward is not _CONV_FORWARD
            or F.conv2d is not _CONV2D
            or (_torch.exporting() if compiling else _torch.modes_active())
            or not (x.is_cpu and weight.is_cpu)
            or x.layout is not torch.strided
            or x.is_nested
            or x.dim() != 4
            or weight.dim() != 4
        ):
            return None
        shape, dtype, fit = weight.shape, weight.dtype, self._fit
        if (
            x.shape[1] != shape[1]
            or dtype not in _DTYPES
            or x.dtype != dtype
            or not (bias is None or (bias.dim() == 1 and bias.numel() == shape[0] and bias.is_cpu))
            or not (bias is None or bias.dtype == dtype)
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        if (
            fit[0] == shape
            and fit[1] is conv.stride
            and fit[2] is conv.dilation
            and fit[3] is conv.groups
            and fit[4] is conv.padding
            and fit[5] is conv.padding_mode
        ):
            padding = fit[6]
        else:
            if _refusal(conv, shape) is not None:
                return None
            padding = _padding(conv, shape[2])
            if not compiling and conv.padding_mode == "zeros":
                settings = (conv.stride, conv.dilation, conv.groups, conv.padding, conv.padding_mode)
                self._fit = (shape, *settings, padding)
        # Either operand may make torch's result channels_last; conv_same goes by x alone.
        if (
            (1 in shape or not weight.is_contiguous())
            and _torch.memory_format(weight) is torch.channels_last
            and (
                conv.padding_mode != "zeros" or mirrored or _torch.memory_format(x) is not torch.channels_last
            )
        ):
            return None
        if conv.stride[0] == 2:
            return padding if _pays_halving(x.shape, padding, dtype) else None
        if shape[2] == 1:
            return None if compiling or not _pays_of_1(x, shape) else padding
        dilation = conv.dilation[0]
        border = dilation * (shape[2] // 2) - padding - mirrored
        return padding if _pays(x.shape, shape, border, dtype, dilation) else None


def _pays(
    x: tuple[int, ...], weight: tuple[int, ...], border: int, dtype: torch.dtype, dilation: int = 1
) -> bool:
    """Whether a convolution of x is faster than PyTorch's, where the result is smaller by a border."""
    n, _, height, width = x
    pixels = n * (height - 2 * border) * (width - 2 * border)
    if dilation > 1:  # images of every second pixel, every third, …, with zeros where that does not come out
        n, height, width = n * dilation * dilation, -(-height // dilation), -(-width // dilation)
    out_channels, in_channels, k, _ = weight
    h, w = height - 2 * border, width - 2 * border
    filters = out_channels * in_channels
    least = LEAST_SIZE_OF_5 if k == 5 and dtype == torch.float32 else LEAST_SIZE
    small: tuple[Any, ...] = (h < least, w < least, pixels * filters < LEAST_PRODUCTS)
    small += (dtype == torch.float64 and min(out_channels, in_channels) < LEAST_CHANNELS,)
    if k == 3:
        small += (WANTED_OF * pixels < 16 * n * (-(-h // 4)) * (-(-w // 4)),)
    if k == 5 and dtype == torch.float32:
        tiles = n * (-(-h // 3)) * (-(-w // 3))
        counted = pixels if border < k // 2 or pixels < PIXELS_OF_MORE_FILTERS else 2 * pixels
        small += (
            WANTED_OF * pixels < 9 * tiles,
            pixels < LEAST_PIXELS_OF_5,
            counted * FILTERS_OF_A_PIXEL < filters,
        )
        channels, is_large = min(out_channels, in_channels), h >= LARGE_OF_5 and w >= LARGE_OF_5
        if channels <= MOST_OF_FEW:
            small += (not is_large, pixels < LEAST_PIXELS_OF_FIRST_5)
        elif channels < LEAST_CHANNELS:
            small += (h < LEAST_SIZE_OF_FEW_5, w < LEAST_SIZE_OF_FEW_5)
        elif border < k // 2:
            is_small = h < SMALL_OF_5 or w < SMALL_OF_5
            small += (
                h < LEAST_SIZE_OF_PADDED_5,
                w < LEAST_SIZE_OF_PADDED_5,
                is_small and (pixels < MANY_OF_5 or pixels < WANTED_OF_SMALL_5 * 9 * tiles),
                channels < 2 * LEAST_CHANNELS and not is_large,
            )
    elif k != 3 or dtype == torch.float64:
        small += pixels < LEAST_PIXELS, filters > MOST_FILTERS.get(k, 0)
    if k == 7:
        small += h < LEAST_SIZE_OF_7, w < LEAST_SIZE_OF_7
    # Sizes that are open to a compiler are taken to be large enough.
    return not any(map(_torch.known, small) if is_compiling() else small)


def _pays_halving(x: tuple[int, ...], padding: int, dtype: torch.dtype) -> bool:
    """As `_pays`, with a stride of 2."""
    n, _, height, width = x
    h, w = (height + 2 * padding) // 2 - 1, (width + 2 * padding) // 2 - 1
    tiles = n * (-(-h // 4)) * (-(-w // 4))
    small: tuple[Any, ...] = (dtype != torch.float32, h < LEAST_SIZE, w < LEAST_SIZE)
    small += (WANTED_OF * n * h * w < 16 * tiles, tiles < LEAST_TILES)
    return not any(map(_torch.known, small) if is_compiling() else small)


def _pays_of_1(x: Tensor, weight: tuple[int, ...]) -> bool:
    """Whether a 1×1 convolution of x is faster than PyTorch's."""
    n, channels, height, width = x.shape
    area, filters = height * width, weight[0] * channels
    least, most = LEAST_AREA_OF_1, FILTERS_OF_A_PIXEL_OF_1 * n * area
    if n >= 16 or torch.get_num_threads() > 1:
        least, most = LEAST_AREA_BESIDE_ONEDNN, min(most, MOST_FILTERS_BESIDE_ONEDNN)
    return (
        x.dtype == torch.float32
        and x.is_contiguous()
        and area >= least
        and n * area * filters >= LEAST_PRODUCTS_OF_1
        and filters <= most
    )


def _convolve(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
    """The layer's result."""
    same = padding and padding == weight.shape[2] // 2 and conv.stride[0] == 1
    if same and conv.padding_mode == "reflect" and _reads_border(x, weight):
        return conv_same(x, weight, bias, padding_mode="reflect")
    if padding and conv.padding_mode != "zeros":
        x = F.pad(x, (padding,) * 4, mode=conv.padding_mode)
        padding = 0
    return conv2d(x, weight, bias, stride=conv.stride[0], padding=padding, dilation=conv.dilation[0])


def _reads_border(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are to read a mirrored border, which spares its copy.

    Not of few channels: they gain nothing by it. Nor where PyTorch keeps that copy alone for backward, and so
    x may change until then.
    """
    recorded = torch.is_grad_enabled() and weight.requires_grad
    return min(weight.shape[:2]) >= LEAST_CHANNELS and (x.requires_grad or not recorded)


def pair(pad: Any, conv: Any, x: Any) -> Tensor | None:
    """A reflection padding of x and the convolution in one operator; None, with nothing done, where each is
    to be called."""
    stand_in, padding = vars(conv).get("_conv_forward"), pad.padding
    plain = (
        type(x) in PLAIN
        and isinstance(stand_in, Convolution)
        and stand_in.module is conv
        and type(padding) is tuple
        and len(padding) == 4
        and all(type(p) is int and p == padding[0] > 0 for p in padding)
        and all("forward" not in vars(m) and is_alone(m) for m in (pad, conv))
        and as_torch_has_it(pad, nn.ReflectionPad2d)
        and as_torch_has_it(conv, nn.Conv2d)
        and F.pad is _PAD
    )
    return stand_in.mirror(x, padding[0]) if plain else None


def can_pool(conv: nn.Conv2d, pool: nn.Module) -> bool:
    """Whether `pooled` may serve these layers as they are now."""
    return conv.stride == (1, 1) and reason(conv) is None and pooling.side_by_side(pool) is not None


def pooled(conv: Any, *behind: Any) -> Tensor | None:
    """An input, the last argument, through a convolution, a ReLU that may be there, and a max-pooling in one
    operator; None, with nothing done, where each is to be called."""
    *activations, pool, x = behind
    stand_in = vars(conv).get("_conv_forward")
    plain = (
        type(x) in PLAIN
        and isinstance(stand_in, Convolution)
        and stand_in.module is conv
        and "forward" not in vars(conv)
        and as_torch_has_it(conv, nn.Conv2d)
        and is_alone(conv)
        and all(norm.slope_of(relu) == 0.0 for relu in activations)
    )
    size = pooling.windows(pool) if plain else None
    y = None if size is None else stand_in.pool(x, size, bool(activations))
    if y is not None:
        vars(pool)["forward"].count(True)
    return y
