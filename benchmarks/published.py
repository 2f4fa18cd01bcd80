"""What the README and the docs show of the results: tables and a chart."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from benchmarks.base import ROOT
from benchmarks.figures import LOSS, WIN
from benchmarks.rows import (
    ENGINES,
    FAMILIES,
    MODES,
    Row,
    best,
    family,
    load,
    number,
    ratio_key,
    seconds,
    sizes,
)
from fastda import files

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
    over = "processes" if min(row.get("sessions", 1) for row in short(run)) > 1 else "rounds"
    return (
        f"{m['processor']}, kernels for {m['isa'].upper()}, torch {m['torch']}, Python {m['python']}. "
        f"In brackets 95 % intervals over {over}; losses in bold.\n\n{table}"
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
