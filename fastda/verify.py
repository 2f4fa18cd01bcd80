"""Every operator against its reference in float64: values and all gradients.

A new operator is one entry of OPERATORS; `fastda verify` and the tests take it from there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

import fastda
from fastda import backend, reference
from fastda.testing import Error, Tolerance, clear_of_zero, error, tolerance

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided")
Sizes = tuple[int, ...]
Options = Mapping[str, Any]
Draw = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Operator:
    """How to call one public function, found by name in `fastda` and in `fastda.reference`."""

    name: str
    # (options, *sizes) -> shape of every tensor argument that receives a gradient.
    tensors: Callable[..., dict[str, Sizes]]
    sizes: Sequence[Sizes]
    # Sizes that make several chunks of work, and the options to go with them.
    large: Sequence[Sizes]
    # Further arguments. A callable value draws a constant tensor: (draw, *sizes) -> Tensor. The value of an
    # option that `tensors` names too only says that this tensor is there.
    options: Sequence[Options] = ({},)
    large_options: Options | None = None
    # Moves the float64 arguments off points where a gradient jumps, such as the edge of a ReLU.
    settle: Callable[[dict[str, Any], float], None] | None = None
    # Results that are sums in which terms may cancel: (options, *sizes) -> the size of those terms, by name.
    magnitudes: Callable[..., dict[str, float]] = lambda options, *sizes: {}


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of the given options."""
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]


def _logits(kind: str, n: int, h: int, w: int) -> Sizes:
    return (n, 2 if kind == "softmax" else 1, h, w)


def _patch_weight(draw: Draw, *sizes: int) -> Tensor:
    return (draw(sizes[-3], 1, sizes[-2], sizes[-1]) - 0.5).relu()  # most patches are masked out


def _conv_shapes(options: Options, n: int, c: int, k: int, size: int, h: int, w: int) -> dict[str, Sizes]:
    shapes: dict[str, Sizes] = {"x": (n, c, h, w), "weight": (k, c, size, size)}
    if options.get("bias", True):
        shapes["bias"] = (k,)
    if options.get("residual"):
        shapes["residual"] = (n, k, h, w)
    return shapes


def _block_shapes(options: Options, n: int, c: int, size: int, h: int, w: int) -> dict[str, Sizes]:
    weight: Sizes = (c, c, size, size)
    bias: Sizes = (c,)
    return {"x": (n, c, h, w), "weight1": weight, "bias1": bias, "weight2": weight, "bias2": bias}


def _settle_conv(a: dict[str, Any], margin: float) -> None:
    if a.get("relu"):
        a["bias"] += clear_of_zero(reference.conv_same(**{**a, "relu": False}), margin)


def _settle_block(a: dict[str, Any], margin: float) -> None:
    a["bias1"] += clear_of_zero(reference.conv_same(a["x"], a["weight1"], a["bias1"]), margin)
    hidden = reference.conv_same(a["x"], a["weight1"], a["bias1"], relu=True)
    a["bias2"] += clear_of_zero(
        reference.conv_same(hidden, a["weight2"], a["bias2"], residual=a["x"]), margin
    )


def _settle_head(a: dict[str, Any], margin: float) -> None:
    if a["kind"] == "hinge":
        scores = [conv2d(a[name], a["weight"], a["bias"]) for name in ("real_features", "fake_features")]
        edges = torch.cat([(scores[0] - 1).flatten(), (scores[1] + 1).flatten()])
        a["bias"] += clear_of_zero(edges[None, None], margin)


def _unit_terms(options: Options, *sizes: int) -> dict[str, float]:
    return dict.fromkeys(("value", "x", "weight", "weight1", "bias1", "weight2", "bias2"), 1.0)


def _loss_terms(options: Options, *sizes: int) -> dict[str, float]:
    # A mean has terms of about one; what is summed instead has as many of them as patches or pixels.
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return {}
    n, per_image = sizes[0], math.prod(sizes[-2:])
    size = {"mean": 1.0, "batchmean": float(per_image), "sum": float(n * per_image)}[reduction]
    return {"value": size, "weight": size, "bias": size}


KINDS = ("softmax", "bce", "lsgan", "hinge", "wgan")
REDUCTIONS = ("mean", "sum", "batchmean", "none")
OPERATORS = (
    Operator(
        "grad_reverse",
        tensors=lambda options, *size: {"x": size},
        sizes=((1,), (7, 3), (0, 4), (129, 33), (3, 5, 7, 2)),
        options=[
            {},
            {"scale": 0.7},
            {"scale": lambda draw, *size: draw()},
            {"scale": lambda draw, *size: draw(size[0])},
        ],
        large=((128, 768), (64, 32, 24, 24)),
        large_options={"scale": 0.7},
    ),
    Operator(
        "grad_reverse_linear",
        tensors=lambda options, n, i, o: {
            "x": (n, i),
            "weight": (o, i),
            **({"bias": (o,)} if options["bias"] else {}),
        },
        sizes=((1, 1, 1), (5, 7, 3), (37, 129, 65)),
        options=[
            {"bias": None},
            {"bias": True, "scale": 0.7},
            {"bias": True, "scale": lambda draw, *size: draw()},
            {"bias": True, "scale": lambda draw, *size: draw(size[0])},
        ],
        large=((128, 768, 100), (128, 1024, 1024)),
        large_options={"bias": True, "scale": 0.7},
    ),
    Operator(
        "patch_discriminator_loss",
        tensors=lambda options, real, fake, h, w: {
            "real_logits": _logits(options["kind"], real, h, w),
            "fake_logits": _logits(options["kind"], fake, h, w),
        },
        sizes=((1, 1, 1, 1), (3, 3, 9, 14), (2, 5, 37, 53)),
        options=[
            *grid(kind=KINDS, reduction=REDUCTIONS),
            *grid(kind=("softmax", "bce", "lsgan"), label_smoothing=(0.1,), return_accuracy=(True,)),
            *grid(kind=KINDS, reduction=("mean", "none"), fake_weight=(_patch_weight,)),
            {"kind": "softmax", "real_weight": lambda draw, *sizes: draw(1, 1, sizes[-2], 1).abs()},
        ],
        large=((512, 512, 9, 14), (8, 8, 30, 30)),
        large_options={"kind": "softmax", "return_accuracy": True},
        magnitudes=_loss_terms,
    ),
    Operator(
        "patch_generator_loss",
        tensors=lambda options, n, h, w: {"fake_logits": _logits(options["kind"], n, h, w)},
        sizes=((1, 1, 1), (3, 9, 14), (2, 37, 53)),
        options=[
            *grid(kind=KINDS, reduction=REDUCTIONS),
            *grid(kind=KINDS, reduction=("mean", "none"), weight=(_patch_weight,)),
        ],
        large=((512, 9, 14), (8, 30, 30)),
        large_options={"kind": "softmax"},
        magnitudes=_loss_terms,
    ),
    Operator(
        "self_regularization",
        tensors=lambda options, n, c, h, w: {"refined": (n, c, h, w), "synthetic": (n, c, h, w)},
        sizes=((1, 1, 1, 1), (3, 1, 35, 55), (2, 3, 37, 53)),
        options=grid(scale=(1.0, 0.3), reduction=REDUCTIONS),
        large=((512, 1, 35, 55), (32, 1, 35, 55)),
        large_options={"scale": 0.3},
    ),
    Operator(
        "refiner_loss",
        tensors=lambda options, n, c, h, w: {
            "fake_logits": _logits(options["kind"], n, (h + 3) // 4, (w + 3) // 4),
            "refined": (n, c, h, w),
            "synthetic": (n, c, h, w),
        },
        sizes=((1, 1, 1, 1), (3, 1, 35, 55), (2, 3, 37, 53)),
        options=grid(kind=KINDS, reg_scale=(0.3,), reduction=("mean", "sum", "batchmean")),
        large=((512, 1, 35, 55), (32, 1, 35, 55)),
        large_options={"kind": "softmax", "reg_scale": 0.3},
        magnitudes=_loss_terms,
    ),
    Operator(
        "patch_head_discriminator_loss",
        tensors=lambda options, real, fake, c, h, w: {
            "real_features": (real, c, h, w),
            "fake_features": (fake, c, h, w),
            "weight": (2 if options["kind"] == "softmax" else 1, c, 1, 1),
            "bias": (2 if options["kind"] == "softmax" else 1,),
        },
        sizes=((1, 1, 1, 1, 1), (3, 3, 32, 9, 14), (2, 3, 7, 19, 23)),
        options=[
            *grid(kind=KINDS, reduction=("mean", "sum")),
            *grid(kind=("softmax", "bce", "lsgan"), label_smoothing=(0.1,), return_accuracy=(True,)),
        ],
        large=((512, 512, 32, 9, 14), (32, 32, 32, 9, 14)),
        large_options={"kind": "softmax", "return_accuracy": True},
        settle=_settle_head,
        magnitudes=_loss_terms,
    ),
    Operator(
        "conv_same",
        tensors=_conv_shapes,
        sizes=(
            *((1, 1, 1, 1, 1, 1), (2, 3, 5, 1, 7, 9), (1, 7, 4, 5, 3, 2)),
            *((2, 17, 33, 3, 11, 13), (1, 64, 64, 3, 19, 21), (2, 16, 16, 7, 13, 17)),
        ),
        options=[{"bias": None}, *grid(residual=(None, True), relu=(False, True))],
        large=((8, 64, 64, 3, 35, 55), (2, 64, 64, 7, 56, 56)),
        large_options={"relu": True},
        settle=_settle_conv,
        magnitudes=_unit_terms,
    ),
    Operator(
        "refiner_block",
        tensors=_block_shapes,
        sizes=((1, 1, 3, 1, 1), (2, 5, 3, 7, 9), (1, 64, 3, 19, 21), (2, 16, 7, 13, 17)),
        large=((8, 64, 3, 35, 55), (2, 64, 7, 56, 56)),
        settle=_settle_block,
        magnitudes=_unit_terms,
    ),
)


@dataclass(frozen=True)
class Case:
    """One call of an operator: its options, size, dtype, layout, backend and device."""

    operator: Operator
    option: int  # index in operator.options
    sizes: Sizes
    dtype: torch.dtype
    layout: str
    backend: str
    device: str


@dataclass(frozen=True)
class Row:
    """The verdict on one output or gradient of a case, or on the whole of it where the call raised."""

    op: str
    options: str
    sizes: Sizes
    dtype: str
    layout: str
    backend: str
    device: str
    what: str
    error: Error | None
    tolerance: Tolerance | None
    passed: bool
    message: str = ""

    @property
    def used(self) -> float:
        """The largest share of a bound that the error uses up; above 1 is a failure."""
        if self.error is None or self.tolerance is None:
            return 0.0 if self.passed else math.inf
        pairs = zip(self.error[:2], self.tolerance, strict=True)
        shares = [e / t if t else (math.inf if e else 0.0) for e, t in pairs]
        return max(shares) if self.error.nonfinite_equal else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        row = asdict(self)
        row["error"] = self.error._asdict() if self.error else None
        row["tolerance"] = self.tolerance._asdict() if self.tolerance else None
        return row


def cases(
    ops: Sequence[str] | None = None, backends: Sequence[str] | None = None, devices: Sequence[str] = ("cpu",)
) -> Iterator[Case]:
    """All cases of the given operators (all), backends (all that can serve the device) and devices."""
    for device in devices:
        able = [b for b in backend.BACKENDS if backend.why_not(b, device) is None]
        for op in OPERATORS:
            if ops and op.name not in ops:
                continue
            for sizes, dtype, option in itertools.product(op.sizes, DTYPES, range(len(op.options))):
                shapes = op.tensors(op.options[option], *sizes).values()
                has_images = any(len(shape) == 4 for shape in shapes)
                for layout in LAYOUTS if has_images else ("contiguous", "strided"):
                    for name in backends or able:
                        yield Case(op, option, sizes, dtype, layout, name, device)


def draw_arguments(
    op: Operator, options: Options, sizes: Sizes, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """The arguments in float64, tensors rounded to `dtype`; and the names of those that receive gradients."""
    identity = f"{op.name} {describe(options)} {sizes}"
    generator = torch.Generator().manual_seed(zlib.crc32(identity.encode()) + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    arguments: dict[str, Any] = {
        name: value(draw, *sizes) if callable(value) else value for name, value in options.items()
    }
    shapes = op.tensors(options, *sizes)
    for name, shape in shapes.items():
        # Weights keep the variance of what they act on.
        gain = math.prod(shape[1:]) ** -0.5 if name.startswith("weight") else 1.0
        arguments[name] = draw(*shape) * gain

    def rounded() -> dict[str, Any]:
        return {n: v.to(dtype).double() if isinstance(v, Tensor) else v for n, v in arguments.items()}

    arguments = rounded()
    if op.settle is not None:
        op.settle(arguments, max(1e-3, 4 * torch.finfo(dtype).eps))
        arguments = rounded()
    return arguments, list(shapes)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A copy of `x`: `contiguous`, `channels_last` (if 4-D) or `strided` (gaps of NaN in the last dim)."""
    if layout == "strided" and x.dim():
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype, device=x.device)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "channels_last" and x.dim() == 4:
        return x.clone(memory_format=torch.channels_last)
    return x.clone(memory_format=torch.contiguous_format)


def evaluate(
    function: Callable[..., Any], arguments: Mapping[str, Any], names: Sequence[str], seed: int
) -> dict[str, Tensor]:
    """Outputs ("value", "value 1", …) and, under random output gradients, gradients by argument name."""
    arguments = {n: v.detach().requires_grad_(n in names) if n in names else v for n, v in arguments.items()}
    out = function(**arguments)
    outputs = out if isinstance(out, tuple) else (out,)
    results = {f"value {i}" if i else "value": o.detach() for i, o in enumerate(outputs)}
    differentiable = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    weights = [
        # Between 1/2 and 3/2, and held by the narrowest dtype, so that every dtype gets the same.
        (torch.rand(o.shape, generator=generator, dtype=torch.float64) + 0.5).to(torch.bfloat16).to(o)
        for o in differentiable
    ]
    grads = torch.autograd.grad(
        differentiable, [arguments[n] for n in names], weights, materialize_grads=True
    )
    return results | dict(zip(names, grads, strict=True))


def describe(options: Options) -> str:
    """Options in one short line."""
    return ", ".join(f"{n}={'tensor' if callable(v) else v}" for n, v in options.items())


def _served_by(case: Case) -> contextlib.AbstractContextManager[None]:
    # What serves anyway is not forced: an operator may have a shorter way for that, and it is what users get.
    if backend.info()["devices"][case.device]["serving"] == case.backend:
        return contextlib.nullcontext()
    return backend.use_backend(case.backend)


@functools.lru_cache(maxsize=1)  # the layouts and backends of a case follow one another
def _expected(
    op: Operator, option: int, sizes: Sizes, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Any], list[str], dict[str, Tensor]]:
    arguments, names = draw_arguments(op, op.options[option], sizes, dtype, seed)
    return arguments, names, evaluate(getattr(reference, op.name), arguments, names, seed)


def check(case: Case, seed: int = 0) -> list[Row]:
    """Run one case and judge every output and gradient."""
    op, dtype = case.operator, case.dtype
    options = op.options[case.option]
    row = functools.partial(
        Row, op.name, describe(options), case.sizes, str(dtype).removeprefix("torch."), case.layout
    )
    row = functools.partial(row, case.backend, case.device)
    try:
        exact, names, expected = _expected(op, case.option, case.sizes, dtype, seed)
        given = {
            name: lay_out(value.to(case.device, dtype), case.layout) if isinstance(value, Tensor) else value
            for name, value in exact.items()
        }
        with _served_by(case):
            actual = evaluate(getattr(fastda, op.name), given, names, seed)
        rows = []
        magnitudes = op.magnitudes(options, *case.sizes)
        for what, wanted in expected.items():
            bound = tolerance(op.name, what.split()[0], dtype)
            got = error(actual[what], wanted, magnitudes.get(what, 0.0))
            rows.append(row(what, got, bound, got.within(bound)))
        return rows
    except Exception as failure:
        return [row("call", None, None, False, f"{type(failure).__name__}: {failure}")]
