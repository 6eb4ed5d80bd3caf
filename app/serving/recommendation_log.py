"""What was shown, written behind the request: a bounded queue, a thread, batches; what is lost is counted."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.database import is_outage, writing
from app.erasure import subject_sha256
from app.tables import erasures, recommendation_log

log = structlog.get_logger(__name__)

# Whose user_id an answer has that was for nobody in particular: no user can have it.
NOBODY = ""
QUEUE_LENGTH = 20_000
BATCH_LENGTH = 500
# Rows wait at most this long, so that many share one transaction and feedback finds the database free.
GATHER_SECONDS = 0.2
RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Shown:
    """One answer, as the log keeps it."""

    recommendation_id: str
    user_id: str
    surface: str
    policy: str
    model_version: str | None
    source: str
    feedback_through: int | None
    filters: dict[str, Any]
    candidate_count: int
    item_ids: list[str]
    scores: list[float | None]  # None where nothing could score an item
    propensities: list[float]
    explorations: list[bool]
    created_at: datetime
    experiment: str | None = None
    variant: str | None = None

    def row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class RecommendationLog:
    """`add` never waits. Losses are told to `on_lost`."""

    def __init__(self, engine: Engine, on_lost: Callable[[int], None], length: int = QUEUE_LENGTH) -> None:
        self._engine = engine
        self._on_lost = on_lost
        self._length = length
        self._waiting: deque[Shown] = deque()
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

    def add(self, shown: Shown) -> None:
        if len(self._waiting) >= self._length:
            self._on_lost(1)
            return
        self._waiting.append(shown)
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

    def _write_waiting(self) -> bool:
        while self._waiting:
            batch = [self._waiting[index] for index in range(min(BATCH_LENGTH, len(self._waiting)))]
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

    def _write(self, batch: list[Shown]) -> None:
        with writing(self._engine) as connection:
            # A user erased while the answer waited here must not come back with it.
            if connection.dialect.name == "postgresql":
                # Now rather than at the insert: what is erased from here on waits for these rows, and takes them too.
                connection.execute(sa.text("LOCK TABLE recommendation_log IN ROW EXCLUSIVE MODE"))
            hashes = {shown.user_id: subject_sha256(shown.user_id) for shown in batch}
            erased = connection.execute(
                sa.select(erasures.c.subject_sha256, sa.func.max(erasures.c.erased_at).label("erased_at"))
                .where(erasures.c.kind == "user", erasures.c.subject_sha256.in_(set(hashes.values())))
                .group_by(erasures.c.subject_sha256)
            ).all()
            erased_at = {row.subject_sha256: row.erased_at for row in erased}
            rows = [
                shown.row()
                for shown in batch
                if (at := erased_at.get(hashes[shown.user_id])) is None or at < shown.created_at
            ]
            if rows:
                connection.execute(sa.insert(recommendation_log), rows)
