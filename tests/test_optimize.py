"""fastda.optimize: what is recognised and what is not; results stay; everything can be undone."""

import copy
import importlib
import importlib.metadata
import importlib.util
import itertools
import pickle
import random
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.nn.utils import parametrizations, prune

import fastda
from fastda.compatibility import ImagePool
from fastda.testing import Tolerance, error

BOUNDS = {torch.float64: (1e-13, 1e-12), torch.float32: (1e-5, 1e-4)}
pytestmark = pytest.mark.isa_independent
reversal_module = importlib.import_module("fastda.optimize.grad_reverse")
loss_module = importlib.import_module("fastda.optimize.patch_loss")
convolution_module = importlib.import_module("fastda.optimize.refiner_conv")


def results(model, *inputs):
    """Output and the gradients of the floating inputs and the parameters, under a fixed output gradient."""
    leaves = [
        i.detach().clone().requires_grad_() if isinstance(i, torch.Tensor) and i.is_floating_point() else i
        for i in inputs
    ]
    y = model(*leaves)
    wanted = [*(i for i in leaves if isinstance(i, torch.Tensor)), *model.parameters()]
    weight = torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape) / y.numel()
    return y.detach(), torch.autograd.grad(y, wanted, weight, allow_unused=True, materialize_grads=True)


def assert_same(model, original, *inputs):
    """Values and gradients of the two agree as far as several layers can."""
    (y, grads), (expected, expected_grads) = results(model, *inputs), results(original, *inputs)
    for actual, right in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert error(actual, right).within(Tolerance(*BOUNDS[y.dtype]))


@pytest.fixture(autouse=True)
def even_where_nothing_is_gained(monkeypatch, request):
    """What is recognised is tested on small layers, whether or not that makes them faster."""
    if not request.node.get_closest_marker("gain"):
        monkeypatch.setattr(convolution_module, "FAST_KERNELS", (1, 3, 5, 7))
        monkeypatch.setattr(convolution_module, "LEAST_CHANNELS", 1)
        monkeypatch.setattr(convolution_module, "LEAST_SIZE", 1)
        monkeypatch.setattr(convolution_module, "WANTED_OF", 1 << 20)
        monkeypatch.setattr(convolution_module, "LEAST_PRODUCTS", 0)
        monkeypatch.setattr(loss_module, "LEAST_PATCHES", dict.fromkeys(loss_module.LEAST_PATCHES, 0))


@pytest.fixture
def calls(monkeypatch):
    """How often each operator was called by a replaced module."""
    counts = {}

    def count(module, name):
        operator = getattr(module, name)

        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return operator(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(reversal_module, "grad_reverse")
    count(convolution_module, "conv_same")
    count(convolution_module, "refiner_block")
    count(loss_module, "one_side_loss")
    count(loss_module, "patch_discriminator_loss")
    return counts


# -- gradient reversal: the forms that public code has -------------------------------------------------------


class ReverseLayerF(Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        output = grad_output.neg() * ctx.alpha
        return output, None


class SavedScale(Function):
    @staticmethod
    def forward(ctx, input_, alpha_):
        ctx.save_for_backward(input_, alpha_)
        return input_

    @staticmethod
    def backward(ctx, grad_output):
        grad_input = None
        _, alpha_ = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            grad_input = -grad_output * alpha_
        return grad_input, None


class CopyWithDefault(Function):
    @staticmethod
    def forward(ctx, input, coeff=1.0):
        ctx.coeff = coeff
        return input * 1.0

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.neg() * ctx.coeff, None


class Plain(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class WithSetupContext(Function):
    @staticmethod
    def forward(x, lambd):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.lambd = inputs

    @staticmethod
    def backward(ctx, grad):
        return torch.mul(grad, -ctx.lambd), None


saved_scale = SavedScale.apply


def reverse(x, lambd=1.0):
    return ReverseLayerF.apply(x, lambd)


def doubly_wrapped(x, lambd):
    return reverse(x, lambd=2 * lambd)


class InForward(nn.Module):
    """A whole DANN with the reversal in its forward, as in the most copied PyTorch code."""

    def __init__(self):
        super().__init__()
        self.feature = nn.Linear(6, 5)
        self.domain = nn.Linear(5, 2)

    def forward(self, x, alpha):
        return self.domain(ReverseLayerF.apply(self.feature(x), alpha))


class AppliesGlobal(InForward):
    def forward(self, x, alpha):
        return self.domain(saved_scale(self.feature(x), torch.tensor(alpha)))


class CallsFunction(InForward):
    def forward(self, x, alpha):
        return self.domain(reverse(self.feature(x), alpha)) + doubly_wrapped(self.feature(x), 0.5).sum()


class InAnotherMethod(InForward):
    def forward(self, x, alpha):
        return self.head(self.feature(x), alpha=alpha)

    def head(self, h, *, alpha=0.0):
        return self.domain(WithSetupContext.apply(h, alpha))


class InABaseClass(InAnotherMethod):
    def forward(self, x, alpha):
        return super().forward(x, alpha) * 2


class AsAttribute(InForward):
    def __init__(self):
        super().__init__()
        self.rev, self.plain = ReverseLayerF.apply, Plain

    def forward(self, x, alpha):
        return self.domain(self.plain.apply(self.rev(self.feature(x), alpha)))


class BufferOfOneElement(InForward):
    """pytorch-adapt's way."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0]))

    def forward(self, x, alpha):
        self.weight[0] = alpha
        return self.domain(ReverseLayerF.apply(self.feature(x), self.weight.to(x.device)))


def in_a_closure():
    class Local(Function):
        @staticmethod
        def forward(ctx, x, alpha):
            ctx.alpha = alpha
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * -ctx.alpha, None

    class Model(InForward):
        def forward(self, x, alpha):
            return self.domain(Local.apply(self.feature(x), alpha))

    return Model()


REVERSALS = [
    *(InForward, AppliesGlobal, CallsFunction, InAnotherMethod, InABaseClass, AsAttribute),
    *(BufferOfOneElement, in_a_closure),
]


@pytest.mark.parametrize("make", REVERSALS, ids=lambda f: f.__name__)
def test_reversals_are_found_wherever_the_code_refers_to_them(make, calls):
    model = make()
    original = copy.deepcopy(model)
    report = fastda.optimize(model)
    assert [entry.path for entry in report.replaced] == [""]
    for alpha in (0.3, 1.0, -2.0, 0.0):
        calls.clear()
        assert_same(model, original, torch.randn(4, 6), alpha)
        assert calls["grad_reverse"] >= 1
    report.undo()
    assert type(model) is type(original)
    assert vars(model).keys() == vars(original).keys()
    calls.clear()
    results(model, torch.randn(4, 6), 1.0)
    assert not calls


@pytest.mark.parametrize("function", [CopyWithDefault, Plain], ids=lambda f: f.__name__)
def test_reversals_without_a_scale(function, calls):
    class Layer(nn.Module):
        def forward(self, *inputs):
            return function.apply(*inputs)

    layer = Layer()
    fastda.optimize(layer)
    x = torch.randn(3, 2, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, -torch.ones(3, 2))
    assert calls == {"grad_reverse": 1}


class GradientReverseLayer(nn.Module):
    """tllib's plain layer."""

    def forward(self, *input):
        return CopyWithDefault.apply(*input)


class WarmStartGradientReverseLayer(nn.Module):
    """tllib's layer with a schedule of its own."""

    def __init__(self, alpha=1.0, lo=0.0, hi=1.0, max_iters=1000.0, auto_step=False):
        super().__init__()
        self.alpha, self.lo, self.hi, self.max_iters, self.auto_step = alpha, lo, hi, max_iters, auto_step
        self.iter_num = 0

    def forward(self, input):
        progress = self.alpha * self.iter_num / self.max_iters
        coeff = 2.0 * (self.hi - self.lo) / (1.0 + torch.exp(torch.tensor(-progress)).item())
        if self.auto_step:
            self.step()
        return CopyWithDefault.apply(input, coeff - (self.hi - self.lo) + self.lo)

    def step(self):
        self.iter_num += 1


def test_a_schedule_stays_the_authors(calls):
    layer = WarmStartGradientReverseLayer(alpha=10.0, hi=0.5, max_iters=20, auto_step=True)
    original = copy.deepcopy(layer)
    report = fastda.optimize(nn.Sequential(nn.Linear(3, 3), layer))
    assert report.replaced[0].path == "1"
    assert "a view where there was a copy" in report.replaced[0].what
    for step in range(30):
        assert_same(layer, original, torch.randn(2, 3))
        assert layer.iter_num == original.iter_num == step + 1
    assert calls == {"grad_reverse": 30}
    assert isinstance(layer, WarmStartGradientReverseLayer)


def test_what_is_out_of_the_ordinary_goes_to_the_authors_function(calls):
    model = GradientReverseLayer()
    fastda.optimize(model)
    x = torch.randn(3, 2)
    assert model(x).data_ptr() != x.data_ptr()  # nothing is recorded: a copy as before, safe to change
    with torch.no_grad():
        assert model(x.requires_grad_()).data_ptr() != x.data_ptr()
    per_column = torch.tensor([1.0, 2.0])
    model(x, per_column).sum().backward()
    assert torch.equal(x.grad, -per_column.expand(3, 2))
    with pytest.raises(TypeError):
        model(x, 1.0, "too", "many")
    assert not calls


GLOBAL_SCALE = 1.0


class ReadsAGlobal(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad * GLOBAL_SCALE


class Ignores(ReverseLayerF):
    @staticmethod
    def forward(ctx, x, alpha):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.neg(), None


class Scales(ReverseLayerF):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.alpha, None


class StraightThrough(ReverseLayerF):
    @staticmethod
    def forward(ctx, x, alpha):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Clips(ReverseLayerF):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return (grad * -ctx.alpha).clamp(-0.5, 0.5), None


class Raises(ReverseLayerF):
    @staticmethod
    def forward(ctx, x, alpha):
        raise RuntimeError("needs a GPU")

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize(
    "function", [ReadsAGlobal, Ignores, Scales, StraightThrough, Clips, Raises], ids=lambda f: f.__name__
)
def test_what_is_no_reversal_is_left(function):
    class Layer(nn.Module):
        def forward(self, x):
            return function.apply(x, 0.5)

    layer = Layer()
    report = fastda.optimize(layer)
    assert not report.replaced
    assert type(layer) is Layer
    reasons = [entry.what for entry in report.left]
    wrong = ["Ignores multiplies the gradient by -1 whatever its scale"] if function is Ignores else []
    assert reasons == wrong


def test_globals_of_a_rewritten_method_stay_live(monkeypatch):
    model = InForward()
    fastda.optimize(model)
    x = torch.randn(2, 6)
    before = results(model, x, 1.0)[1][0]
    monkeypatch.setitem(globals(), "doubly_wrapped", None)  # unrelated
    assert torch.equal(results(model, x, 1.0)[1][0], before)
    rewritten = type(model).forward
    assert rewritten.__globals__ is globals()
    assert rewritten.__code__.co_filename == InForward.forward.__code__.co_filename


# -- peers, as installed -------------------------------------------------------------------------------------


def test_pytorch_revgrad(calls):
    peer = pytest.importorskip("pytorch_revgrad", reason="pytorch-revgrad is not installed")
    model = nn.Sequential(nn.Linear(6, 5), peer.RevGrad(alpha=0.7), nn.Linear(5, 1))
    original = copy.deepcopy(model)
    report = fastda.optimize(model)
    assert [(e.path, e.type) for e in report.replaced] == [("1", "RevGrad")]
    assert_same(model, original, torch.randn(4, 6))
    assert calls == {"grad_reverse": 1}


@pytest.fixture
def pytorch_adapt():
    pytest.importorskip("pytorch_adapt", reason="pytorch-adapt is not installed")
    return importlib.import_module("pytorch_adapt.hooks")


@pytest.mark.parametrize("weight", [0.7, 1])
def test_pytorch_adapt_in_its_own_dann(weight, pytorch_adapt, calls):
    models = importlib.import_module("pytorch_adapt.models")
    torch.manual_seed(0)
    g, d, c = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), models.Discriminator(8, 8), nn.Linear(8, 3)
    batch = {
        "src_imgs": torch.randn(5, 6),
        "target_imgs": torch.randn(5, 6),
        "src_labels": torch.randint(3, (5,)),
        "src_domain": torch.zeros(5),
        "target_domain": torch.ones(5),
    }

    def train(optimized):
        parts = {"G": g, "D": d, "C": c}
        networks = {name: copy.deepcopy(model) for name, model in parts.items()}
        optimizer = torch.optim.SGD([p for m in networks.values() for p in m.parameters()], lr=0.1)
        features = pytorch_adapt.FeaturesForDomainLossHook()
        reversal = pytorch_adapt.GradientReversalHook(weight=weight, apply_to=features.out_keys)
        hook = pytorch_adapt.DANNHook([optimizer], f_hook=features, gradient_reversal=reversal)
        if optimized:
            report = fastda.optimize(reversal.fn)  # the layer; its hook is no module
            assert [e.type for e in report.replaced] == ["GradientReversal"]
        losses = []
        for step in range(5):
            reversal.fn.update_weight(0.3 * step)
            _, loss = hook({**networks, **batch})
            losses.append(loss["total_loss"]["total"])
        return losses

    expected = train(False)
    assert not calls
    assert train(True) == pytest.approx(expected, rel=1e-6)
    assert calls["grad_reverse"] > 0


def test_skada_in_its_own_dann(calls):
    skada = pytest.importorskip("skada.deep", reason="skada and skorch are not installed")
    modules = importlib.import_module("skada.deep.modules")

    def train(optimized):
        torch.manual_seed(0)
        network = modules.ToyModule2D(num_features=8, proba=True)
        options = {"max_epochs": 3, "verbose": 0, "batch_size": 16, "train_split": None}
        net = skada.DANN(network, layer_name="dropout", num_features=8, **options)
        net.initialize()
        if optimized:
            report = fastda.optimize(net.module_)
            assert [e.type for e in report.replaced] == ["DomainClassifier"]
            assert "GradientReversalLayer" in report.replaced[0].what
        x, domains = torch.randn(64, 2).numpy(), torch.tensor([1, -2]).repeat(32).numpy()
        y = torch.randint(2, (64,)).where(torch.tensor(domains) > 0, -1).numpy()
        net.partial_fit({"X": x, "sample_domain": domains}, y)
        return net.history[:, "train_loss"]

    expected = train(False)
    assert not calls
    assert train(True) == pytest.approx(expected, rel=1e-6)
    assert calls["grad_reverse"] > 0


# -- residual blocks -----------------------------------------------------------------------------------------


class InSequential(nn.Module):
    """As in the SimGAN repositories: two layers in a Sequential, the addition in forward."""

    def __init__(self, channels=8, k=3):
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


class InPlace(nn.Module):
    def __init__(self, channels=8, k=7):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=k, stride=1, padding="same", bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=k, stride=1, padding="same")
        self.downsample = None

    def forward(self, x):
        identity = x
        if self.downsample is not None:
            identity = self.downsample(x)
        out = self.conv1(x)
        out = self.relu(out)
        out = self.conv2(out)
        out += identity
        self.relu(out)
        return out


class Functional(nn.Module):
    """Parameters of its own, a narrower inner image, no ReLU at the end."""

    def __init__(self, channels=8, inner=3):
        super().__init__()
        self.w2 = nn.Parameter(torch.randn(channels, inner, 5, 5))
        self.w1, self.b1 = nn.Parameter(torch.randn(inner, channels, 3, 3)), nn.Parameter(torch.randn(inner))

    def forward(self, x):
        return torch.add(x, self.inner(x))

    def inner(self, x):
        return F.conv2d(torch.relu(F.conv2d(x, self.w1, self.b1, padding=1)), self.w2, padding=2)


BLOCKS = [InSequential, InPlace, Functional]


@pytest.mark.parametrize("make", BLOCKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_residual_blocks(make, layout, calls):
    model = nn.Sequential(make(), make()).double()
    original = copy.deepcopy(model)
    report = fastda.optimize(model)
    assert [e.path for e in report.replaced] == ["0", "1"]
    for training in (True, False):
        model.train(training), original.train(training)
        x = torch.randn(2, 8, 9, 7, dtype=torch.float64).to(memory_format=layout)
        calls.clear()
        assert_same(model, original, x)
        assert calls == ({"conv_same": 4} if make is Functional else {"refiner_block": 2})


def changed(base, forward=None, **attributes):
    """A block of `base` with another forward, or with attributes exchanged."""

    class Changed(base):
        def __init__(self):
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value)

    if forward is not None:
        Changed.forward = forward
    return Changed()


def drops_a_path(self, x):
    if self.training and random.random() < 1e-6:
        return x
    return F.relu(x + self.convs(x))


def keeps_count(self, x):
    self.count = 1
    return F.relu(x + self.convs(x))


def depends_on_the_mode(self, x):
    return F.relu(x + self.convs(x)) if self.training else x + self.convs(x)


def changes_its_input(self, x):
    x += self.convs(x)
    return F.relu(x)


def adds_twice(self, x):
    return F.relu(torch.add(x, self.convs(x), alpha=2))


def adds_something_else(self, x):
    h = self.convs[0](x)
    return F.relu(h + self.convs[2](F.relu(h)))


def reads_its_memory(self, x):
    return F.relu(x + self.convs(x)) if self.memory == [] else x


def branches_on_data(self, x):
    return F.relu(x + self.convs(x)) if x.sum() < 1e9 else x


def conv(*args, **kwargs):
    return lambda: nn.Sequential(nn.Conv2d(8, 8, *args, **kwargs), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


NO_BLOCKS = {
    "its code reads or keeps more": [drops_a_path, keeps_count],
    "in training": [depends_on_the_mode],
    "cannot be traced": [branches_on_data],
    "can change unseen": [reads_its_memory],
    "not those of a residual block": [adds_twice, adds_something_else],
    "computes convolution": [changes_its_input],
}


@pytest.mark.parametrize(
    ("reason", "forward"),
    [(reason, forward) for reason, forwards in NO_BLOCKS.items() for forward in forwards],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_what_is_not_surely_a_block_is_left(reason, forward):
    model = changed(InSequential, forward, memory=[])
    if forward is not reads_its_memory:
        del model.memory
    report = fastda.optimize(model)
    assert type(model).__name__ == "Changed"
    (entry,) = [e for e in report.left if e.path == ""]
    assert entry.what.startswith("residual block? ")
    assert reason in entry.what


@pytest.mark.parametrize(
    "inner",
    [
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Sequential(nn.Conv2d(8, 8, 2, padding="same"), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        ),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 8, 3, padding=1)),
    ],
    ids=["leaky", "dilated", "grouped", "even", "reflect", "dropout"],
)
def test_other_inner_layers_make_no_block(inner):
    model = changed(InSequential, convs=inner)
    fastda.optimize(model)
    assert type(model).__name__ == "Changed"


def test_a_batch_norm_between_is_no_block():
    layers = (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    model = changed(InSequential, convs=nn.Sequential(*layers))
    fastda.optimize(model)
    assert type(model).__name__ == "Changed"


def hook(model):
    model.convs[0].register_forward_hook(lambda module, inputs, output: output + 1)


CHANGES = {
    "a hook": hook,
    "another activation": lambda model: setattr(model, "relu", nn.LeakyReLU()),
    "another layer": lambda model: model.convs.__setitem__(0, nn.Conv2d(8, 8, 1).double()),
    "a layer less": lambda model: model.convs.__delitem__(1),
    "another setting": lambda model: setattr(model.convs[0], "padding_mode", "circular"),
    "an attribute": lambda model: setattr(model, "gain", 2.0),
    "pruning": lambda model: prune.l1_unstructured(model.convs[0], "weight", 0.5),
    "a parametrization": lambda model: parametrizations.weight_norm(model.convs[0]),
}


class WithGain(InSequential):
    gain = None

    def __init__(self):
        super().__init__()
        self.gain = 1.0

    def forward(self, x):
        y = F.relu(x + self.convs(x)) if self.relu is None else self.relu(x + self.convs(x))
        return y if self.gain == 1.0 else y * self.gain


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_made_later_is_honoured(change, calls):
    model = WithGain().double()
    original = copy.deepcopy(model)
    report = fastda.optimize(model)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    calls.clear()
    model(x)
    assert calls == {"refiner_block": 1}
    for each in (model, original):
        torch.manual_seed(0)
        change(each)
    (y, grads), (expected, expected_grads) = results(model, x), results(original, x)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, grads, expected_grads))
    assert calls == {"refiner_block": 1}
    report.undo()
    assert type(model) is WithGain


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((8, 6, 5), torch.float32), ((2, 7, 6, 5), torch.float32), ((2, 8, 6, 5), torch.float64)],
    ids=["unbatched", "channels", "dtype"],
)
def test_inputs_that_do_not_fit_do_what_they_did(shape, dtype):
    model, bad = InSequential(), torch.randn(shape, dtype=dtype)
    original = copy.deepcopy(model)
    fastda.optimize(model)

    def outcome(model):
        try:
            return model(bad)
        except RuntimeError as error:
            return str(error)

    got, expected = outcome(model), outcome(original)
    assert got == expected if isinstance(expected, str) else torch.equal(got, expected)


# -- convolutions --------------------------------------------------------------------------------------------


def test_convolutions_alone_and_with_relu(calls):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 5, padding=2, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.LeakyReLU(),
        nn.Conv2d(8, 4, 1),
        nn.ReLU(),
    ).double()
    original = copy.deepcopy(model)
    fastda.optimize(model)
    calls.clear()
    assert_same(model, original, torch.randn(2, 3, 9, 7, dtype=torch.float64))
    assert calls == {"conv_same": 4}
    assert_same(model[:4], original[:4], torch.randn(2, 3, 9, 7, dtype=torch.float64))
    model.append(nn.Conv2d(4, 4, 3, padding=1)).append(nn.ReLU()).double()
    original.extend(copy.deepcopy(list(model)[-2:]))
    assert_same(model, original, torch.randn(1, 3, 6, 5, dtype=torch.float64))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3)],
        lambda: [nn.Conv2d(8, 4, 3, padding="valid", bias=False), nn.ReLU()],
        lambda: [nn.Conv2d(8, 8, 7, padding=1)],
        lambda: [nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")],
        lambda: [nn.Conv2d(8, 8, 5, padding=1, padding_mode="circular")],
        lambda: [nn.Conv2d(8, 8, 3, padding="same", padding_mode="replicate"), nn.ReLU()],
    ],
    ids=["reflected before", "valid", "7×7 padded by 1", "reflected", "circular", "replicated"],
)
def test_other_paddings(layers, layout, calls):
    model = nn.Sequential(*layers()).double()
    original = copy.deepcopy(model)
    report = fastda.optimize(model)
    assert len(report.replaced) >= 1
    calls.clear()
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64).to(memory_format=layout)
    assert_same(model, original, x)
    assert calls == {"conv_same": 1}
    assert model(x).stride() == original(x).stride()


def test_padding_beyond_the_same_size_is_left():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2), nn.Conv2d(8, 8, 3, padding=(1, 0)))
    reasons = [entry.what for entry in fastda.optimize(model).left]
    assert reasons == ["padding (2, 2) with kernel (3, 3)", "padding (1, 0) with kernel (3, 3)"]


def test_a_hook_between_convolution_and_relu_sees_what_it_saw():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    seen = []
    fastda.optimize(model)
    x = torch.randn(2, 3, 6, 5)
    model(x)
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(model(x), seen[0].relu())
    assert seen[0].min() < 0


# -- patch losses --------------------------------------------------------------------------------------------


class GANLoss(nn.Module):
    """As in CycleGAN's repository."""

    def __init__(self, gan_mode, target_real_label=1.0, target_fake_label=0.0):
        super().__init__()
        self.register_buffer("real_label", torch.tensor(target_real_label))
        self.register_buffer("fake_label", torch.tensor(target_fake_label))
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


class OverridesCall(GANLoss):
    def __call__(self, prediction, target_is_real):
        return self.forward(prediction, target_is_real)


class CrossEntropy(nn.Module):
    """SimGAN's local adversarial loss."""

    def __init__(self):
        super().__init__()
        self.ce = nn.CrossEntropyLoss()

    def forward(self, logits, real):
        labels = torch.full((logits.numel() // 2,), 0 if real else 1, device=logits.device)
        return self.ce(logits.permute(0, 2, 3, 1).reshape(-1, 2), labels)


class HingePair(nn.Module):
    def forward(self, fake, real, weight=None):
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) * 0.5


LOSSES = {
    "lsgan": lambda: GANLoss("lsgan"),
    "bce": lambda: OverridesCall("vanilla"),
    "wgan": lambda: GANLoss("wgangp"),
    "bce of real, bce of fake": lambda: GANLoss("vanilla", 0.9),
    "softmax": CrossEntropy,
    "0.5 × hinge": HingePair,
}


@pytest.mark.parametrize(("kind", "make"), LOSSES.items(), ids=LOSSES.keys())
def test_patch_losses(kind, make, calls):
    loss = make()
    original = copy.deepcopy(loss)
    report = fastda.optimize(loss)
    (entry,) = report.replaced
    assert entry.what.startswith("patch loss " + kind.split(" of ")[0])
    calls.clear()
    logits = torch.randn(3, 2 if make is CrossEntropy else 1, 9, 7)
    for second in [torch.randn(2, 1, 9, 7)] if make is HingePair else [True, False]:
        assert_same(loss, original, logits, second)
    assert sum(calls.values()) == (1 if make is HingePair else 2)
    report.undo()
    assert type(loss) is type(original)


def test_a_loss_called_by_name_on_odd_arguments_or_with_a_new_label(calls):
    loss = GANLoss("lsgan")
    original = copy.deepcopy(loss)
    fastda.optimize(loss)
    calls.clear()
    logits = torch.randn(3, 1, 9, 7)
    loss(logits, target_is_real=True), loss(prediction=logits, target_is_real=False)
    assert calls == {"one_side_loss": 2}
    for odd in (torch.randn(5), torch.randn(3, 4, 5, 6), torch.randn(2, 1, 3, 3).bfloat16()):
        assert torch.equal(loss(odd, True), original(odd, True))
    assert loss(torch.randn(0, 1, 3, 3), True).isnan()
    for each in (loss, original):
        each.load_state_dict({"real_label": torch.tensor(0.5), "fake_label": torch.tensor(0.0)})
    assert torch.equal(loss(logits, True), original(logits, True))
    assert calls == {"one_side_loss": 2}
    loss.load_state_dict(GANLoss("lsgan").state_dict())
    loss(logits, True)
    assert calls == {"one_side_loss": 3}


def test_under_autocast_a_loss_of_half_logits_is_served(calls):
    loss = GANLoss("vanilla")
    original = copy.deepcopy(loss)
    fastda.optimize(loss)
    calls.clear()
    logits = torch.randn(3, 1, 9, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = loss(logits, True), original(logits, True)
    assert calls == {"one_side_loss": 1}
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


class Twice(GANLoss):
    def forward(self, prediction, target_is_real):
        return 2 * super().forward(prediction, target_is_real)


class WithTargets(nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = nn.MSELoss()

    def forward(self, prediction, target):
        return self.loss(prediction, target)


@pytest.mark.parametrize("make", [lambda: Twice("lsgan"), WithTargets], ids=["twice", "targets"])
def test_other_losses_are_left(make):
    loss = make()
    report = fastda.optimize(loss)
    assert not report.replaced
    assert report.left[0].what == "no patch loss: none that fastda has"
    assert type(loss) is type(make())


# -- whole trainings, as published ---------------------------------------------------------------------------


@pytest.fixture
def dtype(request):
    """What models and data are made of."""
    torch.set_default_dtype(getattr(torch, request.param))
    yield request.param
    torch.set_default_dtype(torch.float32)


def sizes(names, small, medium, published):
    """Of the models and images: the first are exact, the second and the third tell the speed."""
    cases = [("float64", *small), ("float32", *medium)]
    cases.append(pytest.param("float32", *published, marks=pytest.mark.slow))
    return pytest.mark.parametrize(("dtype", *names), cases, indirect=["dtype"])


def check_training(build, step, steps=50):
    """Train the modules that `build` makes as they are and with one line more, step by step in turn.

    In float64 the losses are the same all along. In float32 such a training soon leaves its own float64
    course, whoever multiplies; there every step starts from the same state. Prints what was replaced, and the
    median of the original's time over the optimized one's.
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
    for i in range(steps):
        if not exact:
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
    assert history[0] != pytest.approx(history[-1], rel=0.01)
    ratio = statistics.median(before / after for before, after in zip(*seconds, strict=True))
    print(f"{ratio:.2f} times as fast, {1e3 * statistics.median(seconds[1]):.0f} ms a step")


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


@pytest.mark.gain
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


class SimGANRefiner(nn.Module):
    def __init__(self, blocks, features):
        super().__init__()
        self.conv_1 = nn.Sequential(nn.Conv2d(1, features, 3, stride=1, padding=1))
        self.resnet_blocks = nn.Sequential(*(InSequential(features) for _ in range(blocks)))
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


@pytest.mark.gain
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


@pytest.mark.gain
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


@pytest.mark.gain
def test_only_what_gains_is_replaced(calls):
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 5, padding=2), InSequential(16), InSequential(8), InPlace(16, 5), InPlace(16, 7)),
    )
    report = fastda.optimize(model)
    assert [(e.path, e.what) for e in report.replaced] == [
        ("", "convolution + ReLU → conv_same (1×)"),
        ("5", "residual block → refiner_block"),
        ("8", "residual block → refiner_block"),
    ]
    reasons = {e.path: e.what for e in report.left}
    assert reasons["0"] == "no faster with less than 16 channels"
    assert reasons["4"] == "no faster with 5×5 kernels"
    assert reasons["6"] == "residual block? no faster with less than 16 channels"
    assert reasons["7"] == "residual block? no faster with 5×5 kernels"
    calls.clear()
    for size, served in ((8, {"refiner_block": 1}), (5, {})):
        model[5](torch.randn(16, 16, size, 9))
        assert calls == served
        calls.clear()


@pytest.mark.gain
@pytest.mark.parametrize(
    ("channels", "shape", "padding", "served"),
    [
        (64, (1, 8, 8), 1, True),
        (16, (1, 8, 8), 1, False),
        (16, (16, 8, 8), 1, True),
        (64, (64, 3, 3), 1, False),
        (64, (16, 5, 5), 1, False),  # four tiles for 25 pixels
        (64, (16, 6, 6), 1, True),
        (64, (16, 10, 10), 0, False),  # nine tiles for 64 pixels
        (64, (1, 18, 18), 0, True),
        (512, (1, 7, 7), 1, True),
    ],
)
def test_a_convolution_of_little_work_takes_pytorchs(channels, shape, padding, served, calls):
    with torch.no_grad():
        model = nn.Conv2d(channels, channels, 3, padding=padding, bias=False)
        fastda.optimize(model)
        calls.clear()
        model(torch.zeros(shape[0], channels, *shape[1:]))
    assert bool(calls) == served


@pytest.mark.gain
def test_a_small_map_takes_the_authors_loss(calls):
    loss = GANLoss("vanilla")
    original = copy.deepcopy(loss)
    (entry,) = fastda.optimize(loss).replaced
    assert entry.what == "patch loss bce → patch_discriminator_loss, from 16,384 patches"
    calls.clear()
    small, large = torch.randn(1, 1, 30, 30), torch.randn(16, 1, 32, 32)
    assert torch.equal(loss(small, True), original(small, True))
    assert not calls
    torch.testing.assert_close(loss(large, True), original(large, True))
    assert calls == {"one_side_loss": 1}


# -- the whole -----------------------------------------------------------------------------------------------


class Refiner(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.down = nn.Conv2d(8, 8, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(*(InSequential() for _ in range(blocks)))
        self.last = nn.Conv2d(8, 1, 1)
        self.grl = WarmStartGradientReverseLayer()

    def forward(self, x):
        return self.grl(self.last(self.blocks(self.down(self.first(x)))))


def test_the_report_reads_well():
    assert (
        str(fastda.optimize(Refiner()))
        == """\
fastda.optimize(Refiner): 7 replaced, 1 left
replaced
  first                    Sequential                     convolution + ReLU → conv_same (1×)
  blocks.0 … blocks.3 (4)  InSequential                   residual block → refiner_block
  last                     Conv2d                         convolution → conv_same
  grl                      WarmStartGradientReverseLayer  gradient reversal: CopyWithDefault → grad_reverse, \
a view where there was a copy
left as it was
  down  Conv2d  kernel (4, 4) is not square and odd"""
    )


def test_parameters_and_state_stay_what_they_were():
    model = Refiner()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    fastda.optimize(model)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    Refiner().load_state_dict(model.state_dict())
    model.load_state_dict(Refiner().state_dict())
    assert isinstance(model.blocks[0], InSequential)


def test_twice_changes_nothing_more_and_each_undoes_its_own():
    model = Refiner()
    first = fastda.optimize(model)
    second = fastda.optimize(model)
    assert not second.replaced
    second.undo()
    assert type(model.blocks[0]) is not InSequential
    first.undo()
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in Refiner().modules()}
    assert not first.replaced


def test_a_copy_leaves_the_model_alone():
    model = Refiner()
    report = fastda.optimize(model, inplace=False)
    assert report.model is not model
    assert type(model.blocks[0]) is InSequential
    assert isinstance(report.model.blocks[0], InSequential)
    assert_same(report.model, model, torch.randn(1, 1, 8, 6))


def test_undo_refuses_what_another_tool_changed_since():
    model = nn.Sequential(InSequential())
    report = fastda.optimize(model)

    class Wrapped(type(model[0])):
        pass

    model[0].__class__ = Wrapped
    with pytest.raises(RuntimeError, match=r"undo: __class__ of 0 was changed after fastda\.optimize, to "):
        report.undo()
    assert type(model[0]) is Wrapped


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [Refiner, AsAttribute, InForward], ids=lambda f: f.__name__)
def test_copies_and_pickles_stay_optimized(make, copied, calls):
    model = make()
    fastda.optimize(model)
    again = copied(model)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    inputs = (torch.randn(1, 1, 8, 6),) if make is Refiner else (torch.randn(3, 6), 0.5)
    assert torch.equal(results(model, *inputs)[0], results(again, *inputs)[0])
    assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}


def test_a_module_with_a_pickle_of_its_own_keeps_it():
    class Own(InSequential):
        def __reduce__(self):
            return list, ()

    model = Own()
    fastda.optimize(model)
    assert pickle.loads(pickle.dumps(model)) == []


def test_modules_in_two_places_and_in_containers():
    block = InSequential()
    model = nn.ModuleDict({"a": nn.ModuleList([block, block]), "b": nn.DataParallel(nn.Sequential(block))})
    report = fastda.optimize(model)
    assert len(report.replaced) == 1
    report.undo()
    assert type(block) is InSequential


def test_scripted_modules_are_left_alone():
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 3, 3, padding=1)), InSequential())
    assert [e.path for e in fastda.optimize(model).replaced] == ["1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    report = fastda.optimize(nn.Sequential(InSequential(), nn.Conv2d(8, 8, 3, padding=1)).to(dtype))
    assert [e.path for e in report.replaced] == ["0", "1"]


@pytest.mark.parametrize(
    "surroundings",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_what_surrounds_the_call_does_not_matter(surroundings):
    model = Refiner()
    with surroundings():
        report = fastda.optimize(model)
    assert report.replaced == fastda.optimize(Refiner()).replaced


def test_the_random_state_is_left_alone():
    model = Refiner()
    before = torch.get_rng_state()
    fastda.optimize(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_modules_are_accepted():
    with pytest.raises(TypeError, match=r"optimize: model must be a torch.nn.Module, got function"):
        fastda.optimize(lambda x: x)


def test_a_kernel_that_is_wrong_is_not_let_in(monkeypatch):
    def wrong(*args, **kwargs):
        return fastda.conv_same(*args, **kwargs) * (1 + 1e-9)

    monkeypatch.setattr(convolution_module, "conv_same", wrong)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    report = fastda.optimize(model)
    assert not report.replaced
    assert all("value differs" in entry.what for entry in report.left)


def test_measure_compares_with_what_was_before():
    model = Refiner()
    report = fastda.optimize(model)
    x = torch.randn(2, 1, 16, 12)
    state = copy.deepcopy(model.state_dict())
    measured = report.measure(x, rounds=2)
    assert measured.forward > 0
    assert measured.step > 0
    assert measured.value_error < 1e-5
    assert measured.gradient_error < 1e-4
    assert "× forward + backward" in str(measured)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert type(model.blocks[0]) is not InSequential
    model.requires_grad_(False)
    assert report.measure(x, rounds=1).step is None
