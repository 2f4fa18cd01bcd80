"""The Triton backend from outside: the interpreter's tests, tracing for a GPU, the ahead-of-time check."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastda import backend

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def python(*arguments, **environment):
    """Run Python in a process of its own: how Triton works is settled when it is imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def test_without_triton_there_is_one_clear_error(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name)
    )
    with (
        backend.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"triton is not installed.*pip install"),
    ):
        backend.select(torch.randn(2))


TRACE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
import fastda.triton as t
from fastda import registry

with FakeTensorMode():
    x = torch.empty(2, 16, 9, 14, device="cuda")
    weight, bias, logits = x.new_empty(16, 16, 3, 3), x.new_empty(16), x.new_empty(2, 2, 9, 14)
    mean = "softmax", "mean"
    calls = {
        "grad_reverse_backward": (x, bias.new_empty(())),
        "patch_discriminator_loss": (logits, logits, None, x.new_empty(2, 1, 9, 14), *mean, 0.1, True, True),
        "patch_generator_loss": (logits, None, *mean, True),
        "patch_loss_map": (logits, None, "softmax", True, 0.0, True),
        "self_regularization": (x, x, None, 0.5, "mean", True, True),
        "refiner_loss": (logits, x, x, bias.new_empty(()), 0.0, *mean, True, True, False),
        "patch_head_discriminator_loss": (x, x, x.new_empty(2, 16, 1, 1), None, *mean, 0.0, True, True, True),
        "patch_loss_scale_": (x, logits, bias.new_empty(())),
        "relu_max_pool": (x, (2, 2), (2, 2), (0, 0), False, True, True),
        "relu_max_pool_backward": (x, torch.zeros_like(x).byte(), (18, 28), False, (2, 2), (2, 2), (0, 0)),
        "norm_act": (x, bias, bias, None, None, x, False, 1e-5, 0.1),
        "norm_act_backward": (
            *(x, x, bias, bias, bias.double(), bias.double(), x, False, True, 1e-5, 0.1, *[True] * 4),
        ),
        "conv_same": (x, weight, bias, x, True),
        "conv_same_backward": (x, x, weight, x, True, True, True),
        "refiner_block": (x, weight, bias, weight, bias, True),
        "refiner_block_backward": (x, x, None, x, weight, bias, weight, True, True, True, True, True),
    }
    there = {name for name in registry.RAW if hasattr(t, name)}
    assert set(calls) == there, set(calls) ^ there
    for name, arguments in calls.items():
        graph = make_fx(lambda *a: getattr(t, name).__wrapped__(*a), tracing_mode="real")(*arguments)
        kernels = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
        assert kernels, name
        print(name, len(kernels))
"""


@needs_triton
def test_a_compiler_sees_the_kernels():
    """Traced on fake CUDA tensors, every operator shows Triton kernels and not an opaque call."""
    status, output = python("-c", TRACE, TRITON_INTERPRET="0")
    assert status == 0, output


@needs_triton
def test_the_ahead_of_time_check_can_fail():
    code = """
from dataclasses import replace
from tests.triton import compile_all as c
jobs = [j for j in c.jobs(False) if j.kernel == "conv_kernel" and j.target == "sm_90"]
job = next(j for j in jobs if "bf16 3x3" in j.label)
good = c.compile_one(job)
assert good["spills"] == 0 and 0 < good["shared"] <= good["limit"] and good["registers"] > 16, good
starved = c.compile_one(replace(job, options={**job.options, "num_warps": 1, "maxnreg": 128}))
assert starved["spills"] > 0 and c.faults(starved), starved
c.TARGETS["sm_90"] = (c.TARGETS["sm_90"][0], 1024)
assert "shared memory" in " ".join(c.faults(c.compile_one(job)))
"""
    status, output = python("-c", code, TRITON_INTERPRET="0")
    assert status == 0, output
