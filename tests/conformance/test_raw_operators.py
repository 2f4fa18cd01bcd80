"""The raw operators of gradient reversal and the convolutions, and what all of them promise."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastda import reference
from tests import lanes
from tests.conformance.cases import every_dtype
from tests.conformance.raw import (
    LAST,
    block_case,
    check_block,
    check_conv,
    conv_case,
    layouts,
    matches,
    strided,
)

pytestmark = pytest.mark.lanes(*lanes.KERNELS)


@every_dtype
@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (4, 0), (1, 1), (37, 53), (129, 16), (3, 5, 7, 2)])
def test_grad_reverse(lane, shape, dtype):
    ops = lane.ops
    grad = torch.randn(shape).to(dtype)
    grads = [grad, grad.t().contiguous().t(), strided(grad)] if grad.dim() == 2 else [grad]
    grads += list(layouts(grad).values()) if grad.dim() == 4 else []
    for seed, g in enumerate(grads):
        lane.shuffle(seed)
        scales = [torch.tensor(0.7), torch.tensor(-0.3, dtype=torch.float64), torch.tensor(2.0).to(dtype)]
        scales += [torch.randn(shape[0], 2)[:, 0]] if shape else []
        for scale in scales:
            out = ops.grad_reverse_backward(g, scale)
            factor = scale.double().view(-1, *(1 for _ in shape[1:])) if scale.dim() else scale.double()
            assert out.dtype == dtype and out.stride() == torch.empty_like(g).stride()
            matches("grad_reverse", "grad", out, -factor * g.double(), dtype)


# (n, c, k, filter, h, w)
CONVOLUTIONS = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 1, 7, 9), (1, 7, 4, 5, 3, 2), (2, 17, 33, 3, 6, 11)]
# (n, c, channels within, filter, second filter, h, w)
BLOCKS = [(1, 1, 2, 3, 3, 1, 1), (2, 5, 3, 3, 1, 7, 9), (1, 16, 16, 3, 3, 9, 13)]


@every_dtype
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
def test_conv_same(lane, sizes, dtype):
    ops = lane.ops
    x, weight, bias, residual, grad = conv_case(*sizes, dtype)
    last = [t.contiguous(memory_format=LAST) for t in (x, weight, residual)]
    turned = weight.transpose(2, 3).contiguous().transpose(2, 3)
    check_conv(ops, x, weight, bias, residual, grad)
    check_conv(ops, last[0], last[1], bias, last[2], grad)
    check_conv(ops, strided(x), turned, bias, last[2], strided(grad))


@every_dtype
@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_refiner_block(lane, sizes, dtype):
    for memory_format in (torch.contiguous_format, LAST):
        check_block(lane.ops, *block_case(*sizes, dtype, memory_format))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [3, 64])
def test_conv_nan_passes_the_gates(lane, c, dtype):
    ops = lane.ops
    x, weight, bias, _, grad = conv_case(1, c, c, 3, 5, 6, dtype, LAST)
    x[0, 1, 2, 3] = float("nan")
    y = ops.conv_same(x, weight, bias, None, True)
    assert torch.equal(
        y.isnan(), reference.conv_same(x.double(), weight.double(), bias.double(), relu=True).isnan()
    )
    out = ops.conv_same_backward(grad, x, weight, y, True, True, True)
    gated = torch.where(y <= 0, 0, grad)
    matches("conv_same", "bias", out[2], gated.double().sum((0, 2, 3)), dtype)
    exact = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.conv_same(x.double(), exact), exact, gated.double())
    assert torch.equal(out[1].isnan(), expected.isnan())


def test_conv_of_empty_images(lane):
    ops = lane.ops
    for c, k in ((3, 4), (64, 64)):
        weight = torch.randn(k, c, 3, 3)
        for shape in ((0, c, 5, 6), (2, c, 0, 6)):
            x, grad = torch.randn(shape), torch.randn(shape[0], k, *shape[2:])
            y = ops.conv_same(x, weight, None, None, True)
            assert y.shape == grad.shape
            d_x, d_weight, d_bias = ops.conv_same_backward(grad, x, weight, y, True, True, True)
            assert d_x.shape == x.shape and not d_weight.any() and not d_bias.any()
            assert d_weight.shape == weight.shape and d_bias.shape == (k,)


def test_what_is_not_needed_is_empty(lane):
    ops = lane.ops
    logits, features = torch.randn(2, 2, 3, 4), torch.randn(2, 5, 3, 4)
    out = ops.patch_discriminator_loss(logits, logits, None, None, "softmax", "mean", 0.0, False, True)
    assert out[3].numel() == 0 and out[4].shape == logits.shape
    out = ops.patch_head_discriminator_loss(
        features, features, torch.randn(2, 5, 1, 1), None, "softmax", "mean", 0.0, False, True, False
    )
    assert [t.numel() for t in out[3:]] == [0, features.numel(), 0, 0]
    for c in (3, 64):
        x, filters = torch.randn(2, c, 4, 5), torch.randn(c, c, 3, 3)
        out = ops.conv_same_backward(x, x, filters, x, False, False, True)
        assert [t.numel() for t in out] == [0, 0, c]
        out = ops.refiner_block_backward(x, x, x, x, filters, None, filters, False, False, False, True, False)
        assert [t.numel() for t in out] == [0, 0, 0, filters.numel(), 0]


def test_operators_are_what_they_declare(lane):
    ops = lane.ops
    x, weight, _, _, grad = conv_case(2, 3, 3, 3, 5, 7, torch.float32)
    logits, features = torch.randn(2, 2, 3, 4), torch.randn(2, 3, 3, 4)
    for name, arguments in {
        "grad_reverse_backward": (x, torch.rand(2)),
        "patch_discriminator_loss": (logits, logits.clone(), None, None, "softmax", "mean", 0.1, True, False),
        "patch_generator_loss": (logits, None, "softmax", "mean", True),
        "patch_loss_map": (logits, None, "softmax", True, 0.0, True),
        "self_regularization": (x, grad, None, 0.5, "mean", True, False),
        "refiner_loss": (logits, x, grad, torch.tensor(0.5), 0.0, "softmax", "mean", True, True, False),
        "patch_head_discriminator_loss": (
            *(features, features.clone(), torch.randn(2, 3, 1, 1), torch.randn(2), "softmax", "mean", 0.0),
            *(True, True, True),
        ),
        "patch_loss_scale_": (x.clone(), logits.clone(), torch.tensor(2.0)),
        "relu_max_pool": (x, [3, 2], [2, 1], [1, 0], True, True, True),
        "relu_max_pool_backward": (
            grad,
            torch.zeros_like(x).byte(),
            [10, 14],
            True,
            *([2, 2] for _ in "ks"),
            [0, 0],
        ),
        "norm_act": (x, x[0, :, 0, 0], None, None, None, grad, True, 1e-5, 0.1),
        "norm_act_backward": (
            *(grad, x, None, None, *torch.rand(2, 3).double(), x.clone(), False, True, 1e-5, 0.1),
            *[True] * 4,
        ),
        "conv_same": (x, weight, None, grad, True),
        "conv_same_backward": (grad, x, weight, None, True, True, False),
        "refiner_block": (x, weight, None, weight.clone(), None, True),
        "refiner_block_backward": (grad, x, None, x.clone(), weight, None, weight.clone(), *[True] * 5),
    }.items():
        if lane.backend != "triton":  # tests/triton checks those
            torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=("test_schema",))
        # Sizes, dtypes and strides are those of the shape functions of torch.ops.fastda. What serves a device
        # lays a block's inner activation out in another way than what serves the CPU.
        if lane.backend == "cpp":
            with FakeTensorMode() as mode:
                placed = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
                fake = getattr(torch.ops.fastda, name)(*placed)
        else:
            placed = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = getattr(torch.ops.fastda, name)(*placed)
        real = getattr(ops, name)(*arguments)
        for f, r in zip(
            *((o,) if isinstance(o, torch.Tensor) else o or () for o in (fake, real)), strict=True
        ):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()), name
