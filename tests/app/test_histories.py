"""What a process remembers of a user is always what the database holds, whoever wrote it and in whatever order."""

import asyncio
import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app.database import create_engine, writing
from app.erasure import erase
from app.serving import histories, history_readers, sqlite_reader
from app.serving.catalog import Catalog
from app.serving.event_store import store_events
from app.serving.histories import Histories
from app.serving.history import History
from app.serving.looks import MOST_EVENTS, Whole
from app.serving.new_events import NewEvent
from app.tables import BLOCK_BITS, events
from ml.snapshots import DEFAULT_MEANINGS, EventMeaning

MEANINGS = {**DEFAULT_MEANINGS, "rating": EventMeaning(minimum_value=3.0)}
MAX_HISTORY = 12
START = datetime(2026, 1, 1, tzinfo=UTC)


class Worker:
    """One process's memory, with the event loop that it lives on."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.histories = Histories(engine, Catalog(), MEANINGS, MAX_HISTORY, **options)

    def read(self, *user_ids: str) -> list[History | None]:
        async def together() -> list[History | None]:
            return await asyncio.gather(*[self.histories.read(user_id) for user_id in user_ids])

        return self.runner.run(together())

    def close(self) -> None:
        async def close() -> None:
            self.histories.close()

        self.runner.run(close())
        self.runner.close()


@pytest.fixture
def workers(engine: Engine) -> Iterator[list[Worker]]:
    workers = [Worker(engine), Worker(engine), Worker(engine, capacity=2)]
    yield workers
    for worker in workers:
        worker.close()


def event(user_id: str, number: int, **fields: Any) -> NewEvent:
    values = {"item_id": f"item-{number}", "type": "click", "value": None, "occurred_at": START}
    return NewEvent(user_id=user_id, event_id=f"event-{number}", **(values | fields))  # type: ignore[arg-type]


def store(engine: Engine, *new: NewEvent) -> None:
    with writing(engine) as connection:
        store_events(connection, new, "create")


def expected(connection: Connection, user_id: str) -> tuple[tuple[str, ...], frozenset[str], int | None]:
    """What the table of events says, worked out plainly."""
    order = (events.c.occurred_at, events.c.position)
    rows = connection.execute(sa.select(events).where(events.c.user_id == user_id).order_by(*order)).all()
    taken_back = {row.retracts for row in rows}
    counted = [row for row in rows if row.type != "retract" and row.event_id not in taken_back]
    history = [
        row.item_id
        for row in counted
        if row.type in {"click", "view"} or (row.type == "rating" and (row.value or 0) >= 3)
    ]
    excluded = frozenset(row.item_id for row in counted if row.type != "impression")
    return tuple(history[-MAX_HISTORY:]), excluded, max((row.position for row in rows), default=None)


def check(engine: Engine, worker: Worker, *user_ids: str) -> None:
    with engine.connect() as connection:
        for user_id, history in zip(user_ids, worker.read(*user_ids), strict=True):
            assert history is not None
            assert (history.item_ids, history.excluded, history.feedback_through) == expected(connection, user_id)
            times = dict(zip(history.item_ids, (history.interacted_at / 1e6).tolist(), strict=True))
            rows = connection.execute(sa.select(events).where(events.c.user_id == user_id)).all()
            assert times.items() <= {(row.item_id, row.occurred_at.timestamp()) for row in rows}
            kept_out = {history.items.item_ids[number] for number in history.kept_out_for_good}
            against = {row.item_id for row in rows if row.type in {"dislike", "rating"}}
            assert kept_out <= history.excluded & against


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_events(engine: Engine, workers: list[Worker], seed: int) -> None:
    chance = random.Random(seed)
    users = [f'user "{n}" \\ é,{{}}' for n in range(4)]
    posted: list[tuple[str, str]] = []
    for step in range(80):
        user = chance.choice(users)
        kind = chance.choices(["event", "retract", "erase user", "erase item"], [40, 4, 1, 1])[0]
        at = START + timedelta(seconds=step if chance.random() < 0.7 else chance.randrange(-(10**9), 100))
        if kind == "event":
            type_ = chance.choice(["click", "view", "rating", "impression", "dislike"])
            item, value = f"item-{chance.randrange(20)}", chance.choice([None, 1.0, 5.0])
            store(engine, event(user, step, item_id=item, type=type_, value=value, occurred_at=at))
            posted.append((user, f"event-{step}"))
        elif kind == "retract" and posted:
            owner, event_id = chance.choice(posted)
            store(engine, event(owner, step, type="retract", item_id=None, retracts=event_id, occurred_at=at))
        elif kind == "erase user":
            erase(engine, "user", user, actor="test")
        elif kind == "erase item":
            erase(engine, "item", f"item-{chance.randrange(20)}", actor="test")
        check(engine, chance.choice(workers), *chance.sample(users, chance.randrange(1, 4)))
    for worker in workers:
        check(engine, worker, *users, "nobody")


def test_what_is_unchanged_is_the_same_object(engine: Engine, workers: list[Worker]) -> None:
    """So that what was worked out of a history can be kept with it."""
    worker = workers[0]
    store(engine, event("anna", 1), event("ben", 1))
    first, again = worker.read("anna"), worker.read("anna")
    store(engine, event("ben", 2))
    assert first[0] is again[0] is worker.read("anna", "ben")[0]
    store(engine, event("anna", 2))
    assert worker.read("anna")[0] is not first[0]


def test_only_what_is_new_is_read(engine: Engine, workers: list[Worker]) -> None:
    """However long the history: the whole of it is read once."""
    worker = workers[0]
    store(engine, *[event("anna", number, occurred_at=START + timedelta(seconds=number)) for number in range(2_000)])
    check(engine, worker, "anna")
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    store(engine, event("anna", 5_000, item_id="item-7", occurred_at=START + timedelta(days=1)))
    del statements[:]
    (history,) = worker.read("anna")
    assert history is not None
    assert history.item_ids[-1] == "item-7"
    assert len(history.excluded) == 2_000
    assert statements == []  # the reader goes past the engine


def test_a_transaction_that_commits_late_is_not_missed(engine: Engine, workers: list[Worker]) -> None:
    """On PostgreSQL an event of a lower position and transaction may become visible after one of higher ones."""
    if engine.dialect.name == "sqlite":  # one writer at a time: positions are in the order of commits
        return
    worker = workers[0]
    # The items are there: whoever creates one waits for the others who do.
    store(engine, event("anna", 1), *[event("carl", number) for number in range(2, 6)])
    check(engine, worker, "anna", "ben")
    with writing(engine) as slow:
        store_events(slow, [event("anna", 2)], "create")
        store(engine, event("ben", 3), event("ben", 4))
        for _ in range(2):
            check(engine, worker, "anna", "ben")
    check(engine, worker, "anna", "ben")
    assert "item-2" in (worker.histories.remembered("anna") or History()).item_ids
    store(engine, event("ben", 5))
    check(engine, worker, "anna", "ben")


def test_requests_for_one_user_at_the_same_time(engine: Engine, workers: list[Worker]) -> None:
    store(engine, event("anna", 1), event("ben", 2))
    histories = workers[0].read("anna", "anna", "ben", "anna")
    assert [history and history.item_ids for history in histories] == [
        ("item-1",),
        ("item-1",),
        ("item-2",),
        ("item-1",),
    ]


def long_history(user_id: str) -> list[NewEvent]:
    """More events than a look reads, in no order of time, over several parts, one of each taken back."""
    chance = random.Random(1)
    times = [START + timedelta(seconds=chance.randrange(1_000)) for _ in range(2 * MOST_EVENTS + 100)]
    kinds = chance.choices(["click", "rating", "impression", "dislike"], k=len(times))
    rated = [
        event(
            user_id, number, type=kind, value=chance.choice([1.0, 5.0]) if kind == "rating" else None, occurred_at=time
        )
        for number, (kind, time) in enumerate(zip(kinds, times, strict=True))
    ]
    taken_back = [
        event(user_id, 10_000 + number, item_id=None, type="retract", retracts=f"event-{number}")
        for number in range(0, len(rated), MOST_EVENTS)
    ]
    return [*rated, *taken_back]


def test_a_long_history(engine: Engine, workers: list[Worker]) -> None:
    store(engine, *long_history("anna"))
    check(engine, workers[0], "anna")
    store(engine, event("anna", 20_000), event("anna", 20_001, item_id=None, type="retract", retracts="event-1"))
    check(engine, workers[0], "anna")


def test_others_are_answered_while_a_long_history_is_read(
    engine: Engine, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    store(engine, *long_history("anna"), event("ben", 1))
    read_whole, others_answered = histories.read_whole, threading.Event()

    def read_late(*arguments: Any) -> Whole:
        assert others_answered.wait(30)
        return read_whole(*arguments)

    monkeypatch.setattr(histories, "read_whole", read_late)

    async def together() -> None:
        anna = asyncio.create_task(worker.histories.read("anna"))
        for number in range(3):
            ben = await worker.histories.read("ben")
            assert ben is not None
            assert len(ben.item_ids) == number + 1
            await asyncio.to_thread(store, engine, event("ben", 100 + number))
        assert not anna.done()
        others_answered.set()
        await anna

    worker = workers[0]
    worker.runner.run(together())
    check(engine, worker, "anna", "ben")


def test_memory_is_bounded(engine: Engine, workers: list[Worker]) -> None:
    small = workers[2]
    store(engine, *[event(f"user-{n}", n) for n in range(10)])
    check(engine, small, *[f"user-{n}" for n in range(10)])
    assert sum(small.histories.remembered(f"user-{n}") is not None for n in range(10)) == 2


def test_who_was_away_for_long_is_remembered_as_of_now(
    engine: Engine, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that goes far back takes long; one is enough."""
    monkeypatch.setattr(histories, "MOST_BEHIND", 3)
    worker, looks = workers[0], []
    store(engine, event("anna", 1))
    (first,) = worker.read("anna")
    for number in range(2, 12):
        store(engine, event("ben", number))
    look = histories.Histories._look

    def noticed(self: Any, asked: Any) -> Any:
        looks.append(asked)
        return look(self, asked)

    monkeypatch.setattr(histories.Histories, "_look", noticed)
    assert worker.read("anna")[0] is worker.read("anna")[0] is first
    (((_, before),), ((_, after),)) = looks
    assert after > before + 3
    store(engine, event("anna", 20))
    check(engine, worker, "anna", "ben")


@pytest.mark.parametrize("behind", [0, 1, 2, sqlite_reader.MOST_BLOCKS, 10 * sqlite_reader.MOST_BLOCKS])
def test_what_is_newer_is_found_across_blocks(sqlite_url: str, behind: int) -> None:
    """On SQLite a look goes through blocks of positions, or past them where they are many."""
    engine = create_engine(sqlite_url)
    block = 1 << BLOCK_BITS
    base = 5 * block
    positions = [base - 2, base - 1, base, base + 1, base + (behind + 1) * block - 1, base + (behind + 1) * block]
    with writing(engine) as connection:
        for position in positions:
            for user_id in ("anna", "ben"):
                now = datetime.now(UTC)
                values = {"event_id": f"e{position}", "item_id": f"i{position}", "type": "click"}
                at = {"occurred_at": now, "received_at": now, "position": 2 * position + (user_id == "ben")}
                connection.execute(sa.insert(events).values(user_id=user_id, **values, **at))

    async def look(since: int) -> list[str]:
        reader = history_readers.open_reader(engine, needs_values=False)
        found = await reader.look([("anna", since)])
        reader.close()
        return [row.item_id for row in found.rows.get("anna", [])]

    for since in [0, *positions, positions[-1] + 1]:
        expected = [f"i{position}" for position in positions if position >= since]
        assert sorted(asyncio.run(look(2 * since))) == sorted(expected)
    engine.dispose()
