import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import Tensor, distributed
from typer.testing import CliRunner

from ml.__main__ import app
from ml.distributed import Processes, joined, shares
from ml.evaluate import popularity_of
from ml.experiment import SplitEvaluator
from ml.interactions import Interactions
from ml.recipes import RECIPES, Recipe, apply_overrides
from ml.registry import Registry
from ml.snapshots import DEFAULT_MEANINGS, make_snapshot, publish, write_part
from ml.split import leave_one_out
from ml.store import FolderStore
from ml.train import train
from ml.versions import interactions_of

ROOT = Path(__file__).parents[2]
RANKS = 2


def checkerboard(users: int = 20, items: int = 400, each: int = 15) -> Interactions:
    """Users of one colour take only items of that colour; later users more of them, many items nobody."""
    random = np.random.default_rng(0)
    rows = [
        (f"u{user:02}", f"i{2 * item + user % 2:03}")
        for user in range(users)
        for item in random.permutation(items // 2)[: each + user]
    ]
    return Interactions.from_arrays([user for user, _ in rows], [item for _, item in rows])


BOARD = checkerboard()


def recipe(name: str, **overrides: str) -> Recipe:
    sizes = {"factors": "8", "negatives": "12", "batch_size": "32", "epochs": "4", "initial_scale": "0.1"}
    if name == "neumf":
        sizes |= {"tower_factors": "4", "hidden": "8,4"}
    elif name == "caser":
        sizes |= {"targets": "3", "dropout": "0", "embedding_dropout": "0", "unknown_user_share": "0"}
    return apply_overrides(RECIPES[name], sizes | overrides)


def share_of(data: Interactions, rank: int) -> Interactions:
    bounds = shares(np.diff(data.offsets), RANKS)
    return data.select((data.user_index >= bounds[rank]) & (data.user_index < bounds[rank + 1]))


class Recording(Processes):
    """Remembers which of its examples this process took in each step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.parts: list[Tensor] = []

    def part(self, order: Tensor, step: int, steps: int, batch_size: int) -> Tensor:
        self.parts.append(super().part(order, step, steps, batch_size))
        return self.parts[-1]


class Replaying(Processes):
    """One process that takes in each step the examples that several took together, and their samples."""

    def __init__(self, parts: list[Tensor]) -> None:
        super().__init__()
        self.parts = parts

    def part(self, order: Tensor, step: int, steps: int, batch_size: int) -> Tensor:
        return self.parts.pop(0)

    def common_generator(self, seed: int, own: torch.Generator) -> torch.Generator:
        return Processes(0, RANKS).common_generator(seed, own)


def joint(target: Callable[..., None], *arguments: Any) -> list[Any]:
    """Start `target(rank, port, *arguments)` in as many processes as there are ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ml.production"])  # PyTorch is imported once for all
    started = [context.Process(target=target, args=(rank, port, *arguments)) for rank in range(RANKS)]
    for process in started:
        process.start()
    return started


def join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", timeout=timedelta(minutes=2), rank=rank, world_size=RANKS
    )


def ended(started: list[Any]) -> list[int | None]:
    for process in started:
        process.join(250)
    return [process.exitcode for process in started]


CASES = {
    # Pairwise and softmax losses leave NeuMF's last layers directions without a gradient, where Adam follows rounding.
    "neumf": {"loss": "bce", "l2": "0.01"},
    "neumf-fast": {"loss": "bce", "tower_factors": "4", "hidden": "8,4", "targets": "1", "embedding_dropout": "0"},
    "caser": {},
    "matrix_factorization": {
        "l2": "0.01",
        "recency": "0.5",
        "user_balance": "0.3",
        "loss": "bpr",
        "sampling": "popularity",
    },
    "more processes than examples": {"batch_size": "1", "epochs": "17", "learning_rate": "0.01"},
}


def case(name: str) -> tuple[Recipe, Interactions]:
    if name == "more processes than examples":
        return recipe("matrix_factorization", **CASES[name]), BOARD.select(np.arange(3))
    model = name if name in RECIPES else "matrix_factorization"
    return recipe(model, **CASES[name]), BOARD


def train_all(rank: int, port: int, folder: Path) -> None:
    join(rank, port)
    for number, name in enumerate(CASES):
        settings, data = case(name)
        processes = Recording(rank, RANKS)
        result = train(settings, share_of(data, rank), seed=3, processes=processes)
        torch.save((result.model.state_dict(), processes.parts), folder / f"{number}-{rank}.pt")


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    assert ended(joint(train_all, tmp_path)) == [0, 0]
    for number, name in enumerate(CASES):
        settings, data = case(name)
        (weights, first), (others, second) = (torch.load(tmp_path / f"{number}-{rank}.pt") for rank in range(RANKS))
        assert all(torch.equal(weights[key], others[key]) for key in weights), name
        moved = len(share_of(data, 0))
        parts = [torch.cat((mine, theirs + moved)) for mine, theirs in zip(first, second, strict=True)]
        assert len(parts) >= 50
        # Every example once an epoch, over both processes: by itself, or in a run that ends where the next begins.
        steps = len(parts) // settings.epochs
        taken = sorted(torch.cat(parts[:steps]).tolist())
        lengths = np.diff([*taken, len(data)])
        assert taken[0] == 0, name
        assert lengths.min() >= 1, name
        assert lengths.max() <= settings.targets, name
        assert set(data.offsets[:-1][np.diff(data.offsets) > 0]) <= set(taken), name
        one = train(settings, data, seed=3, processes=Replaying(parts)).model.state_dict()
        for key, value in one.items():
            torch.testing.assert_close(
                weights[key], value, rtol=0, atol=1e-5, msg=lambda text, at=(name, key): f"{at}: {text}"
            )


def events(users: int = 24, items: int = 20, each: int = 8) -> list[tuple[str, str, int]]:
    random = np.random.default_rng(1)
    taken = [(f"u{user}", f"i{item}") for user in range(users) for item in random.permutation(items)[:each]]
    return [(*taken[row], second // 3) for second, row in enumerate(random.permutation(len(taken)))]


def snapshot_of(store: FolderStore, rows: list[tuple[str, str, int]], part_rows: int = 50) -> str:
    """Parts in the order of `rows`, some of whose times tie; a retraction of the third row."""
    parts = []
    for first in range(0, len(rows), part_rows):
        users, items, seconds = zip(*rows[first : first + part_rows], strict=True)
        times = pa.array([1_700_000_000_000_000 + 1_000_000 * second for second in seconds], pa.timestamp("us", "UTC"))
        columns = {
            "position": pa.array(range(first, first + len(users)), pa.int64()),
            "user_id": pa.array(users),
            "item_id": pa.array(items),
            "type": pa.array(["view"] * len(users)),
            "value": pa.nulls(len(users), pa.float64()),
            "time": times,
            "retracts": pa.nulls(len(users), pa.int64()),
        }
        parts.append(write_part(store, pa.table(columns)))
    retraction = {"user_id": ["nobody"], "item_id": ["nothing"], "type": ["retract"], "value": [None], "retracts": [2]}
    late = pa.table({**retraction, "position": [len(rows)], "time": times[:1]})
    parts.append(write_part(store, late))
    watermark = {"position": len(rows), "transaction_id": None, "time": None, "erasures_through": 0}
    snapshot = make_snapshot(parts, DEFAULT_MEANINGS, watermark)
    publish(store, snapshot)
    return snapshot.hash


QUICK = ["--set", "epochs=4", "--set", "factors=4", "--set", "negatives=4", "--set", "batch_size=32"]


def read_all(rank: int, port: int, folder: Path, snapshot: str) -> None:
    join(rank, port)
    with joined("cpu") as processes:
        found = interactions_of(FolderStore(folder), snapshot, processes)
        evaluator = SplitEvaluator(leave_one_out(found), processes=processes)
        popular = popularity_of(evaluator.split.train, processes)
        metrics = evaluator.evaluate(popular, "test").metrics
    frame = found.to_frame()
    frame.to_parquet(folder / f"{rank}.parquet")
    (folder / f"{rank}.json").write_text(json.dumps([metrics, found.items.array.to_pylist()]))


def test_each_process_reads_some_parts_and_ends_with_its_own_users(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    snapshot = snapshot_of(store, events())
    assert ended(joint(read_all, tmp_path, snapshot)) == [0, 0]
    whole = interactions_of(store, snapshot)
    frames = [pd.read_parquet(tmp_path / f"{rank}.parquet") for rank in range(RANKS)]
    assert not set(frames[0].user_id) & set(frames[1].user_id)
    assert abs(len(frames[0]) - len(frames[1])) <= 16
    assert pd.concat(frames, ignore_index=True).equals(whole.to_frame())
    evaluator = SplitEvaluator(leave_one_out(whole))
    expected = evaluator.evaluate(popularity_of(evaluator.split.train), "test").metrics
    for rank in range(RANKS):
        metrics, items = json.loads((tmp_path / f"{rank}.json").read_text())
        assert metrics == pytest.approx(expected)
        assert items == whole.items.array.to_pylist()


def produce_all(rank: int, port: int, folder: Path, arguments: list[str], die_in_epoch: int) -> None:
    join(rank, port)
    if rank == 1 and die_in_epoch:
        count = itertools.count(1)
        validate = SplitEvaluator.stopping_metric

        def die(self: SplitEvaluator, model: Any) -> dict[str, float]:
            if next(count) == die_in_epoch:
                os.kill(os.getpid(), signal.SIGKILL)
            return validate(self, model)

        SplitEvaluator.stopping_metric = die  # type: ignore[method-assign]
    with (folder / f"{rank}.out").open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        app([*arguments], prog_name="ml")


def test_a_process_that_dies_ends_the_training_which_then_goes_on(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    snapshot = snapshot_of(store, events())
    arguments = ["train", "--snapshot", snapshot, "--store", str(store.path), "--recipe", "caser", *QUICK, "--json"]
    kept = [*arguments, "--checkpoint-dir", str(tmp_path / "work")]
    assert ended(joint(produce_all, tmp_path, [*kept, "--version", "again"], 3)) == [2, -signal.SIGKILL]
    lines = [json.loads(line) for line in (tmp_path / "0.out").read_text().splitlines()]
    assert lines[-1]["kind"] == "error"
    assert "another process of this training is gone" in lines[-1]["message"]
    assert Registry(store).names() == []

    assert ended(joint(produce_all, tmp_path, [*kept, "--version", "again"], 0)) == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "0.out").read_text().splitlines()]
    assert next(line["epoch"] for line in lines if line["kind"] == "epoch" and line["phase"] == "fit") == 3
    assert (tmp_path / "1.out").read_text() == ""
    assert ended(joint(produce_all, tmp_path, [*arguments, "--version", "straight"], 0)) == [0, 0]
    again, straight = (Registry(store).load(version)[1] for version in ("again", "straight"))
    assert again.files["model"].sha256 == straight.files["model"].sha256
    assert again.metrics["test"] == straight.metrics["test"]
    assert again.metrics["evaluated_on"]["interactions"] == 24


def test_torchrun_starts_an_experiment(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    rows = [f"{user},{item},{second}" for user, item, second in events()]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(RANKS),
        "-m",
        "ml",
    ]
    command += ["experiment", "--data", str(path), "--recipe", "popularity", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    [line] = done.stdout.splitlines()
    found = json.loads(line)
    alone = CliRunner().invoke(app, command[command.index("experiment") :])
    assert found["test"] == json.loads(alone.stdout)["test"]
    assert found["split"] == json.loads(alone.stdout)["split"]
