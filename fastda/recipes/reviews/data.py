"""Reviews as counts of words: for each domain a labelled file to train on and one to test on, svmlight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastda.recipes.common.folders import DataError, files, reading

PARTS = ("train", "test")
SUFFIXES = (".svmlight", ".svmlight.gz")
LEAST = 10  # reviews of each label that a domain trains on: five folds and a tenth held out


@dataclass(frozen=True)
class Domain:
    """Which of the D words are in each review, uint8 (N, D) of 0 and 1; labels 0 and 1, int64 (N,)."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(folder: Path) -> list[Domain]:
    """The domains of all files NAME_train.svmlight and NAME_test.svmlight, gzipped or not, in order of names.

    Counts become presence. The lesser of the two labels becomes 0; indices may count from 0 or from 1.
    Raises DataError, which names the file, for fewer than two domains, a part that is missing or twice there,
    and what is no svmlight file of counts with two labels.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in files(folder):
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
        name, _, part = path.name.removesuffix(suffix or "").rpartition("_")
        if suffix is None or part not in PARTS or not name:
            continue
        if part in found.setdefault(name, {}):
            raise DataError(f"{path}: is there twice, see {found[name][part]}")
        found[name][part] = path
    if len(found) < 2:
        raise DataError(
            f"{folder}: expected files NAME_train.svmlight and NAME_test.svmlight (or .gz) of at least two "
            f"domains, found {', '.join(found) or 'none'}"
        )
    for name, parts in found.items():
        for part in PARTS:
            if part not in parts:
                raise DataError(f"{folder}: holds no {name}_{part}.svmlight, nor .gz")
    paths = {(name, part): path for name, parts in sorted(found.items()) for part, path in parts.items()}
    read = {key: _read(path) for key, path in paths.items()}
    width = max(x.shape[1] for x, _ in read.values())
    labels = np.unique(np.concatenate([y for _, y in read.values()]))
    if len(labels) != 2:
        raise DataError(f"{folder}: expected two labels, found {', '.join(f'{v:g}' for v in labels[:5])}")
    parts_of: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for key, (x, y) in read.items():
        x.resize((x.shape[0], width))
        present = torch.from_numpy((x > 0).toarray()).to(torch.uint8)
        parts_of[key] = present, torch.from_numpy(y == labels[1]).long()
        least = int(parts_of[key][1].bincount(minlength=2).min())
        if key[1] == "train" and least < LEAST:
            raise DataError(f"{paths[key]}: expected at least {LEAST} reviews of each label, got {least}")
    return [Domain(name, *parts_of[name, "train"], *parts_of[name, "test"]) for name in sorted(found)]


def _read(path: Path) -> tuple[Any, np.ndarray]:
    """Counts (N, D), sparse, and labels (N,)."""
    from sklearn.datasets import load_svmlight_file

    with reading(path, "an svmlight file"):
        x, y = load_svmlight_file(str(path), dtype=np.float32, zero_based=True)
    if not x.shape[0]:
        raise DataError(f"{path}: holds no reviews")
    if not (np.isfinite(x.data).all() and (x.data >= 0).all()):
        raise DataError(f"{path}: holds numbers that are no counts")
    return x, y
