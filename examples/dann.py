"""DANN in a training loop of one's own: a network of any kind, a reversal on its schedule, two losses.

Here: points on two half circles, one a class, the target's turned by 35 degrees. `fastda dann` is for images.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastda.nn


def moons(count: int, turn: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (count, 2) on two half circles turned by `turn` degrees; which of the two, int64 (count,)."""
    labels = torch.randint(2, (count,), generator=generator)
    along = math.pi * (torch.rand(count, generator=generator) + labels)
    points = torch.stack([along.cos() + labels - 0.5, along.sin() + 0.5 * labels - 0.25], 1)
    points = points + 0.05 * torch.randn(count, 2, generator=generator)
    angle = math.radians(turn)
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ torch.tensor([[cos, sin], [-sin, cos]]), labels


def train(steps: int, adversarial: bool, seed: int = 0) -> float:
    """Accuracy on the target, whose labels no step of the training sees."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    features = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    label = nn.Linear(32, 2)
    reverse = fastda.nn.ScheduledGradientReversal(steps)
    domain = fastda.nn.DomainClassifier(32, 32, num_layers=1, dropout=0.0)
    nets = nn.ModuleList([features, label, reverse, domain])
    optimiser = torch.optim.SGD(nets.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        source, labels = moons(64, 0.0, generator)
        target, _ = moons(64, 35.0, generator)
        of_source, of_target = features(source), features(target)
        loss = F.cross_entropy(label(of_source), labels)
        if adversarial:
            logits = domain(reverse(torch.cat([of_source, of_target]))).squeeze(1)
            is_source = torch.cat([torch.ones(64), torch.zeros(64)])
            loss = loss + F.binary_cross_entropy_with_logits(logits, is_source)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        reverse.step()
    points, truth = moons(2000, 35.0, generator)
    return float((label(features(points)).argmax(1) == truth).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    print(f"source only: {train(options.steps, False):.3f} of the target's points are right")
    print(f"DANN:        {train(options.steps, True):.3f}")


if __name__ == "__main__":
    main()
