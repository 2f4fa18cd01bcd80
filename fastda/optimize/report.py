"""What `fastda.optimize` tells about its work, and what takes that back and measures it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Entry(NamedTuple):
    """One line of a report: the module's path in the model, its own class, what was done or why not."""

    path: str
    type: str
    what: str


class Measurement(NamedTuple):
    """The original's time over the optimized model's, and the relative ℓ₂ errors between the two."""

    forward: float
    step: float | None
    value_error: float
    gradient_error: float | None

    def __str__(self) -> str:
        speed = f"{self.forward:.2f}× forward"
        errors = f"values differ by {self.value_error:.1e}"
        if self.step is not None:
            speed += f", {self.step:.2f}× forward + backward"
            errors += f", gradients by {self.gradient_error:.1e}"
        return f"{speed}; {errors}"


@dataclass(repr=False)
class Report:
    """What `fastda.optimize` did to `model`; printing it shows all of it.

    replaced: what is served by fastda now.
    left: what looked like a candidate and was left alone, with the reason.
    """

    model: nn.Module
    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    _changes: list[tuple[str, str, Any, Any]] = field(default_factory=list)

    def change(self, path: str, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a module (its `__class__`, mostly) so that `undo` can set it back."""
        self._changes.append((path, name, getattr(module, name), value))
        object.__setattr__(module, name, value)

    def undo(self) -> None:
        """Make `model` what it was. Raises RuntimeError where a replaced module was changed again since."""
        for path, name, _, now in self._changes:
            current = getattr(self.model.get_submodule(path), name)
            if current is not now:
                raise RuntimeError(
                    f"undo: {name} of {path or 'the model'} was changed after fastda.optimize, to {current}"
                )
        self._restore(self.model)
        self._changes.clear()
        self.replaced.clear()

    def _restore(self, model: nn.Module) -> None:
        for path, name, before, _ in reversed(self._changes):
            object.__setattr__(model.get_submodule(path), name, before)

    def measure(self, *inputs: Any, rounds: int = 20, seed: int = 0) -> Measurement:
        """Time `model(*inputs)` against what it was before, in turn in one process, on copies of both.

        The step is forward and backward of the sum of all outputs. The model's mode (train or eval) is taken
        as it is; both start from the same random state, so that dropout compares too.
        """
        from fastda import bench

        models = {"fastda": copy.deepcopy(self.model), "original": copy.deepcopy(self.model)}
        self._restore(models["original"])

        def ratio(call: Callable[[nn.Module], object]) -> float:
            calls = {name: functools.partial(call, model) for name, model in models.items()}
            samples = bench.interleave(
                {n: bench.timed(c) for n, c in calls.items()}, rounds=rounds, seed=seed
            )
            return bench.compare(samples["original"], samples["fastda"]).ratio

        with torch.random.fork_rng():
            results = []
            for model in models.values():
                torch.manual_seed(seed)
                results.append(_step(model, inputs))
            (values, gradients), (expected, expected_gradients) = results
            with torch.no_grad():
                forward = ratio(lambda model: model(*inputs))
            step = ratio(lambda model: _step(model, inputs)) if gradients else None
        gradient_error = _error(gradients, expected_gradients) if gradients else None
        return Measurement(forward, step, _error(values, expected), gradient_error)

    def __str__(self) -> str:
        name = type(self.model).__name__.removeprefix("Optimized")
        lines = [f"fastda.optimize({name}): {len(self.replaced)} replaced, {len(self.left)} left"]
        for title, entries in (("replaced", self.replaced), ("left as it was", self.left)):
            if entries:
                lines += [title, *_lines(entries)]
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


def _lines(entries: Sequence[Entry]) -> list[str]:
    """Entries that differ in their path alone share a line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, name, what in entries:
        groups.setdefault((name, what), []).append(path or "(the model)")
    rows = []
    for (name, what), paths in groups.items():
        where = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]} ({len(paths)})"
        rows.append((where, name, what))
    first, second = (max(len(row[i]) for row in rows) for i in range(2))
    return [f"  {where:<{first}}  {name:<{second}}  {what}" for where, name, what in rows]
