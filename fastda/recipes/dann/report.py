"""One self-contained HTML page about the trainings: curves, samples with predictions, confusion, features."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import fastda
from fastda import files
from fastda.recipes.common.page import environment, png, svg
from fastda.recipes.dann.data import Pair

COLOURS = {
    "source": "#8a8f98",
    "dann": "#0b62a4",
    "related": "#2a8f5c",
    "target": "#c2571a",
}
NAMES = {
    "source": "Source only", "dann": "DANN", "related": "Related weights", "target": "Train on target",
}  # fmt: skip


def _main(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The training of the first seed of each method, with fastda's own choice of ops."""
    first: dict[str, dict[str, Any]] = {}
    for r in results:
        if (
            r.get("backend") != "reference"
            and "diverged" not in r
            and (r["method"] not in first or r["seed"] < first[r["method"]]["seed"])
        ):
            first[r["method"]] = r
    return first


def curves(results: list[dict[str, Any]]) -> str:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10.4, 2.9))
    panels = (
        ("target_accuracy", "Accuracy, held-out target"),
        ("label_loss", "Label loss, training"),
        ("domain_accuracy", "Accuracy of the domain classifier"),
    )
    for axis, (key, title) in zip(axes, panels, strict=True):
        seen: set[str] = set()
        for r in results:
            values = [row[key] for row in r["history"] if key in row]
            if not values:
                continue
            reference = r.get("backend") == "reference"
            label = NAMES[r["method"]] + (", reference ops" if reference else "")
            axis.plot(
                range(1, len(values) + 1), values, color="black" if reference else COLOURS[r["method"]],
                linestyle=(0, (2, 2)) if reference else "-", linewidth=1.1 if reference else 1.6,
                zorder=3 if reference else 2, marker="o" if len(values) == 1 else None,
                label=None if label in seen else label,
            )  # fmt: skip
            seen.add(label)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlabel("epoch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4, color="#dddddd")
        if key == "domain_accuracy":
            axis.axhline(0.5, linewidth=0.8, color="#999999", linestyle=":")
        if key == "label_loss":
            axis.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=5, fontsize=8, frameon=False, bbox_to_anchor=(0.5, -0.1)
    )
    figure.tight_layout()
    return svg(figure)


def _projections(features: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Both domains' features in the plane: t-SNE of their leading principal components."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    joined = np.concatenate([features["source"], features["target"]]).astype(np.float64)
    leading = PCA(min(30, *joined.shape), random_state=0).fit_transform(joined)
    if len(joined) < 100:
        return leading[:, :2], "PCA"
    return TSNE(2, perplexity=30, init="pca", random_state=0, max_iter=500).fit_transform(leading), "t-SNE"


def feature_maps(names: tuple[str, ...], main: dict[str, dict[str, Any]]) -> tuple[str, str]:
    import matplotlib.pyplot as plt

    shown = [m for m in ("source", "dann", "related") if "features" in main.get(m, {})]
    if not shown:
        return "", ""
    figure, axes = plt.subplots(
        1, 2 * len(shown), figsize=(10.4, 10.4 / (2 * len(shown)) + 0.5), squeeze=False
    )
    how = ""
    for i, method in enumerate(shown):
        features = main[method]["features"]
        points, how = _projections(features)
        domain = np.array([0] * len(features["source"]) + [1] * len(features["target"]))
        classes = np.concatenate([features["source_labels"], features["target_labels"]])
        by_domain, by_class = axes[0][2 * i], axes[0][2 * i + 1]
        for d, (colour, name) in enumerate((("#8a8f98", "source"), ("#c2571a", "target"))):
            by_domain.scatter(*points[domain == d].T, s=5, color=colour, linewidths=0, label=name, alpha=0.8)
        colours = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
        for c in np.unique(classes):
            by_class.scatter(
                *points[classes == c].T, s=5, color=colours(int(c) % colours.N), linewidths=0, label=names[c],
                alpha=0.85,
            )  # fmt: skip
        by_domain.set_title(f"{NAMES[method]}: domain", fontsize=9, loc="left")
        by_class.set_title("class", fontsize=9, loc="left")
        for axis in (by_domain, by_class):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color("#cccccc")
    figure.tight_layout()
    style: dict[str, Any] = {
        "fontsize": 8, "frameon": False, "markerscale": 2.5, "handletextpad": 0.1, "columnspacing": 0.9,
    }  # fmt: skip
    keys = [axis.get_legend_handles_labels() for axis in axes[0][:2]]
    figure.legend(*keys[0], loc="upper left", bbox_to_anchor=(0, 0.03), ncols=2, **style)
    if len(keys[1][0]) <= 20:
        figure.legend(*keys[1], loc="upper right", bbox_to_anchor=(1, 0.03), ncols=10, **style)
    return svg(figure), how


def confusion(pair: Pair, main: dict[str, dict[str, Any]]) -> str:
    import matplotlib.pyplot as plt

    shown = [m for m in ("source", "dann", "related", "target") if m in main]
    n = len(pair.classes)
    figure, axes = plt.subplots(1, len(shown), figsize=(10.4 / 4 * len(shown), 2.9), squeeze=False)
    truth = pair.target_test.y.numpy()
    for axis, method in zip(axes[0], shown, strict=True):
        counts = np.zeros((n, n))
        np.add.at(counts, (truth, np.asarray(main[method]["predictions"])), 1)
        share = counts / counts.sum(1, keepdims=True).clip(1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if n <= 12:
            for i, j in np.argwhere(share >= 0.005):
                axis.text(
                    j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=5,
                    color="white" if share[i, j] > 0.55 else "#333333",
                )  # fmt: skip
            axis.set_xticks(range(n), pair.classes, fontsize=7)
            axis.set_yticks(range(n), pair.classes, fontsize=7)
        axis.set_title(NAMES[method], fontsize=9, loc="left")
        axis.set_xlabel("predicted", fontsize=8)
    axes[0][0].set_ylabel("true", fontsize=8)
    figure.tight_layout()
    return svg(figure, wide=len(shown) > 2)


def samples(pair: Pair, main: dict[str, dict[str, Any]], per_class: int = 2) -> list[dict[str, Any]]:
    """Held-out images of every class in turn, with what each method said about the target's."""
    chosen = torch.cat(
        [(pair.target_test.y == c).nonzero().flatten()[:per_class] for c in range(min(10, len(pair.classes)))]
    )
    sources = torch.cat(
        [(pair.source_test.y == c).nonzero().flatten()[:per_class] for c in range(min(10, len(pair.classes)))]
    )

    def picture(image: torch.Tensor) -> str:
        return png(image.permute(1, 2, 0).numpy())

    methods = [m for m in ("source", "dann", "related", "target") if m in main]
    rows: list[dict[str, Any]] = [
        {"name": "Source", "images": [picture(pair.source_test.x[i]) for i in sources]},
        {"name": "Target", "images": [picture(pair.target_test.x[i]) for i in chosen]},
    ]
    for method in methods:
        said = [main[method]["predictions"][int(i)] for i in chosen]
        right = [s == int(pair.target_test.y[i]) for s, i in zip(said, chosen, strict=True)]
        rows.append(
            {
                "name": NAMES[method],
                "answers": [(pair.classes[s], ok) for s, ok in zip(said, right, strict=True)],
            }
        )
    return rows


def write_report(path: Path, pair: Pair, results: list[dict[str, Any]], summary: dict[str, Any]) -> Path:
    templates = environment(Path(__file__).parent)
    main = _main(results)
    seeds = sorted({r["seed"] for r in results})
    table = []
    for method in (m for m in NAMES if m in summary["accuracy"]):
        values = summary["accuracy"][method]
        covered = summary["gap_covered"].get(method)
        seconds = [r["seconds"] for r in results if r["method"] == method and "seconds" in r]
        table.append(
            {
                "name": NAMES[method],
                "values": [f"{100 * values[s]:.1f}" if s in values else "" for s in seeds],
                "median": f"{100 * median(values.values()):.1f}",
                "covered": f"{covered['median']:.2f}" if covered else "",
                "seconds": f"{median(seconds):.0f}",
            }
        )
    maps, how = feature_maps(pair.classes, main)
    settings = next((r for r in results if r["method"] == "dann"), results[0])
    said = [r["diverged"] for r in results if "diverged" in r]
    shown = {
        k: v for k, v in settings.items() if not isinstance(v, (list, dict)) and k not in ("method", "seed")
    }
    for key in ("target_accuracy", "seconds", "backend", "predictions", "diverged"):
        shown.pop(key, None)
    page = templates.get_template("report.html.j2").render(
        pair=pair, seeds=seeds, table=table, summary=summary, curves=curves(results), maps=maps, how=how,
        confusion=confusion(pair, main) if main else "", rows=samples(pair, main), said=said, settings=shown,
        torch=torch.__version__, fastda=fastda.__version__,
    )  # fmt: skip
    files.write(path, page)
    return path
