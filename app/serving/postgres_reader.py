"""Reads histories from PostgreSQL without waiting: the event loop goes on until the answer is there."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psycopg
from psycopg import pq
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DatabaseError, OperationalError

from app.database import driver_connection
from app.serving.looks import MOST_EVENTS, NOTHING_LATE, PART, Asked, Events, Look, Row, in_order

ANSWER_SECONDS = 5.0
_MICROSECONDS = "(extract(epoch FROM occurred_at) * 1000000)::bigint"

# The first row tells of the database; the others are events, by the place of their user in the question.
_LOOK = f"""
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
_ALL = f"""
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
_EPOCH = 946_684_800_000_000  # microseconds from 1970 to its own beginning of time, 2000
SETTLED = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
_PARTS = f"""
    SELECT json_agg(transaction_id)::text, json_agg(position)::text, json_agg(item_id)::text, json_agg(type)::text,
        json_agg({_MICROSECONDS})::text, {{values}}
    FROM (SELECT *, row_number() OVER () / {PART} AS part FROM events WHERE user_id = %s) AS own GROUP BY part
"""  # noqa: S608 - our own names
# The plan never changes: two steps down an index for each user, whatever the statistics say.
_SETTINGS = ("jit = off", "plan_cache_mode = force_generic_plan", "enable_seqscan = off", "enable_bitmapscan = off")


class PostgresReader:
    """One prepared statement through libpq's own non-blocking calls, one question at a time."""

    def __init__(self, engine: Engine, needs_values: bool) -> None:
        self._needs_values = needs_values
        self._connection = driver_connection(engine)
        try:
            self._connection.autocommit = True
            for setting in _SETTINGS:
                self._connection.execute(f"SET {setting}")
            self._pgconn: pq.abc.PGconn = self._connection.pgconn
            for name, statement in ((b"look", _LOOK), (b"all", _ALL)):
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
            begun = {new[place]: events for place, events in _all(found, settled, self._needs_values)}
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


def parts(connection: Connection, user_id: str, needs_values: bool) -> Iterator[Sequence[str]]:
    """All events of a user in parts: marks, positions, items, types, times, and values if asked for, each as JSON."""
    statement = _PARTS.format(values="json_agg(value)::text" if needs_values else "'[]'")
    yield from connection.exec_driver_sql(statement, (user_id,))


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


def _all(result: "pq.abc.PGresult", settled: int, needs_values: bool) -> Iterator[tuple[int, Events]]:
    """The events of each user by their place in the question, but for those with too many."""
    for n in range(result.ntuples):
        place, *columns = [result.get_value(n, column) or b"" for column in range(7)]
        marks, positions, times = [np.frombuffer(column, ">i8") for column in columns[:3]]
        count = len(positions)
        if count > MOST_EVENTS:
            continue
        values = None
        if needs_values:
            values = [None if math.isnan(value) else value for value in np.frombuffer(columns[3], ">f8").tolist()]
        item_ids, types = [column.decode().split("\n") if count else [] for column in columns[4:]]
        if len(item_ids) != count:  # an id that no caller could have given
            continue
        is_late = marks >= settled
        late = frozenset(positions[is_late].tolist()) if is_late.any() else NOTHING_LATE
        through = int(positions.max()) if count else 0
        events = Events(through, late, item_ids, types, values, times.astype(np.int64) + _EPOCH)
        yield int.from_bytes(place) - 1, in_order(events, positions)
