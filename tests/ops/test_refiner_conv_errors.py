"""The convolutions: one clear error for every argument that does not fit."""

import pytest
import torch

import fastda
from tests.common import (
    check_error,
)
from tests.ops.refiner_conv import B, W, X

W1, W2 = torch.randn(5, 3, 3, 3), torch.randn(3, 5, 3, 3)

CONV_ERRORS = [
    ({"x": X[0]}, ValueError, "x must be (N, C, H, W), got (3, 7, 9)"),
    ({"weight": W[0]}, ValueError, "weight must be (K, C, k, k) with odd k, got (3, 3, 3)"),
    ({"weight": W[..., :2]}, ValueError, "weight must be (K, C, k, k) with odd k, got (4, 3, 3, 2)"),
    ({"weight": W[..., :2, :2]}, ValueError, "weight must be (K, C, k, k) with odd k, got (4, 3, 2, 2)"),
    ({"weight": W[:, :2]}, ValueError, "weight must take the 3 channels of x, got 2 ((4, 2, 3, 3))"),
    ({"bias": B[:3]}, ValueError, "bias must be (4,), got (3,)"),
    ({"bias": B[None]}, ValueError, "bias must be (4,), got (1, 4)"),
    ({"residual": X}, ValueError, "residual must be (2, 4, 7, 9), got (2, 3, 7, 9)"),
    (
        {"x": X.to(torch.int32)},
        TypeError,
        "x must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
    (
        {"x": X.to(torch.complex64)},
        TypeError,
        "x must be float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    (
        {"weight": W.double()},
        TypeError,
        "weight must have the dtype of x, torch.float32, got torch.float64",
    ),
    ({"bias": B.double()}, TypeError, "bias must have the dtype of x, torch.float32, got torch.float64"),
    (
        {"weight": W.to("meta")},
        ValueError,
        "weight must be on the device of x, cpu, got meta",
    ),
    *(
        (
            {"negative_slope": slope},
            ValueError,
            f"negative_slope must be None or a number of 0 or more, got {slope}",
        )
        for slope in (-0.1, float("nan"), True, torch.ones(2))
    ),
    (
        {"relu": True, "negative_slope": 0.1},
        ValueError,
        "relu and negative_slope=0.1 both name the activation; give one",
    ),
]

BLOCK_ERRORS = [
    ({"x": X[0]}, ValueError, "x must be (N, C, H, W), got (3, 7, 9)"),
    ({"weight1": W1[:, :2]}, ValueError, "weight1 must take the 3 channels of x, got 2 ((5, 2, 3, 3))"),
    ({"weight2": W2[:2]}, ValueError, "weight2 must be (3, 5, k, k) with odd k, got (2, 5, 3, 3)"),
    ({"weight2": W2[..., :2]}, ValueError, "weight2 must be (3, 5, k, k) with odd k, got (3, 5, 3, 2)"),
    ({"bias1": B}, ValueError, "bias1 must be (5,), got (4,)"),
    ({"bias2": B}, ValueError, "bias2 must be (3,), got (4,)"),
    (
        {"weight2": W2.double()},
        TypeError,
        "weight2 must have the dtype of x, torch.float32, got torch.float64",
    ),
    *(
        ({"negative_slope": slope}, ValueError, f"negative_slope must be a number of 0 or more, got {slope}")
        for slope in (-0.1, None)
    ),
]


@pytest.mark.isa_independent
@pytest.mark.parametrize("change, kind, message", CONV_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_conv_same_errors(change, kind, message):
    arguments = {"x": X, "weight": W, "bias": B, "residual": torch.randn(2, 4, 7, 9), **change}
    check_error(fastda.conv_same, arguments, kind, f"conv_same: {message}")


@pytest.mark.isa_independent
@pytest.mark.parametrize("change, kind, message", BLOCK_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_refiner_block_errors(change, kind, message):
    arguments = {"x": X, "weight1": W1, "bias1": B.new_zeros(5), "weight2": W2, "bias2": B[:3], **change}
    check_error(fastda.refiner_block, arguments, kind, f"refiner_block: {message}")


@pytest.mark.isa_independent
def test_raw_operators_refuse_what_does_not_fit():
    """They are reachable past the Python checks, and must not touch memory that is not theirs."""
    ops = torch.ops.fastda
    calls = [
        lambda: ops.conv_same(X, W[:, :2], None, None, False),
        lambda: ops.conv_same(X, W, B[:3], None, False),
        lambda: ops.conv_same(X, W, None, X, False),
        lambda: ops.conv_same(X, W, None, None, True, False, -0.1),
        lambda: ops.conv_same_backward(X, X, W, None, True, True, True),
        lambda: ops.refiner_block(X, W1, None, W2[:2], None, False),
        lambda: ops.refiner_block(X, W1, None, W2, None, False, False, float("nan")),
        lambda: ops.refiner_block_backward(X, X, X, X, W1, None, W2, *[True] * 5),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"must|does not fit"):
            call()
