"""What learns from a source's labelled codes: a linear SVM, and a network of one hidden layer, DANN or not.

No function here is given a label of the target, or a test review.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastda.nn

C_GRID = tuple(float(c) for c in np.logspace(-5, 0, 10))  # as published
# A linear domain classifier and what it looks at circle each other, ever wider: the domains end up further
# apart than they began. With a classifier that is quick, and drawn to zero, they meet.
DOMAIN_RATE, DOMAIN_DECAY = 30, 1.0
PATIENCE = 3  # epochs without a lesser label loss on held-out reviews before a network's training stops


@dataclass(frozen=True)
class Trained:
    """`predict` makes codes (N, D) labels (N,); `chosen` is what was chosen without the target's labels."""

    predict: Callable[[Tensor], Tensor]
    chosen: dict[str, Any] = field(default_factory=dict)


def svm(x: Tensor, y: Tensor, seed: int) -> Trained:
    """A linear SVM whose C has the best five-fold accuracy on the source, the least C where several have it.

    Trained on the products of all reviews with each other: codes are longer than reviews are many.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.svm import SVC

    products, labels = (x @ x.T).double().numpy(), y.numpy()
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    machines = [SVC(C=c, kernel="precomputed") for c in C_GRID]
    scores = [cross_val_score(machine, products, labels, cv=folds).mean() for machine in machines]
    best = int(np.argmax(scores))
    machine = machines[best].fit(products, labels)
    weights = torch.from_numpy(machine.dual_coef_[0]).to(x.dtype) @ x[machine.support_]
    bias = float(machine.intercept_[0])
    chosen = {"C": C_GRID[best], "source_validation": float(scores[best])}
    return Trained(lambda codes: (codes @ weights + bias > 0).long(), chosen)


class Network(nn.Module):
    """One hidden layer of logistic units, a label's logit, and a domain classifier behind the reversal."""

    def __init__(self, features: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.label = nn.Linear(hidden, 1)
        self.reverse = fastda.nn.GradientReversal(scale)
        self.domain = fastda.nn.DomainClassifier(hidden, num_layers=0)

    def embed(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.hidden(x))

    def label_logits(self, codes: Tensor) -> Tensor:
        return self.label(codes).squeeze(1)

    def domain_logits(self, codes: Tensor) -> Tensor:
        """Logits (N,) of "comes from the labelled domain"."""
        return self.domain(self.reverse(codes)).squeeze(1)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return (self.label_logits(self.embed(x)) > 0).long()


@dataclass(frozen=True)
class Labelled:
    """Codes and labels to train on, and others to stop by."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor


def hold_out(x: Tensor, y: Tensor, seed: int) -> Labelled:
    """A tenth is held out."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(x) // 10], order[len(x) // 10 :]
    return Labelled(x[rest], y[rest], x[held], y[held])


def fit(
    labelled: Labelled,
    other: Tensor | None,
    *,
    scale: float = 0.0,
    seed: int,
    hidden: int,
    rate: float,
    epochs: int,
    batch: int,
) -> Network:
    """The network of the epoch with the least label loss on what is held out.

    `other`: codes of the unlabelled domain, for DANN with `scale`; None trains on the labelled one alone.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = labelled.x, labelled.y.to(labelled.x.dtype)
    net = Network(x.shape[1], hidden, scale)
    domain = list(net.domain.parameters())
    rest = [*net.hidden.parameters(), *net.label.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": rest},
        {"params": domain, "lr": DOMAIN_RATE * rate, "weight_decay": DOMAIN_DECAY},
    ]
    optimiser = torch.optim.Adam(groups, rate, fused=True)
    batch = min(batch, len(x))
    best, kept, since = float("inf"), net.state_dict(), 0
    for _ in range(epochs):
        if since == PATIENCE:
            break
        order = torch.randperm(len(x), generator=generator)
        others = torch.empty(0, dtype=torch.int64)
        for picked in order[: len(x) // batch * batch].view(-1, batch):
            codes = net.embed(x[picked])
            loss = F.binary_cross_entropy_with_logits(net.label_logits(codes), y[picked])
            if other is not None:
                while len(others) < batch:
                    others = torch.cat([others, torch.randperm(len(other), generator=generator)])
                beside, others = net.embed(other[others[:batch]]), others[batch:]
                logits = net.domain_logits(torch.cat([codes, beside]))
                is_labelled = torch.cat([torch.ones(batch), torch.zeros(batch)])
                loss = loss + F.binary_cross_entropy_with_logits(logits, is_labelled)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            logits = net.label_logits(net.embed(labelled.held_x))
            now = float(F.binary_cross_entropy_with_logits(logits, labelled.held_y.to(x.dtype)))
        since += 1
        if now < best:
            best, kept, since = now, copy.deepcopy(net.state_dict()), 0
    net.load_state_dict(kept)
    return net


def source_only(x: Tensor, y: Tensor, *, seed: int, **settings: Any) -> Trained:
    """The standard network, stopped by its label loss on a tenth of the source."""
    return Trained(fit(hold_out(x, y, seed), None, seed=seed, **settings).predict)


def dann(
    x: Tensor, y: Tensor, other: Tensor, scales: Sequence[float], *, seed: int, **settings: Any
) -> Trained:
    """DANN with the scale of the reversal that serves best by reverse validation, the greatest of several.

    Reverse validation (Zhong et al. 2010; Ganin et al., JMLR 17, 2016, section 5.1): the network labels the
    other domain, a second network is trained the other way round on these labels, and what counts is its
    accuracy on held-out reviews of the first domain. With one scale there is nothing to choose.
    """
    labelled = hold_out(x, y, seed)
    best: tuple[float, float, Network] | None = None
    tried: dict[str, float] = {}
    for scale in scales:
        net = fit(labelled, other, scale=scale, seed=seed, **settings)
        accuracy = 0.0
        if len(scales) > 1:
            back = fit(
                hold_out(other, net.predict(other), seed), labelled.x, scale=scale, seed=seed, **settings
            )
            accuracy = float((back.predict(labelled.held_x) == labelled.held_y).double().mean())
            tried[str(scale)] = accuracy
        if best is None or (accuracy, scale) > best[:2]:
            best = accuracy, scale, net
    assert best is not None
    return Trained(best[2].predict, {"scale": best[1], "reverse_validation": tried})
