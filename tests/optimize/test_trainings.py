"""Trainings as their authors wrote them beside the same with one line more: the same losses, and no slower.

`pytest tests/optimize/test_trainings.py -k trains_the_same -s` prints how much faster. At their published
sizes they run with FASTDA_SLOW_TESTS=1.
"""

import importlib
import itertools
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

import fastda
from fastda.compatibility import ImagePool
from tests.optimize.cases import GANLoss

pytestmark = [pytest.mark.isa_independent, pytest.mark.gain]


@pytest.fixture
def dtype(request, monkeypatch):
    """What models and data are made of. In float64 nothing is timed, and the small images are served."""
    torch.set_default_dtype(getattr(torch, request.param))
    if request.param == "float64":
        monkeypatch.setattr(importlib.import_module("fastda.optimize.convolution"), "LEAST_PIXELS", 0)
    yield request.param
    torch.set_default_dtype(torch.float32)


def sizes(names, small, medium, published):
    """Of the models and images: the first are exact, the second and the third tell the speed."""
    cases = [("float64", *small), ("float32", *medium)]
    cases.append(pytest.param("float32", *published, marks=pytest.mark.slow))
    return pytest.mark.parametrize(("dtype", *names), cases, indirect=["dtype"])


def check_training(build, step, steps=50, seconds_for_it=60):
    """Train the modules that `build` makes as they are and with one line more, step by step in turn.

    In float64 the losses are the same all along. In float32 such a training soon leaves its own float64
    course, whoever multiplies; there every step starts from the same state, and after a minute six steps are
    enough. Prints what was replaced, and the median of the original's time over the optimized one's.
    """
    exact = torch.get_default_dtype() == torch.float64
    trainings, seconds, history = [], ([], []), []
    for optimized in (False, True):
        torch.manual_seed(0)
        modules, optimizers = build()
        if optimized:
            reports = [fastda.optimize(module) for module in modules]
            assert sum(len(report.replaced) for report in reports) >= 1
            print(*reports, sep="\n")
        trainings.append((*modules, *optimizers))
    begun = time.monotonic()
    for i in range(steps):
        if not exact:
            if i >= 6 and time.monotonic() - begun > seconds_for_it:
                break
            for theirs, ours in zip(*trainings, strict=True):
                ours.load_state_dict(theirs.state_dict())
        losses, grads = [], []
        for training, times in zip(trainings, seconds, strict=True):
            torch.manual_seed(i)
            begin = time.thread_time()
            losses.append(step(*training))
            times.append(time.thread_time() - begin)
            modules = [m for m in training if isinstance(m, nn.Module)]
            grads.append(torch.cat([p.grad.flatten() for m in modules for p in m.parameters()]))
        assert losses[1] == pytest.approx(losses[0], rel=1e-6 if exact else 1e-4)
        # In float32 some of the many ReLU gates and maxima fall to the other side.
        assert (grads[1] - grads[0]).norm() <= (1e-6 if exact else 5e-2) * grads[0].norm()
        history += losses[:1]
    assert not exact or history[0] != pytest.approx(history[-1], rel=0.01)
    ratio = statistics.median(before / after for before, after in zip(*seconds, strict=True))
    assert sum(calls.served for report in reports for calls in report.calls().values()) > len(history)
    print(*(f"{path or 'the model'}: {c}" for r in reports for path, c in r.calls().items()), sep="\n")
    step_ms = 1e3 * statistics.median(seconds[1])
    print(f"{ratio:.2f} times as fast, {step_ms:.0f} ms a step, {len(history)} steps")
    for report in reports:
        report.undo()


class BasicBlock(nn.Module):
    """torchvision's, of which tllib's backbones consist."""

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            shortcut = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(planes))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet18(nn.Module):
    """tllib's backbone: no pooling at its end, no classifier."""

    def __init__(self, width=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(BasicBlock(i, o, 1 if i == o else 2), BasicBlock(o, o, 1))
            for i, o in itertools.pairwise(widths)
        )
        self.out_features = 8 * width

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class ImageClassifier(nn.Module):
    """tllib's."""

    def __init__(self, backbone, num_classes, bottleneck_dim=256):
        super().__init__()
        self.backbone = backbone
        self.pool_layer = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
        layers = [nn.Linear(backbone.out_features, bottleneck_dim), nn.BatchNorm1d(bottleneck_dim)]
        self.bottleneck = nn.Sequential(*layers, nn.ReLU())
        self.head = nn.Linear(bottleneck_dim, num_classes)

    def forward(self, x):
        f = self.bottleneck(self.pool_layer(self.backbone(x)))
        return self.head(f), f


class DomainDiscriminator(nn.Sequential):
    """tllib's."""

    def __init__(self, in_feature, hidden_size):
        super().__init__(
            *(nn.Linear(in_feature, hidden_size), nn.BatchNorm1d(hidden_size), nn.ReLU()),
            *(nn.Linear(hidden_size, hidden_size), nn.BatchNorm1d(hidden_size), nn.ReLU()),
            *(nn.Linear(hidden_size, 1), nn.Sigmoid()),
        )


class GradientReverseFunction(Function):
    @staticmethod
    def forward(ctx, input, coeff=1.0):
        ctx.coeff = coeff
        return input * 1.0

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.neg() * ctx.coeff, None


class WarmStartGradientReverseLayer(nn.Module):
    """tllib's."""

    def __init__(self, alpha=1.0, lo=0.0, hi=1.0, max_iters=1000.0, auto_step=False):
        super().__init__()
        self.alpha, self.lo, self.hi, self.max_iters, self.auto_step = alpha, lo, hi, max_iters, auto_step
        self.iter_num = 0

    def forward(self, input):
        progress = self.alpha * self.iter_num / self.max_iters
        coeff = 2.0 * (self.hi - self.lo) / (1.0 + torch.exp(torch.tensor(-progress)).item())
        if self.auto_step:
            self.step()
        return GradientReverseFunction.apply(input, coeff - (self.hi - self.lo) + self.lo)

    def step(self):
        self.iter_num += 1


class DomainAdversarialLoss(nn.Module):
    """tllib's."""

    def __init__(self, domain_discriminator):
        super().__init__()
        self.grl = WarmStartGradientReverseLayer(alpha=1.0, lo=0.0, hi=1.0, max_iters=50, auto_step=True)
        self.domain_discriminator = domain_discriminator
        self.domain_discriminator_accuracy = None

    def forward(self, f_s, f_t):
        f = self.grl(torch.cat((f_s, f_t), dim=0))
        d_s, d_t = self.domain_discriminator(f).chunk(2, dim=0)
        ones, zeros = torch.ones_like(d_s), torch.zeros_like(d_t)
        self.domain_discriminator_accuracy = ((d_s > 0.5).float().mean() + (d_t < 0.5).float().mean()) / 2
        return 0.5 * (F.binary_cross_entropy(d_s, ones) + F.binary_cross_entropy(d_t, zeros))


@sizes(("width", "size", "n"), small=(16, 64, 4), medium=(32, 128, 6), published=(64, 224, 8))
def test_dann_with_tllib_layers_trains_the_same(dtype, width, size, n):
    def build():
        classifier = ImageClassifier(ResNet18(width), num_classes=5)
        adversary = DomainAdversarialLoss(DomainDiscriminator(256, 256))
        new = [p for name, p in classifier.named_parameters() if not name.startswith("backbone")]
        groups = [{"params": classifier.backbone.parameters(), "lr": 1e-3}, {"params": new}]
        groups += [{"params": adversary.parameters()}]
        optimizer = torch.optim.SGD(groups, 0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)
        return (classifier, adversary), (optimizer,)

    def step(classifier, adversary, optimizer):
        x_s, labels_s = torch.randn(n, 3, size, size), torch.randint(5, (n,))
        x_t = torch.randn(n, 3, size, size) + 0.5
        y, f = classifier(torch.cat((x_s, x_t), dim=0))
        y_s, _ = y.chunk(2, dim=0)
        f_s, f_t = f.chunk(2, dim=0)
        cls_loss, transfer_loss = F.cross_entropy(y_s, labels_s), adversary(f_s, f_t)
        optimizer.zero_grad()
        (cls_loss + transfer_loss).backward()
        optimizer.step()
        return [cls_loss.item(), transfer_loss.item()]

    check_training(build, step)


class SimGANBlock(nn.Module):
    """The SimGAN repositories'."""

    def __init__(self, channels, k=3):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, channels, k, 1, k // 2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, k, 1, k // 2),
        )
        self.relu = nn.ReLU()

    def forward(self, x):
        convs = self.convs(x)
        sum = convs + x
        return self.relu(sum)


class SimGANRefiner(nn.Module):
    def __init__(self, blocks, features):
        super().__init__()
        self.conv_1 = nn.Sequential(nn.Conv2d(1, features, 3, stride=1, padding=1))
        self.resnet_blocks = nn.Sequential(*(SimGANBlock(features) for _ in range(blocks)))
        self.conv_2 = nn.Sequential(nn.Conv2d(features, 1, 1, 1, 0), nn.Tanh())

    def forward(self, x):
        return self.conv_2(self.resnet_blocks(self.conv_1(x)))


class SimGANDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            *(nn.Conv2d(1, 96, 3, 2, 1), nn.ReLU(), nn.Conv2d(96, 64, 3, 2, 1), nn.ReLU()),
            *(nn.MaxPool2d(3, 2, 1), nn.Conv2d(64, 32, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 1, 1, 0), nn.ReLU(), nn.Conv2d(32, 2, 1, 1, 0)),
        )

    def forward(self, x):
        convs = self.convs(x)
        return convs.permute(0, 2, 3, 1).reshape(-1, 2)


@sizes(("blocks", "features", "n"), small=(2, 16, 2), medium=(4, 32, 4), published=(4, 64, 32))
def test_simgan_with_its_usual_blocks_trains_the_same(dtype, blocks, features, n):
    def build():
        refiner, discriminator = SimGANRefiner(blocks, features), SimGANDiscriminator()
        return (refiner, discriminator), (
            torch.optim.SGD(refiner.parameters(), 1e-2),
            torch.optim.SGD(discriminator.parameters(), 1e-2),
        )

    def step(refiner, discriminator, refiner_optimizer, discriminator_optimizer):
        synthetic, real = torch.rand(n, 1, 35, 55), torch.rand(n, 1, 35, 55)
        refined = refiner(synthetic)
        logits = discriminator(refined)
        adversarial = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        refiner_loss = adversarial + 0.1 * F.l1_loss(refined, synthetic)
        refiner_optimizer.zero_grad()
        refiner_loss.backward()
        refiner_optimizer.step()
        on_real, on_refined = discriminator(real), discriminator(refiner(synthetic).detach())
        discriminator_loss = F.cross_entropy(on_real, torch.zeros(len(on_real), dtype=torch.long))
        discriminator_loss = discriminator_loss + F.cross_entropy(
            on_refined, torch.ones(len(on_refined), dtype=torch.long)
        )
        discriminator_optimizer.zero_grad()
        discriminator_loss.backward()
        discriminator_optimizer.step()
        return [refiner_loss.item(), discriminator_loss.item()]

    check_training(build, step)


class ResnetBlock(nn.Module):
    """CycleGAN's."""

    def __init__(self, dim):
        super().__init__()
        layers = []
        for last in (False, True):
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, kernel_size=3), nn.InstanceNorm2d(dim)]
            layers += [] if last else [nn.ReLU(True)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """CycleGAN's."""

    def __init__(self, ngf, n_blocks):
        super().__init__()
        model = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, kernel_size=7)]
        model += [nn.InstanceNorm2d(ngf), nn.ReLU(True)]
        for c in (ngf, 2 * ngf):
            model += [nn.Conv2d(c, 2 * c, kernel_size=3, stride=2, padding=1)]
            model += [nn.InstanceNorm2d(2 * c), nn.ReLU(True)]
        model += [ResnetBlock(4 * ngf) for _ in range(n_blocks)]
        for c in (4 * ngf, 2 * ngf):
            up = nn.ConvTranspose2d(c, c // 2, kernel_size=3, stride=2, padding=1, output_padding=1)
            model += [up, nn.InstanceNorm2d(c // 2), nn.ReLU(True)]
        self.model = nn.Sequential(*model, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, kernel_size=7), nn.Tanh())

    def forward(self, input):
        return self.model(input)


class NLayerDiscriminator(nn.Module):
    """CycleGAN's, which judges patches of 70×70 pixels."""

    def __init__(self, ndf):
        super().__init__()
        sequence = [nn.Conv2d(3, ndf, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for c, stride in ((ndf, 2), (2 * ndf, 2), (4 * ndf, 1)):
            sequence += [nn.Conv2d(c, 2 * c, kernel_size=4, stride=stride, padding=1)]
            sequence += [nn.InstanceNorm2d(2 * c), nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*sequence, nn.Conv2d(8 * ndf, 1, kernel_size=4, stride=1, padding=1))

    def forward(self, input):
        return self.model(input)


class CycleGAN(nn.Module):
    """One direction of it: both networks, and the losses as in `backward_G` and `backward_D_basic`."""

    def __init__(self, ngf, n_blocks):
        super().__init__()
        self.netG, self.netD = ResnetGenerator(ngf, n_blocks), NLayerDiscriminator(ngf)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0.0, 0.02)
        self.criterionGAN, self.fake_pool = GANLoss("lsgan"), ImagePool(10)

    def optimize_parameters(self, real_A, real_B, optimizer_G, optimizer_D):
        fake_B = self.netG(real_A)
        self.netD.requires_grad_(False)
        loss_G = self.criterionGAN(self.netD(fake_B), True) + 5 * F.l1_loss(fake_B, real_A)
        optimizer_G.zero_grad()
        loss_G.backward()
        optimizer_G.step()
        self.netD.requires_grad_(True)
        loss_D_real = self.criterionGAN(self.netD(real_B), True)
        loss_D_fake = self.criterionGAN(self.netD(self.fake_pool.query(fake_B.detach())), False)
        loss_D = (loss_D_real + loss_D_fake) * 0.5
        optimizer_D.zero_grad()
        loss_D.backward()
        optimizer_D.step()
        return [loss_G.item(), loss_D.item()]


@sizes(("ngf", "n_blocks", "size"), small=(8, 2, 64), medium=(32, 6, 96), published=(64, 9, 256))
def test_cyclegan_trains_the_same(dtype, ngf, n_blocks, size):
    def build():
        model = CycleGAN(ngf, n_blocks)
        return (model,), [
            torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999)) for net in (model.netG, model.netD)
        ]

    def step(model, optimizer_G, optimizer_D):
        real_A, real_B = torch.rand(1, 3, size, size) * 2 - 1, torch.rand(1, 3, size, size) - 0.5
        return model.optimize_parameters(real_A, real_B, optimizer_G, optimizer_D)

    check_training(build, step)
