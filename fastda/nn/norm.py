"""torch's normalisation layers with the addition and the activation that follow them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import handle_torch_function

from fastda.ops.common import is_symbolic
from fastda.ops.norm import batch_norm_act, instance_norm_act


def _momentum(x: Tensor, batches: Tensor, momentum: float | None) -> float:
    """Counts this batch; without a momentum the running statistics are the average over all of them."""
    if is_symbolic(x):
        return handle_torch_function(_momentum, (x,), x, batches, momentum)
    batches.add_(1)
    return 1.0 / float(batches) if momentum is None else momentum


class BatchNormAct2d(nn.BatchNorm2d):
    """act(batch_norm(x) + residual), a `torch.nn.BatchNorm2d` with its parameters, buffers and state_dict.

    negative_slope: None for no activation, 0.0 for ReLU, above for leaky ReLU; the other arguments are
        those of `nn.BatchNorm2d`.

    `forward(x, residual=None)`, both (N, C, H, W).
    """

    def __init__(
        self, num_features: int, *args: Any, negative_slope: float | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, *args, **options)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            momentum = _momentum(x, self.num_batches_tracked, self.momentum)
        own = self.training or (self.running_mean is None and self.running_var is None)
        stored = not self.training or self.track_running_stats
        return batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean if stored else None,
            self.running_var if stored else None,
            training=own,
            momentum=momentum,
            eps=self.eps,
            residual=residual,
            negative_slope=self.negative_slope,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"


class InstanceNormAct2d(nn.InstanceNorm2d):
    """act(instance_norm(x) + residual), a `torch.nn.InstanceNorm2d` with its parameters and state_dict.

    negative_slope: None for no activation, 0.0 for ReLU, above for leaky ReLU; the other arguments are
        those of `nn.InstanceNorm2d`.

    `forward(x, residual=None)`, both (N, C, H, W) or (C, H, W).
    """

    def __init__(
        self, num_features: int, *args: Any, negative_slope: float | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, *args, **options)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not is_symbolic(x) and x.dim() == 3:
            return self(x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)).squeeze(0)
        return instance_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training or not self.track_running_stats,
            momentum=0.0 if self.momentum is None else self.momentum,
            eps=self.eps,
            residual=residual,
            negative_slope=self.negative_slope,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"
