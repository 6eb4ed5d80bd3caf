import hashlib
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.interactions import Interactions
from ml.snapshots import (
    DEFAULT_MEANINGS,
    PART_SCHEMA,
    EventMeaning,
    PartRef,
    Snapshot,
    SnapshotDamaged,
    collect,
    make_snapshot,
    meaning_of,
    part_name,
    publish,
    read_parts,
    read_snapshot,
    rewrite_without,
    snapshot_name,
    subject_sha256,
    write_part,
)
from ml.store import FolderStore


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def table(*rows: tuple[int, str, str]) -> pa.Table:
    return pa.table(
        {
            "position": pa.array([row[0] for row in rows], pa.int64()),
            "user_id": [row[1] for row in rows],
            "item_id": [row[2] for row in rows],
            "type": ["view"] * len(rows),
            "value": pa.nulls(len(rows), pa.float64()),
            "time": pa.array([row[0] for row in rows], pa.timestamp("us", "UTC")),
        }
    )


def watermark(position: int) -> dict:
    return {"position": position, "transaction_id": None, "time": None, "erasures_through": 0}


def published(store: FolderStore, *parts: PartRef, position: int = 9, parent: str | None = None) -> Snapshot:
    snapshot = make_snapshot(parts, DEFAULT_MEANINGS, watermark(position), parent=parent)
    publish(store, snapshot)
    return snapshot


FIRST = table((1, "a", "x"), (2, "b", "x"), (3, "a", "y"))
SECOND = table((4, "a", "z"), (5, "b", "y"))


def test_a_snapshot_is_read_as_it_was_published(store: FolderStore) -> None:
    snapshot = published(store, write_part(store, FIRST), write_part(store, SECOND))
    found = read_snapshot(store, snapshot.hash)
    assert found == snapshot
    assert found.rows == 5
    tables = list(read_parts(store, found))
    assert [one.schema for one in tables] == [PART_SCHEMA, PART_SCHEMA]
    assert [number for one in tables for number in one.column("position").to_pylist()] == [1, 2, 3, 4, 5]
    [only] = {tuple(one.column_names) for one in read_parts(store, found, ["user_id", "time"])}
    assert only == ("user_id", "time")
    interactions = Interactions.from_events(read_parts(store, found), found.meanings)
    assert interactions.items.ids(interactions.history(0)) == ["x", "y", "z"]
    with pytest.raises(KeyError):
        read_snapshot(store, "0" * 64)


def test_the_hash_is_that_of_parts_meanings_and_watermark(store: FolderStore) -> None:
    part, other = write_part(store, FIRST), write_part(store, SECOND)
    assert write_part(store, FIRST) == part
    snapshot = make_snapshot([part], DEFAULT_MEANINGS, watermark(3))
    assert make_snapshot([part], DEFAULT_MEANINGS, watermark(3), parent="p").hash == snapshot.hash
    changed = [
        make_snapshot([part, other], DEFAULT_MEANINGS, watermark(3)),
        make_snapshot([part], {**DEFAULT_MEANINGS, "rating": EventMeaning(minimum_value=3.0)}, watermark(3)),
        make_snapshot([part], DEFAULT_MEANINGS, watermark(4)),
    ]
    assert len({one.hash for one in [snapshot, *changed]}) == 4


def test_meanings_fall_back_to_any_type_and_then_to_the_default() -> None:
    assert meaning_of(DEFAULT_MEANINGS, "dislike") == EventMeaning(in_history=False, excludes=True)
    assert meaning_of({"*": EventMeaning(weight=2.0)}, "share").weight == 2.0
    assert meaning_of({}, "share") == EventMeaning()
    rated = EventMeaning(minimum_value=3.0)
    assert [rated.is_interaction(value) for value in (3.0, 2.9, None)] == [True, False, False]


def test_damage_is_refused(store: FolderStore) -> None:
    part = write_part(store, FIRST)
    snapshot = published(store, part)
    whole = store.get(part_name(part.sha256))
    for damaged in (whole[:-1], whole[:50] + b"?" + whole[51:], b""):
        store.put(part_name(part.sha256), damaged)
        with pytest.raises(SnapshotDamaged, match="was changed"):
            list(read_parts(store, snapshot))
    store.delete(part_name(part.sha256))
    with pytest.raises(SnapshotDamaged, match="not in the store"):
        list(read_parts(store, snapshot))
    name = snapshot_name(snapshot.hash)
    body = json.loads(store.get(name))
    for changed in (
        {**body, "watermark": watermark(99)},
        {**body, "format": 2},
        {**body, "parts": "none"},
        {key: value for key, value in body.items() if key != "parts"},
    ):
        store.put(name, json.dumps(changed).encode())
        with pytest.raises(SnapshotDamaged):
            read_snapshot(store, snapshot.hash)
    store.put(name, b'{"format": 1')
    with pytest.raises(SnapshotDamaged, match="take a new one"):
        read_snapshot(store, snapshot.hash)


class Dying(FolderStore):
    """A store whose process is killed in the middle of its nth write."""

    def __init__(self, path: Path, writes: int) -> None:
        super().__init__(path)
        self.left = writes

    def _die_in(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            ((self.path / name).parent / ".temporary-of-the-dead").write_bytes(b"half")
            raise KeyboardInterrupt

    def put(self, name: str, data: bytes | Path) -> None:
        self._die_in(name)
        super().put(name, data)

    def put_if_absent(self, name: str, data: bytes | Path) -> bool:
        self._die_in(name)
        return super().put_if_absent(name, data)


def test_killed_at_any_write_nothing_half_done_counts_and_the_next_call_finishes(tmp_path: Path) -> None:
    for writes in (1, 2, 3):
        dying = Dying(tmp_path / str(writes), writes)
        with pytest.raises(KeyboardInterrupt):
            published(dying, write_part(dying, FIRST), write_part(dying, SECOND))
        store = FolderStore(dying.path)
        assert store.list("snapshots") == []
        assert len(store.list()) == writes - 1
        snapshot = published(store, write_part(store, FIRST), write_part(store, SECOND))
        assert sum(map(len, read_parts(store, read_snapshot(store, snapshot.hash)))) == 5
        assert len(store.list()) == 3


def test_erased_subjects_leave_the_parts_up_to_their_erasure(store: FolderStore) -> None:
    part = write_part(store, FIRST)
    nobody: dict[str, int] = {}
    assert rewrite_without(store, part, {subject_sha256("c"): 9}, nobody) == part
    without_a = rewrite_without(store, part, {subject_sha256("a"): 9}, nobody)
    assert without_a is not None
    assert without_a.sha256 != part.sha256
    [left] = read_parts(store, make_snapshot([without_a], DEFAULT_MEANINGS, watermark(3)))
    assert left.column("user_id").to_pylist() == ["b"]
    came_back = rewrite_without(store, part, {subject_sha256("a"): 1}, {subject_sha256("y"): 2})
    assert came_back is not None
    assert came_back.rows == 2
    assert rewrite_without(store, part, nobody, {subject_sha256("x"): 9, subject_sha256("y"): 9}) is None


def test_what_nothing_names_is_collected_once_it_is_old(store: FolderStore) -> None:
    shared, dropped, unnamed = (
        write_part(store, FIRST),
        write_part(store, SECOND),
        write_part(store, table((9, "c", "q"))),
    )
    kept = published(store, shared, position=3)
    old = published(store, shared, dropped, position=5, parent=kept.hash)
    (store.path / "parts" / ".temporary-0").write_bytes(b"half")
    assert collect(store, [kept.hash], 3600) == []
    past = time.time() - 7200
    for file in store.path.rglob("*"):
        os.utime(file, (past, past))
    young = write_part(store, table((10, "d", "r")))
    removed = collect(store, [kept.hash], 3600)
    assert sorted(removed) == sorted([snapshot_name(old.hash), part_name(dropped.sha256), part_name(unnamed.sha256)])
    assert store.list() == sorted([part_name(shared.sha256), part_name(young.sha256), snapshot_name(kept.hash)])
    assert not list(store.path.rglob(".temporary-*"))
    assert sum(map(len, read_parts(store, kept))) == 3


def test_parts_of_other_engines_need_no_position(store: FolderStore) -> None:
    foreign = pa.table(
        {
            "item_id": pa.array(["y", "x", "x"]).dictionary_encode(),
            "user_id": pa.array(["a", "a", "b"], pa.large_string()),
            "type": ["view"] * 3,
            "value": pa.array([1, 2, 3], pa.int32()),
            "time": pa.array([2_000_001, 1_000_000, 1_000_000], pa.timestamp("ns", "UTC")),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(foreign, sink)
    data = sink.getvalue().to_pybytes()
    part = PartRef(hashlib.sha256(data).hexdigest(), 3, len(data))
    store.put(part_name(part.sha256), data)
    snapshot = published(store, part)
    interactions = Interactions.from_events(read_parts(store, snapshot), DEFAULT_MEANINGS)
    assert interactions.items.ids(interactions.history(0)) == ["x", "y"]
    assert interactions.time.tolist() == [1_000, 2_000, 1_000]
    with pytest.raises(ValueError, match="needs the column item_id"):
        write_part(store, foreign.drop_columns(["item_id"]))
    with pytest.raises(ValueError, match="must not hold nulls"):
        write_part(store, foreign.set_column(0, "item_id", pa.array(["a", None, "b"])))
