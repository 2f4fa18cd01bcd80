"""Max-pooling with the ReLU beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastda.ops.pool import relu_max_pool


class ReLUMaxPool2d(nn.MaxPool2d):
    """`nn.ReLU()` and `nn.MaxPool2d(…)`, in either order, as one; the arguments are those of `nn.MaxPool2d`.

    It has no parameters. `return_indices` is refused: the indices that are kept are no torch's.
    """

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        if return_indices:
            raise ValueError("ReLUMaxPool2d: return_indices must be False, use nn.ReLU and nn.MaxPool2d")
        super().__init__(kernel_size, stride, padding, dilation, False, ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        return relu_max_pool(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
