"""What the trainings share: a step on fixed noise, and how it is made ready."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Training(nn.Module):
    """A public training on noise: calling it takes one step, and returns the losses that its author logs.

    Networks and losses are its children, so that `fastda.optimize(training)` is the one line that is added,
    and images are its buffers, so that `training.to(memory_format=torch.channels_last)` is all there is to a
    layout.
    """

    def images(self, name: str, *shape: int) -> None:
        """A batch between −1 and 1, the same in every step."""
        self.register_buffer(name, torch.rand(shape) * 2 - 1)

    def labels(self, name: str, classes: int, *shape: int) -> None:
        self.register_buffer(name, torch.randint(classes, shape))

    def forward(self) -> list[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Published:
    """A training of the table: whose code it is, what its step is, and how many times as fast is wanted."""

    name: str
    source: str  # repository on GitHub
    step: str
    wanted: float
    make: Callable[..., Training]
    sizes: dict[str, Any] = field(default_factory=dict)  # as published: arguments of `make`
    tiny: dict[str, Any] = field(default_factory=dict)  # a second's work, for tests and --quick

    def build(self, tiny: bool = False) -> Training:
        """Always the same numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make(**(self.tiny if tiny else self.sizes))


def freeze(modules: Iterable[nn.Module], frozen: bool = True) -> None:
    for module in modules:
        module.requires_grad_(not frozen)


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def of_class(label: int, like: Tensor) -> Tensor:
    """A target for every row."""
    return torch.full((len(like),), label)
