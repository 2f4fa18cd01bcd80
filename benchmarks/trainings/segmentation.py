"""AdaptSegNet: DeepLab with dilated convolutions and two discriminators of its outputs; layers, passes and
updates are its authors', the code is not."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trainings.resnet import ResNet
from benchmarks.trainings.training import Training, freeze

CLASSES, IGNORED = 19, 255


class Prediction(nn.Module):
    """Four dilated convolutions, of which the published loop adds up the first two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(channels, CLASSES, 3, padding=d, dilation=d) for d in (6, 12, 18, 24)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2d_list[0](x)
        y += self.conv2d_list[1](x)
        return y


class DeepLab(nn.Module):
    """Predictions from the third and the fourth layer; batch norm's scales and shifts are not trained."""

    def __init__(self, blocks: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.body = ResNet(blocks, True, width, dilations=(1, 1, 2, 4))
        self.layer5, self.layer6 = Prediction(16 * width), Prediction(32 * width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.01)
            elif isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        x = body.layer3(body.layer2(body.layer1(x)))
        return self.layer5(x), self.layer6(body.layer4(x))


class Discriminator(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [CLASSES, width, 2 * width, 4 * width, 8 * width, 1]
        self.convs = nn.ModuleList(
            nn.Conv2d(c, k, 4, stride=2, padding=1) for c, k in itertools.pairwise(widths)
        )
        self.leaky_relu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        *convs, last = self.convs
        for conv in convs:
            x = self.leaky_relu(conv(x))
        return last(x)


class AdaptSegNet(Training):
    """Source images with labels, target images against the frozen discriminators, then these on both."""

    def __init__(
        self,
        source: tuple[int, int],
        target: tuple[int, int],
        blocks: tuple[int, ...] = (3, 4, 23, 3),
        width: int = 64,
    ) -> None:
        super().__init__()
        self.model = DeepLab(blocks, width)
        self.discriminators = nn.ModuleList(Discriminator(width) for _ in range(2))
        self.bce_loss = nn.BCEWithLogitsLoss()
        self.interp = nn.Upsample(size=source, mode="bilinear")
        self.interp_target = nn.Upsample(size=target, mode="bilinear")
        trained = [p for p in self.model.body.parameters() if p.requires_grad]
        last = [*self.model.layer5.parameters(), *self.model.layer6.parameters()]
        groups = [{"params": trained, "lr": 2.5e-4}, {"params": last, "lr": 2.5e-3}]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
        self.d_optimizers = [
            torch.optim.Adam(d.parameters(), 1e-4, betas=(0.9, 0.99)) for d in self.discriminators
        ]
        self.images("source", 1, 3, *source)
        self.images("target", 1, 3, *target)
        self.labels("source_labels", CLASSES, 1, *source)
        self.source_labels[torch.rand(1, *source) < 0.05] = IGNORED

    def judged(self, discriminator: nn.Module, prediction: Tensor, label: float) -> Tensor:
        logits = discriminator(F.softmax(prediction, dim=1))
        return self.bce_loss(logits, torch.empty_like(logits).fill_(label))

    def segmented(self, prediction: Tensor) -> Tensor:
        known = self.source_labels != IGNORED
        rows = prediction.transpose(1, 2).transpose(2, 3).contiguous()
        rows = rows[known[..., None].expand_as(rows)].view(-1, CLASSES)
        return F.cross_entropy(rows, self.source_labels[known])

    def forward(self) -> list[Tensor]:
        for optimizer in (self.optimizer, *self.d_optimizers):
            optimizer.zero_grad()
        freeze(self.discriminators)
        of_source = [self.interp(p) for p in self.model(self.source)]
        first, second = (self.segmented(p) for p in of_source)
        (second + 0.1 * first).backward()
        of_target = [self.interp_target(p) for p in self.model(self.target)]
        pairs = zip(self.discriminators, of_target, strict=True)
        adversarial = [self.judged(d, p, 0.0) for d, p in pairs]
        (2e-4 * adversarial[0] + 1e-3 * adversarial[1]).backward()
        freeze(self.discriminators, False)
        losses = [first, second, *adversarial]
        for predictions, label in ((of_source, 0.0), (of_target, 1.0)):
            for discriminator, p in zip(self.discriminators, predictions, strict=True):
                loss = self.judged(discriminator, p.detach(), label) / 2
                loss.backward()
                losses.append(loss)
        for optimizer in (self.optimizer, *self.d_optimizers):
            optimizer.step()
        return losses
