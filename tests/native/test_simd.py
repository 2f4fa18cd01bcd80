"""The SIMD headers, a test for each of their functions, on every instruction set of this machine."""

import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

import fastda
from fastda import backend

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.isa_independent
instruction_sets = runpy.run_path(str(ROOT / "csrc/common/instruction_sets.py"))["instruction_sets"]
HERE = instruction_sets(platform.machine())


def test_the_package_knows_the_instruction_sets_of_the_build():
    assert tuple(HERE) == backend.CPU_ISAS


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("isa", HERE)
def test_every_function_of_the_simd_header_is_right_in_every_lane(isa, tmp_path):
    command = ["c++", "-std=c++20", "-O1", "-fno-trapping-math", f"-I{ROOT / 'csrc'}", *HERE[isa]]
    command += [str(ROOT / "tests/native/simd.cpp"), "-o", str(tmp_path / "simd")]
    subprocess.run(command, check=True)
    if backend.CPU_ISAS.index(isa) > backend.CPU_ISAS.index(fastda.info()["cpu_isa"] or "base"):
        pytest.skip(f"this processor has no {isa}: compiled, not run")
    done = subprocess.run([tmp_path / "simd"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
