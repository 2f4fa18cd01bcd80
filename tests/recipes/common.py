"""Images, folders and quick settings that the tests of the trainings share."""

import gzip
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastda.recipes.dann.data import Images, Pair
from fastda.recipes.dann.train import Settings as DannSettings
from fastda.recipes.simgan import data, digits
from fastda.recipes.simgan.train import Settings as SimganSettings

ROOT = Path(__file__).parents[2]
CLASSES = ("bar", "box", "cross")
QUICK_DANN = DannSettings(epochs=2, batch=16, lr=0.05, average=0.9, batch_norm=True)
QUICK_SIMGAN = SimganSettings(
    net="small", steps=4, batch=6, pretrain_refiner=3, pretrain_discriminator=2, history=16, average=0.9
)


def shapes(count, seed, inverted=False):
    """`count` images 16x16 of each class, at random places, coloured on black or inverted on noise."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.zeros(3 * count, 3, 16, 16), torch.arange(3).repeat_interleave(count)
    for image, label in zip(x, y.tolist(), strict=True):
        top, left = torch.randint(0, 7, (2,), generator=g).tolist()
        colour = 120 + 120 * torch.rand(3, 1, 1, generator=g)
        image[:, top + 3 : top + 6, left : left + 9] = colour
        if CLASSES[label] != "bar":
            image[:, top : top + 9, left + 3 : left + 6] = colour
        if CLASSES[label] == "box":
            image[:, top : top + 9, left : left + 9] = colour
    if inverted:
        x = (200 - x + 30 * torch.randn(x.shape, generator=g)).clamp(0, 255)
    return Images(x.to(torch.uint8), y)


def shapes_pair():
    return Pair("shapes", CLASSES, shapes(24, 0), shapes(8, 1), shapes(24, 2, True), shapes(8, 3, True))


def write_tree(folder, images):
    for i, (x, label) in enumerate(zip(images.x, images.y.tolist(), strict=True)):
        path = folder / CLASSES[label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)
    return folder


def write_idx(path, values):
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, suffix=""):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        images, labels = (
            rng.integers(0, 256, (count, 28, 28), np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
        )
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return folder


def write_reviews(folder, names=("cameras", "novels", "pans"), suffix="", first=0):
    """Ten words praise or blame anything, ten more one domain each: 60 reviews to train on, 40 to test on."""
    from sklearn.datasets import dump_svmlight_file

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        for part, count in (("train", 60), ("test", 40)):
            y = np.arange(count) % 2
            praises = np.arange(10) < 5
            fits = np.where(praises == (y[:, None] == 1), 0.5, 0.1)
            x = rng.random((count, 10 + 10 * len(names))) < 0.03
            x[:, :10] = rng.random((count, 10)) < fits
            x[:, 10 + 10 * i : 20 + 10 * i] = rng.random((count, 10)) < fits
            counts = x * rng.integers(1, 4, x.shape)
            path = folder / f"{name}_{part}.svmlight{suffix}"
            with (gzip.open if suffix else open)(path, "wb") as file:
                dump_svmlight_file(counts, 2 * y - 1, file, zero_based=not first)
    return folder


def thin_and_thick():
    """120 digits in hairlines and in thick lines, a third of each held out."""
    generator = torch.Generator().manual_seed(0)
    labels = digits.balanced_labels(120, 10, generator)
    thin = data.Images(digits.pen_strokes(labels, generator), labels)
    thick = data.Images(digits.pen_strokes(labels, generator, width=3.0), labels)
    return data.Domains(
        "thin → thick", "class", thin[:80], thin[80:], thick[:80], thick[80:], tuple("0123456789")
    )


def write_image(path, height=35, width=55, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8), mode).save(path)


def launch(argv, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(a) for a in argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def count(net):
    return sum(p.numel() for p in net.parameters())
