"""Snapshots of a live database: nothing lost, nothing twice, on SQLite and PostgreSQL alike."""

import hashlib
import threading
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app.database import create_engine, writing
from app.settings import Settings
from app.tables import erasures, events
from app.tables import snapshots as snapshot_table
from app.training.snapshots import take_snapshot
from ml.snapshots import EventMeaning, Snapshot, part_name, read_parts
from ml.store import FolderStore

START = datetime(2026, 11, 1, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(data_dir=tmp_path, database_url=database_url, store_url=str(tmp_path / "store"), _env_file=None)


def add(connection: Connection, event_ids: Iterable[str], user: str = "u", **values: Any) -> None:
    """Insert an event for each id, a second apart by the number at its end."""
    rows = []
    for event_id in event_ids:
        row = {"user_id": user, "event_id": event_id, "item_id": f"item-{event_id}", "type": "click"}
        time = START + timedelta(seconds=int(event_id[1:]))
        rows.append({**row, "occurred_at": time, "received_at": time, **values})
    connection.execute(sa.insert(events), rows)


def ids(snapshot: Snapshot, store: FolderStore) -> list[str]:
    """The item ids of a snapshot, in its order."""
    return [item for table in read_parts(store, snapshot) for item in table["item_id"].to_pylist()]


def named(*event_ids: str) -> list[str]:
    return [f"item-{event_id}" for event_id in event_ids]


def erase(engine: Engine, kind: str, subject: str) -> None:
    """Erase as the service does: the events and, in the same transaction, the mark of it."""
    column = events.c.user_id if kind == "user" else events.c.item_id
    with writing(engine) as connection:
        through = connection.execute(sa.select(sa.func.max(events.c.position))).scalar_one() or 0
        connection.execute(sa.delete(events).where(column == subject))
        digest = hashlib.sha256(subject.encode()).hexdigest()
        row = {"kind": kind, "subject_sha256": digest, "through_position": through, "erased_at": START}
        connection.execute(sa.insert(erasures).values(row))


def test_a_part_holds_what_was_stored(engine: Engine, store: FolderStore, settings: Settings) -> None:
    with writing(engine) as connection:
        add(connection, ["e1"], user="ann", value=4.5)
        add(connection, ["e2"], user="bob")
    snapshot = take_snapshot(engine, store, settings)
    rows = next(read_parts(store, snapshot)).to_pylist()
    assert rows == [
        {
            "position": 1,
            "user_id": "ann",
            "item_id": "item-e1",
            "type": "click",
            "value": 4.5,
            "time": START + timedelta(seconds=1),
            "retracts": None,
        },
        {
            "position": 2,
            "user_id": "bob",
            "item_id": "item-e2",
            "type": "click",
            "value": None,
            "time": START + timedelta(seconds=2),
            "retracts": None,
        },
    ]
    assert snapshot.watermark["position"] == 2
    assert snapshot.watermark["time"] == "2026-11-01T12:00:02.123456Z"
    assert snapshot.meanings == settings.event_meanings


def test_only_new_events_are_written(engine: Engine, store: FolderStore, settings: Settings) -> None:
    with writing(engine) as connection:
        add(connection, ["e1", "e2"])
    first = take_snapshot(engine, store, settings)
    assert take_snapshot(engine, store, settings) == first
    with writing(engine) as connection:
        add(connection, ["e3"])
    second = take_snapshot(engine, store, settings)
    assert second.parts[0] == first.parts[0]
    assert [part.rows for part in second.parts] == [2, 1]
    assert ids(second, store) == named("e1", "e2", "e3")
    assert second.parent == first.hash
    assert second.hash != first.hash


def test_changed_meanings_make_another_snapshot_of_the_same_parts(
    engine: Engine, store: FolderStore, settings: Settings
) -> None:
    with writing(engine) as connection:
        add(connection, ["e1"])
    first = take_snapshot(engine, store, settings)
    changed = settings.model_copy(update={"event_meanings": {"rating": EventMeaning(minimum_value=4.0)}})
    second = take_snapshot(engine, store, changed)
    assert second.parts == first.parts
    assert second.hash != first.hash
    assert second.meanings == {"rating": EventMeaning(minimum_value=4.0)}


def test_an_empty_database_has_an_empty_snapshot(engine: Engine, store: FolderStore, settings: Settings) -> None:
    assert take_snapshot(engine, store, settings).parts == ()


def test_parts_are_bounded(engine: Engine, store: FolderStore, settings: Settings) -> None:
    wanted = [f"e{number}" for number in range(1, 26)]
    with writing(engine) as connection:
        add(connection, wanted)
    snapshot = take_snapshot(engine, store, settings, rows_per_part=10)
    assert [part.rows for part in snapshot.parts] == [10, 10, 5]
    assert ids(snapshot, store) == named(*wanted)


def test_an_event_committed_late_is_in_the_next_snapshot(
    postgresql_url: str, store: FolderStore, tmp_path: Path
) -> None:
    """A watermark by position would lose e2 for good: its position lies below that of e3."""
    engine = create_engine(postgresql_url)
    settings = Settings(data_dir=tmp_path, database_url=postgresql_url, _env_file=None)
    with writing(engine) as connection:
        add(connection, ["e1"])
    with engine.connect() as slow:
        transaction = slow.begin()
        add(slow, ["e2"])
        with writing(engine) as connection:
            add(connection, ["e3"])
        during = take_snapshot(engine, store, settings)
        assert ids(during, store) == named("e1")
        transaction.commit()
    after = take_snapshot(engine, store, settings)
    assert sorted(ids(after, store)) == named("e1", "e2", "e3")
    assert after.parts[0] == during.parts[0]
    with writing(engine) as connection:
        add(connection, ["e4"])
    assert sorted(ids(take_snapshot(engine, store, settings), store)) == named("e1", "e2", "e3", "e4")
    engine.dispose()


def test_an_insert_under_way_on_sqlite_is_in_the_next_snapshot(
    sqlite_url: str, store: FolderStore, tmp_path: Path
) -> None:
    engine = create_engine(sqlite_url)
    settings = Settings(data_dir=tmp_path, database_url=sqlite_url, _env_file=None)
    with writing(engine) as connection:
        add(connection, ["e1"])
    first = take_snapshot(engine, store, settings)
    with writing(engine) as slow:
        add(slow, ["e2"])
        assert take_snapshot(engine, store, settings) == first
    assert ids(take_snapshot(engine, store, settings), store) == named("e1", "e2")
    engine.dispose()


def test_events_are_neither_lost_nor_doubled_under_concurrent_writers(
    engine: Engine, store: FolderStore, settings: Settings
) -> None:
    written = [[f"e{writer * 1000 + number}" for number in range(40)] for writer in range(4)]

    def write(own: list[str]) -> None:
        for start in range(0, len(own), 4):
            with writing(engine) as connection:
                add(connection, own[start : start + 4])

    writers = [threading.Thread(target=write, args=(own,)) for own in written]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = ids(take_snapshot(engine, store, settings), store)
        assert len(found) == len(set(found))
    for writer in writers:
        writer.join()
    found = ids(take_snapshot(engine, store, settings), store)
    assert sorted(found) == sorted(named(*[event_id for own in written for event_id in own]))


def test_a_retract_names_the_position_of_the_same_users_event(
    engine: Engine, store: FolderStore, settings: Settings
) -> None:
    with writing(engine) as connection:
        add(connection, ["e1"], user="ann")
        add(connection, ["e1"], user="bob")
    take_snapshot(engine, store, settings)
    with writing(engine) as connection:
        add(connection, ["e2"], user="bob", type="retract", retracts="e1")
        add(connection, ["e3"], user="bob", type="retract", retracts="unheard-of")
    tables = list(read_parts(store, take_snapshot(engine, store, settings)))
    assert tables[1]["retracts"].to_pylist() == [2, None]


def test_an_erasure_rewrites_the_parts_that_held_the_subject(
    engine: Engine, store: FolderStore, settings: Settings
) -> None:
    with writing(engine) as connection:
        add(connection, ["e1"], user="ann")
        add(connection, ["e2"], user="bob")
    take_snapshot(engine, store, settings)
    with writing(engine) as connection:
        add(connection, ["e3"], user="cem")
    before = take_snapshot(engine, store, settings)
    erase(engine, "user", "ann")
    after = take_snapshot(engine, store, settings)
    assert ids(after, store) == named("e2", "e3")
    assert after.parts[0].sha256 != before.parts[0].sha256
    assert after.parts[1] == before.parts[1]
    erase(engine, "item", "item-e3")
    assert ids(take_snapshot(engine, store, settings), store) == named("e2")
    # One who comes back counts again, from then on.
    with writing(engine) as connection:
        add(connection, ["e4"], user="ann")
    last = take_snapshot(engine, store, settings)
    assert ids(last, store) == named("e2", "e4")
    assert take_snapshot(engine, store, settings) == last


def test_an_erasure_between_insert_and_snapshot_leaves_no_trace(
    engine: Engine, store: FolderStore, settings: Settings
) -> None:
    with writing(engine) as connection:
        add(connection, ["e1"], user="ann")
    erase(engine, "user", "ann")
    with writing(engine) as connection:
        add(connection, ["e2"], user="ann")
    assert ids(take_snapshot(engine, store, settings), store) == named("e2")


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


def test_a_snapshot_that_was_cut_off_does_not_count(engine: Engine, store: FolderStore, settings: Settings) -> None:
    with writing(engine) as connection:
        add(connection, [f"e{number}" for number in range(1, 8)])
    looks = 0

    def die_at_the_second_part() -> None:
        nonlocal looks
        looks += 1
        if len(store.list("parts")) >= 1:
            raise Killed

    with writing(engine) as connection:
        add(connection, [f"e{number}" for number in range(100, 20_200)])
    with pytest.raises(Killed):
        take_snapshot(engine, store, settings, check=die_at_the_second_part, rows_per_part=10_000)
    assert store.list("parts") != []
    assert store.list("snapshots") == []
    snapshot = take_snapshot(engine, store, settings, rows_per_part=10_000)
    assert len(set(ids(snapshot, store))) == snapshot.rows == 20_107


def test_two_at_once_agree(engine: Engine, store: FolderStore, settings: Settings) -> None:
    with writing(engine) as connection:
        add(connection, [f"e{number}" for number in range(50)])
    taken: list[Snapshot] = []
    both = [threading.Thread(target=lambda: taken.append(take_snapshot(engine, store, settings))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [ids(snapshot, store) for snapshot in taken] == [named(*[f"e{number}" for number in range(50)])] * 2
    assert taken[0].parts == taken[1].parts
    assert len(ids(take_snapshot(engine, store, settings), store)) == 50


def test_a_lost_part_is_written_anew(engine: Engine, store: FolderStore, settings: Settings) -> None:
    with writing(engine) as connection:
        add(connection, ["e1"])
    first = take_snapshot(engine, store, settings)
    store.delete(part_name(first.parts[0].sha256))
    with writing(engine) as connection:
        add(connection, ["e2"])
    assert ids(take_snapshot(engine, store, settings), store) == named("e1", "e2")


def test_a_restored_dump_is_taken_whole_once(postgresql_url: str, store: FolderStore, tmp_path: Path) -> None:
    """A dump brings along the transaction ids of another cluster, which may be far ahead of this one's."""
    engine = create_engine(postgresql_url)
    settings = Settings(data_dir=tmp_path, database_url=postgresql_url, _env_file=None)
    with writing(engine) as connection:
        add(connection, ["e1", "e2"])
    take_snapshot(engine, store, settings)
    with writing(engine) as connection:
        connection.execute(sa.update(events).values(transaction_id=events.c.transaction_id + 1_000_000_000))
        connection.execute(sa.update(snapshot_table).values(cluster="7123/1/5"))
        add(connection, ["e3"])
    restored = take_snapshot(engine, store, settings)
    assert ids(restored, store) == named("e1", "e2", "e3")
    with writing(engine) as connection:
        add(connection, ["e4"])
    after = take_snapshot(engine, store, settings)
    assert after.parts[0] == restored.parts[0]
    assert ids(after, store) == named("e1", "e2", "e3", "e4")
    engine.dispose()
