"""The results as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.base import ROOT
from benchmarks.figures import bars, growth, memory, roofline, threads
from benchmarks.rows import (
    FAMILIES,
    MODES,
    Row,
    best,
    family,
    load,
    number,
    ratio_key,
    seconds,
    what,
)
from fastda import files
from fastda.tools.workloads import WORKLOADS


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
