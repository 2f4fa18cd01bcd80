"""Stacked denoising auto-encoders, without labels: marginalised over all maskings, and trained.

Marginalised: Chen et al., ICML 2012. Trained: Glorot, Bordes and Bengio, ICML 2011.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encoder = Callable[[Tensor], Tensor]


def denoising_layer(x: Tensor, masked: float) -> Tensor:
    """Weights (D, D + 1), bias last, that restore `x` (N, D) from copies with a share `masked` set to zero.

    They have the least mean squared error in expectation over all maskings. The bias is never masked.
    """
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    kept = torch.full((x.shape[1],), 1 - masked, dtype=torch.float64)
    kept[-1] = 1
    scatter = (x.T @ x).double()
    noisy = scatter * kept[:, None] * kept
    noisy.diagonal().copy_(scatter.diagonal() * kept)
    noisy.diagonal().add_(1e-5)  # values that are always zero
    clean = (scatter * kept)[:-1].T.contiguous()
    return torch.cholesky_solve(clean, torch.linalg.cholesky(noisy)).T.to(x.dtype)


def marginalised(x: Tensor, masked: float, layers: int) -> Encoder:
    """What makes (N, D) words (N, (layers + 1)·D) codes: the words and the output of every layer."""
    stack, codes = [], x
    for _ in range(layers):
        weights = denoising_layer(codes, masked)
        stack.append((weights[:, :-1].T.contiguous(), weights[:, -1].contiguous()))
        codes = torch.tanh(torch.addmm(stack[-1][1], codes, stack[-1][0]))

    def encode(x: Tensor) -> Tensor:
        size = x.shape[1]
        codes = x.new_empty(len(x), size * (layers + 1))  # once, not twice: they are large
        codes[:, :size] = x
        for i, (weights, bias) in enumerate(stack):
            before, after = codes[:, i * size : (i + 1) * size], codes[:, (i + 1) * size : (i + 2) * size]
            after.copy_(torch.addmm(bias, before, weights)).tanh_()
        return codes

    return encode


def trained(x: Tensor, masked: float, units: int, epochs: int, seed: int) -> Encoder:
    """What makes (N, D) words (N, units) codes: the rectified units of one layer.

    As published it restores masked words by the cross-entropy of its logistic outputs; Adam trains it.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    encoder, decoder = nn.Linear(x.shape[1], units), nn.Linear(units, x.shape[1])
    with torch.no_grad():  # begins with how often each word is there
        decoder.bias.copy_(x.mean(0).clamp(1e-4, 1 - 1e-4).logit())
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(100):
            words = x[batch]
            seen = words * (torch.rand(words.shape, generator=generator) >= masked)
            restored = decoder(F.relu(encoder(seen)))
            loss = F.binary_cross_entropy_with_logits(restored, words)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        return F.relu(encoder(x))

    return encode
