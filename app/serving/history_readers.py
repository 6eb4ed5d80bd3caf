"""What is newer than what is known of some users, in one look at the database on a connection that is kept for it.

SQLite is read on the caller's thread: finding a page in memory takes microseconds, a change of threads longer.
PostgreSQL is asked without waiting: the event loop goes on until the answer is there. Both go past SQLAlchemy, whose
statements take several times as long as the database itself here.
"""

import asyncio
import math
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import pq
from pydantic_core import from_json
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DatabaseError, OperationalError

from app.tables import BLOCK_BITS

# A user, and the mark from which on events are wanted; None for all of them, unless they are many.
Asked = tuple[str, int | None]

# A reader of SQLite that must wait holds up the event loop; only another process's crash makes it wait.
SQLITE_WAIT_MS = 200
# Blocks of events that are looked through one by one: 500,000 events, in about 200 µs.
MOST_BLOCKS = 64
ANSWER_SECONDS = 5.0
ROWS_AT_A_TIME = 1_000
# More events than this are not read within a look.
MOST_EVENTS = 1_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Row(NamedTuple):
    """An event as a history needs it."""

    mark: int  # the position on SQLite, the transaction id on PostgreSQL
    position: int
    item_id: str
    type: str
    value: float | None
    occurred_at: int  # microseconds since 1970


class Events(NamedTuple):
    """All events of one user in any order, as columns."""

    marks: Sequence[int]
    positions: Sequence[int]
    item_ids: Sequence[str]
    types: Sequence[str]
    values: Sequence[float | None]  # all None where the reader was not asked for them
    occurred_at: npt.NDArray[np.int64]


class Look(NamedTuple):
    """What one look found, all as of one moment."""

    catalog: tuple[Any, ...]  # changes with every change to the catalogue and every erasure
    settled: int  # every event whose mark is lower was there to see
    rows: dict[str, list[Row]]  # newer ones by user; those without any are not named
    begun: dict[str, Events]  # of the users all of whose events were wanted; those with too many are not named


class Whole(NamedTuple):
    """All events of one user in order of time, as columns."""

    settled: int
    marks: list[int]
    positions: list[int]
    event_ids: list[str]
    item_ids: list[str]
    types: list[str]
    values: list[float | None]
    retracts: list[str | None]
    occurred_at: list[int]


class HistoryReader(Protocol):
    async def look(self, asked: Sequence[Asked]) -> Look:
        """Read what is newer. Raises SQLAlchemy's errors; after one the reader is of no more use."""

    def close(self) -> None: ...


def open_reader(engine: Engine, needs_values: bool) -> HistoryReader:
    """The reader that suits the database; `needs_values` asks for the values in `Look.begun` as well."""
    reader = PostgresReader if engine.dialect.name == "postgresql" else SqliteReader
    return reader(engine, needs_values)


def _driver_connection(engine: Engine) -> Any:
    """A connection of the driver's own, made as the engine makes them, that does not return to the pool."""
    try:
        pooled = engine.raw_connection()
    except (psycopg.Error, sqlite3.Error) as error:
        raise OperationalError("connect", None, error) from error
    connection = pooled.driver_connection
    pooled.detach()
    return connection


# --- SQLite --------------------------------------------------------------------------------------------------------

_SQLITE_STATE = (
    "SELECT (SELECT changes FROM catalog_state), (SELECT max(sequence) FROM erasures),"
    " (SELECT coalesce(max(position), 0) FROM events)"
)
_SQLITE_NEWER = "SELECT position, item_id, type, value, occurred_at FROM events WHERE user_id = ? AND position >= ?"
_SQLITE_NEWER_IN_BLOCK = f"{_SQLITE_NEWER} AND (position >> {BLOCK_BITS}) = ?"
# A column in one text is read faster than row by row. JSON would round values: they come in digits. The looks at the
# index alone spare reading too many; positions that are looked up come in their order.
_SQLITE_ALL = f"""
    SELECT json_group_array(position), json_group_array(item_id), json_group_array(type),
        json_group_array(occurred_at), {{values}}
    FROM events WHERE position IN (SELECT position FROM events WHERE user_id = ?1 LIMIT {MOST_EVENTS + 1})
    AND (SELECT count(*) FROM (SELECT 1 FROM events WHERE user_id = ?1 LIMIT {MOST_EVENTS + 1})) <= {MOST_EVENTS}
"""  # noqa: S608 - our own names
_SQLITE_ANY = "SELECT 1 FROM events WHERE user_id = ? LIMIT 1"
_SQLITE_VALUES = "json_group_array(iif(value IS NULL, NULL, printf('%!.17g', value)))"
_SQLITE_WHOLE = (
    "SELECT position, position, event_id, item_id, type, value, retracts, occurred_at FROM events"
    " WHERE user_id = ? ORDER BY occurred_at, position"
)


class SqliteReader:
    def __init__(self, engine: Engine, needs_values: bool) -> None:
        self._connection: sqlite3.Connection = _driver_connection(engine)
        self._all = _SQLITE_ALL.format(values=_SQLITE_VALUES if needs_values else "NULL")
        self._connection.execute(f"PRAGMA busy_timeout = {SQLITE_WAIT_MS}")
        self._connection.execute("PRAGMA query_only = ON")

    async def look(self, asked: Sequence[Asked]) -> Look:
        execute = self._connection.execute
        rows: dict[str, list[Row]] = {}
        begun: dict[str, Events] = {}
        try:
            execute("BEGIN")
            try:
                changes, erasure, newest = execute(_SQLITE_STATE).fetchone()
                for user_id, since in asked:
                    if since is None:
                        events = _sqlite_events(execute(self._all, (user_id,)).fetchone())
                        if len(events.positions) or execute(_SQLITE_ANY, (user_id,)).fetchone() is None:
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
            return execute(_SQLITE_NEWER, (user_id, since)).fetchall()
        found: list[tuple[Any, ...]] = []
        for block in range(first, last + 1):
            found += execute(_SQLITE_NEWER_IN_BLOCK, (user_id, since, block))
        return found

    def close(self) -> None:
        self._connection.close()


def _sqlite_events(found: tuple[str | None, ...]) -> Events:
    positions, item_ids, types, times = (from_json(column or "[]") for column in found[:4])
    values: list[float | None] = [None] * len(positions)
    if found[4] is not None:
        values = [None if digits is None else float(digits) for digits in from_json(found[4])]
    occurred_at = np.array(times, "datetime64[us]").astype(np.int64)
    return Events(positions, positions, item_ids, types, values, occurred_at)


def _microseconds(written: str) -> int:
    return (datetime.fromisoformat(written).replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND


# --- PostgreSQL ----------------------------------------------------------------------------------------------------

_MICROSECONDS = "(extract(epoch FROM occurred_at) * 1000000)::bigint"

# The first row tells of the database; the others are events, by the place of their user in the question.
_POSTGRESQL_LOOK = f"""
    SELECT 0, pg_snapshot_xmin(pg_current_snapshot())::text::bigint, (SELECT max(sequence) FROM erasures),
        (SELECT changes FROM catalog_state)::text, NULL, NULL, NULL
    UNION ALL
    SELECT asked.place, newer.* FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS asked (user_id, since, place)
    CROSS JOIN LATERAL (
        SELECT transaction_id, position, item_id, type, value, {_MICROSECONDS} FROM events
        WHERE events.user_id = asked.user_id AND events.transaction_id >= asked.since
        OFFSET 0
    ) AS newer
"""  # noqa: S608 - no part of it comes from outside
# All events of some users: a column in one value, as the wire has it, is read faster than row by row.
_POSTGRESQL_ALL = f"""
    SELECT asked.place, their.* FROM unnest($1::text[]) WITH ORDINALITY AS asked (user_id, place) CROSS JOIN LATERAL (
        SELECT string_agg(int8send(transaction_id), ''::bytea), string_agg(int8send(position), ''::bytea),
            string_agg(timestamptz_send(occurred_at), ''::bytea),
            string_agg(float8send(coalesce(value, 'NaN')), ''::bytea),
            string_agg(item_id, E'\n'), string_agg(type, E'\n')
        FROM (
            SELECT transaction_id, position, occurred_at, value, item_id, type FROM events
            WHERE events.user_id = asked.user_id LIMIT {MOST_EVENTS + 1}
        ) AS own
    ) AS their
"""  # noqa: S608 - our own names
_POSTGRESQL_EPOCH = 946_684_800_000_000  # microseconds from 1970 to its own beginning of time, 2000
_POSTGRESQL_SETTLED = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
_POSTGRESQL_WHOLE = f"""
    SELECT transaction_id, position, event_id, item_id, type, value, retracts, {_MICROSECONDS} FROM events
    WHERE user_id = %s ORDER BY occurred_at, position
"""  # noqa: S608 - our own names
# The plan never changes: two steps down an index for each user, whatever the statistics say.
_SETTINGS = ("jit = off", "plan_cache_mode = force_generic_plan", "enable_seqscan = off", "enable_bitmapscan = off")


class PostgresReader:
    """One prepared statement through libpq's own non-blocking calls, one question at a time."""

    def __init__(self, engine: Engine, needs_values: bool) -> None:
        self._needs_values = needs_values
        self._connection = _driver_connection(engine)
        try:
            self._connection.autocommit = True
            for setting in _SETTINGS:
                self._connection.execute(f"SET {setting}")
            self._pgconn: pq.abc.PGconn = self._connection.pgconn
            for name, statement in ((b"look", _POSTGRESQL_LOOK), (b"all", _POSTGRESQL_ALL)):
                prepared = self._pgconn.prepare(name, statement.encode())
                if prepared.status != pq.ExecStatus.COMMAND_OK:
                    raise psycopg.errors.error_from_result(prepared)
            self._pgconn.nonblocking = 1
        except psycopg.OperationalError as error:
            self._connection.close()
            raise OperationalError("look", None, error) from error
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket = self._pgconn.socket
        self._answer: asyncio.Future[pq.abc.PGresult] | None = None
        self._result: pq.abc.PGresult | None = None

    async def look(self, asked: Sequence[Asked]) -> Look:
        if self._loop is None:
            loop = self._loop = asyncio.get_running_loop()
            loop.add_reader(self._socket, self._readable)
        known = [(user_id, since) for user_id, since in asked if since is not None]
        marks = ",".join([str(since) for _, since in known])
        newer = await self._ask(b"look", [_array([user_id for user_id, _ in known]), f"{{{marks}}}".encode()])
        catalog, settled, rows = _newer(newer, known)
        begun: dict[str, Events] = {}
        if new := [user_id for user_id, since in asked if since is None]:
            # A moment later: what was settled before is so now.
            found = await self._ask(b"all", [_array(new)], pq.Format.BINARY)
            begun = {new[place]: events for place, events in _all(found, self._needs_values)}
        return Look(catalog, settled, rows, begun)

    async def _ask(self, name: bytes, values: list[bytes], result_format: int = pq.Format.TEXT) -> "pq.abc.PGresult":
        loop = asyncio.get_running_loop()
        answer = self._answer = loop.create_future()
        late = loop.call_later(ANSWER_SECONDS, self._fail, psycopg.OperationalError("no answer in time"))
        try:
            self._pgconn.send_query_prepared(name, values, result_format=result_format)
            while self._pgconn.flush():  # a question that is longer than the socket's buffer
                await asyncio.sleep(0.001)
            result: pq.abc.PGresult = await answer
            if result.status != pq.ExecStatus.TUPLES_OK:
                raise psycopg.errors.error_from_result(result)
        except psycopg.OperationalError as error:
            raise OperationalError("look", None, error) from error
        except psycopg.Error as error:
            raise DatabaseError("look", None, error) from error
        finally:
            late.cancel()
            self._answer = None
        return result

    def _readable(self) -> None:
        pgconn = self._pgconn
        try:
            pgconn.consume_input()
            while not pgconn.is_busy():
                result = pgconn.get_result()
                if result is not None:
                    self._result = result
                    continue
                finished, self._result = self._result, None
                if self._answer is not None and not self._answer.done() and finished is not None:
                    self._answer.set_result(finished)
                return
        except psycopg.Error as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._stop_listening()  # a socket that was closed would be readable for ever
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def _stop_listening(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket)

    def close(self) -> None:
        self._stop_listening()
        self._connection.close()


def _array(user_ids: Sequence[str]) -> bytes:
    quoted = [user_id.replace("\\", "\\\\").replace('"', '\\"') for user_id in user_ids]
    return ('{"' + '","'.join(quoted) + '"}' if quoted else "{}").encode()


def _newer(
    result: "pq.abc.PGresult", asked: Sequence[tuple[str, int]]
) -> tuple[tuple[Any, ...], int, dict[str, list[Row]]]:
    """The state of the catalogue, what is settled, and the rows by user."""
    value = result.get_value
    rows: dict[str, list[Row]] = {}
    settled = 0
    catalog: tuple[Any, ...] = ()
    for n in range(result.ntuples):
        place, mark, position, item_id, type_, amount, occurred_at = [value(n, column) for column in range(7)]
        if place == b"0":
            settled, catalog = int(mark or 0), (item_id, position)
            continue
        row = Row(
            int(mark or 0),
            int(position or 0),
            (item_id or b"").decode(),
            (type_ or b"").decode(),
            None if amount is None else float(amount),
            int(occurred_at or 0),
        )
        rows.setdefault(asked[int(place or 0) - 1][0], []).append(row)
    return catalog, settled, rows


def _all(result: "pq.abc.PGresult", needs_values: bool) -> Iterator[tuple[int, Events]]:
    """The events of each user by their place in the question, but for those with too many."""
    for n in range(result.ntuples):
        place, *columns = [result.get_value(n, column) or b"" for column in range(7)]
        marks, positions, times = (np.frombuffer(column, ">i8") for column in columns[:3])
        if len(positions) > MOST_EVENTS:
            continue
        values: list[float | None] = [None] * len(positions)
        if needs_values:
            numbers = np.frombuffer(columns[3], ">f8").tolist()
            values = [None if math.isnan(value) else value for value in numbers]
        item_ids, types = (column.decode().split("\n") if column else [] for column in columns[4:])
        if len(item_ids) != len(positions):  # an id that no caller could have given
            continue
        occurred_at = times.astype(np.int64) + _POSTGRESQL_EPOCH
        yield (
            int.from_bytes(place) - 1,
            Events(marks.tolist(), positions.tolist(), item_ids, types, values, occurred_at),
        )


# --- whole histories -----------------------------------------------------------------------------------------------


def read_whole(engine: Engine, user_id: str) -> Whole:
    """Read all events of a user; blocks."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            # Before the events: what commits between the two is read again, and known by its position.
            settled = int(connection.exec_driver_sql(_POSTGRESQL_SETTLED).scalar_one())
            found = connection.exec_driver_sql(_POSTGRESQL_WHOLE, (user_id,))
        else:
            settled = connection.exec_driver_sql(_SQLITE_STATE).one()[2] + 1
            found = connection.exec_driver_sql(_SQLITE_WHOLE, (user_id,))
        columns: list[list[Any]] = [[] for _ in range(8)]
        # In parts, for each is worked on without letting the event loop in between.
        for rows in found.partitions(ROWS_AT_A_TIME):
            for column, values in zip(columns, zip(*rows, strict=True), strict=True):
                column.extend(values)
            if engine.dialect.name == "sqlite":
                written = columns[7][-len(rows) :]
                columns[7][-len(rows) :] = np.array(written, "datetime64[us]").astype(np.int64).tolist()
    return Whole(settled, *columns)
