"""Gradient reversal: one clear error for every argument that does not fit."""

import pytest
import torch
from torch import nn

from fastda import grad_reverse, grad_reverse_linear
from tests.common import (
    both_routes,
    check_error,
)
from tests.ops.grad_reverse import independent

X, W, B = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3), torch.randn(2)

ERRORS = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    (
        {"x": torch.ones(4, 3, dtype=torch.int64)},
        TypeError,
        "x must have a floating-point dtype, got torch.int64",
    ),
    (
        {"x": torch.ones(4, 3, dtype=torch.complex64, requires_grad=True)},
        TypeError,
        "x must have a floating-point dtype, got torch.complex64",
    ),
    (
        {"x": torch.eye(3).to_sparse().requires_grad_()},
        TypeError,
        "x must be a strided tensor, got layout torch.sparse_coo",
    ),
    (
        {"x": torch.eye(3).to_sparse_csr().requires_grad_()},
        TypeError,
        "x must be a strided tensor, got layout torch.sparse_csr",
    ),
    ({"scale": "1"}, TypeError, "scale must be a float or a tensor, got str"),
    ({"scale": None}, TypeError, "scale must be a float or a tensor, got NoneType"),
    ({"scale": 1j}, TypeError, "scale must be a float or a tensor, got complex"),
    (
        {"scale": torch.tensor(1)},
        TypeError,
        "scale must be a float or a floating-point tensor, got torch.int64",
    ),
    (
        {"scale": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        "scale is a constant and must not require grad; pass scale.detach() if that is meant",
    ),
    (
        {"scale": nn.Parameter(torch.ones(4))},
        ValueError,
        "scale is a constant and must not require grad; pass scale.detach() if that is meant",
    ),
    (
        {"scale": torch.ones(4, 1)},
        ValueError,
        "scale must be a float, a 0-dim tensor or a 1-D tensor, got shape (4, 1)",
    ),
    (
        {"scale": torch.ones(3)},
        ValueError,
        "a 1-D scale needs one value per entry of x's dim 0, got (3,) for x of shape (4, 3)",
    ),
    (
        {"scale": torch.ones(4, device="meta")},
        ValueError,
        "a 1-D scale must be on x's device cpu, got meta",
    ),
]

LINEAR_ERRORS = [
    ({"x": torch.tensor(1.0)}, ValueError, "x must be (..., in_features), got a 0-dim tensor"),
    (
        {"weight": torch.randn(2, 4)},
        ValueError,
        "weight must be (out_features, 3) for x of shape (4, 3), got (2, 4)",
    ),
    (
        {"weight": torch.randn(3)},
        ValueError,
        "weight must be (out_features, 3) for x of shape (4, 3), got (3,)",
    ),
    ({"weight": W.double()}, TypeError, "weight must have x's dtype torch.float32, got torch.float64"),
    ({"weight": W.to("meta")}, ValueError, "weight must be on x's device cpu, got meta"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    ({"bias": torch.randn(3)}, ValueError, "bias must be (2,), got (3,)"),
    ({"bias": torch.randn(2, 1)}, ValueError, "bias must be (2,), got (2, 1)"),
    ({"bias": B.half()}, TypeError, "bias must have x's dtype torch.float32, got torch.float16"),
    ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
]


@independent
@both_routes
@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors(wrong, error, message):
    check_error(grad_reverse, {"x": X, "scale": 1.0} | wrong, error, f"grad_reverse: {message}")
    arguments = {"x": X, "weight": W, "bias": B, "scale": 1.0} | wrong
    check_error(grad_reverse_linear, arguments, error, f"grad_reverse_linear: {message}")


@independent
@both_routes
@pytest.mark.parametrize(("wrong", "error", "message"), LINEAR_ERRORS)
def test_errors_of_linear(wrong, error, message):
    arguments = {"x": X, "weight": W, "bias": B, "scale": 1.0} | wrong
    check_error(grad_reverse_linear, arguments, error, f"grad_reverse_linear: {message}")


@independent
@both_routes
def test_a_scalar_has_no_samples():
    message = "grad_reverse: a 1-D scale needs one value per entry of x's dim 0, got (1,) for x of shape ()"
    for x in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        check_error(grad_reverse, {"x": x, "scale": torch.ones(1)}, ValueError, message)
