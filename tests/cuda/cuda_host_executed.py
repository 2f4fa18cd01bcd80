"""The CUDA device code and its host side on the CPU (tests/cuda_host), against the float64 reference.

tests/cuda/test_cuda_host.py builds the module and runs this file in processes of its own: AddressSanitizer
must be loaded first. By hand:

    eval "$(python tests/cuda_host/build.py)" && python -m pytest tests/cuda/cuda_host_executed.py
"""

import contextlib
import functools
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_host
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastda import _torch, backend, reference, testing, verify
from tests.conformance import edges

OPERATORS = (
    *("grad_reverse_backward", "conv_same", "conv_same_backward", "refiner_block", "refiner_block_backward"),
    *("patch_discriminator_loss", "patch_generator_loss", "patch_loss_map", "patch_loss_scale_"),
    *("patch_head_discriminator_loss", "self_regularization", "refiner_loss"),
)
library = torch.library.Library("fastda_cuda_host", "DEF")
for name in OPERATORS:
    library.define(str(getattr(torch.ops.fastda, name).default._schema).removeprefix("fastda::"))
ops = torch.ops.fastda_cuda_host
# What runs in the place of the kernels that g++ compiled: nvcc's PTX of the same sources.
PTX = os.environ.get("FASTDA_TEST_PTX", "")
if PTX:
    cuda_host.load_ptx(Path(PTX).read_text())

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS, REDUCTIONS = ("softmax", "bce", "lsgan", "hinge", "wgan"), ("mean", "sum", "batchmean")
LAST = torch.channels_last
SEEDS = range(5)
A100, H100 = 163 << 10, 227 << 10  # shared memory of a block, bytes
# TF32 keeps 10 bits of the factors' mantissas: each product is off by 2^-11 of itself, on average less.
TF32 = testing.Tolerance(5e-4, 5e-3)


@pytest.fixture(autouse=True)
def device():
    cuda_host.set_seed(0)
    cuda_host.set_device(3, H100)
    cuda_host.plant("")
    cuda_host.skip_barrier("", 0)
    cuda_host.forget()
    cuda_host.ptx_forget()
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture
def serving(monkeypatch):
    """The public functions, with `cuda` serving CPU tensors."""
    why_not, kernels = backend.why_not, backend.kernels
    monkeypatch.setattr(backend, "why_not", lambda b, d: None if b == "cuda" else why_not(b, d))
    monkeypatch.setattr(backend, "kernels", lambda b: ops if b == "cuda" else kernels(b))
    # The C++ node leaves the choice of kernels to the tensors' device, which is the CPU.
    monkeypatch.setattr(importlib.import_module("fastda.ops.patch_loss"), "_node", None)


def launched():
    return {name for name, *_ in cuda_host.launches()}


def strided(x):
    """The values of x with gaps between rows, columns and images."""
    return F.pad(x, (1, 2, 1, 0))[..., 1:, 1:-2] if x.dim() > 1 else F.pad(x, (0, 1))[:-1]


def layouts(x):
    return {"contiguous": x, "channels_last": x.contiguous(memory_format=LAST), "strided": strided(x)}


def matches(op, what, actual, expected, dtype, tf32=False, terms=0.0):
    """`terms`: the size of what is summed, where terms may cancel."""
    error, bound = (
        testing.error(actual, expected, terms),
        TF32 if tf32 else testing.tolerance(op, what, dtype),
    )
    assert error.within(bound), (op, what, error, bound)


# -- the executor itself -------------------------------------------------------------------------------------

# Where an entry of a fragment lies in its matrix, stored column by column, as CUTLASS has it
# (mma_traits_sm80.hpp): ((sizes of the lane), (sizes of the register)) : ((strides), (strides)).
LAYOUTS = {
    16: {
        "a": (((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
        "b": (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    },
    8: {"a": (((4, 8), (2, 2)), ((16, 1), (8, 64))), "b": (((4, 8), (2,)), ((8, 1), (32,)))},
}
SUMS = (((4, 8), (2, 2)), ((32, 1), (16, 8)))


def fragments(matrix, layout):
    """[lane, register] of a matrix given as [row, column]."""
    (lane_sizes, sizes), (lane_strides, strides) = layout
    flat = matrix.T.reshape(-1)  # column by column
    places = np.zeros((32, int(np.prod(sizes))), dtype=int)
    for shape, steps, axis in ((lane_sizes, lane_strides, 0), (sizes, strides, 1)):
        index = np.arange(places.shape[axis])
        offset = np.zeros_like(index)
        for size, stride in zip(shape, steps, strict=True):
            offset += index % size * stride
            index = index // size
        places += offset[:, None] if axis == 0 else offset[None, :]
    return flat[places]


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_executor_multiplies_as_the_instruction_does(kind):
    depth = 8 if kind == "tf32" else 16
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    a, b = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype)
    words = []
    for x, name in ((a, "a"), (b, "b")):
        bits = x.view(torch.int32 if kind == "tf32" else torch.int16).numpy()
        bits = fragments(bits, LAYOUTS[depth][name])
        words.append(np.ascontiguousarray(bits).view(np.uint32))
    d = torch.randn(16, 8).numpy()
    out = cuda_host.mma(("bf16", "f16", "tf32").index(kind), *words, fragments(d, SUMS))
    expected = d + (a.double() @ b.double().T).numpy()
    assert np.allclose(out, fragments(expected, SUMS), atol=2e-2 if kind == "tf32" else 1e-5)
    assert (out == fragments(expected, SUMS)).mean() < 0.9 or kind != "tf32"  # the low bits are not looked at


@pytest.mark.parametrize("transposed", [False, True])
def test_executor_loads_matrices_as_the_instruction_does(transposed):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = cuda_host.load_matrices(matrices.reshape(-1).view(np.uint32), transposed)
    for m, lane in itertools.product(range(4), range(32)):
        matrix = matrices[m].T if transposed else matrices[m]
        assert tuple(out[lane, m : m + 1].view(np.uint16)) == tuple(matrix[lane // 4, lane % 4 * 2 :][:2])


def test_executor_runs_threads_in_many_orders_and_sums_the_same():
    values = np.random.default_rng(0).standard_normal(640).astype(np.float32)
    sums = [cuda_host.sum(values, 0) for seed in range(12) if cuda_host.set_seed(seed) is None]
    assert all((s == sums[0]).all() for s in sums)
    assert np.allclose(sums[0], values.reshape(5, 128).sum(1), atol=1e-4)


def test_executor_votes_and_shuffles():
    values = np.arange(-32, 32, dtype=np.int32)
    out = cuda_host.vote(values)
    for t, (value, warp) in enumerate(zip(values, np.repeat(values.reshape(2, 32)[:, :1], 32), strict=True)):
        down = value + 2 if t % 32 < 30 else value
        ballot = sum(1 << lane for lane in range(32) if warp + lane > 0)
        assert out[t] == (ballot + (warp + 31 > 5) + warp + 3 + down) % 2**32
    assert out[64] == 64


FAULTS = {
    1: "no thread can go on: .*ended.*__syncthreads",
    2: "__syncthreads at .* while others wait in one at",
    3: "the warp parts ways",
    7: "misaligned access of 16 bytes",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_executor_stops_at(fault, seed):
    cuda_host.set_seed(seed)
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        cuda_host.sum(np.zeros(640, np.float32), fault)
    assert not cuda_host.sum(np.zeros(640, np.float32), 0).any()


def test_executor_fills_shared_memory_with_nan():
    assert np.isnan(cuda_host.sum(np.zeros(640, np.float32), 4)).all()


@pytest.mark.parametrize("fault", [5, 6])
def test_executor_sees_accesses_out_of_bounds(fault):
    code = f"import torch, cuda_host, numpy; cuda_host.sum(numpy.zeros(640, numpy.float32), {fault})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_executor_refuses_what_a_device_would():
    for threads, shared, message in ((33, 0, "32, 64"), (2048, 0, "32, 64"), (32, H100 + 1, "shared memory")):
        with pytest.raises(RuntimeError, match=message):
            cuda_host.launch_bad(threads, shared)


# -- what most inputs do not show


@pytest.mark.parametrize("check", edges.EVERYWHERE, ids=lambda check: check.__name__)
def test_edge(check):
    check(ops)


# -- gradient reversal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (4, 0), (1, 1), (37, 53), (129, 16), (3, 5, 7, 2)])
def test_grad_reverse(shape, dtype):
    grad = torch.randn(shape).to(dtype)
    grads = [grad, grad.t().contiguous().t(), strided(grad)] if grad.dim() == 2 else [grad]
    grads += list(layouts(grad).values()) if grad.dim() == 4 else []
    for seed, g in enumerate(grads):
        cuda_host.set_seed(seed)
        scales = [torch.tensor(0.7), torch.tensor(-0.3, dtype=torch.float64), torch.tensor(2.0).to(dtype)]
        scales += [torch.randn(shape[0], 2)[:, 0]] if shape else []
        for scale in scales:
            out = ops.grad_reverse_backward(g, scale)
            factor = scale.double().view(-1, *(1 for _ in shape[1:])) if scale.dim() else scale.double()
            assert out.dtype == dtype and out.stride() == torch.empty_like(g).stride()
            matches("grad_reverse", "grad", out, -factor * g.double(), dtype)


def test_grad_reverse_of_misaligned_memory():
    for shift in range(1, 4):
        grad = torch.randn(4 * 64 + shift)[shift:].view(4, 64)
        for scale in (torch.tensor(0.5), torch.rand(4)):
            out = ops.grad_reverse_backward(grad, scale)
            assert torch.equal(out, -scale.view(-1, 1) * grad)


# -- every public operator, as fastda verify checks it -------------------------------------------------------


# A case of every option, the dtypes, layouts and sizes taking turns.
def verify_cases():
    for op in verify.OPERATORS:
        turns = zip(
            itertools.cycle(op.sizes), itertools.cycle(DTYPES), itertools.cycle(verify.LAYOUTS), strict=False
        )
        # Lengths with a common factor would always meet alike.
        turns = (turn for i, turn in enumerate(turns) if i % 7 != 3)
        for option in range(len(op.options)):
            for sizes, dtype, layout in itertools.islice(turns, 4):
                yield verify.Case(op, option, sizes, dtype, layout, "cuda", "cpu")


@pytest.mark.parametrize("op", [op.name for op in verify.OPERATORS])
def test_verify(op, serving):
    seed = 0
    for case in verify_cases():
        if case.operator.name != op or (
            case.layout == "channels_last"
            and not any(
                len(s) == 4
                for s in case.operator.tensors(case.operator.options[case.option], *case.sizes).values()
            )
        ):
            continue
        cuda_host.set_seed(seed := seed + 1)
        failed = [row for row in verify.check(case) if not row.passed]
        assert not failed, failed
    if op not in ("grad_reverse", "grad_reverse_linear"):
        assert launched(), "nothing of this ran through the device code"


# -- patch losses --------------------------------------------------------------------------------------------


def wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def discriminator_reference(real, fake, kind, **options):
    real, fake = real.double().requires_grad_(), fake.double().requires_grad_()
    loss, *accuracies = reference.patch_discriminator_loss(real, fake, kind, return_accuracy=True, **options)
    return (loss.detach(), *accuracies, *torch.autograd.grad(loss, (real, fake)))


def check_discriminator(
    real, fake, kind, reduction="mean", smoothing=0.0, real_weight=None, fake_weight=None
):
    def expanded(weight, logits):
        return (
            None if weight is None else weight.expand(logits.shape[0], 1, *logits.shape[2:]).to(wide(logits))
        )

    out = ops.patch_discriminator_loss(
        *(real, fake, expanded(real_weight, real), expanded(fake_weight, fake)),
        *(KINDS.index(kind), REDUCTIONS.index(reduction), smoothing, True, True),
    )
    options = dict(
        reduction=reduction, label_smoothing=smoothing, real_weight=real_weight, fake_weight=fake_weight
    )
    expected = discriminator_reference(real, fake, kind, **options)
    names = ("value", "value", "value", "real_logits", "fake_logits")
    for what, o, e in zip(names, out, expected, strict=True):
        matches("patch_discriminator_loss", what, o, e, wide(real))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_patch_discriminator_loss(kind, dtype):
    c = 2 if kind == "softmax" else 1
    sizes = itertools.cycle([(1, 2, 1, 1), (3, 2, 9, 14), (2, 3, 37, 53), (4, 3, 1, 3)])
    smoothings = (0.0, 0.1) if kind in ("softmax", "bce", "lsgan") else (0.0,)
    cases = itertools.product(smoothings, ("contiguous", "channels_last", "strided"), (False, True))
    for seed, (reduction, (smoothing, layout, weighted)) in enumerate(
        zip(itertools.cycle(REDUCTIONS), cases, strict=False)
    ):
        cuda_host.set_seed(seed)
        n, m, h, w = next(sizes)
        real, fake = torch.randn(n, c, h, w).to(dtype), torch.randn(m, c, h, w).to(dtype)
        weight = torch.rand(n, 1, h, 1) + 0.1
        weight[:, :, ::2] *= torch.rand(n, 1, 1, 1) > 0.5
        weight[0] = 0.5
        check_discriminator(
            layouts(real)[layout],
            layouts(fake)[layout],
            kind,
            reduction,
            smoothing,
            weight if weighted else None,
        )


def test_patch_losses_of_many_blocks_repeat_bit_for_bit():
    real, fake = torch.randn(3, 2, 61, 53), torch.randn(5, 2, 37, 53)
    runs = []
    for seed in SEEDS:
        cuda_host.set_seed(seed)
        runs.append(check_discriminator(real, fake, "softmax", real_weight=torch.ones(3, 1, 61, 53)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_patch_loss_of_extreme_logits(kind):
    c = 2 if kind == "softmax" else 1
    extremes = torch.tensor([1e4, -1e4, 88.0, -88.0, 30.0, 1e-6, 0.0, -0.0])
    logits = torch.randn(1, c, 2, 8)
    logits[:, 0, 0] = extremes
    logits[:, -1, 1] = extremes.flip(0)
    check_discriminator(logits, -logits, kind)
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits = torch.randn(1, c, 3, 5)
        logits[0, 0, 1, 2] = bad
        zeros = torch.zeros(1, c, 1, 1)
        loss, _, _, grad, _ = ops.patch_discriminator_loss(
            logits, zeros, None, None, KINDS.index(kind), 1, 0.0, True, True
        )
        expected, _, _, expected_grad, _ = discriminator_reference(logits, zeros, kind, reduction="sum")
        assert testing.error(loss, expected).nonfinite_equal, (bad, loss, expected)
        assert testing.error(grad, expected_grad).nonfinite_equal, (bad, grad, expected_grad)
        # A weight of zero takes the patch out, whatever it holds.
        weight = torch.ones(1, 1, 3, 5)
        weight[0, 0, 1, 2] = 0
        check_discriminator(logits, zeros, kind, real_weight=weight)


def test_patch_loss_of_nothing():
    for reduction, expected in enumerate((float("nan"), 0.0, float("nan"))):
        empty = torch.randn(0, 2, 9, 14)
        loss, accuracy, _, grad, _ = ops.patch_discriminator_loss(
            empty, torch.zeros(1, 2, 1, 1), None, None, 0, reduction, 0.0, True, False
        )
        assert grad.shape == empty.shape and accuracy.isnan()
        torch.testing.assert_close(loss, torch.tensor(expected) + torch.tensor(2.0).log(), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_l1(dtype):
    scale = 0.3
    for seed, shape in enumerate(((), (5,), (4099,), (3, 1, 35, 55), (2, 3, 9, 14))):
        cuda_host.set_seed(seed)
        a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        pairs = [(a, b)]
        if a.dim() == 4:
            last = [layouts(t)["channels_last"] for t in (a, b)]
            pairs += [(a, last[1]), tuple(last), (strided(a), b)]
        if a.dim() == 1:
            pairs += [(a[1:], b[:-1])]
        for (x, y), (r, reduction) in itertools.product(pairs, enumerate(REDUCTIONS)):
            exact = [t.double().requires_grad_() for t in (x, y)]
            tensor = torch.tensor(scale, dtype=torch.float64) if r else None
            expected = reference.self_regularization(
                *(t[None] if not shape else t for t in exact), scale, reduction=reduction
            )
            grads = torch.autograd.grad(expected, exact)
            out = ops.self_regularization(x, y, tensor, 99.0 if r else scale, r, True, True)
            for what, o, e in zip(("value", "grad", "grad"), out, (expected, *grads), strict=True):
                matches("self_regularization", what, o, e, wide(x))


def test_patch_refiner_loss_of_two_dtypes():
    fake, a, b = (
        torch.randn(3, 2, 4, 5),
        torch.randn(3, 1, 9, 14).bfloat16(),
        torch.randn(3, 1, 9, 14).bfloat16(),
    )
    for logits in (fake, fake.double()):
        exact = [t.double().requires_grad_() for t in (logits, a, b)]
        expected = reference.refiner_loss(*exact, 0.3, "softmax")
        out = ops.refiner_loss(logits, a, b, None, 0.3, 0, 0, True, True, True)
        for what, o, e in zip(
            ("value", "fake_logits", "refined", "synthetic"),
            out,
            (expected, *torch.autograd.grad(expected, exact)),
            strict=True,
        ):
            matches("refiner_loss", what, o, e, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_patch_head_discriminator_loss(kind, dtype):
    classes = 2 if kind == "softmax" else 1
    smoothing = 0.1 if kind in ("softmax", "lsgan") else 0.0
    cases = [
        (1, 1, 1, 1, 1, "contiguous"),
        (3, 2, 32, 9, 14, "channels_last"),
        (1, 2, 37, 7, 11, "strided"),
        (2, 3, 40, 9, 5, "channels_last"),
        (2, 1, 35, 5, 9, "channels_last"),
    ]
    for seed, (n, m, c, h, w, layout) in enumerate(cases):
        cuda_host.set_seed(seed)
        r, reduction = seed % 3, REDUCTIONS[seed % 3]
        real, fake = torch.randn(n, c, h, w).to(dtype), torch.randn(m, c, h, w).to(dtype)
        weight = (torch.randn(classes, c, 1, 1) / c**0.5).to(dtype)
        bias = torch.randn(classes).to(dtype) if r else None
        exact = [t.double().requires_grad_() for t in (real, fake, weight, *([bias] if r else []))]
        expected, *accuracies = reference.patch_head_discriminator_loss(
            *exact,
            *([] if r else [None]),
            kind,
            reduction=reduction,
            label_smoothing=smoothing,
            return_accuracy=True,
        )
        grads = torch.autograd.grad(expected, exact)
        fake_layout = "contiguous" if seed == 1 else layout
        out = ops.patch_head_discriminator_loss(
            *(
                layouts(real)[layout],
                layouts(fake)[fake_layout],
                weight,
                bias,
                KINDS.index(kind),
                r,
                smoothing,
            ),
            *(True, True, True),
        )
        names = ("value", "value", "value", "real_features", "fake_features", "weight", "bias")
        for what, o, e in zip(names, out, (expected, *accuracies, *grads), strict=False):
            if what == "bias":  # a sum of slopes of both signs, about 1 each before the reduction's factor
                terms = h * w * (n + m) / (n if r == 2 else 1)
                bound = testing.tolerance("patch_head_discriminator_loss", "bias", wide(real))
                assert (o.double() - e).abs().max() <= bound.relative_l2 * terms
                continue
            terms = {0: 1, 1: (n + m) * h * w, 2: h * w}[r] if what == "value" else 0.0
            matches("patch_head_discriminator_loss", what, o, e, wide(real), terms=terms)


def test_patch_head_with_several_patches_a_lane():
    real, fake = torch.randn(260, 3, 16, 16), torch.randn(3, 3, 16, 16)
    weight, bias = torch.randn(1, 3, 1, 1), torch.randn(1)
    for r, f in ((real, fake), (real.contiguous(memory_format=LAST), fake.contiguous(memory_format=LAST))):
        out = ops.patch_head_discriminator_loss(r, f, weight, bias, 1, 0, 0.0, True, True, True)
        exact = [t.double().requires_grad_() for t in (r, f, weight, bias)]
        expected = reference.patch_head_discriminator_loss(*exact, "bce")
        matches("patch_head_discriminator_loss", "value", out[0], expected, torch.float32)
        for o, e in zip(out[3:6], torch.autograd.grad(expected, exact), strict=False):
            matches("patch_head_discriminator_loss", "weight", o, e, torch.float32)


def test_patch_loss_scale():
    first, second = torch.randn(3, 700), torch.randn(2, 3, 5, 7).double().contiguous(memory_format=LAST)
    for factor in (1.0, -0.5):
        for pair in ((first, second), (second, first), (first[:, :0], second), (torch.randn(9)[1:], first)):
            a, b = pair[0].clone() if pair[0].storage_offset() == 0 else pair[0], pair[1].clone()
            expected = a * factor, b * factor
            ops.patch_loss_scale_(a, b, torch.tensor(factor))
            assert torch.equal(a, expected[0]) and torch.equal(b, expected[1])


def test_what_is_not_needed_is_empty():
    logits, features = torch.randn(2, 2, 3, 4), torch.randn(2, 5, 3, 4)
    out = ops.patch_discriminator_loss(logits, logits, None, None, 0, 0, 0.0, False, True)
    assert out[3].numel() == 0 and out[4].shape == logits.shape
    out = ops.patch_head_discriminator_loss(
        features, features, torch.randn(2, 5, 1, 1), None, 0, 0, 0.0, False, True, False
    )
    assert [t.numel() for t in out[3:]] == [0, features.numel(), 0, 0]
    for c in (3, 64):
        x, filters = torch.randn(2, c, 4, 5), torch.randn(c, c, 3, 3)
        out = ops.conv_same_backward(x, x, filters, x, False, False, True)
        assert [t.numel() for t in out] == [0, 0, c]
        out = ops.refiner_block_backward(x, x, x, x, filters, None, filters, False, False, False, True, False)
        assert [t.numel() for t in out] == [0, 0, 0, filters.numel(), 0]


# -- refiner convolutions ------------------------------------------------------------------------------------


def conv_case(n, c, k, size, h, w, dtype, memory_format=torch.contiguous_format):
    x, residual, grad = (
        torch.randn(n, d, h, w).to(dtype).contiguous(memory_format=memory_format) for d in (c, k, k)
    )
    weight = (torch.randn(k, c, size, size) / (c * size * size) ** 0.5).to(dtype)
    return x, weight, torch.randn(k).to(dtype), residual, grad


def check_conv(x, weight, bias, residual, grad, tf32=False):
    """Against the reference, with the kernel's own ReLU gates: a gate that rounding flips is no error."""
    dtype = x.dtype
    for relu, b, r in ((False, None, None), (True, bias, residual)):
        y = ops.conv_same(x, weight, b, r, relu)
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        before = reference.conv_same(exact[0], exact[1], None if b is None else exact[2])
        after = before.detach() + (0 if r is None else r.double())
        matches("conv_same", "value", y, after.relu() if relu else after, dtype, tf32)
        assert y.stride() == torch.empty(y.shape, memory_format=_torch.memory_format(x)).stride()
        gated = torch.where(y <= 0, 0, grad) if relu else grad
        expected = torch.autograd.grad(
            before, exact, gated.double(), allow_unused=True, materialize_grads=True
        )
        out = ops.conv_same_backward(grad, x, weight, y if relu else None, True, True, b is not None)
        names = ("x", "weight", "bias") if b is not None else ("x", "weight")
        for what, o, e in zip(names, out, expected, strict=False):
            matches("conv_same", what, o, e, dtype, tf32)


# (n, c, k, filter, h, w): channels and pixels that fill a tile, that fall short of one, that need several
CONVOLUTIONS = [
    *((1, 64, 64, 3, 11, 13), (2, 64, 64, 3, 3, 5), (1, 64, 64, 1, 19, 7), (1, 40, 33, 5, 5, 37)),
    *((1, 70, 40, 3, 6, 9), (1, 72, 136, 3, 5, 4), (3, 33, 65, 1, 1, 1), (1, 40, 33, 7, 10, 3)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
def test_conv_same(sizes, dtype):
    x, weight, bias, residual, grad = conv_case(*sizes, dtype)
    cuda_host.set_seed(sum(sizes))
    check_conv(
        *(t.contiguous(memory_format=LAST) for t in (x, weight)),
        bias,
        residual.contiguous(memory_format=LAST),
        grad,
    )
    if dtype in (torch.float32, torch.bfloat16):
        check_conv(x, weight, bias, residual, grad)
    if sizes[1] == 70:
        check_conv(
            strided(x),
            weight.transpose(2, 3).contiguous().transpose(2, 3),
            bias,
            layouts(residual)["channels_last"],
            strided(grad),
        )
    assert ("conv" in launched()) == (dtype != torch.float64)
    assert ("filter_grad" in launched()) == (dtype != torch.float64)


@pytest.mark.parametrize("sizes", [CONVOLUTIONS[0], CONVOLUTIONS[4], CONVOLUTIONS[7]], ids=str)
def test_conv_same_in_tf32(sizes):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for memory_format in (LAST, torch.contiguous_format):
        x, weight, bias, residual, grad = conv_case(*sizes, torch.float32, memory_format)
        check_conv(x, weight, bias, residual, grad, tf32=True)
    assert cuda_host.products() > 0


def test_conv_same_in_float32_uses_no_tensor_cores_unless_allowed():
    x, weight, bias, residual, grad = conv_case(*CONVOLUTIONS[0], torch.float32)
    check_conv(x, weight, bias, residual, grad)
    assert cuda_host.products() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1, 1), (2, 3, 5, 1, 7, 9), (1, 7, 4, 5, 3, 2), (1, 1, 64, 3, 9, 11), (2, 64, 1, 1, 5, 7)],
)
def test_conv_same_directly(sizes, dtype):
    for memory_format in (LAST, torch.contiguous_format):
        check_conv(*conv_case(*sizes, dtype, memory_format))
    assert launched() == {"direct_conv", "direct_filter_grad", "add_pieces"}


def test_conv_same_with_a_filter_wider_than_shared_memory():
    cuda_host.set_device(3, A100)
    x, weight, bias, residual, _ = conv_case(1, 64, 64, 37, 3, 4, torch.bfloat16, LAST)
    y = ops.conv_same(x, weight, bias, residual, False)
    expected = reference.conv_same(*(t.double() for t in (x, weight, bias)), residual=residual.double())
    matches("conv_same", "value", y, expected, torch.bfloat16)
    assert launched() == {"direct_conv"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv_same_repeats_bit_for_bit_in_every_order(dtype):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for memory_format, size in ((LAST, (2, 13, 11)), (torch.contiguous_format, (1, 5, 7))):
        n, h, w = size
        x, weight, bias, residual, grad = conv_case(n, 64, 64, 3, h, w, dtype, memory_format)
        runs = []
        for seed in SEEDS:
            cuda_host.set_seed(seed)
            y = ops.conv_same(x, weight, bias, residual, True)
            runs.append((y, *ops.conv_same_backward(grad, x, weight, y, True, True, True)))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        # What tensor cores read lies in different banks, but for rows that are computed in vain.
        if dtype == torch.bfloat16:
            assert max(cuda_host.passes().values()) < 1.1, cuda_host.passes()
        cuda_host.forget()


def block_case(n, c, m, size, size2, h, w, dtype, memory_format):
    x, weight1, bias1, _, _ = conv_case(n, c, m, size, h, w, dtype, memory_format)
    _, weight2, bias2, _, grad = conv_case(n, m, c, size2, h, w, dtype, memory_format)
    return x, weight1, bias1, weight2, bias2, grad


def check_block(x, weight1, bias1, weight2, bias2, grad, tf32=False):
    dtype = x.dtype
    y, inner = ops.refiner_block(x, weight1, bias1, weight2, bias2, True)
    none = ops.refiner_block(x, weight1, bias1, weight2, bias2, False)
    assert torch.equal(none[0], y) and none[1].numel() == 0
    exact = [t.double().requires_grad_() for t in (x, weight1, bias1, weight2, bias2)]
    # Both ReLUs take the kernel's gates, and the second convolution its rounded input.
    first = reference.conv_same(*exact[:3]) * (inner > 0)
    matches("conv_same", "value", inner, first, dtype, tf32)
    first = first + (inner.double() - first).detach()
    before = reference.conv_same(first, *exact[3:], residual=exact[0])
    matches("refiner_block", "value", y, before.relu(), dtype, tf32)
    expected = torch.autograd.grad(before * (y > 0), exact, grad.double())
    for kept in (inner, None):
        out = ops.refiner_block_backward(
            grad, x, kept, y, weight1, bias1, weight2, True, True, True, True, True
        )
        for what, o, e in zip(("x", "weight1", "bias1", "weight2", "bias2"), out, expected, strict=True):
            terms = grad[:, 0].numel() ** 0.5 if what.startswith("bias") else 1.0
            matches("refiner_block", what, o, e, dtype, tf32, terms=terms)
    return y, inner


BLOCKS = [
    *((2, 64, 64, 3, 3, 7, 5), (1, 64, 64, 3, 3, 11, 21), (1, 48, 33, 3, 1, 7, 37), (1, 40, 64, 1, 3, 13, 5)),
    *((1, 5, 3, 3, 3, 7, 9), (1, 40, 64, 5, 5, 4, 3)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_refiner_block(sizes, dtype):
    for shared, memory_format in (
        (H100, LAST),
        (A100, torch.contiguous_format),
        (H100, torch.contiguous_format),
    ):
        if memory_format != LAST and (dtype == torch.float16 or sizes[0] == 2):
            continue
        cuda_host.set_device(3, shared)
        cuda_host.set_seed(sum(sizes))
        cuda_host.forget()
        check_block(*block_case(*sizes, dtype, memory_format))
        half, small = dtype in (torch.bfloat16, torch.float16), sizes[3:5] == (5, 5) or sizes[1] == 5
        one_launch = half and not small and (shared == H100 or sizes[3] + sizes[4] < 6)
        assert ("refiner_block" in launched()) == one_launch, launched()


def test_refiner_block_in_one_launch_agrees_with_two_in_every_order():
    cases = block_case(2, 64, 64, 3, 3, 13, 21, torch.bfloat16, LAST)[:-1]
    cuda_host.set_device(108, A100)
    expected = ops.refiner_block(*cases, True)
    assert "refiner_block" not in launched()
    for seed, multiprocessors in zip(SEEDS, (1, 2, 3, 5, 132), strict=True):
        cuda_host.set_seed(seed)
        cuda_host.set_device(multiprocessors, H100)
        out = ops.refiner_block(*cases, True)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert "refiner_block" in launched()


def test_refiner_block_in_tf32():
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    check_block(*block_case(*BLOCKS[0], torch.float32, LAST), tf32=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [3, 64])
def test_conv_nan_passes_the_gates(c, dtype):
    x, weight, bias, _, grad = conv_case(1, c, c, 3, 5, 6, dtype, LAST)
    x[0, 1, 4, 5] = float("nan")  # at the corner: tiles reach beyond it
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


def test_conv_of_empty_images():
    for c, k in ((3, 4), (64, 64)):
        weight = torch.randn(k, c, 3, 3)
        for shape in ((0, c, 5, 6), (2, c, 0, 6)):
            x, grad = torch.randn(shape), torch.randn(shape[0], k, *shape[2:])
            y = ops.conv_same(x, weight, None, None, True)
            assert y.shape == grad.shape
            d_x, d_weight, d_bias = ops.conv_same_backward(grad, x, weight, y, True, True, True)
            assert d_x.shape == x.shape and not d_weight.any() and not d_bias.any()
            assert d_weight.shape == weight.shape and d_bias.shape == (k,)


# -- what the operators promise ------------------------------------------------------------------------------


def test_operators_are_what_they_declare():
    x, weight, _, _, grad = conv_case(2, 3, 3, 3, 5, 7, torch.float32)
    logits, features = torch.randn(2, 2, 3, 4), torch.randn(2, 3, 3, 4)
    for name, arguments in {
        "grad_reverse_backward": (x, torch.rand(2)),
        "patch_discriminator_loss": (logits, logits.clone(), None, None, 0, 0, 0.1, True, False),
        "patch_generator_loss": (logits, None, 0, 0, True),
        "patch_loss_map": (logits, None, 0, True, 0.0, True),
        "self_regularization": (x, grad, None, 0.5, 0, True, False),
        "refiner_loss": (logits, x, grad, torch.tensor(0.5), 0.0, 0, 0, True, True, False),
        "patch_head_discriminator_loss": (
            *(features, features.clone(), torch.randn(2, 3, 1, 1), torch.randn(2), 0, 0, 0.0),
            *(True, True, True),
        ),
        "patch_loss_scale_": (x.clone(), logits.clone(), torch.tensor(2.0)),
        "conv_same": (x, weight, None, grad, True),
        "conv_same_backward": (grad, x, weight, None, True, True, False),
        "refiner_block": (x, weight, None, weight.clone(), None, True),
        "refiner_block_backward": (grad, x, None, x.clone(), weight, None, weight.clone(), *[True] * 5),
    }.items():
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=("test_schema",))
        # Sizes, dtypes and strides are those of the shape functions of torch.ops.fastda, for a device that is
        # not the CPU: its kernels lay a block's inner activation out in another way.
        fake = getattr(torch.ops.fastda, name)(
            *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
        )
        real = getattr(ops, name)(*arguments)
        for f, r in zip(
            *((o,) if isinstance(o, torch.Tensor) else o or () for o in (fake, real)), strict=True
        ):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()), name


# -- planted faults ------------------------------------------------------------------------------------------


def conv_tiles(dtype, memory_format=LAST, sizes=(1, 64, 64, 3, 19, 21)):
    check_conv(*conv_case(*sizes, dtype, memory_format))


def conv_of_one_tap():
    conv_tiles(torch.bfloat16, sizes=(1, 64, 64, 1, 5, 7))


def conv_exact():
    conv_tiles(torch.float32)


def conv_many_channels():
    conv_tiles(torch.bfloat16, sizes=(1, 136, 64, 3, 9, 14))


def conv_scalar():
    conv_tiles(torch.bfloat16, torch.contiguous_format, (1, 37, 41, 3, 9, 14))


def conv_directly():
    check_conv(*conv_case(2, 3, 5, 3, 7, 9, torch.float32))


def weight_gradient():
    # So many tiles that a block has several.
    x, weight, _, _, grad = conv_case(90, 64, 64, 3, 6, 6, torch.float32, LAST)
    exact = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.conv_same(x.double(), exact), exact, grad.double())
    _, d_weight, d_bias = ops.conv_same_backward(grad, x, weight, None, False, True, True)
    matches("conv_same", "weight", d_weight, expected, torch.float32)
    matches("conv_same", "bias", d_bias, grad.double().sum((0, 2, 3)), torch.float32)


def block():
    cuda_host.set_device(1, H100)
    x, weight1, bias1, weight2, bias2, _ = block_case(1, 64, 64, 3, 3, 17, 21, torch.bfloat16, LAST)
    y, inner = ops.refiner_block(x, weight1, bias1, weight2, bias2, True)
    expected = reference.conv_same(x.double(), weight1.double(), bias1.double(), relu=True)
    matches("conv_same", "value", inner, expected, torch.bfloat16)
    expected = reference.conv_same(
        *(t.double() for t in (inner, weight2, bias2)), residual=x.double(), relu=True
    )
    matches("refiner_block", "value", y, expected, torch.bfloat16)


def grad_reverse():
    grad = torch.randn(37, 53)
    matches(
        "grad_reverse", "grad", ops.grad_reverse_backward(grad, torch.tensor(0.5)), -0.5 * grad, torch.float32
    )


def losses():
    check_discriminator(torch.randn(3, 2, 61, 53), torch.randn(5, 2, 37, 53), "softmax")


def weighted_losses():
    weight = torch.rand(3, 1, 9, 14) + 0.1
    check_discriminator(
        torch.randn(3, 2, 9, 14), torch.randn(3, 2, 9, 14), "softmax", "mean", 0.0, weight, weight
    )


def head():
    x, y, weight = torch.randn(3, 32, 9, 14), torch.randn(2, 32, 9, 14), torch.randn(2, 32, 1, 1)
    exact = [t.double().requires_grad_() for t in (x, y, weight)]
    expected = reference.patch_head_discriminator_loss(*exact, None)
    out = ops.patch_head_discriminator_loss(x, y, weight, None, 0, 0, 0.0, True, True, True)
    matches("patch_head_discriminator_loss", "value", out[0], expected, torch.float32)
    for o, e in zip(out[3:6], torch.autograd.grad(expected, exact), strict=True):
        matches("patch_head_discriminator_loss", "weight", o, e, torch.float32)


def survives(check, seeds=SEEDS):
    """Whether a check passes in every order; in a process of its own, which AddressSanitizer may end."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(AssertionError, RuntimeError):
            for seed in seeds:
                cuda_host.set_seed(seed)
                torch.manual_seed(seed)
                check()
            status = 0
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


PLANTED = {
    "grad_reverse: no mask at the end": grad_reverse,
    "patch_loss: no mask at the end": losses,
    "conv: halo off by one": functools.partial(conv_tiles, torch.bfloat16),
    "conv: no mask at the right edge": functools.partial(conv_tiles, torch.bfloat16),
    "conv: no mask at the last channel": conv_scalar,
    "conv: no mask at the last output channel": conv_scalar,
    "conv: fragment indices swapped": functools.partial(conv_tiles, torch.bfloat16),
    "conv: copies not waited for": functools.partial(conv_tiles, torch.bfloat16),
    "weight gradient: fragment indices swapped": functools.partial(conv_tiles, torch.bfloat16),
    "weight gradient: no mask at the last tap": functools.partial(
        conv_tiles, torch.bfloat16, sizes=(1, 64, 64, 1, 5, 7)
    ),
    "refiner block: no mask around the inner activation": block,
    "direct conv: no mask at the right edge": conv_directly,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_caught(fault):
    check = PLANTED[fault]
    check()
    assert fault in cuda_host.faults()
    cuda_host.plant(fault)
    assert not survives(check)


def test_planted_faults_are_all_there_are():
    for check in {id(c): c for c in PLANTED.values()}.values():
        check()
    assert set(PLANTED) == set(cuda_host.faults())


@pytest.mark.parametrize(
    "check",
    [grad_reverse, losses, head, conv_exact, conv_many_channels, conv_scalar, weight_gradient, block],
    ids=lambda check: check.__name__,
)
def test_planted_removal_of_any_barrier_is_caught(check):
    check()
    harmless = []
    for file, line in sorted(cuda_host.barriers()):
        cuda_host.skip_barrier(file, line)
        if survives(check, range(12)):
            harmless.append(f"{file}:{line}")
    assert not harmless, harmless


SYNCHRONISES = re.compile(r"bar\.sync|cp\.async\.wait_group")


@pytest.mark.skipif(not PTX, reason="runs on PTX")
def test_planted_removal_of_any_barrier_or_wait_from_the_ptx_is_caught():
    """Races are seen whatever they do to the result, so that one order is enough."""
    checks = [
        losses,
        weighted_losses,
        head,
        conv_exact,
        conv_many_channels,
        conv_scalar,
        weight_gradient,
        block,
    ]
    met, caught = {}, set()
    for check in checks:
        cuda_host.ptx_forget()
        check()
        for kernel, lines in cuda_host.ptx_executed().items():
            here = {(kernel, n): text for n, text, *_ in lines if SYNCHRONISES.match(text)}
            met |= here
            for kernel, number in here.keys() - caught:
                cuda_host.ptx_skip(kernel, number)
                try:
                    check()
                except (AssertionError, RuntimeError):
                    caught.add((kernel, number))
        cuda_host.ptx_skip("", -1)
        check()
    kernels = {"loss", "finish", "head", "head_weight", "conv", "filter_grad", "refiner_block"}
    assert all(any(f"{name}_kernel" in kernel for kernel, _ in met) for name in kernels)
    # A block_sum waits for those before it, of which a kernel's first has none.
    sums = {kernel for kernel, _ in met if re.search("(loss|finish|weight_sum|head)_kernel", kernel)}
    first = {(kernel, min(n for k, n in met if k == kernel)) for kernel in sums}
    assert met.keys() - caught <= first
