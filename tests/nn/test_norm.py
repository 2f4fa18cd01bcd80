"""BatchNormAct2d and InstanceNormAct2d against torch's own layers, step by step."""

import pytest
import torch
from torch import nn

from fastda.nn import BatchNormAct2d, InstanceNormAct2d

PAIRS = ((BatchNormAct2d, nn.BatchNorm2d), (InstanceNormAct2d, nn.InstanceNorm2d))
OPTIONS = (
    {},
    {"affine": False},
    {"affine": True, "momentum": 0.3, "eps": 1e-3},
    {"momentum": None, "track_running_stats": True},
    {"track_running_stats": False},
    {"track_running_stats": True, "affine": True},
)
every_pair = pytest.mark.parametrize("ours, theirs", PAIRS, ids=lambda c: c.__name__)


@every_pair
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_a_training_then_an_evaluation(ours, theirs, options, layout):
    fused, plain = ours(5, negative_slope=0.1, **options), theirs(5, **options)
    for name, parameter in plain.named_parameters():
        nn.init.normal_(parameter)
        fused.get_parameter(name).data.copy_(parameter.data)
    for training in (True, True, True, False, True, False):
        fused.train(training)
        plain.train(training)
        x, residual = (
            torch.randn(3, 5, 6, 7).contiguous(memory_format=layout).requires_grad_() for _ in range(2)
        )
        got = fused(x, residual)
        right = nn.functional.leaky_relu(plain(x) + residual, 0.1)
        torch.testing.assert_close(got, right)
        grad = torch.randn(3, 5, 6, 7)
        leaves = [[x, residual, *module.parameters()] for module in (fused, plain)]
        for a, b in zip(
            torch.autograd.grad(got, leaves[0], grad),
            torch.autograd.grad(right, leaves[1], grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert fused.state_dict().keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(fused.state_dict()[name], value)
    plain.load_state_dict(fused.state_dict())
    fused.load_state_dict(plain.state_dict())


@every_pair
def test_it_is_torch_s_own_layer_with_an_activation(ours, theirs):
    layer = ours(4, negative_slope=0.0)
    assert isinstance(layer, theirs) and layer.extra_repr().endswith("negative_slope=0.0")
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(layer(x), theirs(4)(x).relu())
    torch.testing.assert_close(ours(4)(x), theirs(4)(x))


@every_pair
def test_statistics_that_are_no_longer_tracked(ours, theirs):
    fused, plain = (layer(4, track_running_stats=True) for layer in (ours, theirs))
    fused.track_running_stats = plain.track_running_stats = False
    for training in (True, False):
        x = torch.randn(3, 4, 5, 6)
        torch.testing.assert_close(fused.train(training)(x), plain.train(training)(x))
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(fused.state_dict()[name], value)


def test_one_image_without_a_batch():
    x, residual = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    torch.testing.assert_close(
        InstanceNormAct2d(4, negative_slope=0.0)(x, residual), (nn.InstanceNorm2d(4)(x) + residual).relu()
    )


def test_a_symbolic_trace_counts_batches_when_it_runs():
    layer = BatchNormAct2d(4, momentum=None)
    traced = torch.fx.symbolic_trace(layer)
    assert layer.num_batches_tracked == 0
    plain = nn.BatchNorm2d(4, momentum=None)
    for _ in range(3):
        x = torch.randn(2, 4, 5, 6)
        torch.testing.assert_close(traced(x), plain(x))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(traced.state_dict()[name], value)


def test_compiled_it_trains_its_statistics():
    layer, plain = BatchNormAct2d(4, negative_slope=0.0), nn.BatchNorm2d(4)
    torch._dynamo.reset()
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(2, 4, 5, 6, requires_grad=True)
        got, right = fast(x), plain(x).relu()
        torch.testing.assert_close(got, right)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, right)), rtol=1e-4, atol=1e-5
        )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
