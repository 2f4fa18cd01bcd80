"""`pytest benchmarks/` times the registry's cases with pytest-benchmark: a group a case, a test a provider.

FASTDA_BENCH_PEERS=fastda,eager,compile chooses the providers (default: fastda,eager). Made for comparing runs
with pytest-benchmark's own tools; ratios to quote come from `python -m benchmarks`, which takes contenders in
turn.
"""

import os
import time

import pytest

from benchmarks.peers import PEERS
from fastda.tools import bench, workloads

PROVIDERS = {**bench.PROVIDERS, **PEERS}


def pytest_generate_tests(metafunc):
    cases = [case for case in workloads.cases() if case.threads == 1]
    marks = {
        c: pytest.mark.benchmark(
            group=c.id, timer=time.process_time, max_time=0.5, min_rounds=2 if c.mode == "step" else 5
        )
        for c in cases
    }
    metafunc.parametrize("case", [pytest.param(c, id=c.id, marks=marks[c]) for c in cases])
    metafunc.parametrize("provider", os.environ.get("FASTDA_BENCH_PEERS", "fastda,eager").split(","))


@pytest.fixture
def quickest(case, provider, benchmark):
    """The provider's quickest contender, which is what a user would choose, within the case's settings."""
    bench.keep_freed_memory()
    with bench.task_settings(case):
        found = [
            (label, call) for label, call in PROVIDERS[provider](bench.Task(case)) if label != bench.FLOOR
        ]
        if not found:
            pytest.skip(f"{provider} has no contender for this case")
        times = {
            label: min(bench.timed(call, time.process_time)(1) for _ in range(4)) for label, call in found
        }
        label = min(times, key=times.__getitem__)
        benchmark.extra_info["contender"] = label
        yield dict(found)[label]
