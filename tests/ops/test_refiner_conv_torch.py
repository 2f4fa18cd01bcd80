"""The convolutions in torch's machinery: derivatives, compilers, transforms, autocast."""

import pytest
import torch
import torch.nn.functional as F

import fastda
from fastda.nn import Refiner, RefinerBlock
from fastda.ops.refiner_conv import checked_refiner_block
from tests.common import (
    check_compiled,
    check_gradients,
    check_opcheck,
    check_transforms,
)
from tests.ops.refiner_conv import CHANNELS_LAST, F32, LAYOUTS, block, conv, images_as


@pytest.mark.isa_independent
@pytest.mark.parametrize(
    "options",
    [
        {"relu": True, "residual": True},
        {"bias": None, "relu": False},
        {"relu": False, "negative_slope": 0.3, "residual": True},
    ],
    ids=str,
)
def test_conv_same_derivatives(options):
    check_gradients("conv_same", conv((2, 3, 2, 3, 4, 5), torch.float64, **options))


@pytest.mark.isa_independent
@pytest.mark.parametrize("recompute, slope", [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_refiner_block_derivatives(recompute, slope):
    def function(**arguments):
        return checked_refiner_block(**arguments, recompute=recompute, negative_slope=slope)

    check_gradients("refiner_block", block((2, 2, 3, 4, 3), torch.float64), function)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [5, 20])
def test_opcheck(c, dtype, memory_format):
    def image(channels=c):
        return torch.randn(2, channels, 7, 9).to(dtype, memory_format=memory_format)

    w1, w2 = (torch.randn(c, c, 3, 3).to(dtype) for _ in range(2))
    b1, b2 = (torch.randn(c).to(dtype) for _ in range(2))
    check_opcheck("conv_same", image(), w1, b1, image(), True)
    check_opcheck("conv_same", image(), w1, None, None, False)
    check_opcheck("conv_same", image(), w1, b1, image(), True, False, 0.1)
    check_opcheck("conv_same_backward", image(), image(), w1, image(), True, True, True)
    check_opcheck("conv_same_backward", image(), image(), w1, None, False, True, False)
    check_opcheck("conv_same_backward", image(), image(), w1, image(), True, True, True, False, 0.1)
    check_opcheck("refiner_block", image(), w1, b1, w2, b2, True)
    check_opcheck("refiner_block", image(), w1, None, w2, None, False)
    check_opcheck("refiner_block_backward", image(), image(), image(), image(), w1, b1, w2, *[True] * 5)
    check_opcheck(
        "refiner_block_backward", image(), image(), None, image(), w1, b1, w2, True, False, True, False, False
    )


@pytest.mark.isa_independent
def test_compile():
    # The graph is the same whatever generates the code around the operators; the whole refiner has inductor.
    check_compiled("conv_same", conv((2, 20, 24, 3, 9, 11), residual=True), backend="aot_eager")
    leaky = conv((2, 20, 24, 3, 9, 11), residual=True, relu=False, negative_slope=0.1)
    check_compiled("conv_same", leaky, backend="aot_eager")
    check_compiled("refiner_block", block((2, 20, 3, 9, 11)), backend="aot_eager")
    channels_last = images_as(block((2, 20, 3, 9, 11)), LAYOUTS["channels_last"])
    check_compiled("refiner_block", channels_last, backend="aot_eager")


@pytest.mark.isa_independent
def test_compile_of_a_whole_refiner():
    refiner, x = Refiner(blocks=1, channels=16), torch.randn(2, 1, 13, 11)
    parameters = dict(refiner.named_parameters())

    def function(x, **parameters):
        return torch.func.functional_call(refiner, parameters, (x,))

    check_compiled("refiner_block", {"x": x, **parameters}, function)


@pytest.mark.isa_independent
def test_dynamic_shapes_compile():
    function = torch.compile(fastda.refiner_block, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, h, w in ((1, 9, 7), (3, 8, 15)):
        arguments = {k: v.detach() for k, v in block((n, 20, 3, h, w)).items()}
        torch.testing.assert_close(function(**arguments), fastda.refiner_block(**arguments))


@pytest.mark.isa_independent
def test_transforms():
    check_transforms("conv_same", conv((1, 2, 3, 3, 3, 4), torch.float64, residual=True))
    check_transforms("refiner_block", block((1, 2, 3, 3, 3), torch.float64))
    check_transforms("refiner_block", {**block((1, 2, 3, 3, 3), torch.float64), "negative_slope": 0.3})


@pytest.mark.isa_independent
def test_export():
    module, x = RefinerBlock(8), torch.randn(2, 8, 9, 7)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.isa_independent
def test_autocast_casts_as_conv2d_does():
    x, weight = torch.randn(2, 20, 9, 7), torch.randn(20, 20, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastda.conv_same(x, weight, relu=True)
        assert y.dtype == F.conv2d(x, weight, padding=1).dtype == torch.bfloat16
        assert fastda.refiner_block(x, weight, None, weight, None).dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_second_gradients_of_a_dilated_convolution_are_laid_out_as_torchs():
    """PyTorch's second gradients of instance norm are wrong for others."""
    x, weight = torch.randn(1, 3, 7, 5, dtype=torch.float64), torch.randn(3, 3, 3, 3, dtype=torch.float64)
    found = []
    for convolve in (fastda.conv2d, F.conv2d):
        leaf = x.clone().requires_grad_()
        y = torch.tanh(F.instance_norm(convolve(leaf, weight, padding=2, dilation=2)))
        (grad,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        found += torch.autograd.grad(grad.square().sum(), leaf)
    torch.testing.assert_close(*found)
