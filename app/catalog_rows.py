"""Reading and writing users and items in SQL: one, a page, or many at once."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, RowMapping

from app.tables import catalog_state, items, users

Kind = Literal["user", "item"]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """Where a kind of row is kept, and what a new one has where nothing is said."""

    table: sa.Table
    key: sa.Column[str]
    defaults: Mapping[str, Any]

    def read(self) -> sa.Select[Any]:
        """All rows as callers know them."""
        return sa.select(*[column for column in self.table.c if column is not items.c.change])


SHAPES: dict[Kind, Shape] = {
    "user": Shape(users, users.c.user_id, {"metadata": {}}),
    "item": Shape(items, items.c.item_id, {"title": None, "categories": [], "hidden": False, "metadata": {}}),
}


@dataclass(frozen=True)
class Written:
    """What became of the rows of one write."""

    created: int
    updated: int
    unchanged: int


def read(connection: Connection, kind: Kind, identifier: str) -> RowMapping | None:
    """One user or item."""
    shape = SHAPES[kind]
    return connection.execute(shape.read().where(shape.key == identifier)).mappings().one_or_none()


def page(connection: Connection, kind: Kind, *, after: str | None, limit: int) -> list[RowMapping]:
    """The next rows in order of id, byte by byte."""
    shape = SHAPES[kind]
    query = shape.read().order_by(shape.key).limit(limit)
    if after is not None:
        query = query.where(shape.key > after)
    return list(connection.execute(query).mappings())


def replace(connection: Connection, kind: Kind, identifier: str, values: Values) -> bool:
    """Make a row exactly `values`, where nothing is said the defaults; True if it is new."""
    shape = SHAPES[kind]
    existed = _known(connection, shape, [identifier])
    _upsert(connection, shape, [{shape.key.name: identifier, **shape.defaults, **values}])
    return not existed


def merge(connection: Connection, kind: Kind, rows: Collection[Values]) -> Written:
    """Add rows, or change in those that exist what is given; what a row does not name stays as it is.

    The last one counts where an id comes twice. Some hundred rows a call: they are one transaction.
    """
    shape = SHAPES[kind]
    key = shape.key.name
    given: dict[str, dict[str, Any]] = {}
    for row in rows:
        given.setdefault(row[key], {}).update(row)
    # In order, so that two that write the same rows at once cannot wait for each other.
    ordered = sorted(given)
    known = _known(connection, shape, ordered)
    created = [{**shape.defaults, **given[identifier]} for identifier in ordered if identifier not in known]
    updated = 0
    if created:
        _upsert(connection, shape, created)
    for identifier in ordered:
        old = known.get(identifier)
        if old is None or all(old[name] == value for name, value in given[identifier].items()):
            continue
        changes = {name: value for name, value in given[identifier].items() if name != key}
        connection.execute(
            sa.update(shape.table).where(shape.key == identifier).values(**changes, updated_at=datetime.now(UTC))
        )
        updated += 1
    return Written(len(created), updated, len(given) - len(created) - updated)


def _known(connection: Connection, shape: Shape, identifiers: Sequence[str]) -> dict[str, RowMapping]:
    if shape.table is items and connection.dialect.name == "postgresql":
        # As all that change items do: the number first, then rows. The other way round, two could wait for each other.
        connection.execute(sa.select(catalog_state.c.changes).with_for_update())
    query = shape.read().where(shape.key.in_(identifiers)).order_by(shape.key).with_for_update()
    return {row[shape.key.name]: row for row in connection.execute(query).mappings()}


def _upsert(connection: Connection, shape: Shape, rows: Sequence[Values]) -> None:
    now = datetime.now(UTC)
    upsert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    insert: sqlite.Insert | postgresql.Insert = upsert(shape.table)
    changes = {name: insert.excluded[name] for name in (*shape.defaults, "updated_at")}
    # Another process may have made the row since we looked.
    connection.execute(
        insert.on_conflict_do_update(index_elements=[shape.key], set_=changes),
        [{**row, "created_at": now, "updated_at": now} for row in rows],
    )
