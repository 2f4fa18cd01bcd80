"""Does refining help? The task's network trained on raw and on refined images, and a two-sample test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastda.recipes.common.images import shifted
from fastda.recipes.simgan.data import Domains, Images
from fastda.recipes.simgan.eyes import angle_between, retaken
from fastda.recipes.simgan.models import Classifier, GazeRegressor
from fastda.recipes.simgan.train import to_float

GAZE_STEPS = 3  # steps of a gaze regressor for one of a classifier


def fit(
    net: nn.Module, images: Images, loss: Callable[[Tensor, Tensor], Tensor], *, seed: int, steps: int,
    batch: int = 64, lr: float = 0.001, shift: int = 0,
    vary: Callable[[Tensor, torch.Generator], Tensor] | None = None, progress: Any = None,
) -> nn.Module:  # fmt: skip
    """Adam on random minibatches, the step size falling to zero. `net` comes back in evaluation mode.

    shift: pixels by which the images are moved at random.
    vary: makes other uint8 images of those of a minibatch.
    """
    generator = torch.Generator().manual_seed(seed)
    net.to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2 * lr, total_steps=steps)
    assert images.y is not None
    for _ in range(steps):
        picked = torch.randint(len(images), (batch,), generator=generator)
        x = images.x[picked] if vary is None else vary(images.x[picked], generator)
        x = to_float(x)
        x = shifted(x, shift, generator) if shift else x.contiguous(memory_format=torch.channels_last)
        value = loss(net(x), images.y[picked])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress.update()
    return net.eval()


@torch.no_grad()
def predict(net: nn.Module, x: Tensor) -> Tensor:
    """Outputs for uint8 images (N, C, H, W)."""
    return torch.cat([net(to_float(part).contiguous(memory_format=torch.channels_last))
                      for part in x.split(250)])  # fmt: skip


def train_classifier(
    images: Images, classes: int, seed: int, steps: int, shift: int = 0, progress: Any = None
) -> nn.Module:
    torch.manual_seed(seed)
    channels, height, width = images.x.shape[1:]
    net = Classifier(channels, height, width, classes)
    return fit(net, images, F.cross_entropy, seed=seed, steps=steps, shift=shift, progress=progress)


def train_regressor(images: Images, seed: int, steps: int, progress: Any = None) -> nn.Module:
    """Of eyes in varied light: one that has seen drawn eyes only as they were drawn reads noise elsewhere."""
    torch.manual_seed(seed)
    net = GazeRegressor()
    return fit(
        net, images, F.mse_loss, seed=seed, steps=steps, batch=32, lr=0.0005, vary=retaken, progress=progress
    )


def two_sample(
    real: Tensor,
    fake: Tensor,
    real_test: Tensor,
    fake_test: Tensor,
    seed: int,
    steps: int,
    progress: Any = None,
) -> float:
    """How well a fresh classifier tells held-out real from held-out fake images: 0.5 is chance.

    The mean of its accuracies on both, so that it does not matter how many of each there are. In training,
    too, each domain is half of every minibatch on average. The paper's Turing test, judged by a network.
    """
    torch.manual_seed(seed)
    n = max(len(real), len(fake))
    balanced = [part[torch.arange(n) % len(part)] for part in (real, fake)]
    labels = torch.cat([torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.long)])
    judge = train_classifier(Images(torch.cat(balanced), labels), 2, seed, steps, progress=progress)
    sides = [
        (predict(judge, x).argmax(1) == side).float().mean() for side, x in enumerate((real_test, fake_test))
    ]
    return float(sum(sides)) / 2


def evaluate(
    domains: Domains, refine: Callable[[Tensor], Tensor], *, seed: int = 0, steps: int = 600,
    judge_steps: int = 300, judges: int = 3, progress: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """All measures as plain numbers.

    `accuracy` (of classes) or `error` (of gazes, degrees): on held-out real images, by what the network was
    trained on, where the real images have labels. Classifiers see their training images moved by up to two
    pixels. `gaze_kept`: degrees between what a regressor trained on raw images reads from a held-out
    synthetic image and from its refined copy; `gaze_raw`, `gaze_refined`:
    its errors on both. `two_sample`: see there, the mean of several judges.
    """
    synthetic, held_out = domains.synthetic, domains.synthetic_test
    refined, refined_test = Images(refine(synthetic.x), synthetic.y), Images(refine(held_out.x), held_out.y)
    both = None
    if synthetic.y is not None:
        both = Images(torch.cat([synthetic.x, refined.x]), torch.cat([synthetic.y, synthetic.y]))
    measures: dict[str, Any] = {}

    if domains.task == "class" and both is not None and domains.real_test.y is not None:
        truth = domains.real_test.y
        measures["accuracy"] = {}
        for name, images in (("raw", synthetic), ("refined", refined), ("raw + refined", both)):
            net = train_classifier(images, len(domains.classes), seed, steps, 2, progress)
            said = predict(net, domains.real_test.x).argmax(1)
            measures["accuracy"][name] = float((said == truth).float().mean())
    if domains.task == "gaze" and both is not None:
        raw_net = train_regressor(synthetic, seed, GAZE_STEPS * steps, progress)
        of_raw, of_refined = predict(raw_net, held_out.x), predict(raw_net, refined_test.x)
        assert held_out.y is not None
        measures["gaze_kept"] = float(angle_between(of_raw, of_refined).mean())
        measures["gaze_raw"] = float(angle_between(of_raw, held_out.y).mean())
        measures["gaze_refined"] = float(angle_between(of_refined, held_out.y).mean())
        if domains.real_test.y is not None:
            nets = {"raw": raw_net}
            for name, images in (("refined", refined), ("raw + refined", both)):
                nets[name] = train_regressor(images, seed, GAZE_STEPS * steps, progress)
            measures["error"] = {
                name: float(angle_between(predict(net, domains.real_test.x), domains.real_test.y).mean())
                for name, net in nets.items()
            }
    measures["two_sample"] = {}
    for name, train_x, test_x in (("raw", synthetic.x, held_out.x), ("refined", refined.x, refined_test.x)):
        scores = [
            two_sample(
                domains.real.x, train_x, domains.real_test.x, test_x, 1000 * seed + j, judge_steps, progress
            )
            for j in range(judges)
        ]
        measures["two_sample"][name] = sum(scores) / len(scores)
    return measures


def training_steps(domains: Domains, steps: int, judge_steps: int, judges: int) -> int:
    """Steps that `evaluate` takes in all, for a progress bar."""
    labelled = domains.real_test.y is not None
    nets = {"class": 3 * labelled, "gaze": GAZE_STEPS * (3 if labelled else 1)}.get(domains.task, 0)
    return nets * steps + 2 * judges * judge_steps
