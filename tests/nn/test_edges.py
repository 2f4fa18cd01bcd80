"""What the modules could get wrong and most uses do not show."""

import pytest
import torch

from fastda import nn

pytestmark = pytest.mark.isa_independent


def test_history_replaces_other_entries_than_it_drew():
    """What is drawn and what gives way are chosen independently: of half the entries, half on average."""
    history = nn.ImageHistoryBuffer(8, seed=3)
    both = 0
    for _ in range(300):
        stored = torch.arange(8.0).view(8, 1, 1, 1)
        history.images = stored.clone()
        drawn = history.query(torch.full((8, 1, 1, 1), -1.0)).flatten()
        drawn = set(drawn[drawn >= 0].tolist())
        gone = set(stored.flatten()[(history.images != stored).flatten()].tolist())
        assert len(drawn) == len(gone) == 4
        both += len(drawn & gone)
    assert abs(both / 300 - 2) < 0.3


def test_history_leaves_its_argument_alone():
    history = nn.ImageHistoryBuffer(4, seed=0)
    for i in range(6):
        batch = torch.full((4, 1, 2, 2), float(i))
        history.query(batch)
        assert torch.equal(batch, torch.full((4, 1, 2, 2), float(i)))


def test_patchgan_is_never_wider_than_eight_times_its_first_layer():
    widths = [
        m.out_channels
        for m in nn.PatchDiscriminator.patchgan(channels=4, layers=5).features
        if isinstance(m, torch.nn.Conv2d)
    ]
    assert widths == [4, 8, 16, 32, 32, 32]
