"""Models that other tools are tried on."""

import torch
from torch import nn

from tests.optimize.cases import Block, Copying, Reverse, chain, maps


class Normalised(nn.Module):
    """What fuse_modules and fx fusion look for."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.last = nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.last(self.relu(self.bn(self.conv(x))))


class Adversary(nn.Module):
    """A network, a reversal and a head."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 2)

    def forward(self, x):
        y = Copying.apply(self.block(x).mean((2, 3)), 0.3)
        return self.head(Reverse.apply(y, 0.7))


MODELS = {"block": Block, "chain": chain, "normalised": Normalised, "adversary": Adversary}


def image(n=2):
    return maps(n, 4, 8, 6, torch.float32).detach()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
