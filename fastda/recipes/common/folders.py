"""Folders as people have them: what counts, what is passed over, what is said by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff", ".tga",
    ".webp",
)  # fmt: skip
# Pictures, too, but none that both the trainings and `refine` could do justice.
OTHER_SUFFIXES = (
    ".gif", ".apng", ".exr", ".hdr", ".pfm", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".psd",
    ".xcf", ".svg", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".pbm", ".ico", ".dds", ".eps",
)  # fmt: skip
# What file managers and cameras leave in folders; names that begin with a dot are passed over as well.
SYSTEM = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information",
    "lost+found", "@eadir", "__pycache__",
}  # fmt: skip


class DataError(ValueError):
    """The data a user pointed at cannot be used; the message names the file or folder."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever a decoder raises inside becomes a DataError: `path` is not `what`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders of damaged files raise of all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not {what} ({reason})") from error


def hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def check_folder(folder: Path) -> None:
    if folder.is_file():
        raise DataError(f"{folder}: is a file, and a folder is wanted")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")


def files(folder: Path) -> list[Path]:
    """All files under `folder` but hidden ones and the system's, in order of names; links are followed."""
    check_folder(folder)
    return list(_files(folder, ()))


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    here = folder.resolve()
    if here in above:  # a link to a folder that it lies in
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _files(entry, (*above, here))
        elif entry.is_file():
            yield entry
        elif entry.is_symlink():
            raise DataError(f"{entry}: a link to what is not there")


def with_suffix(folder: Path, *suffixes: str) -> list[Path]:
    return [path for path in files(folder) if path.suffix.lower() in suffixes]


def image_files(folder: Path) -> list[Path]:
    """The images under `folder`. Raises DataError where there is none, or one of a kind that is not read."""
    found = files(folder)
    for path in found:
        if path.suffix.lower() in OTHER_SUFFIXES:
            raise DataError(f"{path}: images of this kind are not read; convert it to PNG, or move it away")
    images = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not images:
        raise DataError(f"{folder}: holds no images ({', '.join(SUFFIXES)}){_instead(found)}")
    return images


def _instead(found: list[Path]) -> str:
    kinds = sorted({path.suffix.lower() or path.name for path in found})
    return f", but files of other kinds ({', '.join(kinds[:5])})" if kinds else ""


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The images of every class: of every folder in `folder`. Empty where all images lie in `folder` itself.

    Names are compared as they are seen: macOS and Linux may spell an accent by other characters (NFD, NFC).
    Raises DataError for a class without images, an image beside class folders, and two names that look alike.
    """
    images = image_files(folder)
    beside = [path for path in images if path.parent == folder]
    if len(beside) == len(images):
        return {}
    if beside:
        raise DataError(
            f"{beside[0]}: lies beside class folders; move it into one of them, or all images to the top"
        )
    found: dict[str, list[Path]] = {}
    names: dict[str, str] = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not hidden(path.name)):
        name = unicodedata.normalize("NFC", place.name)
        if name in names:
            raise DataError(
                f"{folder}: holds two folders that look alike, {names[name]!a} and {place.name!a}"
            )
        names[name] = place.name
        found[name] = image_files(place)
    return dict(sorted(found.items()))


def same_classes(one: Path, names: Iterable[str], other: Path, others: Iterable[str]) -> None:
    """Raises DataError where two folders have not the same classes."""
    a, b = set(names), set(others)
    if a != b:
        raise DataError(
            f"{other}: its classes must be those of {one}; only in {one.name}: {sorted(a - b) or 'none'}, "
            f"only in {other.name}: {sorted(b - a) or 'none'}"
        )
