"""Reversing Functions: the written forms and no others, bit for bit, whatever their forward does."""

import copy
import functools
import importlib
import importlib.metadata
import types

import numpy
import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import fastda
from tests.optimize.helpers import served

pytestmark = pytest.mark.isa_independent


def function(backward, forward=None):
    """A Function with this backward, whose forward keeps its scale in every place."""

    def keep(ctx, x, s=0.7):
        ctx.s = s
        ctx.save_for_backward(s if isinstance(s, torch.Tensor) else torch.tensor(s, dtype=torch.float64))
        return x.view_as(x)

    methods = {"forward": staticmethod(forward or keep), "backward": staticmethod(backward)}
    return type("Reverse", (Function,), methods)


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function.apply(*inputs)


def gradient(layer, *scale, shape=(3, 4), dtype=torch.float32):
    torch.manual_seed(1)
    x, grad = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)
    y = layer(x, *scale)
    return torch.autograd.grad(y, x, grad)[0]


# -- the forms -----------------------------------------------------------------------------------------------


def neg_times(ctx, grad):
    return grad.neg() * ctx.s, None


def minus_times(ctx, grad_output):
    """A docstring, and an annotation below, change nothing."""
    grad_input: torch.Tensor = -grad_output * ctx.s
    return grad_input, None


def of_a_local(ctx, g):
    lambd = ctx.s
    result = lambd * g.neg()
    return result, None


def minus_all(ctx, grad):
    return -(ctx.s * grad), None


def times_minus_one(ctx, grad):
    return grad * -1 * ctx.s, None


def saved(ctx, grad):
    (s,) = ctx.saved_tensors
    return (grad * s).neg(), None


def copies(ctx, grad):
    return grad.clone() * -ctx.s, None


def constant(ctx, grad):
    return grad.neg() * 0.1, None


def asks(ctx, grad):
    out = None
    (s,) = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        out = -grad * s
    return out, None


TWO = [neg_times, minus_times, of_a_local, minus_all, times_minus_one, saved, copies, constant, asks]
SCALES = [
    *(0.3, -2.5, 0.0, 1, 0, -3, True, float("nan"), float("inf"), 1e300),
    *(numpy.float64(0.3), numpy.float32(0.3), numpy.uint8(3)),
    *(torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=torch.float64), torch.tensor(3)),
    *(torch.tensor(3, dtype=torch.uint8), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(True)),
    torch.tensor(0.3, dtype=torch.bfloat16),
]


def same(a, b):
    """Equal to the bit, the signs of zeros included."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32)) or torch.equal(
        torch.nan_to_num(a, nan=7.0), torch.nan_to_num(b, nan=7.0)
    )


@pytest.mark.parametrize("backward", TWO, ids=lambda f: f.__name__)
def test_every_form_with_every_scale(backward):
    layer = Layer(function(backward))
    expected = []
    for scale in SCALES:
        try:
            expected.append(gradient(layer, scale))
        except Exception as problem:
            expected.append((type(problem), str(problem)))
    report = fastda.optimize(layer)
    (entry,) = report.replaced
    assert entry.what == "gradient reversal Reverse → one pass over the gradient, where it made two"
    for scale, right in zip(SCALES, expected, strict=True):
        if isinstance(right, torch.Tensor):
            assert same(gradient(layer, scale), right), scale
        else:
            with pytest.raises(right[0]) as problem:
                gradient(layer, scale)
            assert str(problem.value) == right[1]
    assert served(report) >= 8
    served_before = served(report)
    report.undo()
    assert vars(layer.function)["backward"].__func__ is backward
    gradient(layer, 0.3)
    assert served_before and not report.calls()


def test_zeros_have_their_signs():
    for scale in (0, 0.0, -0.0):
        layer = Layer(function(neg_times))
        before = gradient(layer, scale)
        assert served(fastda.optimize(layer)) == 0
        assert torch.equal(gradient(layer, scale).signbit(), before.signbit())


def not_negative(ctx, grad):
    return 0.1 * grad.clone(), None


def negative_constant_copied(ctx, grad):
    return -0.1 * grad.clone(), None


def clamped(ctx, grad):
    return (-grad * ctx.s).clamp(-10, 10), None


def without_nan(ctx, grad):
    return torch.nan_to_num(-grad * ctx.s), None


def two_scales(ctx, grad):
    return -grad * ctx.s * ctx.t, None


def of_a_branch(ctx, grad):
    if ctx.s > 1:
        return -grad * ctx.s, None
    return grad.neg(), None


def of_a_global(ctx, grad):
    return -grad * GLOBAL, None


def printing(ctx, grad):
    print(end="")
    return -grad * ctx.s, None


def doubled(ctx, grad):
    return grad * 2.0 * ctx.s, None


@once_differentiable
def decorated(ctx, grad):
    return -grad * ctx.s, None


def in_place(ctx, grad):
    return grad.neg_().mul_(ctx.s), None


GLOBAL = 1.0
OTHERS = [
    doubled,
    decorated,
    in_place,
    not_negative,
    negative_constant_copied,
    clamped,
    without_nan,
    two_scales,
    of_a_branch,
    of_a_global,
    printing,
]


@pytest.mark.parametrize("backward", OTHERS, ids=lambda f: f.__name__)
def test_no_other_form_is_touched(backward):
    layer = Layer(function(backward))
    report = fastda.optimize(layer)
    assert vars(layer.function)["backward"].__func__ is backward
    assert not report.replaced
    looks_like_one = backward not in (doubled, not_negative, negative_constant_copied)
    assert [e.what for e in report.left] == looks_like_one * [
        "Reverse has a backward that is none of the written forms of −scale · gradient; if it is meant as "
        "that: fastda.grad_reverse(x, scale)"
    ]


def one_pass(ctx, grad):
    return -ctx.s * grad, None


def weighted(ctx, grad):
    return ctx.s * grad, None


@pytest.mark.parametrize("backward", [one_pass, weighted], ids=lambda f: f.__name__)
def test_one_pass_is_what_it_gets_at_best(backward):
    report = fastda.optimize(Layer(function(backward)))
    assert [e.what for e in report.left] == [
        "Reverse makes one pass over the gradient already; fastda.grad_reverse(x, scale) saves Python, too"
    ]


# -- what an author's forward does goes on -------------------------------------------------------------------


def forward_with_default(ctx, x, s=0.1):
    ctx.s = s
    return x.view_as(x)


def forward_none_is_half(ctx, x, s=None):
    ctx.s = 0.5 if s is None else s
    return x.clone()


def forward_by_dtype(ctx, x, s=1.0):
    ctx.s = 2.0 if x.dtype == torch.float64 else s
    return x * 1.0


def forward_from_a_list(ctx, x, s=[]):  # noqa: B006
    s.append(1)
    ctx.s = float(len(s))
    return x.view_as(x)


FORWARDS = [forward_with_default, forward_none_is_half, forward_by_dtype, forward_from_a_list]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_defaults_and_copies_are_the_authors(forward):
    defaults = copy.deepcopy(forward.__defaults__)
    layer = Layer(function(neg_times, forward))

    def all_results():
        forward.__defaults__ = copy.deepcopy(defaults)
        x = torch.randn(2, 3)
        shared = layer(x).data_ptr() == x.data_ptr()
        return [shared, *(gradient(layer, dtype=d).tolist() for d in (torch.float32, torch.float64) * 2)]

    expected = all_results()
    report = fastda.optimize(layer)
    assert all_results() == expected
    assert served(report) == 4


def test_a_copy_can_be_changed_in_place_behind_it():
    layer = Layer(function(neg_times, forward_none_is_half))
    fastda.optimize(layer)
    x = torch.randn(3, 4, requires_grad=True)
    torch.relu_(layer(x)).sum().backward()
    assert torch.equal(x.grad, -0.5 * (x > 0).float())


def test_a_scale_changed_between_forward_and_backward():
    layer = Layer(function(neg_times))
    fastda.optimize(layer)
    x, scale = torch.ones(2, requires_grad=True), torch.tensor(1.0)
    y = layer(x, scale)
    scale.fill_(3.0)
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([-3.0, -3.0]))


def test_a_backward_exchanged_later_is_the_users():
    reverse = function(neg_times)
    layer = Layer(reverse)
    report = fastda.optimize(layer)
    reverse.backward = staticmethod(lambda ctx, grad: (grad * 5, None))
    x = torch.ones(2, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([5.0, 5.0]))
    with pytest.raises(
        RuntimeError, match=r"undo: the model: Reverse.backward was changed after fastda.optimize"
    ):
        report.undo()


def test_a_backward_whose_code_is_exchanged_runs_the_new_code():
    def old(ctx, grad):
        return -grad * ctx.s, None

    layer = Layer(function(old))
    fastda.optimize(layer)
    old.__code__ = (lambda ctx, grad: (grad * 7, None)).__code__
    assert torch.equal(gradient(layer), gradient(Layer(function(lambda ctx, grad: (grad * 7, None)))))


def test_saved_scales_are_read_once_where_a_checkpoint_makes_them():
    layer = Layer(function(saved))
    fastda.optimize(layer)
    for scale in (torch.tensor(0.5), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(2)):
        x = torch.randn(3, 4, requires_grad=True)
        checkpoint(layer, x, scale, use_reentrant=False).sum().backward()
        assert torch.equal(x.grad, -scale.expand(3, 4).float())


def test_away_from_the_cpu_the_authors_backward_runs():
    """The meta device stands for an accelerator."""
    layer = Layer(function(neg_times))
    report = fastda.optimize(layer)
    x = torch.randn(3, 4, device="meta", requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, 0.5), x, torch.randn(3, 4, device="meta"))
    assert grad.is_meta
    assert report.calls() == {"": (0, 1)}


def test_second_derivatives_and_compiled_code():
    layer = Layer(function(neg_times))

    def twice(call):
        x = torch.tensor([2.0, 3.0], requires_grad=True)
        (grad,) = torch.autograd.grad((call(x, 0.5) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.sum(), x)[0]

    expected = twice(layer)
    fastda.optimize(layer)
    assert torch.equal(twice(layer), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for scale in (0.25, 0.5):
        assert torch.equal(gradient(compiled, scale), gradient(layer, scale))


# -- where code refers to it ---------------------------------------------------------------------------------


class ReverseLayerF(Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        output = grad_output.neg() * ctx.alpha
        return output, None

    @staticmethod
    def reverse(x, alpha):
        return ReverseLayerF.apply(x, alpha)


class Derived(ReverseLayerF):
    pass


taken_before = ReverseLayerF.apply
elsewhere = types.ModuleType("functions")
elsewhere.GRL = ReverseLayerF


def reverse(x, alpha=1.0):
    return ReverseLayerF.apply(x, alpha)


class InForward(nn.Module):
    def forward(self, x):
        return ReverseLayerF.apply(x, 0.5)


class AppliesGlobal(nn.Module):
    def forward(self, x):
        return taken_before(x, 0.5)


class CallsFunction(nn.Module):
    def forward(self, x):
        return reverse(x, 0.5)


class CallsHelper(nn.Module):
    def forward(self, x):
        return ReverseLayerF.reverse(x, 0.5)


class OfAModule(nn.Module):
    def forward(self, x):
        return elsewhere.GRL.apply(x, 0.5)


class OfAStaticMethod(nn.Module):
    @staticmethod
    def reversed(x):
        return Derived.apply(x, 0.5)

    def forward(self, x):
        return self.reversed(x)


class Holder:
    apply = staticmethod(lambda x, s: ReverseLayerF.apply(x, s))


class OfAHolder(nn.Module):
    def __init__(self):
        super().__init__()
        self.grl = Holder

    def forward(self, x):
        return self.grl.apply(x, 0.5)


class InABase(InForward):
    def forward(self, x):
        return super().forward(x)


class AsAttribute(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        value = self.value[0] if isinstance(self.value, list) else self.value
        return value(x, 0.5)


def in_a_closure():
    local = function(neg_times)

    class Model(nn.Module):
        def forward(self, x):
            return local.apply(x, 0.5)

    return Model()


PLACES = {
    **{
        c.__name__: c
        for c in (InForward, AppliesGlobal, CallsFunction, CallsHelper, OfAModule, OfAStaticMethod)
    },
    "in a base class": InABase,
    "in a class that is an attribute": OfAHolder,
    "in a closure": in_a_closure,
    "attribute": lambda: AsAttribute(ReverseLayerF.apply),
    "lambda": lambda: AsAttribute(lambda x, s: ReverseLayerF.apply(x, s)),
    "partial": lambda: AsAttribute(functools.partial(reverse)),
    "list": lambda: AsAttribute([ReverseLayerF.apply]),
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES.keys())
def test_reversals_are_found_wherever_the_code_refers_to_them(make):
    model = make()
    report = fastda.optimize(model)
    assert [e.path for e in report.replaced] == [""]
    x = torch.ones(3, requires_grad=True)
    model(x).sum().backward()
    assert torch.equal(x.grad, -0.5 * torch.ones(3))
    assert served(report) == 1
    report.undo()
    assert vars(ReverseLayerF)["backward"].__func__.__name__ == "backward"
    assert not hasattr(ReverseLayerF.backward, "reversal")


def test_two_models_share_a_function_until_both_are_undone():
    first, second = fastda.optimize(InForward()), fastda.optimize(CallsHelper())
    first.undo()
    assert hasattr(ReverseLayerF.backward, "reversal")
    second.undo()
    assert not hasattr(ReverseLayerF.backward, "reversal")


def test_nothing_is_written_into_the_authors_module():
    before = dict(globals())
    report = fastda.optimize(nn.ModuleList([InForward(), OfAModule()]))
    assert globals() == before
    report.undo()


def test_a_function_that_cannot_be_changed_is_left():
    class Frozen(type(Function)):
        def __setattr__(cls, name, value):
            if name == "backward":
                raise TypeError("frozen")
            super().__setattr__(name, value)

    methods = {"forward": staticmethod(forward_with_default), "backward": staticmethod(neg_times)}
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Layer(Frozen("Reverse", (Function,), methods)))
    report = fastda.optimize(model)
    assert [e.path for e in report.replaced] == ["0"]
    assert [e.what for e in report.left] == ["could not be looked at: TypeError('frozen')"]
    report.undo()


# -- peers, as installed -------------------------------------------------------------------------------------


def test_pytorch_revgrad():
    peer = pytest.importorskip("pytorch_revgrad", reason="pytorch-revgrad is not installed")
    model = nn.Sequential(nn.Linear(6, 5), peer.RevGrad(alpha=0.7), nn.Linear(5, 1))
    x = torch.randn(4, 6)

    def grads():
        return torch.autograd.grad(model(x).sum(), list(model.parameters()))

    expected = grads()
    report = fastda.optimize(model)
    assert [(e.path, e.type) for e in report.replaced] == [("1", "RevGrad")]
    assert all(map(torch.equal, grads(), expected))
    assert served(report) == 1
    report.undo()


def test_pytorch_adapt_makes_one_pass_already():
    pytest.importorskip("pytorch_adapt", reason="pytorch-adapt is not installed")
    layers = importlib.import_module("pytorch_adapt.layers")
    report = fastda.optimize(layers.GradientReversal())
    assert not report.replaced
    assert "makes one pass over the gradient already" in report.left[0].what


def test_skada_in_its_own_dann():
    skada = pytest.importorskip("skada.deep", reason="skada and skorch are not installed")
    modules = importlib.import_module("skada.deep.modules")

    def train(optimized):
        torch.manual_seed(0)
        network = modules.ToyModule2D(num_features=8, proba=True)
        options = {"max_epochs": 3, "verbose": 0, "batch_size": 16, "train_split": None}
        net = skada.DANN(network, layer_name="dropout", num_features=8, **options)
        net.initialize()
        report = fastda.optimize(net.module_) if optimized else None
        x, domains = torch.randn(64, 2).numpy(), torch.tensor([1, -2]).repeat(32).numpy()
        y = torch.randint(2, (64,)).where(torch.tensor(domains) > 0, -1).numpy()
        net.partial_fit({"X": x, "sample_domain": domains}, y)
        if report:
            assert [e.type for e in report.replaced] == ["DomainClassifier"]
            assert served(report) > 0
            report.undo()
        return net.history[:, "train_loss"]

    assert train(True) == train(False)
