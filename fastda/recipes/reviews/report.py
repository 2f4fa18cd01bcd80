"""One self-contained HTML page: the table beside the published one, and a plot of all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import fastda
from fastda import files
from fastda.recipes.common.page import environment, svg
from fastda.recipes.reviews.data import Domain
from fastda.recipes.reviews.published import PUBLISHED
from fastda.recipes.reviews.train import Settings

NAMES = {
    "svm": "SVM", "network": "Network", "dann": "DANN", "counts": "words", "msda": "mSDA", "sda": "SDA",
}  # fmt: skip
COLOURS = {"svm": "#c2571a", "network": "#8a8f98", "dann": "#0b62a4"}

Column = tuple[str, str]  # representation, learner
Task = tuple[str, str]  # source, target
Accuracy = dict[Column, dict[Task, float]]


def title(column: Column) -> str:
    return f"{NAMES[column[1]]} on {NAMES[column[0]]}"


def published(accuracy: Accuracy) -> set[Column]:
    """The columns that have published figures: none where the domains are others than those published."""
    if any(set(by_task) != set(PUBLISHED) for by_task in accuracy.values()):
        return set()
    return accuracy.keys() & next(iter(PUBLISHED.values())).keys()


def plot(accuracy: Accuracy) -> str:
    """A panel a representation: each task's accuracies, filled, and the published ones, rings."""
    import matplotlib.pyplot as plt

    shown = list(dict.fromkeys(representation for representation, _ in accuracy))
    tasks = list(next(iter(accuracy.values())))
    figure, axes = plt.subplots(
        1, len(shown), figsize=(10.4, 1.2 + 0.26 * len(tasks)), sharex=True, sharey=True, squeeze=False
    )
    known = published(accuracy)
    for axis, representation in zip(axes[0], shown, strict=True):
        for (codes, learner), by_task in accuracy.items():
            if codes != representation:
                continue
            places = range(len(tasks))
            axis.scatter(
                [by_task[t] for t in tasks],
                places,
                s=22,
                color=COLOURS[learner],
                label=NAMES[learner],
                zorder=3,
            )
            if (codes, learner) in known:
                theirs = [PUBLISHED[t][codes, learner] for t in tasks]
                axis.scatter(
                    theirs, places, s=30, facecolors="none", edgecolors=COLOURS[learner], linewidths=0.9
                )
        axis.set_title(NAMES[representation], loc="left", fontsize=9)
        axis.set_yticks(range(len(tasks)), [" → ".join(t) for t in tasks], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(linewidth=0.4, color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=3, fontsize=8, frameon=False, bbox_to_anchor=(0.5, -0.05)
    )
    figure.tight_layout()
    return svg(figure)


def sentences(summary: dict[str, Any]) -> list[str]:
    """What the table says, in words."""
    return [
        f"{title(column)} is above {title(('counts', column[1]))} in {won} of {summary['tasks']} tasks"
        for column, won in summary["above_words"].items()
    ]


def write_report(path: Path, domains: Sequence[Domain], settings: Settings, summary: dict[str, Any]) -> Path:
    accuracy: Accuracy = summary["accuracy"]
    known = published(accuracy)
    columns = [{"title": title(c), "published": c in known} for c in accuracy]

    def cells(ours: dict[Column, float], theirs: dict[Column, float]) -> list[str]:
        row = []
        for column in accuracy:
            row.append(f"{100 * ours[column]:.1f}")
            if column in known:
                row.append(f"{100 * theirs[column]:.1f}")
        return row

    tasks = list(next(iter(accuracy.values())))
    table = [
        {"name": " → ".join(t), "cells": cells({c: v[t] for c, v in accuracy.items()}, PUBLISHED.get(t, {}))}
        for t in tasks
    ]
    means = {c: mean(v.values()) for c, v in accuracy.items()}
    table.append(
        {"name": "mean", "cells": cells(means, {c: mean(p[c] for p in PUBLISHED.values()) for c in known})}
    )
    text = environment(Path(__file__).parent).get_template("report.html.j2").render(
        domains=domains, columns=columns, table=table, plot=plot(accuracy), said=sentences(summary),
        settings=asdict(settings), seconds=summary["seconds"], published=bool(known),
        codes={c for c, _ in accuracy}, learners={learner for _, learner in accuracy},
        torch=torch.__version__, fastda=fastda.__version__,
    )  # fmt: skip
    files.write(path, text)
    return path
