"""fastda.files: whole files or none, one run a folder, causes by name."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastda import files

pytestmark = pytest.mark.isa_independent
ROOT = Path(__file__).resolve().parents[1]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_file_is_written_whole_or_not_at_all(monkeypatch, tmp_path, step):
    target = tmp_path / "new" / "report.json"
    files.write(target, "old")
    with monkeypatch.context() as patched:
        patched.setattr(files.os, step, full)
        with pytest.raises(files.WriteError) as raised:
            files.write(target, "new")
    assert str(raised.value) == f"{target}: cannot be written: No space left on device"
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]
    files.write(target, "new")
    assert target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o644


def test_an_error_of_who_writes_leaves_nothing_and_is_its_own(tmp_path):
    with pytest.raises(KeyError), files.unfinished(tmp_path / "x") as beside:
        beside.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_places_that_take_no_file_are_found_at_once(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(files.WriteError, match=str(tmp_path / place)):
            files.check_writable(tmp_path / place)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.WriteError, match="No space left on device"):
        files.check_writable(tmp_path)


def test_a_folder_takes_one_run_at_a_time_and_loses_what_killed_ones_left(tmp_path):
    left = tmp_path / "seed-0" / f".checkpoint.x1{files.UNFINISHED}"
    left.parent.mkdir()
    left.write_text("half")
    (left.parent / ".mine").write_text("a file of another's")
    hold = "import sys; from pathlib import Path; from fastda import files\n"
    hold += f"with files.claimed(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], env=environment, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        assert not left.exists() and (left.parent / ".mine").exists()
        with pytest.raises(files.FolderError, match="another run"), files.claimed(tmp_path):
            pass
        other.kill()
    with files.claimed(tmp_path):
        pass
