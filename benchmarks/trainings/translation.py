"""Translation of images: CUT, CycleGAN, UNIT and pixelda; layers, passes and updates are theirs, the code is
not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trainings.training import Training, freeze, update
from fastda.compatibility import ImagePool


def _binomial(n: int, channels: int) -> Tensor:
    """One smoothing filter of n×n for each channel, which sums to one."""
    row = torch.tensor([math.comb(n - 1, i) / 2.0 ** (n - 1) for i in range(n)])
    return row.outer(row).expand(channels, 1, n, n).clone()


class Downsample(nn.Module):
    """Every second pixel of the smoothed image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", _binomial(3, channels))
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.filt, stride=2, groups=x.shape[1])


class Upsample(nn.Module):
    """Twice the size, smoothed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", 4 * _binomial(4, channels))
        self.pad = nn.ReplicationPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(self.pad(x), self.filt, stride=2, padding=2, groups=x.shape[1])
        return y[:, :, 1:, 1:][:, :, :-1, :-1]


class _ReflectedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for last in (False, True):
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
            layers += [] if last else [nn.ReLU(True)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Generator(nn.Module):
    """Nine reflected blocks between two smoothed halvings and doublings."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.InstanceNorm2d(width)]
        layers += [nn.ReLU(True)]
        for c in (width, 2 * width):
            layers += [nn.Conv2d(c, 2 * c, 3, padding=1), nn.InstanceNorm2d(2 * c), nn.ReLU(True)]
            layers += [Downsample(2 * c)]
        layers += [_ReflectedBlock(4 * width) for _ in range(blocks)]
        for c in (4 * width, 2 * width):
            layers += [Upsample(c), nn.Conv2d(c, c // 2, 3, padding=1), nn.InstanceNorm2d(c // 2)]
            layers += [nn.ReLU(True)]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())

    def forward(self, x: Tensor, taps: Sequence[int] = ()) -> Any:
        """The image; with `taps`, what these layers give, and nothing beyond the last of them."""
        if not taps:
            return self.model(x)
        found = []
        for i, layer in enumerate(self.model):
            x = layer(x)
            if i in taps:
                found.append(x)
            if i == taps[-1]:
                break
        return found


class PatchJudge(nn.Sequential):
    """The PatchGAN of 70×70 pixels, smoothed where it halves."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, padding=1), nn.LeakyReLU(0.2, True)]
        layers += [Downsample(width)]
        for c, halved in ((width, True), (2 * width, True), (4 * width, False)):
            layers += [nn.Conv2d(c, 2 * c, 4, padding=1), nn.InstanceNorm2d(2 * c)]
            layers += [nn.LeakyReLU(0.2, True), *([Downsample(2 * c)] if halved else [])]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))


class Lsgan(nn.Module):
    """A mean squared distance to one label, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real_label", torch.tensor(1.0))
        self.register_buffer("fake_label", torch.tensor(0.0))
        self.loss = nn.MSELoss()

    def forward(self, prediction: Tensor, is_real: bool) -> Tensor:
        label = self.real_label if is_real else self.fake_label
        return self.loss(prediction, label.expand_as(prediction))


def _xavier(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_normal_(module.weight, gain=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _adam(*modules: nn.Module, lr: float = 2e-4, **settings: Any) -> torch.optim.Adam:
    parameters = chain.from_iterable(module.parameters() for module in modules)
    return torch.optim.Adam(parameters, lr, betas=(0.5, 0.999), **settings)


class Projections(nn.Module):
    """Two linear layers for each tapped layer, on some of its pixels, of length one."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(c, width), nn.ReLU(), nn.Linear(width, width)) for c in channels
        )

    def forward(self, features: list[Tensor], places: list[Tensor]) -> list[Tensor]:
        found = []
        for mlp, feature, place in zip(self.mlps, features, places, strict=True):
            y = mlp(feature.permute(0, 2, 3, 1).flatten(1, 2)[:, place, :].flatten(0, 1))
            found.append(y.div(y.pow(2).sum(1, keepdim=True).pow(0.5) + 1e-7))
        return found


class Cut(Training):
    """The discriminator, then generator and projections: lsgan, and contrasts of 256 patches in five layers,
    also of the identity."""

    TAPS = (0, 4, 8, 12, 16)

    def __init__(self, size: int, width: int = 64, blocks: int = 9, projected: int = 256) -> None:
        super().__init__()
        self.generator, self.discriminator = Generator(width, blocks), PatchJudge(width)
        self.projections = Projections((3, 2 * width, 4 * width, 4 * width, 4 * width), projected)
        self.apply(_xavier)
        self.criterion, self.contrast = Lsgan(), nn.CrossEntropyLoss(reduction="none")
        networks = (self.generator, self.discriminator, self.projections)
        self.g_optimizer, self.d_optimizer, self.f_optimizer = (_adam(network) for network in networks)
        self.images("real_a", 1, 3, size, size)
        self.images("real_b", 1, 3, size, size)

    def forward(self) -> list[Tensor]:
        fake_b, same_b = self.generator(torch.cat((self.real_a, self.real_b), dim=0)).chunk(2)
        freeze([self.discriminator], False)
        on_fake = self.criterion(self.discriminator(fake_b.detach()), False)
        d_loss = (on_fake + self.criterion(self.discriminator(self.real_b), True)) * 0.5
        update(d_loss, self.d_optimizer)
        freeze([self.discriminator])
        self.g_optimizer.zero_grad()
        self.f_optimizer.zero_grad()
        adversarial = self.criterion(self.discriminator(fake_b), True)
        contrast = (self.contrasts(self.real_a, fake_b) + self.contrasts(self.real_b, same_b)) * 0.5
        (adversarial + contrast).backward()
        self.g_optimizer.step()
        self.f_optimizer.step()
        return [d_loss, adversarial, contrast]

    def contrasts(self, source: Tensor, target: Tensor) -> Tensor:
        of_target, of_source = self.generator(target, self.TAPS), self.generator(source, self.TAPS)
        places = [torch.randperm(f[0, 0].numel())[:256] for f in of_source]
        keys, queries = self.projections(of_source, places), self.projections(of_target, places)
        pairs = zip(queries, keys, strict=True)
        return torch.stack([self.contrast_of(query, key.detach()) for query, key in pairs]).mean()

    def contrast_of(self, query: Tensor, key: Tensor) -> Tensor:
        same = torch.bmm(query[:, None], key[:, :, None]).view(-1, 1)
        others = torch.bmm(query[None], key[None].transpose(2, 1))
        others.masked_fill_(torch.eye(len(query), dtype=torch.bool)[None], -10.0)
        logits = torch.cat((same, others[0]), dim=1) / 0.07
        return self.contrast(logits, torch.zeros(len(logits), dtype=torch.long)).mean()


class CycleGan(Training):
    """Both generators at once: two cycles, two identities, lsgan; then both discriminators, on a pool."""

    def __init__(self, size: int, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        self.g_a, self.g_b = Generator(width, blocks), Generator(width, blocks)
        self.d_a, self.d_b = PatchJudge(width), PatchJudge(width)
        self.apply(_xavier)
        self.criterion, self.distance = Lsgan(), nn.L1Loss()
        self.pool_a, self.pool_b = ImagePool(50), ImagePool(50)
        self.g_optimizer = _adam(self.g_a, self.g_b)
        self.d_optimizer = _adam(self.d_a, self.d_b)
        self.images("real_a", 1, 3, size, size)
        self.images("real_b", 1, 3, size, size)

    def forward(self) -> list[Tensor]:
        a, b = self.real_a, self.real_b
        fake_b = self.g_a(a)
        again_a = self.g_b(fake_b)
        fake_a = self.g_b(b)
        again_b = self.g_a(fake_a)
        freeze([self.d_a, self.d_b])
        self.g_optimizer.zero_grad()
        same = (self.distance(self.g_a(b), b) + self.distance(self.g_b(a), a)) * 5.0
        adversarial = self.criterion(self.d_a(fake_b), True) + self.criterion(self.d_b(fake_a), True)
        cycle = (self.distance(again_a, a) + self.distance(again_b, b)) * 10.0
        (adversarial + cycle + same).backward()
        self.g_optimizer.step()
        freeze([self.d_a, self.d_b], False)
        self.d_optimizer.zero_grad()
        pairs = ((self.d_a, b, self.pool_b.query(fake_b)), (self.d_b, a, self.pool_a.query(fake_a)))
        judged = [self.judge(*pair) for pair in pairs]
        self.d_optimizer.step()
        return [adversarial, cycle, same, *judged]

    def judge(self, network: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        loss = self.criterion(network(real), True)
        loss = (loss + self.criterion(network(fake.detach()), False)) * 0.5
        loss.backward()
        return loss


class _LayerNorm(nn.Module):
    """Over a whole image, with the sample's deviation; its `view` takes contiguous images alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(len(x), -1)
        mean, deviation = (t.view(-1, 1, 1, 1) for t in (flat.mean(1), flat.std(1)))
        x = (x - mean) / (deviation + 1e-5)
        return x * self.gamma.view(1, -1, 1, 1) + self.beta.view(1, -1, 1, 1)


class _Padded(nn.Module):
    """Reflection, convolution, normalisation, activation, each a module of its own."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, padding: int, norm: Any, activation: Any
    ) -> None:
        super().__init__()
        self.pad, self.conv = nn.ReflectionPad2d(padding), nn.Conv2d(inputs, outputs, kernel, stride)
        self.norm = norm(outputs) if norm else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pad(x))
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class _PaddedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            _Padded(width, width, 3, 1, 1, nn.InstanceNorm2d, nn.ReLU(inplace=True)),
            _Padded(width, width, 3, 1, 1, nn.InstanceNorm2d, None),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        y += x
        return y


class AutoEncoder(nn.Module):
    """A variational one, whose deviation is one."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        norm = nn.InstanceNorm2d
        layers: list[nn.Module] = [_Padded(3, width, 7, 1, 3, norm, nn.ReLU(inplace=True))]
        for c in (width, 2 * width):
            layers += [_Padded(c, 2 * c, 4, 2, 1, norm, nn.ReLU(inplace=True))]
        self.enc = nn.Sequential(*layers, *(_PaddedBlock(4 * width) for _ in range(blocks)))
        layers = [_PaddedBlock(4 * width) for _ in range(blocks)]
        for c in (4 * width, 2 * width):
            layers += [nn.Upsample(scale_factor=2)]
            layers += [_Padded(c, c // 2, 5, 1, 2, _LayerNorm, nn.ReLU(inplace=True))]
        self.dec = nn.Sequential(*layers, _Padded(width, 3, 7, 1, 3, None, nn.Tanh()))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code, and the code with noise."""
        code = self.enc(x)
        return code, code + torch.randn(code.shape, dtype=code.dtype)


class Scales(nn.Module):
    """Three discriminators of four halvings, each on an image of half the size."""

    def __init__(self, width: int, count: int = 3) -> None:
        super().__init__()
        self.downsample = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.cnns = nn.ModuleList(self.network(width) for _ in range(count))

    @staticmethod
    def network(width: int) -> nn.Module:
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        layers = [_Padded(c, k, 4, 2, 1, None, nn.LeakyReLU(0.2, inplace=True)) for c, k in pairwise(widths)]
        return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 1))

    def loss(self, x: Tensor, label: int) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for network in self.cnns:
            total = total + torch.mean((network(x) - label) ** 2)
            x = self.downsample(x)
        return total


def _kaiming(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=0, mode="fan_in")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Unit(Training):
    """The discriminators, the generators' passes recorded and thrown away; then both generators: within a
    domain, across, and back."""

    def __init__(self, size: int, width: int = 64, blocks: int = 4, scales: int = 3) -> None:
        super().__init__()
        self.gen_a, self.gen_b = AutoEncoder(width, blocks), AutoEncoder(width, blocks)
        self.dis_a, self.dis_b = Scales(width, scales), Scales(width, scales)
        self.apply(_kaiming)
        for part in (self.dis_a, self.dis_b):
            for conv in (m for m in part.modules() if isinstance(m, nn.Conv2d)):
                nn.init.normal_(conv.weight, 0.0, 0.02)
        self.g_optimizer = _adam(self.gen_a, self.gen_b, lr=1e-4, weight_decay=1e-4)
        self.d_optimizer = _adam(self.dis_a, self.dis_b, lr=1e-4, weight_decay=1e-4)
        self.images("a", 1, 3, size, size)
        self.images("b", 1, 3, size, size)

    def forward(self) -> list[Tensor]:
        gen_a, gen_b, a, b = self.gen_a, self.gen_b, self.a, self.b
        self.d_optimizer.zero_grad()
        _, noisy_a = gen_a.encode(a)
        _, noisy_b = gen_b.encode(b)
        b_as_a, a_as_b = gen_a.dec(noisy_b), gen_b.dec(noisy_a)
        d_loss = self.dis_a.loss(b_as_a.detach(), 0) + self.dis_a.loss(a, 1)
        d_loss = d_loss + self.dis_b.loss(a_as_b.detach(), 0) + self.dis_b.loss(b, 1)
        d_loss.backward()
        self.d_optimizer.step()

        self.g_optimizer.zero_grad()
        code_a, noisy_a = gen_a.encode(a)
        code_b, noisy_b = gen_b.encode(b)
        again_a, again_b = gen_a.dec(noisy_a), gen_b.dec(noisy_b)
        b_as_a, a_as_b = gen_a.dec(noisy_b), gen_b.dec(noisy_a)
        code_back_b, noisy_back_b = gen_a.encode(b_as_a)
        code_back_a, noisy_back_a = gen_b.encode(a_as_b)
        back_a, back_b = gen_a.dec(noisy_back_a), gen_b.dec(noisy_back_b)
        pairs = ((again_a, a), (again_b, b), (back_a, a), (back_b, b))
        same = torch.stack([(x - y).abs().mean() for x, y in pairs]).sum()
        codes = (code_a, code_b, code_back_a, code_back_b)
        small = torch.stack([code.pow(2).mean() for code in codes]).sum()
        adversarial = self.dis_a.loss(b_as_a, 1) + self.dis_b.loss(a_as_b, 1)
        (adversarial + 10 * same + 0.01 * small).backward()
        self.g_optimizer.step()
        return [d_loss, adversarial, same, small]


class _NormBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class NoisyGenerator(nn.Module):
    """Noise becomes three more channels of the image."""

    def __init__(self, size: int, width: int, blocks: int) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 3 * size * size)
        self.l1 = nn.Sequential(nn.Conv2d(6, width, 3, 1, 1), nn.ReLU(inplace=True))
        self.resblocks = nn.Sequential(*(_NormBlock(width) for _ in range(blocks)))
        self.l2 = nn.Sequential(nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh())

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        joined = torch.cat((image, self.fc(noise).view(image.shape)), 1)
        return self.l2(self.resblocks(self.l1(joined)))


def _halvings(width: int) -> list[nn.Module]:
    widths = [3, width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = []
    for c, k in pairwise(widths):
        layers += [nn.Conv2d(c, k, 3, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.InstanceNorm2d(k)] if c > 3 else []
    return layers


class Pixelda(Training):
    """Generator and classifier, the discriminator's gradients thrown away; the discriminator; a look at the
    classifier's accuracy."""

    def __init__(self, batch: int, size: int = 32, width: int = 64, blocks: int = 6) -> None:
        super().__init__()
        self.generator = NoisyGenerator(size, width, blocks)
        self.discriminator = nn.Sequential(*_halvings(width), nn.Conv2d(8 * width, 1, 3, 1, 1))
        self.features = nn.Sequential(*_halvings(width))
        self.output = nn.Sequential(nn.Linear(8 * width * (size // 16) ** 2, 10), nn.Softmax(dim=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
        self.adversarial_loss, self.task_loss = nn.MSELoss(), nn.CrossEntropyLoss()
        self.g_optimizer = _adam(self.generator, self.features, self.output)
        self.d_optimizer = _adam(self.discriminator)
        self.images("a", batch, 3, size, size)
        self.images("b", batch, 3, size, size)
        self.labels("a_labels", 10, batch)

    def classify(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.output(features.view(features.size(0), -1))

    def forward(self) -> list[Tensor]:
        a, b, labels = self.a, self.b, self.a_labels
        self.g_optimizer.zero_grad()
        fake_b = self.generator(a, torch.rand(len(a), 10, dtype=a.dtype) * 2 - 1)
        of_fake = self.classify(fake_b)
        task = (self.task_loss(of_fake, labels) + self.task_loss(self.classify(a), labels)) / 2
        judged = self.discriminator(fake_b)
        valid, fake = torch.ones_like(judged), torch.zeros_like(judged)
        adversarial = self.adversarial_loss(judged, valid)
        (adversarial + 0.1 * task).backward()
        self.g_optimizer.step()
        self.d_optimizer.zero_grad()
        d_loss = self.adversarial_loss(self.discriminator(b), valid)
        d_loss = (d_loss + self.adversarial_loss(self.discriminator(fake_b.detach()), fake)) / 2
        d_loss.backward()
        self.d_optimizer.step()
        _ = (of_fake.detach().argmax(1) == labels).float().mean(), self.classify(b).argmax(1)
        return [task, adversarial, d_loss]
