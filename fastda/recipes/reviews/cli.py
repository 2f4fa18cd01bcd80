"""Command line: learn from every domain of reviews for every other; a table, results.json and report.html."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fastda import files
from fastda.recipes.common import command, page
from fastda.recipes.reviews import data
from fastda.recipes.reviews.published import PUBLISHED
from fastda.recipes.reviews.report import NAMES, Accuracy, published, sentences, title, write_report
from fastda.recipes.reviews.train import LEARNERS, REPRESENTATIONS, Settings, train


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(prog="fastda reviews", description=__doc__)
    add = parser.add_argument
    default = Settings()
    add("--reviews", type=Path, metavar="DIR", required=True,
        help="folder of NAME_train.svmlight and NAME_test.svmlight, or .gz, of each domain")  # fmt: skip
    add("--representations", nargs="+", choices=REPRESENTATIONS, default=list(REPRESENTATIONS),
        help="the words, marginalised denoising auto-encoders, a trained one")  # fmt: skip
    add("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    add("--seed", type=int, default=0, metavar="N")
    add("--out", type=Path, default=Path("out/reviews"))
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add("--overwrite", action="store_true", help="remove the results that --out holds")
    add("--threads", type=int, default=os.cpu_count() or 1, help="default: cores")
    add("--masked", type=float, default=default.masked, help="share of values that mSDA restores")
    add("--layers", type=int, default=default.layers, help="of mSDA")
    add("--units", type=int, default=default.units, help="of SDA")
    add("--units-masked", type=float, default=default.units_masked, help="share of words that SDA restores")
    add("--units-epochs", type=int, default=default.units_epochs, help="of SDA")
    add("--hidden", type=int, default=default.hidden, help="units of the networks")
    add("--scales", nargs="+", type=float, default=list(default.scales), metavar="λ",
        help="of DANN's reversal, of which reverse validation takes one")  # fmt: skip
    add("--epochs", type=int, default=default.epochs, help="of a network at most")
    add("--batch", type=int, default=default.batch, help="reviews of each domain in a step")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    for name in ("representations", "learners", "scales"):
        given = getattr(options, name)
        if len(set(given)) < len(given):
            parser.error(f"--{name}: each once, got {' '.join(map(str, given))}")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    given = ((field.name, getattr(options, field.name)) for field in fields(Settings))
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given}
    return Settings(**settings)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies by column and task, the means, and in how many tasks codes beat the words they come from."""
    accuracy: Accuracy = {}
    for row in rows:
        column = (row["representation"], row["learner"])
        accuracy.setdefault(column, {})[row["source"], row["target"]] = row["accuracy"]
    above = {
        (codes, learner): sum(value > accuracy["counts", learner][task] for task, value in by_task.items())
        for (codes, learner), by_task in accuracy.items()
        if codes != "counts" and ("counts", learner) in accuracy
    }
    return {
        "accuracy": accuracy,
        "mean": {column: mean(by_task.values()) for column, by_task in accuracy.items()},
        "tasks": len(next(iter(accuracy.values()))),
        "above_words": above,
    }


def print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    accuracy: Accuracy = summary["accuracy"]
    known = published(accuracy)
    tasks = list(next(iter(accuracy.values())))
    console = Console()
    for representation in dict.fromkeys(representation for representation, _ in accuracy):
        table = Table(title=f"{NAMES[representation]}: accuracy on the target's test reviews")
        table.add_column("source → target", no_wrap=True)
        columns: list[list[float]] = []
        for column in (c for c in accuracy if c[0] == representation):
            table.add_column(NAMES[column[1]], justify="right")
            columns.append([accuracy[column][task] for task in tasks])
            if column in known:
                table.add_column("published", justify="right")
                columns.append([PUBLISHED[task][column] for task in tasks])
        for task, values in zip(tasks, zip(*columns, strict=True), strict=True):
            table.add_row(" → ".join(task), *(f"{value:.3f}" for value in values))
        table.add_section()
        table.add_row("mean", *(f"{mean(column):.3f}" for column in columns))
        console.print(table)
    for sentence in sentences(summary):
        console.print(f"{sentence}.")


def run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    settings = settings_of(options)
    with command.results_in(options.out, options.resume, options.overwrite):
        domains = data.load(options.reviews)
        rows = train(domains, settings, folder=options.out / "training", resume=options.resume)
        summary = summarise(rows)
        summary["seconds"] = round(time.perf_counter() - start, 1)
        print_table(summary)
        told = {
            "mean": {title(column): value for column, value in summary["mean"].items()},
            "above_words": {title(column): value for column, value in summary["above_words"].items()},
            "seconds": summary["seconds"],
        }
        written = {"settings": asdict(settings), "summary": told, "rows": rows}
        files.write(options.out / "results.json", page.as_json(written))
        report = write_report(options.out / "report.html", domains, settings, summary)
    print(f"{report} and {options.out / 'results.json'} written after {summary['seconds']:.0f} s")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    return command.run("fastda reviews", lambda: run(options))
