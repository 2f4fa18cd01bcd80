"""A planted fault, and where it goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

COMPILED = (".cpp", ".h", ".inl", ".cu", ".cuh")
# Compiled faults are in one binary, in which the environment chooses; a definition before all else of a file.
SWITCH = """\
#ifndef FASTDA_FAULT
#define FASTDA_FAULT
#include <cstdlib>
namespace {
[[maybe_unused]] const int fastda_fault = [] {
  const char* number = std::getenv("FASTDA_FAULT");
  return number ? std::atoi(number) : 0;
}();
}
#endif
#line 1
"""


@dataclass(frozen=True)
class Fault:
    """`old`, found once beneath `where` (a file or a folder), becomes `new`; then one of `tests` must fail.

    In compiled sources `old` and `new` are two expressions of one type, or two statements (ending in a
    semicolon) that declare nothing.

    tests: names of test functions, each with or without a choice of its cases in brackets, as pytest's -k.
    harmless: why the fault changes no result, where that is so; then the tests must pass.
    """

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]
    harmless: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def compiled(self) -> bool:
        return self.where.startswith("csrc")

    @property
    def route(self) -> str:
        for folder, route in (("csrc/cuda", "cuda"), ("csrc", "cpp"), ("fastda/triton", "triton")):
            if self.where.startswith(folder):
                return route
        return "python"

    def locate(self, root: Path) -> Path:
        """The file that holds `old`. Raises LookupError unless exactly one does, once."""
        place = root / self.where
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        suffixes = (*COMPILED, ".py")
        found = {f: f.read_text().count(self.old) for f in files if f.suffix in suffixes}
        found = {f: n for f, n in found.items() if n}
        if sum(found.values()) != 1:
            listing = ", ".join(f"{f.relative_to(root)} {n} times" for f, n in found.items()) or "nowhere"
            raise LookupError(f"{self.name}: {self.old!r} is found {listing} beneath {self.where}")
        return next(iter(found))

    def switched(self, number: int) -> str:
        """What stands for `old` in a binary that holds this fault as one of many."""
        if self.old.endswith(";"):
            return f"if (fastda_fault == {number}) {{ {self.new} }} else {{ {self.old} }}"
        return f"(fastda_fault == {number} ? ({self.new}) : ({self.old}))"


def test_files(root: Path, route: str) -> list[Path]:
    """The files whose tests can see a fault of this route."""
    tests = root / "tests"
    files = [p for p in sorted(tests.rglob("*.py")) if p.relative_to(tests).parts[0] != "mutation"]
    return [p for p in files if route_of(p) == ("python" if route == "cpp" else route)]


def route_of(test_file: Path) -> str:
    """Tests of device code run in processes of their own, which need an environment of their own."""
    text = test_file.read_text()
    if re.search(r"^import cuda_host$", text, re.M):
        return "cuda"
    return "triton" if "TRITON_INTERPRET=1 python" in text else "python"


def find_test(root: Path, route: str, test: str) -> tuple[str, str]:
    """The pytest node of a test function, and the choice of its cases. Raises LookupError."""
    match = re.fullmatch(r"(\w+)(?:\[(.*)\])?", test)
    assert match, test
    name, cases = match[1], match[2] or ""
    files = [p for p in test_files(root, route) if re.search(rf"^def {name}\(", p.read_text(), re.M)]
    if len(files) != 1:
        raise LookupError(f"{name}: {len(files)} files of the route {route} define this test")
    return f"{files[0].relative_to(root)}::{name}", cases
