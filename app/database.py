"""The engine: SQLite in WAL mode or PostgreSQL, told apart by the URL alone."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url

BUSY_TIMEOUT_SECONDS = 30


def create_engine(url: str | URL, **options: Any) -> Engine:
    """An engine whose commits are durable: SQLite with WAL and `synchronous=FULL`, or PostgreSQL."""
    url = make_url(url)
    if url.get_backend_name() != "sqlite":
        # A database that is gone is to be noticed in seconds, so that a request can still be answered without it.
        connect_args = {"connect_timeout": 3, "options": "-c timezone=UTC"}
        return sa.create_engine(url, pool_pre_ping=True, connect_args=connect_args, **options)
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}, **options)
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; `_begin_sqlite` does
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One write transaction, committed on leaving.

    On SQLite it takes the write lock at once: a reader that turns writer half-way would fail, not wait.
    """
    with engine.connect().execution_options(sqlite_begin="BEGIN IMMEDIATE") as connection, connection.begin():
        yield connection
