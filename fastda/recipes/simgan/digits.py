"""Synthetic digits whose labels are known because they were drawn: pen strokes, and glyphs of fonts."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastda.recipes.common.folders import DataError, reading, with_suffix

SIZE = 28

# How people write digits: per class a few ways, each a list of pen strokes, each a list of points (x, y) in
# the unit square, y downwards, that a smooth curve runs through. A point given twice is a corner.
STROKES: dict[int, list[list[list[tuple[float, float]]]]] = {
    0: [
        [[(0.55, 0.0), (0.18, 0.2), (0.08, 0.55), (0.3, 0.97), (0.68, 0.9), (0.9, 0.5), (0.78, 0.12),
          (0.5, 0.02)]],
        [[(0.7, 0.1), (0.35, 0.03), (0.08, 0.4), (0.15, 0.85), (0.5, 1.0), (0.88, 0.7), (0.85, 0.25),
          (0.55, 0.05), (0.4, 0.12)]],
        [[(0.35, 0.08), (0.1, 0.4), (0.2, 0.9), (0.6, 0.95), (0.92, 0.6), (0.85, 0.15), (0.5, 0.0),
          (0.3, 0.12)]],
    ],
    1: [
        [[(0.5, 0.0), (0.5, 0.5), (0.5, 1.0)]],
        [[(0.55, 0.0), (0.5, 0.5), (0.45, 1.0)]],
        [[(0.5, 0.0), (0.5, 0.35), (0.48, 0.7), (0.5, 1.0)]],
        [[(0.34, 0.2), (0.52, 0.0), (0.52, 0.0), (0.5, 0.5), (0.5, 1.0)]],
        [[(0.34, 0.2), (0.52, 0.0), (0.52, 0.0), (0.5, 0.5), (0.5, 1.0)], [(0.25, 1.0), (0.5, 1.0),
          (0.78, 1.0)]],
    ],
    2: [
        [[(0.12, 0.25), (0.4, 0.0), (0.78, 0.15), (0.7, 0.5), (0.1, 1.0), (0.1, 1.0), (0.5, 0.97),
          (0.95, 0.95)]],
        [[(0.1, 0.3), (0.35, 0.02), (0.75, 0.1), (0.75, 0.42), (0.45, 0.75), (0.15, 0.98), (0.08, 0.82),
          (0.3, 0.78), (0.6, 0.95), (0.95, 0.92)]],
        [[(0.2, 0.1), (0.55, 0.0), (0.82, 0.22), (0.65, 0.6), (0.25, 0.92), (0.1, 0.8), (0.3, 0.75),
          (0.6, 0.98), (0.98, 0.85)]],
        [[(0.05, 0.12), (0.45, 0.03), (0.85, 0.2), (0.6, 0.6), (0.05, 0.97), (0.05, 0.97), (0.95, 0.9)]],
    ],
    3: [
        [[(0.15, 0.15), (0.45, 0.0), (0.8, 0.18), (0.65, 0.42), (0.38, 0.48), (0.38, 0.48), (0.75, 0.55),
          (0.85, 0.78), (0.5, 1.0), (0.08, 0.88)]],
        [[(0.1, 0.05), (0.5, 0.02), (0.78, 0.05), (0.78, 0.05), (0.45, 0.42), (0.45, 0.42), (0.82, 0.6),
          (0.75, 0.9), (0.4, 1.0), (0.1, 0.9)]],
        [[(0.2, 0.1), (0.6, 0.02), (0.8, 0.22), (0.5, 0.45), (0.35, 0.5), (0.6, 0.5), (0.85, 0.7),
          (0.6, 0.97),
          (0.15, 0.92)]],
        [[(0.08, 0.08), (0.5, 0.0), (0.85, 0.15), (0.55, 0.45), (0.55, 0.45), (0.82, 0.65), (0.55, 0.95),
          (0.1, 1.0)]],
    ],
    4: [
        [[(0.2, 0.0), (0.12, 0.3), (0.1, 0.55), (0.1, 0.55), (0.5, 0.55), (0.9, 0.5)],
         [(0.75, 0.05), (0.7, 0.5), (0.65, 1.0)]],
        [[(0.65, 0.0), (0.35, 0.35), (0.05, 0.65), (0.05, 0.65), (0.5, 0.65), (0.98, 0.62)],
         [(0.68, 0.0), (0.68, 0.5), (0.66, 1.0)]],
        [[(0.15, 0.05), (0.08, 0.4), (0.35, 0.55), (0.75, 0.42)], [(0.85, 0.0), (0.75, 0.45), (0.62, 1.0)]],
        [[(0.2, 0.1), (0.15, 0.4), (0.4, 0.5), (0.8, 0.35), (0.85, 0.05), (0.85, 0.05), (0.75, 0.5),
          (0.65, 1.0)]],
    ],
    5: [
        [[(0.85, 0.03), (0.5, 0.03), (0.28, 0.05), (0.28, 0.05), (0.2, 0.42), (0.2, 0.42), (0.6, 0.4),
          (0.82, 0.65), (0.6, 0.95), (0.1, 0.92)]],
        [[(0.28, 0.05), (0.22, 0.4), (0.22, 0.4), (0.6, 0.45), (0.78, 0.7), (0.5, 1.0), (0.1, 0.9)],
         [(0.28, 0.06), (0.6, 0.05), (0.92, 0.0)]],
        [[(0.9, 0.0), (0.45, 0.08), (0.45, 0.08), (0.3, 0.4), (0.3, 0.4), (0.62, 0.5), (0.66, 0.78),
          (0.4, 0.98), (0.05, 0.9)]],
        [[(0.95, 0.05), (0.4, 0.0), (0.25, 0.2), (0.35, 0.42), (0.7, 0.6), (0.65, 0.88), (0.3, 1.0),
          (0.08, 0.85)]],
    ],
    6: [
        [[(0.7, 0.0), (0.35, 0.25), (0.15, 0.65), (0.3, 0.98), (0.7, 0.92), (0.78, 0.65), (0.5, 0.52),
          (0.2, 0.72)]],
        [[(0.5, 0.0), (0.22, 0.4), (0.15, 0.8), (0.45, 1.0), (0.78, 0.8), (0.6, 0.55), (0.3, 0.62),
          (0.18, 0.8)]],
        [[(0.8, 0.05), (0.45, 0.1), (0.15, 0.45), (0.15, 0.85), (0.5, 1.0), (0.85, 0.78), (0.65, 0.5),
          (0.28, 0.58)]],
        [[(0.35, 0.0), (0.15, 0.4), (0.15, 0.8), (0.5, 1.0), (0.85, 0.85), (0.7, 0.62), (0.35, 0.68),
          (0.25, 0.9)]],
    ],
    7: [
        [[(0.1, 0.05), (0.5, 0.05), (0.88, 0.03), (0.88, 0.03), (0.6, 0.5), (0.45, 1.0)]],
        [[(0.1, 0.2), (0.12, 0.05), (0.12, 0.05), (0.5, 0.06), (0.85, 0.02), (0.85, 0.02), (0.65, 0.5),
          (0.5, 1.0)]],
        [[(0.1, 0.05), (0.88, 0.05), (0.88, 0.05), (0.6, 0.5), (0.4, 1.0)], [(0.3, 0.5), (0.6, 0.48),
          (0.9, 0.45)]],
        [[(0.05, 0.15), (0.35, 0.05), (0.75, 0.08), (0.85, 0.2), (0.65, 0.6), (0.55, 1.0)]],
    ],
    8: [
        [[(0.7, 0.12), (0.45, 0.0), (0.2, 0.15), (0.35, 0.42), (0.72, 0.68), (0.65, 0.95), (0.3, 0.98),
          (0.18, 0.75), (0.5, 0.45), (0.8, 0.2), (0.6, 0.02)]],
        [[(0.75, 0.08), (0.4, 0.05), (0.25, 0.25), (0.5, 0.45), (0.7, 0.72), (0.45, 1.0), (0.2, 0.8),
          (0.45, 0.5), (0.78, 0.2), (0.75, 0.08)]],
        [[(0.5, 0.0), (0.2, 0.2), (0.48, 0.45), (0.78, 0.22), (0.5, 0.0)],
         [(0.48, 0.45), (0.15, 0.72), (0.5, 1.0), (0.85, 0.72), (0.48, 0.45)]],
        [[(0.9, 0.15), (0.55, 0.0), (0.3, 0.2), (0.55, 0.5), (0.6, 0.85), (0.3, 1.0), (0.15, 0.8), (0.5, 0.5),
          (0.85, 0.2)]],
    ],
    9: [
        [[(0.78, 0.15), (0.45, 0.0), (0.18, 0.25), (0.4, 0.5), (0.72, 0.35), (0.78, 0.12), (0.78, 0.12),
          (0.72, 0.55), (0.65, 1.0)]],
        [[(0.75, 0.2), (0.5, 0.02), (0.15, 0.25), (0.35, 0.52), (0.75, 0.25), (0.75, 0.25), (0.72, 0.7),
          (0.5, 1.0), (0.2, 0.92)]],
        [[(0.82, 0.08), (0.4, 0.05), (0.15, 0.35), (0.45, 0.45), (0.8, 0.12), (0.8, 0.12), (0.7, 0.5),
          (0.5, 1.0)]],
        [[(0.6, 0.05), (0.25, 0.15), (0.25, 0.42), (0.6, 0.4), (0.75, 0.1), (0.75, 0.3), (0.7, 0.65),
          (0.72, 1.0)]],
    ],
}  # fmt: skip
WIDTH = {1: 0.35}  # of the box relative to its height, where it is not the usual 0.75

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol",
    "STIXGeneralItalic", "STIXGeneralBolIta", "cmb10", "cmr10", "cmss10", "cmtt10",
)  # fmt: skip


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def balanced_labels(count: int, classes: int, generator: torch.Generator) -> Tensor:
    """Every class equally often (to within one), in random order; int64 (count,)."""
    return torch.arange(count).remainder(classes)[torch.randperm(count, generator=generator)]


# ---------------------------------------------------------------------------------------------- pen strokes


def _curve(points: Tensor, samples: int) -> Tensor:
    """Catmull-Rom spline through `points` (P, 2), `samples` points in all, spread over its segments."""
    padded = torch.cat([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = torch.linspace(0, len(points) - 1 - 1e-4, samples)
    i, u = t.long(), t.frac()[:, None]
    a, b, c, d = (padded[i + k] for k in range(4))
    return 0.5 * (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * b - a - 3 * c + d) * u**3)


def pen_strokes(labels: Tensor, generator: torch.Generator, width: float = 0.25) -> Tensor:
    """Digits drawn as curves `width` pixels wide, uint8 (N, 1, 28, 28), white on black.

    Edges are one pixel soft. The default is a hairline, a pen of one pixel on a canvas of 112×112 brought
    down to 28×28, at most 62 % bright.

    Each digit is one of the ways of `STROKES` with its points moved at random, then turned, slanted,
    stretched and bent as a whole, and placed as MNIST places its digits: the centre of mass in the middle.
    """
    samples = 160
    paths = torch.empty(len(labels), samples, 2)
    for n, label in enumerate(labels.tolist()):
        ways = STROKES[label]
        way = ways[int(torch.randint(len(ways), (), generator=generator))]
        shares = [samples * (k + 1) // len(way) - samples * k // len(way) for k in range(len(way))]
        parts = []
        for stroke, share in zip(way, shares, strict=True):
            points = torch.tensor(stroke)
            corner = torch.cat([torch.zeros(1, dtype=torch.bool), (points[1:] == points[:-1]).all(1)])
            moved = points + 0.045 * torch.randn(points.shape, generator=generator)
            moved[corner] = moved[corner.roll(-1)]
            parts.append(_curve(moved, share))
        paths[n] = torch.cat(parts)
        paths[n, :, 0] *= WIDTH.get(label, 0.75)
    paths = _place(_bend(paths, generator), generator)
    pixels = torch.stack(
        torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="xy"), -1
    ).view(-1, 2)
    images = [(width / 2 + 0.5 - _distance(pixels, part)).clamp(0, 1) for part in paths.split(100)]
    return (torch.cat(images).view(-1, 1, SIZE, SIZE) * 255).round().to(torch.uint8)


def _distance(pixels: Tensor, paths: Tensor) -> Tensor:
    """From every pixel (P, 2) to the nearest point of every path (N, S, 2), (N, P)."""
    square = (pixels**2).sum(-1)[:, None] - 2 * pixels @ paths.mT + (paths**2).sum(-1)[:, None]
    return square.amin(2).clamp(min=0).sqrt()


def _bend(paths: Tensor, generator: torch.Generator) -> Tensor:
    """A smooth displacement of every path (N, S, 2) that lies in about the unit square."""
    n = len(paths)
    amplitude = 0.035 * torch.randn(n, 1, 2, 2, generator=generator)
    frequency = _uniform(generator, 2.0, 6.0, n, 1, 2, 2)
    phase = _uniform(generator, 0.0, 2 * math.pi, n, 1, 2, 2)
    return paths + (amplitude * (frequency * paths[..., None] + phase).sin()).sum(-1).flip(-1)


def _place(paths: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, slant and stretch paths (N, S, 2), scale them to a box of about 18 pixels, centre their mass."""
    n = len(paths)
    turn = 0.12 * torch.randn(n, generator=generator)
    slant = 0.12 + 0.22 * torch.randn(n, generator=generator)
    stretch = (0.12 * torch.randn(n, generator=generator)).exp()
    cos, sin = turn.cos(), turn.sin()
    rows = [cos * stretch, sin - slant * cos, -sin * stretch, cos + slant * sin]
    turned = paths @ torch.stack(rows, 1).view(-1, 2, 2).mT
    low, high = turned.amin(1, keepdim=True), turned.amax(1, keepdim=True)
    box = _uniform(generator, 16.0, 19.5, n, 1, 1)
    scaled = (turned - low) * (box / (high - low).amax(2, keepdim=True))
    placed = scaled - scaled.mean(1, keepdim=True) + SIZE / 2
    # As far as the centring allows, everything stays one pixel clear of the border.
    low, high = placed.amin(1, keepdim=True), placed.amax(1, keepdim=True)
    return placed + (2 - low).clamp(min=0) - (high - (SIZE - 2)).clamp(min=0)


# ---------------------------------------------------------------------------------------------------- fonts


def font_files(folder: Path | None = None) -> list[Path]:
    """Font files under `folder`; without one, those that matplotlib ships and that have ordinary digits."""
    if folder is None:
        import matplotlib

        return [Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf") for name in FONTS]
    files = with_suffix(folder, ".ttf", ".otf", ".ttc")
    if not files:
        raise DataError(f"{folder}: holds no font (.ttf, .otf, .ttc)")
    return files


@cache
def _glyphs(files: tuple[Path, ...], side: int = 64) -> Tensor:
    """Every digit of every font, the longer side of its box at 40 of 64 pixels: float (fonts, 10, 64, 64)."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = np.zeros((len(files), 10, side, side), np.float32)
    for f, path in enumerate(files):
        with reading(path, "a font that can be read"):
            font = ImageFont.truetype(str(path), 100)
        for digit in range(10):
            canvas = Image.new("L", (240, 240))
            ImageDraw.Draw(canvas).text((60, 40), str(digit), font=font, fill=255)
            box = canvas.getbbox()
            if box is None:
                raise DataError(f"{path}: draws nothing for the digit {digit}")
            glyph = canvas.crop(box)
            scale = 40 / max(glyph.size)
            glyph = glyph.resize(
                (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))),
                Image.Resampling.LANCZOS,
            )
            left, top = (side - glyph.width) // 2, (side - glyph.height) // 2
            sheet[f, digit, top : top + glyph.height, left : left + glyph.width] = (
                np.asarray(glyph, np.float32) / 255
            )
    return torch.from_numpy(sheet)


def font_digits(labels: Tensor, generator: torch.Generator, folder: Path | None = None) -> Tensor:
    """Digits of random fonts, turned, slanted, stretched and bent; uint8 (N, 1, 28, 28), white on black.

    Their centre of mass lies in the middle, as in MNIST.
    """
    sheet = _glyphs(tuple(font_files(folder)))
    n = len(labels)
    glyphs = sheet[torch.randint(len(sheet), (n,), generator=generator), labels][:, None]
    turn = 0.1 * torch.randn(n, generator=generator)
    slant = 0.1 + 0.2 * torch.randn(n, generator=generator)
    stretch = (0.12 * torch.randn(n, generator=generator)).exp()
    # grid_sample maps output places to input places: the inverse of what is done to the digit.
    zoom = SIZE / (_uniform(generator, 17.0, 20.5, n) / 40 * 64)
    cos, sin = turn.cos(), turn.sin()
    matrix = torch.stack(
        [
            cos / stretch,
            (slant * cos - sin) / stretch,
            torch.zeros(n),
            sin,
            slant * sin + cos,
            torch.zeros(n),
        ],
        1,
    ).view(-1, 2, 3)
    matrix[:, :, :2] *= zoom[:, None, None]
    grid = F.affine_grid(matrix, [n, 1, 2 * SIZE, 2 * SIZE], align_corners=False)
    field = 0.06 * torch.randn(n, 2, 4, 4, generator=generator)
    grid = grid + F.interpolate(field, (2 * SIZE, 2 * SIZE), mode="bicubic", align_corners=False).permute(
        0, 2, 3, 1
    )
    images = F.avg_pool2d(_centred(F.grid_sample(glyphs, grid, align_corners=False)), 2)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _centred(images: Tensor) -> Tensor:
    """Images (N, 1, S, S) on black, moved by whole pixels so that the centre of mass comes to the middle."""
    side = images.shape[-1]
    places = torch.arange(side) + 0.5
    mass = images.sum((1, 2, 3)).clamp(min=1e-6)
    down = side / 2 - images.sum((1, 3)) @ places / mass
    across = side / 2 - images.sum((1, 2)) @ places / mass
    moves = torch.stack([down, across], 1).round().int().tolist()
    return torch.stack([image.roll(move, (1, 2)) for image, move in zip(images, moves, strict=True)])
