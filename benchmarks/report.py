"""What the results say: one self-contained HTML page, the docs' tables, and the README's table and chart."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.base import ROOT
from fastda import files
from fastda.tools.bench import FLOOR, combined
from fastda.tools.workloads import WORKLOADS, Workload

ENGINES = ("ONNX Runtime", "OpenVINO", "ncnn")
TITLES = {
    "step": "Training steps",
    "refiner": "Refiner convolutions",
    "patch_loss": "Patch losses",
    "grad_reverse": "Gradient reversal",
}
FAMILIES = {name: TITLES.get(name, name.capitalize()) for name in (*TITLES, *(w.family for w in WORKLOADS))}
MODES = {"forward": "forward", "backward": "forward + backward", "step": "step"}
ISAS = ("avx2", "base")  # folders of runs that were held to an instruction set
RESULTS = ROOT / "benchmarks" / "results.json"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
CHART = ROOT / "docs" / "images" / "speed.svg"
# The README's rows, by the ids of cases: one of each kind, and what loses.
SHORT = (
    "simgan_step-32x1x35x55-float32-step-1t",
    "dann_step-128x3x28x28-float32-step-1t",
    "refiner-32x4x35x55-float32-backward-1t",
    "refiner_block-32x64x3x35x55-float32-forward-1t",
    "refiner_block-32x64x3x35x55-float32-backward-1t",
    "patch_discriminator_loss.softmax-512x512x9x14-float32-backward-1t",
    "patch_discriminator_loss.lsgan-8x8x30x30-float32-backward-1t",
    "self_regularization-512x1x35x55-float32-backward-1t",
    "grad_reverse-128x768-float32-backward-1t",
    "grad_reverse-64x512x7x7-float32-backward-1t",
)
OURS, WIN, LOSS, PEER = "#0b62a4", "#2a7f62", "#b3372f", "#8a8f98"

Row = dict[str, Any]


def load(out: Path) -> list[dict[str, Any]]:
    """The runs under `out`, the unrestricted one first: machine, rows in the table's order, and growth.

    Rows of an older build than the last run's are left out.
    """
    runs = []
    order = [w.name for w in WORKLOADS]
    for folder in (out, *(out / isa for isa in ISAS)):
        if not (folder / "bench.json").exists():
            continue
        machine = json.loads((folder / "bench.json").read_text())["machine"]
        found = [json.loads(path.read_text()) for path in sorted((folder / "cases").glob("*.json"))]
        rows = [
            combined(kept["sessions"])
            for kept in found
            if kept["same"]["fingerprint"] == machine["fingerprint"]
        ]
        rows.sort(key=lambda row: (order.index(row["case"]["workload"]), *_position(row)))
        growth = folder / "growth.json"
        runs.append(
            {
                "machine": machine,
                "rows": rows,
                "growth": json.loads(growth.read_text()) if growth.exists() else [],
            }
        )
    return runs


def _workload(row: Row) -> Workload:
    return next(w for w in WORKLOADS if w.name == row["case"]["workload"])


def _position(row: Row) -> tuple[Any, ...]:
    case = row["case"]
    known = [tuple(s) for s in _workload(row).sizes]
    size = tuple(case["sizes"])
    return (
        known.index(size) if size in known else len(known),
        size,
        case["mode"] != "forward",
        case["threads"],
    )


def family(row: Row) -> str:
    return _workload(row).family


def best(row: Row, kind: str) -> str | None:
    """The fastest contender of a kind: "torch" (eager or compiled, however it is written), "engine", "layer"
    (a published one), "usual" (PyTorch as it is mostly written), or "any" of these."""
    names = [n for n in row["contenders"] if not n.startswith("fastda") and n != FLOOR]
    kinds = {
        "torch": [n for n in names if n.startswith(("eager", "torch.compile"))],
        "engine": [n for n in names if n in ENGINES],
        "layer": [n for n in names if not n.startswith(("eager", "torch.compile")) and n not in ENGINES],
        "usual": [n for n in names if n == "eager, usual code"],
        "any": names,
    }
    return min(kinds[kind], key=lambda n: row["contenders"][n]["median"], default=None)


def ratio_key(row: Row) -> str:
    """What an operator adds is compared where that is all there is to it."""
    return "added_ratio" if "added_ratio" in row["contenders"]["fastda"] else "ratio"


def number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else ">100"


def seconds(t: float) -> str:
    if t >= 1:
        return f"{t:.3g} s"
    return f"{1e3 * t:.3g} ms" if t >= 1e-3 else f"{1e6 * t:.3g} µs"


def sizes(row: Row) -> str:
    return _workload(row).show(row["case"]["sizes"])


def what(row: Row) -> str:
    case = row["case"]
    parts = [case["workload"], sizes(row)]
    if case["dtype"] != "float32":
        parts.append(case["dtype"])
    if case["layout"] != "contiguous":
        parts.append(case["layout"])
    parts.append(MODES[case["mode"]])
    if case["threads"] > 1:
        parts.append(f"{case['threads']} threads")
    return ", ".join(parts)


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


def headlines(rows: list[Row]) -> list[dict[str, Any]]:
    """A line a family and mode: the geometric mean of the ratios to the best peer, range, and losses."""
    found = []
    for name, title in FAMILIES.items():
        for mode, shown in MODES.items():
            members = [r for r in rows if family(r) == name and r["case"]["mode"] == mode and best(r, "any")]
            ratios = [r["contenders"][best(r, "any")][ratio_key(r)] for r in members]
            if ratios:
                values = [min(max(r["ratio"], 0.01), 100.0) for r in ratios]
                found.append(
                    {
                        "title": title,
                        "mode": shown,
                        "mean": number(geometric_mean(values)),
                        "low": number(min(values)),
                        "high": number(max(values)),
                        "faster": sum(r["low"] > 1 for r in ratios),
                        "slower": sum(r["high"] < 1 for r in ratios),
                        "equal": sum(r["low"] <= 1 <= r["high"] for r in ratios),
                        "class": "win" if min(values) >= 1 else "lost" if geometric_mean(values) < 1 else "",
                    }
                )
    return found


def verdict(rows: list[Row]) -> dict[str, Any]:
    """How many cases fastda wins, and by name those that it does not win for sure."""
    compared = [(r, best(r, "any")) for r in rows]
    ratios = [(r, n, r["contenders"][n][ratio_key(r)]) for r, n in compared if n]
    slower = sorted((q["ratio"], what(r), n) for r, n, q in ratios if q["high"] < 1)
    return {
        "count": len(ratios),
        "faster": sum(q["low"] > 1 for *_, q in ratios),
        "equal": sum(q["low"] <= 1 <= q["high"] for *_, q in ratios),
        "slower": [f"{case} ({number(ratio)}×, {n})" for ratio, case, n in slower],
    }


def table(rows: list[Row], machine: dict[str, Any]) -> dict[str, Any]:
    """Cells of the page's table of one family."""
    names = list(dict.fromkeys(n for r in rows for n in r["contenders"] if n != "fastda"))
    lines = []
    for r in rows:
        ours = r["contenders"]["fastda"]
        peak = machine["peaks"].get(str(r["case"]["threads"]))
        speed = 1e-9 * r["flops"] / ours["median"]
        cells = []
        for n in names:
            c = r["contenders"].get(n)
            q = c and c.get(ratio_key(r))
            cells.append(
                q
                and {
                    "text": number(q["ratio"]),
                    "interval": f"{number(q['low'])}–{number(q['high'])}",
                    "class": ("best " if n == best(r, "any") else "") + ("loss" if q["ratio"] < 1 else "win")
                    if not n.startswith("fastda")
                    else "own",
                }
            )
        lines.append(
            {
                "what": what(r),
                "time": seconds(ours["median"]),
                "flops": f"{speed:.0f}" if r["flops"] else "",
                "peak": f"{100 * speed / peak['gflops']:.0f} %" if r["flops"] and peak else "",
                "bytes": f"{1e-9 * r['bytes'] / ours['median']:.1f}" if r["bytes"] else "",
                "cells": cells,
                "warnings": "; ".join(r["warnings"].values()),
                "added": ratio_key(r) == "added_ratio",
            }
        )
    return {"names": names, "lines": lines, "flops": any(r["flops"] for r in rows)}


def page(out: Path) -> Path:
    """Write OUT/report.html."""
    import jinja2
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["font.family"] = ["DejaVu Sans"]
    runs = load(out)
    for run in runs:
        rows = run["rows"]
        groups = {f: [r for r in rows if family(r) == f] for f in FAMILIES}
        run["families"] = [
            {
                "title": FAMILIES[f],
                "bars": bars(g),
                "table": table(g, run["machine"]),
                "about": {w.op: w.about for w in WORKLOADS if w.name in {r["case"]["workload"] for r in g}},
            }
            for f, g in groups.items()
            if g
        ]
        run["headlines"] = headlines(rows)
        run["verdict"] = verdict(rows)
        run["noisy"] = sum(bool(r["warnings"]) for r in rows)
        run["absent"] = sorted({f"{n}: {why}" for r in rows for n, why in r["absent"].items()})
        run["figures"] = {
            "roofline": roofline(run),
            "threads": threads(rows),
            "memory": memory(rows),
            "growth": growth(run["growth"]),
        }
        run["findings"] = [s for s in run["growth"] if s["finding"]]
    loader = jinja2.FileSystemLoader(ROOT / "benchmarks")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    target = out / "report.html"
    files.write(target, environment.get_template("report.html.j2").render(runs=runs))
    return target


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items() if k != "same"}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def markdown(runs: list[dict[str, Any]]) -> str:
    """The docs' tables: time of the best of each kind over that of fastda."""
    parts = []
    for run in runs:
        m = run["machine"]
        held = (
            f", peers held to it ({', '.join(f'{k}={v}' for k, v in m['held'].items())})" if m["held"] else ""
        )
        peaks = m["peaks"].get("1")
        sessions = min((r.get("sessions", 1) for r in run["rows"]), default=1)
        parts.append(
            f"Kernels for {m['isa'].upper()}{held}. {m['processor']}, {m['cores']} cores; "
            f"fastda {m['fastda']}, torch {m['torch']}, Python {m['python']}; "
            f"one core measured at {peaks['gflops']:.0f} GFLOP/s and {peaks['gbs']:.0f} GB/s (copy). float32."
            + f" In brackets 95 % intervals over {sessions} processes."
            * (sessions > 1)
        )
        for name, title in FAMILIES.items():
            rows = [r for r in run["rows"] if family(r) == name]
            if not rows:
                continue
            kinds = [("torch", "best of eager and torch.compile")]
            if any(best(r, "usual") for r in rows):
                kinds.insert(0, ("usual", "PyTorch as mostly written"))
            if any(best(r, "engine") for r in rows):
                kinds.append(("engine", "best of " + ", ".join(ENGINES)))
            if any(best(r, "layer") for r in rows):
                kinds.append(("layer", "best published layer"))
            other = "fastda channels_last"
            layouts = ["fastda", *([other] if all(other in r["contenders"] for r in rows) else [])]
            head = [title, "threads", *layouts, *(k[1] for k in kinds)]
            lines = [head, ["---", *("---:" for _ in head[1:])]]
            for r in rows:
                case = r["case"]
                label = f"`{case['workload']}` {sizes(r)}, {MODES[case['mode']]}"
                key = ratio_key(r)
                if key == "added_ratio":
                    label += ", time added"
                measured = "added" if key == "added_ratio" else "median"
                times = [
                    seconds(r["contenders"][n][measured]) if n in r["contenders"] else "" for n in layouts
                ]
                cells = [_cell(r, best(r, kind), key) for kind, _ in kinds]
                lines.append([label, str(case["threads"]), *times, *cells])
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def _cell(row: Row, name: str | None, key: str) -> str:
    if name is None:
        return ""
    r = row["contenders"][name][key]
    text = f"{number(r['ratio'])}× [{number(r['low'])}–{number(r['high'])}]"
    return f"**{text}**" if r["high"] < 1 else text


def short(run: dict[str, Any]) -> list[Row]:
    """The README's rows of a run, in their order."""
    rows = {row["id"]: row for row in run["rows"]}
    return [rows[name] for name in SHORT if name in rows]


def short_markdown(run: dict[str, Any]) -> str:
    """The README's table: over PyTorch as it is mostly written, and over its best."""
    m, key = run["machine"], {"added_ratio": ", time added", "ratio": ""}
    lines = [["one thread, float32", "fastda", "PyTorch as mostly written", "best of PyTorch"]]
    lines.append(["---", "---:", "---:", "---:"])
    for row in short(run):
        what = ratio_key(row)
        measured = "added" if what == "added_ratio" else "median"
        label = f"`{row['case']['workload']}` {sizes(row)}, {MODES[row['case']['mode']]}{key[what]}"
        cells = [_cell(row, best(row, kind), what) for kind in ("usual", "torch")]
        lines.append([label, seconds(row["contenders"]["fastda"][measured]), *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"{m['processor']}, kernels for {m['isa'].upper()}, torch {m['torch']}, Python {m['python']}. "
        f"In brackets 95 % intervals over processes; losses in bold.\n\n{table}"
    )


def chart(run: dict[str, Any]) -> None:
    """Write the README's chart: a bar a row, over the best of eager PyTorch and torch.compile."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = short(run)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastda", "font.family": "sans-serif"}):
        figure, axis = plt.subplots(figsize=(5.2, 0.34 * len(rows) + 0.5))
        figure.patch.set_facecolor("white")
        for i, row in enumerate(rows):
            value = row["contenders"][best(row, "torch")][ratio_key(row)]["ratio"]
            colour = WIN if value >= 1 else LOSS
            axis.barh(i, value - 1, left=1, height=0.62, color=colour)
            axis.annotate(
                f"{value:.2f}×", (max(value, 1), i), (4, 0), textcoords="offset points",
                va="center", fontsize=9, color=colour,
            )  # fmt: skip
        added = {"added_ratio": ", added", "ratio": ""}
        names = [
            f"{row['case']['workload']} {sizes(row)}, {MODES[row['case']['mode']]}{added[ratio_key(row)]}"
            for row in rows
        ]
        axis.set_yticks(range(len(rows)), names, fontsize=8.5)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xlim(0, 5.5)
        axis.set_xticks(range(6), [f"{x}×" for x in range(6)], fontsize=8.5)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.grid(axis="x", linewidth=0.4, color="#dddddd")
        axis.set_axisbelow(True)
        axis.set_title(
            "times as fast as the best of eager PyTorch and torch.compile", fontsize=9.5, loc="right"
        )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    files.write(CHART, buffer.getvalue())


def publish(out: Path) -> None:
    """Keep the results under `out` beside the code, and make of them what the README and the docs show."""
    runs = [_rounded({"machine": r["machine"], "rows": r["rows"]}) for r in load(out)]
    files.write(RESULTS, json.dumps(runs, separators=(",", ":")).replace('{"id"', '\n{"id"') + "\n")
    render(runs)


def render(runs: list[dict[str, Any]]) -> None:
    """The README's table and chart, and the docs' page of all rows."""
    files.write(README, filled(README, short_markdown(runs[0])))
    files.write(PAGE, filled(PAGE, markdown(runs)))
    chart(runs[0])


def filled(page: Path, table: str) -> str:
    """The text of `page` with `table` in its marked block."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page.name} has no block between {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"
