"""Checkpoints: everything a training needs to go on to the last digit as if it had never stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT = 2


def save_checkpoint(path: Path, fingerprint: str, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all: a kill at any moment leaves the last one in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "fingerprint": fingerprint, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:
        # On a full disk PyTorch fails once more as it closes its archive, which hides the reason.
        if not isinstance(error.__context__, OSError):
            raise
        raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Read a checkpoint, or return None where there is none.

    Raises ValueError when it is damaged or was written by another training: other data, recipe, seed, device or number
    of processes.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        written, found, state = content["format"], content["fingerprint"], content["state"]
    except Exception as error:
        raise ValueError(
            f"the checkpoint {path} cannot be read ({error}); delete it to train from the start"
        ) from error
    if written != FORMAT or found != fingerprint:
        raise ValueError(
            f"the checkpoint {path} belongs to a training with other data, recipe, seed or device, or number of "
            "processes; "
            "delete it, or give this training another checkpoint"
        )
    assert isinstance(state, dict)
    return state
