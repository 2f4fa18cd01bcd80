"""Files that are written whole or not at all, and folders that hold one run at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"


class WriteError(OSError):
    """A file or folder cannot be written; the message names it and the cause."""


class FolderError(ValueError):
    """A folder cannot take a run; the message names it and says what to do."""


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written; at the end it takes the place of `path`, after an error it is gone.

    A reader finds the old file or the new, whole, also after a crash of the machine.
    Raises WriteError where the disk, or the rights to it, do not suffice.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        os.close(handle)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {_cause(error)}") from error
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise WriteError(f"{path}: cannot be written: {_cause(error)}") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write(path: Path, text: str) -> None:
    """All or nothing: a reader never sees half a file. Raises WriteError."""
    with unfinished(path) as beside:
        beside.write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Make the folder if it is missing. Raises WriteError now, not after the work, where it takes no file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))  # a full disk still makes empty files
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written to: {_cause(error)}") from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder is this process's alone, and what killed runs left half written there is removed.

    Raises WriteError where it takes no file, FolderError where another process has it.
    """
    check_writable(folder)
    try:
        import fcntl
    except ImportError:  # not a Unix: nothing holds two runs apart
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FolderError(f"{folder}: another run is writing there") from None
        for left in folder.rglob(f".*{UNFINISHED}"):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)


def _cause(error: OSError) -> str:
    return error.strerror or str(error)
