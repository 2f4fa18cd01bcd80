"""Synthetic and real images side by side: drawn digits → MNIST, eyes, any two folders of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastda.recipes.common import images as files
from fastda.recipes.common.folders import DataError, class_folders, image_files, same_classes
from fastda.recipes.common.images import Part, Size
from fastda.recipes.common.mnist import mnist, split
from fastda.recipes.simgan import digits, eyes

LEAST_LEVELS = 32


@dataclass(frozen=True)
class Preparation:
    """How the images of folders become tensors. It is part of a checkpoint: `refine` reads as training did.

    size: (height, width) that all are brought to, by their middle part in these proportions; None: they stay.
    colour: three channels; None: three where both folders hold coloured images, one where neither does.
    span: the 16-bit greys that become black and white; what lies beyond is cut off.
    """

    size: Size | None = None
    colour: bool | None = None
    span: tuple[int, int] = (0, 65535)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Preparation:
        """That of a checkpoint's state; checkpoints had none once."""
        kept: dict[str, Any] = state.get("preparation", {})
        size, low_high = kept.get("size"), kept.get("span", (0, 65535))
        return cls(size and (size[0], size[1]), kept.get("colour"), (low_high[0], low_high[1]))

    def spread(self, values: np.ndarray) -> np.ndarray:
        """uint16 greys with `span` over the full range; other images as they are."""
        low, high = self.span
        if values.dtype != np.uint16 or self.span == (0, 65535):
            return values
        share = (values.astype(np.float64) - low) / (high - low)
        return (share * 65535).round().clip(0, 65535).astype(np.uint16)

    def unspread(self, values: np.ndarray, original: np.ndarray) -> np.ndarray:
        """The inverse; what lay beyond `span` in the original stays what it was."""
        low, high = self.span
        if values.dtype != np.uint16 or self.span == (0, 65535):
            return values
        made = (low + values / 65535 * (high - low)).round().astype(np.uint16)
        return np.where((original < low) | (original > high), original, made)


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

    The labels of real images, if any, are used by the measures alone.
    task: what the labels are: "class", "gaze", or "" for none.
    """

    name: str
    task: str
    synthetic: Images
    synthetic_test: Images
    real: Images
    real_test: Images
    classes: tuple[str, ...] = ()
    preparation: Preparation = Preparation()

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
        return digest(self.synthetic, self.real)


def digest(*parts: Images) -> str:
    """Of images without their labels."""
    sha = hashlib.sha256()
    for images in parts:
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
    person or, in one person's folder, day, if there are several.
    """
    real_images, groups = eyes.read_real(real)
    if int(groups.max()) == 0:
        groups = torch.arange(len(groups))
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
        _with_mirrored(train),  # left eyes are mirrored right ones
        found[held_out],
    )


def _with_mirrored(eyes: Images) -> Images:
    x = torch.cat([eyes.x, eyes.x.flip(-1)])
    return Images(x, None if eyes.y is None else torch.cat([eyes.y, eyes.y * torch.tensor([-1.0, 1.0, 1.0])]))


# -------------------------------------------------------------------------------------------------- folders


def _read_folder(folder: Path, paths: list[Path], preparation: Preparation) -> tuple[np.ndarray, Path | None]:
    """uint8 (N, H, W, 3) or, where none is coloured, (N, H, W); and the first that is coloured."""
    found: list[np.ndarray] = []
    coloured, first = None, None
    deepest = 0
    for path in paths:
        picture = files.read(path)
        if picture.seen.dtype == np.uint16:
            picture.seen = preparation.spread(picture.seen)
            deepest = max(deepest, int(picture.seen.max()))
        coloured = coloured or (path if picture.coloured else None)
        size = picture.size if preparation.size is None else preparation.size
        first = first or (path, size)
        if size != first[1]:
            raise DataError(
                f"{path}: {size[1]}×{size[0]}, but {first[0].name} is {first[1][1]}×{first[1][0]}; "
                f"--size resizes all"
            )
        if preparation.size is not None:
            picture = picture.part(Part.middle(picture.size, preparation.size))
        found.append(files.in_bytes(picture.seen))
    if 0 < deepest < LEAST_LEVELS * 257:
        raise DataError(
            f"{folder}: its 16-bit images are nearly black, none reaches above {deepest} of 65535; "
            f"--span LOW:HIGH says which values are black and white"
        )
    if coloured is None:
        return np.stack([files.greyed(values) for values in found]), None
    return np.stack([files.coloured(values) for values in found]), coloured


def folders(synthetic: Path, real: Path, preparation: Preparation | None = None) -> Domains:
    """Two folders of images of one size. Subfolders of `synthetic` are classes; those of `real` may be too.

    A fifth of each is held out.
    """
    preparation = preparation or Preparation()
    of_synthetic, of_real = class_folders(synthetic), class_folders(real)
    if len(of_synthetic) == 1:
        raise DataError(
            f"{synthetic}: holds one folder, {next(iter(of_synthetic))}: two or more are classes, "
            f"none means that there are no labels"
        )
    if of_synthetic and of_real:
        same_classes(synthetic, of_synthetic, real, of_real)
    read = []
    for folder, classes in ((synthetic, of_synthetic), (real, of_real)):
        paths = [path for members in classes.values() for path in members] or image_files(folder)
        if len(paths) < 5:
            raise DataError(f"{folder}: needs at least five images (a fifth is held out), found {len(paths)}")
        read.append(_read_folder(folder, paths, preparation))
    (drawn, drawn_colour), (found, found_colour) = read
    colour = preparation.colour
    if colour is None:
        if (drawn_colour is None) != (found_colour is None):
            grey = synthetic if drawn_colour is None else real
            raise DataError(
                f"{drawn_colour or found_colour}: coloured, but {grey} is all grey; "
                f"--colour keeps the colours, --no-colour turns all grey"
            )
        colour = drawn_colour is not None
    parts = []
    for folder, values, classes in ((synthetic, drawn, of_synthetic), (real, found, of_real)):
        x = _channels_first(values, colour)
        y = None
        if of_synthetic and classes:
            y = torch.tensor([i for i, members in enumerate(classes.values()) for _ in members])
        images = Images(x, y)
        train, test = split(torch.zeros(len(x), dtype=torch.long) if y is None else y, 0.8)
        if not len(test):
            raise DataError(f"{folder}: needs at least three images of a class (a fifth is held out)")
        parts += [images[train], images[test]]
    if parts[0].x.shape[1:] != parts[2].x.shape[1:]:
        raise DataError(
            f"{synthetic.name} holds images of {_size(parts[0].x)}, {real.name} of {_size(parts[2].x)}; "
            f"--size resizes all"
        )
    name = f"{synthetic.resolve().name} → {real.resolve().name}"
    task = "class" if of_synthetic else ""
    preparation = replace(preparation, colour=colour)
    a, b, c, d = parts
    return Domains(name, task, a, b, c, d, tuple(of_synthetic), preparation)


def _channels_first(values: np.ndarray, colour: bool) -> Tensor:
    """uint8 (N, H, W) or (N, H, W, 3) → (N, C, H, W)."""
    if colour:
        wide = values if values.ndim == 4 else np.repeat(values[..., None], 3, 3)
        return torch.from_numpy(wide).permute(0, 3, 1, 2).contiguous()
    grey = values if values.ndim == 3 else np.stack([files.greyed(image) for image in values])
    return torch.from_numpy(grey)[:, None]
