"""What `fastda.optimize` tells about its work, and what takes that back and measures it."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastda.optimize.reversal import Reversal
from fastda.optimize.stand_in import Change, Found, StandIn


class Entry(NamedTuple):
    """One line of a report: the module's path in the model, its own class, what was done or why not."""

    path: str
    type: str
    what: str


class Calls(NamedTuple):
    """How many calls of a replaced module were served, and how many there were."""

    served: int
    total: int

    def __str__(self) -> str:
        return f"served {self.served} of {self.total} calls"


class Measurement(NamedTuple):
    """The original's time over the optimized model's, and the relative ℓ₂ errors between the two.

    The intervals, (low, high), hold the ratio with 95 %.
    """

    forward: float
    step: float | None
    value_error: float
    gradient_error: float | None
    forward_interval: tuple[float, float]
    step_interval: tuple[float, float] | None

    def __str__(self) -> str:
        def speed(ratio: float, interval: tuple[float, float]) -> str:
            gained = "" if interval[0] > 1 else ", nothing gained"
            return f"{ratio:.2f}× ({interval[0]:.2f} … {interval[1]:.2f}{gained})"

        text = f"{speed(self.forward, self.forward_interval)} forward"
        errors = f"values differ by {self.value_error:.1e}"
        if self.step is not None and self.step_interval is not None:
            text += f", {speed(self.step, self.step_interval)} forward + backward"
            errors += f", gradients by {self.gradient_error:.1e}"
        return f"{text}; {errors}"


@dataclass(repr=False)
class Report:
    """What `fastda.optimize` did to `model`; printing it shows all of it, neighbours alike in one line.

    replaced: what is served by fastda now.
    left: what looked like a candidate and was left alone, with the reason.
    """

    model: nn.Module
    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    _entries: list[Entry] = field(default_factory=list)
    _changes: list[tuple[str, Change]] = field(default_factory=list)

    def add(self, path: str, module: nn.Module, found: Found) -> None:
        """Install what was found in a module, or note why there is nothing."""
        entry = Entry(path, type(module).__name__, found.what)
        if found.change is None:
            self.left.append(entry)
        else:
            found.change.install()
            self._changes.append((path, found.change))
            self.replaced.append(entry)
        self._entries.append(entry)

    def undo(self) -> None:
        """Make `model` what it was. Raises RuntimeError where a replaced module was changed again since."""
        for path, change in self._changes:
            if problem := change.problem():
                raise RuntimeError(f"undo: {path or 'the model'}: {problem}")
        for _, change in self._changes:
            change.remove()
        self._changes.clear()
        self.replaced.clear()
        self._entries = list(self.left)

    def calls(self) -> dict[str, Calls]:
        """By path of a replaced module: how many calls since optimize were served, of how many.

        A call is one of torch's layer; for a gradient reversal it is one of the Function's backward,
        whichever module it is for. What torch.compile has compiled is not counted.
        """
        calls: dict[str, Calls] = {}
        for path, change in self._changes:
            before = calls.get(path, Calls(0, 0))
            calls[path] = Calls(before.served + change.served, before.total + change.calls)
        return calls

    def measure(self, *inputs: Any, rounds: int = 20, seed: int = 0) -> Measurement:
        """Time `model(*inputs)` against what it was before, in turn in one process, on copies of both.

        The step is forward and backward of the sum of all outputs. Short calls are repeated until they take
        5 ms. The model's mode (train or eval) is taken as it is; both start from the same random state, so
        that dropout compares too.
        """
        models = {"fastda": copy.deepcopy(self.model), "original": copy.deepcopy(self.model)}
        for module in models["original"].modules():
            for value in list(vars(module).values()):
                if isinstance(value, StandIn):
                    value.remove()
        # What is replaced in a Function is replaced for both.
        around: dict[str, Callable[[], Any]] = {"fastda": contextlib.nullcontext, "original": Reversal.paused}

        # Only who measures waits for the statistics.
        from fastda import timing

        def ratio(function: Callable[[nn.Module], object]) -> timing.Ratio:
            def call(name: str) -> None:
                with around[name]():
                    function(models[name])

            samplers = {name: timing.timed(functools.partial(call, name)) for name in models}
            samples = timing.interleave(samplers, rounds=rounds, seed=seed)
            return timing.compare(samples["original"], samples["fastda"])

        with torch.random.fork_rng():
            results = []
            for name, model in models.items():
                torch.manual_seed(seed)
                with around[name]():
                    results.append(_step(model, inputs))
            (values, gradients), (expected, expected_gradients) = results
            with torch.no_grad():
                forward = ratio(lambda model: model(*inputs))
            step = ratio(lambda model: _step(model, inputs)) if gradients else None
        gradient_error = _error(gradients, expected_gradients) if gradients else None
        return Measurement(
            forward.ratio,
            step and step.ratio,
            _error(values, expected),
            gradient_error,
            forward[1:],
            step and step[1:],
        )

    def __str__(self) -> str:
        name = type(self.model).__name__
        lines = [f"fastda.optimize({name}): {len(self.replaced)} replaced, {len(self.left)} left"]
        left = {id(entry) for entry in self.left}
        for title, is_left in (("replaced", False), ("left as it was", True)):
            rows = []
            for key, group in itertools.groupby(self._entries, lambda e: (id(e) in left, e.type, e.what)):
                paths = [entry.path or "(the model)" for entry in group]
                where = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]} ({len(paths)})"
                if key[0] == is_left:
                    rows.append((where, *key[1:]))
            if rows:
                first, second = (max(len(row[i]) for row in rows) for i in range(2))
                lines += [
                    title,
                    *(f"  {where:<{first}}  {kind:<{second}}  {what}" for where, kind, what in rows),
                ]
        return "\n".join(lines)

    __repr__ = __str__


def _step(model: nn.Module, inputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of their sum for those inputs and parameters that want one."""
    outputs = [t for t in torch.utils._pytree.tree_leaves(model(*inputs)) if isinstance(t, Tensor)]
    wanted = [t for t in (*inputs, *model.parameters()) if isinstance(t, Tensor) and t.requires_grad]
    losses = [t for t in outputs if t.requires_grad]
    if not (wanted and losses):
        return outputs, []
    ones = [torch.ones_like(t) for t in losses]
    gradients = torch.autograd.grad(losses, wanted, ones, allow_unused=True, materialize_grads=True)
    return outputs, list(gradients)


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The relative ℓ₂ error of all together: a gradient that is nothing but rounding does not count alone."""
    from fastda import testing

    a, e = (torch.cat([t.flatten().cpu().double() for t in tensors]) for tensors in (actual, expected))
    error = testing.error(a, e)
    return error.relative_l2 if error.nonfinite_equal else float("inf")
