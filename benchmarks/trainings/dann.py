"""DANN as six public codes train it: the layers, passes and updates are theirs, the code is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import TllibReversal
from benchmarks.trainings.resnet import ResNet
from benchmarks.trainings.training import Training, of_class, update


class Reversal(torch.autograd.Function):
    """As most hand-written ones: a view, and a backward of two passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.neg() * ctx.alpha, None


class CopyingReversal(torch.autograd.Function):
    """jvanvugt's: a copy, and a scale that becomes a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -grad.new_tensor(ctx.alpha) * grad, None


class BatchNormDigits(Training):
    """Convolution, batch norm, pool, ReLU, twice; one pass for each domain; Adam."""

    def __init__(self, batch: int, wide: int = 64, narrow: int = 50) -> None:
        super().__init__()
        width = narrow * 16
        self.feature = nn.Sequential(
            *(nn.Conv2d(3, wide, 5), nn.BatchNorm2d(wide), nn.MaxPool2d(2), nn.ReLU(True)),
            *(nn.Conv2d(wide, narrow, 5), nn.BatchNorm2d(narrow), nn.Dropout2d()),
            *(nn.MaxPool2d(2), nn.ReLU(True)),
        )
        self.class_classifier = nn.Sequential(
            *(nn.Linear(width, 100), nn.BatchNorm1d(100), nn.ReLU(True), nn.Dropout()),
            *(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.ReLU(True)),
            *(nn.Linear(100, 10), nn.LogSoftmax(dim=1)),
        )
        self.domain_classifier = nn.Sequential(
            *(nn.Linear(width, 100), nn.BatchNorm1d(100), nn.ReLU(True)),
            *(nn.Linear(100, 2), nn.LogSoftmax(dim=1)),
        )
        self.loss_class, self.loss_domain, self.width = nn.NLLLoss(), nn.NLLLoss(), width
        self.optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        self.images("source", batch, 3, 28, 28)
        self.images("target", batch, 3, 28, 28)
        self.labels("source_labels", 10, batch)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.feature(x.expand(len(x), 3, 28, 28)).view(-1, self.width)
        reversed_ = Reversal.apply(features, 0.7)
        return self.class_classifier(features), self.domain_classifier(reversed_)

    def forward(self) -> list[Tensor]:
        self.zero_grad()
        classes, domain = self.predict(self.source.clone())
        loss_class = self.loss_class(classes, self.source_labels)
        loss_source = self.loss_domain(domain, of_class(0, domain))
        _, domain = self.predict(self.target.clone())
        loss_target = self.loss_domain(domain, of_class(1, domain))
        (loss_target + loss_source + loss_class).backward()
        self.optimizer.step()
        return [loss_class, loss_source, loss_target]


class PaddedDigits(Training):
    """Padded convolutions, ReLU before the pool; both domains together and the source once more; SGD."""

    def __init__(self, batch: int, first: int = 32, second: int = 48) -> None:
        super().__init__()
        self.width = second * 49
        self.extractor = nn.Sequential(
            *(nn.Conv2d(3, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(self.width, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
        )
        self.discriminator = nn.Sequential(nn.Linear(self.width, 100), nn.ReLU(), nn.Linear(100, 2))
        self.class_criterion, self.domain_criterion = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        self.images("source", batch, 1, 28, 28)
        self.images("target", batch, 3, 28, 28)
        self.labels("source_labels", 10, batch)
        self.register_buffer("domains", torch.arange(2 * batch) // batch)

    def features(self, x: Tensor) -> Tensor:
        return self.extractor(x).view(-1, self.width)

    def forward(self) -> list[Tensor]:
        source = torch.cat((self.source, self.source, self.source), 1)
        combined = torch.cat((source, self.target), 0)
        self.optimizer.zero_grad()
        of_both, of_source = self.features(combined), self.features(source)
        classes = F.softmax(self.classifier(of_source), dim=1)
        class_loss = self.class_criterion(classes, self.source_labels)
        domains = F.softmax(self.discriminator(Reversal.apply(of_both, 0.7)), dim=1)
        domain_loss = self.domain_criterion(domains, self.domains)
        (class_loss + domain_loss).backward()
        self.optimizer.step()
        return [class_loss, domain_loss]


class SmallDigits(Training):
    """Ten and twenty channels, both domains in one batch, Adam."""

    def __init__(self, batch: int, first: int = 10, second: int = 20) -> None:
        super().__init__()
        width = second * 16
        self.feature_extractor = nn.Sequential(
            *(nn.Conv2d(3, first, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(first, second, 5), nn.MaxPool2d(2), nn.Dropout2d()),
        )
        self.classifier = nn.Sequential(nn.Linear(width, 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, 10))
        self.discriminator = nn.Sequential(
            *(nn.Linear(width, 50), nn.ReLU(), nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 1))
        )
        self.optimizer = torch.optim.Adam(self.parameters())
        self.images("source", batch // 2, 3, 28, 28)
        self.images("target", batch // 2, 3, 28, 28)
        self.labels("source_labels", 10, batch // 2)

    def forward(self) -> list[Tensor]:
        x = torch.cat([self.source, self.target])
        domains = torch.cat([torch.ones(len(self.source)), torch.zeros(len(self.target))]).to(x.dtype)
        features = self.feature_extractor(x).view(len(x), -1)
        of_domain = self.discriminator(CopyingReversal.apply(features, 1)).squeeze()
        of_label = self.classifier(features[: len(self.source)])
        domain_loss = F.binary_cross_entropy_with_logits(of_domain, domains)
        label_loss = F.cross_entropy(of_label, self.source_labels)
        update(domain_loss + label_loss, self.optimizer)
        _ = (of_label.max(1)[1] == self.source_labels).float().mean().item()
        return [domain_loss, label_loss]


class Signs(Training):
    """Traffic signs: three convolutions of 5×5, one pass for each domain, SGD."""

    def __init__(self, batch: int, widths: tuple[int, int, int] = (96, 144, 256)) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1, self.conv2 = nn.Conv2d(3, first, 5), nn.Conv2d(first, second, 5)
        self.conv3, self.pool = nn.Conv2d(second, third, 5), nn.MaxPool2d(2, stride=2)
        self.width = third * 9
        self.classifier = nn.Sequential(
            *(nn.Linear(self.width, 512), nn.ReLU(), nn.Linear(512, 43), nn.LogSoftmax(dim=1))
        )
        self.regressor = nn.Sequential(
            *(nn.Linear(self.width, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()),
            *(nn.Linear(1024, 2), nn.LogSoftmax(dim=1)),
        )
        self.class_criterion, self.domain_criterion = nn.NLLLoss(), nn.NLLLoss()
        self.optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        self.images("source", batch // 2, 3, 40, 40)
        self.images("target", batch // 2, 3, 40, 40)
        self.labels("source_labels", 43, batch // 2)
        self.register_buffer("domains", torch.arange(batch) // (batch // 2))

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = F.relu(self.conv3(x)).view(-1, self.width)
        return self.classifier(x), self.regressor(Reversal.apply(x, 1))

    def forward(self) -> list[Tensor]:
        classes, of_source = self.predict(self.source)
        class_loss = self.class_criterion(classes, self.source_labels)
        _, of_target = self.predict(self.target)
        domain_loss = self.domain_criterion(torch.cat((of_source, of_target)), self.domains)
        update(class_loss + 0.7 * domain_loss, self.optimizer)
        return [class_loss, domain_loss]


class Objects(Training):
    """tllib's: a ResNet, a bottleneck, a discriminator of three layers; both domains in one batch, the
    backbone at a tenth of the learning rate."""

    def __init__(self, batch: int, size: int, blocks: tuple[int, ...], wide: bool, width: int = 64) -> None:
        super().__init__()
        self.backbone = ResNet(blocks, wide, width)
        self.pool_layer = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
        self.bottleneck = nn.Sequential(
            nn.Linear(self.backbone.out_features, 256), nn.BatchNorm1d(256), nn.ReLU()
        )
        self.head = nn.Linear(256, 31)
        hidden = 16 * width
        self.discriminator = nn.Sequential(
            *(nn.Linear(256, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            *(nn.Linear(hidden, 1), nn.Sigmoid()),
        )
        parts = (self.bottleneck, self.head, self.discriminator)
        groups = [{"params": list(part.parameters())} for part in parts]
        groups.append({"params": list(self.backbone.parameters()), "lr": 1e-3})
        self.optimizer = torch.optim.SGD(groups, 0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)
        self.images("source", batch, 3, size, size)
        self.images("target", batch, 3, size, size)
        self.labels("source_labels", 31, batch)

    def forward(self) -> list[Tensor]:
        x = torch.cat((self.source, self.target), dim=0)
        features = self.bottleneck(self.pool_layer(self.backbone(x)))
        classes, _ = self.head(features).chunk(2, dim=0)
        on_source, on_target = self.discriminator(TllibReversal.apply(features, 0.5)).chunk(2, dim=0)
        class_loss = F.cross_entropy(classes, self.source_labels)
        transfer_loss = 0.5 * (
            F.binary_cross_entropy(on_source, torch.ones_like(on_source))
            + F.binary_cross_entropy(on_target, torch.zeros_like(on_target))
        )
        _ = [(d.detach() > 0.5).float().mean().item() for d in (on_source, on_target)]
        update(class_loss + transfer_loss, self.optimizer)
        return [class_loss, transfer_loss]
