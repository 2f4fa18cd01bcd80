"""One training: source only, domain-adversarial (shared or related weights), or on the target; resumable."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastda
from fastda.recipes.common import checkpoint
from fastda.recipes.common.checkpoint import CheckpointError
from fastda.recipes.common.command import CHECKPOINT, SettingsError, bar, check_finite
from fastda.recipes.dann.data import Images, Pair
from fastda.recipes.dann.models import SOURCE, TARGET, DomainNet

METHODS = ("source", "dann", "related", "target")


@dataclass(frozen=True)
class Settings:
    """All that decides a training's result, besides the data."""

    method: str = "dann"
    seed: int = 0
    epochs: int = 30
    batch: int = 128  # half source, half target
    lr: float = 0.01
    momentum: float = 0.9
    ceiling: float = 1.0  # of the reversal's scale
    normalisation: str = "image"
    batch_norm: bool = False
    average: float = 0.0  # decay of the moving average of the weights, 0 to use the last weights
    redraw: bool = False  # new photo patches behind the target's training digits in every epoch
    invert: bool = False  # inverts half of the source images
    randomise: bool = False  # domain randomization of the source
    augment: bool = False  # random affine map and stroke width of all training images, the target's too
    information: float = 0.0  # weight of information maximisation on the target's predictions
    relation: float = 0.1  # weight of the related-weights regulariser
    clip: float = 2.0  # bound of the gradient's norm with related weights; 0 for none
    patience: int = 0  # epochs without a better target-free criterion before training stops; 0 never stops
    amp: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.batch < 2 or self.batch % 2:
            raise SettingsError(f"batch must be even (half source, half target), got {self.batch}")
        if self.epochs < 1:
            raise SettingsError(f"epochs must be at least 1, got {self.epochs}")
        if not 0 < self.lr < math.inf:
            raise SettingsError(f"lr must be positive, got {self.lr}")
        for name in ("ceiling", "information", "relation", "clip", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must be a number from 0 on, got {getattr(self, name)}")
        for name in ("average", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def adversarial(self) -> bool:
        return self.method in ("dann", "related")


@dataclass
class Result:
    settings: Settings
    net: DomainNet
    history: list[dict[str, float]] = field(default_factory=list)
    predictions: Tensor | None = None  # of the held-out target images
    accuracy: float = 0.0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.settings),
            "target_accuracy": self.accuracy,
            "seconds": round(self.seconds, 2),
            "history": self.history,
        }


# ---------------------------------------------------------------------------------------------- augmentation


def invert_half(x: Tensor, generator: torch.Generator) -> Tensor:
    """Inverts each uint8 image of `x` with probability 1/2."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flip, 255 - x, x)


def randomise_domain(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random colours for dark and light, over a random smooth texture and noise (after Tobin et al. 2017)."""
    n, c, h, w = x.shape
    share = x.float() / 255
    dark, light = (torch.rand(n, c, 1, 1, generator=generator) for _ in range(2))
    texture = F.interpolate(torch.randn(n, c, 5, 5, generator=generator), (h, w), mode="bilinear")
    strength = 0.15 * torch.rand(n, 1, 1, 1, generator=generator)
    noise = 0.04 * torch.randn(n, c, h, w, generator=generator)
    return ((dark + (light - dark) * share + strength * texture + noise).clamp(0, 1) * 255).round()


def warp(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random affine map of each image: ±15°, shear ±0.3, scale e^±0.2 an axis, shift ±1/14 of the side."""
    n = len(x)

    def uniform(bound: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * bound

    angle, shear = uniform(math.radians(15)), uniform(0.3)
    wide, high = uniform(0.2).exp(), uniform(0.2).exp()
    cos, sin = angle.cos(), angle.sin()
    rows = [cos / wide, (cos * shear - sin) / wide, uniform(1 / 7),
            sin / high, (sin * shear + cos) / high, uniform(1 / 7)]  # fmt: skip
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid.float(), align_corners=False)


def vary_strokes(x: Tensor, generator: torch.Generator) -> Tensor:
    """Takes each image a random part of the way to its dilation or to its erosion by 3x3 pixels."""
    x = x.float()
    way = torch.rand(len(x), 1, 1, 1, generator=generator) * 2 - 1
    dilated, eroded = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)
    return torch.where(way > 0, x + (dilated - x) * way, x + (x - eroded) * way)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    return vary_strokes(warp(x, generator), generator)


# ---------------------------------------------------------------------------------------------- the training


def information(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction less the mean entropy of the predictions, in nats (Krause et al. 2010).

    Under torch.distributed the mean prediction is that of the joined batch of all processes.
    """
    p = logits.softmax(1)
    mean = p.mean(0)
    _, world = rank_and_world()
    if world > 1:
        from torch.distributed.nn.functional import all_reduce

        mean = all_reduce(mean) / world
    return torch.special.entr(mean).sum() + (p * logits.log_softmax(1)).sum(1).mean()


class Trainer:
    """Holds everything of one training; `epoch()` advances it, `tensors()` and `load()` are its checkpoint.

    The random numbers of an epoch depend on the seed and the epoch's number alone, so a resumed training
    draws what an uninterrupted one would have drawn.
    """

    def __init__(self, pair: Pair, settings: Settings) -> None:
        self.pair, self.settings = pair, settings
        self.half = settings.batch // 2
        smaller = min(len(pair.source_train), len(pair.target_train))
        if smaller < self.half:
            raise SettingsError(
                f"batch: half of {settings.batch} exceeds a domain of {smaller} training images"
            )
        if settings.batch_norm and self.half == 1 and pair.source_train.x.shape[-1] < 20:
            raise SettingsError("batch: normalising a map of 1x1 takes at least 2 images of a domain, got 1")
        # An epoch passes over the larger domain once; the smaller one repeats.
        self.steps_per_epoch = max(len(pair.source_train), len(pair.target_train)) // self.half
        self.total_steps = self.steps_per_epoch * settings.epochs
        torch.manual_seed(settings.seed)
        self.net = DomainNet(
            len(pair.classes),
            pair.source_train.x.shape[-1],
            streams=2 if settings.method == "related" else 1,
            batch_norm=settings.batch_norm,
            normalisation=settings.normalisation,
            reversal_steps=self.total_steps,
            ceiling=settings.ceiling,
        )
        self.net.set_domain_mean(SOURCE, pair.source_train.x)
        self.net.set_domain_mean(TARGET, pair.target_train.x)
        self.averaged = {k: v.clone() for k, v in self.net.state_dict().items()} if settings.average else {}
        self.optimiser = torch.optim.SGD(self.net.parameters(), lr=settings.lr, momentum=settings.momentum)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.seconds = 0.0  # spent in training, over all interruptions
        self.stopped = False

    # -- one step

    def loss(self, source: Tensor, labels: Tensor, target: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Label loss, plus the domain loss where the method is adversarial; and what to log."""
        domain = TARGET if self.settings.method == "target" else SOURCE
        features = self.net.embed(source, domain)
        label_loss = F.cross_entropy(self.net.label(features), labels)
        logs = {"label_loss": label_loss.detach()}
        if target is None:
            return label_loss, logs
        target_features = self.net.embed(target, TARGET)
        of_source, of_target = self.net.domain_logits(features), self.net.domain_logits(target_features)
        logits = torch.cat([of_source, of_target])
        is_source = torch.cat([torch.ones_like(of_source), torch.zeros_like(of_target)])
        domain_loss = F.binary_cross_entropy_with_logits(logits, is_source)
        logs["domain_loss"] = domain_loss.detach()
        logs["domain_accuracy"] = ((logits.detach() > 0) == (is_source > 0.5)).float().mean()
        total = label_loss + domain_loss
        if self.settings.information:
            gained = information(self.net.label(target_features))
            logs["information"] = gained.detach()
            rise = 2 / (1 + math.exp(-10 * self.step / self.total_steps)) - 1  # as the reversal's scale
            total = total - self.settings.information * rise * gained
        if self.net.relation is not None:
            relation = self.net.relation(*self.net.features)
            logs["relation"] = relation.detach()
            total = total + self.settings.relation * relation
        return total, logs

    def train_step(self, source: Tensor, labels: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        progress = self.step / self.total_steps
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr / (1 + 10 * progress) ** 0.75
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.amp):
            loss, logs = self.loss(source, labels, target)
        self.optimiser.zero_grad()
        loss.backward()
        average_gradients(self.net)
        if self.net.relation is not None and self.settings.clip:
            # The reversed gradients of two streams cancel each other nowhere, and the target's stream has no
            # label loss: once the domain loss rises above chance, unbounded steps raise it without end.
            nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)
        self.optimiser.step()
        self.net.reverse.step()
        self.step += 1
        if self.averaged:
            with torch.no_grad():
                decay = min(self.settings.average, self.step / (self.step + 9))
                for name, value in self.net.state_dict().items():
                    if value.is_floating_point():
                        self.averaged[name].lerp_(value, 1 - decay)
                    else:
                        self.averaged[name].copy_(value)
        return logs

    # -- one epoch

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """This process's share of each joint batch of one epoch: source images, labels, target images."""
        s, pair = self.settings, self.pair
        generator = torch.Generator().manual_seed(1_000_003 * (s.seed + 1) + len(self.history))
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        target_x = pair.target_train.x
        if s.redraw and pair.redraw is not None and s.method != "source":
            target_x = pair.redraw(generator)
        labelled = Images(target_x, pair.target_train.y) if s.method == "target" else pair.source_train
        order = torch.randperm(len(labelled), generator=generator)
        other = torch.empty(0, dtype=torch.int64)
        rank, world = rank_and_world()
        for i in range(self.steps_per_epoch):
            picked = order[torch.arange(i * self.half, (i + 1) * self.half) % len(order)]
            x = labelled.x[picked]
            if s.method != "target":
                if s.invert:
                    x = invert_half(x, generator)
                if s.randomise:
                    x = randomise_domain(x, generator)
            if s.augment:
                x = augmented(x, generator)
            target = None
            if s.adversarial:
                if len(other) < self.half:
                    other = torch.cat([other, torch.randperm(len(target_x), generator=generator)])
                target, other = target_x[other[: self.half]], other[self.half :]
                if s.augment:
                    target = augmented(target, generator)
                target = target[rank::world]
            yield x[rank::world], labelled.y[picked][rank::world], target

    def epoch(self, progress: Any = None) -> dict[str, float]:
        """Train one epoch; returns means of the losses and accuracies on held-out images."""
        self.net.train()
        sums: dict[str, Tensor] = {}
        with fastda.use_backend(self.settings.backend) if self.settings.backend else contextlib.nullcontext():
            for i, batch in enumerate(self.batches()):
                logs = self.train_step(*batch)
                for name, value in logs.items():
                    sums[name] = sums.get(name, 0) + value
                if progress is not None:
                    progress.update()
                    if i % 10 == 9:
                        progress.set_postfix(
                            {k.replace("_", " "): f"{float(v):.3f}" for k, v in logs.items()}, refresh=False
                        )
        row = {name: float(value) / self.steps_per_epoch for name, value in sums.items()}
        with self.evaluated():
            row["source_accuracy"] = self.accuracy(self.pair.source_test, SOURCE)
            row["criterion"] = row["source_accuracy"] - self.uncertainty()
            # For the curve only; no decision of the training looks at it.
            row["target_accuracy"] = self.accuracy(self.pair.target_test, TARGET)
        self.history.append(row)
        self._consider_stopping()
        return row

    def uncertainty(self) -> float:
        """Mean entropy of the predictions on unlabelled target training images, as a share of its maximum."""
        images = self.pair.target_train.x[:: max(1, len(self.pair.target_train) // 1000)]
        p = predict(self.net, images, self._target_domain()).softmax(1)
        return float(torch.special.entr(p).sum(1).mean()) / math.log(len(self.pair.classes))

    def _consider_stopping(self) -> None:
        patience = self.settings.patience
        if not patience:
            return
        values = [row["criterion"] for row in self.history]
        if values[-1] == max(values):
            self.best = {k: v.clone() for k, v in (self.averaged or self.net.state_dict()).items()}
        # Before the reversal has risen, the criterion measures the source-only network.
        ready = len(values) > max(patience, self.settings.epochs // 3)
        self.stopped = ready and values.index(max(values)) < len(values) - patience

    def _target_domain(self) -> int:
        """Source-only training has seen the source's statistics alone."""
        return SOURCE if self.settings.method == "source" and self.settings.batch_norm else TARGET

    def accuracy(self, images: Images, domain: int) -> float:
        if self.settings.batch_norm:
            domain = {"source": SOURCE, "target": TARGET}.get(self.settings.method, domain)
        return float((predict(self.net, images.x, domain).argmax(1) == images.y).float().mean())

    @contextlib.contextmanager
    def evaluated(self, weights: dict[str, Tensor] | None = None) -> Iterator[None]:
        """The network in evaluation mode, with its averaged weights where there are such."""
        weights = weights or self.averaged
        kept = {k: v.clone() for k, v in self.net.state_dict().items()} if weights else {}
        if weights:
            self.net.load_state_dict(weights)
        self.net.eval()
        try:
            yield
        finally:
            self.net.train()
            if kept:
                self.net.load_state_dict(kept)

    # -- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        state = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            buffer = self.optimiser.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                state[f"momentum.{name}"] = buffer
        state |= {f"averaged.{k}": v for k, v in self.averaged.items()}
        state |= {f"best.{k}": v for k, v in self.best.items()}
        return {k: v.detach().contiguous().clone() for k, v in state.items()}

    def save(self, path: Path) -> None:
        state = {"history": self.history, "step": self.step, "seconds": self.seconds}
        checkpoint.save(path, self.tensors(), asdict(self.settings), state)

    def load(self, path: Path) -> None:
        tensors, stored, state = checkpoint.load(path)
        checkpoint.check_settings(path, stored, asdict(self.settings))

        def group(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.net.load_state_dict(group("net."))
        except RuntimeError as error:
            raise CheckpointError(f"{path}: belongs to another network ({error})") from error
        for name, buffer in group("momentum.").items():
            parameter = self.net.get_parameter(name)
            self.optimiser.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
        for name, value in group("averaged.").items():
            self.averaged[name].copy_(value)
        self.best = group("best.")
        self.history, self.step, self.seconds = state["history"], state["step"], state["seconds"]
        if self.history:
            # Decides again what was decided after the last epoch.
            best = self.best
            self._consider_stopping()
            self.best = best


@torch.no_grad()
def predict(net: nn.Module, images: Tensor, domain: int) -> Tensor:
    """Class logits (N, classes)."""
    return torch.cat([net(part, domain) for part in images.split(500)])


@torch.no_grad()
def embed(net: DomainNet, images: Tensor, domain: int) -> Tensor:
    return torch.cat([net.embed(part, domain) for part in images.split(500)])


# ---------------------------------------------------------------------------------------------- processes


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def average_gradients(net: nn.Module) -> None:
    """Mean of the gradients over all processes, each of which holds an equal share of the joint batch."""
    _, world = rank_and_world()
    if world == 1:
        return
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, (flat / world).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


# ---------------------------------------------------------------------------------------------- whole runs


def train(
    pair: Pair,
    settings: Settings,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = False,
    position: int = 0,
    label: str | None = None,
    tensorboard: Path | None = None,
) -> Result:
    """Train as `settings` says; with a `folder`, write `folder/checkpoint.safetensors` after every epoch.

    Returns the network with the weights to be used (averaged or selected where the settings ask for it).
    Raises CheckpointError where `resume` meets a checkpoint that is damaged or of other settings, Diverged
    where a logged value is no longer finite; the last checkpoint is from before.
    """
    trainer = Trainer(pair, settings)
    rank, world = rank_and_world()
    if trainer.half % world:
        raise SettingsError(f"batch: half of {settings.batch} does not divide among {world} processes")
    path = folder / CHECKPOINT if folder is not None else None
    if resume and path is not None and path.exists():
        trainer.load(path)
    name = label or f"{settings.method}, seed {settings.seed}"
    steps = {"total": trainer.total_steps, "initial": trainer.step, "unit": "step"}
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(bar(progress and rank == 0, position=position, desc=name, **steps))
        writer = None
        if tensorboard is not None and rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(tensorboard), purge_step=len(trainer.history) + 1)
            stack.callback(writer.close)
        while len(trainer.history) < settings.epochs and not trainer.stopped:
            start, before = time.perf_counter(), list(trainer.history)
            row = trainer.epoch(shown)
            trainer.seconds += time.perf_counter() - start
            check_finite(name, f"epoch {len(trainer.history)}", row, before)
            if writer is not None:
                for key, value in row.items():
                    writer.add_scalar(key, value, len(trainer.history))
            if path is not None and rank == 0:
                trainer.save(path)
    weights = trainer.best or trainer.averaged
    if weights:
        trainer.net.load_state_dict(weights)
    trainer.net.eval()
    predictions = predict(trainer.net, pair.target_test.x, trainer._target_domain()).argmax(1)
    accuracy = float((predictions == pair.target_test.y).float().mean())
    return Result(settings, trainer.net, trainer.history, predictions, accuracy, trainer.seconds)
