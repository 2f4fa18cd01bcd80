"""What the tests of every operator family share.

A call is the name of a public function and a dict of its arguments; the tensors in it that require grad are
those whose gradients are compared. `draw` makes one from the operator's entry in `fastda.tools.verify`.
"""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

import fastda
from fastda import backend, recipes, reference, registry
from fastda.testing import assert_matches
from fastda.tools import verify

F64 = torch.float64
needs_node = pytest.mark.skipif(
    backend.autograd_module is None, reason=f"no C++ autograd module: {backend.autograd_error}"
)
needs_recipes = pytest.mark.skipif(
    bool(recipes.missing()), reason=f"not installed: {', '.join(recipes.missing())}"
)
both_routes = pytest.mark.usefixtures("route")


def draw(op, sizes, dtype=F64, seed=0, **options):
    """Random arguments of `op` in `dtype`, gradients wanted of all that `verify` compares."""
    (operator,) = [o for o in registry.OPERATORS if o.name == op]
    arguments, names = verify.draw_arguments(operator, options, sizes, dtype, seed)
    arguments = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    return {n: v.requires_grad_() if n in names else v for n, v in arguments.items()}


def wanted(arguments):
    return [n for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]


def results(function, arguments, seed=0):
    """Outputs by "value", "value 1", …, and gradients, under random output gradients, by argument."""
    return verify.evaluate(function, arguments, wanted(arguments), seed)


def assert_same_bits_with_threads(function, arguments, counts=(1, 2, 3)):
    """Every output and gradient, with each of these numbers of threads in turn."""
    threads, runs = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            runs.append(results(function, arguments))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for what, value in runs[0].items():
            assert torch.equal(run[what], value), what


def assert_results(op, actual, expected, dtype=None):
    """Every output and gradient within the tolerance of `op`."""
    assert actual.keys() == expected.keys()
    for what in expected:
        assert_matches(op, what.split()[0], actual[what], expected[what], dtype)


def in_float64(arguments):
    def widen(v):
        if not isinstance(v, Tensor) or not v.is_floating_point():
            return v
        return v.detach().to(F64).requires_grad_(v.requires_grad)

    return {name: widen(value) for name, value in arguments.items()}


def check_against_reference(op, arguments, function=None):
    """Values and gradients against the reference in float64."""
    expected = results(getattr(reference, op), in_float64(arguments))
    assert_results(op, results(function or getattr(fastda, op), arguments), expected)


def compiled(function, backend="inductor", **options):
    """`function` under torch.compile(fullgraph=True), and a counter whose frame_count counts compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def check_compiled(op, arguments, function=None, backend="inductor", **options):
    """Compiled once, with eager's values and gradients, in training and without gradients."""
    function = function or getattr(fastda, op)
    fast, counter = compiled(function, backend, **options)
    for seed in range(2):
        assert_results(op, results(fast, arguments, seed), results(function, arguments, seed))
    assert counter.frame_count == 1
    with torch.no_grad():
        out, expected = fast(**arguments), function(**arguments)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (out, expected)), strict=True):
        assert_matches(op, "value", a, b)


def check_gradients(op, arguments, function=None, second=True):
    """gradcheck and gradgradcheck; `arguments` in float64, clear of points where a gradient jumps.

    gradcheck's numbers come from differences of values, so neither is for a reversal, whose gradient is not
    the derivative of its value.
    """
    function, names = function or getattr(fastda, op), wanted(arguments)

    def call(*tensors):
        out = function(**{**arguments, **dict(zip(names, tensors, strict=True))})
        return tuple(o for o in out if o.requires_grad) if isinstance(out, tuple) else out

    tensors = [arguments[n].detach().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, tensors)
    if second:
        assert torch.autograd.gradgradcheck(call, tensors)


def check_opcheck(raw, *arguments):
    """torch.library.opcheck of a raw operator, `torch.ops.fastda.<raw>`.

    Autograd stands outside the raw operators, so inputs don't require grad.
    """
    torch.library.opcheck(getattr(torch.ops.fastda, raw).default, arguments)


def check_transforms(op, arguments, function=None, compile=True):
    """torch.func's grad, vmap, jvp and hessian, plain and under torch.compile, against eager double backward.

    `arguments` in float64 and small, for the hessian of the first tensor is formed.
    """
    function, names = function or getattr(fastda, op), wanted(arguments)
    tensors = tuple(arguments[n].detach() for n in names)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    batch = tuple(torch.stack([t, t + 0.01 * torch.randn_like(t)]) for t in tensors)
    every = tuple(range(len(names)))

    def scalar(called, *tensors):
        out = called(**{**arguments, **dict(zip(names, tensors, strict=True))})
        out = out[0] if isinstance(out, tuple) else out
        weight = torch.arange(1, out.numel() + 1, dtype=F64, device=out.device).view(out.shape) / out.numel()
        return (weight * (out + out.square())).sum()

    def f(*tensors):
        return scalar(function, *tensors)

    def gradients(*tensors):
        tensors = tuple(t.detach().requires_grad_() for t in tensors)
        return torch.autograd.grad(scalar(getattr(reference, op), *tensors), tensors, materialize_grads=True)

    def hessian():
        x = tensors[0].clone().requires_grad_()
        (g,) = torch.autograd.grad(scalar(getattr(reference, op), x, *tensors[1:]), x, create_graph=True)
        rows = [torch.autograd.grad(e, x, retain_graph=True, materialize_grads=True)[0] for e in g.flatten()]
        return torch.stack(rows).view(*x.shape, *x.shape)

    expected = gradients(*tensors)
    per_sample = [gradients(*(t[i] for t in batch)) for i in range(2)]
    grad, vmap, jvp = torch.func.grad, torch.func.vmap, torch.func.jvp
    cases = {
        "grad": (grad(f, every), tensors, expected),
        "vmap": (vmap(f), batch, torch.stack([f(*(t[i] for t in batch)) for i in range(2)])),
        "vmap of grad": (vmap(grad(f, every)), batch, tuple(map(torch.stack, zip(*per_sample, strict=True)))),
        "jvp": (
            lambda *t: jvp(f, t, tangents)[1],
            tensors,
            sum((g * t).sum() for g, t in zip(expected, tangents, strict=True)),
        ),
        "hessian": (torch.func.hessian(f), tensors, hessian()),
    }
    for name, (transformed, inputs, right) in cases.items():
        ways = {"eager": transformed}
        if compile:
            ways["compiled"] = compiled(transformed, "aot_eager")[0]
        for way, call in ways.items():
            got = tree_map(torch.Tensor.detach, call(*inputs))

            def message(text, where=f"{op}, {name}, {way}"):
                return f"{where}: {text}"

            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-11, msg=message)


def check_error(function, arguments, error, message):
    """`function(**arguments)` raises `error` and says exactly `message`."""
    try:
        function(**arguments)
    except error as raised:
        assert str(raised) == message
    else:
        raise AssertionError(f"no {error.__name__}: {message}")
