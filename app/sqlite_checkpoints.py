"""Moves what was committed from SQLite's write-ahead log into its database file, behind the requests.

Otherwise whoever commits does it once the log is long: on one core a third of a second, half of it taken from requests.
"""

import os
import sqlite3
import sys
import threading
from typing import Any

import structlog
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.database import driver_connection

log = structlog.get_logger(__name__)

# Short enough for the log to stay small, which every reader looks through. Long lists fill it sooner, and who writes
# them moves it: the same pages come again and again there.
EVERY_SECONDS = 3.0
LOWEST_PRIORITY = 19


class SqliteCheckpoints:
    """A thread that asks for little of the processor; writers go on while it works.

    They still look after a long log, find little left to move, and begin it anew, which only a writer can.
    """

    def __init__(self, engine: Engine, every_seconds: float = EVERY_SECONDS) -> None:
        self._engine = engine
        self._every_seconds = every_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere threads have no priority of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        connection: Any = None
        while not self._stopping.wait(self._every_seconds):
            try:
                connection = connection or driver_connection(self._engine)
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            except (SQLAlchemyError, sqlite3.Error) as error:  # as on a full disk: writers meet it again, and tell
                log.debug("checkpoint_failed", reason=type(error).__name__)
        if connection is not None:
            connection.close()
