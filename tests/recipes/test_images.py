"""Image files by one rule: read as they are seen, given back as they were, or refused by name."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastda.recipes.common import images
from fastda.recipes.common.folders import DataError
from fastda.recipes.common.images import Part

pytestmark = pytest.mark.isa_independent
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)
COLOUR = RNG.integers(0, 256, (20, 30, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (20, 30), np.uint8)
ALPHA[:5], ALPHA[-5:] = 0, 255


def given_back(path, change=0):
    """The file that is written for `path` with every pixel changed, opened again."""
    picture = images.read(path)
    target = path.with_name(f"out-{path.name}")
    pixels = picture.seen.astype(np.int64) + change
    white = np.iinfo(picture.seen.dtype).max
    images.write(target, picture, pixels.clip(0, white).astype(picture.seen.dtype))
    opened = Image.open(target)
    opened.load()
    assert list(path.parent.glob(".*")) == []
    return opened


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "tga", "ppm"])
def test_what_is_not_changed_comes_back_pixel_by_pixel(tmp_path, suffix):
    for mode, values in {"L": GREY, "RGB": COLOUR, "1": GREY > 100}.items():
        if mode == "1" and suffix in ("ppm", "tga", "webp"):
            continue  # these hold no black and white alone
        path = tmp_path / f"{mode}.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(values).save(path, **options)
        seen = Image.open(path).convert("L" if mode != "RGB" and suffix != "webp" else "RGB")
        np.testing.assert_array_equal(images.read(path).seen, np.array(seen))
        back = given_back(path)
        assert back.format == Image.open(path).format
        np.testing.assert_array_equal(np.array(back), np.array(seen))
        changed = np.array(given_back(path, 3)).astype(int)
        np.testing.assert_array_equal(changed, (np.array(seen).astype(int) + 3).clip(0, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_pictures_are_read_and_given_back_upright(tmp_path, orientation, suffix):
    block = np.zeros((16, 32), np.uint8)
    block[:8, :8] = 250
    exif = Image.Exif()
    exif[274], exif[271] = orientation, "a camera"
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(block).save(path, exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(images.read(path).seen, upright)
    np.testing.assert_array_equal(images.open_image(path, grey=True), upright)
    back = given_back(path)
    again = np.array(ImageOps.exif_transpose(back)).astype(int)
    assert again.shape == upright.shape and np.abs(again - upright).max() <= (12 if suffix == "jpg" else 0)
    assert back.getexif().get(274, 1) == 1 and back.getexif().get(271) == "a camera"


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "tga"])
@pytest.mark.parametrize("grey", [True, False])
def test_what_is_transparent_is_read_as_it_is_seen_and_stays_transparent(tmp_path, suffix, grey):
    values = np.dstack([GREY if grey else COLOUR, ALPHA])
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(values).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    page = Image.new("RGBA", (30, 20), "white")
    page.alpha_composite(Image.open(path).convert("RGBA"))
    seen = images.coloured(images.read(path).seen).astype(int)
    assert np.abs(seen - np.array(page)[..., :3]).max() <= 1
    under = values.copy()
    under[ALPHA == 0, :-1] = 7  # what no one sees plays no part
    other = tmp_path / f"y.{suffix}"
    Image.fromarray(under).save(other, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(images.read(other).seen, images.read(path).seen)
    back = np.array(given_back(path, 5).convert("RGBA"))
    before = np.array(Image.open(path).convert("RGBA"))
    np.testing.assert_array_equal(back[..., 3], ALPHA)
    np.testing.assert_array_equal(back[ALPHA == 0], before[ALPHA == 0])
    opaque = ALPHA == 255
    np.testing.assert_array_equal(back[opaque, :3], (before[opaque, :3].astype(int) + 5).clip(0, 255))


def test_palettes_are_their_colours_and_keep_their_transparency(tmp_path):
    path = tmp_path / "x.png"
    palette = Image.fromarray(COLOUR).quantize(16)
    palette.save(path)
    np.testing.assert_array_equal(images.read(path).seen, np.array(palette.convert("RGB")))
    np.testing.assert_array_equal(np.array(given_back(path)), np.array(palette.convert("RGB")))
    palette.save(path, transparency=3)
    alpha = np.array(Image.open(path).convert("RGBA"))[..., 3]
    assert 0 < (alpha == 0).mean() < 1
    np.testing.assert_array_equal(np.array(given_back(path, 9))[..., 3], alpha)
    Image.fromarray(GREY).save(path, transparency=int(GREY[0, 0]))  # one grey of an image is transparent
    np.testing.assert_array_equal(np.array(given_back(path))[..., 1], np.where(GREY[0, 0] == GREY, 0, 255))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_read_and_given_back_in_full(tmp_path, suffix):
    values = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(values).save(path)
    picture = images.read(path)
    assert picture.seen.dtype == np.uint16
    np.testing.assert_array_equal(picture.seen, values)
    np.testing.assert_array_equal(np.array(given_back(path)), values)
    np.testing.assert_array_equal(np.array(given_back(path, 100)), (values.astype(int) + 100).clip(0, 65535))
    in_bytes = images.open_image(path, grey=True)
    np.testing.assert_array_equal(in_bytes, (values / 257).round().astype(np.uint8))
    half = images.open_image(path, (10, 15), grey=True).astype(int)
    expected = np.array(Image.fromarray(in_bytes).resize((15, 10), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(half - expected).max() <= 1


def test_texts_profiles_resolution_and_quality_stay(tmp_path):
    texts = PngInfo()
    texts.add_text("Title", "an eye")
    texts.add_itxt("Labels", '{"gaze": "größer"}', "de", "Titel")
    profile = b"a colour profile" * 9
    Image.fromarray(COLOUR).save(tmp_path / "x.png", pnginfo=texts, icc_profile=profile, dpi=(300, 300))
    back = given_back(tmp_path / "x.png")
    assert back.text == {"Title": "an eye", "Labels": '{"gaze": "größer"}'}
    assert back.info["icc_profile"] == profile and round(back.info["dpi"][0]) == 300
    smooth = np.array(Image.fromarray(COLOUR).resize((90, 60), Image.Resampling.BICUBIC))
    Image.fromarray(smooth).save(
        tmp_path / "x.jpg", quality=95, subsampling=0, comment=b"by hand", icc_profile=profile, dpi=(72, 72)
    )
    back = given_back(tmp_path / "x.jpg")
    assert (back.info["comment"], back.info["icc_profile"]) == (b"by hand", profile)
    assert back.info["dpi"] == (72, 72)
    assert [layer[1:3] for layer in back.layer] == [(1, 1)] * 3  # no colour is halved
    error = np.array(back).astype(int) - np.array(Image.open(tmp_path / "x.jpg"))
    assert np.abs(error).mean() < 1.5
    Image.fromarray(GREY).save(tmp_path / "x.tif", description="one of ten", compression="tiff_lzw")
    back = given_back(tmp_path / "x.tif")
    assert back.tag_v2[270] == "one of ten" and back.info["compression"] == "tiff_lzw"


def test_a_telephones_picture_is_its_first(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(COLOUR).save(
        path, format="MPO", save_all=True, append_images=[Image.fromarray(COLOUR[:5])]
    )
    assert Image.open(path).format == "MPO"
    assert images.read(path).seen.shape == COLOUR.shape
    assert given_back(path).format == "JPEG"


def png(bits, kind, samples, width=4, height=3):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"\0" + np.arange(samples * 4, dtype=">u2" if bits == 16 else "u1").tobytes()
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = zlib.compress(rows * 3)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(values, mode=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(values) if mode is None else Image.new(mode, (4, 3))
    image.save(buffer, **options)
    return buffer.getvalue()


REFUSED = {
    "cmyk.jpg": (saved(None, "CMYK", format="JPEG"), "pixels of the kind CMYK"),
    "cmyk.tif": (saved(None, "CMYK", format="TIFF"), "pixels of the kind CMYK"),
    "lab.tif": (saved(None, "LAB", format="TIFF"), "pixels of the kind LAB"),
    "float.tif": (saved(None, "F", format="TIFF"), "pixels of the kind F"),
    "integers.tif": (saved(None, "I", format="TIFF"), "pixels of the kind I"),
    "colours of 16 bits.png": (png(16, 2, 3), "colours of 16 bits"),
    "grey and alpha of 16 bits.png": (png(16, 4, 2), "colours of 16 bits"),
    "colours and alpha of 16 bits.png": (png(16, 6, 4), "colours of 16 bits"),
    "colours of 16 bits.ppm": (b"P6 2 1 65535\n" + bytes(12), "colours of 16 bits"),
    "twelve bits.pgm": (b"P5 2 1 4095\n" + bytes(4), "9 to 15 bits"),
    "gif.png": (saved(GREY, format="GIF"), "not an image that can be read"),
    "two pages.tif": (
        saved(GREY, format="TIFF", save_all=True, append_images=[Image.fromarray(GREY)]), "holds 2 pictures",
    ),
    "moving.png": (
        saved(GREY, format="PNG", save_all=True, append_images=[Image.fromarray(255 - GREY)]),
        "holds 2 pictures",
    ),
    "moving.webp": (
        saved(COLOUR, format="WEBP", save_all=True, append_images=[Image.fromarray(255 - COLOUR)]),
        "holds 2 pictures",
    ),
    "bomb.png": (png(8, 0, 1, 60_000, 60_000), "decompression bomb"),
    "empty.png": (b"", "not an image that can be read"),
    "cut off.jpg": (saved(COLOUR, format="JPEG")[:300], "not an image that can be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_as_it_is_seen_is_refused_by_name(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        images.open_image(tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(raised.value)


def test_a_part_is_where_its_transform_says(tmp_path):
    for of, size in (
        ((300, 400), (35, 55)),
        ((64, 64), (32, 16)),
        ((20, 30), (40, 60)),
        ((35, 55), (35, 55)),
    ):
        part = Part.middle(of, size)
        assert 2 * part.left + size[1] / part.scale == pytest.approx(of[1])
        assert 2 * part.top + size[0] / part.scale == pytest.approx(of[0])
        assert min(part.left, part.top) == pytest.approx(0)
        y, x = np.mgrid[: of[0], : of[1]] + 0.5
        ramp = np.stack([x, y, x], -1)
        taken = [part.taken((ramp[..., i] * 40).astype(np.uint16)) / 40 for i in (0, 1)]
        v, u = np.mgrid[: size[0], : size[1]] + 0.5
        for values, place, corner in ((taken[0], u, part.left), (taken[1], v, part.top)):
            inner = (slice(2, -2), slice(2, -2))
            assert np.abs(part.scale * (values - corner) - place)[inner].max() < 0.05 * max(1, part.scale)


def test_a_format_that_cannot_hold_the_result_is_told(tmp_path):
    path = tmp_path / "x.ppm"
    Image.fromarray(COLOUR).save(path)
    picture = images.read(path)
    picture.under, picture.alpha = picture.seen, ALPHA
    with pytest.raises(DataError, match=r"x\.ppm: "):
        images.write(tmp_path / "out.ppm", picture, picture.seen)
    assert not (tmp_path / "out.ppm").exists()


def test_greys_of_colours_are_pillows():
    expected = np.array(Image.fromarray(COLOUR).convert("L"))
    np.testing.assert_array_equal(images.greyed(COLOUR), expected)
    assert torch.equal(torch.from_numpy(images.greyed(GREY)), torch.from_numpy(GREY))
