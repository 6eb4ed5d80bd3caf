"""What the benchmarks share to run a peer in its own environment, on the same split."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from ml.interactions import Interactions
from ml.split import Split

RECBOLE = Path(__file__).with_name("recbole_peer.py")


def peer_python(given: str | None) -> str | None:
    """The interpreter that has RecBole: as given, or as PEER_PYTHON says."""
    return given or os.environ.get("PEER_PYTHON") or None


def write_files(split: Split, folder: Path) -> Path:
    """Write a split as RecBole reads it; returns the folder within `folder` to train on.

    Leave-one-out becomes one file whose times are places in order, so that RecBole holds out the very same items and
    can make windows; any other split becomes three files.
    """
    # RecBole takes the folder's name for the data set's, and reads files of its own where that is ml-100k.
    folder = folder / "split"
    folder.mkdir(parents=True, exist_ok=True)
    if split.name == "leave-one-out":
        whole = split.train.merge(split.validation).merge(split.test)
        _write(folder / f"{folder.name}.inter", whole, in_order=True)
    else:
        for name, part in (("train", split.train), ("valid", split.validation), ("test", split.test)):
            _write(folder / f"{folder.name}.{name}.inter", part, in_order=False)
    return folder


def run_recbole(
    python: str,
    folder: Path,
    split: Split,
    model: str,
    settings: dict[str, Any],
    epochs: int,
    *,
    hours: float = math.inf,
    seed: int = 0,
    time_rankings: bool = False,
) -> dict[str, Any]:
    """Train one of RecBole's models on written files; returns what recbole_peer.py printed.

    AssertionError if it tested other pairs than the split's.
    """
    command = [python, str(RECBOLE), "--data", str(folder), "--model", model]
    command += ["--settings", json.dumps(settings), "--epochs", str(epochs), "--hours", str(hours), "--seed", str(seed)]
    command += ["--time-rankings"] * time_rankings
    # RecBole writes logs and boards beside it; they go where the files are.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"RecBole's {model} failed:\n{finished.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    assert found["test_pairs"] == pairs_digest(split.test), f"RecBole tested {model} on other pairs"
    return found


def pairs_digest(part: Interactions) -> str:
    """Name the pairs of a part, as recbole_peer.py does."""
    users, items = part.users.ids(part.user_index), part.items.ids(part.item_index)
    lines = sorted(f"{user} {item}" for user, item in zip(users, items, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _write(path: Path, part: Interactions, *, in_order: bool) -> None:
    users, items = part.users.ids(part.user_index), part.items.ids(part.item_index)
    header = "user_id:token\titem_id:token" + ("\ttimestamp:float" if in_order else "")
    # RecBole reads times as 32-bit floats, which hold whole numbers up to 16,777,216: count within each user.
    places = np.arange(len(part)) - np.repeat(part.offsets[:-1], np.diff(part.offsets))
    with path.open("w") as file:
        file.write(header + "\n")
        for user, item, place in zip(users, items, places.tolist(), strict=True):
            file.write(f"{user}\t{item}\t{place}\n" if in_order else f"{user}\t{item}\n")
