"""Patch losses: one clear error for every argument that does not fit."""

import pytest
import torch

import fastda
from tests import common
from tests.ops.patch_loss import isa_independent, native

PAIR, SCORE, IMAGE = torch.zeros(8, 2, 3, 4), torch.zeros(8, 1, 3, 4), torch.zeros(8, 1, 9, 9)

HEAD, FEATURES = torch.zeros(2, 5, 1, 1), torch.zeros(8, 5, 3, 4)

DISCRIMINATOR = {"real_logits": PAIR, "fake_logits": PAIR}

GENERATOR, PIXELS = {"fake_logits": PAIR}, {"refined": IMAGE, "synthetic": IMAGE}

REFINER = {**GENERATOR, **PIXELS, "reg_scale": 1.0}

FUSED = {"real_features": FEATURES, "fake_features": FEATURES, "weight": HEAD, "bias": None}

ERRORS = [
    ("patch_discriminator_loss", {**DISCRIMINATOR, **wrong}, kind, message)
    for wrong, kind, message in [
        (
            {"kind": "gan"},
            ValueError,
            "kind must be one of softmax, bce, lsgan, hinge, wgan, got 'gan'",
        ),
        (
            {"reduction": "max"},
            ValueError,
            "reduction must be one of mean, sum, batchmean, none, got 'max'",
        ),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0 and 1, got -0.1"),
        (
            {"kind": "hinge", "label_smoothing": 0.1},
            ValueError,
            "kind='hinge' has no labels to smooth, got label_smoothing=0.1",
        ),
        (
            {"real_logits": SCORE},
            ValueError,
            "real_logits must be (N, 2, H, W) for kind='softmax', got (8, 1, 3, 4)",
        ),
        (
            {"kind": "bce"},
            ValueError,
            "real_logits must be (N, 1, H, W) for kind='bce', got (8, 2, 3, 4)",
        ),
        (
            {"fake_logits": PAIR[0]},
            ValueError,
            "fake_logits must be (N, 2, H, W) for kind='softmax', got (2, 3, 4)",
        ),
        (
            {"real_logits": PAIR.long()},
            TypeError,
            "real_logits must be float32, float64, bfloat16 or float16, got torch.int64",
        ),
        ({"real_logits": [1.0]}, TypeError, "real_logits must be a tensor, got list"),
        (
            {"fake_logits": PAIR.double()},
            TypeError,
            "fake_logits must have the dtype of real_logits, torch.float32, got torch.float64",
        ),
        (
            {"fake_logits": PAIR.to("meta")},
            ValueError,
            "fake_logits must be on the device of real_logits, cpu, got meta",
        ),
        (
            {"real_weight": torch.ones(8, 2, 3, 4)},
            ValueError,
            "real_weight must be broadcastable to (8, 1, 3, 4), got (8, 2, 3, 4)",
        ),
        (
            {"fake_weight": torch.ones(7, 1, 3, 4)},
            ValueError,
            "fake_weight must be broadcastable to (8, 1, 3, 4), got (7, 1, 3, 4)",
        ),
        (
            {"fake_weight": torch.ones(1, requires_grad=True)},
            ValueError,
            "fake_weight is a constant and must not require grad; pass fake_weight.detach() if that is meant",
        ),
        ({"real_weight": 1.0}, TypeError, "real_weight must be a tensor, got float"),
        (
            {"real_weight": torch.ones(1, device="meta")},
            ValueError,
            "real_weight must be on the device cpu, got meta",
        ),
        (
            {"real_weight": torch.ones(1, dtype=torch.complex64)},
            TypeError,
            "real_weight must be real, got torch.complex64",
        ),
    ]
]

ERRORS += [
    (
        "patch_generator_loss",
        {**GENERATOR, "weight": torch.ones(5)},
        ValueError,
        "weight must be broadcastable to (8, 1, 3, 4), got (5,)",
    ),
    (
        "patch_generator_loss",
        {**GENERATOR, "kind": "wgan"},
        ValueError,
        "fake_logits must be (N, 1, H, W) for kind='wgan', got (8, 2, 3, 4)",
    ),
    (
        "self_regularization",
        {**PIXELS, "reduction": "max"},
        ValueError,
        "reduction must be one of mean, sum, batchmean, none, got 'max'",
    ),
    (
        "self_regularization",
        {**PIXELS, "synthetic": IMAGE[:1]},
        ValueError,
        "synthetic must have the shape of refined, (8, 1, 9, 9), got (1, 1, 9, 9)",
    ),
    (
        "self_regularization",
        {**PIXELS, "synthetic": IMAGE.to("meta")},
        ValueError,
        "synthetic must be on the device of refined, cpu, got meta",
    ),
    (
        "self_regularization",
        {**PIXELS, "refined": IMAGE.to(torch.complex64)},
        TypeError,
        "refined must be float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    (
        "self_regularization",
        {**PIXELS, "scale": torch.ones((), requires_grad=True)},
        ValueError,
        "scale is a constant and must not require grad; pass scale.detach() if that is meant",
    ),
    (
        "self_regularization",
        {**PIXELS, "scale": torch.ones(8)},
        ValueError,
        "scale must be a float or a 0-dim tensor, got shape (8,)",
    ),
    (
        "self_regularization",
        {**PIXELS, "scale": torch.tensor(1)},
        TypeError,
        "scale must be a float or a floating-point tensor, got torch.int64",
    ),
    (
        "self_regularization",
        {**PIXELS, "scale": "1"},
        TypeError,
        "scale must be a float or a 0-dim tensor, got str",
    ),
    (
        "refiner_loss",
        {**REFINER, "reduction": "none"},
        ValueError,
        "reduction must be one of mean, sum, batchmean, got 'none'",
    ),
    (
        "refiner_loss",
        {**REFINER, "reg_scale": None},
        TypeError,
        "reg_scale must be a float or a 0-dim tensor, got NoneType",
    ),
    (
        "refiner_loss",
        {**REFINER, "refined": IMAGE.to("meta"), "synthetic": IMAGE.to("meta")},
        ValueError,
        "refined must be on the device of fake_logits, cpu, got meta",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "real_features": FEATURES[0]},
        ValueError,
        "real_features must be (N, C, H, W), got (5, 3, 4)",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "fake_features": FEATURES[:, :3]},
        ValueError,
        "fake_features must have the 5 channels of real_features, got (8, 3, 3, 4)",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "weight": HEAD[:1]},
        ValueError,
        "weight must be (2, 5, 1, 1) for kind='softmax', got (1, 5, 1, 1)",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "bias": torch.zeros(3)},
        ValueError,
        "bias must be (2,) for kind='softmax', got (3,)",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "weight": HEAD.double()},
        TypeError,
        "weight must have the dtype of real_features, torch.float32, got torch.float64",
    ),
]


@isa_independent
@pytest.mark.parametrize(("op", "arguments", "kind", "message"), ERRORS)
def test_one_clear_error(op, arguments, kind, message):
    common.check_error(getattr(fastda, op), arguments, kind, f"{op}: {message}")


@native
@isa_independent
def test_raw_operators_refuse_what_does_not_fit():
    """Called past the public functions, they check before they touch memory."""
    raw, pair, score, image = (
        torch.ops.fastda,
        torch.zeros(2, 2, 3, 4),
        torch.zeros(2, 1, 3, 4),
        torch.zeros(5),
    )
    features = torch.zeros(2, 3, 4, 5)
    for call in (
        lambda: raw.patch_generator_loss(score, None, "softmax", "mean", True),
        lambda: raw.patch_generator_loss(pair[0], None, "softmax", "mean", True),
        lambda: raw.patch_generator_loss(pair.long(), None, "softmax", "mean", True),
        lambda: raw.patch_generator_loss(pair, pair, "softmax", "mean", True),
        lambda: raw.patch_generator_loss(pair, score.double(), "softmax", "mean", True),
        lambda: raw.patch_discriminator_loss(
            pair, pair.double(), None, None, "softmax", "mean", 0.0, True, True
        ),
        lambda: raw.patch_loss_map(image, None, "softmax", True, 0.0, True),
        lambda: raw.self_regularization(image, image[:4], None, 1.0, "mean", True, True),
        lambda: raw.self_regularization(image, image.double(), None, 1.0, "mean", True, True),
        lambda: raw.patch_head_discriminator_loss(
            features, features, torch.zeros(2, 4, 1, 1), None, "softmax", "mean", 0.0, True, True, True
        ),
        lambda: raw.patch_head_discriminator_loss(
            features,
            features,
            torch.zeros(2, 3, 1, 1),
            torch.zeros(1),
            "softmax",
            "mean",
            0.0,
            True,
            True,
            True,
        ),
        lambda: raw.patch_generator_loss(pair, None, "Softmax", "mean", True),
        lambda: raw.patch_generator_loss(pair, None, "softmax", "none", True),
        lambda: raw.patch_loss_scale_(image.half(), image, torch.tensor(2.0)),
    ):
        with pytest.raises(RuntimeError, match="must"):
            call()
