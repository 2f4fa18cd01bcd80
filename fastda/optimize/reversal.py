"""Gradient reversal in a model that exists: the backward of the `autograd.Function`s that its code refers to.

Of a Function's code the one expression is replaced that makes two passes over the gradient where one does:
−g · s is g · (−s), bit for bit. Whatever else its author wrote runs as before: forward with its defaults and
copies, what it keeps and when it is read, helpers, schedules. Nothing is inferred: the bytecode of backward
is, instruction by instruction, that of one of the forms below, or it is left.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd import Function

from fastda.optimize.stand_in import Change, Found

# The written forms: `g` is the gradient, `s` the scale; attributes of ctx and numbers may be any.
_TWO_PASSES = (
    *("g.neg() * s", "-g * s", "(g * s).neg()", "-(g * s)", "g.neg().mul(s)", "g.mul(s).neg()", "-g.mul(s)"),
    *(
        "g * -1 * s",
        "g * s * -1",
        "g * -1.0 * s",
        "g * s * -1.0",
        "g.clone() * -s",
        "-1 * g * s",
        "-1.0 * g * s",
    ),
    *("s * g.neg()", "s * -g", "-(s * g)", "(s * g).neg()", "s * g * -1", "s * g * -1.0", "-s * g.clone()"),
)
_ONE_PASS = (
    "g * -s",
    "-s * g",
    "g * s",
    "s * g",
    "g.mul(-s)",
    "g.mul(s)",
    "-g",
    "g.neg()",
    "g * -1",
    "-1 * g",
)
_KNOWN = frozenset(("neg", "mul", "clone", "saved_tensors", "needs_input_grad"))
_RETURNS = ("return {}", "y = {}\nreturn y")
_ASKS = "if ctx.needs_input_grad[0]:\n y = {}\nreturn y"
_FRAMES = {
    "ctx.s": _RETURNS,
    "0.5": _RETURNS,
    "s": (
        *(f"s = ctx.s\n{returns}" for returns in _RETURNS),
        *(f"s, = ctx.saved_tensors\n{returns}" for returns in _RETURNS),
        *(f"_, s = ctx.saved_tensors\n{returns}" for returns in _RETURNS),
        f"y = None\ns, = ctx.saved_tensors\n{_ASKS}",
        f"y = None\n_, s = ctx.saved_tensors\n{_ASKS}",
        f"s, = ctx.saved_tensors\ny = None\n{_ASKS}",
        f"_, s = ctx.saved_tensors\ny = None\n{_ASKS}",
    ),
}


class _Form(NamedTuple):
    """A written backward.

    passes: over the gradient.
    saved: how many tensors it takes from ctx.saved_tensors, of which the last is the scale.
    asks: whether it looks at ctx.needs_input_grad first.
    gradient_first: whether the gradient is the left operand, so that a NumPy number stays a number.
    negates_scale: whether the minus is the scale's.
    nones: how many None it returns behind the product.
    """

    passes: int
    saved: int
    asks: bool
    gradient_first: bool
    negates_scale: bool
    nones: int


class _Code(NamedTuple):
    """Instructions without what may differ in them, and that: attributes of ctx, and floats."""

    instructions: tuple[Any, ...]
    attributes: frozenset[str]
    floats: tuple[float, ...]


def _read(code: types.CodeType) -> _Code:
    skipped = ("RESUME", "NOP", "CACHE", "EXTENDED_ARG", "PRECALL", "NOT_TAKEN")
    kept = [i for i in dis.get_instructions(code) if i.opname not in skipped]
    variables = {name: n for n, name in enumerate(code.co_varnames[: code.co_argcount])}
    found: list[tuple[Any, ...]] = []
    attributes, floats = set(), []
    for i in kept:
        name, value = i.opname.replace("_BORROW", ""), i.argval
        if "_FAST" in name:
            # A superinstruction stands for two; whether there is one depends on how lines are broken.
            pairs = zip(
                re.findall("[A-Z]+_FAST", name), value if isinstance(value, tuple) else (value,), strict=True
            )
            found += [(part, variables.setdefault(each, len(variables))) for part, each in pairs]
        elif i.opcode in dis.hasjrel or i.opcode in dis.hasjabs:
            found.append((name, sum(other.offset < value for other in kept)))
        elif name in ("LOAD_ATTR", "LOAD_METHOD") and value not in _KNOWN:
            attributes.add(value)
            found.append((name,))
        elif type(value) is float and value != -1:
            floats.append(value)
            found.append((name,))
        else:
            found.append((name.replace("LOAD_SMALL_INT", "LOAD_CONST"), type(value), value))
    return _Code(tuple(found), frozenset(attributes), tuple(floats))


@functools.cache
def _written() -> dict[Any, list[tuple[types.CodeType, _Form]]]:
    """All forms, as the Python that runs compiles them, by the names in them."""
    written: dict[Any, list[tuple[types.CodeType, _Form]]] = {}
    expressions = [*((2, e) for e in _TWO_PASSES), *((1, e) for e in _ONE_PASS)]
    for (passes, expression), place, nones in itertools.product(expressions, _FRAMES, range(4)):
        if place == "0.5" and "-s" in expression:
            continue  # where Python folds the sign into the number, it cannot be told from another's
        for frame in _FRAMES[place]:
            body = frame.format(re.sub(r"\bs\b", place, expression)) + ", None" * nones
            source = "def backward(ctx, g):\n" + textwrap.indent(body, " ")
            code = compile(source, "<form>", "exec").co_consts[0]
            saved = frame.count("saved_tensors") + frame.count("_, s")
            first = expression.lstrip("-(1.0* ").startswith("g")
            form = _Form(passes, saved, "needs_input_grad" in frame, first, "-s" in expression, nones)
            written.setdefault(_names(code), []).append((code, form))
    return written


@functools.cache
def _forms(names: Any) -> dict[Any, _Form]:
    """By their instructions: the forms with these names. There are 1,700 in all, too many to read each."""
    return {_read(code).instructions: form for code, form in reversed(_written().get(names, []))}


def _names(code: types.CodeType) -> Any:
    return frozenset(code.co_names) & _KNOWN, code.co_nlocals


def find(module: nn.Module) -> Iterator[Found]:
    """What the reversing Functions are that the module's methods and attributes refer to."""
    for function in _functions(module):
        owner = next(c for c in function.__mro__ if "backward" in vars(c))
        method = vars(owner)["backward"]
        if not isinstance(method, staticmethod) or not isinstance(method.__func__, types.FunctionType):
            continue
        reversal = getattr(method.__func__, "reversal", None)
        if reversal is None:
            reversal = _recognised(owner, method.__func__)
        if isinstance(reversal, str):
            yield Found(f"{function.__name__} {reversal}")
        elif reversal is not None:
            what = f"gradient reversal {function.__name__} → one pass over the gradient, where it made two"
            yield Found(what, reversal)


def _recognised(owner: type, backward: types.FunctionType) -> Reversal | str | None:
    """What to put in place of a backward; or why nothing, if it looks like a reversal's."""
    code = backward.__code__
    if (
        backward.__closure__ is None
        and code.co_argcount == 2
        and not code.co_flags & 0xC
        and not backward.__defaults__
    ):
        read = _read(code)
        form = _forms(_names(code)).get(read.instructions)
        if form is not None and len(read.attributes) <= 1 and len(set(read.floats)) <= 1:
            if form.passes == 2:
                return Reversal(owner, backward, form, read)
            return "makes one pass over the gradient already; fastda.grad_reverse(x, scale) saves Python, too"
    written = list(_codes(inspect.unwrap(backward).__code__))  # below once_differentiable and the like
    names = {name for each in written for name in each.co_names}
    opnames = {i.opname for each in written for i in dis.get_instructions(each)}
    if names & {"neg", "neg_", "negative"} or "UNARY_NEGATIVE" in opnames:
        return (
            "has a backward that is none of the written forms of −scale · gradient; "
            "if it is meant as that: fastda.grad_reverse(x, scale)"
        )
    return None


class Reversal(Change):
    """The backward of a Function with one pass over the gradient. It is the Function's: for all its users."""

    _paused = False

    def __init__(self, owner: Any, original: types.FunctionType, form: _Form, read: _Code) -> None:
        self.owner, self.users = owner, 0
        self.before = vars(owner)["backward"]
        attribute = next(iter(read.attributes), "")
        constant: Any = read.floats[0] if read.floats else None
        nones = (None,) * form.nones
        code = original.__code__

        @functools.wraps(original)
        def backward(ctx: Any, grad: Any) -> Any:
            # Nothing was measured away from the CPU.
            if Reversal._paused or original.__code__ is not code or not getattr(grad, "is_cpu", False):
                self.count(False)
                return original(ctx, grad)
            scale: Any
            if form.saved == 0:
                scale = getattr(ctx, attribute, None) if attribute else constant
            elif form.saved == 1:
                (scale,) = ctx.saved_tensors
            else:
                _, scale = ctx.saved_tensors
            product = None
            if not form.asks or ctx.needs_input_grad[0]:
                factor = _negative(scale, form.gradient_first)
                if self.count(factor is not None):
                    product = grad * factor
                elif form.saved:  # never read twice: in a checkpoint that is an error
                    product = grad * -scale if form.negates_scale else -grad * scale
                else:
                    return original(ctx, grad)
            return (product, *nones) if nones else product

        backward.reversal = self  # type: ignore[attr-defined]
        self.after = staticmethod(backward)

    def install(self) -> None:
        self.users += 1
        self.owner.backward = self.after

    def remove(self) -> None:
        self.users -= 1
        if not self.users:
            self.owner.backward = self.before

    def problem(self) -> str | None:
        there = vars(self.owner).get("backward")
        name = f"{self.owner.__name__}.backward"
        return None if there is self.after else f"{name} was changed after fastda.optimize, to {there}"

    @staticmethod
    @contextlib.contextmanager
    def paused() -> Iterator[None]:
        """Every author's own backward runs meanwhile."""
        Reversal._paused = True
        try:
            yield
        finally:
            Reversal._paused = False


def _negative(scale: Any, gradient_first: bool) -> Any:
    """−scale, if that is exact, of scale's own type, and no pass over something large; else None."""
    if isinstance(scale, Tensor):
        fits = scale.numel() == 1 and scale.is_floating_point() and not scale.requires_grad
        return -scale if fits else None
    if type(scale) is int and abs(scale) < 1 << 53:
        return -float(scale)  # 0 becomes −0.0, whose products have the sign of −gradient
    if type(scale) is float or (
        gradient_first and isinstance(scale, float) and type(scale).__module__ == "numpy"
    ):
        return -scale
    return None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_foreign(value: Any) -> bool:
    """Whether a class, function or module is an author's: not torch's, fastda's or Python's own."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    package = (name or "").split(".")[0]
    return package not in ("torch", "fastda", "numpy") and package not in sys.stdlib_module_names


def _functions(module: nn.Module) -> list[type[Function]]:
    """The Functions that methods and attributes refer to, also through functions, classes and containers.

    This only looks for them: which one is replaced is decided by the Function itself.
    """
    found: dict[type[Function], None] = {}
    seen: set[int] = set()

    def visit(value: Any, names: frozenset[str] = frozenset(), depth: int = 6) -> None:
        """Look into what stands somewhere in the code; `names` are all that this code uses."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        inside: Iterable[Any] = ()
        if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            inside = (value.__self__, getattr(value, "__func__", None))
        elif isinstance(value, functools.partial):
            inside = (value.func, *value.args, *value.keywords.values())
        elif type(value) in (list, tuple):
            inside = value[:100]
        elif type(value) is dict:
            inside = itertools.islice(list(value.values()), 100)
        elif isinstance(value, (type, types.ModuleType, types.FunctionType)) and _is_foreign(value):
            if isinstance(value, type) and issubclass(value, Function):
                found[value] = None
            elif isinstance(value, types.FunctionType):
                names = frozenset(name for code in _codes(value.__code__) for name in code.co_names)
                cells = inspect.getclosurevars(value).nonlocals.values()
                used = (value.__globals__[name] for name in names & value.__globals__.keys())
                inside = (*used, *cells, value.__defaults__ or (), value.__kwdefaults__ or {})
            elif not (isinstance(value, type) and issubclass(value, nn.Module)):
                inner = vars(value)
                inside = [inner[name] for name in (names & inner.keys() if names else inner)]
        if depth and inside and id(value) not in seen:
            seen.add(id(value))
            for each in inside:
                visit(each, names, depth - 1)

    for base in type(module).__mro__:
        if _is_foreign(base):
            for value in list(vars(base).values()):
                visit(value)
    visit(dict(vars(module)))
    return list(found)
