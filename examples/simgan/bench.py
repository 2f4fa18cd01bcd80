"""Time of one gaze training step (two of R, one of D, with history): fastda against PyTorch, in turn."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastda
import fastda.nn
from examples.common.checkpoint import write_atomically
from examples.simgan.data import Domains, Images
from examples.simgan.train import Settings, Trainer


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def plain_refiner() -> nn.Sequential:
    """The gaze refiner in plain PyTorch; its parameters are in the order of `fastda.nn.Refiner`."""
    blocks = [PlainBlock() for _ in range(4)]
    return nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), *blocks, nn.Conv2d(64, 1, 1))


class PlainStep:
    """The same step in plain PyTorch.

    `lean=False` is how it is usually written: contiguous tensors, a discriminator that takes gradients in
    the refiner's step, cross-entropy over both channels, accuracies by argmax. `lean=True` is the best that
    we know: channels_last, the discriminator frozen there, two-class losses as softplus of a difference.
    """

    def __init__(self, domains: Domains, settings: Settings, *, lean: bool, compile: bool = False) -> None:
        self.images, self.s, self.lean = domains, settings, lean
        self.layout = torch.channels_last if lean else torch.contiguous_format
        torch.manual_seed(settings.seed)
        refiner: Callable[[Tensor], Tensor] = plain_refiner().to(memory_format=self.layout)
        discriminator = fastda.nn.PatchDiscriminator.gaze().to(memory_format=self.layout)
        self.d_parameters = list(discriminator.parameters())
        self.r_optimiser = torch.optim.SGD(refiner.parameters(), settings.lr)  # type: ignore[attr-defined]
        self.d_optimiser = torch.optim.SGD(self.d_parameters, settings.discriminator_lr)
        self.refiner = torch.compile(refiner) if compile else refiner
        self.discriminator = torch.compile(discriminator) if compile else discriminator
        self.buffer = fastda.nn.ImageHistoryBuffer(settings.history, seed=settings.seed)

    def draw(self, x: Tensor) -> Tensor:
        picked = torch.randint(len(x), (self.s.batch,))
        return (x[picked].float() / 127.5 - 1).contiguous(memory_format=self.layout)

    def cross_entropy(self, logits: Tensor, target: int) -> Tensor:
        if self.lean:
            return F.softplus((logits[:, 0] - logits[:, 1]) * (1 if target else -1)).mean()
        n, _, h, w = logits.shape
        return F.cross_entropy(logits, torch.full((n, h, w), target))

    def share(self, logits: Tensor, target: int) -> Tensor:
        logits = logits.detach()
        if self.lean:
            return ((logits[:, 1] > logits[:, 0]) == bool(target)).float().mean()
        return (logits.argmax(1) == target).float().mean()

    def __call__(self) -> None:
        for _ in range(self.s.refiner_steps):
            synthetic = self.draw(self.images.synthetic.x)
            if self.lean:
                for p in self.d_parameters:
                    p.requires_grad_(False)
            refined = self.refiner(synthetic)
            loss = self.cross_entropy(self.discriminator(refined), 0)
            loss = loss + self.s.reg_scale * F.l1_loss(refined, synthetic)
            self.r_optimiser.zero_grad()
            loss.backward()
            self.r_optimiser.step()
            for p in self.d_parameters:
                p.requires_grad_(True)
        for _ in range(self.s.discriminator_steps):
            real = self.draw(self.images.real.x)
            with torch.no_grad():
                refined = self.refiner(self.draw(self.images.synthetic.x))
            refined = self.buffer.query(refined)
            of_real, of_refined = self.discriminator(real), self.discriminator(refined)
            loss = self.cross_entropy(of_real, 0) + self.cross_entropy(of_refined, 1)
            self.d_optimiser.zero_grad()
            loss.backward()
            self.d_optimiser.step()
            self.share(of_real, 0), self.share(of_refined, 1)


def contenders(batch: int, compile: bool) -> dict[str, Callable[[], Any]]:
    noise = torch.randint(
        256, (1024, 1, 35, 55), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = Images(noise)
    domains = Domains("noise", "", images, images, images, images)
    settings = Settings(
        batch=batch, steps=10**9, pretrain_refiner=0, pretrain_discriminator=0, optimiser="sgd", lr=0.0001,
        discriminator_lr=0.0001, history=4 * batch,
    )  # fmt: skip
    found: dict[str, Callable[[], Any]] = {
        "fastda": Trainer(domains, settings).advance,
        "as people write it": PlainStep(domains, settings, lean=False),
        "channels_last, D frozen": PlainStep(domains, replace(settings), lean=True),
    }
    if compile:
        found["compiled, channels_last, D frozen"] = PlainStep(domains, settings, lean=True, compile=True)
    return found


def run_bench(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from fastda.bench import compare, interleave

    torch.set_num_threads(options.threads)
    # A process's own time on one thread is blind to what else the machine does.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    table = Table(title=f"One gaze training step, {options.threads} thread(s), {platform.machine()}, "
                        f"{fastda.info()['cpu_isa']}, torch {torch.__version__}")  # fmt: skip
    for column in ("batch", "contender", "ms", "its time over fastda's: median", "of the minima"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    written: list[dict[str, Any]] = []
    for batch in options.batch:
        samples = interleave(contenders(batch, options.compile), rounds=options.rounds, clock=clock)
        mine = samples["fastda"]
        for name, times in samples.items():
            middle, low, high = compare(times, mine)
            minima = min(times) / min(mine)
            written.append(
                {"batch": batch, "contender": name, "seconds": median(times), "ratio": middle,
                 "interval": [low, high], "ratio_of_minima": minima, "samples": times}
            )  # fmt: skip
            interval = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            table.add_row(str(batch), name, f"{1000 * median(times):.0f}", interval, f"{minima:.2f}")
    Console().print(table)
    if options.out is not None:
        result = {
            "rows": written, "threads": options.threads, "clock": clock.__name__, "torch": torch.__version__,
            "info": fastda.info(),
        }  # fmt: skip
        write_atomically(options.out / "simgan-step.json", json.dumps(result, indent=1, default=str) + "\n")
    return 0
