"""Gradient reversal as modules, and the domain classifier that stands behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastda.ops.common import number, shown
from fastda.ops.grad_reverse import _check_scale, grad_reverse


class GradientReversal(nn.Module):
    """`fastda.grad_reverse` as a layer.

    Args:
        scale: a float, kept as the attribute `scale`; or a tensor (0-dim, or 1-D of one scale per sample),
            kept as a buffer of that name. A tensor may change its value at every step without a
            recompilation; a float that changes is compiled twice (on torch 2.11, for every value).
    """

    scale: float | Tensor

    def __init__(self, scale: float | Tensor = 1.0) -> None:
        super().__init__()
        if isinstance(scale, Tensor):
            _check_scale("GradientReversal", scale, scale)
            self.register_buffer("scale", scale)
        else:
            self.scale = number(scale)
            _check_scale("GradientReversal", torch.empty(()), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return grad_reverse(x, self.scale)

    def extra_repr(self) -> str:
        return f"scale={shown(self.scale)}"


class ScheduledGradientReversal(nn.Module):
    """Gradient reversal whose scale rises from `low` to `high` over `max_steps` calls of `step()`.

    At progress p = steps / max_steps (kept at 1 afterwards) the scale is low + (high − low)·(2 / (1 +
    exp(−gamma·p)) − 1). `scale` and `steps` are buffers: they follow the module's device, are part of its
    state_dict, and change in place, which neither triggers a recompilation nor alters the gradient of a
    forward pass already run. `step()` runs on the device without a synchronisation.

    Source: Ganin and Lempitsky, arXiv 1409.7495, section 4 (gamma = 10).
    """

    scale: Tensor
    steps: Tensor

    def __init__(self, max_steps: int, gamma: float = 10.0, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        if isinstance(max_steps, bool) or not isinstance(max_steps, int):
            raise TypeError(
                f"ScheduledGradientReversal: max_steps must be an int, got {type(max_steps).__name__}"
            )
        if max_steps < 1:
            raise ValueError(f"ScheduledGradientReversal: max_steps must be at least 1, got {max_steps}")
        if not 0.0 < gamma < float("inf"):
            raise ValueError(f"ScheduledGradientReversal: gamma must be positive and finite, got {gamma}")
        self.max_steps, self.gamma, self.low, self.high = max_steps, gamma, low, high
        self.register_buffer("scale", torch.tensor(float(low)))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return grad_reverse(x, self.scale)

    @torch.no_grad()
    def step(self) -> None:
        """Advance the schedule by one training step."""
        steps = self.steps + 1
        progress = (steps / self.max_steps).clamp(max=1.0)
        rise = 2.0 / (1.0 + torch.exp(-self.gamma * progress)) - 1.0
        scale = self.low + (self.high - self.low) * rise
        if torch.compiler.is_compiling():
            # A backward pass that torch 2.14 compiles reads a buffer changed in place as it is by then.
            self.steps, self.scale = steps, scale.to(self.scale.dtype)
        else:
            self.steps.copy_(steps)
            self.scale.copy_(scale)

    def extra_repr(self) -> str:
        return f"max_steps={self.max_steps}, gamma={self.gamma}, low={self.low}, high={self.high}"


class DomainClassifier(nn.Sequential):
    """An MLP that tells domains apart: `num_layers` of Linear, ReLU, Dropout, then a Linear to the logits.

    (N, in_features) → (N, num_domains) logits: one per sample for two domains (`BCEWithLogitsLoss`), else one
    per domain (`CrossEntropyLoss`). It holds no reversal: put a `GradientReversal` before it, so that the
    same classifier also serves methods that alternate two optimisers, and the schedule stays in one place.

    The defaults are those of Ganin et al. (JMLR 17, 2016, section 5.2.4) for AlexNet features: 1024, 1024,
    dropout 0.5.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 1024,
        num_layers: int = 2,
        dropout: float = 0.5,
        num_domains: int = 1,
    ) -> None:
        for name, value, least in (
            ("in_features", in_features, 1),
            ("hidden_features", hidden_features, 1),
            ("num_layers", num_layers, 0),
            ("num_domains", num_domains, 1),
        ):
            if value < least:
                raise ValueError(f"DomainClassifier: {name} must be at least {least}, got {value}")
        layers: list[nn.Module] = []
        for _ in range(num_layers):
            layers += [nn.Linear(in_features, hidden_features), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            in_features = hidden_features
        super().__init__(*layers, nn.Linear(in_features, num_domains))
