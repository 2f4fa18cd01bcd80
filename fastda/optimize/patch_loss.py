"""Patch losses in a model that exists: modules that compute one by cross-entropy, BCE, MSE or a mean."""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastda import _torch
from fastda.ops.patch_loss import KINDS, LEAST_PATCHES, one_side_loss, patch_discriminator_loss
from fastda.optimize.common import Optimized, Refused, entry, of_torch, parts, prove, random
from fastda.optimize.report import Entry, Report


def serve(report: Report, path: str, module: nn.Module) -> None:
    """Serve a module without parameters that was seen to make one of the losses out of two arguments."""
    inner = [m for m in module.modules() if m is not module]
    if of_torch(type(module)) or list(module.parameters()) or not all(of_torch(type(m)) for m in inner):
        return
    name = type(module).__name__
    try:
        plan = _plan(module)
    except Refused as reason:
        if any(isinstance(m, nn.modules.loss._Loss) for m in inner):
            report.left.append(Entry(path, name, f"no patch loss: {reason}"))
        return
    what = f"patch loss {plan.form} → patch_discriminator_loss, from {plan.form.least:,} patches"
    report.replaced.append(Entry(path, name, what))
    report.change(path, module, "__class__", _PatchLoss.subclass(type(module), plan))


class _Form(NamedTuple):
    """What a loss module makes of its arguments.

    by_flag: they are logits and a bool, whether these are to be told real; `real` and `fake` are the kinds of
    loss in the two cases, and `smoothing` their label smoothing. Else they are the real and the fake logits,
    or the other way round if `swapped`, and the loss is multiplied by `factor`.
    """

    by_flag: bool
    real: str
    fake: str
    smoothing: tuple[float, float] = (0.0, 0.0)
    factor: float = 1.0
    swapped: bool = False

    def fits(self, first: Any, second: Any) -> bool:
        logits = (first,) if self.by_flag else (first, second)
        return (not self.by_flag or isinstance(second, bool)) and all(map(self._fits, logits))

    @property
    def least(self) -> int:
        """How many patches it must be for a gain."""
        return max(LEAST_PATCHES[self.real], LEAST_PATCHES[self.fake])

    def _fits(self, logits: Any) -> bool:
        if not isinstance(logits, Tensor) or logits.dim() != 4 or logits.numel() == 0:
            return False
        if logits.shape[1] != _channels(self.real) or logits.numel() < self.least * logits.shape[1]:
            return False
        if logits.dtype in (torch.float32, torch.float64):
            return True
        # There, what these are made of returns float32 as the operator does.
        widened = _torch.autocast_dtype(logits.device.type) is not None
        return widened and {self.real, self.fake} <= {"softmax", "bce", "lsgan"}

    def __call__(self, first: Tensor, second: Any) -> Tensor:
        if self.by_flag:
            kind, smoothing = (self.real, self.smoothing[0]) if second else (self.fake, self.smoothing[1])
            return one_side_loss(first, kind, second, smoothing)
        real, fake = (second, first) if self.swapped else (first, second)
        loss = patch_discriminator_loss(real, fake, self.real)
        return loss if self.factor == 1.0 else self.factor * loss

    def __str__(self) -> str:
        kinds = self.real if self.real == self.fake else f"{self.real} of real, {self.fake} of fake logits"
        if any(self.smoothing):
            kinds += f" with labels {1 - self.smoothing[0] / 2:.3g} and {self.smoothing[1] / 2:.3g}"
        return kinds if self.factor == 1.0 else f"{self.factor:g} × {kinds}"


def _channels(kind: str) -> int:
    return 2 if kind == "softmax" else 1


class _Plan(NamedTuple):
    unchanged: tuple[Any, ...]
    buffers: tuple[float, ...]
    names: tuple[str, str]
    form: _Form


class _PatchLoss(Optimized):
    """A loss module by patch_discriminator_loss."""

    @classmethod
    def methods(cls, original: type) -> dict[str, Any]:
        name = entry(original)
        before = getattr(original, name)

        def call(self: Any, *inputs: Any, **named: Any) -> Any:
            unchanged, buffers, names, form = self._plan
            given = (*inputs, *(named[n] for n in names[len(inputs) :] if n in named))
            # A compiler fuses what the original is made of, and could not see a buffer change its value.
            if (
                len(given) == len(inputs) + len(named) == 2
                and not is_compiling()
                and form.fits(*given)
                and all(part.holds(self) for part in unchanged)
                and _hold(self, buffers)
            ):
                return form(*given)
            return before(self, *inputs, **named)

        return {name: call}


_seen: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _hold(module: nn.Module, values: tuple[float, ...]) -> bool:
    """Whether the module's buffers (its labels) have these values; read only when they have changed."""
    buffers = tuple(module.buffers())
    versions = [b._version for b in buffers if not b.is_inference()]
    seen, seen_versions = _seen.get(module, ((), None))
    if versions != seen_versions or any(a is not b for a, b in zip(buffers, seen, strict=False)):
        if len(versions) != len(buffers) or _values(buffers) != values:
            return False
        _seen[module] = buffers, versions
    return True


def _values(buffers: tuple[Tensor, ...]) -> tuple[float, ...]:
    if any(b.numel() != 1 for b in buffers):
        raise Refused("has a buffer of more than one number")
    return tuple(b.item() for b in buffers)


def _plan(module: nn.Module) -> _Plan:
    signature = inspect.signature(getattr(type(module), entry(type(module))))
    _, *arguments = signature.parameters.values()
    required = [a.name for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
    if len(required) != 2 or [a.name for a in arguments[:2]] != required:
        raise Refused("does not take two arguments")
    unchanged, buffers = parts(module), tuple(module.buffers())
    values = _values(buffers)
    shell = copy.deepcopy(module)
    if type(shell) is not type(module):
        raise Refused("cannot be copied")
    shell.double().cpu().requires_grad_(False)
    form = _find_form(shell.train(), values)
    if form != _find_form(shell.eval(), values):
        raise Refused("computes other things in training than in evaluation")
    like = next((b for b in buffers if b.is_floating_point()), torch.empty(()))
    like = like.new_empty((), dtype=torch.float32)
    shape = (3, _channels(form.real), 5, 4)
    if form.by_flag:
        for flag in (True, False):
            x = {"fake_logits": random(*shape)}
            prove(
                "patch_generator_loss",
                lambda fake_logits, flag=flag: shell.to(fake_logits)(fake_logits, flag),
                lambda fake_logits, flag=flag: form(fake_logits, flag),
                x,
                like,
            )
    else:
        x = {"real_logits": random(*shape), "fake_logits": random(2, *shape[1:])}
        order = ("fake_logits", "real_logits") if form.swapped else ("real_logits", "fake_logits")
        prove(
            "patch_discriminator_loss",
            lambda **t: shell.to(t["real_logits"])(*(t[n] for n in order)),
            lambda **t: form(*(t[n] for n in order)),
            x,
            like,
        )
    return _Plan(unchanged, values, (required[0], required[1]), form)


def _find_form(loss: nn.Module, labels: tuple[float, ...]) -> _Form:
    """Compare with every loss on random logits, also with targets such as the module's buffers hold."""

    def value(*arguments: Any) -> Tensor | None:
        try:
            y = loss(*arguments)
        except Exception:  # whatever foreign code raises: not these arguments
            return None
        return y if isinstance(y, Tensor) and y.dim() == 0 else None

    def close(a: Tensor | None, b: Tensor) -> bool:
        return a is not None and torch.allclose(a, b, rtol=1e-12, atol=0)

    sides: dict[bool, tuple[str, float]] = {}
    for kind in KINDS:
        real, fake = random(3, _channels(kind), 5, 4), random(2, _channels(kind), 5, 4)
        for flag in (True, False):
            distances = {0.0, *(abs(label - flag) for label in labels)}
            for smoothing in (2 * d for d in sorted(distances) if kind not in ("hinge", "wgan") or d == 0):
                if smoothing <= 1 and close(value(real, flag), one_side_loss(real, kind, flag, smoothing)):
                    sides.setdefault(flag, (kind, smoothing))
        for factor in (1.0, 0.5):
            expected = factor * patch_discriminator_loss(real, fake, kind)
            for swapped in (False, True):
                if close(value(fake, real) if swapped else value(real, fake), expected):
                    return _Form(False, kind, kind, factor=factor, swapped=swapped)
    if len(sides) < 2:
        raise Refused("none that fastda has")
    (real_kind, real_smoothing), (fake_kind, fake_smoothing) = sides[True], sides[False]
    if _channels(real_kind) != _channels(fake_kind):
        raise Refused("none that fastda has")
    return _Form(True, real_kind, fake_kind, (real_smoothing, fake_smoothing))
