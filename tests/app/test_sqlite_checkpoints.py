"""What was committed reaches SQLite's own file behind the requests, on a thread that gives way to them."""

import os
import sqlite3
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from structlog.testing import capture_logs

from app.database import KeptWriter, create_engine
from app.sqlite_checkpoints import LOWEST_PRIORITY, SqliteCheckpoints
from app.tables import events

NOW = datetime(2026, 11, 21, tzinfo=UTC)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_log_is_moved_while_a_writer_goes_on(engine: Engine, tmp_path: Path) -> None:
    database = Path(str(engine.url.database))

    def moved() -> int:
        """How many events the file holds without its log."""
        alone = tmp_path / "alone.db"
        alone.write_bytes(database.read_bytes())
        with sqlite3.connect(alone) as connection:
            try:
                (count,) = connection.execute("SELECT count(*) FROM events").fetchone()
            except sqlite3.DatabaseError:  # copied in the middle of a move
                count = 0
        connection.close()
        return int(count)

    def write(first: int) -> None:
        row = {"user_id": "anna", "item_id": "a", "type": "click", "occurred_at": NOW, "received_at": NOW}
        with writer.writing() as connection:
            connection.execute(sa.insert(events), [row | {"event_id": f"e-{first + more}"} for more in range(10)])

    writer = KeptWriter(engine)
    write(0)
    assert moved() == 0
    checkpoints = SqliteCheckpoints(engine, every_seconds=0.01)
    checkpoints.start()
    try:
        for written in (10, 20, 30):
            deadline = time.monotonic() + 30
            while moved() < written:
                assert time.monotonic() < deadline
            write(written)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "checkpoints"]
        if sys.platform == "linux":
            own, other = thread.native_id, threading.get_native_id()
            assert own is not None
            assert os.getpriority(os.PRIO_PROCESS, own) == LOWEST_PRIORITY
            assert os.getpriority(os.PRIO_PROCESS, other) < LOWEST_PRIORITY
    finally:
        checkpoints.stop()
        writer.close()
    assert not thread.is_alive()


def test_a_free_connection_is_waited_for(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    checkpoints = SqliteCheckpoints(engine, every_seconds=0.01)
    with capture_logs() as logged:
        with engine.connect():  # the only one
            checkpoints.start()
            (thread,) = [thread for thread in threading.enumerate() if thread.name == "checkpoints"]
            while thread.is_alive() and len(logged) < 2:
                thread.join(0.01)
        assert {entry["reason"] for entry in logged} == {"TimeoutError"}
    assert thread.is_alive()
    checkpoints.stop()
    engine.dispose()
