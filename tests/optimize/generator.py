"""Random models as people write them, and what happens to them after fastda.optimize.

A `Sample` of a seed builds its model and changes it later, the same at every call. It notes in `kinds` what
occurs, so that a test can count that everything does.
"""

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.optimize.cases import Copying, Function, Reverse

SIZES = [(2, 3, 6, 6), (1, 3, 7, 5), (3, 3, 4, 9), (2, 3, 5, 8)]


class Residual(nn.Module):
    """x + layers(x), with or without an activation behind it."""

    def __init__(self, layers, last):
        super().__init__()
        self.layers, self.last = nn.Sequential(*layers), last

    def forward(self, x):
        y = self.layers(x) + x
        return y if self.last is None else self.last(y)


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Taps(nn.Module):
    """Layers run one by one, as perceptual losses take their features."""

    def __init__(self, layers):
        super().__init__()
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        taps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                taps.append(x.mean())
        return x + sum(taps)


class Odd(nn.Module):
    """A block that does something else for sizes, modes or values that are rare."""

    def __init__(self, layers, what):
        super().__init__()
        self.layers, self.what = nn.Sequential(*layers), what

    def forward(self, x):
        y = self.layers(x)
        if self.what == "size" and x.shape[-1] % 2:
            return y - x
        if self.what == "batch" and len(x) == 1:
            return y * 2 + x
        if self.what == "mode" and not self.training:
            return y
        if self.what == "grad" and not torch.is_grad_enabled():
            return 3 * y
        return F.relu(y + x)


class Gain(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return weight * 1.25


class DefaultScale(Function):
    @staticmethod
    def forward(ctx, x, lambd=0.1):
        ctx.lambd = lambd
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.neg() * ctx.lambd, None


class Constant(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.neg() * 0.1


class Weighted(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.weight * grad, None


class Clamped(Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.clamp(-1e3, 1e3)

    @staticmethod
    def backward(ctx, grad):
        return (grad.neg() * ctx.alpha).clamp(-0.01, 0.01), None


class Saved(Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(alpha)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (alpha,) = ctx.saved_tensors
        return -grad * alpha, None


class NoScale(Function):
    @staticmethod
    def forward(ctx, x, alpha=None):
        ctx.alpha = 0.5 if alpha is None else alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -(grad * ctx.alpha), None


REVERSALS = {
    "a passed scale": lambda x, a: Reverse.apply(x, a),
    "a copy": lambda x, a: Copying.apply(x, a),
    "a copy's default": lambda x, a: Copying.apply(x),
    "a default other than 1": lambda x, a: DefaultScale.apply(x),
    "a constant": lambda x, a: Constant.apply(x),
    "a negative weight": lambda x, a: Weighted.apply(x, -a),
    "a clamped gradient": lambda x, a: Clamped.apply(x, a),
    "a saved scale": lambda x, a: Saved.apply(x, torch.tensor(a, dtype=x.dtype)),
    "a saved vector": lambda x, a: Saved.apply(x, torch.full((x.shape[-1],), a, dtype=x.dtype)),
    "none for a half": lambda x, a: NoScale.apply(x),
}


class Reversing(nn.Module):
    def __init__(self, name, alpha):
        super().__init__()
        self.name, self.alpha = name, alpha

    def forward(self, x):
        return REVERSALS[self.name](x, self.alpha)


LOSSES = {
    "squares": lambda: nn.MSELoss(),
    "binary": lambda: nn.BCEWithLogitsLoss(),
    "probabilities": lambda: nn.Sequential(nn.Sigmoid()),
    "classes": lambda: nn.CrossEntropyLoss(),
}


class Judged(nn.Module):
    """A network and a loss of its maps."""

    def __init__(self, network, name, c):
        super().__init__()
        self.network, self.name = network, name
        self.head = nn.Conv2d(c, 2 if name == "classes" else 1, 1)
        self.loss, self.bce = LOSSES[name](), nn.BCELoss()
        self.register_buffer("label", torch.tensor(1.0))

    def forward(self, x):
        y = self.head(self.network(x))
        if self.name == "classes":
            rows = y.permute(0, 2, 3, 1).reshape(-1, 2)
            return self.loss(rows, torch.full((len(rows),), 1))
        label = self.label.expand_as(y)
        return self.bce(self.loss(20 * y), label) if self.name == "probabilities" else self.loss(y, label)


@dataclass
class Sample:
    seed: int
    kinds: set = field(default_factory=set)

    def build(self):
        """The same model at every call."""
        self.kinds.clear()
        self.rng = random.Random(self.seed)
        torch.manual_seed(self.seed)
        model = self._model().double()
        for conv in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
            self._parametrise(conv)
        return model.train(self.rng.random() < 0.7)

    def _note(self, kind):
        self.kinds.add(kind)
        return kind

    def _conv(self, c, out=None):
        """One that keeps the size, with any of the options."""
        rng = self.rng
        k = rng.choice([1, 3, 3, 3, 5])
        settings = {"kernel_size": k, "padding": k // 2, "bias": rng.random() < 0.7}
        option = rng.choice(["plain"] * 4 + ["same", "mode", "dilation", "groups", "reflect before"])
        if option == "same":
            settings["padding"] = "same"
        elif option == "mode":
            settings["padding_mode"] = rng.choice(["reflect", "replicate", "circular"])
        elif option == "dilation" and k == 3:
            dilation = rng.choice([2, 3])
            settings |= {"dilation": dilation, "padding": rng.choice([dilation, "same"])}
        elif option == "groups" and out is None:
            settings["groups"] = c
        self._note(f"convolution: {option}")
        if option == "reflect before" and k > 1:
            settings["padding"] = 0
            return [nn.ReflectionPad2d(k // 2), nn.Conv2d(c, out or c, **settings)]
        return [nn.Conv2d(c, out or c, **settings)]

    def _activation(self):
        name = self._note(self.rng.choice(["ReLU", "ReLU", "ReLU in place", "LeakyReLU", "Tanh"]))
        if name == "ReLU in place":
            return nn.ReLU(inplace=True)
        return nn.LeakyReLU(0.2) if name == "LeakyReLU" else getattr(nn, name)()

    def _norm(self, c):
        kind = self._note(
            self.rng.choice(["BatchNorm2d", "InstanceNorm2d", "GroupNorm", "no norm", "no norm"])
        )
        if kind == "GroupNorm":
            return [nn.GroupNorm(2 if c % 2 == 0 else 1, c)]
        return [] if kind == "no norm" else [getattr(nn, kind)(c)]

    def _layers(self, c):
        layers = [*self._conv(c), *self._norm(c), self._activation(), *self._conv(c)]
        return layers if self.rng.random() < 0.7 else layers[:-1]

    def _body(self, c):
        rng = self.rng
        kind = self._note(rng.choice(["plain", "residual", "residual", "shared", "taps", "rare", "list"]))
        if kind == "plain":
            return nn.Sequential(*self._layers(c))
        if kind == "residual":
            last = self._activation() if rng.random() < 0.6 else None
            return Residual(self._layers(c), last)
        if kind == "shared":
            return Twice(nn.Sequential(*self._conv(c)))
        if kind == "taps":
            return Taps(self._layers(c))
        if kind == "rare":
            what = self._note("rare: " + rng.choice(["size", "batch", "mode", "grad"]))
            return Odd(self._layers(c), what.removeprefix("rare: "))
        one = Residual(self._layers(c), nn.ReLU())
        return nn.Sequential(one, one)

    def _model(self):
        rng, c = self.rng, self.rng.choice([2, 3, 4])
        layers = [nn.Conv2d(3, c, 3, padding=1), self._activation()]
        layers += [self._body(c) for _ in range(rng.choice([1, 1, 2]))]
        if rng.random() < 0.4:
            name = rng.choice(list(REVERSALS))
            self._note(f"reversal: {name}")
            layers.append(Reversing(name, rng.choice([0.0, 0.3, 1.0, 2.5])))
            layers += [nn.Conv2d(c, c, 1), self._activation()]
        model = nn.Sequential(*layers)
        if rng.random() < 0.35:
            name = rng.choice(list(LOSSES))
            self._note(f"loss: {name}")
            model = Judged(model, name, c)
        return model

    def _parametrise(self, conv):
        what = self.rng.choice(["nothing"] * 12 + list(PARAMETRISATIONS))
        if what != "nothing":
            self._note(f"before: {what}")
            PARAMETRISATIONS[what](conv)

    def change(self, model):
        """What happens later, to the model or to its twin."""
        rng = random.Random(self.seed + 1)
        torch.manual_seed(self.seed + 1)
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice(list(CHANGES))
            self._note(f"later: {name}")
            convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
            CHANGES[name](model, rng.choice(convolutions), rng)


PARAMETRISATIONS = {
    "spectral norm": parametrizations.spectral_norm,
    "legacy spectral norm": nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "legacy weight norm": nn.utils.weight_norm,
    "a gain": lambda conv: parametrize.register_parametrization(conv, "weight", Gain()),
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 0.4),
}


def patch_forward(module):
    old = module.forward
    module.forward = lambda *args: 2 * old(*args)


def patch_conv_forward(model, conv, rng):
    """Weight standardisation, as it is patched in."""

    def standardised(input, weight, bias):
        return type(conv)._conv_forward(conv, input, weight - weight.mean(), bias)

    conv._conv_forward = standardised


def wrap(model, conv, rng):
    """LoRA's way: another module in the place of the layer."""
    wrapper = nn.Sequential(conv, nn.Conv2d(conv.out_channels, conv.out_channels, 1).double())
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is conv:
                module._modules[name] = wrapper


def exchange_weight(model, conv, rng):
    if "weight" in conv._parameters:
        conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def toggle_bias(model, conv, rng):
    if "bias" in conv._parameters:
        bias = nn.Parameter(torch.randn(conv.out_channels, dtype=torch.float64))
        conv.bias = bias if conv.bias is None else None


def reparametrise(model, conv, rng):
    # Those that view a weight as a matrix refuse one in channels_last.
    if type(conv) is nn.Conv2d and "weight" in conv._parameters and conv.weight.is_contiguous():
        PARAMETRISATIONS[rng.choice(list(PARAMETRISATIONS))](conv)


def append(model, conv, rng):
    sequences = [m for m in model.modules() if isinstance(m, nn.Sequential) and len(m)]
    rng.choice(sequences).append(nn.Tanh())


def change_label(model, conv, rng):
    for module in model.modules():
        if isinstance(module, Judged):
            module.label.data.fill_(0.8)


def change_scale(model, conv, rng):
    for module in model.modules():
        if isinstance(module, Reversing):
            module.alpha = 0.7


def of_all(kinds, change):
    """A change of every layer of these classes."""

    def changes(model, conv, rng):
        for module in list(model.modules()):
            if isinstance(module, kinds):
                change(module)

    return changes


NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)


def move_statistics(norm):
    if norm.running_mean is not None:
        both = torch.full((2, norm.num_features), 1.5, dtype=torch.float64)
        norm.running_mean, norm.running_var = both[0], both[1]


CHANGES = {
    "nothing": lambda model, conv, rng: None,
    "norms: evaluation": of_all(NORMS, nn.Module.eval),
    "norms: frozen": of_all(NORMS, lambda norm: norm.eval().requires_grad_(False)),
    "norms: a momentum": of_all(NORMS, lambda norm: setattr(norm, "momentum", 0.7)),
    "norms: an average": of_all(NORMS, lambda norm: setattr(norm, "momentum", None)),
    "norms: untracked": of_all(NORMS, lambda norm: setattr(norm, "track_running_stats", False)),
    "norms: statistics elsewhere": of_all(NORMS, move_statistics),
    "norms: a hook": of_all(NORMS, lambda norm: norm.register_forward_hook(lambda m, inputs, y: 2 * y)),
    "activations: a hook": of_all(
        ACTIVATIONS, lambda act: act.register_forward_pre_hook(lambda m, inputs: (inputs[0] + 1,))
    ),
    "activations: no longer in place": of_all(ACTIVATIONS, lambda act: setattr(act, "inplace", False)),
    "the model's forward": lambda model, conv, rng: patch_forward(model),
    "a convolution's forward": lambda model, conv, rng: patch_forward(conv),
    "its _conv_forward": patch_conv_forward,
    "a hook": lambda model, conv, rng: conv.register_forward_hook(lambda module, inputs, y: y + 1),
    "a pre-hook": lambda model, conv, rng: conv.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] * 2,)
    ),
    "a backward hook": lambda model, conv, rng: conv.register_full_backward_pre_hook(
        lambda module, grads: tuple(3 * g for g in grads)
    ),
    "a wrapper": wrap,
    "an appended layer": append,
    "another weight": exchange_weight,
    "a bias or none": toggle_bias,
    "a parametrisation": reparametrise,
    "padding mode": lambda model, conv, rng: setattr(conv, "padding_mode", "zeros"),
    "the mode": lambda model, conv, rng: model.train(not model.training),
    "frozen": lambda model, conv, rng: conv.requires_grad_(False),
    "a label": change_label,
    "a scale": change_scale,
}
