"""Losses that look like a patch loss: clamps, epsilons, labels of their own, values far out."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optimize.cases import F64, Case, GANLoss, cases, maps
from tests.optimize.checking import check

FAR = 60.0


def logits(n=3, c=1, h=5, w=4, scale=1.0, dtype=F64):
    return maps(n, c, h, w, dtype, scale)


class _Loss(Case):
    """A loss module of a prediction and a flag. `forward` is that of the case."""

    inner = nn.BCEWithLogitsLoss
    channels = 1

    def build(self):
        class Written(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.loss = inner

        Written.forward = vars(type(self)).get("forward", _Loss.forward)
        return Written(self.inner())

    def forward(self, prediction, real):
        label = torch.tensor(1.0 if real else 0.0, dtype=prediction.dtype)
        return self.loss(prediction, label.expand_as(prediction))

    def inputs(self):
        sizes = ((3, 1.0), (1, 4.0), (2, FAR))
        return [(logits(n, self.channels, scale=scale), real) for n, scale in sizes for real in (True, False)]


# -- what is served, in its usual spellings ------------------------------------------------------------------


class Squares(_Loss):
    inner = nn.MSELoss


class BinaryCrossEntropies(_Loss):
    served = True


class CrossEntropies(_Loss):
    served = True
    inner = nn.CrossEntropyLoss
    channels = 2

    def forward(self, prediction, real):
        rows = prediction.permute(0, 2, 3, 1).reshape(-1, 2)
        return self.loss(rows, torch.full((len(rows),), int(not real)))


class CrossEntropiesWithRealAsClassOne(CrossEntropies):
    def forward(self, prediction, real):
        rows = prediction.permute(0, 2, 3, 1).reshape(-1, 2)
        return self.loss(rows, torch.full((len(rows),), int(real)))


class CrossEntropiesOfMaps(CrossEntropies):
    def forward(self, prediction, real):
        n, _, h, w = prediction.shape
        return self.loss(prediction, torch.ones(n, h, w, dtype=torch.long) * int(real))


class CrossEntropiesOfPairedPixels(CrossEntropies):
    """`view(N, -1, 2)` of an (N, 2, h, w) map pairs pixels with classes."""

    def forward(self, prediction, real):
        rows = prediction.view(len(prediction), -1, 2).flatten(0, 1)
        return self.loss(rows, torch.full((len(rows),), int(real)))


class CycleGANs(_Loss):
    def build(self):
        return GANLoss("lsgan", 0.9, 0.1)


class CycleGANsVanilla(CycleGANs):
    served = True

    def build(self):
        return GANLoss("vanilla", 0.9)


class CycleGANsWasserstein(CycleGANs):
    def build(self):
        return GANLoss("wgangp")


class WithADefaultFlag(BinaryCrossEntropies):
    """tllib's three GAN losses."""

    def forward(self, prediction, real=True):
        return self.loss(
            prediction, torch.full((), float(real), dtype=prediction.dtype).expand_as(prediction)
        )

    def inputs(self):
        return [(logits(),), (logits(2), False)]


# -- probabilities -------------------------------------------------------------------------------------------


class OfProbabilities(_Loss):
    """Beyond |p| = 17 torch clamps the logarithm: 100 and no gradient."""

    inner = nn.BCELoss
    why = r"clamp|probabilit"

    def forward(self, prediction, real):
        return self.loss(torch.sigmoid(prediction), torch.full_like(prediction, float(real)))


class OfProbabilitiesInFunctions(OfProbabilities):
    why = None

    def forward(self, prediction, real):
        return F.binary_cross_entropy(torch.sigmoid(prediction), torch.full_like(prediction, float(real)))


class OfClampedProbabilities(OfProbabilities):
    def forward(self, prediction, real):
        p = torch.sigmoid(prediction).clamp(1e-6, 1 - 1e-6)
        return self.loss(p, torch.full_like(p, float(real)))


class OfALayer(OfProbabilities):
    def build(self):
        return nn.Sequential(nn.Sigmoid(), super().build())

    def call(self, model, prediction, real):
        return model[1](prediction, real)


# -- clamps and epsilons -------------------------------------------------------------------------------------


def _expected(name, inner, forward, **more):
    return type(
        name, (_Loss,), {"inner": staticmethod(inner), "forward": forward, "__module__": __name__} | more
    )


def label(prediction, real, factor=1.0, dtype=None):
    """One number, expanded: what a patch loss is told by."""
    return torch.tensor(factor * real, dtype=dtype or prediction.dtype).expand_as(prediction)


OTHERS = [
    _expected("Clamped", nn.MSELoss, lambda self, x, real: self.loss(x, label(x, real)).clamp(max=100)),
    _expected("OfClamped", nn.MSELoss, lambda self, x, real: self.loss(x.clamp(-9, 9), label(x, real))),
    _expected(
        "OfClampedLogits",
        nn.BCEWithLogitsLoss,
        lambda self, x, real: self.loss(x.clamp(-50, 50), label(x, real)),
    ),
    _expected("WithEpsilon", nn.MSELoss, lambda self, x, real: self.loss(x, label(x, real)) + 1e-12),
    _expected("LabelPlusEpsilon", nn.MSELoss, lambda self, x, real: self.loss(x, label(x, real, 1 + 1e-9))),
    _expected(
        "BySize",
        nn.MSELoss,
        lambda self, x, real: self.loss(x, label(x, real)) * (1 if len(x) < 3 else 0.5),
    ),
    _expected(
        "PerImage", lambda: nn.MSELoss(reduction="none"), lambda self, x, r: self.loss(x, label(x, r)).mean(0)
    ),
    _expected(
        "Sums", lambda: nn.MSELoss(reduction="sum"), lambda self, x, real: self.loss(x, label(x, real))
    ),
    _expected(
        "OldReduction",
        lambda: nn.MSELoss(size_average=False),
        lambda self, x, real: self.loss(x, label(x, real)),
    ),
    _expected(
        "Weighted",
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)),
        lambda self, x, real: self.loss(x, label(x, real)),
    ),
    _expected("Swapped", nn.MSELoss, lambda self, x, real: self.loss(label(x, real), x)),
    _expected("ByName", nn.MSELoss, lambda self, x, real: self.loss(target=label(x, real), input=x)),
    _expected("Detached", nn.MSELoss, lambda self, x, real: self.loss(x.detach(), label(x, real))),
    _expected("Broadcast", nn.MSELoss, lambda self, x, real: self.loss(x, label(x, real)[:1, :1, :1, :1])),
    _expected("AWideLabel", nn.MSELoss, lambda self, x, real: self.loss(x, label(x, real, 3))),
    _expected("ALabelOfNaN", nn.MSELoss, lambda self, x, real: self.loss(x, label(x, real, torch.nan))),
    _expected("ANegativeLabel", nn.BCEWithLogitsLoss, lambda self, x, real: self.loss(x, label(x, real, -1))),
    _expected(
        "NoisyLabels",
        nn.MSELoss,
        lambda self, x, real: self.loss(x, label(x, real) + 0.1 * torch.rand_like(x)),
    ),
    _expected(
        "AStrangeShape", nn.MSELoss, lambda self, x, real: self.loss(x[0, 0, 0], label(x, real)[0, 0, 0])
    ),
    _expected(
        "OfOneNumber", nn.MSELoss, lambda self, x, real: self.loss(x[0, 0, 0, 0], label(x, real)[0, 0, 0, 0])
    ),
    _expected("OfNothing", nn.MSELoss, lambda self, x, real: self.loss(x[:0], label(x, real)[:0])),
    _expected("Strided", nn.MSELoss, lambda self, x, real: self.loss(x[..., ::2], label(x, real)[..., ::2])),
    _expected("Transposed", nn.MSELoss, lambda self, x, real: self.loss(x.mT, label(x, real).mT)),
    _expected(
        "LabelOfAnotherDtype",
        nn.MSELoss,
        lambda self, x, real: self.loss(x, label(x, real, dtype=torch.float32)),
    ),
    _expected(
        "LabelOfIntegers", nn.MSELoss, lambda self, x, real: self.loss(x, label(x, real, dtype=torch.int64))
    ),
    _expected("TooMany", nn.MSELoss, lambda self, x, real: self.loss(x, label(x, real), 3)),
    _expected("HalfTheDtype", nn.MSELoss, lambda self, x, real: self.loss(x.half(), label(x, real).half())),
    _expected("Complex", nn.MSELoss, lambda self, x, real: self.loss(x + 0j, label(x, real) + 0j).abs()),
    _expected("Huge", nn.MSELoss, lambda self, x, real: self.loss(1e200 * x, label(x, real))),
    _expected("HugeLogits", nn.BCEWithLogitsLoss, lambda self, x, real: self.loss(1e300 * x, label(x, real))),
    _expected("Tiny", nn.BCEWithLogitsLoss, lambda self, x, real: self.loss(1e-300 * x, label(x, real))),
    _expected(
        "Smoothed",
        functools.partial(nn.CrossEntropyLoss, label_smoothing=0.1),
        lambda self, x, real: self.loss(x.flatten(1), torch.zeros(len(x), dtype=torch.long)),
        channels=2,
    ),
    _expected(
        "Ignored",
        functools.partial(nn.CrossEntropyLoss, ignore_index=1),
        lambda self, x, real: self.loss(x, torch.ones(len(x), 5, 4, dtype=torch.long)),
        channels=2,
    ),
    _expected(
        "ClassesOutOfRange",
        nn.CrossEntropyLoss,
        lambda self, x, real: self.loss(x, torch.full((len(x), 5, 4), 2)),
        channels=2,
    ),
    _expected(
        "ClassesOfBoth",
        nn.CrossEntropyLoss,
        lambda self, x, real: self.loss(x, torch.arange(20).view(1, 5, 4).expand(len(x), 5, 4) % 2),
        channels=2,
    ),
    _expected(
        "ClassProbabilities",
        nn.CrossEntropyLoss,
        lambda self, x, real: self.loss(x, torch.full_like(x, 0.5)),
        channels=2,
    ),
    _expected(
        "ThreeClasses",
        nn.CrossEntropyLoss,
        lambda self, x, real: self.loss(x, torch.zeros(len(x), 5, 4, dtype=torch.long)),
        channels=3,
    ),
    _expected(
        "OneRow",
        nn.CrossEntropyLoss,
        lambda self, x, real: self.loss(x[0, :, 0, 0], torch.tensor(int(real))),
        channels=2,
    ),
    _expected("SoftMargins", nn.SoftMarginLoss, lambda self, x, real: self.loss(x, 2 * label(x, real) - 1)),
    _expected("Distances", nn.L1Loss, lambda self, x, real: self.loss(x, label(x, real))),
]
# What squares and binary cross-entropies have in common, once with each.
OTHERS += [
    _expected(f"{case.__name__}InCrossEntropies", nn.BCEWithLogitsLoss, vars(case)["forward"])
    for case in OTHERS
    if vars(case)["inner"].__func__ is nn.MSELoss
]
globals().update({case.__name__: case for case in OTHERS})


class NotFinite(_Loss):
    """Infinite and missing logits: torch's values and gradients, NaN where it has NaN."""

    value = float("inf")

    def inputs(self):
        found = []
        for real in (True, False):
            x = logits().detach()
            x[0, 0, 0, 0], x[1, 0, 2, 2] = self.value, -self.value
            found.append((x.requires_grad_(), real))
        return found


class NotFiniteSquares(NotFinite):
    inner = nn.MSELoss


class NotNumbers(NotFinite):
    value = float("nan")


class NotFiniteClasses(CrossEntropies):
    served = False

    def inputs(self):
        x = logits(3, 2).detach()
        x[0, 0, 0, 0], x[1, 1, 2, 2] = float("inf"), -float("inf")
        return [(x.requires_grad_(), True), (x.clone().requires_grad_(), False)]


# -- labels and code of their own ----------------------------------------------------------------------------


class ALabelThatLearns(_Loss):
    def build(self):
        model = super().build()
        model.label = nn.Parameter(torch.tensor(0.7))
        return model

    def forward(self, prediction, real):
        return self.loss(prediction, self.label.expand_as(prediction))


class ALabelOfItsClass(_Loss):
    served = True

    def build(self):
        model = super().build()
        type(model).real = 1.0
        return model

    def forward(self, prediction, real):
        return self.loss(prediction, torch.tensor(self.real, dtype=F64).expand_as(prediction))

    def change(self, model):
        type(model).real = 0.6


class AStaticMethod(_Loss):
    served = True

    def build(self):
        model = super().build()
        type(model).target = staticmethod(
            lambda x, real: label(x, real) if x.numel() < 50 else label(x, not real)
        )
        return model

    def forward(self, prediction, real):
        return self.loss(prediction, self.target(prediction, real))


class AHook(_Loss):
    served = True

    def prepare(self, model):
        model.loss.register_forward_hook(lambda module, inputs, y: print("hook") or 2 * y)


class AGradientHook(_Loss):
    served = True

    def prepare(self, model):
        model.loss.register_full_backward_hook(lambda module, gi, go: (2 * gi[0], gi[1]))


class Counts(_Loss):
    served = True

    def build(self):
        model = super().build()
        model.calls = 0
        return model

    def forward(self, prediction, real):
        self.calls += 1
        return self.loss(prediction, label(prediction, real))


class ASubclass(_Loss):
    class Own(nn.BCEWithLogitsLoss):
        def forward(self, x, y):
            return super().forward(x, y).sqrt()

    inner = Own


class WithoutGradients(_Loss):
    served = True

    def around(self):
        return torch.no_grad()


class Inference(_Loss):
    served = True

    def around(self):
        return torch.inference_mode()


class UnderAutocast(_Loss):
    second = False
    served = True

    def around(self):
        return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("case", cases(globals()), ids=lambda c: c.__name__)
def test_a_loss_is_its_authors(case, monkeypatch):
    check(case(), monkeypatch)
