"""Pairs of domains in memory: MNIST -> MNIST-M, 8x8 digits -> MNIST, and any two ImageFolder trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastda.recipes.common.command import SettingsError
from fastda.recipes.common.folders import DataError, class_folders, image_files, same_classes
from fastda.recipes.common.images import open_image
from fastda.recipes.common.mnist import mnist, split
from fastda.recipes.dann.models import LEAST_SIZE

# Photos that the wheels of scikit-image and scikit-learn carry; none serves both training and test.
TRAIN_PHOTOS = ("china", "astronaut", "coffee", "motorcycle")
TEST_PHOTOS = ("flower", "chelsea", "rocket")


@dataclass
class Images:
    """Labelled images: `x` uint8 (N, 3, H, W), `y` int64 (N,)."""

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass
class Pair:
    """A source and a target domain with the same classes, each split into training and held-out images.

    The labels of `target_train` are there for the method `target` (train on target) alone.
    `redraw`, where the target is synthetic, makes the target's training images anew from a generator.
    """

    name: str
    classes: tuple[str, ...]
    source_train: Images
    source_test: Images
    target_train: Images
    target_test: Images
    redraw: Callable[[torch.Generator], torch.Tensor] | None = None


# ---------------------------------------------------------------------------------------------------- photos


def _bundled_photo(name: str) -> np.ndarray:
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    from skimage import data

    return data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()


def photos(folder: Path | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Photos for training and for test, uint8 (H, W, 3); of those under `folder` every fifth is for test."""
    if folder is None:
        train = [_bundled_photo(name) for name in TRAIN_PHOTOS]
        test = [_bundled_photo(name) for name in TEST_PHOTOS]
    else:
        paths = image_files(folder)
        if len(paths) < 2:
            raise DataError(f"{folder}: needs at least two photos, found {len(paths)}")
        images = [open_image(path) for path in paths]
        for path, image in zip(paths, images, strict=True):
            if min(image.shape[:2]) < 28:
                raise DataError(f"{path}: smaller than a 28x28 patch ({image.shape[1]}x{image.shape[0]})")
        held_out = [i % 5 == 4 or (len(images) < 5 and i == len(images) - 1) for i in range(len(images))]
        train = [image for image, out in zip(images, held_out, strict=True) if not out]
        test = [image for image, out in zip(images, held_out, strict=True) if out]
    return [torch.from_numpy(p.copy()) for p in train], [torch.from_numpy(p.copy()) for p in test]


def random_patches(
    pictures: list[torch.Tensor], count: int, size: int, generator: torch.Generator
) -> torch.Tensor:
    """`count` random crops, uint8 (count, 3, size, size); each picture is drawn equally often on average."""
    patches = torch.empty(count, size, size, 3, dtype=torch.uint8)
    which = torch.randint(len(pictures), (count,), generator=generator)
    corner = torch.rand(count, 2, generator=generator)
    for i, (k, (u, v)) in enumerate(zip(which.tolist(), corner.tolist(), strict=True)):
        picture = pictures[k]
        top, left = int(u * (picture.shape[0] - size + 1)), int(v * (picture.shape[1] - size + 1))
        patches[i] = picture[top : top + size, left : left + size]
    return patches.permute(0, 3, 1, 2).contiguous()


def blend(digits: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """MNIST-M: |digit - patch| of digits (N, 28, 28) and colour patches (N, 3, 28, 28), all uint8."""
    return (digits[:, None].to(torch.int16) - patches.to(torch.int16)).abs().to(torch.uint8)


def _as_colour(digits: torch.Tensor) -> torch.Tensor:
    return digits[:, None].expand(-1, 3, -1, -1).contiguous()


# ---------------------------------------------------------------------------------------------------- pairs


def mnist_to_mnistm(mnist_folder: Path | None = None, photo_folder: Path | None = None) -> Pair:
    """MNIST -> MNIST-M (Ganin et al. 2016, section 5.2.4).

    As published, the target's training images are made of the source's training digits; test digits and test
    photos are seen in no training.
    """
    train_x, train_y, test_x, test_y = mnist(mnist_folder)
    train_photos, test_photos = photos(photo_folder)

    def redraw(generator: torch.Generator) -> torch.Tensor:
        return blend(train_x, random_patches(train_photos, len(train_x), 28, generator))

    fixed = torch.Generator().manual_seed(2016)
    target_train = redraw(fixed)
    target_test = blend(test_x, random_patches(test_photos, len(test_x), 28, fixed))
    return Pair(
        "MNIST → MNIST-M",
        tuple("0123456789"),
        Images(_as_colour(train_x), train_y),
        Images(_as_colour(test_x), test_y),
        Images(target_train, train_y),
        Images(target_test, test_y),
        redraw,
    )


def digits_to_mnist(mnist_folder: Path | None = None) -> Pair:
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged to 28x28, -> MNIST."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None] / 16
    # 8x8 digits fill their frame, MNIST's fill the middle 20x20 of 28x28.
    large = torch.nn.functional.interpolate(small, size=(20, 20), mode="bicubic", align_corners=False).clamp(
        0, 1
    )
    x = (torch.nn.functional.pad(large, (4, 4, 4, 4))[:, 0] * 255).round().to(torch.uint8)
    y = torch.from_numpy(bunch.target).long()
    train, test = split(y, 0.8)
    train_x, train_y, test_x, test_y = mnist(mnist_folder)
    return Pair(
        "8×8 digits → MNIST",
        tuple("0123456789"),
        Images(_as_colour(x[train]), y[train]),
        Images(_as_colour(x[test]), y[test]),
        Images(_as_colour(train_x), train_y),
        Images(_as_colour(test_x), test_y),
    )


def _image_folder(folder: Path, size: int) -> tuple[tuple[str, ...], Images]:
    found = class_folders(folder)
    if len(found) < 2:
        raise DataError(
            f"{folder}: expected one folder of images per class, two at least, found {len(found) or 'none'}"
        )
    images, labels = [], []
    for label, (name, paths) in enumerate(found.items()):
        if len(paths) < 2:
            raise DataError(f"{folder / name}: needs at least two images (one is held out), found one")
        for path in paths:
            images.append(torch.from_numpy(open_image(path, size).copy()).permute(2, 0, 1))
            labels.append(label)
    return tuple(found), Images(torch.stack(images), torch.tensor(labels))


def folders(source: Path, target: Path, size: int = 28) -> Pair:
    """Two ImageFolder trees (one folder a class, the same class names), middle squares resized to `size`."""
    if size < LEAST_SIZE:
        raise SettingsError(
            f"size: images of {size}x{size} are too small, {LEAST_SIZE}x{LEAST_SIZE} is the least"
        )
    source_classes, source_images = _image_folder(source, size)
    target_classes, target_images = _image_folder(target, size)
    same_classes(source, source_classes, target, target_classes)
    parts = []
    for images in (source_images, target_images):
        train, test = _hold_out(images.y)
        parts += [Images(images.x[train], images.y[train]), Images(images.x[test], images.y[test])]
    source_train, source_test, target_train, target_test = parts
    name = f"{source.resolve().name} → {target.resolve().name}"
    return Pair(name, source_classes, source_train, source_test, target_train, target_test)


def _hold_out(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An 80:20 split with at least one held-out image of every class."""
    train, test = split(y, 0.8)
    missing = [label for label in y.unique().tolist() if not (y[test] == label).any()]
    for label in missing:
        moved = train[y[train] == label][-1:]
        test, train = torch.cat([test, moved]), train[train != moved]
    return train, test
