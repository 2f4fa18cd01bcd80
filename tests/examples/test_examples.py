"""The scripts of examples/, run as a reader would run them, and shortly."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common import needs_recipes

pytestmark = pytest.mark.isa_independent
ROOT = Path(__file__).parents[2]


def run(name, *arguments):
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    tested |= {"dann_lightning.py"}  # beside DANN's other tests, whose data it takes
    assert {path.name for path in (ROOT / "examples").iterdir() if path.suffix == ".py"} == tested


def test_dann_in_a_loop_of_ones_own_bridges_the_domains():
    before, after = map(float, re.findall(r"\d\.\d+", run("dann.py")))
    assert before < 0.85 < 0.93 < after


@needs_recipes
def test_a_refiner_from_python_makes_thin_digits_thick(tmp_path):
    out = run("simgan.py", "--steps", "2", "--out", str(tmp_path))
    assert (tmp_path / "grid.png").exists()
    assert len(re.findall(r"\d+\.\d", out)) == 3
