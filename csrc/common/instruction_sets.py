"""The table of instruction sets in isa.h, for what compiles the kernels: setup.py and tests/native."""

import re
from pathlib import Path


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """Compiler arguments by name, of one architecture (as `platform.machine()` has it), the best last."""
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
