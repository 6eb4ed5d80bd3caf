"""The lease of a claimed run, kept by a thread while the worker is busy."""

import threading
import time
from types import TracebackType

import structlog
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.training import runs
from app.training.runs import LeaseLost, Run

LOOK_SECONDS = 0.5  # how soon a cancel is noticed

log = structlog.get_logger()


class RunCancelled(Exception):  # noqa: N818 - nothing went wrong
    """Somebody asked for the run to be cancelled."""


class Lease:
    """Renews a run's lease in the background until it is left.

    While the database is gone it goes on trying: the fence, not the clock, decides what counts afterwards.
    """

    def __init__(self, engine: Engine, run: Run, seconds: float) -> None:
        self._engine = engine
        self._run = run
        self._seconds = seconds
        self._left = threading.Event()
        self._ended: Exception | None = None
        self._thread = threading.Thread(target=self._keep, name=f"lease-{run.run_id}", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def check(self) -> None:
        """Raise LeaseLost or RunCancelled once the work is to stop."""
        if self._ended is not None:
            raise self._ended

    def _keep(self) -> None:
        renewed = time.monotonic()
        while not self._left.wait(min(LOOK_SECONDS, self._seconds / 4)):
            try:
                started = time.monotonic()
                if started - renewed >= self._seconds / 3:
                    cancel = runs.renew(self._engine, self._run, self._seconds)
                    renewed = started
                else:
                    cancel = runs.cancel_requested(self._engine, self._run)
            except (LeaseLost, KeyError):
                self._ended = LeaseLost(f"run {self._run.run_id} was taken over or ended elsewhere")
                return
            except (DBAPIError, PoolTimeout) as error:
                log.warning("lease not renewed", run_id=self._run.run_id, reason=type(error).__name__)
                continue
            if cancel:
                self._ended = RunCancelled("cancelled while it ran")
                return
