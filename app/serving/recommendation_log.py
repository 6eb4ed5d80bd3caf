"""What was shown, written behind the request: a bounded queue, a thread, batches; what is lost is counted."""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from random import getrandbits
from typing import Any, NamedTuple, TypeAlias

import psycopg
import sqlalchemy as sa
import structlog
from pydantic_core import to_json
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from app.database import KeptWriter, is_outage
from app.erasure import subject_sha256
from app.tables import erasures, recommendation_log

log = structlog.get_logger(__name__)

# Whose user_id an answer has that was for nobody in particular: no user can have it.
NOBODY = ""
QUEUE_LENGTH = 20_000
BATCH_LENGTH = 500
# Rows wait at most this long, so that many share one transaction and feedback finds the database free.
GATHER_SECONDS = 0.2
# Between so many rows the thread sleeps: on one core it would otherwise go on for milliseconds while requests wait.
PIECE_LENGTH = 64
PAUSE_SECONDS = 0.001
# From so many rows on it does not: then there are more than it could write with pauses.
NO_PAUSE_FROM = 2_000
RETRY_SECONDS = 1.0
# An answer that waits longer than this, through an outage of the database, is dropped rather than kept past an erasure.
ERASURES_REMEMBERED = timedelta(hours=1)


# What the log keeps of an answer but its id and time, as its columns take it: nothing that refers to anything else.
Row: TypeAlias = tuple[str | int | None, ...]


@dataclass(slots=True)
class Shown:
    """What was shown, once or several times."""

    user_id: str
    surface: str
    policy: str
    model_version: str | None
    source: str
    feedback_through: int | None
    filters: str  # as JSON: those of a query are the same for everybody
    candidate_count: int
    item_ids: list[str]
    scores: list[float | None]  # None where nothing could score an item
    # By item; None where nothing was left to chance: then each was certain to be shown where it stands.
    propensities: list[float] | None = None
    explorations: list[bool] | None = None
    experiment: str | None = None
    variant: str | None = None

    def as_row(self) -> Row:
        """The values in the order of `SHOWN`."""
        propensities, explorations = _certain(len(self.item_ids))
        return (
            self.user_id,
            self.surface,
            self.policy,
            self.experiment,
            self.variant,
            self.model_version,
            self.source,
            self.feedback_through,
            self.filters,
            self.candidate_count,
            as_json(self.item_ids),
            as_json(self.scores),
            propensities if self.propensities is None else as_json(self.propensities),
            explorations if self.explorations is None else as_json(self.explorations),
        )


def as_json(value: Any) -> str:
    """A value as a column of JSON takes it."""
    return to_json(value).decode()


@lru_cache
def _certain(count: int) -> tuple[str, str]:
    return as_json([1.0] * count), as_json([False] * count)


class Logged(NamedTuple):
    """An answer that waits to be written."""

    recommendation_id: str
    created_at: datetime
    row: Row

    @property
    def user_id(self) -> str:
        return str(self.row[_USER])


OWN = ("recommendation_id", "created_at")
SHOWN = tuple(column.name for column in recommendation_log.columns if column.name not in OWN)
COLUMNS = (*OWN, *SHOWN)
_USER = SHOWN.index("user_id")
_INSERT = f"INSERT INTO recommendation_log ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608
_COPY = f"COPY recommendation_log ({', '.join(COLUMNS)}) FROM STDIN"


def new_id() -> bytes:
    """The bytes of a UUID of version 7 (RFC 9562): in order of time, so that the log's index grows at its end alone."""
    milliseconds = time.time_ns() // 1_000_000
    chance = getrandbits(74)
    high = 0x7000 | chance >> 62
    low = 0x8000_0000_0000_0000 | chance & 0x3FFF_FFFF_FFFF_FFFF
    return (milliseconds << 80 | high << 64 | low).to_bytes(16)


def shown_to_nobody(
    surface: str,
    source: str,
    items: Sequence[tuple[str, float]],
    filters: dict[str, Any],
    candidate_count: int,
    model_version: str | None = None,
) -> Row:
    """An answer for nobody in particular, by chance in no part."""
    shown = Shown(
        user_id=NOBODY,
        surface=surface,
        policy="model" if model_version is not None else source,
        model_version=model_version,
        source=source,
        feedback_through=None,
        filters=as_json(filters),
        candidate_count=candidate_count,
        item_ids=[item_id for item_id, _ in items],
        scores=[score for _, score in items],
    )
    return shown.as_row()


class RecommendationLog:
    """`add` never waits. Losses are told to `on_lost`."""

    def __init__(self, engine: Engine, on_lost: Callable[[int], None], length: int = QUEUE_LENGTH) -> None:
        self._writer = KeptWriter(engine)
        self._on_lost = on_lost
        self._length = length
        self._waiting: deque[Logged] = deque()
        self._erasures_settled = 0  # sequence of an erasure that no waiting answer is older than
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recommendation-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, then end; what cannot be written at the first try is lost and counted."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, recommendation_id: str, row: Row) -> None:
        if len(self._waiting) >= self._length:
            self._on_lost(1)
            return
        self._waiting.append(Logged(recommendation_id, datetime.now(UTC), row))
        if not self._wake.is_set():
            self._wake.set()

    def __len__(self) -> int:
        return len(self._waiting)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._stopping.wait(GATHER_SECONDS)
            self._wake.clear()
            if not self._write_waiting():
                self._stopping.wait(RETRY_SECONDS)
                self._wake.set()
        if not self._write_waiting() and self._waiting:
            log.warning("recommendation_log_lost", rows=len(self._waiting))
            self._on_lost(len(self._waiting))
        self._writer.close()

    def _write_waiting(self) -> bool:
        left = len(self._waiting)  # what comes meanwhile gathers first: alone, each few rows would have a commit
        while left > 0:
            batch = [self._waiting[index] for index in range(min(BATCH_LENGTH, left))]
            left -= len(batch)
            try:
                self._write(batch)
            except SQLAlchemyError as error:
                if is_outage(error):
                    return False
                log.error("recommendation_log_lost", rows=len(batch), reason=type(error).__name__)
                self._on_lost(len(batch))
            for _ in batch:
                self._waiting.popleft()
        return True

    def _write(self, batch: list[Logged]) -> None:
        with self._writer.writing() as connection:
            # A user erased while the answer waited here must not come back with it.
            if connection.dialect.name == "postgresql":
                # Now rather than at the insert: what is erased from here on waits for these rows, and takes them too.
                connection.execute(sa.text("LOCK TABLE recommendation_log IN ROW EXCLUSIVE MODE"))
            if kept := self._without_erased(connection, batch):
                for start in range(0, len(kept), PIECE_LENGTH):
                    _insert(connection, kept[start : start + PIECE_LENGTH])
                    if len(self._waiting) < NO_PAUSE_FROM:
                        time.sleep(PAUSE_SECONDS)

    def _without_erased(self, connection: Connection, batch: list[Logged]) -> list[Logged]:
        kinds = erasures.c.kind, erasures.c.subject_sha256, erasures.c.erased_at, erasures.c.sequence
        later = sa.select(*kinds).where(erasures.c.sequence > self._erasures_settled).order_by(erasures.c.sequence)
        erased_at = {}
        settled = datetime.now(UTC) - ERASURES_REMEMBERED
        for kind, subject, erased, sequence in connection.execute(later):
            if erased < settled:  # before any answer that can still be waiting
                self._erasures_settled = sequence
            elif kind == "user":
                erased_at[subject] = erased
        if batch[0].created_at < settled:
            kept = [logged for logged in batch if logged.created_at >= settled]
            self._on_lost(len(batch) - len(kept))
            batch = kept
        if not erased_at:
            return batch
        return [
            logged
            for logged in batch
            if (at := erased_at.get(subject_sha256(logged.user_id))) is None or at < logged.created_at
        ]


def _insert(connection: Connection, batch: list[Logged]) -> None:
    """Past SQLAlchemy, which takes longer over a row than the request that it tells of."""
    driver: Any = connection.connection.driver_connection
    try:
        if connection.dialect.name == "sqlite":
            rows = [
                # The time as `UtcDateTime` keeps it: without the zone.
                (recommendation_id, created_at.isoformat(" ", "microseconds")[:26], *row)
                for recommendation_id, created_at, row in batch
            ]
            driver.executemany(_INSERT, rows)
        else:
            with driver.cursor() as cursor, cursor.copy(_COPY) as copy:
                for recommendation_id, created_at, row in batch:
                    copy.write_row((recommendation_id, created_at, *row))
    except (sqlite3.Error, psycopg.Error) as error:
        away = isinstance(error, sqlite3.OperationalError | psycopg.OperationalError)
        raise (OperationalError if away else DatabaseError)(_INSERT, None, error) from error
