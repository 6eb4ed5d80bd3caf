import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ml.checkpoint import load_checkpoint, save_checkpoint
from ml.fold_in import STRENGTHS
from ml.production import Training, produce, run_command
from ml.progress import Reporter
from ml.recipes import apply_overrides, recipe_named
from ml.registry import Manifest, Registry, VersionDamaged
from ml.retrieval import probes_worth
from ml.snapshots import DEFAULT_MEANINGS, PART_SCHEMA, make_snapshot, publish, write_part
from ml.store import FolderStore
from ml.versions import interactions_of, microseconds, rfc3339

START = 1_700_000_000_000_000
SETTINGS = {"epochs": "3", "factors": "8", "negatives": "8", "batch_size": "128", "learning_rate": "0.02"}


def events(
    users: int = 60, items: int = 32, each: int = 8, since: int = START, first_user: int = 0, seed: int = 0
) -> pa.Table:
    """Users who keep to one of four tastes; one event a second, users taking turns."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(first_user, first_user + users):
        liked = generator.permutation([item for item in range(items) if item % 4 == user % 4])[:each]
        rows += [(f"u{user}", f"i{item}", turn * users + user) for turn, item in enumerate(liked)]
    rows.sort(key=lambda row: row[2])
    user_ids, item_ids, seconds = zip(*rows, strict=True)
    size = len(rows)
    return pa.table(
        {
            "position": pa.array(range(size), pa.int64()),
            "user_id": pa.array(user_ids),
            "item_id": pa.array(item_ids),
            "type": pa.array(["view"] * size),
            "value": pa.array([None] * size, pa.float64()),
            "time": pa.array([since + second * 1_000_000 for second in seconds], pa.timestamp("us", "UTC")),
            "retracts": pa.array([None] * size, pa.int64()),
        },
        schema=PART_SCHEMA,
    )


def snapshot_of(store: FolderStore, *tables: pa.Table) -> str:
    snapshot = make_snapshot(
        [write_part(store, table) for table in tables],
        DEFAULT_MEANINGS,
        {"position": 1, "transaction_id": None, "time": None, "erasures_through": 0},
    )
    publish(store, snapshot)
    return snapshot.hash


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


class Recorder(Reporter):
    """Keeps the lines instead of writing them; may kill the training at one of them."""

    def __init__(self, stop_at: tuple[str, str] | None = None) -> None:
        super().__init__(as_json=True)
        self.lines: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def emit(self, kind: str, text: str, **values: Any) -> None:
        self.lines.append(json.loads(json.dumps({"kind": kind, **values}, allow_nan=False)))
        if self.stop_at == (kind, values.get("phase")) and values.get("epoch", 2) == 2:
            raise KeyboardInterrupt

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    def phases(self) -> list[str]:
        return [line["phase"] for line in self.of_kind("phase")]


def training(snapshot: str, recipe: str = "matrix_factorization", **values: Any) -> Training:
    chosen = recipe_named(recipe)
    if recipe != "popularity":
        chosen = apply_overrides(chosen, SETTINGS)
    return Training(snapshot=snapshot, recipe=chosen, **values)


def test_a_training_is_evaluated_refitted_and_published(store: FolderStore, tmp_path: Path) -> None:
    snapshot = snapshot_of(store, events())
    report = Recorder()
    made = produce(training(snapshot, version="v1", run_id="r", run_epoch=1), str(store.path), None, report)
    assert report.phases() == ["load", "fit", "evaluate", "refit", "publish"]
    [evaluated], [published] = report.of_kind("evaluated"), report.of_kind("published")
    assert evaluated["compared"] is None
    assert published["version"] == "v1"
    assert [line["epoch"] for line in report.of_kind("epoch") if line["phase"] == "fit"] == [1, 2, 3]
    assert all("ndcg@10" in line["validation"] for line in report.of_kind("epoch") if line["phase"] == "fit")
    recommender, manifest = Registry(store).load("v1")
    assert manifest == made
    assert manifest.refit
    assert (manifest.snapshot, manifest.run_id, manifest.run_epoch, manifest.parent_version) == (snapshot, "r", 1, None)
    assert manifest.trained_through == rfc3339(START + (60 * 8 - 1) * 1_000_000)
    assert manifest.metrics["test"] == evaluated["test"]
    assert manifest.metrics["popularity"]["ndcg@10"] >= 0
    on = manifest.metrics["evaluated_on"]
    assert (on["snapshot"], on["split"], on["interactions"]) == (snapshot, "leave-one-out", 60)
    assert on["through"] == manifest.trained_through
    assert (recommender.num_users, recommender.num_items) == (60, 32)
    assert recommender.prior_strength == manifest.prior_strength
    assert manifest.prior_strength in STRENGTHS


def test_what_an_index_finds_is_measured_where_a_service_may_build_one(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = snapshot_of(store, events())
    assert produce(training(snapshot, version="small"), str(store.path), None, Recorder()).retrieval is None
    monkeypatch.setattr("ml.production.RETRIEVAL_MEASURED_FROM", 32)
    produce(training(snapshot, "matrix_factorization", version="large"), str(store.path), None, Recorder())
    recommender, manifest = Registry(store).load("large")
    assert manifest.retrieval is not None
    assert manifest.retrieval["recall"] == 1.0  # of 32 items, all are candidates once all lists are looked into
    assert (manifest.retrieval["users"], manifest.retrieval["lists"]) == (60, 8)
    exact = recommender.top_k([3], [[]], [[1]], 5)[0]
    recommender.prepare(probes=probes_worth(manifest.retrieval))
    assert recommender.retrieves
    assert recommender.top_k([3], [[]], [[1]], 5)[0].tolist() == exact.tolist()


def test_popularity_goes_the_same_way(store: FolderStore) -> None:
    snapshot = snapshot_of(store, events())
    produce(training(snapshot, "popularity", version="p"), str(store.path), None, Recorder())
    recommender, manifest = Registry(store).load("p")
    assert manifest.metrics["test"] == manifest.metrics["popularity"]
    # Refitted: the counts hold every interaction.
    assert float(recommender.model.state_dict()["counts"].sum()) == 480


@pytest.mark.parametrize(
    "stop_at", [("phase", "evaluate"), ("epoch", "fit"), ("phase", "refit"), ("epoch", "refit"), ("phase", "publish")]
)
def test_a_training_that_was_killed_goes_on(store: FolderStore, tmp_path: Path, stop_at: tuple[str, str]) -> None:
    snapshot = snapshot_of(store, events())
    whole = produce(training(snapshot, version="whole"), str(store.path), None, Recorder())
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        produce(training(snapshot, version="run-1", run_epoch=1), str(store.path), work, Recorder(stop_at))
    assert Registry(store).names() == ["whole"]
    report = Recorder()
    again = produce(training(snapshot, version="run-2", run_epoch=2), str(store.path), work, report)
    assert again.files["model"].sha256 == whole.files["model"].sha256
    assert again.metrics["test"] == whole.metrics["test"]
    assert again.run_epoch == 2
    if stop_at[1] in ("refit", "publish"):
        assert "fit" not in report.phases()
    else:
        # Epochs that are over are not trained again; the one whose end was cut off is.
        trained = [line["epoch"] for line in report.of_kind("epoch") if line["phase"] == "fit"]
        assert trained == ([2, 3] if stop_at == ("epoch", "fit") else [])
    assert not list(work.glob("*.checkpoint"))
    # Once more, and nothing is done twice.
    report = Recorder()
    assert produce(training(snapshot, version="run-2", run_epoch=2), str(store.path), work, report) == again
    assert [line["kind"] for line in report.lines] == ["published"]


def test_a_training_taken_up_again_compares_with_what_is_active_now(store: FolderStore, tmp_path: Path) -> None:
    old = snapshot_of(store, events(each=6))
    for name in ("active-1", "active-2"):
        produce(training(old, version=name), str(store.path), None, Recorder())
    snapshot = snapshot_of(store, events(each=8))
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        produce(
            training(snapshot, version="a", compare="active-1"), str(store.path), work, Recorder(("phase", "refit"))
        )
    report = Recorder()
    made = produce(training(snapshot, version="b", compare="active-2"), str(store.path), work, report)
    assert made.metrics["compared"]["version"] == "active-2"
    assert {line["phase"] for line in report.of_kind("epoch")} == {"refit"}


def test_a_workspace_of_another_training_is_not_taken_up(store: FolderStore, tmp_path: Path) -> None:
    snapshot = snapshot_of(store, events())
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        produce(training(snapshot, version="a", seed=1), str(store.path), work, Recorder(("phase", "publish")))
    report = Recorder()
    produce(training(snapshot, version="b", seed=2), str(store.path), work, report)
    assert report.phases() == ["load", "fit", "evaluate", "refit", "publish"]
    for other in ({"run_id": "other"}, {"seed": 3}, {"seed": 2, "warm_start": "b"}):
        with pytest.raises(ValueError, match="another training's"):
            produce(training(snapshot, version="b", **other), str(store.path), None, Recorder())


def test_the_second_of_two_equal_trainings_at_once_ends_with_the_version_of_the_first(
    store: FolderStore, tmp_path: Path
) -> None:
    snapshot = snapshot_of(store, events())

    class Overtaken(Recorder):
        def emit(self, kind: str, text: str, **values: Any) -> None:
            super().emit(kind, text, **values)
            if (kind, values.get("phase")) == ("phase", "publish"):
                first.append(produce(training(snapshot, version="a"), str(store.path), None, Recorder()))

    first: list[Manifest] = []
    second = produce(training(snapshot, version="a"), str(store.path), tmp_path / "work", Overtaken())
    assert [second] == first
    assert not list((tmp_path / "work").rglob("*.checkpoint"))


def test_a_warm_start_copies_rows_by_id_and_is_tested_on_what_is_new(store: FolderStore) -> None:
    old = events()
    first = snapshot_of(store, old)
    parent = produce(training(first, "caser", version="old"), str(store.path), None, Recorder())
    # Forty known users do two or more new things, ten new users come.
    later = events(users=50, items=36, each=3, since=START + 10**12, first_user=20, seed=9)
    both = snapshot_of(store, old, later)
    report = Recorder()
    made = produce(
        training(both, "caser", version="new", warm_start="old", compare="old"), str(store.path), None, report
    )
    assert made.parent_version == "old"
    [fit] = [line for line in report.of_kind("phase") if line["phase"] == "fit"]
    assert fit["warm"] is True
    on = made.metrics["evaluated_on"]
    assert on["warm"] is True
    assert parent.trained_through is not None
    assert microseconds(on["from"]) > microseconds(parent.trained_through)
    compared = made.metrics["compared"]
    assert compared["version"] == "old"
    assert compared["interactions"] <= on["targets"]
    assert 0 <= compared["this"] <= 1
    assert 0 <= compared["that"] <= 1
    interactions = interactions_of(store, both)
    assert len(interactions.users) == 70


def test_a_warm_start_without_news_is_tested_from_scratch(store: FolderStore) -> None:
    snapshot = snapshot_of(store, events())
    produce(training(snapshot, version="old"), str(store.path), None, Recorder())
    report = Recorder()
    made = produce(training(snapshot, version="new", warm_start="old", compare="old"), str(store.path), None, report)
    # The old version has seen all there is: no honest test of its heirs, nor of itself, is left.
    assert made.metrics["evaluated_on"]["warm"] is False
    assert made.metrics["compared"] == {"version": "old", "interactions": 0, "this": None, "that": None}
    # What is published is what was measured, made from scratch.
    cold = produce(training(snapshot, version="cold"), str(store.path), None, Recorder())
    assert made.files["model"].sha256 == cold.files["model"].sha256
    assert made.parent_version is None
    [note] = report.of_kind("note")
    assert "trained from scratch, not from old" in note["message"]


def test_a_warm_start_needs_the_same_model(store: FolderStore) -> None:
    snapshot = snapshot_of(store, events())
    produce(training(snapshot, version="old"), str(store.path), None, Recorder())
    other, report = training(snapshot, "caser", version="new", warm_start="old"), Recorder()
    with pytest.raises(ValueError, match="cannot start from version old: a MatrixFactorization; train without"):
        produce(other, str(store.path), None, report)
    wider = replace(other, recipe=apply_overrides(recipe_named("matrix_factorization"), SETTINGS | {"factors": "7"}))
    with pytest.raises(ValueError, match="cannot start from version old: factors is 8 there and 7 here; train without"):
        produce(wider, str(store.path), None, report)
    assert report.phases() == ["load", "load"]
    with pytest.raises(VersionDamaged, match="no version lost"):
        produce(training(snapshot, version="new", warm_start="lost"), str(store.path), None, Recorder())


def test_a_damaged_version_to_compare_does_not_stop_a_training(store: FolderStore) -> None:
    snapshot = snapshot_of(store, events())
    report = Recorder()
    made = produce(training(snapshot, version="new", compare="lost"), str(store.path), None, report)
    assert made.metrics["compared"] is None
    assert "no version lost" in report.of_kind("note")[0]["message"]


@pytest.mark.parametrize(
    "table",
    [
        events().slice(0, 0),
        events(users=5, each=2),
        events(users=1, items=4, each=1),
        events(users=20, items=4, each=8),
    ],
    ids=["nothing", "two each", "one event", "one item a user"],
)
def test_too_little_data_is_a_clear_error(
    store: FolderStore, table: pa.Table, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(store, snapshot_of(store, table)) == 2
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert not [line for line in lines if line["kind"] == "epoch"]
    assert lines[-1]["kind"] == "error"
    assert "interaction" in lines[-1]["message"]


@pytest.mark.parametrize("recipe", ["neumf", "caser", "matrix_factorization", "popularity"])
@pytest.mark.parametrize(
    "table",
    [
        events(users=1, items=32, each=8),
        events(users=1, items=12, each=3),
        events().set_column(5, "time", events()["time"].take([0] * 480)),
    ],
    ids=["one user", "three events", "one moment"],
)
def test_little_data_gives_a_sound_result(
    store: FolderStore, table: pa.Table, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(store, snapshot_of(store, table), recipe) == 0, capsys.readouterr().out
    manifest = Registry(store).versions()[0]
    assert all(np.isfinite(value) for value in manifest.metrics["test"].values())


def run(store: FolderStore, snapshot: str, recipe: str = "matrix_factorization", **values: Any) -> int:
    arguments: dict[str, Any] = {
        "snapshot_hash": snapshot,
        "store_url": str(store.path),
        "recipe_name": recipe,
        "settings": [] if recipe == "popularity" else ["epochs=2", "factors=4", "negatives=4"],
        "version": None,
        "run_id": None,
        "run_epoch": None,
        "warm_start": None,
        "compare": None,
        "checkpoint_dir": None,
        "seed": 0,
        "device": "cpu",
        "exit_with_stdin": False,
        "as_json": True,
    }
    return run_command(**(arguments | values))


def test_bad_arguments_are_error_lines(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = snapshot_of(store, events())
    for values, reason in (
        ({"recipe_name": "nope"}, "the recipes are"),
        ({"settings": ["negatives=-1"]}, "negatives must be"),
        ({"settings": ["colour=red"]}, "unknown setting"),
        ({"version": "../x"}, "cannot name a version"),
        ({"snapshot_hash": "0" * 64}, "snapshot"),
        ({"settings": ["learning_rate=1e30", "epochs=3"]}, "finite"),
    ):
        assert run(store, **({"snapshot": snapshot} | values)) == 2
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert line["kind"] == "error"
        assert reason in line["message"]
    assert Registry(store).names() == []


def test_the_process_speaks_json_lines_and_dies_with_its_parent(store: FolderStore, tmp_path: Path) -> None:
    snapshot = snapshot_of(store, events())
    command = [sys.executable, "-m", "ml", "train", "--snapshot", snapshot, "--store", str(store.path)]
    command += ["--recipe", "matrix_factorization", "--set", "factors=4", "--json", "--exit-with-stdin"]
    done = subprocess.Popen(
        [*command, "--set", "epochs=1", "--version", "v1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert done.stdin is not None
    assert done.stdout is not None
    lines = [json.loads(line) for line in done.stdout]  # the pipe stays open meanwhile
    assert done.wait() == 0
    done.stdin.close()
    done.stdout.close()
    assert lines[0] == {"kind": "phase", "phase": "load"}
    assert lines[-1]["kind"] == "published"
    with subprocess.Popen(
        [*command, "--set", "epochs=100000", "--set", "patience=100000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as orphan:  # fmt: skip
        assert orphan.stdout is not None
        assert orphan.stdin is not None
        for line in orphan.stdout:
            if json.loads(line)["kind"] == "epoch":
                break
        orphan.stdin.close()
        orphan.stdout.read()
        assert orphan.wait() == 3


@pytest.mark.parametrize("checkpoints", [True, False], ids=["checkpoint", "publish"])
def test_a_full_disk_leaves_no_version(
    store: FolderStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    full_disk: Callable[[int], AbstractContextManager[None]],
    checkpoints: bool,
) -> None:
    snapshot = snapshot_of(store, events())
    values = {"version": "v1", "checkpoint_dir": tmp_path / "work" if checkpoints else None, "as_json": False}
    settings = [f"{key}={value}" for key, value in (SETTINGS | {"epochs": "1"}).items()]

    def train() -> int:
        return run(store, snapshot, "neumf", settings=settings, **values)

    with full_disk(4_000):
        assert train() == 2
    written = capsys.readouterr()
    errors = [line for line in (written.out + written.err).splitlines() if "rror" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert "File too large" in errors[0]
    assert Registry(store).names() == []
    assert not [file for file in tmp_path.rglob("*") if "temporary" in file.name or file.suffix == ".tmp"]

    assert train() == 0
    assert Registry(store).load("v1")[1].version == "v1"


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "fit.checkpoint"
    save_checkpoint(path, "this", {"epoch": 1})
    with full_disk(200_000), pytest.raises(OSError, match=r"File too large: '.*fit\.checkpoint'"):
        save_checkpoint(path, "this", {"epoch": 2, "weights": torch.zeros(100_000)})
    assert load_checkpoint(path, "this") == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["fit.checkpoint"]
