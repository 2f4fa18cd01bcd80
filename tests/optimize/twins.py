"""What the tests of served norms and pairs share: norms, optimized twins, a whole training step of each."""

import copy

import torch
from torch import nn

import fastda
from tests.optimize.helpers import outcome


def without_bias():
    """As BatchNorm2d(4, bias=False), which torch 2.11 does not know yet."""
    layer = nn.BatchNorm2d(4)
    layer.bias = None
    return layer


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, plain": lambda: nn.BatchNorm2d(4, affine=False),
    "batch, no bias": without_bias,
    "batch, average": lambda: nn.BatchNorm2d(4, momentum=None, eps=1e-3),
    "batch, untracked": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(4),
    "instance, affine": lambda: nn.InstanceNorm2d(4, affine=True, eps=1e-3),
}


class Own(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


def twins(*layers, dtype=torch.float64):
    """A Sequential optimized, its original and the report; parameters and buffers as after a training."""
    torch.manual_seed(0)
    original = nn.Sequential(*layers).to(dtype)
    for name, t in original.state_dict().items():
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5 if name.endswith("var") else -0.5, 1.5)
    model = copy.deepcopy(original)
    return model, original, fastda.optimize(model)


def image(*shape, dtype=torch.float64, layout=torch.contiguous_format):
    x = torch.randn(*(shape or (2, 4, 6, 5)), dtype=dtype, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=layout).requires_grad_()


def step(model, x):
    """All that a training step with a gradient penalty computes."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).requires_grad_()
    first = torch.autograd.grad(y, wanted, weights, create_graph=True)
    second = torch.autograd.grad(
        sum(g.pow(3).sum() for g in first), [*wanted, weights], materialize_grads=True
    )
    state = [t.clone() for t in model.state_dict().values()]
    return [y, *first, *second, *state], (y.stride(), first[0].stride(), y.requires_grad)


def assert_same(model, original, x):
    (got, facts), (expected, right) = step(model, x), step(original, x)
    assert facts == right
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def assert_same_or_raises_so(model, original):
    """As assert_same, in two dtypes; what the original refuses is refused in its words."""
    for dtype in (torch.float64, torch.float32):
        x = image(dtype=dtype)
        got, expected = (outcome(lambda m=m, x=x: step(m, x)) for m in (model, original))
        if isinstance(expected[0], type):
            assert got == expected
            continue
        assert got[1] == expected[1]
        bounds = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
        for a, b in zip(got[0], expected[0], strict=True):
            torch.testing.assert_close(a, b, **bounds)
