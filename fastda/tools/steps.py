"""One training step: with fastda, in plain PyTorch as it is mostly written, and at its best.

SimGAN: Algorithm 1 of arXiv 1612.07828 with the gaze networks, K_g = 2, K_d = 1 and a history of refined
images. DANN: the digit network of Ganin and Lempitsky (arXiv 1409.7495), half a batch from each domain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastda
import fastda.nn
from fastda.registry.grad_reverse import reverse

REG_SCALE = 1.0
LR = 1e-4


class _PlainBlock(nn.Module):
    def __init__(self, lean: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.lean = lean

    def forward(self, x: Tensor) -> Tensor:
        if self.lean:
            return self.conv2(F.relu(self.conv1(x), inplace=True)).add_(x).relu_()
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def _plain_refiner(channels: int, lean: bool) -> nn.Sequential:
    """The parameters are in the order of `fastda.nn.Refiner`'s."""
    first, last = nn.Conv2d(channels, 64, 3, padding=1), nn.Conv2d(64, channels, 1)
    return nn.Sequential(first, nn.ReLU(lean), *(_PlainBlock(lean) for _ in range(4)), last)


class SimganStep:
    """Two steps of the refiner and one of the discriminator on a fixed set of noise images.

    Args:
        sizes: (batch, channels, height, width); the paper's are (512, 1, 35, 55).
        fused: with fastda's modules and losses.
        usual: as it is usually written: contiguous tensors, a discriminator that takes gradients in the
            refiner's step, cross-entropy over both channels, accuracies by argmax. Otherwise the best that is
            known: the discriminator frozen there, two-class losses as softplus of a difference.
        compiled: both networks by torch.compile.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        *,
        fused: bool = False,
        usual: bool = False,
        compiled: bool = False,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        self.fused, self.usual, self.layout = fused, usual, layout
        self.batch, channels, *_ = sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.images = torch.randint(256, (1024, *sizes[1:]), dtype=torch.uint8)
            refiner = fastda.nn.Refiner(channels, 64, 4, 3)
            discriminator = fastda.nn.PatchDiscriminator.gaze(channels)
        self.r_parameters = list(refiner.parameters())
        self.d_parameters = list(discriminator.to(memory_format=layout).parameters())
        self.refiner: Callable[[Tensor], Tensor] = refiner
        self.discriminator: Any = discriminator
        if not fused:
            plain = _plain_refiner(channels, lean=not usual)
            with torch.no_grad():
                for mine, given in zip(plain.parameters(), self.r_parameters, strict=True):
                    mine.copy_(given)
            self.refiner = plain.to(memory_format=layout)
            self.r_parameters = list(plain.parameters())
        if compiled:
            self.refiner = torch.compile(self.refiner, dynamic=False)
            self.discriminator = torch.compile(discriminator, dynamic=False)
        self.r_optimizer = torch.optim.SGD(self.r_parameters, LR)
        self.d_optimizer = torch.optim.SGD(self.d_parameters, LR)
        self.buffer = fastda.nn.ImageHistoryBuffer(4 * self.batch, seed=0)
        self.generator = torch.Generator().manual_seed(0)

    def draw(self) -> Tensor:
        picked = torch.randint(len(self.images), (self.batch,), generator=self.generator)
        return (self.images[picked].float() / 127.5 - 1).contiguous(memory_format=self.layout)

    def __call__(self) -> None:
        for _ in range(2):
            self.refiner_step()
        self.discriminator_step()

    def refiner_step(self) -> None:
        synthetic = self.draw()
        refined = self.refiner(synthetic)
        frozen = [] if self.usual else self.d_parameters
        for p in frozen:
            p.requires_grad_(False)
        logits = self.discriminator(refined)
        for p in frozen:
            p.requires_grad_(True)
        if self.fused:
            loss = fastda.refiner_loss(logits, refined, synthetic, REG_SCALE)
        else:
            loss = self.cross_entropy(logits, 0) + REG_SCALE * F.l1_loss(refined, synthetic)
        self.r_optimizer.zero_grad()
        loss.backward()
        self.r_optimizer.step()

    def discriminator_step(self) -> None:
        real = self.draw()
        with torch.no_grad():
            refined = self.refiner(self.draw())
        refined = self.buffer.query(refined)
        d = self.discriminator
        if self.fused:
            loss, *_ = fastda.patch_head_discriminator_loss(
                d.features(real), d.features(refined), d.head.weight, d.head.bias, return_accuracy=True
            )
        else:
            of_real, of_refined = d(real), d(refined)
            loss = self.cross_entropy(of_real, 0) + self.cross_entropy(of_refined, 1)
        self.d_optimizer.zero_grad()
        loss.backward()
        self.d_optimizer.step()
        if not self.fused:
            self.share(of_real, 0), self.share(of_refined, 1)

    def cross_entropy(self, logits: Tensor, target: int) -> Tensor:
        if not self.usual:
            return F.softplus((logits[:, 0] - logits[:, 1]) * (1 if target else -1)).mean()
        n, _, h, w = logits.shape
        return F.cross_entropy(logits, torch.full((n, h, w), target))

    def share(self, logits: Tensor, target: int) -> Tensor:
        logits = logits.detach()
        if not self.usual:
            return ((logits[:, 1] > logits[:, 0]) == bool(target)).float().mean()
        return (logits.argmax(1) == target).float().mean()

    def parameters(self) -> list[Tensor]:
        return [*self.r_parameters, *self.d_parameters]

    @staticmethod
    def flops(n: int, c: int, h: int, w: int) -> float:
        """Convolutions by their definition: the refiner 2 × (forward, two gradients) and a forward, the
        discriminator 2 × (forward, one gradient) and 2 × (forward, two gradients)."""
        half, quarter = ((h + 1) // 2) * ((w + 1) // 2), ((h + 3) // 4) * ((w + 3) // 4)
        refiner = h * w * (9 * c * 64 + 8 * 9 * 64 * 64 + 64 * c)
        discriminator = half * 9 * c * 96 + quarter * (9 * 96 * 64 + 9 * 64 * 32 + 32 * 32 + 32 * 2)
        return 2.0 * n * (7 * refiner + 10 * discriminator)


def _width(h: int, w: int) -> int:
    """Of the features of an h×w image."""
    return 48 * (((h - 4) // 2 - 4) // 2) * (((w - 4) // 2 - 4) // 2)


class _DannNet(nn.Module):
    def __init__(self, channels: int, width: int, fused: bool, usual: bool) -> None:
        super().__init__()
        self.fused, self.usual = fused, usual
        self.conv1, self.conv2 = nn.Conv2d(channels, 32, 5), nn.Conv2d(32, 48, 5)
        self.label = nn.Sequential(
            nn.Linear(width, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.domain1, self.domain2 = nn.Linear(width, 100), nn.Linear(100, 1)

    def features(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            if self.fused:
                x = fastda.conv2d_max_pool(x, conv.weight, conv.bias)
            else:
                # ReLU after pooling gives the same values as before it, for a quarter of the work.
                x = F.max_pool2d(F.relu(conv(x)), 2) if self.usual else F.relu(F.max_pool2d(conv(x), 2))
        return x.flatten(1)

    def domain_logits(self, x: Tensor, scale: float) -> Tensor:
        if self.fused:
            y = fastda.grad_reverse_linear(x, self.domain1.weight, self.domain1.bias, scale)
        else:
            y = self.domain1(reverse(x, scale))
        return self.domain2(F.relu(y)).squeeze(1)

    def forward(self, images: Tensor, labels: Tensor, scale: float) -> Tensor:
        """The sum of the three losses; the first half of the images is the source domain's."""
        if not self.usual:  # both domains in one pass
            features, is_source = self.features(images), torch.zeros(len(images))
            is_source[: len(labels)] = 1.0
            logits = self.domain_logits(features, scale)
            domain_loss = 2 * F.binary_cross_entropy_with_logits(logits, is_source)
            return F.cross_entropy(self.label(features[: len(labels)]), labels) + domain_loss
        of_source, of_target = (self.features(part) for part in images.split(len(labels)))
        loss = F.cross_entropy(self.label(of_source), labels)
        for features, domain in ((of_source, torch.ones), (of_target, torch.zeros)):
            logits = self.domain_logits(features, scale)
            loss = loss + F.binary_cross_entropy_with_logits(logits, domain(len(logits)))
        return loss


class DannStep:
    """A step of SGD with momentum on half a batch of each domain, of noise.

    Args:
        sizes: (batch, channels, height, width), the batch of both domains together; digits are 3×28×28.
        fused: by fastda's convolutions with poolings, and reversal within the domain classifier's first
            layer.
        usual: as it is usually written, a pass for each domain and ReLU before pooling. Otherwise the best
            that is known: one pass, ReLU after pooling.
        compiled: the network with its losses by torch.compile.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        *,
        fused: bool = False,
        usual: bool = False,
        compiled: bool = False,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = _DannNet(sizes[1], _width(*sizes[2:]), fused, usual).to(memory_format=layout)
            self.images = torch.rand(sizes).to(memory_format=layout)
            self.labels = torch.randint(10, (sizes[0] // 2,))
        self.net = torch.compile(net, dynamic=False) if compiled else net
        self.optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9)

    def __call__(self) -> None:
        loss = self.net(self.images, self.labels, 0.7)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @staticmethod
    def flops(n: int, c: int, h: int, w: int) -> float:
        first, second = (h - 4) * (w - 4), ((h - 4) // 2 - 4) * ((w - 4) // 2 - 4)
        width = _width(h, w)
        dense = width * 100 + 100 * 100 + 100 * 10 + 2 * (width * 100 + 100)  # labels on half the batch
        return 3.0 * (2 * n * (first * 25 * c * 32 + second * 25 * 32 * 48) + n * dense)
