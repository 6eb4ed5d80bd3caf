"""The catalogue in memory follows the order of the commits, whatever the clocks of those who write say."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.catalog_rows import merge
from app.database import create_engine, reading, writing
from app.erasure import erase
from app.main import create_app
from app.serving.catalog import Catalog, Entry
from app.settings import Settings
from app.tables import items

ITEMS = [f"item-{number}" for number in range(6)]
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def shown(client: TestClient) -> set[str]:
    answer = client.get("/users/anna/recommendations", params={"k": 50})
    assert answer.status_code == 200
    return {item["item_id"] for item in answer.json()["items"]}


def test_what_another_process_hides_is_gone_at_once_though_its_clock_is_slow(
    settings: Settings, connect: Any, publish: Any, engine: Engine
) -> None:
    publish("v1", ITEMS)
    with connect(create_app(settings.model_copy(update={"model_poll_seconds": 3600.0}))) as client:
        assert shown(client) == set(ITEMS)
        for hidden in ("item-2", "item-4"):
            with writing(engine) as connection:
                change = sa.update(items).where(items.c.item_id == hidden).values(hidden=True, updated_at=LONG_AGO)
                connection.execute(change)
            assert hidden not in shown(client)
        with writing(engine) as connection:
            row = {"item_id": "new", "categories": [], "hidden": False, "metadata": {}}
            connection.execute(sa.insert(items), [row | {"created_at": LONG_AGO, "updated_at": LONG_AGO}])
        assert shown(client) == {*ITEMS, "new"} - {"item-2", "item-4"}


def test_numbers_are_committed_in_their_order(postgresql_url: str) -> None:
    catalog, postgresql = Catalog(), create_engine(postgresql_url)
    with writing(postgresql) as first:
        merge(first, "item", [{"item_id": "a"}, {"item_id": "b"}])
        with writing(postgresql) as second:
            second.execute(sa.text("SET LOCAL lock_timeout = '20ms'"))
            with pytest.raises(sa.exc.OperationalError, match="lock timeout"), second.begin_nested():
                merge(second, "item", [{"item_id": "c"}])
        with reading(postgresql) as connection:
            catalog.follow(connection)
        assert not catalog.entries
    with writing(postgresql) as second:
        merge(second, "item", [{"item_id": "c"}])
    with reading(postgresql) as connection:
        catalog.follow(connection)
        numbers = {row.item_id: row.change for row in connection.execute(sa.select(items))}
    assert set(catalog.entries) == {"a", "b", "c"}
    assert numbers == {"a": 1, "b": 1, "c": 2}  # one a transaction
    postgresql.dispose()


def test_a_change_of_an_item_waits_for_its_number_before_its_row(postgresql_url: str) -> None:
    """Else one that holds the number and wants the row would wait for it in turn."""
    postgresql = create_engine(postgresql_url)
    with writing(postgresql) as connection:
        merge(connection, "item", [{"item_id": "a"}])

    def change() -> None:
        with writing(postgresql) as second:
            merge(second, "item", [{"item_id": "a", "title": "second"}])

    mine = "FROM pg_stat_activity WHERE datname = current_database()"
    waiting = sa.text(f"SELECT count(*) {mine} AND wait_event_type = 'Lock'")
    with ThreadPoolExecutor() as pool:
        with writing(postgresql) as first:
            merge(first, "item", [{"item_id": "b"}])
            changed = pool.submit(change)
            with postgresql.connect() as connection:
                while not connection.execute(waiting).scalar_one():
                    assert not changed.done()
                    connection.rollback()  # statistics are as of the transaction's begin
            merge(first, "item", [{"item_id": "a", "title": "first"}])
        changed.result()
    with reading(postgresql) as connection:
        assert connection.execute(sa.select(items.c.title).where(items.c.item_id == "a")).scalar_one() == "second"
    postgresql.dispose()


def test_an_item_that_came_back_while_its_erasure_was_read(engine: Engine) -> None:
    catalog = Catalog()
    with writing(engine) as connection:
        merge(connection, "item", [{"item_id": "a", "categories": ["old"]}, {"item_id": "b"}])
    with reading(engine) as connection:
        catalog.follow(connection)
    with reading(engine) as late:
        late.execute(sa.select(items)).all()  # it sees this moment from here on
        erase(engine, "item", "a", actor="test")
        with writing(engine) as connection:
            merge(connection, "item", [{"item_id": "a", "categories": ["new"]}])
        with reading(engine) as connection:
            catalog.follow(connection)
        now = dict(catalog.entries)
        catalog.follow(late)
    assert catalog.entries == now
    assert now["a"]._replace(created_at=LONG_AGO) == Entry(hidden=False, categories=("new",), created_at=LONG_AGO)
    assert catalog.in_category("old") == []
