"""Stacked denoising auto-encoders on both domains, then a linear SVM (Glorot et al., ICML 2011).

Each layer is a linear auto-encoder under masking noise, marginalised over all maskings (Chen et al., ICML
2012): its weights solve one system of equations, without epochs or learning rate.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastda.recipes.dann.data import Pair


def _pixels(images: Tensor) -> Tensor:
    """Brightness in [0, 1], (N, H·W)."""
    return images.float().mean(1).flatten(1) / 255


def denoising_layer(x: Tensor, masked: float) -> Tensor:
    """Weights (D, D + 1), bias last, that restore `x` (N, D) from copies with a share `masked` set to zero.

    They have the least mean squared error in expectation over all maskings. The bias is never masked.
    """
    x = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
    kept = torch.full((x.shape[1],), 1 - masked, dtype=x.dtype)
    kept[-1] = 1
    scatter = x.T @ x
    noisy = scatter * kept[:, None] * kept
    noisy.diagonal().copy_(scatter.diagonal() * kept)
    noisy.diagonal().add_(1e-5)  # pixels that are always zero
    return torch.linalg.solve(noisy, (scatter * kept)[:-1].T).T


def encode(x: Tensor, weights: Tensor) -> Tensor:
    return torch.tanh(x.double() @ weights[:, :-1].T + weights[:, -1]).to(x.dtype)


def train_sda(
    pair: Pair, seed: int, *, layers: int = 5, shares: tuple[float, ...] = (0.5, 0.7, 0.9)
) -> dict[str, Any]:
    """Accuracy of a linear SVM on held-out target images, from codes and (`baseline`) from pixels.

    The auto-encoders see the training images of both domains without labels; the SVM sees the source's codes
    of all layers, as published, and the source's labels. The share of masked values is the one of `shares`
    that serves best on held-out source images.
    """
    from sklearn.svm import LinearSVC

    start = time.perf_counter()
    parts = (pair.source_train, pair.target_train, pair.source_test, pair.target_test)
    pixels = [_pixels(images.x) for images in parts]

    def svm(train: Tensor, held_out: Tensor, test: Tensor) -> tuple[float, np.ndarray]:
        """Accuracy on held-out source images and predictions of the target's."""
        # Unscaled: a pixel that hardly varies in the source would be blown up where the target uses it.
        machine = LinearSVC(C=0.01, random_state=seed)
        machine.fit(train.numpy(), pair.source_train.y.numpy())
        return machine.score(held_out.numpy(), pair.source_test.y.numpy()), machine.predict(test.numpy())

    best = (-1.0, np.empty(0), 0.0)
    for masked in shares:
        stack = [pixels]
        for _ in range(layers):
            weights = denoising_layer(torch.cat(stack[-1][:2]), masked)
            stack.append([encode(x, weights) for x in stack[-1]])
        source, _, held_out, test = (torch.cat(codes, 1) for codes in zip(*stack, strict=True))
        result = (*svm(source, held_out, test), masked)
        if result[0] > best[0]:
            best = result
    truth = pair.target_test.y.numpy()
    _, by_pixels = svm(pixels[0], pixels[2], pixels[3])
    return {
        "method": "sda",
        "seed": seed,
        "target_accuracy": float((best[1] == truth).mean()),
        "baseline": float((by_pixels == truth).mean()),
        "masked": best[2],
        "source_accuracy": best[0],
        "seconds": time.perf_counter() - start,
        "history": [],
        "predictions": best[1].tolist(),
    }
