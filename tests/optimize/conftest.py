import copy
import importlib

import pytest
import torch

import fastda
from tests.optimize.tools import MODELS, image

convolution = importlib.import_module("fastda.optimize.convolution")
loss = importlib.import_module("fastda.optimize.loss")
norm = importlib.import_module("fastda.optimize.norm")
pool = importlib.import_module("fastda.optimize.pool")


@pytest.fixture(autouse=True)
def even_where_nothing_is_gained(monkeypatch, request):
    """What is recognised is tested on small layers, whether or not that makes them faster."""
    if not request.node.get_closest_marker("gain"):
        monkeypatch.setattr(convolution, "FAST_KERNELS", (1, 3, 5, 7))
        monkeypatch.setattr(convolution, "LEAST_CHANNELS", 1)
        monkeypatch.setattr(convolution, "LEAST_CHANNELS_DILATED", 1)
        monkeypatch.setattr(convolution, "LEAST_SIZE", 1)
        monkeypatch.setattr(convolution, "WANTED_OF", 1 << 20)
        monkeypatch.setattr(convolution, "LEAST_PRODUCTS", 0)
        monkeypatch.setattr(convolution, "LEAST_PIXELS", 0)
        for name in ("LEAST_SIZE_OF_7", "LEAST_SIZE_OF_5", "SMALL_OF_5", "LARGE_OF_5", "LEAST_PIXELS_OF_5"):
            monkeypatch.setattr(convolution, name, 0)
        for name in ("LEAST_AREA_OF_1", "LEAST_AREA_BESIDE_ONEDNN", "LEAST_PRODUCTS_OF_1", "LEAST_TILES"):
            monkeypatch.setattr(convolution, name, 0)
        monkeypatch.setattr(convolution, "LEAST_CHANNELS_OF_1", 1)
        for name in ("FILTERS_OF_A_PIXEL", "FILTERS_OF_A_PIXEL_OF_1", "MOST_FILTERS_BESIDE_ONEDNN"):
            monkeypatch.setattr(convolution, name, 1 << 30)
        monkeypatch.setattr(convolution, "MOST_FILTERS", dict.fromkeys((1, 3, 5, 7), 1 << 30))
        monkeypatch.setattr(pool, "LEAST_ELEMENTS", 0)
        for name in ("ELEMENTS", "ELEMENTS_OF_ROWS", "PIXELS", "PIXELS_OF_INSTANCES"):
            monkeypatch.setattr(norm, f"LEAST_{name}", 0)
        monkeypatch.setattr(loss, "LEAST_PATCHES", dict.fromkeys(loss.LEAST_PATCHES, 1))


@pytest.fixture(params=MODELS)
def pair(request):
    """A replaced model that has served calls, its original, and the report; float32, as tools want it."""
    torch.manual_seed(0)
    original = MODELS[request.param]().eval()
    model = copy.deepcopy(original)
    report = fastda.optimize(model)
    model(image())
    assert len(report.replaced) > 0
    yield model, original, report
    report.undo()
