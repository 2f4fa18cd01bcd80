"""Folders of refined images, and of drawn ones, with their labels."""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastda import files
from fastda.recipes.common import command, folders, images
from fastda.recipes.common.folders import DataError
from fastda.recipes.common.images import Part, Picture
from fastda.recipes.simgan import digits, eyes
from fastda.recipes.simgan.data import Preparation
from fastda.recipes.simgan.train import load_refiner, refine

TRANSFORMS = "transforms.csv"


def run_refine(options: argparse.Namespace) -> int:
    """Refined images under the originals' names; every other file, such as labels, is copied as it is.

    Where images are brought to another size, a line of transforms.csv says how, and the points of UnityEyes
    labels are moved with them. Everything is read once before anything is written.
    """
    net, state = load_refiner(options.checkpoint)
    source, out = options.images, options.out
    paths = folders.image_files(source)
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise DataError(f"{out}: --out must lie outside of {source}")
    moved = {TRANSFORMS: ["file", "scale", "left", "top"]}
    if options.resize and (source / TRANSFORMS).exists():
        raise DataError(f"{source / TRANSFORMS}: --resize writes a file of that name; rename it")
    labels: set[Path] = set()
    unity = state["task"] == "gaze" and options.resize and any(eyes.is_unity(path) for path in paths)
    for path in paths:
        _plan(images.read(path), state, options, unity)
    with command.files_in(out, options.overwrite), command.bar(total=len(paths), unit="image") as bar:
        for path in paths:
            name = path.relative_to(source)
            picture = images.read(path)
            part, label = _plan(picture, state, options, unity)
            if part is not None:
                moved[str(name)] = [name.as_posix(), *(f"{v:.6g}" for v in (part.scale, part.left, part.top))]
                if label is not None:
                    written = eyes.moved_label(label, part, picture.size[0])
                    files.write((out / name).with_suffix(".json"), json.dumps(written, indent=1) + "\n")
                    labels.add(path.with_suffix(".json"))
                picture = picture.part(part)
            images.write(out / name, picture, _refined(net, picture, state))
            bar.update()
        for path in folders.files(source):
            if path not in labels and path.suffix.lower() not in folders.SUFFIXES:
                with files.unfinished(out / path.relative_to(source)) as beside:
                    shutil.copy2(path, beside)
        if options.resize:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(moved.values())
            files.write(out / TRANSFORMS, text.getvalue())
    print(f"{len(paths)} refined images in {out}")
    return 0


def _plan(
    picture: Picture, state: dict[str, Any], options: argparse.Namespace, unity: bool
) -> tuple[Part | None, dict[str, Any] | None]:
    """The part of a picture to be refined, None for all, and the UnityEyes label that says where it is.

    Raises DataError where the refiner was not trained for such a picture.
    """
    path, (channels, *wanted) = picture.path, state["shape"]
    size = (wanted[0], wanted[1])
    if channels == 1 and state["task"] != "gaze" and picture.coloured and not options.no_colour:
        raise DataError(
            f"{path}: coloured, but the refiner was trained on grey images; --no-colour turns it grey"
        )
    if channels == 3 and picture.seen.dtype == np.uint16:
        raise DataError(f"{path}: 16-bit greys, but the refiner was trained on coloured images")
    if unity:
        label, part = eyes.unity_part(picture)
        return part, label
    if picture.size == size:
        return (Part(0.0, 0.0, 1.0, size) if options.resize else None), None
    if not options.resize:
        raise DataError(
            f"{path}: {picture.size[1]}×{picture.size[0]}, but the refiner was trained on "
            f"{size[1]}×{size[0]}; --resize brings images to that size"
        )
    return Part.middle(picture.size, size), None


def _refined(net: nn.Module, picture: Picture, state: dict[str, Any]) -> np.ndarray:
    """Of `picture.seen`, in its dtype; grey where the refiner is grey and the file allows."""
    preparation = Preparation.of(state)
    channels, gaze = state["shape"][0], state["task"] == "gaze"
    values = preparation.spread(picture.seen)
    if gaze:
        values = images.in_bytes(values)
    values = images.coloured(values) if channels == 3 else images.greyed(values)
    x = torch.from_numpy(values)
    x = x.permute(2, 0, 1)[None] if channels == 3 else x[None, None]
    made = refine(net, eyes.equalise(x) if gaze else x, state["task"])[0].numpy()
    pixels = made.transpose(1, 2, 0) if channels == 3 else made[0]
    if picture.seen.dtype == np.uint16:
        return pixels.astype(np.uint16) * 257 if gaze else preparation.unspread(pixels, picture.seen)
    return images.coloured(pixels) if picture.seen.ndim == 3 else pixels


def run_draw(options: argparse.Namespace) -> int:
    """Digits as CLASS/N.png; eyes as N_PITCH_YAW.png, which `--synthetic` reads, and labels.csv."""
    generator = torch.Generator().manual_seed(options.seed)
    with command.files_in(options.out, options.overwrite):
        if options.data == "eyes":
            drawn, gazes = eyes.render(options.count, generator)
            lines = ["file,pitch,yaw,x,y,z"]
            for i, (image, gaze) in enumerate(zip(drawn, gazes, strict=True)):
                pitch, yaw = eyes.angles(gaze[None])[0].tolist()
                name = f"{i}_{pitch:.4f}_{yaw:.4f}.png"
                images.write_new(options.out / name, image[0].numpy())
                lines.append(",".join([name, *(f"{v:.6f}" for v in (pitch, yaw, *gaze.tolist()))]))
            files.write(options.out / "labels.csv", "\n".join(lines) + "\n")
        else:
            labels = digits.balanced_labels(options.count, 10, generator)
            if options.data == "strokes":
                drawn = digits.pen_strokes(labels, generator)
            else:
                drawn = digits.font_digits(labels, generator, options.fonts)
            for i, (image, label) in enumerate(zip(drawn, labels.tolist(), strict=True)):
                images.write_new(options.out / str(label) / f"{i}.png", image[0].numpy())
    print(f"{options.count} images in {options.out}")
    return 0
