"""Stacked denoising auto-encoders on both domains, then a linear SVM (Glorot et al., ICML 2011)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dann.data import Pair


def _pixels(images: Tensor) -> Tensor:
    """Brightness in [0, 1], (N, H·W)."""
    return images.float().mean(1).flatten(1) / 255


def _denoising_layer(
    x: Tensor, width: int, masked: float, epochs: int, generator: torch.Generator
) -> nn.Linear:
    """Encoder trained to restore `x` (N, D) in [0, 1] from copies with a share `masked` set to zero."""
    encoder, decoder = nn.Linear(x.shape[1], width), nn.Linear(width, x.shape[1])
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(128):
            clean = x[part]
            noisy = clean * (torch.rand(clean.shape, generator=generator) >= masked)
            restored = decoder(torch.sigmoid(encoder(noisy)))
            optimiser.zero_grad()
            F.binary_cross_entropy_with_logits(restored, clean).backward()
            optimiser.step()
    return encoder.requires_grad_(False)


def _svm_accuracy(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, seed: int
) -> tuple[float, np.ndarray]:
    from sklearn.svm import LinearSVC

    # Unscaled: a pixel that hardly varies in the source would be blown up where the target uses it.
    svm = LinearSVC(C=0.01, random_state=seed)
    svm.fit(train.numpy(), labels.numpy())
    predicted = svm.predict(test.numpy())
    return float((predicted == truth.numpy()).mean()), predicted


def train_sda(
    pair: Pair, seed: int, *, widths: tuple[int, ...] = (500, 500), masked: float = 0.5, epochs: int = 10
) -> dict[str, Any]:
    """Accuracy of a linear SVM on held-out target images, from codes and (`baseline`) from pixels.

    The auto-encoders see the training images of both domains without labels; the SVM sees the source's codes
    and labels.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    source, target, test = (_pixels(i.x) for i in (pair.source_train, pair.target_train, pair.target_test))
    labels, truth = pair.source_train.y, pair.target_test.y
    baseline, _ = _svm_accuracy(source, labels, test, truth, seed)
    codes = {"source": [source], "target": [target], "test": [test]}
    for width in widths:
        layer = _denoising_layer(
            torch.cat([codes["source"][-1], codes["target"][-1]]), width, masked, epochs, generator
        )
        for stack in codes.values():
            stack.append(torch.sigmoid(layer(stack[-1])))
    # As published, the classifier sees all layers' codes side by side.
    features = {name: torch.cat(stack, 1) for name, stack in codes.items()}
    accuracy, predicted = _svm_accuracy(features["source"], labels, features["test"], truth, seed)
    return {
        "method": "sda",
        "seed": seed,
        "target_accuracy": accuracy,
        "baseline": baseline,
        "seconds": time.perf_counter() - start,
        "history": [],
        "predictions": predicted.tolist(),
    }
