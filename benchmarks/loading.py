"""Measures the way from a snapshot to the first step of a training: time, and the most memory that it takes.

    python benchmarks/loading.py [--events 20000000] [--users 138493] [--items 26744] [--recipe neumf] [--store DIR]

Writes a snapshot of made-up events, in parts of a million rows in the order of their time, as the service does, and
starts a production training on it in a process of its own, which stops after its first steps. Prints one JSON line for
each figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ml.production import Training, produce
from ml.progress import Reporter
from ml.recipes import recipe_named
from ml.snapshots import DEFAULT_MEANINGS, make_snapshot, publish, write_part
from ml.store import FolderStore

PART_ROWS = 1_000_000
MOST_SECONDS = 60.0
MOST_GIB = 4.0


class FirstStep(Exception):  # noqa: N818
    """The training has begun."""


class StopAtFirstStep(Reporter):
    """Notes when each phase began, and ends the training as soon as it tells of a step."""

    def __init__(self) -> None:
        super().__init__(as_json=True)
        self.began: dict[str, float] = {}

    def emit(self, kind: str, text: str, **values: Any) -> None:  # noqa: ARG002
        if kind == "phase":
            self.began[values["phase"]] = time.perf_counter()
        elif kind in ("progress", "epoch"):
            raise FirstStep


def generate(folder: Path, events: int, users: int, items: int) -> str:
    """Write a snapshot of events by users and of items some of which are far more popular than others."""
    store, random = FolderStore(folder), np.random.default_rng(0)
    user_ids = pa.array([f"user-{number:08}" for number in range(users)])
    item_ids = pa.array([f"item-{number:08}" for number in range(items)])
    parts = []
    for first in range(0, events, PART_ROWS):
        size = min(PART_ROWS, events - first)
        position = np.arange(first, first + size)
        chosen_users = (users * random.random(size) ** 2).astype(np.int64)
        chosen_items = (items * random.random(size) ** 3).astype(np.int64)
        columns = {
            "position": pa.array(position),
            "user_id": user_ids.take(pa.array(chosen_users)),
            "item_id": item_ids.take(pa.array(chosen_items)),
            "type": pa.array(["view"]).take(pa.array(np.zeros(size, np.int64))),
            "time": pa.array(1_700_000_000_000_000 + position * 1_234_567, pa.timestamp("us", tz="UTC")),
            "value": pa.nulls(size, pa.float64()),
        }
        parts.append(write_part(store, pa.table(columns)))
    watermark = {"position": events, "transaction_id": None, "time": None, "erasures_through": 0}
    snapshot = make_snapshot(parts, DEFAULT_MEANINGS, watermark)
    publish(store, snapshot)
    return snapshot.hash


def load(folder: Path, snapshot: str, recipe: str) -> dict[str, float]:
    """Start a training in this process and say what it took to get to its first steps."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    report, started = StopAtFirstStep(), time.perf_counter()
    with contextlib.suppress(FirstStep):
        produce(Training(snapshot=snapshot, recipe=recipe_named(recipe)), str(folder), None, report)
    ended, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": ended - started,
        "processor_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "until_fit": report.began["fit"] - started,
        "gib": used.ru_maxrss / 2**20,
    }


def measured(folder: Path, snapshot: str, recipe: str) -> dict[str, float]:
    """What `load` says of a fresh process."""
    command = [sys.executable, __file__, "--store", str(folder), "--snapshot", snapshot, "--recipe", recipe]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(name: str, found: dict[str, float]) -> bool:
    """Print a JSON line for each figure; returns whether both are reached."""
    print(f"{name}: {found}", file=sys.stderr)
    figures = [("seconds", found["seconds"], MOST_SECONDS), ("gib", found["gib"], MOST_GIB)]
    for figure, value, must in figures:
        line = {"name": f"loading/{name}/{figure}", "value": round(value, 2), "must": must, "reach": must}
        print(json.dumps({**line, "met": value < must}), flush=True)
    return all(value < must for _, value, must in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the way from a snapshot to the first step.")
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=138_493)
    parser.add_argument("--items", type=int, default=26_744)
    parser.add_argument("--recipe", action="append", help="neumf and caser unless others are named")
    parser.add_argument("--store", type=Path, help="where the snapshot is, or goes to be kept; else it is removed")
    parser.add_argument("--snapshot", help="load this snapshot of the store in this process, and nothing else")
    arguments = parser.parse_args()
    recipes = arguments.recipe or ["neumf", "caser"]
    if arguments.snapshot is not None:
        print(json.dumps(load(arguments.store, arguments.snapshot, recipes[0])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.store or Path(temporary)
        snapshot = generate(folder, arguments.events, arguments.users, arguments.items)
        print(f"{arguments.events:,} events in snapshot {snapshot}", file=sys.stderr)
        met = [report(recipe, measured(folder, snapshot, recipe)) for recipe in recipes]
    raise SystemExit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
