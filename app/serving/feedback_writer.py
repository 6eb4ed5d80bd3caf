"""Group commit: one thread writes the events of all waiting requests in one transaction, then answers them all."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import structlog
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from app.database import KeptWriter, is_outage
from app.serving.event_store import KnownSubjects, Outcome, store_events
from app.serving.new_events import NewEvent

log = structlog.get_logger(__name__)

MAX_ROWS_A_TRANSACTION = 8_000
# Beside the number of requests: rows that may wait, for each request that may.
MAX_ROWS_A_REQUEST_WAITING = 100
# A commit that another process's transaction forced back, as PostgreSQL does to break a deadlock.
MAX_ATTEMPTS = 3


class OverloadedError(Exception):
    """More requests wait for a commit than the queue holds."""


class StoppedError(Exception):
    """The service is shutting down: nothing was stored."""


@dataclass(frozen=True, slots=True)
class _Request:
    events: Sequence[NewEvent]
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[list[Outcome]]"


class FeedbackWriter:
    """`write` returns after the commit, so that what was acknowledged survives any crash."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int,
        unknown_items: Literal["create", "hold", "reject"],
        on_commit: Callable[[int], None] = lambda rows: None,  # noqa: ARG005
    ) -> None:
        self._writer = KeptWriter(engine)
        self._max_waiting = max_waiting
        self._max_rows = max_waiting * MAX_ROWS_A_REQUEST_WAITING
        self._unknown_items = unknown_items
        self._on_commit = on_commit
        self._waiting: deque[_Request] = deque()
        self._known = KnownSubjects()
        self._rows = 0
        self._stopping = False
        self._waking = False  # touched by the event loop alone
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="feedback-writer", daemon=True)

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, then end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    async def write(self, events: Sequence[NewEvent]) -> list[Outcome]:
        """Store events, durably; one outcome for each. OverloadedError, StoppedError or what the database said."""
        loop = asyncio.get_running_loop()
        request = _Request(events, loop, loop.create_future())
        with self._changed:
            if self._stopping:
                raise StoppedError("the service is shutting down")
            # A request larger than the whole queue still gets in when nothing else waits.
            full = len(self._waiting) >= self._max_waiting or self._rows + len(events) > self._max_rows
            if full and self._waiting:
                raise OverloadedError
            self._waiting.append(request)
            self._rows += len(events)
        if not self._waking:
            # Not yet: requests that came in the same round of the loop are to share the commit.
            self._waking = True
            loop.call_soon(self._wake)
        return await request.answer

    def _wake(self) -> None:
        self._waking = False
        with self._changed:
            self._changed.notify()

    def _take(self) -> list[_Request]:
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            taken: list[_Request] = []
            rows = 0
            while self._waiting and (not taken or rows + len(self._waiting[0].events) <= MAX_ROWS_A_TRANSACTION):
                request = self._waiting.popleft()
                taken.append(request)
                rows += len(request.events)
            self._rows -= rows
            return taken

    def _run(self) -> None:
        while requests := self._take():
            self._answer(requests)
        self._writer.close()

    def _answer(self, requests: list[_Request]) -> None:
        try:
            outcomes = self._commit(requests)
        except Exception as error:
            if len(requests) > 1 and not is_outage(error):
                # One request's fault must not be the others' loss.
                log.warning("feedback_group_split", requests=len(requests), reason=type(error).__name__)
                for request in requests:
                    self._answer([request])
                return
            _deliver([(request, error) for request in requests])
            return
        self._on_commit(len(outcomes))
        answers: list[tuple[_Request, list[Outcome] | Exception]] = []
        done = 0
        for request in requests:
            answers.append((request, outcomes[done : done + len(request.events)]))
            done += len(request.events)
        _deliver(answers)

    def _commit(self, requests: list[_Request]) -> list[Outcome]:
        events = [event for request in requests for event in request.events]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                with self._writer.writing() as connection:
                    outcomes = self._store(connection, events)
                self._known.commit()
                return outcomes
            except DBAPIError as error:
                self._known.roll_back()
                if attempt == MAX_ATTEMPTS or not _is_deadlock(error):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _store(self, connection: Connection, events: Sequence[NewEvent]) -> list[Outcome]:
        return store_events(connection, events, self._unknown_items, self._known)


def _is_deadlock(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) in {"40P01", "40001"}


def _deliver(answers: Sequence[tuple[_Request, list[Outcome] | Exception]]) -> None:
    """Hand answers over to their event loop, which is woken once for all of them."""

    def set_results(mine: list[tuple[_Request, list[Outcome] | Exception]]) -> None:
        for request, result in mine:
            if request.answer.done():  # the caller went away
                continue
            if isinstance(result, Exception):
                request.answer.set_exception(result)
            else:
                request.answer.set_result(result)

    for loop in {request.loop for request, _ in answers}:
        mine = [answer for answer in answers if answer[0].loop is loop]
        try:
            loop.call_soon_threadsafe(set_results, mine)
        except RuntimeError:
            rows = sum(len(request.events) for request, _ in mine)
            log.warning("feedback_answer_lost", rows=rows)  # the loop is closed: committed, but unheard
