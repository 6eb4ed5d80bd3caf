"""Reads histories from SQLite on the caller's thread: pages in memory are found sooner than threads change."""

import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from pydantic_core import from_json
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DatabaseError, OperationalError

from app.database import driver_connection
from app.serving.looks import MOST_EVENTS, NOTHING_LATE, PART, Asked, Events, Look, Row, in_order
from app.tables import BLOCK_BITS

# A reader that must wait holds up the event loop; only another process's crash makes it wait.
WAIT_MS = 200
# Blocks of events that are looked through one by one: 500,000 events, in about 200 µs.
MOST_BLOCKS = 64
TIME_LENGTH = 26  # of a time as `UtcDateTime` keeps it
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_STATE = (
    "SELECT (SELECT changes FROM catalog_state), (SELECT max(sequence) FROM erasures),"
    " (SELECT coalesce(max(position), 0) FROM events)"
)
_NEWER = "SELECT position, item_id, type, value, occurred_at FROM events WHERE user_id = ? AND position >= ?"
_NEWER_IN_BLOCK = f"{_NEWER} AND (position >> {BLOCK_BITS}) = ?"
# A column in one text is read faster than row by row. JSON would round values: they come in digits.
_ALL = f"""
    SELECT max(position), group_concat(position), group_concat(item_id, char(10)), group_concat(type, char(10)),
        group_concat(occurred_at, ''), {{values}}
    FROM events WHERE position IN (SELECT position FROM events WHERE user_id = ? LIMIT {MOST_EVENTS + 1})
"""  # noqa: S608 - our own names
_VALUES = "json_group_array(iif(value IS NULL, NULL, printf('%!.17g', value)))"
SETTLED = "SELECT coalesce(max(position), 0) + 1 FROM events"
_POSITIONS = "SELECT json_group_array(position) FROM events WHERE user_id = ?"
_PART = """
    SELECT json_group_array(position), json_group_array(position), json_group_array(item_id), json_group_array(type),
        json_group_array(occurred_at), {values}
    FROM events WHERE position IN (SELECT value FROM json_each(?))
"""


class SqliteReader:
    def __init__(self, engine: Engine, needs_values: bool) -> None:
        self._connection: sqlite3.Connection = driver_connection(engine)
        self._all = _ALL.format(values=_VALUES if needs_values else "NULL")
        self._connection.execute(f"PRAGMA busy_timeout = {WAIT_MS}")
        self._connection.execute("PRAGMA query_only = ON")

    async def look(self, asked: Sequence[Asked]) -> Look:
        execute = self._connection.execute
        rows: dict[str, list[Row]] = {}
        begun: dict[str, Events] = {}
        try:
            execute("BEGIN")
            try:
                changes, erasure, newest = execute(_STATE).fetchone()
                for user_id, since in asked:
                    if since is None:
                        events = _events(*execute(self._all, (user_id,)).fetchone())
                        if events is not None:
                            begun[user_id] = events
                    elif found := self._newer(user_id, since, newest):
                        rows[user_id] = [
                            Row(position, position, item_id, type_, value, _microseconds(occurred_at))
                            for position, item_id, type_, value, occurred_at in found
                        ]
            finally:
                execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise OperationalError("look", None, error) from error
        except sqlite3.Error as error:
            raise DatabaseError("look", None, error) from error
        return Look((changes, erasure), newest + 1, rows, begun)

    def _newer(self, user_id: str, since: int, newest: int) -> list[tuple[Any, ...]]:
        if since > newest:
            return []
        execute = self._connection.execute
        first, last = since >> BLOCK_BITS, newest >> BLOCK_BITS
        if last - first >= MOST_BLOCKS:
            # By the index on (user_id, event_id): in proportion to the history, and not to what all others did since.
            return execute(_NEWER, (user_id, since)).fetchall()
        found: list[tuple[Any, ...]] = []
        for block in range(first, last + 1):
            found += execute(_NEWER_IN_BLOCK, (user_id, since, block))
        return found

    def close(self) -> None:
        self._connection.close()


def _events(
    through: int | None, positions: str, item_ids: str, types: str, times: str, values: str | None
) -> Events | None:
    """The events in columns; None where they are too many, or not written as they are here."""
    if through is None:
        return Events(0, NOTHING_LATE, (), (), None, np.zeros(0, np.int64))
    listed = item_ids.split("\n")
    if len(listed) > MOST_EVENTS or len(times) != TIME_LENGTH * len(listed):
        return None
    amounts = None
    if values is not None:
        amounts = [None if digits is None else float(digits) for digits in from_json(values)]
    occurred_at = np.frombuffer(times.encode(), f"S{TIME_LENGTH}").astype("datetime64[us]").astype(np.int64)
    events = Events(through, NOTHING_LATE, listed, types.split("\n"), amounts, occurred_at)
    if (occurred_at[1:] > occurred_at[:-1]).all():
        return events
    return in_order(events, np.array(from_json(f"[{positions}]"), np.int64))


def parts(connection: Connection, user_id: str, needs_values: bool) -> Iterator[Sequence[str]]:
    """All events of a user in parts: marks, positions, items, types, times, and values if asked for, each as JSON."""
    statement = _PART.format(values=_VALUES if needs_values else "'[]'")
    positions = sorted(from_json(connection.exec_driver_sql(_POSITIONS, (user_id,)).scalar_one()))
    for first in range(0, len(positions), PART):
        yield connection.exec_driver_sql(statement, (str(positions[first : first + PART]),)).one()


def _microseconds(written: str) -> int:
    return (datetime.fromisoformat(written).replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
