"""The refiner's modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastda.nn import Refiner, RefinerBlock
from fastda.testing import error
from tests.ops.refiner_conv import CHANNELS_LAST, X


class PlainRefiner(nn.Module):
    """`fastda.nn.Refiner` written with torch.nn alone."""

    def __init__(self, fused):
        super().__init__()
        self.first, self.blocks, self.last = (
            copy.deepcopy(m) for m in (fused.first, fused.blocks, fused.last)
        )

        self.slope = fused.negative_slope
        for block in self.blocks:
            block.norm1, block.norm2 = plain_norm(block.norm1), plain_norm(block.norm2)

    def forward(self, x):
        def act(x):
            return F.leaky_relu(x, self.slope) if self.slope else F.relu(x)

        h = act(self.first(x))
        for b in self.blocks:
            h = act(h + b.norm2(b.conv2(act(b.norm1(b.conv1(h))))))
        return self.last(h)


def plain_norm(fused):
    if fused is None:
        return nn.Identity()
    (make,) = (layer for layer in (nn.BatchNorm2d, nn.InstanceNorm2d) if isinstance(fused, layer))
    norm = make(fused.num_features, affine=True)
    norm.load_state_dict(fused.state_dict())
    return norm


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize(
    "in_channels, kernel, options",
    [
        (1, 3, {}),
        (3, 3, {}),
        (1, 7, {}),
        (1, 3, {"negative_slope": 0.2}),
        (1, 3, {"norm": "batch"}),
        (1, 3, {"norm": "batch", "negative_slope": 0.01}),
        (3, 7, {"norm": "instance", "negative_slope": 0.2}),
    ],
    ids=str,
)
def test_refiner_module(in_channels, kernel, options, memory_format):
    fused = Refiner(in_channels, 16, blocks=2, kernel_size=kernel, **options)
    for name, p in fused.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    plain = PlainRefiner(fused).double()
    x = torch.randn(2, in_channels, 13, 11).contiguous(memory_format=memory_format)
    y, right = fused(x), plain(x.double())
    assert y.is_contiguous(memory_format=memory_format)
    assert error(y, right).relative_l2 < 2e-6
    y.square().mean().backward()
    right.square().mean().backward()
    expected = dict(plain.named_parameters())
    for name, p in fused.named_parameters():
        # Loose: gates near zero may differ between float32 and float64; kernels are judged above.
        assert error(p.grad, expected[name].grad).relative_l2 < 1e-3, name
    # The statistics that training left, in evaluation and in the state.
    for name, b in fused.named_buffers():
        assert error(b.double(), dict(plain.named_buffers())[name].double()).relative_l2 < 2e-6, name
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert error(fused.eval()(x), plain.eval()(x.double())).relative_l2 < 4e-6


@pytest.mark.isa_independent
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_a_block_with_a_norm(norm, training):
    block = RefinerBlock(2, norm=norm, negative_slope=0.3).double().train(training)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(block.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(call, (x, *parameters.values()))


@pytest.mark.isa_independent
def test_module_sizes_and_state():
    assert sum(p.numel() for p in Refiner.gaze().parameters()) == 296_129
    assert sum(p.numel() for p in Refiner.hand().parameters()) == 4_018_625
    fused = RefinerBlock(4, recompute_inner=True)
    assert set(fused.state_dict()) == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
    assert "recompute_inner=True" in repr(fused)
    normed = RefinerBlock(4, norm="batch", negative_slope=0.1)
    norm = [f"norm{i}.{name}" for i in (1, 2) for name in nn.BatchNorm2d(4).state_dict()]
    assert set(normed.state_dict()) == {"conv1.weight", "conv2.weight", *norm}
    assert repr(normed).startswith("RefinerBlock(\n  negative_slope=0.1\n")
    assert isinstance(Refiner.gaze(norm="instance").blocks[0].norm2, nn.InstanceNorm2d)
    for module in (RefinerBlock, Refiner):
        for options, message in (
            ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
            ({"norm": "layer"}, "norm must be 'batch', 'instance' or None, got 'layer'"),
            ({"negative_slope": -0.1}, "negative_slope must be a number of 0 or more, got -0.1"),
            ({"norm": "batch", "recompute_inner": True}, "recompute_inner is for blocks without a norm"),
        ):
            with pytest.raises(ValueError, match=f"{module.__name__}: {message}"):
                module(**options)
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\), got \(3, 7, 9\)"):
        Refiner()(X[0])
