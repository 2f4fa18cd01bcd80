"""Command line: train refiners over seeds and measure them, refine a folder of labelled images, draw some."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastda import files
from fastda.recipes.common import command, page
from fastda.recipes.simgan import data, evaluate, models, report
from fastda.recipes.simgan.train import (
    KINDS,
    OPTIMISERS,
    REDUCTIONS,
    Settings,
    Trainer,
    load_refiner,
    matcher,
    refine,
    train,
)

DATA = ("strokes", "fonts", "eyes", "folders")
# What works for each pair of domains on a processor in minutes; docs/simgan.md says how it was found.
QUICK = Settings(
    net="small", steps=300, pretrain_refiner=60, pretrain_discriminator=20, lr=0.0005,
    discriminator_lr=0.0005, average=0.98,
)  # fmt: skip
TUNED = {
    "strokes": replace(QUICK, reg_scale=0.3),
    "fonts": replace(QUICK, reg_scale=0.01, discriminator_lr=0.001, steps=200),
    "eyes": replace(
        QUICK, net="change", pretrain_refiner=0, pretrain_discriminator=50, reg_scale=4.0,
        batch=16, refiner_steps=1, discriminator_lr=0.001, mirror=5, shift=2,
    ),
    "folders": replace(QUICK, reg_scale=0.5, mirror=5, shift=2, keep_hues=True),
}  # fmt: skip
# The paper's networks for gaze, step sizes, minibatch and sums; it gives neither λ nor B.
PAPER = Settings(
    steps=10_000, batch=512, optimiser="sgd", lr=0.001, discriminator_lr=0.001, reduction="batchmean",
    reg_scale=0.0001, history=5120,
)  # fmt: skip
MEASURES = "measures.json"  # of a seed, as they come
DEMO: dict[str, Any] = {"steps": 150}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(prog="fastda simgan", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser(
        "train",
        help="Algorithm 1 for every seed, then the measures; writes results.json and report.html",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = sub.add_argument
    _add_data(sub)
    add("--preset", choices=("tuned", "paper", "demo"), default="tuned", help="all that is not given below")
    add("--seeds", nargs="+", type=int, metavar="N", default=[0])
    add("--out", type=Path, default=Path("out/simgan"))
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add("--overwrite", action="store_true", help="remove the results that --out holds")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="seeds at a time")
    add("--sample-every", type=int, default=200, metavar="N", help="steps from picture grid to picture grid")
    add("--save-every", type=int, default=100, metavar="N", help="steps from checkpoint to checkpoint")
    add(
        "--tensorboard",
        action="store_true",
        help="scalars under OUT/tensorboard (needs the package tensorboard)",
    )
    add("--compare-reference", action="store_true", help="train the first seed again with the reference ops")
    _add_measures(sub)
    group = sub.add_argument_group("settings of Algorithm 1 (default: the preset's)")
    helps = {
        "net": "R and D", "steps": "T", "batch": "images in a minibatch", "refiner_steps": "K_g",
        "discriminator_steps": "K_d", "pretrain_refiner": "steps of R alone, by the ℓ₁ term",
        "pretrain_discriminator": "steps of D alone", "lr": "of R", "discriminator_lr": "of D",
        "kind": "of the patch loss", "reduction": "of both losses", "label_smoothing": "of D's targets",
        "reg_scale": "λ", "psi": "ψ", "history": "B, refined images that D sees again; 0 turns it off",
        "match": "pixels of a cell: means over cells get the real images' statistics first; 0: off",
        "mirror": "pixels of reflection around R's input, against frames",
        "keep_hues": "refining makes colours lighter or darker and leaves their hues",
        "shift": "pixels by which real images are moved at random",
        "average": "decay of the moving average of R's weights; 0 turns it off", "optimiser": "of both nets",
    }  # fmt: skip
    choices = {"net": models.NETS, "psi": models.PSI, "kind": KINDS, "optimiser": OPTIMISERS,
               "reduction": REDUCTIONS}  # fmt: skip
    for field in fields(Settings):
        if isinstance(field.default, bool):
            group.add_argument(
                f"--{field.name.replace('_', '-')}", action=argparse.BooleanOptionalAction,
                help=helps[field.name],
            )  # fmt: skip
        elif field.name in helps:
            group.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default), choices=choices.get(field.name),
                help=helps[field.name], metavar=None if field.name in choices else "X",
            )  # fmt: skip

    sub = commands.add_parser(
        "evaluate",
        help="the measures of a trained refiner, on any images",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    sub.add_argument("checkpoint", type=Path, help="checkpoint.safetensors of a training")
    _add_data(sub)
    sub.add_argument("--seeds", nargs="+", type=int, metavar="N", default=[0], help="of what measures")
    _add_measures(sub)
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the measures there")

    sub = commands.add_parser(
        "refine", help="write refined copies of a folder of images, their labels beside them"
    )
    sub.add_argument("checkpoint", type=Path, help="checkpoint.safetensors of a training")
    sub.add_argument(
        "images", type=Path, help="folder; subfolders and files that are not images are copied too"
    )
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    sub.add_argument(
        "--resize", action="store_true",
        help="bring images to the size that the refiner was trained on, as the training did; transforms.csv "
        "says how",
    )  # fmt: skip
    sub.add_argument(
        "--no-colour", action="store_true", help="let a refiner of grey images turn coloured ones grey"
    )

    sub = commands.add_parser(
        "draw", help="write labelled synthetic images: digits in class folders, eyes with labels.csv"
    )
    sub.add_argument("data", choices=("strokes", "fonts", "eyes"))
    sub.add_argument("--count", type=int, default=100)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--fonts", type=Path, metavar="DIR")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--overwrite", action="store_true", help="replace what --out holds")

    sub = commands.add_parser(
        "bench", help="time of a gaze training step: fused, as people write it, and at its best"
    )
    sub.add_argument("--batch", nargs="+", type=int, default=[32, 128])
    sub.add_argument("--rounds", type=int, default=3, help="in each of three processes, at least")
    sub.add_argument("--threads", type=int, default=1)
    sub.add_argument("--compile", action="store_true", help="torch.compile as a contender too")
    sub.add_argument("--out", type=Path, help="folder for simgan-step.json")

    options = parser.parse_args(argv)
    sub = commands.choices[options.command]
    if options.command in ("train", "evaluate"):
        _check_data(sub, options)
    if options.command == "train" and options.preset == "demo":  # about a minute
        options.eval_steps, options.sample_every = min(options.eval_steps, 150), min(options.sample_every, 60)
        if "count" in KNOWN[options.data]:
            options.count = getattr(options, "count", 2000)
    least = {"jobs": 1, "eval_steps": 1, "sample_every": 1, "save_every": 1, "rounds": 1, "threads": 1}
    least["count"] = 1 if options.command == "draw" else 10
    for name, value in least.items():
        if getattr(options, name, value) < value:
            sub.error(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(options, name)}")
    if options.command == "draw" and options.fonts and options.data != "fonts":
        sub.error(f"--fonts goes with fonts, not with {options.data}")
    if len(set(getattr(options, "seeds", []))) < len(getattr(options, "seeds", [])):
        sub.error(f"--seeds: each once, got {' '.join(map(str, options.seeds))}")
    return options


# What the choices of --data take.
KNOWN = {
    "strokes": {"mnist", "count"},
    "fonts": {"mnist", "fonts", "count"},
    "eyes": {"synthetic", "real", "count"},
    "folders": {"synthetic", "real", "size", "colour", "span"},
}


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", choices=DATA, default="strokes", help="what is refined to look like what")
    add("--synthetic", type=Path, metavar="DIR",
        help="synthetic images; with --data eyes a SynthEyes or UnityEyes folder")  # fmt: skip
    add("--real", type=Path, metavar="DIR",
        help="real images: MPIIGaze's Data/Normalized or a folder of eye crops, or any folder")  # fmt: skip
    add("--mnist", type=Path, metavar="DIR", help="folder of MNIST's four IDX files instead of 5,000 digits")
    add("--fonts", type=Path, metavar="DIR", help="folder of font files instead of matplotlib's")
    add("--count", type=int, help="synthetic images to draw")
    add("--size", type=_size, metavar="HxW", help="bring the images of --data folders to this size, "
        "their middle part in these proportions")  # fmt: skip
    add("--colour", action=argparse.BooleanOptionalAction,
        help="colours or grey for --data folders (default: as both folders are)")  # fmt: skip
    add("--span", type=_span, metavar="LOW:HIGH",
        help="16-bit greys of --data folders that are black and white (default: 0:65535)")  # fmt: skip


def _add_measures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--eval-steps", type=int, default=400,
        help="training steps of each network that measures success; gaze regressors take half as many again",
    )  # fmt: skip
    parser.add_argument(
        "--regressor", choices=tuple(models.REGRESSORS), default="paper",
        help="what reads gazes with --data eyes: the paper's network, or one of a tenth of its work",
    )  # fmt: skip


def _check_data(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    given = {name for known in KNOWN.values() for name in known if hasattr(options, name)}
    for name in sorted(given - KNOWN[options.data]):
        fitting = " or ".join(data for data in DATA if name in KNOWN[data])
        parser.error(f"--{name} goes with --data {fitting}, not with {options.data}")
    if options.data == "folders" and not {"synthetic", "real"} <= given:
        parser.error("--data folders needs --synthetic and --real")
    if options.data == "eyes" and "real" not in given:
        parser.error("--data eyes needs --real: MPIIGaze's Data/Normalized or a folder of eye crops")
    if options.data == "eyes" and {"count", "synthetic"} <= given:
        parser.error("--count says how many eyes are drawn; with --synthetic none is")


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high) <= 65535):
        raise argparse.ArgumentTypeError(f"expected two greys of 0 to 65535, such as 400:1500, got {text!r}")
    return int(low), int(high)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        size = int(height), int(width)
    except ValueError:
        size = 0, 0
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"expected height x width, such as 35x55, got {text!r}")
    return size


def settings_of(options: argparse.Namespace) -> Settings:
    base = TUNED[options.data]
    if options.preset == "paper":
        base = PAPER
    elif options.preset == "demo":
        base = replace(base, **DEMO)
    given = {f.name: getattr(options, f.name) for f in fields(Settings) if hasattr(options, f.name)}
    return replace(base, **given)


def load_domains(options: argparse.Namespace) -> data.Domains:
    given = {k: getattr(options, k) for k in ("count",) if hasattr(options, k)}
    if options.data == "folders":
        asked = {
            name: getattr(options, name) for name in ("size", "colour", "span") if hasattr(options, name)
        }
        return data.folders(options.synthetic, options.real, data.Preparation(**asked))
    if options.data == "eyes":
        return data.eyes_to_real(options.real, getattr(options, "synthetic", None), **given)
    mnist, fonts = getattr(options, "mnist", None), getattr(options, "fonts", None)
    return data.digits_to_mnist(options.data, mnist_folder=mnist, fonts=fonts, **given)


# ---------------------------------------------------------------------------------------------- the trainings

_domains: data.Domains | None = None


def _start(options: argparse.Namespace, threads: int) -> None:
    global _domains
    torch.set_num_threads(threads)
    _domains = load_domains(options)


def run_one(options: argparse.Namespace, settings: Settings, index: int) -> dict[str, Any]:
    """One training and its measures; everything that table and report need of it, as plain values."""
    domains = _domains
    assert domains is not None
    reference = settings.backend == "reference"
    name = f"seed-{settings.seed}" + ("-reference" if reference else "")
    folder = options.out / name
    start = time.perf_counter()

    def sample(trainer: Trainer) -> None:
        report.write_grid(folder / f"grid-{trainer.step:06d}.png", domains, trainer.refine)

    result: dict[str, Any] = {
        "seed": settings.seed, "backend": settings.backend, "settings": asdict(settings),
    }  # fmt: skip
    try:
        trainer = train(
            domains, settings, folder=folder, resume=hasattr(options, "resume"),
            save_every=options.save_every, sample_every=options.sample_every,
            sample=None if reference else sample, progress=True, position=index, label=name.replace("-", " "),
            tensorboard=options.out / "tensorboard" / name if hasattr(options, "tensorboard") else None,
        )  # fmt: skip
    except command.Diverged as error:
        return {**result, "curves": error.curves, "diverged": str(error)}
    result |= {"curves": trainer.curves, "training_seconds": round(time.perf_counter() - start, 1)}
    if reference:
        return result
    report.write_grid(folder / "grid.png", domains, trainer.refine)
    result["grid"] = f"{name}/grid.png"
    result["measures"] = _measures(
        domains, trainer.refine, trainer.match, settings.seed, options, index, folder / MEASURES
    )
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def _measures(
    domains: data.Domains, refined: Any, match: Any, seed: int, options: argparse.Namespace, index: int = 0,
    memory: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    steps = options.eval_steps
    sizes = {"steps": steps, "judge_steps": max(1, steps // 4), "judges": 2}
    total = evaluate.training_steps(domains, **sizes, matched=match is not None)
    with command.bar(total=total, unit="step", position=index, desc=f"seed {seed}, measures") as bar:
        return evaluate.evaluate(
            domains, refined, match=match, seed=seed, progress=bar, memory=memory,
            regressor=options.regressor, **sizes,
        )  # fmt: skip


def run_all(options: argparse.Namespace, settings: Settings) -> Iterator[dict[str, Any]]:
    runs = [replace(settings, seed=seed) for seed in options.seeds]
    if hasattr(options, "compare_reference"):
        runs.append(replace(settings, seed=options.seeds[0], backend="reference"))
    jobs = min(options.jobs, len(runs))
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    threads = max(1, cores // jobs)
    torch.set_num_threads(threads)
    results = command.side_by_side(jobs, run_one, [(options, run) for run in runs], _start, options, threads)
    for number, result in enumerate(results, 1):
        command.in_log(f"training {number} of {len(runs)}: {result.get('diverged', 'done')}")
        yield result


def compare_curves(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The largest difference between a seed's logged values with fused and with reference ops."""
    reference = next((r for r in results if r["backend"] == "reference"), None)
    if reference is None:
        return None
    fused = next(r for r in results if r["backend"] is None and r["seed"] == reference["seed"])
    if "diverged" in fused or "diverged" in reference:
        return None
    largest = 0.0
    for a, b in zip(fused["curves"], reference["curves"], strict=True):
        largest = max([largest, *(abs(a[k] - b[k]) for k in a if k != "step")])
    return {"seed": reference["seed"], "largest_difference": largest}


def print_tables(domains: data.Domains, results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    seeds = [r["seed"] for r in results if "measures" in r]
    for made in report.tables(results):
        table = Table(title=made["title"])
        table.add_column(domains.name)
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right")
        if len(seeds) > 1:
            table.add_column("median", justify="right")
        for name, values, middle in made["rows"]:
            table.add_row(name, *values, *([middle] if len(seeds) > 1 else []))
        Console().print(table)


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over seeds that did not diverge."""
    mine = [r["measures"] for r in results if "measures" in r]
    summary: dict[str, Any] = {}
    for key, value in mine[0].items() if mine else ():
        if isinstance(value, dict):
            summary[key] = {name: median(m[key][name] for m in mine) for name in value}
        else:
            summary[key] = median(m[key] for m in mine)
    return summary


def run_train(options: argparse.Namespace) -> int:
    global _domains
    start = time.perf_counter()
    settings = settings_of(options)
    with command.results_in(options.out, hasattr(options, "resume"), hasattr(options, "overwrite")):
        domains = _domains = load_domains(options)
        Trainer(domains, settings)  # tells now what does not fit
        results = list(run_all(options, settings))
        summary: dict[str, Any] = {"median": summarise(results), "reference": compare_curves(results)}
        summary["seconds"] = round(time.perf_counter() - start, 1)
        print_tables(domains, results)
        if summary["reference"]:
            largest = summary["reference"]["largest_difference"]
            print(f"fused and reference ops: curves differ by at most {largest:.2g}")
        written = {
            "domains": domains.name,
            "summary": summary,
            "trainings": results,
            "torch": torch.__version__,
        }
        files.write(options.out / "results.json", page.as_json(written))
        written_to = report.write_report(options.out / "report.html", domains, results, summary)
    print(f"{written_to} and {options.out / 'results.json'} written after {summary['seconds']:.0f} s")
    diverged = [r["diverged"] for r in results if "diverged" in r]
    if diverged:
        print(
            f"fastda simgan train: {diverged[0]}; try a smaller --lr and --discriminator-lr, "
            f"or a larger --batch",
            file=sys.stderr,
        )
    return 1 if diverged else 0


def run_evaluate(options: argparse.Namespace) -> int:
    net, state = load_refiner(options.checkpoint)
    domains = load_domains(options)
    shape = tuple(domains.synthetic.x.shape[1:])
    if tuple(state["shape"]) != shape or state["task"] != domains.task:
        raise command.SettingsError(
            f"{options.checkpoint}: refines {tuple(state['shape'])}, {state['task'] or 'no'} labels; "
            f"those given are of {shape}, {domains.task or 'no'} labels"
        )
    results = []
    for seed in options.seeds:
        measures = _measures(
            domains, lambda x: refine(net, x, domains.task), matcher(net, domains.task), seed, options
        )
        results.append({"seed": seed, "backend": None, "measures": measures})
    print_tables(domains, results)
    if hasattr(options, "json"):
        written = {"domains": domains.name, "summary": {"median": summarise(results)}, "trainings": results}
        files.write(options.json, page.as_json(written))
    return 0


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    torch.set_num_threads(1)
    if options.command in ("refine", "draw"):
        from fastda.recipes.simgan import refining as module

        commands = {"refine": module.run_refine, "draw": module.run_draw}
    elif options.command == "bench":
        from fastda.recipes.simgan.bench import run_bench

        commands = {"bench": run_bench}
    else:
        commands = {"train": run_train, "evaluate": run_evaluate}
    return command.run(f"fastda simgan {options.command}", lambda: commands[options.command](options))
