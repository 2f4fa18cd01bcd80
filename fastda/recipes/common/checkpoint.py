"""Checkpoints that are either whole or refused: tensors and a JSON state in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastda import files


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file."""


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def save(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write tensors, settings and whatever else JSON can hold, whole or not at all.

    `settings` decide whether a training may go on from this checkpoint; `state` is its progress.
    """
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    metadata = {
        "settings": json.dumps(settings),
        "state": json.dumps(state),
        "digest": digest(tensors),
    }
    with files.unfinished(path) as beside:
        try:
            save_file(tensors, beside, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, settings and state. Raises CheckpointError where the file is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings, state = json.loads(metadata["settings"]), json.loads(metadata["state"])
        intact = metadata["digest"] == digest(tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({error}); delete it to start anew"
        ) from error
    if not intact:
        raise CheckpointError(
            f"{path}: damaged (its digest does not match its weights); delete it to start anew"
        )
    return tensors, settings, state


def check_settings(path: Path, stored: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises CheckpointError with the list of settings in which a checkpoint differs from this training."""
    changed = sorted(k for k in mine.keys() | stored.keys() if mine.get(k) != stored.get(k))
    if changed:
        listing = ", ".join(f"{k} {stored.get(k)!r} → {mine.get(k)!r}" for k in changed)
        raise CheckpointError(f"{path}: was made with other settings ({listing})")
