"""What the adversarial cases are made of."""

import contextlib
import itertools
import types
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

F64 = torch.float64


def maps(n=2, c=4, h=9, w=7, dtype=F64, scale=1.0):
    """A batch of images that wants a gradient; the same at every call with the same sizes."""
    generator = torch.Generator().manual_seed(n + 10 * c + 100 * h + 1000 * w)
    x = scale * torch.randn(n, c, h, w, generator=generator, dtype=F64)
    return x.to(dtype).requires_grad_()


class Case:
    """A model, and what happens to it after fastda.optimize.

    served: a call must be served by an operator before the change; else either is right.
    why: a pattern for the reason that must be told where nothing is served; None where nobody would ask.
    gradient: what the output's gradients are multiplied by, or "nan" for some that are none.
    """

    served = False
    why = None
    gradient = 1.0
    second = True
    tolerance = 1e-9
    undoes = True
    call = None

    def build(self):
        raise NotImplementedError

    def prepare(self, model):
        """Before optimize."""

    def made(self):
        """A new model in float64, the same at every call."""
        torch.manual_seed(0)
        model = self.build().double()
        self.prepare(model)
        return model

    def inputs(self):
        return [(maps(),)]

    def before(self, model):
        """The inputs of calls before the change."""
        return self.inputs()

    def everywhere(self, monkeypatch):
        """A later change of something global."""

    def change(self, model):
        """A later change of the model."""

    def around(self):
        return contextlib.nullcontext()


def cases(scope):
    """The cases that a test module defines, those without a model of their own left out."""
    found = [
        v
        for v in scope.values()
        if isinstance(v, type) and issubclass(v, Case) and v.__module__ == scope["__name__"]
    ]
    return [case for case in found if case.build is not Case.build and not case.__name__.startswith("_")]


# -- models --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """SimGAN's residual block, as its repositories write it."""

    def __init__(self, c=4, k=3):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(c, c, k, 1, k // 2), nn.ReLU(), nn.Conv2d(c, c, k, 1, k // 2))
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.convs(x)
        return self.relu(y + x)


class Apart(nn.Module):
    """The same of single layers, with a method of its own."""

    def __init__(self, c=4):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.relu(x + self.inner(x))

    def inner(self, x):
        return self.conv2(self.relu(self.conv1(x)))


class Functional(nn.Module):
    """The same with functions, without a ReLU at the end."""

    def __init__(self, c=4):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(c, c, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


def chain(c=4):
    return nn.Sequential(
        *(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False), nn.ReLU()),
        *(nn.Conv2d(c, c, 1), nn.Tanh()),
    )


BLOCK_SIZES = [(2, 4, 9, 7), (1, 4, 8, 8), (3, 4, 33, 40)]


class WrittenBlock(Case):
    """A residual block with another forward. `settings` are set on the instance, `shared` on its class."""

    served = True  # its convolutions, whatever it makes of them
    settings: ClassVar = {}
    shared: ClassVar = {}
    sizes = BLOCK_SIZES

    def build(self):
        class Written(Block):
            pass

        if "forward" in vars(type(self)):
            Written.forward = vars(type(self))["forward"]
        for name, value in self.shared.items():
            setattr(Written, name, value)
        model = Written()
        for name, value in self.settings.items():
            setattr(model, name, value() if callable(value) and not isinstance(value, nn.Module) else value)
        return model

    def inputs(self):
        return [(maps(*sizes),) for sizes in self.sizes]


MODELS = {
    "block": Block,
    "single layers": Apart,
    "functions": Functional,
    "chain": chain,
    "valid": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
    "blocks in a chain": lambda: nn.Sequential(Block(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), Apart()),
}


class Change(Case):
    """Every model of the table is served before, and does what the changed original does afterwards."""

    served = True
    make = Block
    models = ("block", "chain")

    def build(self):
        return self.make()

    def inputs(self):
        return [(maps(),), (maps(1, 4, 6, 5),)]


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def first(model):
    return convolutions(model)[0]


def replace(model, old, new):
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


class Reverse(Function):
    """The form that most repositories have."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.neg() * ctx.alpha, None


class Copying(Function):
    """tllib's form, which copies."""

    @staticmethod
    def forward(ctx, input, coeff=1.0):
        ctx.coeff = coeff
        return input * 1.0

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.neg() * ctx.coeff, None


class GANLoss(nn.Module):
    """As in CycleGAN's repository."""

    def __init__(self, gan_mode="lsgan", real=1.0, fake=0.0):
        super().__init__()
        self.register_buffer("real_label", torch.tensor(real))
        self.register_buffer("fake_label", torch.tensor(fake))
        self.gan_mode = gan_mode
        self.loss = {"lsgan": nn.MSELoss(), "vanilla": nn.BCEWithLogitsLoss(), "wgangp": None}[gan_mode]

    def get_target_tensor(self, prediction, target_is_real):
        target_tensor = self.real_label if target_is_real else self.fake_label
        return target_tensor.expand_as(prediction)

    def forward(self, prediction, target_is_real):
        if self.gan_mode in ["lsgan", "vanilla"]:
            target_tensor = self.get_target_tensor(prediction, target_is_real)
            loss = self.loss(prediction, target_tensor)
        elif self.gan_mode == "wgangp":
            loss = -prediction.mean() if target_is_real else prediction.mean()
        return loss


# -- reversals -----------------------------------------------------------------------------------------------

PLACES = ("global", "closure", "attribute", "bound method")


def rows(n=4, c=6, scale=1.0):
    return (scale * torch.randn(n, c, generator=torch.Generator().manual_seed(n), dtype=F64)).requires_grad_()


def template(self, x):
    return self.after(Applied.apply(self.before(x), *self.arguments))  # noqa: F821


class Network(nn.Module):
    """A layer, the reversal, another layer: the Function stands where `place` says."""

    def __init__(self, function, arguments, place, after):
        super().__init__()
        self.before, self.after = nn.Linear(6, 5), after()
        self.arguments = arguments
        if place == "attribute":
            self.function = function
        elif place == "bound method":
            self.function = function.apply

    def forward(self, x):
        apply = getattr(self.function, "apply", self.function)
        return self.after(apply(self.before(x), *self.arguments))


def network(function, arguments, place, after):
    class Model(Network):
        pass

    if place == "global":
        Model.forward = types.FunctionType(template.__code__, {**globals(), "Applied": function}, "forward")
    elif place == "closure":

        def forward(self, x):
            return self.after(function.apply(self.before(x), *self.arguments))

        Model.forward = forward
    elif place == "attribute":

        def forward(self, x):
            return self.after(self.function.apply(self.before(x), *self.arguments))

        Model.forward = forward
    else:

        def forward(self, x):
            return self.after(self.function(self.before(x), *self.arguments))

        Model.forward = forward
    return Model(function, arguments, place, after)


class Reversal(Case):
    function = None
    arguments = ()
    place = "global"
    why = r"gradient|reversal|scale|forward|backward"

    def build(self):
        return network(type(self).function, self.arguments, self.place, self.after)

    def after(self):
        return nn.Linear(5, 2)

    def inputs(self):
        return [(rows(),), (rows(1),)]


def function(base=None, **methods):
    """A Function of these static methods."""
    return type("Written", (base or Function,), {n: staticmethod(m) for n, m in methods.items()})


def view(ctx, x, alpha):
    ctx.alpha = alpha
    return x.view_as(x)


def negated(ctx, grad):
    return grad.neg() * ctx.alpha, None


def in_places(scope):
    """The reversals that a test module defines, each with one of the places in turn."""
    found = [case for case in cases(scope) if issubclass(case, Reversal)]
    return list(zip(found, itertools.cycle(PLACES)))
