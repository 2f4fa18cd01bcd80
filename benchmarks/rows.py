"""Rows of the results: where they lie, and how they are spoken of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastda.tools.bench import FLOOR, combined
from fastda.tools.workloads import WORKLOADS, Workload

ENGINES = ("ONNX Runtime", "OpenVINO", "ncnn")
TITLES = {
    "step": "Training steps",
    "refiner": "Refiner convolutions",
    "convolution": "Other convolutions",
    "patch_loss": "Patch losses",
    "grad_reverse": "Gradient reversal",
}
FAMILIES = {name: TITLES.get(name, name.capitalize()) for name in (*TITLES, *(w.family for w in WORKLOADS))}
MODES = {"forward": "forward", "backward": "forward + backward", "step": "step"}
ISAS = ("avx2", "base")  # folders of runs that were held to an instruction set

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
