"""Blocks that compute other things than a residual block where nobody looked."""

import contextlib
import os
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from tests.optimize.cases import WrittenBlock, cases, maps
from tests.optimize.checking import check


class Benign(WrittenBlock):
    pass


class BenignWithFunctions(WrittenBlock):
    def forward(self, x):
        return F.relu(x + self.convs(x))


class BenignWithSingleLayers(WrittenBlock):
    def forward(self, x):
        h = self.convs[0](x)
        h = self.convs[1](h)
        return torch.relu(torch.add(self.convs[2](h), x))


class BenignInPlace(WrittenBlock):
    def forward(self, x):
        out = self.convs(x)
        out += x
        return F.relu(out, inplace=True)


# -- what the input is ---------------------------------------------------------------------------------------


class OddSizes(WrittenBlock):
    sizes: ClassVar = [(2, 4, 6, 8), (2, 4, 6, 7)]

    def forward(self, x):
        y = self.convs(x)
        return self.relu(y + x) if x.shape[-1] % 2 == 0 else self.relu(y - x)


class LargeSizes(WrittenBlock):
    sizes: ClassVar = [(1, 4, 6, 9), (1, 4, 64, 64)]

    def forward(self, x):
        return self.relu(self.convs(x) + (x if x.size(2) < 50 else 2 * x))


class SingleImages(WrittenBlock):
    sizes: ClassVar = [(2, 4, 6, 9), (1, 4, 6, 9)]

    def forward(self, x):
        y = self.convs(x)
        if len(x) == 1:
            y = y * 0.5
        return self.relu(y + x)


class MemoryFormat(WrittenBlock):
    def forward(self, x):
        y = self.convs(x)
        return self.relu(y + x) if x.is_contiguous() else self.relu(y + x + 1)

    def inputs(self):
        x = maps().detach()
        return [(x,), (x.to(memory_format=torch.channels_last).requires_grad_(),), (x.transpose(2, 3),)]


class Dtypes(WrittenBlock):
    tolerance = 1e-4
    second = False

    def forward(self, x):
        return self.relu(self.convs(x) + x) if x.dtype == torch.float64 else self.convs(x)

    def change(self, model):
        model.float()

    def before(self, model):
        return [(maps(),)]

    def inputs(self):
        return [(maps(dtype=torch.float32),)]


class WhetherItWantsAGradient(WrittenBlock):
    def forward(self, x):
        return self.relu(self.convs(x) + x) if x.requires_grad else self.relu(self.convs(x) - x)

    def inputs(self):
        return [(maps(),), (maps().detach(),)]


class Values(WrittenBlock):
    def forward(self, x):
        return self.relu(self.convs(x) + (x if x.abs().max() < 1e6 else 0 * x))

    def inputs(self):
        return [(maps(),), (maps(scale=1e8),)]


class RaisesOnNaN(WrittenBlock):
    def forward(self, x):
        if torch.isnan(x).any():
            raise ValueError("x is NaN")
        return self.relu(self.convs(x) + x)

    def inputs(self):
        return [(maps(),), (maps(scale=float("nan")),)]


class ClampsFarOut(WrittenBlock):
    def forward(self, x):
        return self.relu((self.convs(x) + x).clamp(-1e4, 1e4))

    def inputs(self):
        return [(maps(),), (maps(scale=1e6),)]


class AssertsTheSize(WrittenBlock):
    def forward(self, x):
        assert x.shape[2] < 30, "too high"
        return self.relu(self.convs(x) + x)


class TriesFirst(WrittenBlock):
    def forward(self, x):
        try:
            return self.relu(self.convs(x) + x.view(2, 4, 9, 7))
        except RuntimeError:
            return x


# -- modes and flags of torch --------------------------------------------------------------------------------


def _mode(name, forward, around, **more):
    """A block whose forward looks at a flag of torch, and is called again where that differs."""
    namespace = {"forward": forward, "around": lambda self: around(), "__module__": __name__}
    return type(name, (WrittenBlock,), namespace | more)


@contextlib.contextmanager
def flag(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype():
    return flag(torch.get_default_dtype, torch.set_default_dtype, torch.float64)


def deterministic():
    return flag(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


def seven_threads():
    return flag(torch.get_num_threads, torch.set_num_threads, 7)


def without_mkldnn():
    return torch.backends.mkldnn.flags(enabled=False)


def anomalies():
    return torch.autograd.set_detect_anomaly(True)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@contextlib.contextmanager
def environment():
    os.environ["WRITTEN_BLOCK_GAIN"] = "2"
    try:
        yield
    finally:
        del os.environ["WRITTEN_BLOCK_GAIN"]


MODES = [
    _mode(
        "GradMode",
        lambda self, x: self.relu(self.convs(x) + x) if torch.is_grad_enabled() else self.convs(x),
        torch.no_grad,
    ),
    _mode(
        "InferenceMode",
        lambda self, x: (
            self.relu(self.convs(x) + x) if not torch.is_inference_mode_enabled() else self.convs(x)
        ),
        torch.inference_mode,
    ),
    _mode(
        "Autocast",
        lambda self, x: (
            self.relu(self.convs(x) + x) if not torch.is_autocast_enabled("cpu") else self.convs(x)
        ),
        autocast,
        second=False,
        tolerance=2e-2,
    ),
    _mode(
        "DefaultDtype",
        lambda self, x: (
            self.relu(self.convs(x) + x) if torch.get_default_dtype() == torch.float32 else self.convs(x)
        ),
        default_dtype,
    ),
    _mode(
        "Deterministic",
        lambda self, x: (
            self.relu(self.convs(x) + x)
            if not torch.are_deterministic_algorithms_enabled()
            else self.convs(x)
        ),
        deterministic,
    ),
    _mode(
        "EnvironmentVariable",
        lambda self, x: (
            self.relu(self.convs(x) + x) if "WRITTEN_BLOCK_GAIN" not in os.environ else self.convs(x)
        ),
        environment,
    ),
    _mode(
        "Mkldnn",
        lambda self, x: self.relu(self.convs(x) + x) if torch.backends.mkldnn.enabled else self.convs(x),
        without_mkldnn,
    ),
    _mode(
        "Threads",
        lambda self, x: self.relu(self.convs(x) + x) if torch.get_num_threads() < 7 else self.convs(x),
        seven_threads,
    ),
    _mode(
        "Cuda",
        lambda self, x: self.relu(self.convs(x) + x) if not torch.cuda.is_available() else self.convs(x),
        contextlib.nullcontext,
    ),
    _mode(
        "Compiling",
        lambda self, x: self.relu(self.convs(x) + x) if not torch.compiler.is_compiling() else self.convs(x),
        contextlib.nullcontext,
    ),
    _mode(
        "Anomaly",
        lambda self, x: self.relu(self.convs(x) + x) if not torch.is_anomaly_enabled() else self.convs(x),
        anomalies,
    ),
]
globals().update({case.__name__: case for case in MODES})


class Training(WrittenBlock):
    def forward(self, x):
        return self.relu(self.convs(x) + x) if self.training else self.convs(x)

    def change(self, model):
        model.eval()


class TrainingOfALayer(Training):
    def forward(self, x):
        return self.relu(self.convs(x) + x) if self.relu.training else self.convs(x)


class ServedUnderAutocast(WrittenBlock):
    second = False
    tolerance = 2e-2

    def around(self):
        return autocast()


class ServedWithoutGradients(WrittenBlock):
    def around(self):
        return torch.no_grad()


BLOCKS = cases(globals())


@pytest.mark.parametrize("case", BLOCKS, ids=lambda c: c.__name__)
def test_a_block_computes_what_its_code_says(case, monkeypatch):
    check(case(), monkeypatch)
