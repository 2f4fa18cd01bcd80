"""Every spelling of a backward that somebody may write, with every kind of scale."""

import numpy
import pytest
import torch
from torch import nn
from torch.autograd import Function

import fastda
from tests.optimize.checking import served

FACTORS = (
    *("g.neg() * s", "-g * s", "-(g * s)", "(g * s).neg()", "g.neg().mul(s)", "g * -s", "-s * g", "s * -g"),
    *(
        "s * g.neg()",
        "-(s * g)",
        "-1 * g * s",
        "g * s * -1",
        "-1.0 * s * g",
        "g * (-1 * s)",
        "g.clone() * -s",
    ),
    *(
        "g.clone() * s",
        "s * g.clone()",
        "-s * g.clone()",
        "-g.clone() * s",
        "g * s",
        "s * g",
        "-(-g * s)",
        "-g",
    ),
    *(
        "g.neg().neg() * s",
        "g * s * s",
        "-g * s * s",
        "g / s",
        "-g / s",
        "-g * s + 0",
        "-g - s",
        "s - g",
        "g - s",
    ),
    *(
        "g.neg() * s * 1",
        "g * -1",
        "g * -1 * -1 * s",
        "g.abs() * s",
        "-g.T.T * s",
        "-g.detach() * s",
        "g.neg() ** s",
    ),
    *(
        "g.mul(-s)",
        "g.mul(s).neg()",
        "-g.mul(s)",
        "-g.view_as(g) * s",
        "g.neg().neg_() * s",
        "+g * s",
        "g.real * -s",
    ),
)
PLACES = {
    "ctx.s": "return {}, None",
    "ctx.scale": "return {}, None",
    "s": "s = ctx.s\n y = {}\n return y, None",
    "saved": "(s,) = ctx.saved_tensors\n return {}, None",
    "saved last": "_, s = ctx.saved_tensors\n return {}, None",
    "saved first": "s, _ = ctx.saved_tensors\n return {}, None",
    "0.3": "return {}, None",
    "-0.3": "return {}, None",
    "2": "return {}, None",
    "-1.0": "return {}, None",
}
SCALES = (
    *(0.3, -0.7, 0, 2, True, 0.0, -1.0, numpy.float64(0.3), numpy.float32(0.3), numpy.int64(2)),
    *(torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[[0.3]]]), torch.tensor([0.5, 1.0, -2.0])),
    *(torch.tensor(2), torch.tensor(True), torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.3j)),
)


def function(expression, place):
    """A Function whose backward is that expression, the scale in that place."""
    frame = PLACES[place]
    name = "s" if place == "s" or place.startswith("saved") else place
    written = expression.replace("neg", "NEG").replace("abs", "ABS").replace("as(", "AS(")
    written = written.replace("detach", "DETACH").replace("s", name)
    for word in ("NEG", "ABS", "AS(", "DETACH"):
        written = written.replace(word, word.lower())
    scope = {}
    exec("def backward(ctx, g):\n " + frame.format(written), scope)

    class Written(Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.s = ctx.scale = scale
            saved = (scale,) if place == "saved" else (x, scale) if place == "saved last" else (scale, x)
            if place.startswith("saved"):
                ctx.save_for_backward(*saved)
            return x.view_as(x)

        backward = staticmethod(scope["backward"])

    class Model(nn.Module):
        def forward(self, x, scale):
            return Written.apply(x, scale)

    return Model()


def gradient(model, scale):
    x = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, -1.5]], requires_grad=True)
    v = torch.tensor([[0.5, -1.0, 2.0], [0.3, 7.0, -0.1]], requires_grad=True)
    try:
        (first,) = torch.autograd.grad(model(x, scale), x, v, create_graph=True)
        second = torch.autograd.grad(first.abs().sum(), v, allow_unused=True) if first.requires_grad else None
    except Exception as error:
        return type(error).__name__
    return first.detach(), second


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, 0, 0, equal_nan=True)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.isa_independent
@pytest.mark.parametrize("place", PLACES)
def test_every_spelling_keeps_its_gradient(place):
    served_of = {}
    for expression in FACTORS:
        model = function(expression, place)
        scales = [s for s in SCALES if isinstance(s, torch.Tensor) or not place.startswith("saved")]
        expected = [gradient(model, scale) for scale in scales]
        report = fastda.optimize(model)
        try:
            for scale, right in zip(scales, expected, strict=True):
                got = gradient(model, scale)
                assert same(got, right), (
                    f"{expression}, {place}, {scale!r}: got {got}, expected {right}\n{report}"
                )
            served_of[expression] = served(report)
        finally:
            report.undo()
    # A constant that is an integer, and the first of two saved tensors, are none of the written forms.
    if place not in ("2", "-1.0", "saved first"):
        assert served_of["g.neg() * s"] > 0
        assert served_of["-g * s"] > 0
    assert served_of["-g * s * s"] == served_of["g.abs() * s"] == served_of["-(-g * s)"] == 0
