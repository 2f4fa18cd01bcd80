"""Eyes with gaze labels: a procedural renderer, and readers for SynthEyes, UnityEyes and MPIIGaze files.

A gaze is a unit vector in camera coordinates: x to the right of the image, y down, z away from the camera; an
eye that looks into the camera has (0, 0, −1). Pitch (positive up) and yaw (positive to the image's left) are
asin(−y) and atan2(−x, −z), as in MPIIGaze (Zhang et al., CVPR 2015).
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastda.recipes.common import images as files
from fastda.recipes.common.folders import DataError, image_files, reading, with_suffix
from fastda.recipes.common.images import Part, Picture, open_image, shifted

HEIGHT, WIDTH = 35, 55


def gaze_vector(pitch: Tensor, yaw: Tensor) -> Tensor:
    """Angles in radians, (N,) each → unit vectors (N, 3)."""
    return torch.stack([-pitch.cos() * yaw.sin(), -pitch.sin(), -pitch.cos() * yaw.cos()], -1)


def angles(gaze: Tensor) -> Tensor:
    """Unit vectors (N, 3) → pitch and yaw in radians, (N, 2)."""
    x, y, z = gaze.unbind(-1)
    return torch.stack([torch.asin((-y).clamp(-1, 1)), torch.atan2(-x, -z)], -1)


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between vectors (N, 3) of any length, (N,)."""
    cross = torch.linalg.vector_norm(torch.linalg.cross(a, b), dim=-1)
    return torch.rad2deg(torch.atan2(cross, (a * b).sum(-1)))


def equalise(images: Tensor) -> Tensor:
    """Histogram equalisation of every uint8 image (N, 1, H, W), as MPIIGaze's normalised eyes have had it."""
    flat = images.flatten(1).long()
    counts = torch.zeros(len(flat), 256, dtype=torch.long).scatter_add_(1, flat, torch.ones_like(flat))
    total = counts.cumsum(1)
    lowest = counts.gather(1, flat.amin(1, keepdim=True))
    table = ((total - lowest) * 255 / (flat.shape[1] - lowest).clamp(min=1)).round().clamp(0, 255)
    return table.gather(1, flat).to(torch.uint8).view_as(images)


# ------------------------------------------------------------------------------------------------- renderer


def render(count: int, generator: torch.Generator, scale: int = 3) -> tuple[Tensor, Tensor]:
    """`count` drawn eyes, uint8 (N, 1, 35, 55), and their gazes (N, 3).

    An eyeball seen from the front in orthographic projection: iris and pupil are the caps of the sphere
    around the gaze, so that they foreshorten and move as real ones do. Two lids cut it; around it are skin,
    lid crease, lashes and brow, on it a glint, sometimes the rim of glasses in front. Light comes from a
    random side and falls in random soft patches. Drawn `scale` times as large and averaged down, then taken
    by a camera of random focus, exposure and noise.
    """
    parts = [_render(min(250, count - i), generator, scale) for i in range(0, count, 250)]
    if not parts:
        return torch.empty(0, 1, HEIGHT, WIDTH, dtype=torch.uint8), torch.empty(0, 3)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _render(n: int, generator: torch.Generator, scale: int) -> tuple[Tensor, Tensor]:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    def normal(mean: float, deviation: float) -> Tensor:
        return mean + deviation * torch.randn(n, 1, 1, generator=generator)

    def sometimes(share: float) -> Tensor:
        return (torch.rand(n, 1, 1, generator=generator) < share).float()

    def inside(distance: Tensor, softness: float | Tensor = 0.6) -> Tensor:
        """1 where the distance in pixels is negative, 0 where positive; the border is `softness` wide."""
        return torch.sigmoid(distance * (-2.0 / softness))

    def line(distance: Tensor, width: float | Tensor) -> Tensor:
        return torch.exp(-((distance / width) ** 2))

    def patches(rows: int, columns: int, height: int, width: int) -> Tensor:
        """Smooth noise, about standard normal, (n, height, width)."""
        coarse = torch.randn(n, 1, rows, columns, generator=generator)
        return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[:, 0]

    # Where on a screen below its camera someone looks, and, whatever that is, how the head is held.
    pitch, yaw = normal(-0.14, 0.11).clamp(-0.6, 0.4), normal(0.0, 0.18).clamp(-0.7, 0.7)
    head_pitch, head_yaw = normal(-0.14, 0.13).clamp(-0.5, 0.2), normal(0.0, 0.16)
    turn = pitch - head_pitch  # of the eye in the head, upwards
    gaze = gaze_vector(pitch.view(n), yaw.view(n))
    gx, gy, gz = gaze.view(n, 3, 1, 1).unbind(1)
    nasal = 1 - 2 * sometimes(0.5)  # the side of the nose
    light_x, light_y = normal(0.0, 0.55), normal(-0.3, 0.5)

    x = ((torch.arange(WIDTH * scale) + 0.5) / scale).view(1, 1, -1)
    y = ((torch.arange(HEIGHT * scale) + 0.5) / scale).view(1, -1, 1)
    radius = uniform(14.5, 18.5)  # of the eyeball, pixels
    # The picture's middle is that of the corners. These lie lower than the centre of the eyeball and in front
    # of it, so that the head's turns move them.
    sunk, ahead = normal(3.7, 0.8) - 0.4 * radius * head_pitch, -0.4 * radius * head_yaw
    corners_y = normal(18.8, 1.2) + sometimes(0.08) * normal(0.0, 5.0)
    centre_x, centre_y = normal(27.5, 1.5) - ahead, corners_y - sunk
    dx, dy = x - centre_x, y - centre_y
    # The lids are turned a little in the image; the gaze is not, as it is measured in camera coordinates.
    tilt = normal(0.05, 0.09) * nasal
    beyond, below = dx - ahead, dy - sunk
    along, across = (
        beyond * tilt.cos() + below * tilt.sin(),
        below * tilt.cos() - beyond * tilt.sin(),
    )

    # Lids: arcs from corner to corner on the eyeball. They turn with the head; the upper one goes nearly all
    # of the way with the eye, the lower one less than half.
    half = radius * uniform(1.25, 1.65)
    u = (along / half).clamp(-1.6, 1.6)
    skew = normal(0.12, 0.12) * nasal
    opening = (radius * (uniform(0.34, 0.52) + 0.8 * turn + head_pitch).sin() + sunk).clamp(min=1.2)
    arc = 1 - u.abs().clamp(max=1) ** uniform(1.9, 3.2)
    corner = normal(0.0, 0.06) * radius * u * nasal
    across = across + uniform(0.0, 1.2) * patches(3, 6, HEIGHT * scale, WIDTH * scale)  # no arc is perfect
    upper = corner - opening * arc * (1 + skew * u)
    flat = 1 - u.abs().clamp(max=1) ** uniform(2.0, 3.5)
    depth_below = radius * (uniform(0.46, 0.66) - 0.4 * turn - head_pitch).sin() - sunk
    lower = corner + depth_below.clamp(min=1.0) * flat * (1 - skew * u)
    above, below = upper - across, across - lower  # pixels from the lids' edges, positive on the skin
    beside = along.abs() - half
    open_eye = torch.maximum(torch.maximum(above, below), beside)

    # The eyeball. Distances on it are angles from the gaze.
    rho = ((dx / radius) ** 2 + (dy / radius) ** 2).clamp(max=0.999)
    depth = -(1 - rho).sqrt()
    angle = torch.acos((dx / radius * gx + dy / radius * gy + depth * gz).clamp(-1, 1))
    iris_angle = uniform(0.46, 0.56)
    pupil_angle = iris_angle * uniform(0.3, 0.55)
    ball = uniform(0.45, 0.9) - uniform(0.0, 0.3) * rho
    iris = uniform(0.05, 0.25) * (0.85 + 0.3 * (angle / iris_angle).clamp(max=1))
    ball = ball + (iris - ball) * inside((angle - iris_angle) * radius, uniform(1.2, 3.0))
    ball = ball - 0.06 * line((angle - iris_angle * 0.95) * radius, 1.2)
    ball = ball + (uniform(0.02, 0.1) - ball) * inside((angle - pupil_angle) * radius, uniform(1.0, 2.5))
    ball = ball * (1 - uniform(0.2, 0.6) * torch.exp(above.clamp(max=0) / uniform(1.5, 5.0)))
    ball = ball * (1 - uniform(0.1, 0.6) * inside(-beside - uniform(1.0, 7.0), 6.0))

    # Skin: the socket is dark towards nose and brow, folds above and below.
    skin = uniform(0.4, 0.85)
    skin = skin - uniform(0.0, 0.25) * line(along / half * nasal - 1.3, uniform(0.4, 0.9)) * inside(
        across - 4, 10.0
    )
    skin = skin + uniform(0.05, 0.35) * (y / HEIGHT - 0.5)  # the cheek
    fold = uniform(1.5, 7.5) * (0.4 + 0.6 * (1 - u.abs().clamp(max=1) ** 2))
    near = inside(beside, 5.0)
    skin = skin - uniform(0.0, 0.25) * line(above - fold, uniform(0.8, 2.2)) * near
    skin = skin - uniform(-0.25, 0.3) * inside(above - fold, 3.0) * inside(-above, 1.0) * near
    skin = skin - uniform(0.0, 0.15) * line(below - uniform(2.0, 8.0), uniform(0.8, 3.0)) * near
    skin = skin - uniform(0.0, 0.2) * inside(below - 2, 4.0) * inside(-below, 2.0) * near
    brow = uniform(15.0, 38.0) * (1 - 0.12 * u**2) + 1.5 * nasal * u
    skin = (skin - uniform(0.0, 0.5) * inside(brow - above, uniform(3.0, 10.0))).clamp(min=0.03)

    # Hollows beside both corners, and an uneven skin.
    hollow = line(along.abs() / half - uniform(1.0, 1.25), uniform(0.2, 0.5)) * line(
        across, uniform(3.0, 8.0)
    )
    skin = skin - uniform(-0.05, 0.2) * hollow
    skin = skin * (1 + uniform(0.0, 0.08) * patches(7, 11, HEIGHT * scale, WIDTH * scale))

    picture = skin + (ball - skin) * inside(open_eye, uniform(0.6, 2.0))
    lashes = line(above - uniform(-0.3, 0.6), uniform(0.7, 2.2)) * inside(beside + normal(0.5, 1.5), 5.0)
    picture = picture * (1 - uniform(0.1, 0.75) * lashes)
    picture = picture * (1 - uniform(0.0, 0.3) * line(below, uniform(0.6, 1.8)) * inside(beside, 4.0))
    wet = line(below - uniform(0.6, 1.6), uniform(0.5, 1.2)) * inside(beside, 3.0)
    picture = picture + uniform(0.0, 0.12) * wet
    # Light and shadow: brighter to one side, and uneven.
    light = 1 + uniform(0.0, 0.9) * (light_x * (x / WIDTH - 0.5) + light_y * (y / HEIGHT - 0.5))
    light = light + uniform(0.0, 0.2) * patches(4, 6, HEIGHT * scale, WIDTH * scale)
    picture = picture * light.clamp(0.15, 1.8)
    # The mirror image of a lamp on the cornea.
    gleam_x = centre_x + radius * (0.75 * gx + 0.3 * light_x)
    gleam_y = centre_y + radius * (0.75 * gy + 0.3 * light_y)
    gleam = ((x - gleam_x) ** 2 + ((y - gleam_y) * uniform(0.6, 1.4)) ** 2).sqrt() - uniform(0.2, 2.4)
    gleam = inside(gleam, uniform(0.8, 2.5)) * inside(open_eye)
    picture = picture + (1 - picture).clamp(min=0) * uniform(0.0, 1.0) ** 2 * sometimes(0.6) * gleam
    # Glasses: a rim above, light or dark.
    rim = dy + uniform(9.0, 17.0) + normal(0.0, 0.15) * dx - uniform(0.0, 0.012) * dx**2
    tone = torch.where(sometimes(0.6) > 0, 1.0, 0.05)
    picture = picture + (tone - picture) * sometimes(0.15) * uniform(0.4, 1.0) * line(rim, uniform(0.5, 1.5))

    # The camera: out of focus by a little, noisy in proportion to the root of the light, overexposed or not.
    small = F.avg_pool2d(picture[:, None].clamp(min=0), scale)
    small = small / small.amax((2, 3), keepdim=True)
    grain = torch.randn(small.shape, generator=generator)
    texture = patches(20, 34, HEIGHT, WIDTH)[:, None]
    small = small * (1 + 0.06 * uniform(0.0, 1.0)[:, None] ** 3 * texture)
    small = _blur(small, uniform(0.1, 0.35).view(n), uniform(0.3, 0.6).view(n))
    strength = 0.003 + 0.06 * torch.rand(n, generator=generator) ** 5
    grain = strength.view(n, 1, 1, 1) * _blur(grain, uniform(0.3, 0.5).view(n), uniform(0.45, 0.65).view(n))
    small = small + grain * small.clamp(min=0.02).sqrt()
    small = (small * uniform(0.85, 1.05)[:, None]).clamp(0, 1)
    return equalise((small * 255).round().to(torch.uint8)), gaze


def _blur(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Every image (N, 1, H, W) with a Gaussian of its own widths, (N,) pixels; borders are reflected."""
    n, reach = len(images), 4
    offsets = torch.arange(-reach, reach + 1)
    rows, columns = (torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, 1) for sigma in (across, down))
    padded = F.pad(images, (reach,) * 4, mode="reflect").transpose(0, 1)
    padded = F.conv2d(padded, columns.view(n, 1, -1, 1), groups=n)
    return F.conv2d(padded, rows.view(n, 1, 1, -1), groups=n).transpose(0, 1)


def retaken(images: Tensor, generator: torch.Generator) -> Tensor:
    """The same eyes, uint8 (N, 1, H, W), in other light, by a camera of other focus and grain, and moved."""
    n, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    light = torch.randn(n, 1, 4, 5, generator=generator)
    light = F.interpolate(light, (height, width), mode="bicubic", align_corners=True)
    taken = images.float() / 255 + uniform(0.0, 0.5) * light
    taken = _blur(taken, uniform(0.2, 1.0).view(n), uniform(0.2, 1.0).view(n))
    grain = torch.randn(images.shape, generator=generator)
    taken = taken + 0.15 * uniform(0.0, 1.0) ** 2 * _blur(grain, torch.full((n,), 0.5), torch.full((n,), 0.5))
    taken = shifted(taken, 2, generator)
    low, high = taken.amin((1, 2, 3), keepdim=True), taken.amax((1, 2, 3), keepdim=True)
    return equalise(((taken - low) / (high - low) * 255).round().to(torch.uint8))


# --------------------------------------------------------------------------------------------------- files


def read_labelled(folder: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 1, 35, 55), equalised, and gazes (N, 3) of a UnityEyes or SynthEyes folder.

    UnityEyes: `N.jpg` beside `N.json`. SynthEyes (Wood et al., ICCV 2015): the file name ends in pitch and
    yaw in radians, `f01_<frame>_<pitch>_<yaw>.png`.
    """
    paths = image_files(folder)
    if len(paths) < 2:
        raise DataError(
            f"{folder}: needs at least two labelled eyes (one is held out), found one, {paths[0].name}"
        )
    unity = any(path.with_suffix(".json").exists() for path in paths)
    images = torch.empty(len(paths), 1, HEIGHT, WIDTH, dtype=torch.uint8)
    gazes = torch.empty(len(paths), 3)
    for i, path in enumerate(paths):
        pixels, gazes[i] = _unity_eye(path) if unity else _synth_eye(path)
        images[i, 0] = torch.from_numpy(pixels)
    return equalise(images), gazes


def _synth_eye(path: Path) -> tuple[np.ndarray, Tensor]:
    numbers = re.search(r"_(-?\d+\.\d+)_(-?\d+\.\d+)$", path.stem)
    if numbers is None:
        raise DataError(
            f"{path}: not labelled: its name does not end in _<pitch>_<yaw> (SynthEyes), and there is no "
            f"{path.stem}.json (UnityEyes)"
        )
    pitch, yaw = (torch.tensor(float(number)) for number in numbers.groups())
    if max(pitch.abs(), yaw.abs()) > torch.pi / 2:
        raise DataError(f"{path}: pitch and yaw must be radians, got {pitch:g} and {yaw:g}")
    return open_image(path, (HEIGHT, WIDTH), grey=True), gaze_vector(pitch, yaw)


def _unity_eye(path: Path) -> tuple[np.ndarray, Tensor]:
    """The eye cut out by its corners, as wide as MPIIGaze's, and `look_vec` with y turned downwards."""
    picture = files.read(path)
    labels, part = unity_part(picture)
    with reading(path.with_suffix(".json"), UNITY):
        look = torch.tensor(_numbers(labels["eye_details"]["look_vec"])[:3])
        if look.norm() == 0:
            raise ValueError("look_vec has no direction")
    grey = files.greyed(files.in_bytes(picture.part(part).seen))
    return grey, F.normalize(look * torch.tensor([1.0, -1.0, 1.0]), dim=0)


UNITY = "a label of UnityEyes"
# Lists of points in pixels of the image, y upwards from its lower edge.
UNITY_POINTS = ("interior_margin_2d", "caruncle_2d", "iris_2d")


def is_unity(path: Path) -> bool:
    """Whether a label of UnityEyes lies beside an image."""
    labels = path.with_suffix(".json")
    if not labels.is_file():
        return False
    with reading(labels, "JSON"):
        return "interior_margin_2d" in json.loads(labels.read_text(encoding="utf-8"))


def unity_part(picture: Picture) -> tuple[dict[str, Any], Part]:
    """The label beside a UnityEyes image, and the eye's place in the image."""
    labels_path = picture.path.with_suffix(".json")
    height, width = picture.size
    if not labels_path.is_file():
        raise DataError(f"{picture.path}: not labelled: there is no {labels_path.name}")
    with reading(labels_path, UNITY):
        labels = json.loads(labels_path.read_text(encoding="utf-8"))
        margin = np.array([_numbers(point)[:2] for point in labels["interior_margin_2d"]])
        if len(margin) < 2:
            raise ValueError("interior_margin_2d has less than two points")
    margin[:, 1] = height - margin[:, 1]
    low, high = margin.min(0), margin.max(0)
    half = np.array([WIDTH, HEIGHT]) / WIDTH * 0.66 * (high[0] - low[0])
    if half[0] < 1:
        raise DataError(f"{labels_path}: interior_margin_2d has no width")
    left, top = (low + high) / 2 - half
    right, bottom = (low + high) / 2 + half
    # By rounding alone an eye that was cut before may lie outside.
    if min(left, top, width - right, height - bottom) < -0.01:
        raise DataError(
            f"{picture.path}: {width}×{height} pixels, but its labels place the eye at x {left:.0f} "
            f"to {right:.0f}, y {top:.0f} to {bottom:.0f}"
        )
    return labels, Part(float(left), float(top), float(WIDTH / (right - left)), (HEIGHT, WIDTH))


def moved_label(labels: dict[str, Any], part: Part, height: int) -> dict[str, Any]:
    """A UnityEyes label for the `part` of an image of that height: its points in pixels are moved with it."""

    def moved(point: str) -> str:
        x, y, *rest = _numbers(point)
        x, y = part.scale * (x - part.left), part.size[0] - part.scale * (height - y - part.top)
        return f"({', '.join(f'{number:.4f}' for number in (x, y, *rest))})"

    return {
        key: [moved(point) for point in value] if key in UNITY_POINTS else value
        for key, value in labels.items()
    }


def _numbers(text: str) -> list[float]:
    """The numbers of "(x, y, z)" or "(x, y, z, w)"."""
    if not isinstance(text, str):
        raise ValueError(f'expected "(x, y, z)", got {text!r}')
    numbers = [float(number) for number in text.strip().removeprefix("(").removesuffix(")").split(",")]
    if len(numbers) not in (3, 4) or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"expected three or four finite numbers with points and commas between, got {text!r}"
        )
    return numbers


def read_real(folder: Path) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """Images uint8 (N, 1, 35, 55) with gazes (N, 3) or None, and for each the number of its group, (N,).

    A folder of MPIIGaze's normalised `.mat` files is labelled; a group is a person, or where there is only
    one, a file (a day). In a folder of eye crops, which are equalised, each image is a group of its own.
    """
    recordings = with_suffix(folder, ".mat")
    if recordings:
        parts = list(_read_recordings(recordings))
        people = sorted({path.parent for path in recordings})
        numbers = [people.index(path.parent) if len(people) > 1 else i for i, path in enumerate(recordings)]
        groups = torch.cat([torch.full((len(x),), g) for g, (x, _) in zip(numbers, parts, strict=True)])
        return (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])), groups
    try:
        paths = image_files(folder)
    except DataError as error:
        raise DataError(f"{error}; nor MPIIGaze's .mat files") from None
    crops = [torch.from_numpy(open_image(path, (HEIGHT, WIDTH), grey=True)) for path in paths]
    return (equalise(torch.stack(crops)[:, None]), None), torch.arange(len(paths))


# Damaged files can crash SciPy's reader, so it has a process of its own, one for all files.
READER = """
import pickle, sys
import numpy as np
from scipy.io import loadmat
for path in sys.stdin.read().split(chr(0)):
    try:
        data = loadmat(path, squeeze_me=True, struct_as_record=False)["data"]
        sides = {name: getattr(data, name) for name in ("left", "right")}
        found = {name: (np.asarray(side.image), np.asarray(side.gaze)) for name, side in sides.items()}
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    pickle.dump(found, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


def _read_recordings(paths: list[Path]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and gazes of MPIIGaze's files, in their order."""
    names = "\0".join(map(str, paths)).encode()
    done = subprocess.run([sys.executable, "-c", READER], input=names, stdout=subprocess.PIPE)
    answers = io.BytesIO(done.stdout)
    for path in paths:
        with reading(path, "a normalised MPIIGaze file"):
            try:
                found = pickle.load(answers)
            except (EOFError, pickle.UnpicklingError):
                raise ValueError("SciPy's reader crashes on it") from None
            if isinstance(found, str):
                raise ValueError(found)
        yield _mpiigaze(path, found)


def _mpiigaze(path: Path, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """All eyes of one `Data/Normalized/pNN/dayNN.mat`: 36×60 patches resized, gazes in their cameras.

    A day may lack the eyes of one side.
    """
    images, gazes = [], []
    for name, (image, gaze) in found.items():
        if image.size == gaze.size == 0:
            continue
        if image.ndim == 2 and gaze.ndim == 1:  # a single eye
            image, gaze = image[None], gaze[None]
        if image.shape[1:] != (36, 60) or image.dtype != np.uint8 or gaze.shape != (len(image), 3):
            raise DataError(
                f"{path}: expected uint8 images n×36×60 and gazes n×3, got for the {name} eyes {image.dtype} "
                f"{image.shape} and {gaze.shape}"
            )
        with reading(path, "a normalised MPIIGaze file"):
            gaze = gaze.astype(np.float32)
        length = np.linalg.norm(gaze, axis=1)
        if not (np.isfinite(length) & (length > 0)).all():
            bad = int((~(np.isfinite(length) & (length > 0))).argmax())
            raise DataError(
                f"{path}: gaze {bad + 1} of its {len(gaze)} {name} eyes has no direction: {gaze[bad]}"
            )
        images.append(torch.from_numpy(image[:, None].astype(np.float32)))
        gazes.append(torch.from_numpy(gaze))
    if not images:
        raise DataError(f"{path}: holds no eyes")
    small = F.interpolate(torch.cat(images), (HEIGHT, WIDTH), mode="bilinear", antialias=True)
    return small.round().to(torch.uint8), F.normalize(torch.cat(gazes), dim=1)
