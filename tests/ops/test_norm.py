"""What the conformance tests do not ask of normalisation: accuracy, stored statistics, what is saved."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastda
from fastda import reference
from tests.common import check_error, check_gradients, check_opcheck, check_transforms, draw

LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
both_layouts = pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["contiguous", "channels_last"])
both = pytest.mark.parametrize("op", ["batch_norm_act", "instance_norm_act"])


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@both_layouts
@both
@pytest.mark.parametrize("channels", [3, 16, 70])
@pytest.mark.parametrize("mean, bound", [(0.0, 3e-7), (1e3, 6e-6), (1e6, 6e-3)])
def test_a_mean_far_above_the_deviation(op, layout, channels, mean, bound):
    """Values keep what float32 has of them: one rounding of x itself is not seen, one of the mean is less."""
    x = (torch.randn(3, channels, 33, 37) + mean).contiguous(memory_format=layout)
    grad = torch.randn_like(x)
    exact, given = x.double().requires_grad_(), x.clone().requires_grad_()
    expected, actual = getattr(reference, op)(exact), getattr(fastda, op)(given)
    assert relative(actual.detach(), expected.detach()) < min(bound, 3e-7)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    (got,) = torch.autograd.grad(actual, given, grad)
    assert relative(got, wanted) < 3e-7


@both_layouts
@both
def test_what_a_block_begins_with_is_far_from_the_rest(op, layout):
    """Sums are taken about the mean of a block's first entries."""
    x = torch.randn(2, 5, 67, 71)
    x[:, :, :2] += 1e4
    x[:, 1, 3, :2] = -1e5
    x = x.contiguous(memory_format=layout)
    assert relative(getattr(fastda, op)(x), getattr(reference, op)(x.double())) < 1e-6


@both_layouts
@both
def test_squares_that_float32_cannot_hold(op, layout):
    x = (torch.randn(2, 5, 9, 11) * 1e30).contiguous(memory_format=layout)
    mean, variance = torch.zeros(5), torch.ones(5)
    actual = getattr(fastda, op)(x, None, None, mean, variance)
    assert relative(actual, getattr(reference, op)(x.double())) < 1e-6
    assert variance.isinf().all() and mean.isfinite().all()


@both_layouts
@both
def test_stored_statistics_of_what_is_not_finite(op, layout):
    """As PyTorch stores them: an infinite mean is infinite, not NaN, and other channels are untouched."""
    for values in ((torch.inf,), (torch.inf, torch.inf), (torch.inf, -torch.inf), (torch.nan,)):
        x = torch.randn(2, 3, 8, 9)
        for i, value in enumerate(values):
            x[i, 1, 4, 5 + i] = value
        stored = [[torch.zeros(3), torch.ones(3)] for _ in range(2)]
        getattr(fastda, op)(x.contiguous(memory_format=layout), None, None, *stored[0])
        getattr(reference, op)(x, None, None, *stored[1])
        for got, right in zip(*stored, strict=True):
            torch.testing.assert_close(got, right, equal_nan=True)


# -- gradients -----------------------------------------------------------------------------------------------


@both_layouts
@both
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_the_mask_where_a_result_is_zero_or_nan(op, layout, slope):
    """As PyTorch's activations have it: ReLU's gradient passes at NaN, leaky ReLU's times the slope."""
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    residual = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    residual[0, 0, 0, 0], residual[1, 2, 3, 3] = torch.nan, -torch.inf
    residual[0, 1, 2, 2] = 0.0  # and so is the result: the weight of this channel is 0
    weight, bias = torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3)
    mean, variance = torch.zeros(3), torch.ones(3)
    for with_residual, twice in itertools.product((True, False), (True, False)):
        results = []
        for function in (getattr(fastda, op), getattr(reference, op)):
            leaves = [t.clone().requires_grad_() for t in (x, residual)]
            y = function(
                *(leaves[0], weight, bias, mean, variance),
                training=False,
                residual=leaves[1] if with_residual else None,
                negative_slope=slope,
            )
            wanted = leaves if with_residual else leaves[:1]
            gradients = torch.autograd.grad(y.sum(), wanted, create_graph=twice)
            results.append([t.detach() for t in (y, *gradients)])
        for got, right in zip(*results, strict=True):
            torch.testing.assert_close(got, right, equal_nan=True)


@both_layouts
@both
def test_a_result_changed_in_place(op, layout):
    """Without a residual nothing of it is needed; with one, autograd says that it was changed."""
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
    residual, grad = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    function = getattr(fastda, op)
    (right,) = torch.autograd.grad(function(x, negative_slope=0.0), x, grad)
    y = function(x, negative_slope=0.0)
    y.mul_(-1)
    (got,) = torch.autograd.grad(y, x, -grad)
    assert torch.equal(got, right)
    y = function(x, residual=residual, negative_slope=0.0)
    y.mul_(-1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


@both
def test_stored_statistics_that_change_before_backward(op):
    """Another batch may go through the layer in between; the gradient is that of the forward that was."""
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    stored = [torch.randn(3), torch.rand(3) + 0.5]
    before = [t.clone() for t in stored]
    y = getattr(fastda, op)(x, None, None, *stored, training=False)
    getattr(fastda, op)(torch.randn(2, 3, 4, 5), None, None, *stored)
    assert not torch.equal(stored[0], before[0])
    (got,) = torch.autograd.grad(y.sum(), x)
    (right,) = torch.autograd.grad(getattr(reference, op)(x, None, None, *before, training=False).sum(), x)
    torch.testing.assert_close(got, right)


@both
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(2, 16, 224, 224), (3, 64, 91, 95)], ids=str)
def test_results_too_large_for_the_cache(op, shape, layout):
    """Whole planes and planes that begin and end within a line; rows of whole lines."""
    drawn = [torch.randn(shape).contiguous(memory_format=layout) for _ in range(3)]
    weight = torch.rand(shape[1]) + 0.5
    for slope in (None, 0.1):
        found = []
        for function, dtype in (
            (getattr(fastda, op), torch.float32),
            (getattr(reference, op), torch.float64),
        ):
            x, residual, grad = (t.to(dtype).requires_grad_() for t in drawn)
            y = function(x, weight.to(dtype), residual=residual, negative_slope=slope)
            found.append([y, *torch.autograd.grad(y, (x, residual), grad)])
        for name, got, right in zip(("y", "d_x", "d_residual"), *found, strict=True):
            error = (got - right).norm() / right.norm()
            assert error < 1e-4, f"{name} is off by {error:.1e}"


@both
def test_what_is_saved(op):
    """x and the statistics; the result only where a residual keeps the mask from being computed again."""
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    for options, images in (
        ({}, 1),
        ({"negative_slope": 0.0}, 1),
        ({"residual": torch.randn(2, 8, 32, 32)}, 1),
        ({"residual": torch.randn(2, 8, 32, 32), "negative_slope": 0.1}, 2),
    ):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
        ):
            getattr(fastda, op)(x, **options)
        assert sum(t.numel() == x.numel() for t in saved.values()) == images, options


@both
def test_first_and_second_gradients_by_differences(op):
    for options in (
        {"negative_slope": 0.1},
        {"residual": True, "negative_slope": 0.0},
        {"residual": True, "weight": None, "bias": None},
    ):
        check_gradients(op, draw(op, (2, 3, 2, 3), **options))


@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slope", [None, 0.0, 0.1])
@pytest.mark.parametrize("added", [True, False])
def test_second_gradients_are_those_of_the_reference(op, training, slope, added):
    x, residual, grad = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, variance = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    leaves = [x, weight, bias, residual] if added else [x, weight, bias]

    def gradients(function):
        options = {"training": training, "eps": 0.3, "negative_slope": slope}
        stored = mean.clone(), variance.clone()
        y = function(x, weight, bias, *stored, residual=residual if added else None, **options)
        first = torch.autograd.grad(y, leaves, grad, create_graph=True)
        penalty = sum(g.pow(3).sum() for g in first)
        return *first, *torch.autograd.grad(penalty, [grad, *leaves], materialize_grads=True)

    torch.testing.assert_close(gradients(getattr(fastda, op)), gradients(getattr(reference, op)))


@both
def test_transforms(op):
    check_transforms(op, draw(op, (2, 3, 2, 3), residual=True, negative_slope=0.1))


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_raw_operators_are_what_they_declare(layout, dtype):
    x, residual, grad = (torch.randn(2, 5, 6, 7).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    weight, bias, mean, variance = torch.randn(5), torch.randn(5), torch.randn(5), torch.rand(5)
    for per_image, stored in ((False, ()), (True, ()), (False, (mean, variance))):
        given = stored or (None, None)
        check_opcheck("norm_act", x, weight, bias, *given, residual, per_image, 1e-5, 0.1)
        y, *used = torch.ops.fastda.norm_act(x, weight, bias, *given, residual, per_image, 1e-5, 0.1)
        for output, needs in ((y, [True] * 4), (None, [True, False, True, False])):
            check_opcheck(
                "norm_act_backward",
                *(grad, x, weight, bias, *used, output, per_image, not stored, 1e-5, 0.1, *needs),
            )


# -- arguments -----------------------------------------------------------------------------------------------


@both
def test_float32_statistics_and_weights_for_16_bit_images(op):
    x = torch.randn(3, 4, 5, 6).bfloat16()
    weight, bias = torch.randn(4, requires_grad=True), torch.randn(4)
    stored = [torch.zeros(4), torch.ones(4)]
    y = getattr(fastda, op)(x, weight, bias, *stored, negative_slope=0.0)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    right = [torch.zeros(4).double(), torch.ones(4).double()]
    getattr(reference, op)(x.double(), weight.double(), bias.double(), *right)
    for got, wanted in zip(stored, right, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


@both
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"x": torch.ones(3, 4)}, ValueError, "x must be (N, C, H, W), got (3, 4)"),
        (
            {"x": torch.ones(1, 3, 1, 1)},
            ValueError,
            "training needs more than one value for each mean, got x of (1, 3, 1, 1)",
        ),
        ({"weight": torch.ones(2)}, ValueError, "weight must be (3,), got (2,)"),
        (
            {"weight": torch.ones(3).bfloat16()},
            TypeError,
            "weight must be torch.float32 for x in torch.float32, got torch.bfloat16",
        ),
        (
            {"residual": torch.ones(1, 3, 4, 5)},
            ValueError,
            "residual must be (2, 3, 4, 5), got (1, 3, 4, 5)",
        ),
        (
            {"running_mean": torch.ones(3)},
            ValueError,
            "running_mean and running_var must both be given, or neither",
        ),
        (
            {"training": False},
            ValueError,
            "running_mean and running_var must be given where training is False",
        ),
        (
            {"negative_slope": -0.1},
            ValueError,
            "negative_slope must be None or a number of 0 or more, got -0.1",
        ),
        ({"eps": "small"}, ValueError, "eps must be a number of 0 or more, got 'small'"),
        ({"eps": -1e-5}, ValueError, "eps must be a number of 0 or more, got -1e-05"),
        (
            {"x": torch.ones(2, 3, 4, 5).half(), "weight": torch.ones(3), "bias": torch.ones(3).half()},
            TypeError,
            "bias must have the dtype of weight, torch.float32, got torch.float16",
        ),
    ],
)
def test_errors(op, options, error, message):
    check_error(getattr(fastda, op), {"x": torch.ones(2, 3, 4, 5), **options}, error, f"{op}: {message}")


def test_no_image_leaves_the_statistics_as_in_torch():
    for function in (fastda.batch_norm_act, F.batch_norm):
        mean, variance = torch.zeros(3), torch.ones(3)
        y = function(torch.ones(0, 3, 4, 5), running_mean=mean, running_var=variance, training=True)
        assert y.shape == (0, 3, 4, 5)
        assert torch.equal(mean, torch.zeros(3)) and torch.equal(variance, torch.ones(3))


def test_one_value_a_channel_as_torch_refuses_it():
    with pytest.raises(ValueError):
        F.batch_norm(torch.ones(1, 3, 1, 1), None, None, training=True)
    with pytest.raises(ValueError):
        fastda.instance_norm_act(torch.ones(4, 3, 1, 1))
    assert fastda.batch_norm_act(torch.randn(2, 3, 1, 1)).shape == (2, 3, 1, 1)
