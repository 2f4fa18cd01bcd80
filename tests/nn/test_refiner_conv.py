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

    def forward(self, x):
        h = F.relu(self.first(x))
        for b in self.blocks:
            h = F.relu(h + b.conv2(F.relu(b.conv1(h))))
        return self.last(h)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("in_channels, kernel", [(1, 3), (3, 3), (1, 7)])
def test_refiner_module(in_channels, kernel, memory_format):
    fused = Refiner(in_channels, 16, blocks=2, kernel_size=kernel)
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


@pytest.mark.isa_independent
def test_module_sizes_and_state():
    assert sum(p.numel() for p in Refiner.gaze().parameters()) == 296_129
    assert sum(p.numel() for p in Refiner.hand().parameters()) == 4_018_625
    fused = RefinerBlock(4, recompute_inner=True)
    assert set(fused.state_dict()) == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
    assert "recompute_inner=True" in repr(fused)
    for module in (RefinerBlock, Refiner):
        with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
            module(kernel_size=4)
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\), got \(3, 7, 9\)"):
        Refiner()(X[0])
