"""Events that are to be stored, and their way into SQL: whole groups with one statement."""

import json
from collections.abc import Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy.engine import Connection

Key = tuple[str, str]


class NewEvent(NamedTuple):
    """One event as it came in; times and ids that the caller left out are filled in, and marked as ours."""

    user_id: str
    event_id: str
    item_id: str | None  # only a retract may leave it out
    type: str
    value: float | None
    occurred_at: datetime  # in UTC
    recommendation_id: str | None = None
    context: dict[str, Any] | None = None
    retracts: str | None = None
    timed_by_caller: bool = True

    @property
    def key(self) -> Key:
        return self[:2]


_ON_CONFLICT = "ON CONFLICT (user_id, event_id) DO NOTHING"
# Columns of `events`, in the order of NewEvent's fields, with the type that PostgreSQL is to read them as.
_TYPES = {
    "user_id": "text",
    "event_id": "text",
    "item_id": "text",
    "type": "text",
    "value": "float8",
    "occurred_at": "timestamptz",
    "recommendation_id": "text",
    "context": "text",
    "retracts": "text",
}

Columns = dict[str, Sequence[Any]]


def insert_events(connection: Connection, new: Sequence[NewEvent], received_at: datetime) -> set[Key] | None:
    """Insert events that are not in the table yet, of those that share an id the first; each user's in their order.

    `received_at` is in UTC. Returns the keys of those inserted, or None if all were.
    """
    # By user, as neighbours share pages of the indexes.
    by_user = sorted(new, key=itemgetter(0))
    # A column that nobody fills would cost as much as another.
    columns: Columns = {
        name: column
        for name, column in zip(_TYPES, zip(*by_user, strict=True), strict=False)
        if column.count(None) < len(new)
    }
    if "context" in columns:
        columns["context"] = [None if value is None else json.dumps(value) for value in columns["context"]]
    columns["occurred_at"] = [_written(moment) for moment in columns["occurred_at"]]
    insert = _insert_on_sqlite if connection.dialect.name == "sqlite" else _insert_on_postgresql
    return insert(connection, columns, received_at)


def _written(moment: datetime) -> str:
    """A time in UTC as `UtcDateTime` keeps it on SQLite."""
    return moment.isoformat(" ", "microseconds")[:26]


def _insert_on_sqlite(connection: Connection, columns: Columns, received_at: datetime) -> set[Key] | None:
    columns["received_at"] = [_written(received_at)] * len(columns["user_id"])
    rows = list(zip(*columns.values(), strict=True))
    places = ", ".join("?" * len(columns))
    insert = f"INSERT INTO events ({', '.join(columns)}) VALUES ({places}) {_ON_CONFLICT}"  # noqa: S608 - our own names
    before = connection.exec_driver_sql("SELECT max(position) FROM events").scalar() or 0
    if connection.exec_driver_sql(insert, rows).rowcount == len(rows):
        return None
    inserted = connection.exec_driver_sql("SELECT user_id, event_id FROM events WHERE position > ?", (before,))
    return {(user_id, event_id) for user_id, event_id in inserted}


def _insert_on_postgresql(connection: Connection, columns: Columns, received_at: datetime) -> set[Key] | None:
    # One text for any number of rows, which the server prepares once. Keys come back only where some are missing.
    names = ", ".join(columns)
    selected = ", ".join("context::json" if name == "context" else name for name in columns)
    arrays = ", ".join(f"%s::{_TYPES[name]}[]" for name in columns)
    statement = f"""
        WITH inserted AS (
            INSERT INTO events ({names}, received_at)
            SELECT {selected}, %s FROM unnest({arrays}) AS new ({names}) {_ON_CONFLICT}
            RETURNING user_id, event_id
        ), counted AS (SELECT count(*) AS rows FROM inserted)
        SELECT rows, NULL, NULL FROM counted
        UNION ALL SELECT rows, user_id, event_id FROM inserted, counted WHERE rows < %s
    """  # noqa: S608 - our own names
    expected = len(columns["user_id"])
    parameters = (received_at, *(_array(column) for column in columns.values()), expected)
    (rows, *_), *inserted = connection.exec_driver_sql(statement, parameters).all()
    return None if rows == expected else {(user_id, event_id) for _, user_id, event_id in inserted}


def _array(values: Sequence[str | float | None]) -> str:
    """An array as PostgreSQL reads it."""
    if isinstance(values[0], str) and None not in values:
        # Most texts hold nothing that is written otherwise, which one look at all of them tells.
        joined = '","'.join(values)  # type: ignore[arg-type]  # all texts: the column is of one kind
        if "\\" not in joined and joined.count('"') == 2 * (len(values) - 1):
            return f'{{"{joined}"}}'
    return "{" + ",".join(map(_quoted, values)) + "}"


def _quoted(value: str | float | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return repr(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
