"""The history of refined images."""

import copy

import pytest
import torch

from fastda import nn
from tests import common
from tests.ops.patch_loss import isa_independent


def numbered(first, n, **options):
    return torch.arange(first, first + n, **options).view(n, 1, 1, 1).expand(n, 1, 2, 3).float()


def numbers(images):
    return images[:, 0, 0, 0].tolist()


@isa_independent
@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("capacity", [1, 3, 16])
def test_history_fills_then_mixes(n, capacity):
    history = nn.ImageHistoryBuffer(capacity, seed=1)
    stored, drawn, total = [], 0, 0
    for step in range(40):
        batch = numbered(step * n, n)
        full = len(history) == capacity
        got = history.query(batch)
        now = numbers(history.images)
        assert got.shape == batch.shape
        if not full:
            assert torch.equal(got, batch)
            stored += numbers(batch)[: capacity - len(stored)]
            assert now == stored
            continue
        old = [i for i in numbers(got) if i < step * n]
        new = [i for i in numbers(got) if i >= step * n]
        assert len(old) in {min(n // 2, capacity), min(n - n // 2, capacity)}
        assert set(old) <= set(stored) and len(set(old)) == len(old)
        assert len(set(new)) == len(new)
        # As many entries gave way, all to images that this query held back.
        arrived = [i for i in now if i not in stored]
        assert len(arrived) == len(old) and set(arrived) == set(numbers(batch)) - set(new)
        stored, drawn, total = now, drawn + len(old), total + n
    if capacity >= n:
        assert abs(drawn / total - 0.5) < 0.2
    assert len(history) == capacity


@isa_independent
def test_history_draws_and_replaces_every_entry_alike():
    history = nn.ImageHistoryBuffer(8, seed=3)
    history.query(numbered(0, 8))
    hits = torch.zeros(8)
    for _ in range(1500):
        before = numbers(history.images)
        history.query(numbered(100, 4))
        hits += torch.tensor([a != b for a, b in zip(before, numbers(history.images), strict=True)])
        history.images.copy_(numbered(0, 8))
    share = hits / hits.sum()
    assert (share - 1 / 8).abs().max() < 0.03


@isa_independent
def test_history_keeps_detached_copies():
    history = nn.ImageHistoryBuffer(4)
    batch = torch.randn(4, 1, 2, 3, requires_grad=True)
    image = batch * 2
    out = history.query(image)
    assert not out.requires_grad and not history.images.requires_grad
    with torch.no_grad():
        kept = history.images.clone()
        image.fill_(0)
        out.fill_(7)
    assert torch.equal(history.images, kept)


@isa_independent
def test_history_is_saved_loaded_and_repeats():
    runs = []
    for _ in range(2):
        history = nn.ImageHistoryBuffer(5, seed=11)
        runs.append([history.query(numbered(3 * i, 3)) for i in range(6)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    history.double()
    other = nn.ImageHistoryBuffer(5, seed=0)
    other.load_state_dict(history.state_dict())
    assert other.images.dtype == torch.float64
    for i in range(4):
        batch = numbered(100 + 3 * i, 3).double()
        assert torch.equal(history.query(batch), other.query(batch))
    twin = copy.deepcopy(history)
    assert torch.equal(twin.query(batch), history.query(batch))
    module = torch.nn.Sequential(nn.ImageHistoryBuffer(5))
    module.load_state_dict({"0.images": history.images}, strict=False)
    assert len(module[0]) == 5


@isa_independent
def test_history_follows_the_device():
    history = nn.ImageHistoryBuffer(2, seed=0)
    history.query(numbered(0, 2))
    assert history.to("meta").query(torch.empty(3, 1, 2, 3, device="meta")).device.type == "meta"


@isa_independent
@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        (torch.zeros(2, 3, 4), ValueError, "batch must be (N, C, H, W), got (2, 3, 4)"),
        (
            torch.zeros(2, 1, 3, 3),
            ValueError,
            "batch must hold images of shape (1, 2, 3), got (2, 1, 3, 3)",
        ),
        (torch.zeros(2, 1, 2, 3).double(), TypeError, "batch must be torch.float32, got torch.float64"),
        (torch.zeros(2, 1, 2, 3, device="meta"), ValueError, "batch must be on cpu, got meta"),
    ],
)
def test_history_refuses_what_does_not_fit(batch, kind, message):
    history = nn.ImageHistoryBuffer(4)
    history.query(numbered(0, 4))
    common.check_error(history.query, {"batch": batch}, kind, f"ImageHistoryBuffer: {message}")


@isa_independent
def test_history_needs_room():
    common.check_error(
        nn.ImageHistoryBuffer,
        {"capacity": 0},
        ValueError,
        "ImageHistoryBuffer: capacity must be at least 1, got 0",
    )
    common.check_error(
        nn.ImageHistoryBuffer,
        {"capacity": 1.5},
        TypeError,
        "ImageHistoryBuffer: capacity must be an int, got float",
    )
