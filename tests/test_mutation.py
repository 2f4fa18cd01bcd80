"""Every planted fault (tests/mutation) still has its place in the sources, and tests that could see it."""

from pathlib import Path

import pytest

from tests.mutation.fault import find_test
from tests.mutation.faults import FAULTS

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.isa_independent


def test_every_fault_applies_to_the_tree():
    problems = []
    for fault in FAULTS:
        try:
            fault.locate(ROOT)
            for test in fault.tests:
                find_test(ROOT, fault.route, test)
        except LookupError as problem:
            problems.append(str(problem))
    assert not problems, "\n".join(problems)


def test_every_fault_is_one_of_a_kind_and_changes_something():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 80
    for fault in FAULTS:
        assert fault.old != fault.new and fault.tests, fault.name
        # Two statements, or two expressions: what chooses between them in a binary stands around them.
        assert not fault.compiled or fault.old.endswith(";") == fault.new.endswith(";"), fault.name
        for text in (fault.old, fault.new):
            assert not fault.compiled or _stands_alone(text), f"{fault.name}: {text!r} is a part of something"


def _stands_alone(text: str) -> bool:
    """Whether what opens closes, an expression is one, and nothing is declared."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0 or (depth == 0 and character == "," and not text.endswith(";")):
            return False
    return depth == 0 and not text.startswith(("const ", "constexpr "))
