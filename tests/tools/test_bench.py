import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastda
from benchmarks import agreement, cli, growth, published, report
from benchmarks.peers import PEERS
from benchmarks.rows import best, ratio_key
from fastda import timing
from fastda.tools import bench, workloads
from fastda.tools.workloads import Case

pytestmark = pytest.mark.isa_independent
SMALL = Case("refiner_block", (1, 4, 3, 5, 7))


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def timed(call):
    return timing.timed(call, time.process_time)


def test_identical_contenders_have_ratio_one_inside_the_interval():
    # A 95 % interval misses one time in twenty; all of three miss one time in 8000.
    x = torch.randn(200, 200)
    call = functools.partial(torch.mm, x, x)
    for seed in range(3):
        samples = timing.interleave({"a": timed(call), "b": timed(call)}, rounds=20, seed=seed)
        r = timing.compare(samples["a"], samples["b"])
        assert r.low <= r.ratio <= r.high
        if r.low <= 1 <= r.high:
            return
    raise AssertionError(f"1 is outside of {r}")


def test_a_contender_twice_as_slow_has_ratio_two():
    slow, quick = (timed(functools.partial(spin, t)) for t in (0.004, 0.002))
    samples = timing.interleave({"slow": slow, "quick": quick}, rounds=10, min_sample=0.0)
    r = timing.compare(samples["slow"], samples["quick"])
    assert 1.8 < r.low <= r.ratio <= r.high < 2.2


def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        a, b = (1 + 0.1 * torch.randn(2, 25, generator=generator, dtype=torch.float64)).tolist()
        r = timing.compare([3 * t for t in a], b)
        covered += r.low <= 3 <= r.high
    assert 0.9 <= covered / 200 <= 1


def test_the_sessions_interval_covers_what_differs_between_processes():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1000):
        logs = (math.log(3) + 0.05 * torch.randn(4, generator=generator, dtype=torch.float64)).tolist()
        # Each process is sure of its own ratio.
        r = timing.over_sessions([timing.Ratio(*(math.exp(x + d) for d in (0, -0.001, 0.001))) for x in logs])
        covered += r.low <= 3 <= r.high
    assert 0.93 <= covered / 1000 <= 0.97
    assert timing.over_sessions([timing.Ratio(2, 1, 3)]) == (2, 1, 3)
    assert timing.over_sessions([timing.Ratio(1, 1, 1)] * 3) == (1, 1, 1)
    assert timing.over_sessions([timing.Ratio(1, 1, 1), timing.Ratio(1000, 1000, 1000)]).high > 1e6


def test_two_runs_of_recorded_sessions_agree():
    # Sessions of a dozen cases as a busy machine gave them over a quarter of an hour, in order; each run is
    # some in a row. One session each, by bootstrap intervals, is how often runs would agree without sessions.
    recorded = json.loads((Path(__file__).parent / "bench_sessions.json").read_text())

    def agreeing(count):
        found = []
        for sessions in recorded.values():
            ratios = [timing.Ratio(*s) for s in sessions]
            for i in range(len(ratios) - 2 * count + 1):
                a, b = (timing.over_sessions(ratios[j : j + count])._asdict() for j in (i, i + count))
                found.append(agreement.Pair("", "", True, a, b).agree)
        return sum(found) / len(found)

    assert len(recorded) > 20 and all(len(sessions) >= 16 for sessions in recorded.values())
    assert agreeing(1) < 0.85
    assert agreeing(3) > 0.93 and agreeing(4) > 0.93


def test_runs_agree_where_their_difference_is_within_their_intervals():
    def run(*ratios):
        return [{**row(ratio=r), "id": str(i)} for i, r in enumerate(ratios)]

    same, near, far = agreement.pairs(run(2.0, 2.0, 2.0), run(2.0, 2.12, 2.3))
    assert (same.agree, same.overlap, same.contained) == (True, True, True)
    assert (near.agree, near.overlap, near.contained) == (True, True, False)
    assert (far.agree, far.overlap, far.contained) == (False, False, False)
    assert "67 % agree" in agreement.text([same, near, far])
    assert "2, eager: 2.00 [1.90-2.10] against 2.30 [2.20-2.40]" in agreement.text([same, near, far])
    assert agreement.pairs(run(2.0), []) == []


def test_what_is_added_is_compared_above_the_floor():
    floor = [1.0, 1.1, 1.2]
    ours, peer = [t + 0.1 for t in floor], [t + 0.4 for t in floor]
    assert timing.compare(peer, ours, floor).ratio == pytest.approx(4)
    assert timing.compare(peer, floor, floor).ratio == 1000  # nothing is added that can be measured


def test_rounds_take_every_contender_in_a_shuffled_order():
    calls = []
    samplers = {n: lambda count, n=n: calls.append(n) or 0.01 for n in "abc"}
    samples = timing.interleave(samplers, rounds=30, min_sample=0.005)
    rounds = [tuple(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3
    assert {n: len(s) for n, s in samples.items()} == {"a": 30, "b": 30, "c": 30}


STEPS = [w for w in workloads.WORKLOADS if w.steps]


@pytest.mark.parametrize("workload", STEPS, ids=lambda w: w.name)
def test_every_way_to_write_a_step_trains_the_same(workload):
    torch.set_num_threads(1)
    sizes = (6, 2, 27, 31)
    found = {}
    for label, make in workload.steps.items():
        if not label.startswith("torch.compile"):
            step = make(sizes)
            before = [p.detach().clone() for p in step.parameters()]
            for _ in range(6):  # the history of refined images is full after four
                step()
            found[label] = [p.detach() - b for p, b in zip(step.parameters(), before, strict=True)]
    ours = found.pop("fastda")
    assert len(found) >= 2 and all(change.abs().max() > 0 for change in ours)
    for label, theirs in found.items():
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            # Gates of ReLU at rounding distance from zero fall either way.
            assert (a - b).norm() < 0.02 * b.norm() + 1e-7, f"{label}: parameter {i}"


@pytest.mark.parametrize("workload", [w for w in workloads.WORKLOADS if not w.steps], ids=lambda w: w.name)
def test_every_way_to_write_a_workload_computes_what_fastda_does(workload):
    # Far smaller than what is timed, in the same proportions.
    sizes = [min(s, 5) for s in workload.sizes[0]]
    if workload.op == "refiner_block":
        sizes[2] = 3
    task = bench.Task(Case(workload.name, tuple(sizes)))
    grads, values = {}, {}
    for label, call in [*bench._fastda(task), *bench._eager(task)]:
        if label != bench.FLOOR:
            grads[label] = call()
    for label, function in workload.formulas.items():
        values[label] = workload.around(function)(**task.arguments())
    ours = grads.pop("fastda")
    for label, theirs in grads.items():
        for name, a, b in zip(task.grads, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=f"{label}: {name}")
    for label, value in values.items():
        torch.testing.assert_close(value, values["eager"], rtol=1e-4, atol=1e-5, msg=label)


def test_a_training_call_prepares_its_weights_anew():
    task = bench.Task(SMALL)
    arguments = task.arguments()
    seen = []

    def forward():
        seen.append(arguments["weight1"]._version)
        return fastda.refiner_block(**arguments)

    call = task.bound(forward, arguments)
    call(), call()
    assert seen[1] < seen[2]


def test_cases_follow_what_is_asked_for():
    found = workloads.cases(["refiner_block"], shapes=[(1, 8, 3, 4, 4)], dtypes=["bfloat16"], threads=[1, 2])
    assert [(c.sizes, c.dtype, c.threads, c.mode) for c in found] == [
        ((1, 8, 3, 4, 4), "bfloat16", t, mode) for mode in ("forward", "backward") for t in (1, 2)
    ]
    found = workloads.cases()
    ids = [case.id for case in found]
    assert len(set(ids)) == len(ids) > 40
    steps = [(c.workload, c.sizes[0], c.threads) for c in found if c.mode == "step"]
    assert {("simgan_step", 32, 1), ("simgan_step", 128, 1), ("dann_step", 128, 1)} <= set(steps)
    assert all(c.mode != "step" for c in workloads.cases(quick=True))
    assert [c.mode for c in workloads.cases(["step"], quick=True)] == ["step"] * len(STEPS)
    assert all(c.mode == "forward" for c in workloads.cases(modes=["forward"]))


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    measured = []

    def measure(case, providers, **settings):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append((case, settings["seed"]))
        return {"id": case.id, "seed": settings["seed"]}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "combined", lambda rows: {**rows[-1], "sessions": len(rows)})

    def run(todo, **settings):
        return list(bench.run(todo, bench.PROVIDERS, tmp_path, session=bench.this_process, **settings))

    todo = [Case("grad_reverse", (n, 4)) for n in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        run(todo, sessions=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{c.id}.json" for c in todo)
    measured.clear()
    rows = run(todo, sessions=2)
    assert measured == [(c, 1) for c in todo[1:]]  # all cases once, then all again
    assert [(row["id"], row["sessions"]) for row in rows] == [(c.id, s) for s in (1, 2) for c in todo]
    measured.clear()
    assert run(todo[:1], sessions=1)[0]["sessions"] == 1
    run(todo[:1], sessions=3)
    assert measured == [(todo[0], 2)]
    measured.clear()
    run(todo[:1], sessions=1, rounds=4)  # other settings: measured again
    assert measured == [(todo[0], 0)]
    monkeypatch.setattr(bench, "fingerprint", lambda: "another build")
    run(todo[:1], sessions=1, rounds=4)
    assert measured == [(todo[0], 0)] * 2


def test_sessions_are_processes_of_their_own():
    peers = {"fastda": bench.PROVIDERS["fastda"], "process": process}
    rows = list(bench.run([SMALL], peers, sessions=2, rounds=2, seconds=0))
    found = [row["absent"]["process"].removeprefix("ProcessLookupError: ") for row in rows]
    assert len({*found, str(os.getpid())}) == 3
    assert rows[1]["sessions"] == 2 and rows[1]["rounds"] >= 4


def process(task):
    raise ProcessLookupError(os.getpid())
    yield


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda case, providers, **settings: {"id": case.id})
    monkeypatch.setattr("fastda.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        list(bench.run([SMALL], bench.PROVIDERS, tmp_path, session=bench.this_process))
    assert list(tmp_path.iterdir()) == []


def test_the_time_left_is_what_the_cases_took():
    todo = [Case("grad_reverse", (n, 4)) for n in (1, 2)]
    plan = bench.TimeLeft(todo, sessions=3, contenders=2)
    plan.add({"id": todo[0].id, "seconds": 5.0})
    assert plan.left == pytest.approx(2 * 5 + 3 * 5)  # the other is guessed to be alike
    plan.add({"id": todo[1].id, "seconds": 2.0})
    assert plan.left == pytest.approx(2 * 5 + 2 * 2)
    for seconds in (10.0, 15.0):
        plan.add({"id": todo[0].id, "seconds": seconds})
    assert plan.left == pytest.approx(2 * 2)


def test_a_peer_that_fails_is_a_note_and_fastda_failing_is_an_error():
    def broken(task):
        raise ImportError("no module named peer")
        yield

    providers = {"fastda": bench.PROVIDERS["fastda"], "peer": broken}
    row = bench.measure(SMALL, providers, rounds=2, seconds=0)
    assert row["absent"] == {"peer": "ImportError: no module named peer"}
    with pytest.raises(ImportError):
        bench.measure(SMALL, {"fastda": broken}, rounds=2)


def test_the_machine_is_measured():
    peaks = bench.machine([1])["peaks"]["1"]
    assert peaks["gflops"] > 1
    assert peaks["gbs"] > 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nothing",), "NAME must be one of grad_reverse"),
        (("--peers", "mkl"), "--peers must be one of fastda, eager, compile, onnxruntime"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--base", "no-such-revision"), "no such revision"),
        (("nothing", "--growth"), "NAME must be one of refiner_block"),
        (("--sessions", "0"), "--sessions must be at least 1, got 0"),
        (("--compare", "/nonexistent", "/nonexistent"), "no results in /nonexistent"),
        (("--render", "--out", "/nonexistent"), "there are no results in /nonexistent"),
    ],
)
def test_bad_arguments_give_one_clear_line(capsys, argv, message):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def row(workload="refiner_block", ratio=2.0, peer="eager", mode="backward"):
    sizes = {
        "refiner_block": [3, 64, 3, 37, 53],
        "grad_reverse": [128, 768],
        "simgan_step": [32, 1, 35, 55],
    }[workload]
    case = {"workload": workload, "sizes": sizes, "dtype": "float32", "threads": 1, "mode": mode}
    r = {"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    one = {"ratio": 1, "low": 1, "high": 1}
    ours = {"median": 0.01, "minimum": 0.01, "spread": 0, "ratio": one}
    theirs = {**ours, "median": 0.01 * ratio, "ratio": r}
    if workload == "grad_reverse":
        ours |= {"added": 1e-5, "added_ratio": one}
        theirs |= {"added": 1e-5 * ratio, "added_ratio": r}
    return {
        "id": workload, "case": {**case, "layout": "contiguous"},
        "contenders": {"fastda": ours, peer: theirs},
        "absent": {}, "warnings": {}, "flops": 1e9, "bytes": 1e7, "best": peer, "rounds": 20,
    }  # fmt: skip


MACHINE = {
    "isa": "avx512", "held": {}, "processor": "a processor", "cores": 2, "system": "a system", "fastda": "0",
    "torch": "2", "python": "3", "peaks": {"1": {"gflops": 100.0, "gbs": 20.0}}, "fingerprint": "f",
}  # fmt: skip


def test_losses_are_said_as_plainly_as_wins():
    won, lost = row(ratio=2.0), row(ratio=0.5, peer="ncnn", mode="forward")
    heads = report.headlines([won, lost])
    assert [(h["faster"], h["slower"], h["class"]) for h in heads] == [(0, 1, "lost"), (1, 0, "win")]
    even = row(ratio=1.05)
    verdict = report.verdict([won, lost, even])
    assert (verdict["count"], verdict["faster"], verdict["equal"]) == (3, 1, 1)
    assert verdict["slower"] == ["refiner_block, 3×64×37×53, 3×3, forward (0.50×, ncnn)"]
    text = published.markdown([{"machine": MACHINE, "rows": [won, lost]}])
    assert "2.00× [1.90–2.10]" in text
    assert "**0.50× [0.40–0.60]**" in text
    assert "a processor" in text and "torch 2" in text
    step = {**row("simgan_step", 2.5, "eager, usual code", "step"), "sessions": 3}
    step["contenders"]["torch.compile channels_last"] = won["contenders"]["eager"]
    text = published.markdown([{"machine": MACHINE, "rows": [step]}])
    assert (
        "over 3 processes" in text and "PyTorch as mostly written | best of eager and torch.compile" in text
    )
    assert "`simgan_step` 32×1×35×55, step | 1 | 10 ms | 2.50× [2.40–2.60] | 2.00× [1.90–2.10] |" in text


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [row(), row("grad_reverse", peer="pytorch-revgrad"), row(ratio=0.7, mode="forward")]
    (tmp_path / "cases").mkdir()
    for i, r in enumerate(rows):
        kept = {"same": {"fingerprint": "f" if i < 2 else "of an older build"}, "sessions": [r]}
        (tmp_path / "cases" / f"{i}.json").write_text(json.dumps(kept))
    (tmp_path / "bench.json").write_text(json.dumps({"machine": MACHINE}))
    html = report.page(tmp_path).read_text()
    assert "Refiner convolutions" in html and "Gradient reversal" in html
    assert "0.70" not in html
    for outside in ("http://", "https://", "<script", 'src="/'):
        assert outside not in html.replace("http://www.w3.org", "")


def test_readme_docs_and_chart_are_what_the_results_say():
    runs = json.loads(published.RESULTS.read_text())
    assert (
        published.filled(published.README, published.short_markdown(runs[0])) == published.README.read_text()
    )
    assert published.filled(published.PAGE, published.markdown(runs)) == published.PAGE.read_text()
    rows = published.short(runs[0])
    assert [row["id"] for row in rows] == list(published.SHORT)
    drawn = re.findall(r"(\d+\.\d\d)×", published.CHART.read_text())
    ratios = [r["contenders"][best(r, "torch")][ratio_key(r)]["ratio"] for r in rows]
    assert drawn == [f"{ratio:.2f}" for ratio in ratios]


def test_exponents_are_slopes_on_log_axes():
    points = [
        {"value": v, "fastda": 1e-3 + 1e-6 * v**2, "eager": 5.0 * v} for v in (10**k for k in range(1, 7))
    ]
    assert growth.exponent(points, "fastda") == pytest.approx(2, abs=0.01)
    assert growth.exponent(points, "eager") == pytest.approx(1)


def test_published_layers_reverse_the_gradient():
    pytest.importorskip("pytorch_revgrad", reason="pytorch-revgrad is not installed")
    task = bench.Task(Case("grad_reverse", (3, 4)))
    for label, call in PEERS["published"](task):
        (grad,) = call()
        torch.testing.assert_close(grad, torch.full((3, 4), -2 * 0.7), msg=label)


def test_a_case_runs_through_pytest_benchmark():
    which = "grad_reverse-128x768-float32-backward-1t"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-k", which]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
