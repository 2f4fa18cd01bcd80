"""Every domain as source of every other: the domains' codes, and what learns from them; resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastda.recipes.common import checkpoint
from fastda.recipes.common.command import CHECKPOINT, SettingsError, bar, in_log
from fastda.recipes.reviews import learners, sda
from fastda.recipes.reviews.data import Domain

REPRESENTATIONS = ("counts", "msda", "sda")
LEARNERS = ("svm", "network", "dann")


@dataclass(frozen=True)
class Settings:
    """All that decides the results, besides the data."""

    representations: tuple[str, ...] = REPRESENTATIONS
    learners: tuple[str, ...] = LEARNERS
    seed: int = 0
    masked: float = 0.5  # share of values that marginalised layers restore
    layers: int = 5  # of them
    units: int = 1000  # of the trained auto-encoder
    units_masked: float = 0.8
    units_epochs: int = 20
    hidden: int = 50  # units of the networks
    scales: tuple[float, ...] = (1.0,)  # of DANN's reversal; reverse validation takes one of several
    epochs: int = 20  # of a network at most
    batch: int = 64  # reviews of each domain

    def __post_init__(self) -> None:
        for name in ("layers", "units", "units_epochs", "hidden", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("masked", "units_masked"):
            if not 0 < getattr(self, name) < 1:
                raise SettingsError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise SettingsError(f"scales must be positive, got {', '.join(map(str, self.scales)) or 'none'}")


def train(
    domains: Sequence[Domain], settings: Settings, *, folder: Path | None = None, resume: bool = False
) -> list[dict[str, Any]]:
    """A row for each representation, task and learner; with a `folder`, a checkpoint after each source.

    Auto-encoders see what all domains train on, without labels, once for all tasks. A learner sees its
    source's labels too, and no test review; the target's labels serve `accuracy` alone.
    Raises CheckpointError where `resume` meets a checkpoint that is damaged or of other settings.
    """
    path = folder / CHECKPOINT if folder is not None else None
    rows: list[dict[str, Any]] = []
    predictions: dict[str, Tensor] = {}
    mine = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items()}
    if resume and path is not None and path.exists():
        predictions, stored, state = checkpoint.load(path)
        checkpoint.check_settings(path, stored, mine)
        rows = state["rows"]
    done = {(row["representation"], row["source"]) for row in rows}
    sources = len(domains) * len(settings.representations)
    with bar(total=sources, initial=len(done), unit="source") as shown:
        for representation in settings.representations:
            left = [d for d in domains if (representation, d.name) not in done]
            if not left:
                continue
            shown.set_description(f"{representation}: encoding")
            encode = _encoder(representation, domains, settings)
            codes = {d.name: (encode(d.x.float()), encode(d.test_x.float())) for d in domains}
            for source in left:
                shown.set_description(f"{representation}: from {source.name}")
                for row, said in _from(source, domains, representation, codes, settings):
                    rows.append(row)
                    key = (row["representation"], row["source"], row["target"], row["learner"])
                    predictions["/".join(key)] = said.to(torch.uint8)
                if path is not None:
                    checkpoint.save(path, predictions, mine, {"rows": rows})
                in_log(f"{representation}: {source.name} done")
                shown.update()
    return rows


def _encoder(representation: str, domains: Sequence[Domain], settings: Settings) -> sda.Encoder:
    if representation == "counts":
        return lambda x: x
    words = torch.cat([domain.x for domain in domains]).float()
    if representation == "msda":
        return sda.marginalised(words, settings.masked, settings.layers)
    return sda.trained(words, settings.units_masked, settings.units, settings.units_epochs, settings.seed)


def _from(
    source: Domain,
    domains: Sequence[Domain],
    representation: str,
    codes: dict[str, tuple[Tensor, Tensor]],
    settings: Settings,
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Rows and predictions of the tasks from `source`. What looks at no target is trained once for all."""
    x, targets = codes[source.name][0], [d for d in domains if d is not source]
    # Six times as many values a review take a lesser rate.
    network: dict[str, Any] = {
        "seed": settings.seed, "hidden": settings.hidden, "epochs": settings.epochs,
        "batch": settings.batch, "rate": 3e-4 if representation == "msda" else 1e-3,
    }  # fmt: skip
    for learner in settings.learners:
        start, trained = time.perf_counter(), None
        for target in targets:
            if learner == "dann":
                trained = learners.dann(x, source.y, codes[target.name][0], settings.scales, **network)
            elif trained is None and learner == "network":
                trained = learners.source_only(x, source.y, **network)
            elif trained is None:
                trained = learners.svm(x, source.y, settings.seed)
            said = trained.predict(codes[target.name][1])
            row = {
                "representation": representation,
                "source": source.name,
                "target": target.name,
                "learner": learner,
                "accuracy": float((said == target.test_y).double().mean()),
                "chosen": trained.chosen,
                "seconds": time.perf_counter() - start,
            }
            start = time.perf_counter()
            yield row, said
