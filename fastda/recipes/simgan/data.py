"""Synthetic and real images side by side: drawn digits → MNIST, eyes, any two folders of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastda.recipes.common.images import IMAGE_SUFFIXES, DataError, mnist, open_image, split
from fastda.recipes.simgan import digits, eyes

Size = tuple[int, int]  # height, width


@dataclass
class Images:
    """`x` uint8 (N, C, H, W); `y` classes, int64 (N,), or gazes, float (N, 3), or None: not labelled."""

    x: Tensor
    y: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.x[index], None if self.y is None else self.y[index])


@dataclass
class Domains:
    """What a training sees (`synthetic`, `real`) and what measures it (`…_test`).

    The labels of `real` are used by nothing; those of `real_test`, if any, by the measures alone.
    task: what the labels are: "class", "gaze", or "" for none.
    """

    name: str
    task: str
    synthetic: Images
    synthetic_test: Images
    real: Images
    real_test: Images
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("synthetic", "synthetic_test", "real", "real_test"):
            x = getattr(self, name).x
            if not len(x):
                raise DataError(f"{self.name}: no images in {name}")
            if x.shape[1:] != self.synthetic.x.shape[1:]:
                raise DataError(
                    f"{self.name}: synthetic images are {_size(self.synthetic.x)}, those of {name} {_size(x)}"
                )

    def digest(self) -> str:
        """Of the images that a training sees."""
        sha = hashlib.sha256()
        for images in (self.synthetic, self.real):
            sha.update(str(tuple(images.x.shape)).encode())
            sha.update(images.x.numpy().tobytes())
        return sha.hexdigest()


def _size(x: Tensor) -> str:
    return f"{x.shape[3]}×{x.shape[2]} with {x.shape[1]} channel{'s' if x.shape[1] > 1 else ''}"


# ------------------------------------------------------------------------------------------- digits and eyes


def digits_to_mnist(
    source: str = "strokes", count: int = 6000, mnist_folder: Path | None = None, fonts: Path | None = None
) -> Domains:
    """Digits of one-pixel pen strokes (`strokes`) or of fonts (`fonts`) → MNIST."""
    generator = torch.Generator().manual_seed(1612)
    labels = digits.balanced_labels(count + 1000, 10, generator)
    if source == "strokes":
        x = digits.pen_strokes(labels, generator)
    else:
        x = digits.font_digits(labels, generator, fonts)
    drawn = Images(x, labels)
    train_x, train_y, test_x, test_y = mnist(mnist_folder)
    return Domains(
        "Pen strokes → MNIST" if source == "strokes" else "Fonts → MNIST",
        "class",
        drawn[:count],
        drawn[count:],
        Images(train_x[:, None], train_y),
        Images(test_x[:, None], test_y),
        tuple("0123456789"),
    )


def eyes_to_real(real: Path, synthetic: Path | None = None, count: int = 4000) -> Domains:
    """Rendered eyes, or those of a SynthEyes or UnityEyes folder → MPIIGaze files, or a folder of eye crops.

    All are equalised, as MPIIGaze's are. Every fourth real image is held out; of MPIIGaze, every fourth
    person or, in one person's folder, day.
    """
    real_images, groups = eyes.read_real(real)
    if synthetic is None:
        generator = torch.Generator().manual_seed(1612)
        drawn = Images(*eyes.render(count + 500, generator))
        name = "Rendered eyes"
    else:
        drawn = Images(*eyes.read_labelled(synthetic))
        name = synthetic.resolve().name
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(2016))
    cut = count if synthetic is None else len(drawn) - max(1, len(drawn) // 8)
    found = Images(*real_images)
    held_out = torch.zeros(len(found), dtype=torch.bool)
    shuffled = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(2016))
    for group in shuffled[::4] if len(shuffled) > 1 else []:
        held_out |= groups == group
    if not held_out.any() or held_out.all():
        raise DataError(f"{real}: too few images to hold some out ({len(found)} in {len(shuffled)} groups)")
    train = found[~held_out]
    return Domains(
        f"{name} → {real.resolve().name}",
        "gaze",
        drawn[order[:cut]],
        drawn[order[cut:]],
        # Left eyes are mirrored right ones.
        Images(torch.cat([train.x, train.x.flip(-1)])),
        found[held_out],
    )


# -------------------------------------------------------------------------------------------------- folders


def image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def read_image(path: Path, size: Size | None, colour: bool) -> Tensor:
    """uint8 (C, H, W); resized to `size` (height, width) where one is given, without keeping proportions."""
    pixels = torch.from_numpy(np.array(open_image(path, size=size, grey=not colour)))
    return pixels.permute(2, 0, 1) if colour else pixels[None]


def _read_folder(folder: Path, size: Size | None, colour: bool) -> tuple[Images, tuple[str, ...]]:
    """All images under a folder; one subfolder per class makes them labelled."""
    files = image_files(folder)
    first = read_image(files[0], size, colour)
    x = torch.empty(len(files), *first.shape, dtype=torch.uint8)
    for i, path in enumerate(files):
        image = read_image(path, size, colour)
        if image.shape != first.shape:
            raise DataError(
                f"{path}: {image.shape[2]}×{image.shape[1]}, but {files[0].name} is "
                f"{first.shape[2]}×{first.shape[1]}; --size resizes all"
            )
        x[i] = image
    parents = [path.relative_to(folder).parts[:-1] for path in files]
    if any(not p for p in parents):
        return Images(x), ()
    classes = tuple(sorted({p[0] for p in parents}))
    return Images(x, torch.tensor([classes.index(p[0]) for p in parents])), classes


def folders(synthetic: Path, real: Path, size: Size | None = None, colour: bool = False) -> Domains:
    """Two folders of images of one size. Subfolders of `synthetic` are classes; those of `real` may be too.

    A fifth of each is held out.
    """
    drawn, classes = _read_folder(synthetic, size, colour)
    found, real_classes = _read_folder(real, size, colour)
    if drawn.y is not None and found.y is not None and classes != real_classes:
        raise DataError(
            f"{real}: its classes must be those of {synthetic}, or no subfolders at all; "
            f"only in {real.name}: {sorted(set(real_classes) - set(classes)) or 'none'}, "
            f"only in {synthetic.name}: {sorted(set(classes) - set(real_classes)) or 'none'}"
        )
    if drawn.y is None:
        found = Images(found.x)
    if drawn.x.shape[1:] != found.x.shape[1:]:
        raise DataError(
            f"{synthetic.name} holds images of {_size(drawn.x)}, {real.name} of {_size(found.x)}; "
            f"--size resizes all"
        )
    parts = []
    for folder, images in ((synthetic, drawn), (real, found)):
        if len(images) < 5:
            raise DataError(
                f"{folder}: needs at least five images (a fifth is held out), found {len(images)}"
            )
        labels = images.y if images.y is not None else torch.zeros(len(images), dtype=torch.long)
        train, test = split(labels, 0.8)
        parts += [images[train], images[test]]
    name = f"{synthetic.resolve().name} → {real.resolve().name}"
    synthetic_train, synthetic_test, real_train, real_test = parts
    task = "class" if classes else ""
    return Domains(name, task, synthetic_train, synthetic_test, real_train, real_test, classes)
