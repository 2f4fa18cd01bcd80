"""Does refining help? The task's network trained on raw and on refined images, and a two-sample test."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastda import files
from fastda.recipes.common.images import shifted
from fastda.recipes.simgan.data import Domains, Images, digest
from fastda.recipes.simgan.eyes import angle_between, angles, gaze_vector, retaken
from fastda.recipes.simgan.models import REGRESSORS, Classifier
from fastda.recipes.simgan.train import to_float

GAZE_STEPS = 1.5  # steps of a gaze regressor for one of a classifier


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


def train_regressor(
    images: Images, seed: int, steps: int, progress: Any = None, regressor: str = "paper"
) -> nn.Module:
    """Of eyes in varied light: one that has seen drawn eyes only as they were drawn reads noise elsewhere.

    The small one takes twice as many images a step, and twice the step size.
    """
    torch.manual_seed(seed)
    net = REGRESSORS[regressor]()
    batch, lr = (32, 0.0005) if regressor == "paper" else (64, 0.001)
    return fit(
        net, images, F.mse_loss, seed=seed, steps=steps, batch=batch, lr=lr, vary=retaken, progress=progress
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
    domains: Domains, refine: Callable[[Tensor], Tensor], *, match: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0, steps: int = 600, judge_steps: int = 300, judges: int = 3, progress: Any = None,
    regressor: str = "paper", memory: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All measures as plain numbers.

    `accuracy` (of classes) or `error` (of gazes, degrees): on held-out real images, by what the network was
    trained on, where the real images have labels. Classifiers see their training images moved by up to two
    pixels. Gazes: `mean gaze` always says the mean of the real training images, `matched` is trained on what
    `match` makes of synthetic images before R sees them, `real` on the real training images; `centred` is the
    error once the mean difference of the angles read from the true ones is taken out. `gaze_kept`: degrees
    between what a regressor trained on raw images reads from a held-out synthetic image and from its refined
    copy; `gaze_raw`, `gaze_refined`: its errors on both. `two_sample`: see there, the mean of several judges.

    regressor: of gazes, one of `models.REGRESSORS`.
    memory: a file that keeps each number once it is known, so that an interrupted run goes on from it.
    """
    synthetic, held_out = domains.synthetic, domains.synthetic_test
    refined, refined_test = Images(refine(synthetic.x), synthetic.y), Images(refine(held_out.x), held_out.y)
    both = None
    if synthetic.y is not None:
        both = Images(torch.cat([synthetic.x, refined.x]), torch.cat([synthetic.y, synthetic.y]))
    measures: dict[str, Any] = {}
    sizes = [seed, steps, judge_steps, regressor]
    parts = [synthetic, held_out, domains.real, domains.real_test, refined, refined_test]
    once = _Once(memory, f"{sizes} {digest(*parts)} {torch.__version__}", progress)

    truth = domains.real_test.y

    if domains.task == "class" and both is not None and truth is not None:

        def accuracy(images: Images) -> float:
            net = train_classifier(images, len(domains.classes), seed, steps, 2, progress)
            return float((predict(net, domains.real_test.x).argmax(1) == truth).float().mean())

        rows = {"raw": synthetic, "refined": refined, "raw + refined": both}
        measures["accuracy"] = {
            name: once(name, steps, partial(accuracy, images)) for name, images in rows.items()
        }
    if domains.task == "gaze" and both is not None:
        gaze_steps = round(GAZE_STEPS * steps)

        def gazes(images: Images) -> dict[str, float]:
            net = train_regressor(images, seed, gaze_steps, progress, regressor)
            of_raw, of_refined = predict(net, held_out.x), predict(net, refined_test.x)
            assert held_out.y is not None
            found = {
                "gaze_kept": float(angle_between(of_raw, of_refined).mean()),
                "gaze_raw": float(angle_between(of_raw, held_out.y).mean()),
                "gaze_refined": float(angle_between(of_refined, held_out.y).mean()),
            }
            return found if truth is None else found | _errors(predict(net, domains.real_test.x), truth)

        rows = {"raw": synthetic}
        if truth is not None and domains.real.y is not None:
            if match is not None:
                rows["matched"] = Images(match(synthetic.x), synthetic.y)
            rows |= {"refined": refined, "raw + refined": both, "real": domains.real}
            always = F.normalize(domains.real.y.mean(0), dim=0).expand_as(truth)
            for key, value in _errors(always, truth).items():
                measures[key] = {"mean gaze": value}
        for name, images in rows.items():
            found = once(name, gaze_steps, partial(gazes, images))
            for key in ("error", "centred"):
                if key in measures:
                    measures[key][name] = found[key]
            if name == "raw":
                measures |= {key: found[key] for key in ("gaze_kept", "gaze_raw", "gaze_refined")}

    def judge(train_x: Tensor, test_x: Tensor, seed: int) -> float:
        real, real_test = domains.real.x, domains.real_test.x
        return two_sample(real, train_x, real_test, test_x, seed, judge_steps, progress)

    measures["two_sample"] = {}
    for name, train_x, test_x in (("raw", synthetic.x, held_out.x), ("refined", refined.x, refined_test.x)):
        scores = [
            once(f"judge {j}, {name}", judge_steps, partial(judge, train_x, test_x, 1000 * seed + j))
            for j in range(judges)
        ]
        measures["two_sample"][name] = sum(scores) / len(scores)
    return measures


class _Once:
    """Computes what its file does not know yet `of` the same images and sizes, and notes it there."""

    def __init__(self, path: Path | None, of: str, progress: Any) -> None:
        self.path, self.of, self.progress = path, of, progress
        self.known: dict[str, Any] = {}
        if path is not None and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.known = stored["known"] if stored["of"] == of else {}

    def __call__(self, name: str, steps: int, compute: Callable[[], Any]) -> Any:
        if name in self.known:
            if self.progress is not None:
                self.progress.update(steps)
            return self.known[name]
        self.known[name] = compute()
        if self.path is not None:
            files.write(self.path, json.dumps({"of": self.of, "known": self.known}, indent=1) + "\n")
        return self.known[name]


def _errors(read: Tensor, truth: Tensor) -> dict[str, float]:
    """Of gazes (N, 3), in degrees; `centred`: the mean differences of pitch and of yaw taken out."""
    found, true = angles(F.normalize(read, dim=1)), angles(truth)
    pitch, yaw = (found - (found - true).mean(0)).unbind(1)
    return {
        "error": float(angle_between(read, truth).mean()),
        "centred": float(angle_between(gaze_vector(pitch, yaw), truth).mean()),
    }


def training_steps(domains: Domains, steps: int, judge_steps: int, judges: int, matched: bool = False) -> int:
    """Steps that `evaluate` takes in all, for a progress bar."""
    labelled = domains.real_test.y is not None
    nets = {"class": 3 * labelled, "gaze": 4 + matched if labelled else 1}.get(domains.task, 0)
    each = round(GAZE_STEPS * steps) if domains.task == "gaze" else steps
    return nets * each + 2 * judges * judge_steps
