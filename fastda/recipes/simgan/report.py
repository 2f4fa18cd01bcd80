"""Picture grids (synthetic, refined, difference, real) and one HTML page about the trainings."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastda import files
from fastda.recipes.common.page import environment, png, svg
from fastda.recipes.simgan.data import Domains

COLOURS = ("#0b62a4", "#c2571a", "#2a8f5c", "#7a5ba8", "#8a8f98")
ROWS = ("synthetic", "refined", "difference", "real")


def difference(refined: Tensor, synthetic: Tensor) -> Tensor:
    """Signed, around mid-grey: what became lighter is light. uint8 in and out."""
    return (128 + (refined.int() - synthetic.int()) / 2).round().clamp(0, 255).to(torch.uint8)


def grid(synthetic: Tensor, refined: Tensor, real: Tensor, scale: int = 2) -> np.ndarray:
    """One picture, uint8 (H, W, 3): a column per image, the rows as in `ROWS`, each named at its left."""
    from PIL import Image, ImageDraw, ImageFont

    rows = (synthetic, refined, difference(refined, synthetic), real)
    height, width = synthetic.shape[2:]
    gap, margin = 2, 74
    step_x, step_y = width * scale + gap, height * scale + gap
    canvas = Image.new("RGB", (margin + step_x * len(synthetic), step_y * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (name, images) in enumerate(zip(ROWS, rows, strict=True)):
        draw.text(
            (4, r * step_y + height * scale / 2 - 6), name, fill="black", font=ImageFont.load_default(12)
        )
        for c, image in enumerate(images[: len(synthetic)]):
            pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + c * step_x, r * step_y))
    return np.asarray(canvas)


def columns(domains: Domains) -> int:
    """How many images a grid of about 1,000 pixels' width holds."""
    return min(24, max(4, 960 // (2 * domains.synthetic.x.shape[3])))


def shown(domains: Domains) -> tuple[Tensor, Tensor]:
    """Held-out images, synthetic and real, from all over them; one of every class in turn."""
    n = columns(domains)
    picked = []
    for images in (domains.synthetic_test, domains.real_test):
        # What lies side by side in a folder is often of one kind.
        shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(2016))
        images = images[shuffled]
        order = torch.arange(len(images))
        if domains.task == "class" and images.y is not None:
            ranks = torch.zeros(len(images), dtype=torch.long)
            for c in range(len(domains.classes)):
                members = images.y == c
                ranks[members] = torch.arange(int(members.sum()))
            order = (ranks * len(domains.classes) + images.y).argsort()
        picked.append(images.x[order[torch.arange(n) % len(order)]])
    return picked[0], picked[1]


def write_grid(path: Path, domains: Domains, refine: Any) -> Path:
    from PIL import Image

    synthetic, real = shown(domains)
    with files.unfinished(path) as beside:
        Image.fromarray(grid(synthetic, refine(synthetic), real)).save(beside, format="PNG")
    return path


def curves(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10.4, 2.9))
    start = settings["pretrain_refiner"] + settings["pretrain_discriminator"]
    panels: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
        ("Losses", (("refiner_loss", "refiner"), ("discriminator_loss", "discriminator"))),
        ("Discriminator's accuracy, per patch", (("accuracy_real", "real"), ("accuracy_refined", "refined"))),
        ("Mean change of a pixel, grey levels of 255", (("change", "|refined − synthetic|"),)),
    )
    for axis, (title, names) in zip(axes, panels, strict=True):
        for r in results:
            for (key, label), colour in zip(names, COLOURS, strict=False):
                rows = [row for row in r["curves"] if key in row and row["step"] > start]
                reference = r.get("backend") == "reference"
                first = r is results[0]
                axis.plot(
                    [row["step"] - start for row in rows],
                    [row[key] * (127.5 if key == "change" else 1) for row in rows],
                    color="black" if reference else colour, linewidth=0.9, alpha=0.9 if first else 0.45,
                    linestyle=(0, (2, 2)) if reference else "-", label=label if first else None,
                )  # fmt: skip
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4, color="#dddddd")
        axis.legend(fontsize=7, frameon=False)
    axes[1].set_ylim(0, 1)
    axes[1].axhline(0.5, linewidth=0.8, color="#999999", linestyle=":")
    axes[2].set_ylim(bottom=0)
    figure.tight_layout()
    return svg(figure)


def tables(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measures as tables of strings: title, unit, seeds, rows of (name, values, median)."""
    results = [r for r in results if "measures" in r]
    made: list[dict[str, Any]] = []
    if not results:
        return made
    for key, title in (
        ("accuracy", "Accuracy on held-out real images of a classifier trained on …, %"),
        ("error", "Error on held-out real images of a gaze regressor trained on …, degrees"),
        ("centred", "The same, the mean differences of pitch and of yaw taken out, degrees"),
        ("two_sample", "A fresh classifier tells held-out real images from …, % right (50 is chance)"),
    ):
        found = [r["measures"].get(key) for r in results]
        if not found or not all(found):
            continue
        scale, digits = (1, 2) if key in ("error", "centred") else (100, 1)
        rows = []
        for name in found[0]:
            values = [scale * f[name] for f in found]
            rows.append((name, [f"{v:.{digits}f}" for v in values], f"{median(values):.{digits}f}"))
        made.append({"title": title, "rows": rows})
    if all("gaze_kept" in r["measures"] for r in results):
        rows = []
        for key, name in (
            ("gaze_raw", "error on raw images"),
            ("gaze_refined", "error on refined images"),
            ("gaze_kept", "between its readings of an image and of its refined copy"),
        ):
            values = [r["measures"][key] for r in results]
            rows.append((name, [f"{v:.2f}" for v in values], f"{median(values):.2f}"))
        title = "A gaze regressor trained on raw images, held-out synthetic images, degrees"
        made.append({"title": title, "rows": rows})
    return made


def words(results: list[dict[str, Any]]) -> list[str]:
    """What the measures say, and what went wrong, in sentences."""
    said = [f"{r['diverged']}." for r in results if "diverged" in r]
    measures = [r["measures"] for r in results if "measures" in r]
    if not measures:
        return said

    def middle(key: str, name: str) -> float:
        return median(m[key][name] for m in measures)

    told, told_refined = middle("two_sample", "raw"), middle("two_sample", "refined")
    if told_refined >= told - 0.01:
        said.append(
            f"Refining did not make the images harder to tell from real ones: {100 * told:.1f} % of the raw, "
            f"{100 * told_refined:.1f} % of the refined ones are told."
        )
    for key, better in (("accuracy", 1), ("error", -1)):
        if all(key in m for m in measures):
            raw, best = (
                middle(key, "raw"),
                better * max(better * middle(key, name) for name in ("refined", "raw + refined")),
            )
            if better * (best - raw) <= 0:
                said.append(
                    "What was trained on refined images does no better on real ones than what was not."
                )
    return said


def write_report(
    path: Path, domains: Domains, results: list[dict[str, Any]], summary: dict[str, Any]
) -> Path:
    from PIL import Image

    templates = environment(Path(__file__).parent)
    settings = results[0]["settings"]
    pictures = [
        {"seed": r["seed"], "image": png(np.asarray(Image.open(path.parent / r["grid"]).convert("RGB")))}
        for r in results
        if r.get("grid")
    ]
    page = templates.get_template("report.html.j2").render(
        domains=domains, tables=tables(results), pictures=pictures, curves=curves(results, settings),
        seeds=[r["seed"] for r in results if "measures" in r], settings=settings, words=words(results),
        summary=summary, torch=torch.__version__,
    )  # fmt: skip
    files.write(path, page)
    return path
