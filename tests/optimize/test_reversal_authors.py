"""What the author of a reversing Function does in its forward, and exchanges later, goes on."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import fastda
from tests.optimize.helpers import served
from tests.optimize.reversing import Layer, function, gradient, neg_times, saved

pytestmark = pytest.mark.isa_independent


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
