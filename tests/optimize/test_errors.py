"""Models that other code trips over: optimize leaves them as they are and says why, all or nothing."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastda
from tests.optimize.cases import F64, Block, Function, GANLoss, Reverse, maps
from tests.optimize.checking import JARGON, Outcome, assert_same, served


class Constant(Block):
    def forward(self, x):
        return self.relu(x + torch.tensor(0.1) * self.convs(x))


class ADict(Block):
    def forward(self, x):
        return {"features": self.relu(x + self.convs(x)), "size": x.shape[-1]}


class AList(Block):
    def forward(self, x):
        return [self.relu(x + self.convs(x)), None, "done"]


class ATuple(Block):
    def forward(self, x):
        y = self.convs(x)
        return self.relu(x + y), y


class Asserts(Block):
    def forward(self, x):
        assert x.dtype == torch.float64, "double precision"
        return self.relu(x + self.convs(x))


class Detached(Block):
    def forward(self, x):
        weight = self.convs[0].weight.detach()
        return self.relu(x + torch.conv2d(self.convs(x), weight, padding=1))


class Keywords(Block):
    def __init_subclass__(cls, *, kind, **options):
        super().__init_subclass__(**options)
        cls.kind = kind


class WithKeyword(Keywords, kind="narrow"):
    pass


class SlotMeta(type):
    def __call__(cls, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made.by_meta = True
        return made


class Meta(Block, metaclass=SlotMeta):
    pass


class NoNewAttributes(nn.Conv2d):
    """Frozen when it is made."""

    def __init__(self):
        super().__init__(4, 4, 3, padding=1)
        self.frozen = True

    def __setattr__(self, name, value):
        if self.__dict__.get("frozen"):
            raise AttributeError(f"{name} cannot be set")
        super().__setattr__(name, value)

    def forward(self, x):
        return super().forward(x)

    def train(self, mode=True):
        return self


class OwnGetattr(Block):
    def __getattr__(self, name):
        if name.startswith("magic"):
            raise KeyError(name)
        return super().__getattr__(name)


class APropertyThatRaises(Block):
    @property
    def ready(self):
        raise RuntimeError("not yet")


class StrideRaises(nn.Conv2d):
    @property
    def stride(self):
        if self.__dict__.get("armed"):
            raise RuntimeError("no stride")
        return (1, 1)

    @stride.setter
    def stride(self, value):
        pass


class EqualRaises(Block):
    __hash__ = nn.Module.__hash__

    def __eq__(self, other):
        raise RuntimeError("not comparable")


class BoolRaises(nn.Conv2d):
    def __bool__(self):
        raise RuntimeError("neither")


class LenZero(nn.Conv2d):
    def __len__(self):
        return 0


class ReprRaises(Block):
    def __repr__(self):
        raise RuntimeError("no words")


class NoDeepcopy(Block):
    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def __call__(self, x):
        return self.conv(x)


class FrozenFunction(type(Function)):
    def __setattr__(cls, name, value):
        if name == "backward":
            raise TypeError("this class is frozen")
        super().__setattr__(name, value)


class Frozen(Function, metaclass=FrozenFunction):
    forward, backward = Reverse.forward, staticmethod(lambda ctx, g: (g.neg() * ctx.alpha, None))


class WithFrozenFunction(Block):
    def forward(self, x):
        return Frozen.apply(super().forward(x), 0.3)


class HoldsItself(Block):
    """A cycle beside the tree."""

    def __init__(self):
        super().__init__()
        self.parents = [self]
        self.by_name = {"me": self}


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4).to_sparse())
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.complex128)
        self.real = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.real(x) + 0j).abs()


class Other(nn.Module):
    """Convolutions of other dimensions."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)])
        self.turned, self.flat = nn.ConvTranspose2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.layers[0](x.flatten(2)).view_as(x) + self.layers[1](x[:, :, None])[:, :, 0]
        return self.flat(self.turned(y))


def armed():
    conv = StrideRaises(4, 4, 3, padding=1)
    conv.__dict__["armed"] = True
    return conv


MODELS = [
    *(Constant, ADict, AList, ATuple, Asserts, Detached, WithKeyword, Meta, OwnGetattr, APropertyThatRaises),
    *(EqualRaises, ReprRaises, NoDeepcopy, NoForward, WithFrozenFunction, HoldsItself, Sparse),
    *(Complex, Other, NoNewAttributes),
    lambda: BoolRaises(4, 4, 3, padding=1),
    lambda: LenZero(4, 4, 3, padding=1),
    armed,
]


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_whatever_raises_is_left_and_the_rest_is_served(make):
    """In the midst of others, which are served all the same."""

    def build():
        torch.manual_seed(0)
        odd = make()
        for p in (*odd.parameters(), *odd.buffers()):
            p.data = p.data.double() if p.is_floating_point() else p.data
        first, last = (nn.Conv2d(4, 4, 3, padding=1).double() for _ in range(2))
        model = nn.ModuleDict()
        model._modules |= {"first": first, "odd": odd, "last": last}
        model.forward = lambda x: tree(model["last"], model["odd"](model["first"](x)))
        return model

    def tree(layer, value):
        values = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple))
            else [value]
        )
        return [layer(v) if isinstance(v, torch.Tensor) else v for v in values]

    expected = Outcome(build(), (maps(),))
    model = build()
    classes = [type(m) for m in model.modules()]
    report = fastda.optimize(model)
    try:
        assert_same(Outcome(model, (maps(),)), expected, str(report.left))
        assert served(report) > 0
        assert {"first", "last"} <= {entry.path for entry in report.replaced}
        assert all(entry.what and not JARGON.search(entry.what) for entry in report.left)
    finally:
        report.undo()
    assert [type(m) for m in model.modules()] == classes
    assert_same(Outcome(model, (maps(),)), expected, "after undo")
    assert not any("_conv_forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("make", [GANLoss, nn.BCEWithLogitsLoss, lambda: nn.Conv2d(4, 4, 3), Block])
def test_models_without_memory(make):
    """On meta there is nothing to serve, and in FakeTensorMode neither."""
    model = make().to("meta")
    report = fastda.optimize(model)
    assert not report.replaced or not list(model.parameters())
    with FakeTensorMode():
        fake = make()
        report = fastda.optimize(fake)
        if list(fake.parameters()):
            assert fake(torch.randn(2, 4, 6, 5)).shape[:2] == (2, 4)
    assert served(report) == 0
    model = make()
    report = fastda.optimize(model)
    model.to("meta")
    if list(model.parameters()):
        assert model(torch.randn(2, 4, 6, 5, device="meta")).is_meta
    assert served(report) == 0


def test_a_lazy_layer_is_left_until_it_has_a_weight():
    model = nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.ReLU())
    report = fastda.optimize(model)
    assert [entry.path for entry in report.left] == ["0"]
    assert "weight" in report.left[0].what
    assert model(torch.randn(2, 3, 6, 5)).shape == (2, 4, 6, 5)
    assert [entry.path for entry in fastda.optimize(model).replaced] == ["0"]


def test_what_is_no_module_is_one_error():
    for wrong in (None, [nn.Conv2d(3, 3, 3)], nn.Conv2d, torch.ones(2)):
        with pytest.raises(TypeError, match=r"^optimize: model must be a torch.nn.Module, got \w+$"):
            fastda.optimize(wrong)


def test_an_exception_in_the_midst_leaves_a_report_that_undoes(monkeypatch):
    """Whatever a family does: what was replaced before can be taken back."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), Block(), nn.Conv2d(4, 4, 3, padding=1)).to(F64)
    original = copy.deepcopy(model)
    real = nn.Conv2d._conv_forward

    class Trap(nn.Conv2d):
        @property
        def groups(self):
            raise ZeroDivisionError("in the midst")

        @groups.setter
        def groups(self, value):
            pass

    model[1].convs[0].__class__ = Trap
    report = fastda.optimize(model)
    assert "1.convs.0" in {entry.path for entry in report.left}
    assert "0" in {entry.path for entry in report.replaced}
    report.undo()
    model[1].convs[0].__class__ = nn.Conv2d
    assert nn.Conv2d._conv_forward is real
    assert_same(Outcome(model, (maps(),)), Outcome(original, (maps(),)), "after undo")
