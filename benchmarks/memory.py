"""Peak memory of one call, in a process of its own: python -m benchmarks.memory CASE PROVIDER CONTENDER.

Read from the operating system, so it is what a user's machine needs, allocator and workspaces included.
`step`: how far the resident set rises in a call above what stayed after warm-up (inputs, weights, whatever
the contender keeps between calls). `process`: the most the process ever held, which includes torch itself
and, for torch.compile, the compiler. Blocks of 64 KiB and more go back to the system when freed, for all
contenders alike, so that what is freed does not count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastda.registry.row import Call
from fastda.tools.bench import PROVIDERS, Task, task_settings
from fastda.tools.workloads import Case

CONTENDERS = {
    "fastda": ("fastda", "fastda channels_last"),
    "eager": ("eager", "eager channels_last"),
    "compile": ("torch.compile channels_last",),
}

RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_memory(case: Case, providers: Collection[str]) -> dict[str, dict[str, float]]:
    """By contender, in bytes; those that fail are left out."""
    found = {}
    identity = json.dumps(vars(case))
    for provider, labels in CONTENDERS.items():
        for label in labels if provider in providers else ():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", identity, provider, label],
                env={**os.environ, **RETURNED_AT_ONCE},
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                found[label] = json.loads(done.stdout.splitlines()[-1])
    return found


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _measure(identity: str, provider: str, wanted: str) -> dict[str, Any]:
    fields = json.loads(identity)
    case = Case(**{**fields, "sizes": tuple(fields["sizes"])})
    with task_settings(case):
        call = next(call for label, call in PROVIDERS[provider](Task(case)) if label == wanted)
        for _ in range(2):
            call()
        return rise(call)


def rise(call: Call) -> dict[str, int]:
    """How far a call raises this process's resident set, and the most that it ever was, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    whole = _status("VmHWM")
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    call()
    peak = _status("VmHWM")
    return {"step": peak - before, "process": max(whole, peak)}


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
