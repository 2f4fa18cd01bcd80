"""A planted fault, and where it goes."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

AVX2, BASE = {"FASTDA_CPU_ISA": "avx2"}, {"FASTDA_CPU_ISA": "base"}
CPU, CUDA, TRITON = "csrc/cpu", "csrc/cuda", "fastda/triton"
NOTHING = "(void)0;"
COMPILED = (".cpp", ".h", ".inl", ".cu", ".cuh")
# Compiled faults are in one binary, in which the environment chooses; a definition before all else of a file.
SWITCH = """\
#if defined(__CUDACC__)
#define fastda_fault 0
#elif !defined(FASTDA_FAULT)
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

    tests: names of test functions, with a choice of cases in brackets (pytest's -k) where not all are meant,
        and with `file::` before a name that stands in several files.
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

    @functools.cache  # noqa: B019
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


def fault(
    name: str, where: str, old: str, new: str, *tests: str, harmless: str = "", **environment: str
) -> Fault:
    return Fault(name, where, old, new, tests, harmless, tuple(environment.items()))


@functools.cache
def tests_of(root: Path) -> list[tuple[Path, set[str]]]:
    """Files of tests, and the names of their functions."""
    files = sorted(p for p in (root / "tests").rglob("*.py") if "mutation" not in p.relative_to(root).parts)
    return [(p, set(re.findall(r"^def (test_\w+)\(", p.read_text(), re.M))) for p in files]


def find_test(root: Path, route: str, test: str) -> tuple[str, str]:
    """The pytest node of a test function, and the choice of its cases. Raises LookupError.

    A device's kernels are seen by the tests of its own folder and by the conformance suite, on its lane.
    """
    match = re.fullmatch(r"(?:(\w+)::)?(\w+)(?:\[(.*)\])?", test)
    assert match, test
    file, name, cases = match[1], match[2], match[3] or ""
    found = [p for p, names in tests_of(root) if name in names and file in (None, p.stem)]
    folder = {p: p.relative_to(root).parts[1] for p in found}
    if route in ("cuda", "triton"):
        own = [p for p in found if folder[p] == route]
        found = own or [p for p in found if folder[p] == "conformance"]
    else:
        found = [p for p in found if folder[p] not in ("cuda", "triton")]
    if len(found) != 1:
        raise LookupError(f"{test}: {len(found)} files of the route {route} define this test")
    return f"{found[0].relative_to(root)}::{name}", cases
