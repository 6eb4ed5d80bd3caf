"""The engine: SQLite in WAL mode or PostgreSQL, told apart by the URL alone."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

BUSY_TIMEOUT_SECONDS = 30
BUSY_POLL_SECONDS = 0.001
WRITER_CACHE_KIB = 65_536
WRITER_CHECKPOINT_PAGES = 32_000
CONNECT_TIMEOUT_SECONDS = 3
POOL_TIMEOUT_SECONDS = 5
# A network that swallows everything is noticed after about ten seconds; by itself TCP takes a quarter of an hour.
LOST_NETWORK = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


def create_engine(url: str | URL, **options: Any) -> Engine:
    """An engine whose commits are durable: SQLite with WAL and `synchronous=FULL`, or PostgreSQL."""
    # The older name of PostgreSQL that many hosts still hand out; SQLAlchemy no longer knows it.
    if isinstance(url, str) and url.startswith("postgres://"):
        url = "postgresql://" + url.removeprefix("postgres://")
    url = make_url(url)
    options.setdefault("hide_parameters", True)  # what a statement carried (ids, hashes of keys) stays out of the log
    if "poolclass" not in options:
        options = {"pool_timeout": POOL_TIMEOUT_SECONDS, "pool_size": 10, "max_overflow": 10, **options}
    if url.get_backend_name() == "postgresql":
        # A database that is gone is to be noticed in seconds, so that a request can still be answered without it.
        connect_args = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "options": "-c timezone=UTC", **LOST_NETWORK}
        return sa.create_engine(
            url.set(drivername="postgresql+psycopg"), pool_pre_ping=True, connect_args=connect_args, **options
        )
    if url.get_backend_name() != "sqlite":
        raise ValueError(f"the database must be SQLite or PostgreSQL, not {url.get_backend_name()}")
    if not url.database or url.database == ":memory:":
        raise ValueError("SQLite needs a file (sqlite:///path): one in memory is not shared between connections")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}, **options)
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; `_begin_sqlite` does
    # What was erased is overwritten, not just unlinked.
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    begin = connection.get_execution_options().get("sqlite_begin", "BEGIN")
    if begin != "BEGIN":
        _begin_writing(connection.connection.driver_connection, begin)
    else:
        connection.exec_driver_sql(begin)


def _begin_writing(connection: Any, begin: str) -> None:
    """Take SQLite's write lock as soon as it is free.

    SQLite itself sleeps up to 100 ms between two looks, which one process's many short transactions could turn
    into seconds for another's.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.execute(begin)
                return
            except sqlite3.OperationalError as error:
                # The low byte: extended codes tell that another process recovers the log after a crash, for one.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise OperationalError(begin, None, error) from error
            time.sleep(BUSY_POLL_SECONDS)
    finally:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_SECONDS * 1000}")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection on which all reads see the database as of one moment; SQLite's always do."""
    options = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
    with engine.connect().execution_options(**options) as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One write transaction, committed on leaving.

    On SQLite it takes the write lock at once: a reader that turns writer half-way would fail, not wait.
    """
    with engine.connect().execution_options(sqlite_begin="BEGIN IMMEDIATE") as connection, connection.begin():
        yield connection


def cluster_of(connection: Connection) -> str:
    """What PostgreSQL's transaction ids belong to: another after a restore from a dump, or to an earlier time."""
    if connection.dialect.name == "sqlite":
        return ""
    query = """SELECT (SELECT system_identifier FROM pg_control_system()) || '/'
                   || (SELECT timeline_id FROM pg_control_checkpoint()) || '/'
                   || (SELECT oid FROM pg_database WHERE datname = current_database())"""
    return str(connection.exec_driver_sql(query).scalar_one())


def driver_connection(engine: Engine) -> Any:
    """A connection of the driver's own, made as the engine makes them, that does not return to the pool."""
    try:
        pooled = engine.raw_connection()
    except engine.dialect.loaded_dbapi.Error as error:
        raise OperationalError("connect", None, error) from error
    connection = pooled.driver_connection
    pooled.detach()
    return connection


class KeptWriter:
    """Write transactions one after another on one thread, as `writing` makes them.

    On SQLite they share a connection with room for the pages that inserts touch, which are all over the indexes: what
    does not fit is read, and even written, several times a transaction. It lets the log of writes grow longer before it
    moves them into the database, as the same pages come again and again.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        if self._engine.dialect.name != "sqlite":
            with writing(self._engine) as connection:
                yield connection
            return
        kept = self._connection or self._connect()
        self._connection = None  # until this transaction has ended well
        try:
            with kept.begin():
                yield kept
        except BaseException:
            kept.invalidate()
            kept.close()
            raise
        self._connection = kept

    def _connect(self) -> Connection:
        connection = self._engine.connect().execution_options(sqlite_begin="BEGIN IMMEDIATE")
        driver: Any = connection.connection.driver_connection
        driver.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KIB}")
        driver.execute(f"PRAGMA wal_autocheckpoint = {WRITER_CHECKPOINT_PAGES}")
        return connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()  # its large cache must not return to the pool
            self._connection.close()
            self._connection = None


def is_outage(error: BaseException) -> bool:
    """Whether an error says that the database cannot be asked now, rather than that the question was wrong."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InterfaceError | PoolTimeout)


def outage_reason(error: BaseException) -> str:
    """What the driver said, in one line: that the disk is full, say, or that nobody listens."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]
