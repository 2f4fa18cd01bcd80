"""The same bits in every run, at any number of threads, in any order of blocks."""

import pytest
import torch

import fastda
from fastda.tools import verify
from tests import lanes
from tests.conformance.cases import arguments_for, every_operator

DTYPES = (torch.float32, torch.bfloat16)


# Eager PyTorch's sums depend on the threads.
@pytest.mark.lanes(*lanes.KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@every_operator
def test_results_are_the_same_bits(lane, op, dtype):
    large = op.large_options if op.large_options is not None else op.options[-1]
    sizes = op.sizes[-1] if lane.interpreted else op.large[-1]
    exact, names = verify.draw_arguments(op, large, sizes, dtype, 0)
    given = arguments_for(lane, exact, dtype)
    threads = torch.get_num_threads()
    runs = []
    try:
        for seed, count in enumerate((1, 2, 3)):
            torch.set_num_threads(1 if lane.interpreted else count)
            lane.shuffle(seed)
            runs.append(verify.evaluate(getattr(fastda, op.name), given, names, 0))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for what, first in runs[0].items():
            if op.name == "grad_reverse_linear" and what != "x":
                torch.testing.assert_close(run[what], first)  # F.linear's own sums
            else:
                assert torch.equal(run[what], first), what
