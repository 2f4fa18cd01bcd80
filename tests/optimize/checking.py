"""How a model is held against a twin that fastda.optimize never saw.

`check` is what every adversarial case goes through; `compare` is one call of both twins: outputs, input and
parameter gradients, second derivatives, errors, what was printed, and the state that the call leaves behind.
"""

import contextlib
import io
import re
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fastda

# Words of the machinery, which say nothing to a user.
JARGON = re.compile(r"LOAD_|STORE_|getitem|has no '|native_batch_norm|Traceback|0x[0-9a-f]{6}|_fastda_")


def served(report):
    """How many calls fastda has served so far."""
    return sum(calls.served for calls in report.calls().values())


# -- one call ------------------------------------------------------------------------------------------------


def _plain(message):
    """An error's message without the names of classes and addresses, which may be the replacement's."""
    return re.sub(
        r"0x[0-9a-f]+|\w*Backward\w*|(?<=Output 0 of )\w+|version \d+|\w+\.(forward|__call__)(?=\(\))",
        "",
        str(message),
    )


def _differentiated(t):
    return isinstance(t, Tensor) and t.requires_grad and (t.is_floating_point() or t.is_complex())


class Outcome:
    """What one call does. `parts` are named values: tensors are compared as numbers, all else by ==."""

    def __init__(self, model, inputs, *, call=None, gradient=1.0, second=True, seed=0):
        self.parts = {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self._run(model, inputs, call or (lambda model, *inputs: model(*inputs)), gradient, second)
            except Exception as problem:
                self.parts["error"] = type(problem).__name__, _plain(problem)
            self.parts["random state"] = torch.get_rng_state()
        self.parts["printed"] = printed.getvalue()
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor):
                self.parts[f"state {name}"] = value.detach().clone()
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, (int, float, str, list, tuple)) and not name.startswith("_"):
                    self.parts[f"attribute {path}.{name}"] = repr(value)

    def _run(self, model, inputs, call, gradient, second):
        inputs = [self._fresh(i) for i in inputs]
        given = [i for i in inputs if isinstance(i, Tensor)]
        kept = [i.detach().clone() for i in given]
        result = call(model, *inputs)
        leaves, form = tree_flatten(result)
        self.parts["structure"] = str(form)
        outputs = [t for t in leaves if isinstance(t, Tensor)]
        self.parts["other results"] = [r for r in leaves if not isinstance(r, (Tensor, nn.Module))]
        for i, y in enumerate(outputs):
            self.parts[f"output {i}"] = y.detach().clone()
            facts = (y.dtype, y.requires_grad, y.is_leaf, y.stride(), type(y).__name__)
            shared = [y.layout == x.layout == torch.strided and _shares(y, x) for x in given]
            self.parts[f"facts {i}"] = facts, shared, y.shape
        for i, (x, before) in enumerate(zip(given, kept, strict=True)):
            self.parts[f"input {i} afterwards"] = x.detach().clone()
            self.parts[f"input {i} before"] = before
        # As code behind the call may do, to an output that is no leaf of its own.
        outputs = [y for y in outputs if _differentiated(y)]
        wanted = {f"input {i}": x for i, x in enumerate(inputs) if _differentiated(x) and x.is_leaf}
        wanted |= {n: p for n, p in model.named_parameters() if p.requires_grad}
        if outputs and wanted:
            self._gradients(outputs, wanted, gradient, second)

    def _gradients(self, outputs, wanted, gradient, second):
        weights = [_weights(y, gradient).requires_grad_() for y in outputs]
        names, leaves = list(wanted), list(wanted.values())
        options = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(
            outputs, leaves, weights, retain_graph=second, create_graph=False, **options
        )
        self.parts |= {f"gradient of {n}": g.detach().clone() for n, g in zip(names, grads, strict=True)}
        if not second:
            return
        try:
            grads = torch.autograd.grad(outputs, leaves, weights, create_graph=True, **options)
            total = sum((g * _weights(g, 1.0)).sum() + g.square().sum() for g in grads if g.requires_grad)
            if isinstance(total, Tensor):
                leaves, names = [*leaves, *weights], [*names, *(f"weight {i}" for i in range(len(weights)))]
                grads = torch.autograd.grad(total, leaves, **options)
                for n, g in zip(names, grads, strict=True):
                    self.parts[f"second derivative of {n}"] = g.detach().clone()
        except Exception as problem:
            self.parts["second derivative"] = type(problem).__name__

    @staticmethod
    def _fresh(value):
        if not isinstance(value, Tensor):
            return value
        fresh = value.detach().clone()
        return fresh.requires_grad_() if value.requires_grad else fresh

    def difference(self, expected, tolerance):
        """Words for the first difference; None where there is none."""
        if self.parts.keys() != expected.parts.keys():
            only = self.parts.keys() ^ expected.parts.keys()
            return f"{sorted(only)}: got {self._short(only)}, expected {expected._short(only)}"
        for name, right in expected.parts.items():
            # What cancels to nothing is as exact as what it is a difference of.
            group = [v for n, v in expected.parts.items() if n.split(" of ")[0] == name.split(" of ")[0]]
            if text := _difference(self.parts[name], right, tolerance, 1e-11 * max(map(_size, group))):
                return f"{name}: {text}"
        return None

    def _short(self, names):
        return {n: v for n, v in self.parts.items() if n in names and not isinstance(v, Tensor)}


def _shares(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def _weights(y, gradient):
    """A fixed output gradient; its entries differ in size and in sign."""
    steps = torch.arange(1, y.numel() + 1, dtype=torch.float64, device=y.device).view(y.shape)
    weights = (0.3 + steps / max(y.numel(), 1)) * torch.where(steps % 3 == 0, -1.0, 1.0)
    factor = torch.where(steps % 4 == 0, torch.nan, 1.0) if gradient == "nan" else gradient
    return (weights * factor).to(y.dtype)


def _size(value):
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        return 0.0
    finite = value[value.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _difference(actual, right, tolerance, absolute):
    if not isinstance(right, Tensor):
        return None if actual == right else f"got {str(actual)[:300]}, expected {str(right)[:300]}"
    if actual.shape != right.shape or actual.dtype != right.dtype:
        return f"got {actual.dtype} {tuple(actual.shape)}, expected {right.dtype} {tuple(right.shape)}"
    if not (right.is_floating_point() or right.is_complex()):
        return None if torch.equal(actual, right) else "differs"
    a, r = (t.detach().to_dense().resolve_neg() for t in (actual, right))
    finite = r.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(
        a[~finite].nan_to_num(), r[~finite].nan_to_num()
    ):
        return "NaN or infinities in other places"
    a, r = a[finite], r[finite]
    if r.numel() == 0:
        return None
    off, size = (a - r).abs().max().item(), r.abs().max().item()
    return (
        None
        if off <= tolerance * size + absolute + 1e-13
        else f"differs by {off:.3g} where the largest is {size:.3g}"
    )


def assert_same(got, expected, where, tolerance=1e-9):
    """Fail where the two calls did different things."""
    if text := got.difference(expected, tolerance):
        pytest.fail(f"{where}: {text}", pytrace=False)


def compare(model, original, inputs, where, *, tolerance=1e-9, **options):
    """One call of both; `original` must not share what optimize exchanges (a Function, a class)."""
    assert_same(Outcome(model, inputs, **options), Outcome(original, inputs, **options), where, tolerance)


# -- one case ------------------------------------------------------------------------------------------------


def _names(module):
    return [type(m).__name__ for m in module.modules()]


def _snapshot(model):
    """All that `optimize` must leave as it was, whatever it decides."""
    flags = [(p.requires_grad, p._version, p.grad is None, id(p)) for p in model.parameters()]
    state = {n: v.detach().clone() for n, v in model.state_dict().items() if isinstance(v, Tensor)}
    return flags, [m.training for m in model.modules()], torch.get_rng_state(), state


def _assert_untouched(model, before):
    flags, training, random_state, state = _snapshot(model)
    assert flags == before[0], "parameters were touched"
    assert training == before[1], "training or evaluation mode was left changed"
    assert torch.equal(random_state, before[2]), "random numbers were drawn"
    assert state.keys() == before[3].keys()
    for name, value in state.items():
        if not value.is_meta:
            assert torch.equal(value, before[3][name]), f"optimize changed {name}"


def check(case, monkeypatch, **settings):
    """One adversarial case: as its author has it, then anew from optimize to undo.

    What is expected is computed first, with a model of its own and nothing optimized: a Function or a class
    that the two share could otherwise be wrong in both.
    """
    vars(case).update(settings)
    scope = vars(sys.modules[type(case).__module__])
    options = {"call": case.call, "gradient": case.gradient, "second": case.second}

    def calls(model, inputs):
        return [Outcome(model, each, **options) for each in inputs]

    def equal(got, expected, where):
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same(a, b, f"call {i} {where}", case.tolerance)

    original = case.made()
    before = calls(original, case.before(original))
    with monkeypatch.context() as patches:
        case.everywhere(patches)
        case.change(original)
        with case.around():
            after, undone = (calls(original, case.inputs()) for _ in range(2))

    model = case.made()
    types, snapshot, names = _names(model), _snapshot(model), set(scope)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        report = fastda.optimize(model)
    try:
        text = str(report)
        assert said.getvalue() == "", "optimize ran the author's code for all to hear"
        assert set(scope) == names, "names were put among the user's globals"
        assert all(entry.what.strip() for entry in (*report.replaced, *report.left))
        assert not JARGON.search(text), text
        assert _names(model) == types
        _assert_untouched(model, snapshot)
        equal(calls(model, case.before(model)), before, f"with nothing changed\n{text}")
        if case.served:
            assert served(report), f"nothing was served: {text}"
        elif case.why and not report.replaced:
            told = any(re.search(case.why, entry.what, re.IGNORECASE) for entry in report.left)
            assert told, f"no word about {case.why}: {text}"
        with monkeypatch.context() as patches:
            case.everywhere(patches)
            case.change(model)
            with case.around():
                where = f"after the change, {served(report)} calls served before it\n{text}"
                equal(calls(model, case.inputs()), after, where)
                if case.undoes:
                    report.undo()
                else:
                    with pytest.raises(RuntimeError, match=r"^undo: .* was changed after fastda\.optimize"):
                        report.undo()
                equal(calls(model, case.inputs()), undone, "after undo")
    finally:
        with contextlib.suppress(RuntimeError):
            report.undo()
