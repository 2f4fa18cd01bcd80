"""Runs pytest again and again in forks of a process that has loaded PyTorch once, which takes seconds.

Reads one JSON object a line: `arguments` of pytest, `environment` to add, `limit` in seconds. Answers each
with `status` (pytest's, negative for a signal, null for too long) and `output`. fastda is loaded in the fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time

import hypothesis  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch._dynamo.testing
import torch.fx.experimental.symbolic_shapes  # noqa: F401

if os.environ.get("TRITON_INTERPRET"):
    import triton  # noqa: F401


def serve(request: dict) -> dict:
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            os.environ.update(request["environment"])
            status = pytest.main(request["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(status))
        status = wait(child, request["limit"])
        file.seek(0)
        return {"status": status, "output": file.read().decode(errors="replace")}


def wait(child: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)
