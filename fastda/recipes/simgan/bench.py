"""Time of one gaze training step (two of R, one of D, with history): this training's beside those that
`fastda bench step` times."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from fastda import files
from fastda.recipes.simgan.data import Domains, Images
from fastda.recipes.simgan.train import Settings, Trainer
from fastda.tools import bench
from fastda.tools.workloads import Case


def trainer(task: bench.Task) -> bench.Contenders:
    """A provider of benchmarks: this training, past its pre-training."""
    batch, *shape = task.case.sizes
    noise = torch.randint(256, (1024, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(noise)
    settings = Settings(
        batch=batch, steps=10**9, pretrain_refiner=0, pretrain_discriminator=0, optimiser="sgd", lr=0.0001,
        discriminator_lr=0.0001, history=4 * batch,
    )  # fmt: skip
    advance = Trainer(Domains("noise", "", images, images, images, images), settings).advance
    advance()
    yield "fastda, simgan train", advance


def run_bench(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    providers = {**bench.PROVIDERS, "example": trainer}
    if not options.compile:
        del providers["compile"]
    todo = [Case("simgan_step", (b, 1, 35, 55), threads=options.threads, mode="step") for b in options.batch]
    folder = options.out / "simgan-step" if options.out else None
    rows: dict[str, dict[str, Any]] = {}
    for row in bench.run(todo, providers, folder, rounds=options.rounds, seconds=0.0):
        rows[row["id"]] = row
        Console(stderr=True).print(f"{row['id']}: session {row['sessions']} done")
    machine = bench.machine({1, options.threads})
    table = Table(title=f"One gaze training step, {options.threads} thread(s), {machine['processor']}, "
                        f"{machine['isa']}, torch {machine['torch']}")  # fmt: skip
    for column in ("batch", "contender", "ms", "its time over fastda's, 95 % interval"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows.values():
        for name, c in row["contenders"].items():
            r = c["ratio"]
            interval = f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
            table.add_row(str(row["case"]["sizes"][0]), name, f"{1000 * c['median']:.0f}", interval)
    Console().print(table)
    if options.out is not None:
        result = {"machine": machine, "rows": list(rows.values())}
        files.write(options.out / "simgan-step.json", json.dumps(result, indent=1) + "\n")
    return 0
