"""tests/gpu without a GPU: every stage in its dry run, and what becomes of stages that go wrong."""

import json
import os
import subprocess
import sys

import pytest

from fastda import backend
from tests.gpu import __main__ as gpu

pytestmark = [
    pytest.mark.isa_independent,
    pytest.mark.skipif(backend.native is None, reason="the native extension is not built"),
]


WALK = """
import sys
from tests.gpu.__main__ import STAGES, main
for stage in STAGES[1:]:
    main(["--dry-run", "--out", sys.argv[1], "--stage", stage.name])
"""


def test_every_stage_walks_on_the_cpu(tmp_path):
    """The first as `make gpu` runs it, the others in one process: each loads torch in 2 s."""
    walked = subprocess.run(
        [sys.executable, "-c", WALK, str(tmp_path)], capture_output=True, text=True, cwd=gpu.ROOT
    )
    assert walked.returncode == 0, walked.stdout + walked.stderr
    command = [sys.executable, "-m", "tests.gpu", "--dry-run", "--out", str(tmp_path), "--seconds", "1500"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    summary = json.loads((tmp_path / "gpu.json").read_text())
    assert list(summary) == [stage.name for stage in gpu.STAGES]
    assert (tmp_path / f"{gpu.STAGES[0].name}.log").exists() and len(list(tmp_path.glob("*.log"))) == 1
    for name, stage in summary.items():
        assert stage["rows"] > 0 and stage["failed"] == 0, name
        assert json.loads((tmp_path / f"{name}.json").read_text())["state"] == "finished"


STAGES = {
    "good": "report.add(what=1); report.save('finished')",
    "raises": "report.add(what=1); report.save('unfinished'); raise RuntimeError('illegal access')",
    "dies": "report.add(what=1); report.save('unfinished'); os.abort()",
    "hangs": "report.add(what=1); report.save('unfinished'); time.sleep(600)",
    "last": "report.add(failed='wrong'); report.save('finished')",
}


def run(tmp_path, seconds):
    def command(stage):
        code = "import os, time; from pathlib import Path; from tests.gpu import device as gpu; "
        path = str(tmp_path / f"{stage.name}.json")
        return [sys.executable, "-c", f"{code}report = gpu.Report(Path({path!r})); {STAGES[stage.name]}"]

    stages = [gpu.Stage(name, 20 if name == "hangs" else 300, print) for name in STAGES]
    return gpu.run_stages(stages, tmp_path, command, seconds)


def test_a_stage_that_goes_wrong_loses_itself_alone(tmp_path):
    summary = run(tmp_path, 1200)
    states = {name: stage["state"] for name, stage in summary.items()}
    assert states["good"] == states["last"] == "finished"
    assert states["raises"] == "ended with 1" and states["dies"] == "ended with -6"
    assert states["hangs"] == "stopped after 20 s"
    assert all(stage["rows"] == 1 for stage in summary.values()), "what was found is kept"
    assert summary["last"]["failed"] == 1 and summary["good"]["failed"] == 0

    # Again: what is finished is not run again, the rest finds no time.
    before = os.stat(tmp_path / "good.json").st_mtime_ns
    summary = run(tmp_path, 5)
    assert os.stat(tmp_path / "good.json").st_mtime_ns == before
    assert summary["good"]["state"] == "finished" and summary["raises"]["state"] == "no time left"


def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "tests.gpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT, env=environment)
    assert done.returncode == 2 and "torch finds no GPU" in done.stderr
