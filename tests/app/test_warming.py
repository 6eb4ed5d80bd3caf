"""A process that started has read the histories of those who were there last, and keeps them in step like any other."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.database import writing
from app.main import create_app
from app.serving import warming
from app.serving.catalog import Catalog
from app.serving.event_store import store_events
from app.serving.histories import Histories
from app.serving.new_events import NewEvent
from app.serving.warming import Warming
from app.settings import Settings
from ml.snapshots import DEFAULT_MEANINGS


def store(engine: Engine, user_id: str, *items: str) -> None:
    now = datetime.now(UTC)
    with writing(engine) as connection:
        store_events(connection, [NewEvent(user_id, item, item, "click", None, now) for item in items], "create")


def read_ahead(engine: Engine, **options: Any) -> Histories:
    histories = Histories(engine, Catalog(), DEFAULT_MEANINGS, 100, **options)
    looked_up: list[str] = []

    async def run() -> None:
        reading = Warming(engine, histories, is_ready=lambda: True, is_asked=lambda: False, look_up=looked_up.extend)
        await reading.run()
        histories.close()

    asyncio.run(run())
    assert all(histories.remembered(user_id) for user_id in looked_up)
    return histories


def test_what_is_being_read_at_the_end_leaves_nothing_open(engine: Engine) -> None:
    store(engine, "user", "a")
    histories = Histories(engine, Catalog(), DEFAULT_MEANINGS, 100)

    async def run() -> None:
        reading = asyncio.create_task(histories.read("user"))
        await asyncio.sleep(0)
        reading.cancel()
        await histories.finish()
        await asyncio.wait([reading])
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_everybody_where_there_is_room(engine: Engine) -> None:
    for number in range(20):
        store(engine, f"user-{number}", "a", f"item-{number}")
    histories = read_ahead(engine)
    for number in range(20):
        remembered = histories.remembered(f"user-{number}")
        assert remembered is not None
        assert remembered.item_ids == ("a", f"item-{number}")
    assert histories.remembered("nobody") is None


def test_the_latest_where_there_is_not(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users of the newest events come first; the ones read last make room first for somebody who asks."""
    monkeypatch.setattr(warming, "PART", 1)
    monkeypatch.setattr(warming, "TOGETHER", 1)
    for number in range(10):
        store(engine, f"user-{number}", "a")
    store(engine, "user-3", "b")
    histories = read_ahead(engine, capacity=4)
    expected = {"user-3", "user-9", "user-8", "user-7"}
    assert {user for user in (f"user-{n}" for n in range(10)) if histories.remembered(user)} == expected

    async def ask() -> None:
        await histories.read("user-0")
        histories.close()

    asyncio.run(ask())
    assert {user for user in (f"user-{n}" for n in range(10)) if histories.remembered(user)} == expected - {
        "user-7"
    } | {"user-0"}


def test_not_further_back_than_set(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "PART", 2)
    monkeypatch.setattr(warming, "LATEST_EVENTS", 4)
    for number in range(10):
        store(engine, f"user-{number}", "a")
    histories = read_ahead(engine)
    assert [number for number in range(10) if histories.remembered(f"user-{number}")] == [6, 7, 8, 9]


def test_what_was_read_ahead_is_kept_in_step(engine: Engine) -> None:
    store(engine, "anna", "a")
    histories = read_ahead(engine)
    store(engine, "anna", "b")

    async def ask() -> tuple[str, ...] | None:
        found = await histories.read("anna")
        histories.close()
        return None if found is None else found.item_ids

    assert asyncio.run(ask()) == ("a", "b")


def test_a_service_reads_ahead_and_ends_in_the_middle_of_it(engine: Engine, settings: Settings) -> None:
    for number in range(100):
        store(engine, f"user-{number}", "a")
    app: FastAPI = create_app(settings)
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50_000)) as client:
        histories = client.app.state.service.histories  # type: ignore[attr-defined]
        while histories.remembered("user-99") is None:
            assert client.get("/health/ready").status_code == 200
