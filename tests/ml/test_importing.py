import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ml import importing
from ml.__main__ import app
from ml.importers import RejectLog, TooManyRejects, open_source
from ml.interactions import Interactions
from ml.snapshots import read_parts, read_snapshot
from ml.store import FolderStore, open_store


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_simulated_files_become_a_snapshot_twice_the_same(tmp_path: Path) -> None:
    facts = json.loads(
        run("simulate", "--out", tmp_path / "data", "--users", 50, "--items", 40, "--events", 900, "--json")
    )
    assert facts["events"] == 900
    assert "ml experiment" in run(
        "simulate", "--out", tmp_path / "again", "--users", 50, "--items", 40, "--events", 900
    )
    first = json.loads(run("import", "--data", tmp_path / "data", "--store", tmp_path / "store", "--json"))
    assert (first["events"], first["rejected"], first["watermark"]["position"]) == (900, 0, 900)
    assert first["watermark"]["time"] == facts["through"]
    second = json.loads(run("import", "--data", tmp_path / "data", "--store", tmp_path / "store", "--json"))
    assert second["snapshot"] == first["snapshot"]
    store = open_store(tmp_path / "store")
    snapshot = read_snapshot(store, first["snapshot"])
    interactions = Interactions.from_events(read_parts(store, snapshot), snapshot.meanings)
    assert (len(interactions), interactions.num_users) == (900, 50)
    assert first["snapshot"] in run("import", "--data", tmp_path / "data", "--store", tmp_path / "store")


def test_a_full_disk_leaves_no_snapshot(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    data, store = tmp_path / "events.csv", tmp_path / "store"
    data.write_text("\n".join(["user_id,item_id", *(f"user-{row % 50},item-{row}" for row in range(900))]))
    arguments = ["import", "--data", str(data), "--store", str(store), "--json"]
    with full_disk(1_000):
        refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    _, error = refused.stderr.splitlines()
    assert error.startswith("error: [Errno")
    assert "/parts/" in error
    assert not [file for file in store.rglob("*") if file.is_file()]
    assert json.loads(run(*arguments))["events"] == 900


def test_named_columns_and_rejects(tmp_path: Path) -> None:
    data = tmp_path / "log.csv"
    data.write_text("who,what\na,x\nb,y/z\na,y\n")
    columns = ["--column", "user=who", "--column", "item=what"]
    options = ["--data", data, "--store", tmp_path / "store", "--rejects", tmp_path / "rejects.csv"]
    text = run("import", *options, *columns, "--max-bad-share", 0.5)
    assert "2 events in 1 parts, 1 rows refused" in text
    assert "item id holds a slash" in (tmp_path / "rejects.csv").read_text()
    for wrong, message in (
        (columns, "more than 5.0%"),
        (["--column", "who"], "names no column"),
        ([], "no column 'user_id'"),
    ):
        result = CliRunner().invoke(app, ["import", *map(str, options), *wrong])
        assert result.exit_code == 2
        assert message in result.stderr


def test_bad_rows_never_take_the_place_of_the_events(tmp_path: Path) -> None:
    data = tmp_path / "events.csv"
    data.write_text("user_id,item_id\nu,i\n")
    arguments = ["import", "--data", data, "--store", tmp_path / "store", "--rejects", tmp_path / "." / "events.csv"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code, data.read_text()) == (2, "user_id,item_id\nu,i\n")


def test_parts_hold_the_same_events_however_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "pairs.txt"
    data.write_text("".join(f"u{number % 7} i{number}\n" for number in range(250)))
    monkeypatch.setattr(importing, "ROWS_PER_PART", 100)
    store = FolderStore(tmp_path / "store")
    with RejectLog() as rejects:
        snapshot = importing.import_snapshot(open_source(data), store, rejects)
    assert [part.rows for part in snapshot.parts] == [100, 100, 50]
    tables = list(read_parts(store, snapshot))
    assert [number for table in tables for number in table.column("position").to_pylist()] == list(range(1, 251))
    interactions = Interactions.from_events(tables, snapshot.meanings)
    assert interactions.items.ids(interactions.history(0)[:3]) == ["i0", "i7", "i14"]


def test_what_is_taken_back_is_so_in_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "ROWS_PER_PART", 2)
    data = tmp_path / "events.jsonl"
    rows = [("e0", "retract", "a", "e3"), *((f"e{n}", "view", "abc"[n % 3], None) for n in range(5))]
    data.write_text(
        "".join(
            json.dumps({"event_id": id_, "user_id": "u", "item_id": item, "type": type_, "retracts": retracts}) + "\n"
            for id_, type_, item, retracts in rows
        )
    )
    store = open_store(tmp_path / "store")
    found = json.loads(run("import", "--data", data, "--store", tmp_path / "store", "--json"))
    assert (found["events"], found["watermark"]["position"]) == (6, 6)
    snapshot = read_snapshot(store, found["snapshot"])
    interactions = Interactions.from_events(read_parts(store, snapshot), snapshot.meanings)
    assert interactions.items.ids(interactions.item_index) == ["a", "b", "c", "b"]


def test_what_is_refused_leaves_no_snapshot(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    bad = tmp_path / "pairs.txt"
    bad.write_text("a\nb\nc x\n")
    with pytest.raises(TooManyRejects, match="2 of 3 rows"), RejectLog() as rejects:
        importing.import_snapshot(open_source(bad), store, rejects)
    assert store.list("snapshots") == []
    bad.write_text("a\n")
    with pytest.raises(ValueError, match="holds no event"), RejectLog(max_bad_share=1) as rejects:
        importing.import_snapshot(open_source(bad), store, rejects)
