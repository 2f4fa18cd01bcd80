"""The guide to adding an operator lists every file that one touches, and no other."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fastda import registry

pytestmark = pytest.mark.isa_independent
ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "adding-an-op.md").read_text()
EVERY, SOME = (
    [p for cell in re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE) for p in re.findall("`(.*?)`", cell)]
    for part in GUIDE.split("\n## ")[1:3]
)
TYPES = [".py", ".cpp", ".h", ".inl", ".cu", ".cuh", ".md", ".yml", ".toml", ".svg", ".ipynb", ".j2", ".json"]
FAMILIES = {
    family.__name__.rpartition(".")[2]: {name for op in family.OPERATORS for name in (op.name, *op.raw)}
    for family in registry.FAMILIES
}
# Files of the first table that a family does without, or does not name it in.
WITHOUT = {
    ("refiner_conv", "csrc/cpu/kernels/<family>.h"): "its kernels have a folder, csrc/cpu/conv",
    ("refiner_conv", "csrc/cpu/kernels/<family>.inl"): "its kernels have a folder, csrc/cpu/conv",
    ("grad_reverse", "CHANGELOG.md"): "first version",
    ("patch_loss", "CHANGELOG.md"): "first version",
}
# Files that name operators, and where nothing is added for a new one.
USERS = {
    "fastda/backend.py": "asks for one operator to learn what was compiled",
    "fastda/compatibility.py": "other libraries' layers, on particular operators",
    "fastda/nn/refiner_conv.py": "a network, with normalisation",
    "fastda/optimize/*": "what it finds in models, and the operators that serve it",
    "fastda/recipes/*": "trainings",
    "fastda/tools/*": "networks, training steps, a warm-up",
    "fastda/ops/refiner_conv.py": "a convolution and its pool in one",
    "csrc/cpu/refiner_conv.cpp": "likewise",
    "csrc/host/refiner_conv.h": "likewise",
    "tests/ops/test_refiner_conv_*.py": "likewise",
    "csrc/cuda/*": "kernels that a family has in files of other names",
    "benchmarks/*": "peers of particular operators, titles, a choice for README",
    "docs/images/speed.svg": "written by python -m benchmarks",
    "docs/*.md": "pages on a subject, with examples",
    "CONTRIBUTING.md": "an example",
    "tests/conftest.py": "C++ nodes, which few families have",
    "tests/lanes.py": "an example",
    "tests/gpu/*": "timings of a choice of operators",
    "tests/cuda/*": "one emulated operator for a property of all",
    "tests/mutation/faults/*": "faults of what operators serve",
    "tests/tools/*": "one operator for a property of all",
    "tests/test_*.py": "one operator for a property of all",
    "tests/conformance/*": "exceptions of one operator from what holds for all",
    "tests/ops/test_e*.py": "one operator for a property of all",
    "tests/routes/test_*.py": "one operator for a property of all",
    "tests/optimize/*": "models",
    "tests/recipes/*": "trainings",
}


def files():
    """The project's own, and what each says."""
    for folder in ("fastda", "csrc", "docs", "tests", "benchmarks", "examples", "."):
        found = (ROOT / folder).glob("*" if folder == "." else "**/*")
        for path in sorted(path for path in found if path.suffix in TYPES and path.is_file()):
            yield str(path.relative_to(ROOT)), path.read_text()


FILES = dict(files())


def names(family, file):
    """Whether a file names a family: one of its operators, or a file of it."""
    operators = "|".join(FAMILIES[family])
    path = rf"/(test_)?{family}[._]|\bfastda\.\w+(\.| import .*\b){family}\b"
    # PyTorch has a function of one operator's name.
    return re.search(rf"(?<!F\.)\b({operators})\b|{path}", f"/{file} {FILES[file]}") is not None


def listed(file, family):
    return [pattern for pattern in (*EVERY, *SOME) if fnmatch(file, pattern.replace("<family>", family))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_every_file_of_the_first_table(family):
    found = {pattern for file in FILES if names(family, file) for pattern in listed(file, family)}
    lacking = {pattern for pattern in EVERY if pattern not in found}
    assert lacking == {pattern for name, pattern in WITHOUT if name == family}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_that_names_a_family_is_in_the_guide(family):
    unknown = [
        file
        for file in FILES
        if names(family, file)
        and not listed(file, family)
        and not any(fnmatch(file, pattern) for pattern in USERS)
    ]
    assert not unknown


def test_the_guide_and_its_exceptions_name_nothing_that_is_gone():
    found = {pattern for family in FAMILIES for file in FILES for pattern in listed(file, family)}
    assert not {*EVERY, *SOME} - found
    for pattern in USERS:
        used = [file for file in FILES if fnmatch(file, pattern)]
        assert any(
            names(family, file) and not listed(file, family) for file in used for family in FAMILIES
        ), pattern


def test_the_guide_counts_right():
    assert f"touches {len(EVERY)} files" in GUIDE
