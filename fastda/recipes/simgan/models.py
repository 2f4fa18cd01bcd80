"""The networks of SimGAN by the names of the settings, and those that are trained on what it refines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastda.nn

NETS = ("gaze", "hand", "small", "change")
PSI = ("identity", "blur", "derivatives")
LEAST_SIZE = 12  # sides of images that the networks that measure success leave something of


class Refiner(fastda.nn.Refiner):
    """Images are continued by `mirror` pixels of their own reflection, refined, and cut again.

    Zero padding alone leaves a frame as wide as the receptive field, by which every refined image is known.
    With `adds` what the network gives is added to the image, so that nothing gets lost on the way through it.
    With `keeps_hues` all channels change by the mean of their changes: pixels get lighter or darker, and the
    differences between their channels, so their hues, stay.
    """

    mirror = 0
    adds = keeps_hues = False

    def forward(self, x: Tensor) -> Tensor:
        m, layout = self.mirror, torch.channels_last
        if m:
            wide = F.pad(x, (m, m, m, m), mode="reflect").contiguous(memory_format=layout)
            made = super().forward(wide)[..., m:-m, m:-m].contiguous(memory_format=layout)
        else:
            made = super().forward(x)
        if self.keeps_hues:
            return x + (made if self.adds else made - x).mean(1, keepdim=True)
        return x + made if self.adds else made


def refiner(net: str, channels: int = 1, mirror: int = 0, keeps_hues: bool = False) -> Refiner:
    """The paper's refiner for gaze or hand images, or one an eighth as dear, for a processor and minutes.

    `change` is as small; what it gives is added to the image, at first nothing.
    """
    width, blocks, kernel_size = {"gaze": (64, 4, 3), "hand": (64, 10, 7)}.get(net, (32, 2, 3))
    made = Refiner(channels, width, blocks, kernel_size)
    made.mirror, made.adds, made.keeps_hues = mirror, net == "change", keeps_hues and channels > 1
    if made.adds:
        nn.init.zeros_(made.last.weight)
        nn.init.zeros_(made.last.get_parameter("bias"))
    return made


class Matching(nn.Module):
    """Synthetic images lit like real ones: means over cells of `cell` pixels get the real ones' statistics.

    Of all maps that give these means (one vector an image) the mean that they have in real images and a
    covariance like theirs, the one that changes least: the optimal transport between two Gaussians. What is
    finer than a cell is left to R and D, which see patches and so cannot know how brightness runs across a
    whole image. A few real images do not determine a covariance: `kept` of it is that of the synthetic ones.
    """

    kept = 0.62

    def __init__(self, cell: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.grid = -(-height // cell), -(-width // cell)
        size = channels * self.grid[0] * self.grid[1]
        self.matrix = nn.Buffer(torch.zeros(size, size))
        self.offset = nn.Buffer(torch.zeros(size))

    def cells(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.grid).flatten(1)

    @torch.no_grad()
    def fit(self, synthetic: Tensor, real: Tensor) -> None:
        """Float images (N, C, H, W) of both kinds."""
        a, b = self.cells(synthetic).double(), self.cells(real).double()
        unit = torch.eye(a.shape[1], dtype=a.dtype)
        source = torch.cov(a.T)
        target = self.kept * source + (1 - self.kept) * torch.cov(b.T)
        ridge = 0.02 * target.diagonal().mean() * unit  # directions in which hardly any image differs
        root = _root(source + ridge)
        inverse = torch.linalg.inv(root)
        transport = inverse @ _root(root @ (target + ridge) @ root) @ inverse
        self.matrix.copy_(transport - unit)
        self.offset.copy_(b.mean(0) - transport @ a.mean(0))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(self.cells(x), self.matrix, self.offset).view(len(x), -1, *self.grid)
        change = F.interpolate(change, x.shape[2:], mode="bicubic", align_corners=False)
        return (x + change).contiguous(memory_format=torch.channels_last)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def matching(cell: int, shape: tuple[int, ...]) -> nn.Module:
    """For images of `shape` (C, H, W); `cell` 0: nothing is done."""
    return Matching(cell, *shape) if cell else nn.Identity()


def discriminator(net: str, channels: int = 1, kind: str = "softmax") -> fastda.nn.PatchDiscriminator:
    make = fastda.nn.PatchDiscriminator.hand if net == "hand" else fastda.nn.PatchDiscriminator.gaze
    return make(channels, kind)


def features(psi: str, x: Tensor) -> Tensor:
    """ψ of the self-regularisation: what of an image (N, C, H, W) refining is to keep.

    `identity`: its pixels; `blur`: their means over 5×5 neighbourhoods, so that edges and texture are free;
    `derivatives`: differences of neighbouring pixels, so that brightness is free.
    """
    if psi == "blur":
        return F.avg_pool2d(x, 5, 1, padding=2, count_include_pad=False)
    if psi == "derivatives":
        across, down = x[:, :, :-1, 1:] - x[:, :, :-1, :-1], x[:, :, 1:, :-1] - x[:, :, :-1, :-1]
        return torch.cat([across, down], 1)
    return x


class GazeRegressor(nn.Sequential):
    """The paper's gaze estimator (appendix): grey eyes (N, 1, 35, 55) → gazes (N, 3), to be trained by ℓ₂.

    Unpadded convolutions leave 192 maps of 5×10: the 9,600 inputs of its fully connected layers.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3), nn.ReLU(),
            nn.Conv2d(32, 32, 3), nn.ReLU(),
            nn.Conv2d(32, 64, 3), nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 80, 3), nn.ReLU(),
            nn.Conv2d(80, 192, 3), nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Flatten(),
            nn.Linear(9600, 1000), nn.ReLU(),
            nn.Linear(1000, 3),
        )  # fmt: skip


class SmallGazeRegressor(nn.Sequential):
    """As `GazeRegressor`, of a tenth of its work."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(3200, 128), nn.ReLU(),
            nn.Linear(128, 3),
        )  # fmt: skip


REGRESSORS = {"paper": GazeRegressor, "small": SmallGazeRegressor}


class Classifier(nn.Sequential):
    """Images (N, channels, H, W) of any size from 12×12 → logits (N, classes)."""

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        flat = 48 * ((height // 2) // 2) * ((width // 2) // 2)
        super().__init__(
            nn.Conv2d(channels, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(32, 48, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, classes),
        )  # fmt: skip
