"""Imports run one way: who stands above knows who stands below, and nobody the other way round."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# By room (a folder or a file of the package; "fastda" is its __init__): the rooms that it may import.
BELOW = {
    "_torch": set(),
    "files": set(),
    "reference": set(),
    "registry": {"_torch", "reference"},
    "testing": {"registry"},
    "timing": {"registry"},
    "triton": {"_torch", "registry"},
    "backend": {"_torch", "triton"},
    "ops": {"_torch", "backend", "reference", "registry"},
    "nn": {"_torch", "ops"},
    "compatibility": {"_torch", "backend", "nn", "ops"},
    "optimize": {"_torch", "ops", "testing", "timing"},
    "fastda": {"backend", "nn", "ops", "optimize"},
}
ABOVE = {"tools", "recipes", "__main__"}  # may import all of the library, and each other


def room(path: Path) -> str:
    first = path.relative_to(ROOT / "fastda").parts[0].removesuffix(".py")
    return "fastda" if first == "__init__" else first


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere in it, with what it takes from a package by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    found = set()
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package == "fastda":
            first = rest.partition(".")[0]
            there = (ROOT / "fastda" / first).is_dir() or (ROOT / "fastda" / f"{first}.py").exists()
            found.add(first if rest and there else "fastda")
    return found


FILES = sorted((ROOT / "fastda").rglob("*.py"))


def test_every_room_has_its_place():
    assert {room(path) for path in FILES} == BELOW.keys() | ABOVE


@pytest.mark.parametrize("name", BELOW)
def test_a_room_imports_what_stands_below_it(name):
    for path in FILES:
        if room(path) == name:
            above = rooms(path) - BELOW[name] - {name}
            assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))} of fastda"


def test_the_rooms_have_an_order():
    left = dict(BELOW)
    while left:
        free = [name for name, below in left.items() if not below & left.keys()]
        assert free, f"these import each other: {', '.join(left)}"
        for name in free:
            del left[name]


def test_nobody_imports_the_tests_and_the_library_no_benchmarks():
    for folder, barred in {
        "fastda": {"tests", "benchmarks"},
        "benchmarks": {"tests"},
        "examples": {"tests", "benchmarks"},
    }.items():
        for path in (ROOT / folder).rglob("*.py"):
            found = {name.partition(".")[0] for name in imported(path)} & barred
            assert not found, f"{path.relative_to(ROOT)} imports {', '.join(found)}"
