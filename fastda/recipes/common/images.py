"""Image files, read and written by one rule: as they are seen, and given back as they were.

Read: upright (EXIF), over white where transparent, 16-bit greys in their full range. What cannot be read so
is refused by name: CMYK, floating point, 16-bit colours, several pictures in one file.
Written: the format, depth, transparency, colour profile and texts of the file that was read.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastda import files
from fastda.recipes.common.folders import DataError, reading

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "TGA")
READABLE = "an image that can be read"
XMP = "XML:com.adobe.xmp"  # as the key of a PNG's text
TIFF_TEXTS = (270, 271, 272, 305, 306, 315, 33432)  # description, camera, software, date, artist, rights

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Part:
    """What of an image is used: the box from (left, top), `scale` times as large, is what lies in the result.

    A point (x, y) of the image is at (scale·(x − left), scale·(y − top)) of the result.
    """

    left: float
    top: float
    scale: float
    size: Size

    @classmethod
    def middle(cls, of: Size, size: Size) -> Part:
        """The largest part of an image of size `of` in the proportions of `size`, from its middle."""
        scale = max(size[0] / of[0], size[1] / of[1])
        return cls((of[1] - size[1] / scale) / 2, (of[0] - size[0] / scale) / 2, scale, size)

    def taken(self, values: np.ndarray) -> np.ndarray:
        """The part of an image (H, W) or (H, W, 3), of its dtype."""
        height, width = self.size
        # Rounding must not take it out of the image.
        right = min(self.left + width / self.scale, values.shape[1])
        bottom = min(self.top + height / self.scale, values.shape[0])
        box = (max(0.0, self.left), max(0.0, self.top), right, bottom)
        if values.dtype == np.uint16:
            image = Image.fromarray(values.astype(np.float32))
        else:
            image = Image.fromarray(values)
        resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
        return resized.round().clip(0, 65535).astype(np.uint16) if values.dtype == np.uint16 else resized


@dataclass
class Picture:
    """An image file as it is seen, and what it takes to write one like it.

    seen: (H, W) or (H, W, 3), uint8, or uint16 of 16-bit greys; over white where it is transparent.
    under: the same without white, where there is `alpha`, uint8 (H, W).
    """

    path: Path
    seen: np.ndarray
    under: np.ndarray | None = None
    alpha: np.ndarray | None = None
    format: str = "PNG"
    saved_with: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        return self.seen.shape[0], self.seen.shape[1]

    @property
    def coloured(self) -> bool:
        """Whether any pixel is something else than grey."""
        return self.seen.ndim == 3 and bool((self.seen != self.seen[..., :1]).any())

    def part(self, part: Part) -> Picture:
        """The same file's, with that part of the picture."""
        return Picture(
            self.path, part.taken(self.seen), self.under if self.under is None else part.taken(self.under),
            self.alpha if self.alpha is None else part.taken(self.alpha), self.format, self.saved_with,
        )  # fmt: skip


def read(path: Path) -> Picture:
    """Raises DataError for a file that is no image or cannot be read as it is seen."""
    with reading(path, READABLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large pictures, odd metadata
        with Image.open(path, formats=FORMATS) as image:
            deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
            _check(path, image, deep)
            upright = ImageOps.exif_transpose(image)
            saved_with = _kept(image, upright)
            file_format = "JPEG" if image.format == "MPO" else str(image.format)
            if deep:
                return Picture(path, np.array(upright).astype(np.uint16), None, None, file_format, saved_with)
            grey = image.mode in ("1", "L", "LA")
            if not upright.has_transparency_data:
                seen = np.array(upright.convert("L" if grey else "RGB"))
                return Picture(path, seen, None, None, file_format, saved_with)
            values = np.array(upright.convert("LA" if grey else "RGBA"))
    alpha = values[..., -1]
    under = values[..., 0] if grey else values[..., :3]
    share = alpha.astype(np.uint32) if grey else alpha[..., None].astype(np.uint32)
    seen = ((under * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)
    return Picture(path, seen, under, alpha, file_format, saved_with)


def _check(path: Path, image: Any, deep: bool) -> None:
    """What cannot be read as it is seen is refused."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a telephone's second picture serves the first
        raise DataError(f"{path}: holds {frames} pictures; one a file is read")
    tiles = str(image.tile)
    if deep:
        if "transparency" in image.info:
            raise DataError(f"{path}: 16-bit greys with a transparent one are not read; convert it to 8 bits")
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:
            raise DataError(f"{path}: 16-bit greys with white at zero are not read; invert it")
        if image.format == "PPM" and image.tile[0].codec_name != "raw":
            raise DataError(f"{path}: greys of 9 to 15 bits are not read; scale it to 16")
    elif ";16" in tiles or (image.format == "PPM" and _maxval(image) > 255):
        raise DataError(f"{path}: colours of 16 bits each are not read; convert it to 8 bits")
    elif image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX"):
        raise DataError(f"{path}: pixels of the kind {image.mode} are not read; convert it to grey or RGB")


def _maxval(image: Any) -> int:
    arguments = image.tile[0].args
    return arguments[1] if isinstance(arguments, tuple) and isinstance(arguments[1], int) else 255


def _kept(image: Any, upright: Any) -> dict[str, Any]:
    """Arguments to save a picture with that keep what the file says beside its pixels."""
    info, kept = upright.info, {}
    exif = upright.getexif()
    if image.format in ("PNG", "JPEG", "MPO", "WEBP") and len(exif):
        kept["exif"] = exif.tobytes()
    if isinstance(info.get("icc_profile"), bytes):
        kept["icc_profile"] = info["icc_profile"]
    if image.format in ("PNG", "JPEG", "MPO", "TIFF", "BMP") and "dpi" in info and min(info["dpi"]) > 0:
        kept["dpi"] = tuple(float(value) for value in info["dpi"])
    if image.format in ("JPEG", "MPO", "WEBP"):
        kept |= {name: info[name] for name in ("xmp", "comment") if isinstance(info.get(name), bytes)}
    if image.format == "PNG":
        texts = PngInfo()
        for key, text in image.text.items():
            # Pillow takes a picture's orientation out of this text, too.
            texts.add_text(key, info.get(key, text) if key == XMP else text)
        kept["pnginfo"] = texts
    if image.format == "TIFF":
        kept["tiffinfo"] = {tag: image.tag_v2[tag] for tag in TIFF_TEXTS if tag in image.tag_v2}
        if image.info.get("compression", "raw") != "raw":
            kept["compression"] = "tiff_lzw"
    if image.format in ("JPEG", "MPO"):
        kept |= {"quality": 95, "subsampling": 0}
    if image.format == "WEBP":
        kept |= {"lossless": True, "exact": True}
    return kept


def write(target: Path, picture: Picture, pixels: np.ndarray) -> None:
    """Write `pixels`, made of `picture.seen` and of its dtype, as a file like `picture`'s, whole or not.

    Where the picture is transparent, what changed is changed there too, and the transparency stays.
    Raises DataError where the format cannot hold the result.
    """
    result = pixels
    if picture.alpha is not None:
        assert picture.under is not None
        under, seen = picture.under.astype(np.int32), picture.seen.astype(np.int32)
        if pixels.ndim > under.ndim:
            under, seen = under[..., None], seen[..., None]
        made = (under + pixels - seen).clip(0, 255).astype(np.uint8)
        shown = picture.alpha if made.ndim == 2 else picture.alpha[..., None]
        made = np.where(shown > 0, made, under.astype(np.uint8))
        result = np.dstack([made, picture.alpha])
    with files.unfinished(target) as beside:
        try:
            Image.fromarray(result).save(beside, format=picture.format, **picture.saved_with)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{picture.path}: cannot be given back as {picture.format} ({error})") from error
        with Image.open(beside) as again:
            read_back = np.array(again)
        same = (
            np.array_equal(read_back, result) if picture.format != "JPEG" else read_back.shape == result.shape
        )
        if not same:
            raise DataError(f"{picture.path}: {picture.format} cannot hold the result; convert it to PNG")


def write_new(target: Path, pixels: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) as a PNG, whole or not at all."""
    write(target, Picture(target, pixels), pixels)


def in_bytes(values: np.ndarray) -> np.ndarray:
    """uint8 of uint8, or of uint16 over its full range."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8) if values.dtype == np.uint16 else values


def greyed(values: np.ndarray) -> np.ndarray:
    """(H, W) of (H, W, 3) or (H, W): luma of ITU-R 601-2, as Pillow has it."""
    if values.ndim == 2:
        return values
    weighted = values.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)


def coloured(values: np.ndarray) -> np.ndarray:
    """(H, W, 3) of (H, W, 3) or (H, W)."""
    return np.dstack([values] * 3) if values.ndim == 2 else values


def open_image(path: Path, size: int | Size | None = None, *, grey: bool = False) -> np.ndarray:
    """uint8 (H, W, 3), or (H, W) if `grey`.

    With a `size` (height, width), the middle part of those proportions, resized to it.
    """
    picture = read(path)
    if size is not None:
        picture = picture.part(Part.middle(picture.size, (size, size) if isinstance(size, int) else size))
    values = in_bytes(picture.seen)
    return greyed(values) if grey else coloured(values)


def shifted(images: torch.Tensor, by: int, generator: torch.Generator) -> torch.Tensor:
    """Every image (N, C, H, W) moved by up to `by` pixels across and down, its border repeated."""
    height, width = images.shape[2:]
    padded = F.pad(images, (by, by, by, by), mode="replicate")
    corners = torch.randint(2 * by + 1, (len(images), 2), generator=generator).tolist()
    moved = [padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(corners)]
    return torch.stack(moved).contiguous(memory_format=torch.channels_last)
