"""Figures of the report page."""

from __future__ import annotations

import base64
import io
from typing import Any

from benchmarks.rows import (
    Row,
    best,
    number,
    ratio_key,
    sizes,
    what,
)
from fastda.tools.bench import FLOOR

OURS, WIN, LOSS, PEER = "#0b62a4", "#2a7f62", "#b3372f", "#8a8f98"


# A figure is an image in the page, so that identifiers in one do not meet those in another.
def _image(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plain(axis: Any, title: str = "") -> None:
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def bars(rows: list[Row]) -> str:
    """A bar a case: how many times as long as fastda its best peer takes, with interval; losses in red."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axis = plt.subplots(figsize=(9.6, 0.34 * len(rows) + 0.9))
    top = 1.0
    for i, row in enumerate(rows):
        key = ratio_key(row)
        name = best(row, "any")
        if name is None:
            continue
        r = row["contenders"][name][key]
        value, low, high = (min(max(r[k], 0.05), 30.0) for k in ("ratio", "low", "high"))
        colour = WIN if value >= 1 else LOSS
        sure = low > 1 or high < 1
        axis.barh(i, value - 1, left=1, height=0.62, color=colour, alpha=0.85 if sure else 0.35)
        axis.plot([low, high], [i, i], color="black", linewidth=1.1)
        others = [
            c[key]["ratio"]
            for n, c in row["contenders"].items()
            if n != name and not n.startswith("fastda") and n != FLOOR and key in c
        ]
        axis.plot(others, [i] * len(others), "|", color="#555555", markersize=6, markeredgewidth=0.9)
        text = f"{number(r['ratio'])}×  {name}"
        axis.annotate(
            text, (max(high, value, 1), i), (5, 0), textcoords="offset points", va="center", fontsize=7.5,
            color="black" if value >= 1 else LOSS,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
        top = max(top, high)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if t <= 2.6 * top]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    smallest = min(
        [r["contenders"][n][ratio_key(r)]["low"] for r in rows if (n := best(r, "any"))], default=1
    )
    axis.set_xlim(min(0.5, 0.8 * max(smallest, 0.05)), 2.6 * top)
    axis.set_yticks(range(len(rows)), [what(row) for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    _plain(axis)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", linewidth=0.4, color="#dddddd")
    axis.set_axisbelow(True)
    left, right = axis.get_xlim()
    axis.text(left, -0.75, "◂ fastda slower", color=LOSS, fontsize=8, va="bottom", ha="left")
    axis.text(right, -0.75, "fastda faster ▸", color=WIN, fontsize=8, va="bottom", ha="right")
    return _image(figure)


def roofline(run: dict[str, Any]) -> str | None:
    """Useful operations per second against operations per byte, under this machine's measured roofs."""
    import matplotlib.pyplot as plt

    rows = [r for r in run["rows"] if r["flops"] and r["bytes"] and r["case"]["threads"] == 1]
    peak = run["machine"]["peaks"].get("1")
    if not rows or not peak:
        return None
    figure, axis = plt.subplots(figsize=(7.6, 4.2))
    intensity = [r["flops"] / r["bytes"] for r in rows]
    low, high = min(intensity) / 3, max(intensity) * 3
    ridge = peak["gflops"] / peak["gbs"]
    line = sorted({low, ridge, high})
    axis.plot(line, [min(peak["gflops"], peak["gbs"] * x) for x in line], color="black", linewidth=1.2)
    axis.text(
        high, peak["gflops"] * 1.04, f"multiply-add peak {peak['gflops']:.0f} GFLOP/s", ha="right", fontsize=8
    )
    if low < ridge:
        axis.text(
            low * 1.1, peak["gbs"] * low * 1.35, f"copy {peak['gbs']:.0f} GB/s", fontsize=8, rotation=35
        )
    for x, r in zip(intensity, rows, strict=True):
        ours = 1e-9 * r["flops"] / r["contenders"]["fastda"]["median"]
        name = best(r, "any")
        if name:
            theirs = 1e-9 * r["flops"] / r["contenders"][name]["median"]
            axis.plot([x, x], [theirs, ours], color=WIN if ours >= theirs else LOSS, linewidth=0.9, zorder=1)
            axis.plot(x, theirs, "o", color="white", markeredgecolor=PEER, markersize=6)
        marker = "^" if r["case"]["mode"] == "forward" else "o"
        axis.plot(x, ours, marker, color=OURS, markersize=6)
    for label, marker, fill, edge in (
        ("fastda, forward", "^", OURS, OURS),
        ("fastda, forward + backward", "o", OURS, OURS),
        ("its best peer", "o", "white", PEER),
    ):
        axis.plot([], [], marker, color=fill, markeredgecolor=edge, label=label)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(bottom=0.7 * min(1e-9 * r["flops"] / c["median"] for r in rows for c in [_slowest(r)]))
    axis.set_xlabel("operations per byte that must move", fontsize=8)
    axis.set_ylabel("GFLOP/s", fontsize=8)
    _plain(axis)
    return _image(figure)


def _slowest(row: Row) -> dict[str, Any]:
    """Of fastda and its best peer."""
    shown = [row["contenders"][n] for n in ("fastda", best(row, "any")) if n]
    return max(shown, key=lambda c: c["median"])


def threads(rows: list[Row]) -> str | None:
    """How many times as fast two threads are as one, taken in turn."""
    import matplotlib.pyplot as plt

    shown = [r for r in rows if "fastda, 1 thread" in r["contenders"]]
    if not shown:
        return None
    figure, axis = plt.subplots(figsize=(7.6, 0.3 * len(shown) + 0.7))
    for i, r in enumerate(shown):
        s = r["contenders"]["fastda, 1 thread"]["ratio"]
        axis.barh(i, s["ratio"], height=0.6, color=OURS, alpha=0.8)
        axis.plot([s["low"], s["high"]], [i, i], color="black", linewidth=1.1)
        axis.text(s["high"] + 0.03, i, f"{s['ratio']:.2f}×", va="center", fontsize=8)
        axis.plot([r["case"]["threads"]] * 2, [i - 0.4, i + 0.4], color="#999999", linewidth=1, linestyle=":")
    axis.set_yticks(range(len(shown)), [what(r) for r in shown], fontsize=8)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, max(r["case"]["threads"] for r in shown) * 1.15)
    axis.axvline(1, color="black", linewidth=0.8)
    _plain(axis)
    return _image(figure)


def growth(sweeps: list[dict[str, Any]]) -> str | None:
    """Time against one size on log axes, with the fitted exponents."""
    import matplotlib.pyplot as plt

    if not sweeps:
        return None
    columns = 5
    lines = -(-len(sweeps) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(10.4, 2.35 * lines), squeeze=False)
    for axis, s in zip(axes.flat, sweeps, strict=False):
        values = [p["value"] for p in s["points"]]
        for who, colour in (("eager", PEER), ("fastda", LOSS if s["finding"] else OURS)):
            axis.plot(
                values, [1e3 * p[who] for p in s["points"]], "o-", color=colour, markersize=3, linewidth=1.4
            )
        e = s["exponents"]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.text(
            0.04, 0.96, f"fastda {e['fastda']:.2f}\neager {e['eager']:.2f}",
            transform=axis.transAxes, va="top", fontsize=8,
        )  # fmt: skip
        name = s["workload"].replace("_discriminator_loss", "_loss").split(".")[0]
        _plain(axis, f"{name}: {s['axis']}")
        axis.title.set_fontsize(8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(sweeps) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("ms", fontsize=8)
    figure.tight_layout()
    return _image(figure)


def memory(rows: list[Row]) -> str | None:
    """Peak of a training step above what stays between steps."""
    import matplotlib.pyplot as plt

    shown = [r for r in rows if r.get("memory")]
    if not shown:
        return None
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 2.3), squeeze=False)
    for axis, r in zip(axes[0], shown, strict=True):
        names = list(r["memory"])
        for i, name in enumerate(names):
            mib = r["memory"][name]["step"] / 2**20
            axis.barh(i, mib, height=0.65, color=OURS if name.startswith("fastda") else PEER)
            axis.text(mib, i, f" {mib:.0f}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names if axis is axes[0][0] else [""] * len(names), fontsize=8)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlabel("MiB", fontsize=8)
        _plain(axis, f"{r['case']['workload']} {sizes(r)}")
        axis.title.set_fontsize(8)
    figure.tight_layout()
    return _image(figure)
