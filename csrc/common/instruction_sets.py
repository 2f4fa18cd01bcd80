"""Compiler arguments, for setup.py and what else compiles the kernels (tests/native)."""

import re
from pathlib import Path

# Comparisons and NaN behave as written; only errno and floating-point traps, which nobody reads, are gone.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """The table in isa.h as compiler arguments by name, of one architecture, the best last."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())
    text = Path(__file__).with_name("isa.h").read_text().replace("\\\n", "")
    tables = re.split(r"^#(?:if|elif|else)\b(.*)", text.partition("#endif")[0], flags=re.MULTILINE)
    matching = [
        table
        for condition, table in zip(tables[1::2], tables[2::2], strict=True)
        if f"__{machine}__" in condition or not condition
    ]
    rows = re.findall(r'row\((\w+), "(\w+\.h)",\s*"(.*?)"', matching[0])
    assert len(rows) == matching[0].count(" row("), matching[0]
    return {
        name: [f"-DFASTDA_ISA={name}", *flags.split(), "-include", f"cpu/simd/{header}"]
        for name, header, flags in rows
    }
