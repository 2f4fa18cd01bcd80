"""Command line: train methods over seeds, print a table, write results.json and report.html."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastda import files
from fastda.recipes.common import command, page
from fastda.recipes.dann import data
from fastda.recipes.dann.models import NORMALISATIONS, SOURCE, TARGET
from fastda.recipes.dann.train import METHODS, Settings, Trainer, embed, train

PRESETS = {
    # The published net and schedule, with a batch normalisation per domain that bears ten times the learning
    # rate; per-image contrast, averaged weights, photo patches redrawn every epoch.
    "tuned": Settings(lr=0.1, average=0.99, batch_norm=True, redraw=True),
    # As published: mean subtraction, fixed training images, last weights.
    "paper": Settings(normalisation="domain"),
    "demo": Settings(lr=0.1, epochs=12, average=0.99, batch_norm=True, redraw=True),
}
# What "tuned" changes for a pair: few source images, whose strokes and slant are unlike the target's.
OF_PAIR: dict[str, dict[str, Any]] = {
    "digits-mnist": {"epochs": 12, "augment": True, "ceiling": 0.3, "information": 1.0},
}
NAMES = {
    "source": "source only",
    "dann": "DANN",
    "related": "related weights",
    "target": "train on target",
}


# What the pairs take besides --mnist; any two folders take --size alone.
KNOWN = {"mnist-mnistm": {"photos", "redraw"}, "digits-mnist": set[str]()}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(prog="fastda dann", description=__doc__)
    add = parser.add_argument
    add("--pair", choices=tuple(KNOWN), help="default: mnist-mnistm")
    add("--mnist", type=Path, metavar="DIR", help="folder of MNIST's four IDX files, gzipped or not")
    add("--photos", type=Path, metavar="DIR", help="folder of photos to blend digits with, such as BSDS500")
    add("--source", type=Path, metavar="DIR", help="source domain: one folder of images per class")
    add("--target", type=Path, metavar="DIR", help="target domain: the same classes")
    add("--size", type=int, help="side of the square images of --source and --target (default 28)")
    add("--methods", nargs="+", choices=METHODS, default=["source", "dann", "target"])
    add("--seeds", nargs="+", type=int, metavar="N", help="default 0 1 2 (demo: 0)")
    add("--preset", choices=tuple(PRESETS), default="tuned")
    add("--out", type=Path, default=Path("out/dann"))
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add("--overwrite", action="store_true", help="remove the results that --out holds")
    add(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="trainings at a time, one thread each (default: cores)",
    )
    add("--epochs", type=int)
    add("--batch", type=int, help="images a step, half source and half target")
    add("--lr", type=float)
    add("--ceiling", type=float, help="what the reversal's scale rises to")
    add("--average", type=float, help="decay of the weights' moving average; 0 turns it off")
    add("--normalisation", choices=NORMALISATIONS)
    add(
        "--batch-norm",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="with each domain's own statistics",
    )
    add(
        "--redraw",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="new photo patches in every epoch",
    )
    add(
        "--invert",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="invert half of the source images",
    )
    add(
        "--randomise",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="domain randomization of the source",
    )
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="random affine map and stroke width of all training images",
    )
    add(
        "--information",
        type=float,
        help="weight of information maximisation on the target's predictions (DANN, related weights)",
    )
    add("--relation", type=float, help="weight of the related-weights regulariser")
    add("--clip", type=float, help="bound of the gradient's norm with related weights; 0 for none")
    add("--patience", type=int, help="stop after N epochs without a better target-free criterion")
    add("--amp", action="store_true", default=None, help="bfloat16 autocast")
    add(
        "--tensorboard",
        action="store_true",
        help="losses and accuracies under OUT/tensorboard (pip install tensorboard)",
    )
    add(
        "--compare-reference",
        action="store_true",
        help="train DANN once more with the reference ops and time a step",
    )
    options = parser.parse_args(argv)
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs the package tensorboard: pip install tensorboard")
    if (options.source is None) != (options.target is None):
        parser.error("--source and --target go together")
    if options.source is not None:
        refused, of = {"pair", "mnist", "photos", "redraw"}, "--source and --target"
    else:
        options.pair = options.pair or "mnist-mnistm"
        known = KNOWN[options.pair]
        refused, of = {"size", "photos", "redraw"} - known, f"--pair {options.pair}"
    for name in sorted(refused):
        if getattr(options, name) is not None:
            parser.error(f"--{name} does not go with {of}")
    options.size = 28 if options.size is None else options.size
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    for name in ("seeds", "methods"):
        given = getattr(options, name) or []
        if len(set(given)) < len(given):
            parser.error(f"--{name}: each once, got {' '.join(map(str, given))}")
    if options.preset == "demo":
        options.compare_reference = True
    options.seeds = options.seeds or ([0] if options.preset == "demo" else [0, 1, 2])
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    names = ("epochs", "batch", "lr", "ceiling", "average", "normalisation", "batch_norm", "redraw", "invert",
             "randomise", "augment", "information", "relation", "clip", "patience", "amp")  # fmt: skip
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    bundled = options.preset == "tuned" and options.source is None
    return replace(PRESETS[options.preset], **(OF_PAIR.get(options.pair, {}) if bundled else {}) | given)


def load_pair(options: argparse.Namespace) -> data.Pair:
    if options.source is not None:
        return data.folders(options.source, options.target, options.size)
    if options.pair == "digits-mnist":
        return data.digits_to_mnist(options.mnist)
    return data.mnist_to_mnistm(options.mnist, options.photos)


# ---------------------------------------------------------------------------------------------- the runs

_pair: data.Pair | None = None


def _start(options: argparse.Namespace) -> None:
    global _pair
    torch.set_num_threads(1)
    _pair = load_pair(options)


def run_one(options: argparse.Namespace, settings: Settings, index: int) -> dict[str, Any]:
    """One training; everything that table and report need of it, as plain lists."""
    pair = _pair
    assert pair is not None
    label = NAMES[settings.method] + (" (reference)" if settings.backend == "reference" else "")
    name = f"{settings.method}{'-reference' if settings.backend == 'reference' else ''}-{settings.seed}"
    try:
        result = train(
            pair,
            settings,
            folder=options.out / name,
            resume=options.resume,
            progress=True,
            position=index,
            label=f"{label:<17} seed {settings.seed}",
            tensorboard=options.out / "tensorboard" / name if options.tensorboard else None,
        )
    except command.Diverged as error:
        return {**asdict(settings), "history": error.curves, "diverged": str(error)}
    # For the report: features of some held-out images, from the weights that are used.
    picked = page.spread(len(pair.source_test), 400)
    source = embed(result.net, pair.source_test.x[picked], SOURCE)
    chosen = page.spread(len(pair.target_test), 400)
    domain = SOURCE if settings.method == "source" and settings.batch_norm else TARGET
    target = embed(result.net, pair.target_test.x[chosen], domain)
    assert result.predictions is not None
    return {
        **result.as_json(),
        "predictions": result.predictions.tolist(),
        "features": {
            "source": source.numpy(), "source_labels": pair.source_test.y[picked].numpy(),
            "target": target.numpy(), "target_labels": pair.target_test.y[chosen].numpy(),
        },
    }  # fmt: skip


def all_runs(options: argparse.Namespace) -> list[Settings]:
    base = settings_of(options)
    runs = []
    # The longest first, so that no core is left waiting at the end.
    for method in sorted(options.methods, key=lambda m: m not in ("related", "dann")):
        for seed in options.seeds:
            runs.append(replace(base, method=method, seed=seed))
    if options.compare_reference:
        first = options.seeds[0]
        runs.insert(1, replace(base, method="dann", seed=first, backend="reference"))
    return runs


def run_all(options: argparse.Namespace, runs: list[Settings]) -> Iterator[dict[str, Any]]:
    jobs = 1 if distributed() else min(options.jobs, len(runs))
    results = command.side_by_side(jobs, run_one, [(options, one) for one in runs], _start, options)
    for number, result in enumerate(results, 1):
        command.in_log(f"training {number} of {len(runs)}: {result.get('diverged', 'done')}")
        yield result


def distributed() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def step_ratio(pair: data.Pair, settings: Settings) -> tuple[float, float, float]:
    """Time of a step with the reference ops over that with the fused ones, in turn; its 95 % interval."""
    import fastda
    from fastda.timing import compare, interleave, timed

    trainer = Trainer(pair, replace(settings, method="dann"))
    batch = next(iter(trainer.batches()))

    def with_reference() -> None:
        with fastda.use_backend("reference"):
            trainer.train_step(*batch)

    fused = timed(lambda: trainer.train_step(*batch))
    samples = interleave({"reference": timed(with_reference), "fused": fused}, rounds=40)
    return compare(samples["reference"], samples["fused"])


# ---------------------------------------------------------------------------------------------- results


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies by method, and the share of the gap from source-only to train-on-target that each covers."""
    accuracy: dict[str, dict[int, float]] = {}
    for r in results:
        if r.get("backend") != "reference" and "diverged" not in r:
            accuracy.setdefault(r["method"], {})[r["seed"]] = r["target_accuracy"]
    summary: dict[str, Any] = {"accuracy": accuracy, "gap_covered": {}}
    for method, by_seed in accuracy.items():
        if method in ("dann", "related") and {"source", "target"} <= accuracy.keys():
            shares = {
                seed: (value - accuracy["source"][seed])
                / (accuracy["target"][seed] - accuracy["source"][seed])
                for seed, value in by_seed.items()
                if seed in accuracy["source"].keys() & accuracy["target"].keys()
                and accuracy["target"][seed] != accuracy["source"][seed]
            }
            if shares:
                summary["gap_covered"][method] = {"by_seed": shares, "median": median(shares.values())}
    both = {
        r.get("backend"): r
        for r in results
        if r["method"] == "dann" and r["seed"] == results[0]["seed"] and "diverged" not in r
    }
    if "reference" in both and None in both:
        fused, reference = both[None], both["reference"]
        summary["reference"] = {
            "target_accuracy": reference["target_accuracy"],
            "agreement": sum(
                a == b for a, b in zip(fused["predictions"], reference["predictions"], strict=True)
            ) / len(fused["predictions"]),
        }  # fmt: skip
    return summary


def print_table(pair: data.Pair, results: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{pair.name}: accuracy on {len(pair.target_test)} held-out target images")
    seeds = sorted({r["seed"] for r in results})
    table.add_column("method")
    for seed in seeds:
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("median", justify="right")
    table.add_column("gap covered", justify="right")
    for method in (m for m in NAMES if m in summary["accuracy"]):
        values = summary["accuracy"][method]
        covered = summary["gap_covered"].get(method)
        table.add_row(
            NAMES[method],
            *(f"{values[s]:.3f}" if s in values else "" for s in seeds),
            f"{median(values.values()):.3f}",
            f"{covered['median']:.2f}" if covered else "",
        )
    for method in dict.fromkeys(r["method"] for r in results if "diverged" in r):
        if method not in summary["accuracy"]:
            table.add_row(NAMES[method], *["diverged"] * len(seeds))
    if "reference" in summary:
        table.add_row("DANN, reference ops", f"{summary['reference']['target_accuracy']:.3f}")
    console = Console()
    console.print(table)
    if "reference" in summary:
        console.print(
            f"Fused and reference ops from one seed agree on {summary['reference']['agreement']:.1%} of the "
            f"predictions; "
            f"a step with the reference takes {summary['reference']['step_ratio']:.2f} times as long "
            "({:.2f} to {:.2f}).".format(*summary["reference"]["step_ratio_interval"])
        )


def run(options: argparse.Namespace) -> int:
    global _pair
    start = time.perf_counter()
    rank = torch.distributed.get_rank() if distributed() else 0
    runs = all_runs(options)
    claim = command.results_in(options.out, options.resume, options.overwrite)
    with contextlib.nullcontext() if rank else claim:
        pair = _pair = load_pair(options)
        for settings in runs:
            Trainer(pair, settings)  # tells now what does not fit
        results = list(run_all(options, runs))
        if rank:
            return 0
        summary = summarise(results)
        if "reference" in summary:
            ratio, low, high = step_ratio(pair, settings_of(options))
            summary["reference"] |= {"step_ratio": ratio, "step_ratio_interval": [low, high]}
        summary["seconds"] = round(time.perf_counter() - start, 1)
        print_table(pair, results, summary)
        plain = [{k: v for k, v in r.items() if k not in ("features", "predictions")} for r in results]
        written = {"pair": pair.name, "summary": summary, "trainings": plain}
        files.write(options.out / "results.json", page.as_json(written))
        from fastda.recipes.dann.report import write_report

        report = write_report(options.out / "report.html", pair, results, summary)
    print(f"{report} and {options.out / 'results.json'} written after {summary['seconds']:.0f} s")
    diverged = [r["diverged"] for r in results if "diverged" in r]
    if diverged:
        print(f"fastda dann: {diverged[0]}; try a smaller --lr, or a larger --batch", file=sys.stderr)
    return 1 if diverged else 0


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    torch.set_num_threads(1)
    if distributed():
        torch.distributed.init_process_group("gloo")
    try:
        return command.run("fastda dann", lambda: run(options))
    finally:
        if distributed():
            torch.distributed.destroy_process_group()
