"""Command line: train refiners over seeds and measure them, refine a folder of labelled images, draw some."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastda import files
from fastda.recipes.common.checkpoint import CheckpointError
from fastda.recipes.common.images import DataError
from fastda.recipes.simgan import data, evaluate, eyes, models, report
from fastda.recipes.simgan.train import (
    KINDS,
    OPTIMISERS,
    REDUCTIONS,
    Settings,
    Trainer,
    load_refiner,
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
        QUICK, net="change", steps=200, pretrain_refiner=0, pretrain_discriminator=50, reg_scale=8.0,
        batch=16, refiner_steps=1, lr=0.0001, discriminator_lr=0.001, match=1, mirror=5, shift=2,
    ),
    "folders": replace(QUICK, reg_scale=0.1),
}  # fmt: skip
# The paper's networks for gaze, step sizes, minibatch and sums; it gives neither λ nor B.
PAPER = Settings(
    steps=10_000, batch=512, optimiser="sgd", lr=0.001, discriminator_lr=0.001, reduction="batchmean",
    reg_scale=0.0001, history=5120,
)  # fmt: skip
DEMO: dict[str, Any] = {"steps": 150}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastda simgan", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser(
        "train",
        help="Algorithm 1 for every seed, then the measures; writes results.json and report.html",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = sub.add_argument
    add("--data", choices=DATA, default="strokes", help="what is refined to look like what")
    add("--synthetic", type=Path, metavar="DIR",
        help="synthetic images; with --data eyes a SynthEyes or UnityEyes folder")  # fmt: skip
    add("--real", type=Path, metavar="DIR",
        help="real images: MPIIGaze's Data/Normalized or a folder of eye crops, or any folder")  # fmt: skip
    add("--mnist", type=Path, metavar="DIR", help="folder of MNIST's four IDX files instead of 5,000 digits")
    add("--fonts", type=Path, metavar="DIR", help="folder of font files instead of matplotlib's")
    add("--count", type=int, help="synthetic images to draw")
    add("--size", type=_size, metavar="HxW", help="resize the images of --data folders")
    add("--colour", action="store_true", help="keep the colours of --data folders")
    add("--preset", choices=("tuned", "paper", "demo"), default="tuned", help="all that is not given below")
    add("--seeds", nargs="+", type=int, metavar="N", default=[0])
    add("--out", type=Path, default=Path("out/simgan"))
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="seeds at a time")
    add("--sample-every", type=int, default=200, metavar="N", help="steps from picture grid to picture grid")
    add("--save-every", type=int, default=100, metavar="N", help="steps from checkpoint to checkpoint")
    add(
        "--tensorboard",
        action="store_true",
        help="scalars under OUT/tensorboard (needs the package tensorboard)",
    )
    add("--compare-reference", action="store_true", help="train the first seed again with the reference ops")
    add("--eval-steps", type=int, default=400, help="training steps of each network that measures success")
    group = sub.add_argument_group("settings of Algorithm 1 (default: the preset's)")
    helps = {
        "net": "R and D", "steps": "T", "batch": "images in a minibatch", "refiner_steps": "K_g",
        "discriminator_steps": "K_d", "pretrain_refiner": "steps of R alone, by the ℓ₁ term",
        "pretrain_discriminator": "steps of D alone", "lr": "of R", "discriminator_lr": "of D",
        "kind": "of the patch loss", "reduction": "of both losses", "label_smoothing": "of D's targets",
        "reg_scale": "λ", "psi": "ψ", "history": "B, refined images that D sees again; 0 turns it off",
        "match": "pixels of a cell: means over cells get the real images' statistics first; 0: off",
        "mirror": "pixels of reflection around R's input, against frames",
        "shift": "pixels by which real images are moved at random",
        "average": "decay of the moving average of R's weights; 0 turns it off", "optimiser": "of both nets",
    }  # fmt: skip
    choices = {"net": models.NETS, "psi": models.PSI, "kind": KINDS, "optimiser": OPTIMISERS,
               "reduction": REDUCTIONS}  # fmt: skip
    for field in fields(Settings):
        if field.name in helps:
            group.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default), choices=choices.get(field.name),
                help=helps[field.name], metavar=None if field.name in choices else "X",
            )  # fmt: skip

    sub = commands.add_parser(
        "refine", help="write refined copies of a folder of images, their labels beside them"
    )
    sub.add_argument("checkpoint", type=Path, help="checkpoint.safetensors of a training")
    sub.add_argument(
        "images", type=Path, help="folder; subfolders and files that are not images are copied too"
    )
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument(
        "--resize", action="store_true", help="bring images to the size that the refiner was trained on"
    )

    sub = commands.add_parser(
        "draw", help="write labelled synthetic images: digits in class folders, eyes with JSON"
    )
    sub.add_argument("data", choices=("strokes", "fonts", "eyes"))
    sub.add_argument("--count", type=int, default=100)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--fonts", type=Path, metavar="DIR")
    sub.add_argument("--out", type=Path, required=True)

    sub = commands.add_parser(
        "bench", help="time of a gaze training step: fused, as people write it, and at its best"
    )
    sub.add_argument("--batch", nargs="+", type=int, default=[32, 128])
    sub.add_argument("--rounds", type=int, default=3, help="in each of three processes, at least")
    sub.add_argument("--threads", type=int, default=1)
    sub.add_argument("--compile", action="store_true", help="torch.compile as a contender too")
    sub.add_argument("--out", type=Path, help="folder for simgan-step.json")

    options = parser.parse_args(argv)
    if options.command == "train":
        if options.preset == "demo":  # about a minute
            options.count = getattr(options, "count", 2000)
            options.eval_steps, options.sample_every = (
                min(options.eval_steps, 150),
                min(options.sample_every, 60),
            )
        if options.data == "folders" and not (hasattr(options, "synthetic") and hasattr(options, "real")):
            parser.error("--data folders needs --synthetic and --real")
        if options.data == "eyes" and not hasattr(options, "real"):
            parser.error("--data eyes needs --real: MPIIGaze's Data/Normalized or a folder of eye crops")
        for name, least in (
            ("jobs", 1),
            ("eval_steps", 1),
            ("sample_every", 1),
            ("save_every", 1),
            ("count", 10),
        ):
            if getattr(options, name, least) < least:
                parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return options


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
        return data.folders(
            options.synthetic, options.real, getattr(options, "size", None), hasattr(options, "colour")
        )
    if options.data == "eyes":
        return data.eyes_to_real(options.real, getattr(options, "synthetic", None), **given)
    mnist, fonts = getattr(options, "mnist", None), getattr(options, "fonts", None)
    return data.digits_to_mnist(options.data, mnist_folder=mnist, fonts=fonts, **given)


# ---------------------------------------------------------------------------------------------- the trainings

_domains: data.Domains | None = None


def _start_worker(options: argparse.Namespace, lock: Any, threads: int) -> None:
    from tqdm import tqdm

    global _domains
    tqdm.set_lock(lock)
    torch.set_num_threads(threads)
    _domains = load_domains(options)


def run_one(options: argparse.Namespace, settings: Settings, index: int) -> dict[str, Any]:
    """One training and its measures; everything that table and report need of it, as plain values."""
    from tqdm import tqdm

    domains = _domains
    assert domains is not None
    reference = settings.backend == "reference"
    name = f"seed-{settings.seed}" + ("-reference" if reference else "")
    folder = options.out / name
    start = time.perf_counter()

    def sample(trainer: Trainer) -> None:
        report.write_grid(folder / f"grid-{trainer.step:06d}.png", domains, trainer.refine)

    trainer = train(
        domains, settings, folder=folder, resume=hasattr(options, "resume"), save_every=options.save_every,
        sample_every=options.sample_every, sample=None if reference else sample, progress=True,
        position=index, label=name.replace("-", " "),
        tensorboard=options.out / "tensorboard" / name if hasattr(options, "tensorboard") else None,
    )  # fmt: skip
    trained = time.perf_counter() - start
    result: dict[str, Any] = {
        "seed": settings.seed, "backend": settings.backend, "settings": asdict(settings),
        "curves": trainer.curves, "training_seconds": round(trained, 1),
    }  # fmt: skip
    if reference:
        return result
    result["grid"] = str(report.write_grid(folder / "grid.png", domains, trainer.refine))
    steps = {"steps": options.eval_steps, "judge_steps": max(1, options.eval_steps // 4), "judges": 2}
    with tqdm(
        total=evaluate.training_steps(domains, **steps), unit="step", position=index, dynamic_ncols=True,
        desc=f"seed {settings.seed}, measures", mininterval=0.5,
    ) as bar:  # fmt: skip
        measures = evaluate.evaluate(domains, trainer.refine, seed=settings.seed, progress=bar, **steps)
    result["measures"] = measures
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def run_all(options: argparse.Namespace, settings: Settings) -> Iterator[dict[str, Any]]:
    runs = [replace(settings, seed=seed) for seed in options.seeds]
    if hasattr(options, "compare_reference"):
        runs.append(replace(settings, seed=options.seeds[0], backend="reference"))
    jobs = min(options.jobs, len(runs))
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    threads = max(1, cores // jobs)
    if jobs == 1:
        torch.set_num_threads(threads)
        for index, run in enumerate(runs):
            yield run_one(options, run, index)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start_worker, (options, context.RLock(), threads)) as pool:
        futures = [pool.submit(run_one, options, run, i) for i, run in enumerate(runs)]
        for future in futures:
            yield future.result()


def compare_curves(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The largest difference between a seed's logged values with fused and with reference ops."""
    reference = next((r for r in results if r["backend"] == "reference"), None)
    if reference is None:
        return None
    fused = next(r for r in results if r["backend"] is None and r["seed"] == reference["seed"])
    largest = 0.0
    for a, b in zip(fused["curves"], reference["curves"], strict=True):
        largest = max([largest, *(abs(a[k] - b[k]) for k in a if k != "step")])
    return {"seed": reference["seed"], "largest_difference": largest}


def print_tables(domains: data.Domains, results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    seeds = [r["seed"] for r in results if r["backend"] is None]
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
    """Medians over seeds."""
    mine = [r["measures"] for r in results if r["backend"] is None]
    summary: dict[str, Any] = {}
    for key, value in mine[0].items():
        if isinstance(value, dict):
            summary[key] = {name: median(m[key][name] for m in mine) for name in value}
        else:
            summary[key] = median(m[key] for m in mine)
    return summary


def run_train(options: argparse.Namespace) -> int:
    global _domains
    start = time.perf_counter()
    settings = settings_of(options)
    domains = _domains = load_domains(options)
    results = list(run_all(options, settings))
    summary: dict[str, Any] = {"median": summarise(results), "reference": compare_curves(results)}
    summary["seconds"] = round(time.perf_counter() - start, 1)
    print_tables(domains, results)
    if summary["reference"]:
        largest = summary["reference"]["largest_difference"]
        print(f"fused and reference ops: curves differ by at most {largest:.2g}")
    written = {"domains": domains.name, "summary": summary, "trainings": results, "torch": torch.__version__}
    files.write(options.out / "results.json", json.dumps(written, indent=1) + "\n")
    page = report.write_report(options.out / "report.html", domains, results, summary)
    print(f"{page} and {options.out / 'results.json'} written after {summary['seconds']:.0f} s")
    return 0


# ------------------------------------------------------------------------------------------ refining, drawing


def run_refine(options: argparse.Namespace) -> int:
    """Refined images under the originals' names; every other file, such as labels, is copied as it is."""
    from PIL import Image
    from tqdm import tqdm

    net, state = load_refiner(options.checkpoint)
    channels, *size = state["shape"]
    files = data.image_files(options.images)
    out = options.out.resolve()
    if out == options.images.resolve() or options.images.resolve() in out.parents:
        raise DataError(f"{options.out}: --out must lie outside of {options.images}")
    for path in sorted(p for p in options.images.rglob("*") if p.is_file() and p not in set(files)):
        target = options.out / path.relative_to(options.images)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    for path in tqdm(files, unit="image", dynamic_ncols=True):
        image = data.read_image(path, tuple(size) if options.resize else None, channels == 3)
        if list(image.shape[1:]) != size:
            raise DataError(
                f"{path}: {image.shape[2]}×{image.shape[1]}, but the refiner was trained on "
                f"{size[1]}×{size[0]}; --resize brings images to that size"
            )
        if state["task"] == "gaze":
            image = eyes.equalise(image[None])[0]
        refined = refine(net, image[None], state["task"])[0]
        pixels = refined.permute(1, 2, 0).numpy() if channels == 3 else refined[0].numpy()
        target = options.out / path.relative_to(options.images)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.tmp")
        with Image.open(path) as original:
            Image.fromarray(pixels).save(unfinished, format=original.format)
        os.replace(unfinished, target)
    print(f"{len(files)} refined images in {options.out}")
    return 0


def run_draw(options: argparse.Namespace) -> int:
    """Digits as CLASS/N.png; eyes as N_PITCH_YAW.png, which `--synthetic` reads, and labels.csv."""
    from PIL import Image

    from fastda.recipes.simgan import digits

    if options.count < 1:
        raise DataError(f"--count must be at least 1, got {options.count}")
    generator = torch.Generator().manual_seed(options.seed)
    if options.data == "eyes":
        images, gazes = eyes.render(options.count, generator)
        options.out.mkdir(parents=True, exist_ok=True)
        lines = ["file,pitch,yaw,x,y,z"]
        for i, (image, gaze) in enumerate(zip(images, gazes, strict=True)):
            pitch, yaw = eyes.angles(gaze[None])[0].tolist()
            name = f"{i}_{pitch:.4f}_{yaw:.4f}.png"
            Image.fromarray(image[0].numpy()).save(options.out / name)
            lines.append(",".join([name, *(f"{v:.6f}" for v in (pitch, yaw, *gaze.tolist()))]))
        files.write(options.out / "labels.csv", "\n".join(lines) + "\n")
    else:
        labels = digits.balanced_labels(options.count, 10, generator)
        if options.data == "strokes":
            images = digits.pen_strokes(labels, generator)
        else:
            images = digits.font_digits(labels, generator, options.fonts)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            folder = options.out / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    print(f"{options.count} images in {options.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    torch.set_num_threads(1)
    try:
        if options.command == "bench":
            from fastda.recipes.simgan.bench import run_bench

            return run_bench(options)
        return {"train": run_train, "refine": run_refine, "draw": run_draw}[options.command](options)
    except (DataError, CheckpointError, ValueError) as error:
        print(f"fastda simgan: {error}", file=sys.stderr)
        return 2
