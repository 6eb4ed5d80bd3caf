"""Bulk writing of what files know about items and users: titles, categories, metadata."""

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from app.database import writing
from app.event_writer import SqliteWriter
from app.tables import items, users
from ml.importers import CatalogueItem, SourceUser

PAGE = 500
T = TypeVar("T")
INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def upsert_items(engine: Engine, described: Iterable[CatalogueItem]) -> Iterator[int]:
    """Add items and what is known about them; yields for each page the number that are new or changed.

    What a file does not say is kept: no title is overwritten by none.
    """
    return _upsert(engine, described, _upsert_item_page)


def upsert_users(engine: Engine, described: Iterable[SourceUser]) -> Iterator[int]:
    """Add users and what is known about them; yields for each page the number that are new or changed."""
    return _upsert(engine, described, _upsert_user_page)


def _upsert(engine: Engine, described: Iterable[T], write: Callable[[Connection, list[T]], int]) -> Iterator[int]:
    rows = iter(described)
    while page := list(islice(rows, PAGE)):
        with writing(engine) as connection:
            changed = write(connection, page)
        yield changed
        if engine.dialect.name == "sqlite":
            time.sleep(SqliteWriter.PAUSE_SECONDS)


def _upsert_item_page(connection: Connection, page: list[CatalogueItem]) -> int:
    now = datetime.now(UTC)
    # The last one counts where a file describes an item twice; sorted, so that two writers cannot deadlock.
    described = {item.item_id: item for item in sorted(page, key=lambda item: item.item_id)}
    rows = [
        {
            "item_id": item_id,
            "title": item.title,
            "categories": item.categories,
            "hidden": False,
            "metadata": item.metadata,
            "created_at": now,
            "updated_at": now,
        }
        for item_id, item in described.items()
    ]
    insert = INSERTS[connection.dialect.name](items).values(rows).on_conflict_do_nothing()
    changed = len(connection.execute(insert.returning(items.c.item_id)).all())
    for row in connection.execute(sa.select(items).where(items.c.item_id.in_(list(described))).with_for_update()):
        item = described[row.item_id]
        values = {
            "title": item.title or row.title,
            "categories": item.categories or row.categories,
            "metadata": {**row.metadata, **item.metadata},
        }
        if any(values[name] != row._mapping[name] for name in values):
            update = sa.update(items).where(items.c.item_id == row.item_id)
            connection.execute(update.values(**values, updated_at=now))
            changed += 1
    return changed


def _upsert_user_page(connection: Connection, page: list[SourceUser]) -> int:
    now = datetime.now(UTC)
    described = {user.user_id: user for user in sorted(page, key=lambda user: user.user_id)}
    rows = [
        {"user_id": user_id, "metadata": user.metadata, "created_at": now, "updated_at": now}
        for user_id, user in described.items()
    ]
    insert = INSERTS[connection.dialect.name](users).values(rows).on_conflict_do_nothing()
    changed = len(connection.execute(insert.returning(users.c.user_id)).all())
    for row in connection.execute(sa.select(users).where(users.c.user_id.in_(list(described))).with_for_update()):
        metadata = {**row.metadata, **described[row.user_id].metadata}
        if metadata != row.metadata:
            update = sa.update(users).where(users.c.user_id == row.user_id)
            connection.execute(update.values(metadata=metadata, updated_at=now))
            changed += 1
    return changed
