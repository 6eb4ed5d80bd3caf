"""Group commit: many requests a transaction, a bounded queue, no stall behind other writers."""

import asyncio
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.database import create_engine, writing
from app.erasure import erase
from app.serving.event_store import store_events
from app.serving.feedback_writer import FeedbackWriter, OverloadedError, StoppedError
from app.serving.new_events import NewEvent
from app.tables import events, items, users


def event(number: int, **fields: Any) -> NewEvent:
    values = {
        "user_id": f"user-{number % 5}",
        "event_id": f"event-{number}",
        "item_id": f"item-{number % 3}",
        "type": "click",
        "value": None,
        "occurred_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return NewEvent(**(values | fields))  # type: ignore[arg-type]


@pytest.fixture
def groups() -> list[int]:
    return []


@pytest.fixture
def writer(engine: Engine, groups: list[int]) -> Iterator[FeedbackWriter]:
    writer = FeedbackWriter(engine, max_waiting=20, unknown_items="create", on_commit=groups.append)
    yield writer
    writer.stop()


@pytest.mark.parametrize("unknown_items", ["create", "reject"])
@pytest.mark.parametrize("fields", [{}, {"type": "retract", "item_id": None, "retracts": "nothing"}])
def test_an_id_sent_often_takes_no_more_statements(engine: Engine, unknown_items: Any, fields: dict[str, Any]) -> None:
    """One request must not hold the database for as many turns as it repeats an id that is refused."""
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    with writing(engine) as connection:
        store_events(connection, [event(1, value=5.0)], "create")
        statements.clear()
        refused = [event(1, event_id="event-1" if not fields else "r", value=n + 0.5, **fields) for n in range(300)]
        refused += [event(n, item_id="unheard-of") for n in range(10, 300) if unknown_items == "reject"]
        found = store_events(connection, refused, unknown_items)
    assert {outcome.outcome for outcome in found} == {"rejected"}
    assert len(statements) < 15


def count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(events)) or 0


def test_requests_that_wait_share_a_commit(writer: FeedbackWriter, engine: Engine, groups: list[int]) -> None:
    async def many() -> list[Any]:
        waiting = [asyncio.ensure_future(writer.write([event(number)])) for number in range(20)]
        await asyncio.sleep(0)  # all of them have queued
        assert len(writer) == 20
        writer.start()
        return await asyncio.gather(*waiting)

    answers = asyncio.run(many())
    assert [answer[0].outcome for answer in answers] == ["stored"] * 20
    assert groups == [20]
    assert count(engine) == 20


def test_a_full_queue_refuses_at_once_and_loses_nothing(writer: FeedbackWriter, engine: Engine) -> None:
    async def too_many() -> int:
        waiting = [asyncio.ensure_future(writer.write([event(number)])) for number in range(25)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        refused = [future for future in waiting if future.done()]
        assert all(isinstance(future.exception(), OverloadedError) for future in refused)
        writer.start()
        await asyncio.gather(*waiting, return_exceptions=True)
        return len(refused)

    assert asyncio.run(too_many()) == 5
    assert count(engine) == 20


def test_rows_that_wait_are_bounded_too(writer: FeedbackWriter) -> None:
    async def large() -> None:
        first = asyncio.ensure_future(writer.write([event(number) for number in range(5_000)]))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await writer.write([event(5_001)])
        writer.start()
        assert {outcome.outcome for outcome in await first} == {"stored"}

    asyncio.run(large())


def test_one_requests_fault_is_not_the_others_loss(writer: FeedbackWriter, engine: Engine) -> None:
    async def mixed() -> list[Any]:
        # What validation never lets through: text where the database holds a number.
        broken = event(2, context={"not": "serializable", "because": object()})
        waiting = [asyncio.ensure_future(writer.write([row])) for row in (event(1), broken, event(3))]
        await asyncio.sleep(0)
        writer.start()
        return await asyncio.gather(*waiting, return_exceptions=True)

    first, broken, third = asyncio.run(mixed())
    assert isinstance(broken, Exception)
    assert [first[0].outcome, third[0].outcome] == ["stored", "stored"]
    assert count(engine) == 2


def test_stopping_writes_what_waits_and_takes_nothing_more(writer: FeedbackWriter, engine: Engine) -> None:
    async def at_the_end() -> None:
        waiting = asyncio.ensure_future(writer.write([event(1)]))
        await asyncio.sleep(0)
        writer.start()
        await asyncio.to_thread(writer.stop)
        assert (await waiting)[0].outcome == "stored"
        with pytest.raises(StoppedError):
            await writer.write([event(2)])

    asyncio.run(at_the_end())
    assert count(engine) == 1


def test_a_full_queue_is_answered_429(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = client.app.state.service.feedback_writer  # type: ignore[attr-defined]
    monkeypatch.setattr(writer, "_max_waiting", 0)
    writer._waiting.append(object())  # the writer is not told, and sleeps on
    response = client.post("/feedback", json={"user_id": "anna", "item_id": "dune", "type": "click"})
    writer._waiting.clear()
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.headers["content-type"] == "application/problem+json"


def test_another_process_that_writes_in_chunks_does_not_stall_feedback(sqlite_url: str, tmp_path: Path) -> None:
    """An import holds SQLite's only write lock nine tenths of the time; SQLite's own waiting would sleep 100 ms."""
    importer, engine = create_engine(sqlite_url), create_engine(sqlite_url)
    stop, started = threading.Event(), threading.Event()

    def import_in_chunks() -> None:
        number = 0
        while not stop.is_set():
            with writing(importer) as connection:
                connection.execute(
                    sa.insert(events),
                    {"user_id": "import", "event_id": str(number), "item_id": "i", "type": "view",
                     "occurred_at": datetime.now(UTC), "received_at": datetime.now(UTC)},
                )  # fmt: skip
                started.set()
                stop.wait(0.03)
                number += 1
            stop.wait(0.004)

    thread = threading.Thread(target=import_in_chunks)
    thread.start()
    started.wait()
    writer = FeedbackWriter(engine, max_waiting=10, unknown_items="create")
    writer.start()

    async def measure() -> list[float]:
        seconds = []
        for number in range(25):
            begun = time.perf_counter()
            await writer.write([event(number)])
            seconds.append(time.perf_counter() - begun)
        return seconds

    seconds = asyncio.run(measure())
    stop.set()
    thread.join()
    writer.stop()
    importer.dispose()
    engine.dispose()
    # Half of them within 100 ms holds on a busy machine too; by SQLite's own waiting nearly all would take longer.
    assert sorted(seconds)[12] < 0.1, seconds


def test_every_text_comes_back_as_it_was_sent(engine: Engine) -> None:
    texts = ["NULL", 'a"b', "back\\slash", "{curly,comma}", "é 中 🎈", "'; --", "%s ? :name", " "]
    sent = [
        event(
            n, user_id=text, item_id=text, event_id=text, type="click", context={"text": text, "deep": [None, 1.5, {}]}
        )
        for n, text in enumerate(texts)
    ]
    exact = datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    sent.append(event(100, value=1e-300, occurred_at=exact, recommendation_id="r"))
    with writing(engine) as connection:
        assert {outcome.outcome for outcome in store_events(connection, sent, "create")} == {"stored"}
    with writing(engine) as connection:  # compared with what was stored, field by field
        again = store_events(connection, [*sent, event(101)], "create")
    assert [outcome.outcome for outcome in again] == ["duplicate"] * len(sent) + ["stored"]
    with engine.connect() as connection:
        row = connection.execute(sa.select(events).where(events.c.event_id == "event-100")).one()
    assert (row.value, row.occurred_at, row.context) == (1e-300, exact, None)


def test_what_was_erased_is_created_again(writer: FeedbackWriter, engine: Engine) -> None:
    """The writer remembers which users and items there are; an erasure by another process takes them away."""
    writer.start()

    async def write(number: int) -> None:
        await writer.write([event(number, user_id="anna", item_id="dune")])

    asyncio.run(write(1))
    assert erase(engine, "user", "anna", actor="test").events
    asyncio.run(write(2))
    assert erase(engine, "item", "dune", actor="test").events
    asyncio.run(write(3))
    with engine.connect() as connection:
        assert connection.scalar(sa.select(users.c.user_id)) == "anna"
        assert connection.scalar(sa.select(items.c.item_id)) == "dune"
