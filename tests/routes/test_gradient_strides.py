"""The gradient of a parameter has its strides, as the buckets of DistributedDataParallel have them."""

import os
import subprocess
import sys

import pytest
import torch

import fastda
from fastda.nn import Refiner, RefinerBlock
from tests.common import both_routes

pytestmark = pytest.mark.isa_independent
LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "permuted": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize(
    "make", [lambda: Refiner(1, 4, 1), lambda: Refiner(3, 4, 1), lambda: RefinerBlock(4)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_refiners(make, layout):
    module = make()
    for p in module.parameters():
        if p.dim() == 4:
            p.data = LAYOUTS[layout](p.data)
    first = next(p for p in module.parameters())
    module(torch.randn(2, first.shape[1], 5, 6)).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad.stride() == p.stride(), name


@both_routes
@pytest.mark.parametrize("kind", ["softmax", "bce"])
@pytest.mark.parametrize("strides", [(4, 1, 4, 4), (4, 1, 1, 1)])
def test_the_head_of_a_discriminator(kind, strides):
    rows = 2 if kind == "softmax" else 1
    weight = torch.randn(rows, 4, 1, 1).as_strided((rows, 4, 1, 1), strides).requires_grad_()
    x = torch.randn(2, 4, 5, 6)
    for _ in range(2):  # the second backward pass of a kept graph computes the gradients again
        loss = fastda.patch_head_discriminator_loss(x, x + 1, weight, None, kind)
        for retain in (True, False):
            (grad,) = torch.autograd.grad(loss, weight, retain_graph=retain)
            assert grad.stride() == weight.stride()


DDP = """
import sys, warnings, torch, torch.distributed as dist
from fastda.nn import Refiner
warnings.filterwarnings("error", message="Grad strides do not match")
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
refiner = Refiner(1, 16, 1).to(memory_format=torch.channels_last)
model = torch.nn.parallel.DistributedDataParallel(refiner)
model(torch.randn(2, 1, 8, 9)).square().sum().backward()
print("no warning")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_distributed_data_parallel_does_not_warn(tmp_path):
    command = [sys.executable, "-c", DDP, str(tmp_path / "store")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.stdout.endswith("no warning\n") and "Grad strides" not in done.stderr, done.stderr
