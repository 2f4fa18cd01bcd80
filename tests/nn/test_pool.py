"""The module of ReLU with max-pooling."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastda.nn import ReLUMaxPool2d

pytestmark = pytest.mark.isa_independent


def test_is_a_max_pool_without_parameters():
    pool = ReLUMaxPool2d(3, stride=2, padding=1, ceil_mode=True)
    assert isinstance(pool, nn.MaxPool2d) and not pool.state_dict()
    assert repr(pool) == "ReLUMaxPool2d(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=True)"
    x = torch.randn(2, 4, 11, 8)
    expected = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True))(x)
    for module in (pool, copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert torch.equal(module(x), expected)


def test_arguments_stand_where_torch_has_them():
    x, arguments = torch.randn(2, 4, 12, 10), (3, 2, 1, 2, False, True)
    assert torch.equal(ReLUMaxPool2d(*arguments)(x), nn.MaxPool2d(*arguments)(x).relu())


def test_indices_are_refused():
    with pytest.raises(ValueError, match="return_indices must be False"):
        ReLUMaxPool2d(2, return_indices=True)
