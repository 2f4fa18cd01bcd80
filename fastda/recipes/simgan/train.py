"""Algorithm 1 of SimGAN on fused ops, resumable: R and D pre-trained, then K_g steps of R and K_d of D."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastda
import fastda.nn
from fastda.recipes.common import checkpoint
from fastda.recipes.common.checkpoint import CheckpointError
from fastda.recipes.common.command import CHECKPOINT, SettingsError, bar, check_finite
from fastda.recipes.common.images import shifted
from fastda.recipes.simgan import eyes, models
from fastda.recipes.simgan.data import Domains
from fastda.registry import KINDS, REDUCTIONS

OPTIMISERS = ("adam", "sgd")


@dataclass(frozen=True)
class Settings:
    """All that decides a training's result, besides the images. The paper's values where it gives them."""

    net: str = "gaze"
    seed: int = 0
    steps: int = 2000  # of Algorithm 1's outer loop
    batch: int = 32  # the paper: 512
    refiner_steps: int = 2  # K_g
    discriminator_steps: int = 1  # K_d
    pretrain_refiner: int = 1000
    pretrain_discriminator: int = 200
    optimiser: str = "adam"  # the paper: sgd
    lr: float = 0.0002  # of the refiner; the paper: 0.001
    discriminator_lr: float = 0.0002
    kind: str = "softmax"  # of the patch loss
    reduction: str = "mean"  # the paper: sums over patches and pixels, here "batchmean"
    label_smoothing: float = 0.0  # of the discriminator's targets
    reg_scale: float = 1.0  # λ; the paper gives none
    psi: str = "identity"  # ψ, what of the image the ℓ₁ term compares
    history: int = (
        1024  # B, refined images kept for the discriminator; the paper gives none; 0 for no history
    )
    match: int = 0  # cells of so many pixels get the real images' statistics before R sees them; 0 for none
    mirror: int = 0  # pixels of reflection around R's input instead of zeros alone
    keep_hues: bool = False  # colours get lighter or darker alone
    shift: int = 0  # pixels by which real images are moved at random, so that D cannot learn a few by heart
    average: float = 0.0  # decay of the moving average of the refiner's weights, 0 to use the last weights
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("net", models.NETS), ("psi", models.PSI), ("kind", KINDS), ("reduction", REDUCTIONS),
            ("optimiser", OPTIMISERS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise SettingsError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (
            ("steps", 0), ("batch", 1), ("refiner_steps", 1), ("discriminator_steps", 1),
            ("pretrain_refiner", 0), ("pretrain_discriminator", 0), ("history", 0),
            ("match", 0), ("mirror", 0), ("shift", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "discriminator_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.reg_scale < math.inf:
            raise SettingsError(f"reg_scale must be a number from 0 on, got {self.reg_scale}")
        for name in ("average", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def total_steps(self) -> int:
        return self.pretrain_refiner + self.pretrain_discriminator + self.steps


WHITE = {torch.uint8: 255, torch.uint16: 65535}


def to_float(images: Tensor) -> Tensor:
    """uint8 of 0 to 255, or uint16 of 0 to 65535 → float −1 to 1."""
    return images.to(torch.float32) / (WHITE[images.dtype] / 2) - 1


def to_pixels(images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The inverse of `to_float`; what lies outside of −1 to 1 is cut off."""
    white = WHITE[dtype]
    return ((images + 1) * (white / 2)).round().clamp(0, white).to(dtype)


def _check_size(settings: Settings, shape: tuple[int, ...]) -> None:
    """Raises SettingsError where images of that shape (C, H, W) are too small for the settings."""
    _, *sides = shape
    size = f"images of {sides[1]}×{sides[0]}"
    if min(sides) < models.LEAST_SIZE:
        raise SettingsError(f"{size} are too small, {models.LEAST_SIZE}×{models.LEAST_SIZE} is the least")
    if settings.mirror >= min(sides):
        raise SettingsError(
            f"mirror must be less than the sides of the images, got {settings.mirror} for {size}"
        )
    if settings.match > min(sides):
        raise SettingsError(f"match must not exceed the images' sides, got {settings.match} for {size}")


class Trainer:
    """Holds everything of one training; `advance()` is one step of the phase that it is in.

    All random choices come from one generator, which is part of the checkpoint, so a resumed training draws
    what an uninterrupted one would have drawn.
    """

    def __init__(self, domains: Domains, settings: Settings) -> None:
        self.domains, self.settings = domains, settings
        channels = domains.synthetic.x.shape[1]
        _check_size(settings, tuple(domains.synthetic.x.shape[1:]))
        torch.manual_seed(settings.seed)
        self.refiner = models.refiner(settings.net, channels, settings.mirror, settings.keep_hues)
        self.matching = models.matching(settings.match, tuple(domains.synthetic.x.shape[1:]))
        if isinstance(self.matching, models.Matching):
            self.matching.fit(to_float(domains.synthetic.x), to_float(domains.real.x))
        seen = 1 if settings.keep_hues else channels
        self.discriminator = models.discriminator(settings.net, seen, settings.kind)
        self.discriminator.to(memory_format=torch.channels_last)
        self.buffer = fastda.nn.ImageHistoryBuffer(max(1, settings.history), seed=settings.seed)
        self.refiner_loss = fastda.nn.RefinerLoss(
            settings.reg_scale, settings.kind, reduction=settings.reduction
        )
        self.refiner_optimiser = self._optimiser(self.refiner, settings.lr)
        self.discriminator_optimiser = self._optimiser(self.discriminator, settings.discriminator_lr)
        self.averaged = (
            {k: v.detach().clone() for k, v in self.refiner.state_dict().items()} if settings.average else {}
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        self.curves: list[dict[str, float]] = []
        self.images = domains.digest()

    def _optimiser(self, net: nn.Module, lr: float) -> torch.optim.Optimizer:
        if self.settings.optimiser == "sgd":
            return torch.optim.SGD(net.parameters(), lr)
        return torch.optim.Adam(net.parameters(), lr, betas=(0.5, 0.999))

    # -- Algorithm 1

    @property
    def phase(self) -> str:
        s = self.settings
        if self.step < s.pretrain_refiner:
            return "pretrain refiner"
        if self.step < s.pretrain_refiner + s.pretrain_discriminator:
            return "pretrain discriminator"
        return "adversarial" if self.step < s.total_steps else "done"

    def advance(self) -> dict[str, Tensor]:
        """One step: of R's or D's pre-training, or K_g steps of R and K_d of D. Returns what to log."""
        phase, logs = self.phase, {}
        if phase == "pretrain refiner":
            logs = self.refiner_step(pretraining=True)
        elif phase == "pretrain discriminator":
            logs = self.discriminator_step()
        elif phase == "adversarial":
            for _ in range(self.settings.refiner_steps):
                logs = self.refiner_step()
            for _ in range(self.settings.discriminator_steps):
                logs |= self.discriminator_step()
        self.step += 1
        return logs

    def draw(self, images: Tensor) -> Tensor:
        """A random minibatch of uint8 images as floats, in the kernels' layout."""
        picked = torch.randint(len(images), (self.settings.batch,), generator=self.generator)
        return to_float(images[picked]).contiguous(memory_format=torch.channels_last)

    def draw_synthetic(self) -> Tensor:
        """As R gets them, and as the ℓ₁ term wants them back."""
        matched: Tensor = self.matching(self.draw(self.domains.synthetic.x))
        return matched

    def seen(self, images: Tensor) -> Tensor:
        """What D sees of images (N, C, H, W): of hues that stay nothing, or R would hide them in black."""
        return images.mean(1, keepdim=True) if self.settings.keep_hues else images

    def refiner_step(self, pretraining: bool = False) -> dict[str, Tensor]:
        s = self.settings
        synthetic = self.draw_synthetic()
        refined = self.refiner(synthetic)
        if pretraining:
            loss = fastda.self_regularization(refined, synthetic, reduction=s.reduction)
            logs = {"self_regularization": loss.detach()}
        else:
            # Its weights take no gradient here: that would be work for nothing.
            self.discriminator.requires_grad_(False)
            logits = self.discriminator(self.seen(refined))
            self.discriminator.requires_grad_(True)
            if s.psi == "identity":
                loss = self.refiner_loss(logits, refined, synthetic)
            else:
                kept = models.features(s.psi, synthetic)
                loss = fastda.patch_generator_loss(logits, s.kind, reduction=s.reduction)
                loss = loss + fastda.self_regularization(
                    models.features(s.psi, refined), kept, s.reg_scale, reduction=s.reduction
                )
            logs = {"refiner_loss": loss.detach(), "change": (refined.detach() - synthetic).abs().mean()}
        self.refiner_optimiser.zero_grad()
        loss.backward()
        self.refiner_optimiser.step()
        self._average()
        return logs

    def discriminator_step(self) -> dict[str, Tensor]:
        s = self.settings
        real = self.draw(self.domains.real.x)
        if s.shift:
            real = shifted(real, s.shift, self.generator)
        with torch.no_grad():
            refined = self.refiner(self.draw_synthetic())
        if s.history:
            refined = self.buffer.query(refined)
        d = self.discriminator
        loss, real_accuracy, fake_accuracy = fastda.patch_head_discriminator_loss(
            d.features(self.seen(real)), d.features(self.seen(refined)), d.head.weight, d.head.bias, s.kind,
            reduction=s.reduction, label_smoothing=s.label_smoothing, return_accuracy=True,
        )  # fmt: skip
        self.discriminator_optimiser.zero_grad()
        loss.backward()
        self.discriminator_optimiser.step()
        return {
            "discriminator_loss": loss.detach(),
            "accuracy_real": real_accuracy,
            "accuracy_refined": fake_accuracy,
        }

    @torch.no_grad()
    def _average(self) -> None:
        if not self.averaged:
            return
        decay = min(self.settings.average, (self.step + 1) / (self.step + 10))
        for name, value in self.refiner.state_dict().items():
            self.averaged[name].lerp_(value, 1 - decay)

    # -- what came of it

    @torch.no_grad()
    def refine(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) → uint8, by the averaged weights where the settings ask for them.

        Eyes are equalised again, as all eyes are before anything is trained on them.
        """
        kept = {k: v.clone() for k, v in self.refiner.state_dict().items()} if self.averaged else {}
        if self.averaged:
            self.refiner.load_state_dict(self.averaged)
        try:
            return refine(nn.Sequential(self.matching, self.refiner), images, self.domains.task)
        finally:
            if kept:
                self.refiner.load_state_dict(kept)

    @property
    def match(self) -> Callable[[Tensor], Tensor] | None:
        """uint8 (N, C, H, W) → uint8: what R gets to see; None where that is the synthetic images."""
        return matcher(nn.Sequential(self.matching, self.refiner), self.domains.task)

    # -- checkpoints

    def save(self, path: Path) -> None:
        tensors = {f"refiner.{k}": v for k, v in self.refiner.state_dict().items()}
        tensors |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        tensors |= {f"averaged.{k}": v for k, v in self.averaged.items()}
        tensors |= {f"matching.{k}": v for k, v in self.matching.state_dict().items()}
        tensors |= {f"buffer.{k}": v for k, v in self.buffer.state_dict().items()}
        for name, optimiser in self._optimisers():
            for index, values in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{k}": v for k, v in values.items() if v is not None}
        tensors["generator"] = self.generator.get_state()
        shape = list(self.domains.synthetic.x.shape[1:])
        state = {"step": self.step, "curves": self.curves, "images": self.images, "shape": shape,
                 "task": self.domains.task, "preparation": asdict(self.domains.preparation)}  # fmt: skip
        checkpoint.save(path, tensors, asdict(self.settings), state)

    def load(self, path: Path) -> None:
        tensors, stored, state = checkpoint.load(path)
        checkpoint.check_settings(path, stored, asdict(self.settings))
        if state.get("images") != self.images:
            raise CheckpointError(f"{path}: was trained on other images")
        try:
            self.refiner.load_state_dict(_group(tensors, "refiner."))
            self.discriminator.load_state_dict(_group(tensors, "discriminator."))
            self.buffer.load_state_dict(_group(tensors, "buffer."))
            self.matching.load_state_dict(_group(tensors, "matching."))
            self.averaged = _group(tensors, "averaged.")
            for name, optimiser in self._optimisers():
                states: dict[int, dict[str, Tensor]] = {}
                for key, value in _group(tensors, f"{name}.").items():
                    index, _, field_name = key.partition(".")
                    states.setdefault(int(index), {})[field_name] = value
                groups = optimiser.state_dict()["param_groups"]
                optimiser.load_state_dict({"state": states, "param_groups": groups})
            self.generator.set_state(tensors["generator"])
            self.step, self.curves = state["step"], state["curves"]
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"{path}: belongs to another training ({error})") from error

    def _optimisers(self) -> Iterable[tuple[str, torch.optim.Optimizer]]:
        yield "refiner_optimiser", self.refiner_optimiser
        yield "discriminator_optimiser", self.discriminator_optimiser


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def refine(net: nn.Module, images: Tensor, task: str = "") -> Tensor:
    """Images (N, C, H, W), uint8 or uint16 over its range → its dtype; equalised where the task is gaze."""
    parts = [to_pixels(net(to_float(part).contiguous(memory_format=torch.channels_last)), images.dtype)
             for part in images.split(100)]  # fmt: skip
    refined = torch.cat(parts).contiguous() if parts else images.clone()
    return eyes.equalise(refined) if task == "gaze" else refined


def matcher(net: nn.Module, task: str = "") -> Callable[[Tensor], Tensor] | None:
    """The first half of what `load_refiner` gives, as `refine` is the whole; None where it does nothing."""
    matching = net.get_submodule("0")
    return None if isinstance(matching, nn.Identity) else partial(refine, matching, task=task)


def load_refiner(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The refiner of a checkpoint, with averaged weights where it has them, and the checkpoint's state."""
    tensors, settings, state = checkpoint.load(path)
    try:
        hues = settings.get("keep_hues", False)  # checkpoints had none once
        net = models.refiner(settings["net"], state["shape"][0], settings["mirror"], hues)
        net.load_state_dict(_group(tensors, "averaged.") or _group(tensors, "refiner."))
        matching = models.matching(settings["match"], tuple(state["shape"]))
        matching.load_state_dict(_group(tensors, "matching."))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of a SimGAN training ({error})") from error
    return nn.Sequential(matching, net).eval(), state


# ---------------------------------------------------------------------------------------------- whole runs


def train(
    domains: Domains,
    settings: Settings,
    *,
    folder: Path | None = None,
    resume: bool = False,
    save_every: int = 100,
    log_every: int = 10,
    sample_every: int = 200,
    sample: Callable[[Trainer], Any] | None = None,
    progress: bool = False,
    position: int = 0,
    label: str | None = None,
    tensorboard: Path | None = None,
) -> Trainer:
    """Train as `settings` says.

    With a `folder`, `folder/checkpoint.safetensors` is written every `save_every` steps. `sample(trainer)` is
    called every `sample_every` adversarial steps and at the end. Raises CheckpointError where `resume` meets
    a checkpoint that is damaged, of other settings or of other images, Diverged where a logged value is no
    longer finite; the last checkpoint is from before.
    """
    trainer = Trainer(domains, settings)
    path = folder / CHECKPOINT if folder is not None else None
    if resume and path is not None and path.exists():
        trainer.load(path)
    name = label or f"seed {settings.seed}"
    writer = _writer(tensorboard, trainer.step) if tensorboard is not None else None
    steps = {"total": settings.total_steps, "initial": trainer.step, "unit": "step"}
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(bar(progress, position=position, desc=name, **steps))
        if writer is not None:
            stack.callback(writer.close)
        if settings.backend:
            stack.enter_context(fastda.use_backend(settings.backend))
        while trainer.phase != "done":
            phase = trainer.phase
            logs = trainer.advance()
            step = trainer.step
            saved_to = path if step % save_every == 0 or trainer.phase == "done" else None
            logged = step % log_every == 0 or trainer.phase != phase
            if logged or saved_to is not None:
                row = {key: float(value) for key, value in logs.items()}
                check_finite(name, f"step {step}", row, trainer.curves)
            if logged:
                trainer.curves.append({"step": step, **row})
                if writer is not None:
                    for key, value in row.items():
                        writer.add_scalar(key, value, step)
                shown.set_postfix({k.replace("_", " "): f"{v:.3f}" for k, v in row.items()}, refresh=False)
            shown.update()
            if saved_to is not None:
                trainer.save(saved_to)
            sampled = phase == "adversarial" and (step % sample_every == 0 or trainer.phase == "done")
            if sample is not None and sampled:
                sample(trainer)
    return trainer


def _writer(folder: Path, step: int) -> Any:
    """Of scalars for tensorboard, from `step` on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError(f"tensorboard: needs the package (pip install tensorboard): {error}") from error
    return SummaryWriter(str(folder), purge_step=step)
