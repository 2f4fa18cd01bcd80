"""SimGAN as four repositories train it: the layers, passes and updates are theirs, the code is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastda.nn
from benchmarks.trainings.training import Training, freeze, of_class, update


class _Hands(nn.Module):
    """A block whose ReLU is shared and in place, as is the addition."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.conv1(x)))
        y += x
        return self.relu(y)


class HandsRefiner(nn.Module):
    def __init__(self, blocks: int, width: int, kernel: int) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(1, width, kernel, padding=kernel // 2), nn.ReLU()
        self.blocks = nn.Sequential(*(_Hands(width, kernel) for _ in range(blocks)))
        self.conv2, self.tanh = nn.Conv2d(width, 1, 1), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh(self.conv2(self.blocks(self.relu(self.conv1(x)))))


class HandsDiscriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 96, 7, stride=4), nn.Conv2d(96, 64, 5, stride=2)
        self.max_pool, self.relu = nn.MaxPool2d(3, 2), nn.ReLU()
        self.conv3 = nn.Conv2d(64, 32, 3, stride=2)
        self.conv4, self.conv5 = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max_pool(self.relu(self.conv2(self.relu(self.conv1(x)))))
        x = self.relu(self.conv4(self.relu(self.conv3(x))))
        return self.relu(self.conv5(x)).view(-1, 2)


class Hands(Training):
    """A step of the refiner, on self-regularization alone, and one of the discriminator, for which the
    refiner's parameters take no gradients."""

    def __init__(self, batch: int, size: int, blocks: int = 10, width: int = 64, kernel: int = 7) -> None:
        super().__init__()
        self.refiner, self.discriminator = HandsRefiner(blocks, width, kernel), HandsDiscriminator()
        self.r_optimizer = torch.optim.SGD(self.refiner.parameters(), 1e-3)
        self.d_optimizer = torch.optim.SGD(self.discriminator.parameters(), 1e-3)
        self.images("synthetic", batch, 1, size, size)
        self.images("real", batch, 1, size, size)

    def forward(self) -> list[Tensor]:
        refined = self.refiner(self.synthetic)
        r_loss = 1e-4 * F.l1_loss(self.synthetic, refined, reduction="sum")
        update(r_loss, self.r_optimizer)
        freeze([self.refiner])
        on_real = self.discriminator(self.real)
        on_refined = self.discriminator(self.refiner(self.synthetic))
        d_loss = F.cross_entropy(on_real, of_class(0, on_real))
        d_loss = d_loss + F.cross_entropy(on_refined, of_class(1, on_refined))
        update(d_loss, self.d_optimizer)
        freeze([self.refiner], False)
        return [r_loss, d_loss]


class _Sequence(nn.Module):
    """A block that holds its layers in a Sequential, and adds after them."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for last in (False, True):
            layers += [nn.Conv2d(width, width, 3, 1, 1), *([nn.BatchNorm2d(width)] if norm else [])]
            layers += [] if last else [nn.LeakyReLU()]
        self.convs, self.relu = nn.Sequential(*layers), nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs(x) + x)


class GazeRefiner(nn.Module):
    """Of the two gaze trainings: with batch norm there is no activation behind the first layer."""

    def __init__(self, blocks: int, width: int, norm: bool) -> None:
        super().__init__()
        behind = nn.BatchNorm2d(width) if norm else nn.LeakyReLU()
        self.conv_1 = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), behind)
        self.resnet_blocks = nn.Sequential(*(_Sequence(width, norm) for _ in range(blocks)))
        self.conv_2 = nn.Sequential(nn.Conv2d(width, 1, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_2(self.resnet_blocks(self.conv_1(x)))


class Gaze(Training):
    """Two steps of the refiner, the discriminator frozen, and one of the discriminator, on half a batch from
    the history; the network that is not trained is in eval mode and takes no gradients."""

    def __init__(self, batch: int, height: int = 35, width: int = 55, blocks: int = 4, channels: int = 64):
        super().__init__()
        self.refiner = GazeRefiner(blocks, channels, norm=False)
        self.discriminator = nn.Sequential(
            *(nn.Conv2d(1, 96, 3, 2, 1), nn.LeakyReLU(), nn.Conv2d(96, 64, 3, 2, 1), nn.LeakyReLU()),
            *(nn.MaxPool2d(3, 1, 1), nn.Conv2d(64, 32, 3, 1, 1), nn.LeakyReLU()),
            *(nn.Conv2d(32, 32, 1), nn.LeakyReLU(), nn.Conv2d(32, 2, 1)),
        )
        self.content_loss, self.adversarial_loss = nn.L1Loss(), nn.CrossEntropyLoss()
        self.history = fastda.nn.ImageHistoryBuffer(batch)
        settings: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9}
        self.r_optimizer = torch.optim.SGD(self.refiner.parameters(), **settings)
        self.d_optimizer = torch.optim.SGD(self.discriminator.parameters(), **settings)
        self.images("synthetic", 3 * batch, 1, height, width)
        self.images("real", batch, 1, height, width)

    def logits(self, x: Tensor) -> Tensor:
        return self.discriminator(x).permute(0, 2, 3, 1).contiguous().view(-1, 2)

    def train_one(self, trained: nn.Module, other: nn.Module) -> None:
        freeze([trained.train()], False)
        freeze([other.eval()])

    def forward(self) -> list[Tensor]:
        self.train_one(self.refiner, self.discriminator)
        *synthetic, last = self.synthetic.chunk(3)
        for images in synthetic:
            refined = self.refiner(images)
            logits = self.logits(refined)
            r_loss = self.content_loss(refined, images) * 0.5
            r_loss = r_loss + self.adversarial_loss(logits, of_class(1, logits))
            update(r_loss, self.r_optimizer)
        self.train_one(self.discriminator, self.refiner)
        on_real = self.logits(self.real)
        on_refined = self.logits(self.history.query(self.refiner(last).detach()))
        for logits in (on_real, on_refined):
            _ = (F.softmax(logits.detach(), dim=1)[:, 0] < 0.5).float().mean()
        d_loss = self.adversarial_loss(on_refined, of_class(0, on_refined))
        d_loss = (d_loss + self.adversarial_loss(on_real, of_class(1, on_real))) / 2
        update(d_loss, self.d_optimizer)
        freeze([self.refiner, self.discriminator], False)
        return [r_loss, d_loss]


class GazeNorm(Training):
    """The same with batch norm. The discriminator's step goes back through the refiner, which is in eval mode
    there: nothing cuts it off, and its gradients are thrown away."""

    def __init__(self, batch: int, height: int = 35, width: int = 55, blocks: int = 4, channels: int = 64):
        super().__init__()
        self.refiner = GazeRefiner(blocks, channels, norm=True)
        layers: list[nn.Module] = []
        for c, wider, kernel, stride in ((1, 96, 3, 2), (96, 64, 3, 2), (64, 32, 3, 1), (32, 32, 1, 1)):
            layers += [nn.Conv2d(c, wider, kernel, stride, kernel // 2), nn.LeakyReLU()]
            layers += [nn.BatchNorm2d(wider), *([nn.AvgPool2d(3, 2, 1)] if (c, wider) == (96, 64) else [])]
        layers += [nn.AvgPool2d(3, 2, 1), nn.Conv2d(32, 2, 1), nn.LeakyReLU()]
        self.discriminator = nn.Sequential(*layers)
        self.content_loss, self.adversarial_loss = nn.L1Loss(reduction="sum"), nn.CrossEntropyLoss()
        self.r_optimizer = torch.optim.Adam(self.refiner.parameters(), 1e-3)
        self.d_optimizer = torch.optim.SGD(self.discriminator.parameters(), 1e-3)
        self.images("synthetic", 3 * batch, 1, height, width)
        self.images("real", batch, 1, height, width)

    def logits(self, x: Tensor) -> Tensor:
        return self.discriminator(x).view(-1, 2)

    def forward(self) -> list[Tensor]:
        self.discriminator.eval()
        self.refiner.train()
        freeze([self.discriminator])
        *synthetic, last = self.synthetic.chunk(3)
        for images in synthetic:
            refined = self.refiner(images)
            logits = self.logits(refined)
            _ = (F.softmax(logits.detach(), dim=1).max(1)[1] == 0).float().mean()
            r_loss = self.content_loss(refined, images) * 1e-4
            r_loss = r_loss + self.adversarial_loss(logits, of_class(0, logits))
            self.d_optimizer.zero_grad()
            update(r_loss, self.r_optimizer)
        self.refiner.eval()
        self.discriminator.train()
        freeze([self.discriminator], False)
        refined = self.refiner(last)
        on_real = self.logits(self.real)
        d_loss = self.adversarial_loss(on_real, of_class(0, on_real))
        on_refined = self.logits(refined)
        d_loss = d_loss + self.adversarial_loss(on_refined, of_class(1, on_refined))
        for logits in (on_real, on_refined):
            _ = (F.softmax(logits.detach(), dim=1).max(1)[1] == 0).float().mean()
        update(d_loss, self.d_optimizer)
        return [r_loss, d_loss]


class _Digits(nn.Module):
    """A block whose activation is shared, not in place, and whose addition is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.act_func = nn.LeakyReLU(0.2)
        self.conv1 = nn.Conv2d(width, width, 3, padding="same", bias=False)
        self.conv1_bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding="same", bias=False)
        self.conv2_bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act_func(self.conv1_bn(self.conv1(x)))
        y = self.conv2_bn(self.conv2(y))
        y += x
        return self.act_func(y)


class _Conditional(nn.Module):
    """Joins the images with an embedding of their labels, as a second channel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding, self.act_func = nn.Embedding(10, size * size), nn.LeakyReLU(0.2)

    def joined(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([x, self.embedding(labels).view(x.shape)], dim=1)


class DigitsRefiner(_Conditional):
    def __init__(self, size: int, blocks: int, width: int) -> None:
        super().__init__(size)
        self.conv1 = nn.Conv2d(2, width, 3, padding="same", bias=False)
        self.conv1_bn = nn.BatchNorm2d(width)
        self.resnet_blocks = nn.Sequential(*(_Digits(width) for _ in range(blocks)))
        self.conv2, self.tanh = nn.Conv2d(width, 1, 1), nn.Tanh()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.act_func(self.conv1_bn(self.conv1(self.joined(x, labels))))
        return self.tanh(self.conv2(self.resnet_blocks(y)))


class DigitsDiscriminator(_Conditional):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        shapes = ((2, 96, 7, 4, 2), (96, 64, 5, 2, 1), (64, 32, 3, 2, 1), (32, 32, 1, 1, 0))
        self.convs = nn.ModuleList(nn.Conv2d(c, k, r, s, p, bias=False) for c, k, r, s, p in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[1]) for shape in shapes)
        self.last = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.joined(x, labels)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.act_func(norm(conv(x)))
        return self.last(x).view(-1, 2)


class Digits(Training):
    """Conditional on the digit: two steps of the refiner, for which the discriminator takes gradients that
    nobody uses, and one of the discriminator, the refiner without gradients."""

    def __init__(self, batch: int, size: int = 28, blocks: int = 2, width: int = 64) -> None:
        super().__init__()
        self.refiner, self.discriminator = DigitsRefiner(size, blocks, width), DigitsDiscriminator(size)
        self.adversarial_loss = nn.CrossEntropyLoss()
        self.history = fastda.nn.ImageHistoryBuffer(2 * batch)
        settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.5, 0.999)}
        self.r_optimizer = torch.optim.Adam(self.refiner.parameters(), **settings)
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), **settings)
        for name in ("synthetic", "real"):
            self.images(name, batch, 1, size, size)
            self.labels(f"{name}_labels", 10, batch)

    def forward(self) -> list[Tensor]:
        synthetic, labels = self.synthetic, self.synthetic_labels
        self.refiner.train()
        self.discriminator.eval()
        for _ in range(2):
            refined = self.refiner(synthetic, labels)
            logits = self.discriminator(refined, labels)
            r_loss = F.l1_loss(refined, synthetic) * 10
            r_loss = r_loss + self.adversarial_loss(logits, of_class(0, logits))
            update(r_loss, self.r_optimizer)
        self.refiner.eval()
        self.discriminator.train()
        with torch.no_grad():
            refined = self.refiner(synthetic, labels)
        refined = self.history.query(refined)
        on_real = self.discriminator(self.real, self.real_labels)
        d_loss = self.adversarial_loss(on_real, of_class(0, on_real))
        on_refined = self.discriminator(refined, labels)
        d_loss = d_loss + self.adversarial_loss(on_refined, of_class(1, on_refined))
        update(d_loss, self.d_optimizer)
        return [r_loss, d_loss]
