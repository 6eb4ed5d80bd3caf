"""The order by popularity is brought up to date step by step, and is the one that counting everything anew gives."""

import gc
import random
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from app.database import reading, writing
from app.serving.activity import Activity
from app.serving.catalog import Catalog
from app.serving.event_store import store_events
from app.serving.filters import CategoryFilter
from app.serving.latest import MANY_CHANGES, Latest
from app.serving.new_events import NewEvent
from app.serving.popularity import Popularity
from app.tables import items
from ml.snapshots import DEFAULT_MEANINGS

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CATEGORIES = ([], ["a"], ["b", "a"])


def change(engine: Engine, chance: random.Random, step: int) -> None:
    """A few clicks, some of them taken back, and a few items added, hidden, or moved to other categories."""
    new = [
        NewEvent(
            f"user-{chance.randrange(9)}", f"{step}-{number}", f"item-{chance.randrange(60):02}", "click", None, NOW
        )
        for number in range(chance.randrange(6))
    ]
    back = [
        NewEvent(event.user_id, f"back-{event.event_id}", None, "retract", None, NOW, retracts=event.event_id)
        for event in new
        if chance.random() < 0.3
    ]
    with writing(engine) as connection:
        store_events(connection, [*new, *back], "create")
        for _ in range(chance.randrange(4)):
            values = {"hidden": chance.random() < 0.3, "categories": chance.choice(CATEGORIES)}
            item_id = f"item-{chance.randrange(60):02}"
            connection.execute(sa.update(items).where(items.c.item_id == item_id).values(**values))


def polled(engine: Engine, catalog: Catalog, popularity: Popularity) -> Popularity:
    with reading(engine) as connection:
        catalog.follow(connection)
        popularity.poll(connection)
    return popularity


@pytest.mark.parametrize("seed", [0, 1])
def test_step_by_step_or_anew(engine: Engine, seed: int) -> None:
    chance = random.Random(seed)
    with writing(engine) as connection:
        first = [NewEvent("user-0", f"first-{number}", f"item-{number:02}", "click", None, NOW) for number in range(40)]
        store_events(connection, first, "create")
    catalog = Catalog()
    followed = polled(engine, catalog, Popularity(DEFAULT_MEANINGS, catalog))
    filters = [CategoryFilter(), CategoryFilter(all=frozenset("a")), CategoryFilter(any=frozenset("ab"))]
    for step in range(12):
        change(engine, chance, step)
        polled(engine, catalog, followed)
        fresh_catalog = Catalog()
        fresh = polled(engine, fresh_catalog, Popularity(DEFAULT_MEANINGS, fresh_catalog))
        for categories in filters:
            assert list(followed.ranked(categories)) == list(fresh.ranked(categories))
        assert followed.rarely_chosen(2, 100, random.Random(1)) == fresh.rarely_chosen(2, 100, random.Random(1))


def test_a_look_at_what_came_leaves_nothing_that_refers_to_itself(engine: Engine) -> None:
    """Garbage among old objects waits for minutes, and every process looks once a second."""
    catalog = Catalog()
    popularity, activity = Popularity(DEFAULT_MEANINGS, catalog), Activity(DEFAULT_MEANINGS)
    left = []
    gc.disable()
    try:
        for number in range(5):
            with writing(engine) as connection:
                store_events(connection, [NewEvent("anna", f"e-{number}", "item", "click", None, NOW)], "create")
            gc.collect()
            polled(engine, catalog, popularity)
            with reading(engine) as connection:
                activity.poll(connection)
            left.append(gc.collect())
    finally:
        gc.enable()
    assert list(popularity.ranked()) == [("item", 5)]
    assert max(left[2:]) < 50, left  # the first two build statements


def test_items_that_came_since_the_last_poll_come_last(engine: Engine) -> None:
    catalog = Catalog()
    with writing(engine) as connection:
        store_events(connection, [NewEvent("anna", "1", "item-b", "click", None, NOW)], "create")
    popularity = polled(engine, catalog, Popularity(DEFAULT_MEANINGS, catalog))
    with writing(engine) as connection:
        store_events(connection, [NewEvent("anna", "2", "item-a", "click", None, NOW)], "create")
    with reading(engine) as connection:
        catalog.follow(connection)
    assert list(popularity.ranked()) == [("item-b", 1), ("item-a", 0)]
    assert list(polled(engine, catalog, popularity).ranked()) == [("item-a", 1), ("item-b", 1)]


def test_the_latest_after_many_changes(engine: Engine) -> None:
    catalog = Catalog()
    latest = Latest(catalog)
    for part in range(3):
        with writing(engine) as connection:
            now = datetime.now(UTC)
            names = [f"{part}-{number:04}" for number in range(MANY_CHANGES + 1)]
            store_events(connection, [NewEvent("anna", name, name, "click", None, now) for name in names], "create")
            connection.execute(sa.update(items).where(items.c.item_id == "0-0007").values(hidden=part == 1))
        with reading(engine) as connection:
            catalog.follow(connection)
        latest.poll()
        entries = [(entry.created_at, item_id) for item_id, entry in catalog.entries.items() if not entry.hidden]
        expected = [(item_id, created_at) for created_at, item_id in sorted(entries, reverse=True)]
        assert list(latest.ranked()) == expected
