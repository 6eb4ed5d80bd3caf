"""Bulk writing of imported events: short transactions in SQLite, COPY in PostgreSQL.

A table of events has the columns `user_id, event_id, item_id, type, value, occurred_at` (timestamp in UTC without zone)
and `retracts`. An event that is already stored, by its user and event_id, is left as it is.
"""

import io
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from sqlalchemy.engine import Engine

EVENT_COLUMNS = ("user_id", "event_id", "item_id", "type", "value", "occurred_at", "retracts")
# Ids known to be in the catalogue, so that they are not offered to it again with every chunk.
MAX_KNOWN_IDS = 500_000


class EventWriter(Protocol):
    def write(self, events: pa.Table) -> Iterator[tuple[int, int]]:
        """Store the events chunk by chunk; each committed chunk yields (rows, rows that were new)."""

    def close(self) -> None: ...


def open_writer(engine: Engine) -> EventWriter:
    """The writer that suits the database; close it to release its connection."""
    return SqliteWriter(engine) if engine.dialect.name == "sqlite" else PostgresWriter(engine)


LAST_ERASURE = "SELECT max(sequence) FROM erasures"


class KnownIds:
    """Which ids the catalogue already has, in bounded memory."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def new(self, column: pa.ChunkedArray) -> list[str]:
        """The ids not seen before, sorted: transactions that lock rows in one order cannot deadlock."""
        return sorted(set(pc.unique(column).to_pylist()) - self._known)

    def add(self, ids: Sequence[str]) -> None:
        if len(self._known) + len(ids) > MAX_KNOWN_IDS:
            self._known.clear()
        self._known.update(ids[:MAX_KNOWN_IDS])

    def forget(self) -> None:
        """Know nothing: some of the ids may have been erased."""
        self._known.clear()


class SqliteWriter:
    """Writes in transactions so short that other writers, who poll for the lock, get in between two of them.

    SQLite has one writer at a time. The lock is held for about `HOLD_SECONDS` at a stretch (the chunks adapt to the
    disk) and then left alone for `PAUSE_SECONDS` and while the next chunk is made ready, longer than the polls of
    `app.database.writing` are apart. The events come sorted by user, so that a chunk touches few pages of the index.
    """

    HOLD_SECONDS = 0.020
    PAUSE_SECONDS = 0.004
    CHECKPOINT_EVERY = 16  # chunks; a checkpoint does not hold the write lock, but it writes the hot pages once more

    def __init__(self, engine: Engine) -> None:
        pooled = engine.raw_connection()
        connection: Any = pooled.driver_connection
        pooled.detach()  # its pragmas must not return to the pool
        self._connection = connection
        self._connection.execute("PRAGMA cache_size = -65536")
        self._connection.execute("PRAGMA wal_autocheckpoint = 0")
        self._chunk = 2_000
        self._chunks_written = 0
        self._users, self._items = KnownIds(), KnownIds()
        self._last_erasure = self._connection.execute(LAST_ERASURE).fetchone()

    def write(self, events: pa.Table) -> Iterator[tuple[int, int]]:
        start = 0
        while start < events.num_rows:
            chunk = events.slice(start, self._chunk)
            start += chunk.num_rows
            stored = self._write_chunk(chunk)
            yield chunk.num_rows, stored
            time.sleep(self.PAUSE_SECONDS)

    def _write_chunk(self, chunk: pa.Table) -> int:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
        occurred_at = chunk["occurred_at"].cast(pa.string())  # as SQLAlchemy writes it: always six decimals
        columns = [(occurred_at if name == "occurred_at" else chunk[name]).to_pylist() for name in EVENT_COLUMNS]
        rows = list(zip(*columns, [now] * chunk.num_rows, strict=True))
        users, items = self._users.new(chunk["user_id"]), self._items.new(chunk["item_id"])
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        began = time.perf_counter()
        try:
            last_erasure = connection.execute(LAST_ERASURE).fetchone()
            if last_erasure != self._last_erasure:
                self._users.forget()
                self._items.forget()
                users, items = self._users.new(chunk["user_id"]), self._items.new(chunk["item_id"])
                self._last_erasure = last_erasure
            connection.executemany(
                "INSERT INTO users (user_id, metadata, created_at, updated_at) VALUES (?, '{}', ?, ?)"
                " ON CONFLICT DO NOTHING",
                [(user, now, now) for user in users],
            )
            connection.executemany(
                "INSERT INTO items (item_id, categories, hidden, metadata, created_at, updated_at)"
                " VALUES (?, '[]', 0, '{}', ?, ?) ON CONFLICT DO NOTHING",
                [(item, now, now) for item in items],
            )
            stored: int = connection.executemany(
                f"INSERT INTO events ({', '.join(EVENT_COLUMNS)}, received_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
                " ON CONFLICT (user_id, event_id) DO NOTHING",
                rows,
            ).rowcount
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # on a full disk SQLite has rolled back by itself
                connection.execute("ROLLBACK")
            raise
        self._adapt(held=time.perf_counter() - began)
        self._users.add(users)
        self._items.add(items)
        return stored

    def _adapt(self, held: float) -> None:
        factor = min(max(self.HOLD_SECONDS / max(held, 1e-6), 0.5), 1.25)
        self._chunk = int(min(max(self._chunk * factor, 1_500), 10_000))
        self._chunks_written += 1
        if self._chunks_written % self.CHECKPOINT_EVERY == 0:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        # What cannot be moved out of the log now, as on a full disk, stays in it and is moved later.
        with suppress(sqlite3.OperationalError):
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        self._connection.close()


class PostgresWriter:
    """Copies chunks into a temporary table and inserts from there; writers do not wait for one another."""

    CHUNK = 20_000

    def __init__(self, engine: Engine) -> None:
        pooled = engine.raw_connection()
        connection: Any = pooled.driver_connection
        pooled.detach()  # its temporary table must not return to the pool
        self._connection = connection
        self._users, self._items = KnownIds(), KnownIds()
        self._connection.execute(
            "CREATE TEMPORARY TABLE imported (row bigint, user_id text, event_id text, item_id text, type text,"
            " value double precision, occurred_at timestamptz, retracts text) ON COMMIT DELETE ROWS"
        )
        self._last_erasure = self._connection.execute(LAST_ERASURE).fetchone()
        self._connection.commit()

    def write(self, events: pa.Table) -> Iterator[tuple[int, int]]:
        for start in range(0, events.num_rows, self.CHUNK):
            chunk = events.slice(start, self.CHUNK)
            yield chunk.num_rows, self._write_chunk(chunk)

    def _write_chunk(self, chunk: pa.Table) -> int:
        now = datetime.now(UTC)
        users, items = self._users.new(chunk["user_id"]), self._items.new(chunk["item_id"])
        # A transaction of their own, so that feedback about a new user waits for these few rows alone.
        self._add_users(users, now)
        self._connection.commit()
        self._add_items(items, now)
        self._connection.commit()
        zoned = chunk.set_column(
            chunk.schema.get_field_index("occurred_at"),
            "occurred_at",
            pc.binary_join_element_wise(chunk["occurred_at"].cast(pa.string()), pa.scalar("+00"), ""),
        )
        numbered = zoned.select(EVENT_COLUMNS).add_column(0, "row", pa.array(range(chunk.num_rows)))
        body = io.BytesIO()
        pyarrow.csv.write_csv(numbered, body, pyarrow.csv.WriteOptions(include_header=False))
        columns = ", ".join(EVENT_COLUMNS)
        with closing(self._connection.cursor()) as cursor:
            with cursor.copy(f"COPY imported (row, {columns}) FROM STDIN WITH (FORMAT csv)") as copy:
                copy.write(body.getvalue())
            cursor.execute(
                f"INSERT INTO events ({columns}, received_at) SELECT {columns}, %s FROM imported ORDER BY row"  # noqa: S608
                " ON CONFLICT (user_id, event_id) DO NOTHING",
                (now,),
            )
            stored: int = cursor.rowcount
        # An erasure waits for the events from here on; one that came before may have taken users or items of theirs.
        last_erasure = self._connection.execute(LAST_ERASURE).fetchone()
        if last_erasure != self._last_erasure:
            self._users.forget()
            self._items.forget()
            users, items = self._users.new(chunk["user_id"]), self._items.new(chunk["item_id"])
            self._add_users(users, now)
            self._add_items(items, now)
            self._last_erasure = last_erasure
        self._connection.commit()
        self._users.add(users)
        self._items.add(items)
        return stored

    def _add_users(self, ids: list[str], now: datetime) -> None:
        if ids:
            self._connection.execute(
                "INSERT INTO users (user_id, metadata, created_at, updated_at)"
                " SELECT id, '{}', %(now)s, %(now)s FROM unnest(%(ids)s::text[]) id ON CONFLICT DO NOTHING",
                {"ids": ids, "now": now},
            )

    def _add_items(self, ids: list[str], now: datetime) -> None:
        if ids:
            self._connection.execute(
                "INSERT INTO items (item_id, categories, hidden, metadata, created_at, updated_at)"
                " SELECT id, '[]', false, '{}', %(now)s, %(now)s FROM unnest(%(ids)s::text[]) id"
                " ON CONFLICT DO NOTHING",
                {"ids": ids, "now": now},
            )

    def close(self) -> None:
        self._connection.close()
