"""The digit net of Ganin et al. with fastda's gradient reversal; one stream, or two with related weights."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastda
import fastda.nn
from fastda.recipes.common.command import SettingsError

SOURCE, TARGET = 0, 1
NORMALISATIONS = ("image", "domain", "none")
LEAST_SIZE = 16  # sides of images that two 5x5 convolutions, each halved, leave something of


class DomainBatchNorm(nn.Module):
    """Batch normalisation with statistics of each domain's own; scale and shift are shared (Li et al. 2016).

    Under torch.distributed the statistics are those of the joined batch of all processes.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(2, channels))
        self.register_buffer("var", torch.ones(2, channels))
        self.momentum = momentum

    def forward(self, x: Tensor, domain: int) -> Tensor:
        mean, var = self.mean[domain], self.var[domain]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed):
            return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum)
        from torch.distributed.nn.functional import all_reduce

        # The mean first: the mean of squares less its square would lose half the digits.
        now = all_reduce(x.mean((0, 2, 3))) / torch.distributed.get_world_size()
        centred = x - now[:, None, None]
        spread = all_reduce(centred.square().mean((0, 2, 3))) / torch.distributed.get_world_size()
        with torch.no_grad():
            count = x.numel() / x.shape[1] * torch.distributed.get_world_size()
            mean.lerp_(now, self.momentum)
            var.lerp_(spread * (count / (count - 1)), self.momentum)
        y = centred * (spread[:, None, None] + 1e-5).rsqrt()
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class Features(nn.Module):
    """C5x5→32, MP2, ReLU, C5x5→48, MP2, ReLU: (N, 3, H, W) → (N, 48·h·w).

    Pooling first and ReLU after gives the same values as the usual order for a quarter of the work.
    """

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 5), nn.Conv2d(32, 48, 5)
        self.norm1 = DomainBatchNorm(32) if batch_norm else None
        self.norm2 = DomainBatchNorm(48) if batch_norm else None

    def forward(self, x: Tensor, domain: int) -> Tensor:
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = fastda.conv2d_max_pool(x, conv.weight, conv.bias, relu=norm is None)
            if norm is not None:
                x = F.relu(norm(x, domain))
        return x.flatten(1)


class WeightRelation(nn.Module):
    """Σ over layers of ‖a·W_s + b − W_t‖², a and b learned per layer (Rozantsev et al., arXiv 1603.06432).

    What is learned is (a − 1)·√n and b·√n for a layer of n weights: the regulariser's curvature in a and b
    themselves is 2·‖W_s‖² and 2n, at which gradient descent diverges.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(layers)), nn.Parameter(torch.zeros(layers))

    def forward(self, source: nn.Module, target: nn.Module) -> Tensor:
        pairs = zip(source.parameters(), target.parameters(), self.a, self.b, strict=True)
        return torch.stack(
            [(s + (a * s + b) / s.numel() ** 0.5 - t).square().sum() for s, t, a, b in pairs]
        ).sum()


class DomainNet(nn.Module):
    """Features, a label predictor, and a domain classifier behind the scheduled reversal layer.

    Args:
        streams: 1 shares the features' weights between the domains; 2 gives the target features of its own,
            tied to the source's by `WeightRelation`.
        reversal_steps: training steps over which the reversal's scale rises from 0 to `ceiling`.
        normalisation: `image` brings every image channel to mean 0 and deviation 1/2; `domain` subtracts
            the mean of the domain's training images (`set_domain_mean`), as published; `none` only scales to
            [0, 1].
    """

    domain_mean: Tensor

    def __init__(
        self,
        classes: int,
        size: int = 28,
        *,
        streams: int = 1,
        batch_norm: bool = False,
        normalisation: str = "image",
        reversal_steps: int = 1,
        ceiling: float = 1.0,
        domain_width: int = 100,
    ) -> None:
        super().__init__()
        if normalisation not in NORMALISATIONS:
            raise SettingsError(
                f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}"
            )
        side = ((size - 4) // 2 - 4) // 2
        if side < 1:
            raise SettingsError(
                f"size: images of {size}x{size} are too small, {LEAST_SIZE}x{LEAST_SIZE} is the least"
            )
        width = 48 * side * side
        self.normalisation = normalisation
        source = Features(batch_norm)
        self.features = nn.ModuleList([source] if streams == 1 else [source, copy.deepcopy(source)])
        layers = len(list(source.parameters()))
        self.relation: WeightRelation | None = None if streams == 1 else WeightRelation(layers)
        self.label = nn.Sequential(
            nn.Linear(width, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, classes)
        )
        self.reverse = fastda.nn.ScheduledGradientReversal(reversal_steps, high=ceiling)
        self.domain = fastda.nn.DomainClassifier(width, domain_width, num_layers=1, dropout=0.0)
        self.register_buffer("domain_mean", torch.zeros(2, 3))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))
        if streams == 2:  # both start from the same weights, where the regulariser is zero
            self.features[1].load_state_dict(self.features[0].state_dict())
        self.to(memory_format=torch.channels_last)

    def set_domain_mean(self, domain: int, images: Tensor) -> None:
        self.domain_mean[domain] = images.double().mean((0, 2, 3)) / 255

    def normalise(self, images: Tensor, domain: int) -> Tensor:
        """uint8 or float images of 0 to 255, (N, 3, H, W) → float, channels_last."""
        x = images.to(memory_format=torch.channels_last, dtype=self.domain_mean.dtype) / 255
        if self.normalisation == "domain":
            return x - self.domain_mean[domain][:, None, None]
        if self.normalisation == "image":
            deviation, mean = torch.std_mean(x, (2, 3), keepdim=True)
            return (x - mean) / (2 * deviation + 0.08)
        return x

    def embed(self, images: Tensor, domain: int) -> Tensor:
        """Features (N, width) of images, by the stream of their domain."""
        return self.features[domain if len(self.features) == 2 else 0](self.normalise(images, domain), domain)

    def forward(self, images: Tensor, domain: int = TARGET) -> Tensor:
        """Class logits (N, classes)."""
        return self.label(self.embed(images, domain))

    def domain_logits(self, features: Tensor) -> Tensor:
        """Logits (N,) of "comes from the source", behind the reversal."""
        return self.domain(self.reverse(features)).squeeze(1)
