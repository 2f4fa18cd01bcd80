import json
import os
import subprocess
import sys

import pytest

from fastda import backend, recipes, testing
from fastda.tools import bench, cli, verify
from fastda.tools.console import Column, Console
from tests.common import needs_recipes

pytestmark = pytest.mark.isa_independent


def run(capsys, *argv):
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_info_names_every_backend_and_a_reason(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for name in backend.BACKENDS:
        assert name in out
    assert "the CUDA kernels serve NVIDIA devices" in out
    assert "conv2d" in backend.info()["only"]
    for op, backends in backend.info()["only"].items():
        line = next(line for line in out.splitlines() if op in line)
        assert line.startswith(f"kernels of {' and '.join(backends)} alone")


def test_info_json_is_the_info_dict(capsys):
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0
    assert json.loads(out) == backend.info()


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "fastda", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, backend.info()["fastda"])


TRAININGS = ["dann", "reviews", "simgan", "simgan train", "simgan refine"]


@pytest.mark.parametrize(
    "command",
    ["", "info", "verify", "bench", *(pytest.param(name, marks=needs_recipes) for name in TRAININGS)],
)
def test_help_everywhere(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: fastda" in capsys.readouterr().out


def test_no_command_shows_the_help_and_fails(capsys):
    status, out, _ = run(capsys)
    assert status == 2
    assert "verify" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("verify", "--op", "nothing"), "--op must be one of grad_reverse"),
        (("bench", "nothing"), "NAME must be one of grad_reverse"),
        (("bench", "--peers", "eager,mkl"), "--peers must be one of fastda, eager, compile, got mkl"),
        (
            ("bench", "--dtype", "int8"),
            "--dtype must be one of float32, float64",
        ),
        (("bench", "--device", "tpu"), "--device must be one of cpu"),
        (("bench", "--threads", "0"), "--threads must be at least 1, got 0"),
        (("bench", "grad_reverse", "--shapes", "1x2x3x4x5"), "no operator takes the shape 1x2x3x4x5"),
        (("bench", "--rounds", "0"), "--rounds must be at least 1, got 0"),
    ],
)
def test_bad_values_give_one_clear_line(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("rich", [True, False], ids=["with rich", "without rich"])
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal(capsys, monkeypatch, rich, columns):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", str(columns))
    argv = ("--op", "grad_reverse_linear", "--backend", "reference")
    status, _, err = run(capsys, "verify", *argv)
    assert status == 0
    table = err[: err.index("fastda 0.")]
    assert max(map(len, table.splitlines())) <= columns
    assert "grad_reverse_linear" in table
    assert "ok" in table
    assert ("float64" in table) == (columns == 120 or "no room" in table)


def test_where_even_the_least_is_too_wide_operators_get_lines_of_their_own(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    columns = [Column("operator"), Column("sizes"), Column("threads", rank=1), Column("ratio", right=True)]
    rows = [["a_long_operator", "512x2x9x14", "1", "2.40"], ["a_long_operator", "8x2x30x30", "1", "0.45"]]
    Console().table("times", columns, rows)
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[1].split() == ["sizes", "ratio"]
    assert lines[3:6] == ["a_long_operator", "  512x2x9x14   2.40", "  8x2x30x30    0.45"]
    assert max(map(len, lines)) <= 30
    assert " ".join(lines[6:]) == "no room at 30 columns: threads (--json has all)"


def test_a_backend_that_serves_nothing_here_is_one_line(capsys):
    if backend.info()["devices"].keys() - {"cpu"}:
        pytest.skip("a device is here")
    status, out, err = run(capsys, "verify", "--backend", "cuda")
    assert (status, out) == (2, "")
    reason = backend.why_not("cuda", "cpu")
    assert err == f"fastda verify: backend cuda cannot be verified here: {reason}\n"


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize("option", ["--out", "--json"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    capsys, monkeypatch, tmp_path, command, option
):
    file = tmp_path / "file"
    file.write_text("a file")
    monkeypatch.setattr(verify, "check", lambda *_: pytest.fail("has begun"))
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("has begun"))
    status, _, err = run(capsys, command, option, str(file / "results"))
    assert status == 2
    assert err.startswith(f"fastda {command}: {option}: {file}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [["-m", "fastda", "info"], ["-W", "ignore", "-m", "fastda"]])
def test_bad_values_in_the_environment_are_one_line(argv):
    environment = {**os.environ, "FASTDA_BACKEND": "c++"}
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment)
    message = "FASTDA_BACKEND: must be one of reference, cpp, cuda, triton, got 'c++'\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_info_under_a_forced_backend_tells_what_cannot_be_served(capsys):
    if backend.why_not("cuda", "cpu") is None:
        pytest.skip("CUDA kernels serve the CPU here")
    with backend.use_backend("cuda"):
        _, out, _ = run(capsys, "info")
        assert backend.info()["devices"]["cpu"]["serving"] is None
    assert "cpu: not served, calls raise: the CUDA kernels serve NVIDIA devices, not cpu" in out
    assert "served by cuda" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--threads", "two"), "argument --threads: must be whole numbers with commas between"),
        (("--shapes", "8xb"), "argument --shapes: must be sizes with x between and commas between shapes"),
    ],
)
def test_words_in_place_of_numbers_are_named_in_the_users_words(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *argv])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"{message}, such as" in err
    assert argv[1] in err


@pytest.mark.parametrize("command", list(recipes.NAMES))
def test_trainings_without_their_packages_say_what_to_install(capsys, monkeypatch, command):
    assert command in cli._parser().format_help()
    missing = {*recipes.missing(), "scikit-learn", "safetensors"}
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, _, err = run(capsys, command, "--help")
    assert status == 2
    absent = [name for name in recipes.PACKAGES.values() if name in missing]
    assert err == (
        f"fastda {command}: needs the packages {', '.join(absent)}: pip install 'fastda-kernels[recipes]'\n"
    )


def test_verify_passes_and_writes_every_row(capsys, tmp_path):
    argv = ("verify", "--op", "grad_reverse", "--backend", "reference", "--out", str(tmp_path), "--seed", "7")
    status, out, err = run(capsys, *argv, "--json", "-")
    assert status == 0
    report = json.loads(out)
    assert report == json.loads((tmp_path / "verify.json").read_text())
    assert report["seed"] == 7
    assert report["failed"] == 0
    assert report["passed"] == len(report["rows"]) > 100
    assert {row["dtype"] for row in report["rows"]} == {"float32", "float64", "bfloat16", "float16"}
    assert {row["what"] for row in report["rows"]} == {"value", "x"}
    assert "ok" in err


def test_verify_fails_when_a_tolerance_is_exceeded(capsys, monkeypatch, tmp_path):
    zero = {dtype: testing.Tolerance(0.0, 0.0) for dtype in verify.DTYPES}
    monkeypatch.setitem(testing.TOLERANCES, "grad_reverse", {"value": zero, "grad": zero})
    status, _, err = run(capsys, "verify", "--op", "grad_reverse", "--json", str(tmp_path / "new" / "v.json"))
    assert status == 1
    assert "FAILED" in err
    report = json.loads((tmp_path / "new" / "v.json").read_text())
    assert report["failed"] == sum(not row["passed"] for row in report["rows"]) > 0


def test_bench_reports_interleaved_ratios(capsys, tmp_path):
    argv = ("bench", "grad_reverse", "--quick", "--rounds", "3", "--shapes", "8x4", "--out", str(tmp_path))
    status, _, err = run(capsys, *argv)
    assert status == 0
    assert "grad_reverse" in err
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["case"]["sizes"] == [8, 4]
    assert row["rounds"] >= 3
    for contender in row["contenders"].values():
        assert 0 < contender["minimum"] <= contender["median"]
        assert contender["ratio"]["low"] <= contender["ratio"]["ratio"] <= contender["ratio"]["high"]
    assert row["contenders"]["fastda"]["ratio"] == {"ratio": 1, "low": 1, "high": 1}
