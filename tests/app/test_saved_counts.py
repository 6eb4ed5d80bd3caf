"""Counts of items are kept in SQL: whoever starts from them has what counting everything gives, whatever happened."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from app.database import create_engine, reading, writing
from app.erasure import erase
from app.main import create_app
from app.serving import popularity as popularity_module
from app.serving.activity import Activity
from app.serving.catalog import Catalog
from app.serving.interaction_counts import look
from app.serving.popularity import Popularity
from app.serving.saved_counts import ITEMS_A_PART, ItemCounts, load, save
from app.settings import Settings
from app.tables import erasures, events, item_counts, items
from app.training.snapshots import take_snapshot
from ml.snapshots import DEFAULT_MEANINGS, RETRACT, EventMeaning
from ml.store import open_store

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
ITEMS = [f"item-{number}" for number in range(5)]
WEEKS_AGO = [0, 1, 3, 5, 9]


@pytest.fixture(autouse=True)
def _saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popularity_module, "SAVE_EVERY", 1)


class Process:
    """What a serving process counts."""

    def __init__(self, engine: Engine, meanings: dict[str, EventMeaning] | None = None) -> None:
        self.engine = engine
        self.catalog = Catalog()
        self.popularity = Popularity(meanings or dict(DEFAULT_MEANINGS), self.catalog)
        self.activity = Activity(
            meanings or dict(DEFAULT_MEANINGS), clock=lambda: NOW, quiet_through=self.popularity.quiet_through
        )

    def poll(self) -> list[tuple[str, int]]:
        with reading(self.engine) as connection:
            self.catalog.follow(connection)
            self.popularity.poll(connection)
            self.activity.poll(connection)
        return list(self.popularity.ranked())

    def save(self) -> None:
        self.popularity.save(self.engine)


def started(engine: Engine, meanings: dict[str, EventMeaning] | None = None) -> list[tuple[str, int]]:
    """What a process ranks that starts now."""
    return Process(engine, meanings).poll()


def add(
    engine: Engine,
    user: str,
    item: str,
    event_id: str | None = None,
    kind: str = "click",
    retracts: str | None = None,
    occurred_at: datetime = NOW,
) -> str:
    event_id = event_id or str(uuid4())
    row = {"user_id": user, "event_id": event_id, "item_id": item, "type": kind, "retracts": retracts}
    with writing(engine) as connection:
        connection.execute(sa.insert(events), {**row, "occurred_at": occurred_at, "received_at": datetime.now(UTC)})
        known = connection.scalar(sa.select(items.c.item_id).where(items.c.item_id == item))
        if known is None:
            values = {"item_id": item, "categories": [], "hidden": False, "metadata": {}}
            connection.execute(sa.insert(items), {**values, "created_at": NOW, "updated_at": NOW})
    return event_id


def empty(engine: Engine, *, restart: bool) -> None:
    """Take all events away behind the service's back."""
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text(f"TRUNCATE events {'RESTART IDENTITY' if restart else ''}"))
        else:
            connection.execute(sa.delete(events))
            if restart:
                connection.execute(sa.text("DELETE FROM sqlite_sequence WHERE name = 'events'"))


def counted_by_hand(engine: Engine) -> tuple[list[tuple[str, int]], list[tuple[str, float]]]:
    """Items of the catalogue by the interactions of all time, and those of the last four weeks."""
    with engine.connect() as connection:
        rows = connection.execute(sa.select(events)).all()
        known = set(connection.scalars(sa.select(items.c.item_id)))
    taken_back = {(row.user_id, row.retracts) for row in rows if row.type == RETRACT}
    chosen = [row for row in rows if row.type == "click" and (row.user_id, row.event_id) not in taken_back]
    ever = Counter(row.item_id for row in chosen)
    lately = Counter(row.item_id for row in chosen if row.occurred_at > NOW - timedelta(weeks=4))
    by_count = sorted(((item, ever[item]) for item in known), key=lambda pair: (-pair[1], pair[0]))
    return by_count, sorted(((item, float(n)) for item, n in lately.items()), key=lambda pair: (-pair[1], pair[0]))


users = st.sampled_from(["anna", "ben"])
item_ids = st.sampled_from(ITEMS)
places = st.integers(0, 30)
processes = st.integers(0, 1)
steps = st.one_of(
    st.tuples(st.just("click"), users, item_ids, st.sampled_from(WEEKS_AGO)),
    st.tuples(st.just("impression"), users, item_ids),
    st.tuples(st.just("retract"), places),
    st.tuples(st.just("retract before"), users, item_ids),
    st.tuples(st.sampled_from(["poll", "save", "restart"]), processes),
    st.tuples(st.sampled_from(["poll", "save", "restart"]), processes),
    st.tuples(st.just("erase user"), users),
    st.tuples(st.just("erase item"), item_ids),
    st.tuples(st.just("empty"), st.booleans()),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=st.lists(steps, min_size=8, max_size=20))
def test_any_story_comes_to_what_counting_by_hand_gives(engine: Engine, story: list[tuple[Any, ...]]) -> None:
    with writing(engine) as connection:
        for table in (events, items, erasures, item_counts):
            connection.execute(sa.delete(table))
    two = [Process(engine), Process(engine)]
    clicks: list[tuple[str, str, str]] = []  # user, item, event id; erased ones stay, and nothing is to take them back

    def agrees(process: Process) -> None:
        ever, lately = counted_by_hand(engine)
        assert process.poll() == ever
        assert list(process.activity.ranked("popular", 24 * 28)) == lately

    for step, *given_ in story:
        if step == "click":
            user, item, weeks = given_
            clicks.append((user, item, add(engine, user, item, occurred_at=NOW - timedelta(weeks=weeks))))
        elif step == "impression":
            add(engine, given_[0], given_[1], kind="impression")
        elif step == "retract" and clicks:
            user, item, event_id = clicks[given_[0] % len(clicks)]  # some of them twice
            add(engine, user, item, kind=RETRACT, retracts=event_id)
        elif step == "retract before":  # as an import may store them
            user, item = given_
            event_id = str(uuid4())
            add(engine, user, item, kind=RETRACT, retracts=event_id)
            clicks.append((user, item, event_id))
            two[0].poll()
            add(engine, user, item, event_id)
        elif step == "poll":
            agrees(two[given_[0]])
        elif step == "save":
            two[given_[0]].save()
        elif step == "restart":
            two[given_[0]] = Process(engine)
            agrees(two[given_[0]])
        elif step.startswith("erase"):
            erase(engine, step.removeprefix("erase "), given_[0], actor="test")
        elif step == "empty":
            empty(engine, restart=given_[0])
    for process in (*two, Process(engine)):
        agrees(process)


def kept(engine: Engine, counts: dict[str, int]) -> None:
    """Keep counts that are not those of the events, so that it shows who reads them."""
    process = Process(engine)
    process.poll()
    with reading(engine) as connection:
        now = look(connection)
    save(engine, DEFAULT_MEANINGS, ItemCounts(counts, now))


@pytest.fixture
def marked(engine: Engine) -> Engine:
    """A database with a click whose kept counts are unmistakable."""
    add(engine, "anna", "item-0")
    kept(engine, {"item-0": 700})
    return engine


def test_a_start_reads_what_is_kept_and_counts_what_came_since(marked: Engine) -> None:
    assert started(marked) == [("item-0", 700)]
    taken = add(marked, "anna", "item-1")
    add(marked, "anna", "item-0")
    assert started(marked) == [("item-0", 701), ("item-1", 1)]
    add(marked, "anna", "item-1", kind=RETRACT, retracts=taken)
    assert started(marked) == [("item-0", 701), ("item-1", 0)]


def test_counts_in_many_parts(engine: Engine) -> None:
    add(engine, "anna", "item-0")
    counts = {f"ïtem {number}": number + 1 for number in range(2 * ITEMS_A_PART + 1)}
    kept(engine, counts)
    with reading(engine) as connection:
        found = load(connection, DEFAULT_MEANINGS, look(connection))
        assert connection.scalar(sa.select(sa.func.count()).select_from(item_counts)) == 3
    assert found is not None
    assert found.by_item == counts


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE item_counts SET counts = '{\"item-0\": 701}'",
        "UPDATE item_counts SET counts = '[]'",
        "UPDATE item_counts SET counts = 'x', state = 'y', sha256 = 'z'",
        "UPDATE item_counts SET state = '{}'",
        "UPDATE item_counts SET part = 1",
        "INSERT INTO item_counts SELECT part + 1, state, counts, sha256 FROM item_counts",
        "DELETE FROM item_counts",
    ],
)
def test_damaged_counts_are_counted_anew(marked: Engine, damage: str) -> None:
    with writing(marked) as connection:
        connection.execute(sa.text(damage.replace(":", r"\:")))
    assert started(marked) == [("item-0", 1)]


def test_counts_of_another_release_are_counted_anew(marked: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serving.saved_counts.FORMAT", 2)
    assert started(marked) == [("item-0", 1)]


def test_counts_of_other_meanings_are_counted_anew(marked: Engine) -> None:
    add(marked, "anna", "item-1", kind="impression")
    other = {**DEFAULT_MEANINGS, "impression": EventMeaning()}
    process = Process(marked, other)
    assert process.poll() == [("item-0", 1), ("item-1", 1)]
    process.save()  # in the place of the others
    assert started(marked, other) == [("item-0", 1), ("item-1", 1)]
    assert started(marked) == [("item-0", 1), ("item-1", 0)]


@pytest.mark.parametrize("restart", [False, True])
def test_counts_of_events_that_are_no_more_are_counted_anew(marked: Engine, restart: bool) -> None:
    running = Process(marked)
    assert running.poll() == [("item-0", 700)]
    empty(marked, restart=restart)
    for user in ("anna", "ben", "carl"):
        add(marked, user, "item-1")
    assert started(marked) == running.poll() == [("item-1", 3), ("item-0", 0)]


def test_what_is_kept_never_goes_back(engine: Engine) -> None:
    add(engine, "anna", "item-0")
    behind, ahead = Process(engine), Process(engine)
    behind.poll()
    add(engine, "anna", "item-1")
    ahead.poll()
    ahead.save()
    behind.save()
    with reading(engine) as connection:
        found = load(connection, DEFAULT_MEANINGS, look(connection))
    assert found is not None
    assert found.by_item == {"item-0": 1, "item-1": 1}
    earlier = replace(found.counted, through=found.counted.through - 1)
    save(engine, DEFAULT_MEANINGS, ItemCounts({"item-1": 9}, earlier))
    assert started(engine) == [("item-0", 1), ("item-1", 1)]


def test_what_an_erasure_waits_with_is_not_kept(engine: Engine) -> None:
    """An erasure commits between the counting and the keeping: what it erased must not come back."""
    add(engine, "anna", "item-0")
    process = Process(engine)
    process.poll()
    saver = threading.Thread(target=process.save)
    with writing(engine) as connection:
        connection.execute(sa.delete(events))
        values = {"kind": "item", "subject_sha256": "0" * 64, "through_position": 1, "erased_at": NOW}
        connection.execute(sa.insert(erasures), values)
        connection.execute(sa.delete(item_counts))
        saver.start()
        saver.join(0.2)
        assert saver.is_alive(), "it must wait for the open transaction"
    saver.join(30)
    with engine.connect() as connection:
        assert connection.execute(sa.select(item_counts)).all() == []


def test_transactions_that_commit_late_are_counted_once(postgresql_url: str) -> None:
    engine = create_engine(postgresql_url)
    values = {"user_id": "anna", "type": "click", "occurred_at": NOW, "received_at": NOW}
    add(engine, "ben", "item-0")
    with writing(engine) as late:
        late.execute(sa.insert(events), {**values, "event_id": "late", "item_id": "item-1"})
        clicked = add(engine, "carl", "item-1")
        add(engine, "carl", "item-1", kind=RETRACT, retracts=clicked)
        add(engine, "carl", "item-1")
        process = Process(engine)
        assert process.poll() == [("item-0", 1), ("item-1", 0)]
        process.save()
        assert started(engine) == [("item-0", 1), ("item-1", 0)]
    assert started(engine) == process.poll() == [("item-1", 2), ("item-0", 1)]
    engine.dispose()


def test_an_event_taken_back_by_an_older_transaction_is_counted_neither_before_nor_after(postgresql_url: str) -> None:
    engine = create_engine(postgresql_url)
    add(engine, "ben", "item-0")
    took_back = {"user_id": "anna", "event_id": "back", "item_id": "item-0", "type": RETRACT, "retracts": "event"}
    begin = sa.text("SELECT pg_current_xact_id()")  # takes a number
    with engine.connect() as still_open:
        with writing(engine) as older:
            older.execute(begin)
            still_open.execute(begin)
            add(engine, "anna", "item-0", "event")
            older.execute(sa.insert(events), {**took_back, "occurred_at": NOW, "received_at": NOW})
        process = Process(engine)
        assert process.poll() == [("item-0", 1)]
        process.save()
    assert started(engine) == process.poll() == [("item-0", 1)]
    engine.dispose()


def test_events_of_a_restored_dump_are_counted_once_they_are_settled(postgresql_url: str, tmp_path: Path) -> None:
    engine = create_engine(postgresql_url)
    add(engine, "anna", "item-0")
    add(engine, "anna", "item-1")
    ahead = sa.update(events).where(events.c.item_id == "item-1")
    with writing(engine) as connection:
        connection.execute(ahead.values(transaction_id=events.c.transaction_id + 1_000_000_000))
    process = Process(engine)
    assert process.poll() == [("item-0", 1), ("item-1", 0)]
    process.save()
    options = Settings(data_dir=tmp_path, database_url=postgresql_url, _env_file=None)
    take_snapshot(engine, open_store(options.resolved_store_url), options)
    assert started(engine) == process.poll() == [("item-0", 1), ("item-1", 1)]
    engine.dispose()


def test_a_full_disk_neither_stops_the_counting_nor_loses_anything(
    sqlite_url: str, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    engine = create_engine(sqlite_url)
    add(engine, "anna", "item-0")
    process = Process(engine)
    process.poll()
    with full_disk(Path(f"{engine.url.database}-wal").stat().st_size):
        process.save()
        assert process.poll() == [("item-0", 1)]
    with engine.connect() as connection:
        assert connection.execute(sa.select(item_counts)).all() == []
    add(engine, "anna", "item-0")
    assert process.poll() == [("item-0", 2)]
    process.save()
    with reading(engine) as connection:
        found = load(connection, DEFAULT_MEANINGS, look(connection))
    assert found is not None
    assert found.by_item == {"item-0": 2}
    engine.dispose()


@pytest.fixture
def second(settings: Settings, connect: Any) -> Callable[[], AbstractContextManager[TestClient]]:
    """Starts the service once more."""
    return lambda: connect(create_app(settings))


def test_a_service_keeps_its_counts_and_the_next_one_starts_from_them(
    client: TestClient, engine: Engine, second: Callable[[], AbstractContextManager[TestClient]]
) -> None:
    posted = [{"user_id": "anna", "item_id": "item-7", "type": "click"}] * 3
    assert client.post("/feedback", json=posted).status_code == 201
    for _ in _until_kept(engine):
        pass

    def popular(of: TestClient) -> list[tuple[str, int]]:
        found = of.get("/popular").json()["items"]
        return [(item["item_id"], item["score"]) for item in found]

    with second() as started_again:
        assert popular(started_again) == popular(client) == [("item-7", 3)]
        assert client.delete("/items/item-7").status_code == 204
        with engine.connect() as connection:
            assert connection.execute(sa.select(item_counts).where(item_counts.c.counts.contains("item-7"))).all() == []


def _until_kept(engine: Engine) -> Iterator[None]:
    """Looks at the table until the follower has written to it."""
    deadline = datetime.now(UTC) + timedelta(seconds=30)
    written: int | None = 0
    while not written:
        assert datetime.now(UTC) < deadline, "the follower kept nothing"
        with engine.connect() as connection:
            written = connection.scalar(sa.select(sa.func.count()).select_from(item_counts))
        yield
