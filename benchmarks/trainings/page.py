"""The table and the chart of the trainings."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from benchmarks.base import ROOT
from benchmarks.figures import LOSS, WIN
from benchmarks.published import _rounded, filled
from benchmarks.rows import number
from benchmarks.trainings import TRAININGS
from fastda import files

HEADINGS = (
    "training",
    "ms with fastda",
    "gain",
    "gain in channels_last",
    "best over best",
    "wanted",
    "memory",
)
RESULTS = ROOT / "benchmarks" / "trainings" / "results.json"
PAGE, CHART = ROOT / "docs" / "trainings.md", ROOT / "docs" / "images" / "trainings.svg"

Row = dict[str, Any]


def ratio(row: Row, peer: str, ours: str = "fastda") -> dict[str, float] | None:
    return row["contenders"].get(peer, {}).get(f"over {ours}")


def best(row: Row) -> dict[str, float]:
    """The fastest of PyTorch's layouts, and of torch.compile, over the faster of fastda's."""
    medians = {name: c["median"] for name, c in row["contenders"].items()}
    ours = {name for name in medians if name.startswith("fastda")}
    peer, mine = min(medians.keys() - ours, key=medians.__getitem__), min(ours, key=medians.__getitem__)
    found = ratio(row, peer, mine)
    assert found is not None
    return found


def wanted(row: Row) -> float:
    return next(t.wanted for t in TRAININGS if t.name == row["case"]["name"])


def peaks(row: Row) -> list[float]:
    """Memory of a step with fastda over that of one without, by layout."""
    found = row.get("memory", {})
    pairs = (("fastda", "eager"), ("fastda channels_last", "eager channels_last"))
    return [found[ours] / found[theirs] for ours, theirs in pairs if ours in found]


def cells(row: Row) -> list[str]:
    """In the order of HEADINGS; what is lost between stars."""
    gains = [ratio(row, "eager"), ratio(row, "eager channels_last", "fastda channels_last"), best(row)]
    memory = peaks(row)
    return [
        row["case"]["name"],
        f"{1e3 * row['contenders']['fastda']['median']:.0f}",
        *(_gain(gain) for gain in gains),
        f"{wanted(row):g}",
        _starred(" / ".join(f"{p:.2f}" for p in memory), any(p >= 1.005 for p in memory)),
    ]


def _gain(r: dict[str, float] | None) -> str:
    if r is None:
        return "—"
    return _starred(f"{number(r['ratio'])} [{number(r['low'])}–{number(r['high'])}]", r["high"] < 1)


def _starred(text: str, lost: bool) -> str:
    return f"**{text}**" if lost else text


def markdown(runs: list[dict[str, Any]]) -> str:
    parts = []
    for run in runs:
        m = run["machine"]
        held = f", torch held to it ({', '.join(f'{k}={v}' for k, v in m['held'].items())})" * bool(m["held"])
        parts.append(
            f"Kernels for {m['isa'].upper()}{held}. {m['processor']}, {m['cores']} cores, one thread, "
            f"float32; fastda {m['fastda']}, torch {m['torch']}, Python {m['python']}. {_how(run['rows'])}"
        )
        lines = [list(HEADINGS), ["---", *("---:" for _ in HEADINGS[1:])], *map(cells, run["rows"])]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts.append(
        "What a step of the first table is spent on once it is served, the largest shares in per cent:"
    )
    lines = [["training", "spent on"], ["---", "---"]]
    for row in runs[0]["rows"]:
        shares = [f"{name} {100 * share:.0f}" for name, share in list(row["spent"].items())[:6]]
        lines.append([row["case"]["name"], ", ".join(shares)])
    parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def _how(rows: list[Row]) -> str:
    """How often each was measured, and whether alone."""
    sessions, rounds = (min(row[what] for row in rows) for what in ("sessions", "rounds"))
    busy = sum(row["busy"] for row in rows) / len(rows)
    shared = f" The core was shared: {100 * busy:.0f} % of the time was the measurement's." * (busy < 0.9)
    return f"{sessions} process{'es' * (sessions > 1)}, {rounds} rounds or more in all.{shared}"


def chart(run: dict[str, Any]) -> None:
    """A bar a training: how many times as fast its step is, as published; a tick at what is wanted."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = run["rows"]
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastda", "font.family": "sans-serif"}):
        figure, axis = plt.subplots(figsize=(5.2, 0.3 * len(rows) + 0.5))
        figure.patch.set_facecolor("white")
        for i, row in enumerate(rows):
            r = ratio(row, "eager")
            assert r is not None
            colour = WIN if r["ratio"] >= 1 else LOSS
            axis.barh(i, r["ratio"] - 1, left=1, height=0.62, color=colour)
            axis.plot([r["low"], r["high"]], [i, i], color="black", linewidth=1)
            axis.plot(wanted(row), i, "|", color="#555555", markersize=12, markeredgewidth=1.6)
            axis.annotate(
                f"{r['ratio']:.2f}×", (max(r["high"], wanted(row), 1), i), (5, 0),
                textcoords="offset points", va="center", fontsize=8.5, color=colour,
            )  # fmt: skip
        axis.set_yticks(range(len(rows)), [row["case"]["name"] for row in rows], fontsize=8.5)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xlim(0.5, 3.2)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.grid(axis="x", linewidth=0.4, color="#dddddd")
        axis.set_axisbelow(True)
        axis.set_title("a step as published over one with one line more; | wanted", fontsize=9, loc="right")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    files.write(CHART, buffer.getvalue())


def publish(out: Path) -> None:
    """Keep the results under `out` beside the code, and make the docs' table and chart of them."""
    folders = [path for path in (out, out / "avx2") if (path / "trainings.json").exists()]
    if not folders:
        raise ValueError(f"there are no results in {out}; run python -m benchmarks.trainings first")
    runs = [_rounded(json.loads((folder / "trainings.json").read_text())) for folder in folders]
    files.write(RESULTS, json.dumps(runs, separators=(",", ":")).replace('{"id"', '\n{"id"') + "\n")
    files.write(PAGE, filled(PAGE, markdown(runs)))
    chart(runs[0])
