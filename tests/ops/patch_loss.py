"""What the tests of the patch losses share."""

import pytest
import torch

from fastda import backend, registry
from fastda.tools import verify
from tests import common

KINDS = registry.KINDS

isa_independent = pytest.mark.isa_independent

native = pytest.mark.skipif(
    backend.info()["devices"]["cpu"]["serving"] != "cpp", reason="the reference serves this run"
)


def channels(kind):
    return 2 if kind == "softmax" else 1


def positive(draw, *sizes):
    return draw(1, 1, sizes[-2], 1).abs() + 0.1


# A call for every raw operator and every way into it: operator, sizes, options.
CALLS = [
    ("patch_discriminator_loss", (3, 2, 2, 3), {"kind": "softmax", "return_accuracy": True}),
    ("patch_discriminator_loss", (2, 3, 2, 3), {"kind": "softmax", "label_smoothing": 0.2}),
    ("patch_discriminator_loss", (2, 3, 2, 3), {"kind": "bce", "reduction": "none"}),
    ("patch_discriminator_loss", (2, 3, 2, 3), {"kind": "lsgan", "real_weight": positive}),
    ("patch_discriminator_loss", (2, 2, 2, 3), {"kind": "hinge", "reduction": "batchmean"}),
    ("patch_discriminator_loss", (2, 2, 2, 3), {"kind": "wgan", "reduction": "sum"}),
    ("patch_generator_loss", (2, 2, 3), {"kind": "softmax", "weight": positive}),
    ("patch_generator_loss", (2, 2, 3), {"kind": "bce", "reduction": "none"}),
    ("patch_generator_loss", (2, 2, 3), {"kind": "hinge"}),
    ("self_regularization", (2, 1, 2, 3), {"scale": 0.3, "reduction": "batchmean"}),
    ("self_regularization", (2, 1, 2, 3), {"scale": 0.3, "reduction": "none"}),
    ("refiner_loss", (2, 1, 3, 2), {"kind": "softmax", "reg_scale": 0.3}),
    ("refiner_loss", (2, 1, 3, 2), {"kind": "lsgan", "reg_scale": 0.3, "reduction": "sum"}),
    ("patch_head_discriminator_loss", (2, 1, 3, 2, 2), {"kind": "softmax", "return_accuracy": True}),
    ("patch_head_discriminator_loss", (1, 2, 3, 2, 2), {"kind": "hinge", "bias": None}),
    ("patch_head_discriminator_loss", (1, 2, 3, 2, 2), {"kind": "bce", "reduction": "none"}),
]

calls = pytest.mark.parametrize(
    ("op", "sizes", "options"), CALLS, ids=[f"{op}-{verify.describe(options)}" for op, _, options in CALLS]
)

# One a raw operator, where each call costs seconds.
few = pytest.mark.parametrize(
    ("op", "sizes", "options"),
    [CALLS[i] for i in (0, 2, 6, 9, 11, 13)],
    ids=[f"{CALLS[i][0]}-{verify.describe(CALLS[i][2])}" for i in (0, 2, 6, 9, 11, 13)],
)


def arguments_of(op, sizes, options, dtype=torch.float64):
    arguments = common.draw(op, sizes, dtype, **options)
    return {n: None if n in options and options[n] is None else v for n, v in arguments.items()}
