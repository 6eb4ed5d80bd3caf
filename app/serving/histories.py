"""What users did, as committed at this moment: kept in memory, and brought up to date by one indexed read a request."""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import structlog
from sqlalchemy.engine import Engine
from starlette.concurrency import run_in_threadpool

from app.database import is_outage, reading
from app.erasure import subject_sha256
from app.serving.catalog import Catalog
from app.serving.history import History, HistoryBuilder, ItemNumbers
from app.serving.history_readers import open_reader, read_whole
from app.serving.looks import Asked, HistoryReader, Look
from ml.snapshots import EventMeaning

log = structlog.get_logger(__name__)

REMEMBERED_USERS = 20_000
# All remembered histories together, in units of four bytes.
REMEMBERED_NUMBERS = 20_000_000
# So many histories are begun with one look: each may take a millisecond.
MOST_BEGUN = 8
# A history so many marks behind is remembered as of this moment: a look takes longer the further it goes back.
MOST_BEHIND = 65_536
# After the database failed to answer, requests do without it this long rather than wait for it one by one.
OUTAGE_SECONDS = 1.0
# A process that ends waits so long for what is being read.
FINISH_SECONDS = 5.0

Answer: TypeAlias = "asyncio.Future[History]"


@dataclass(frozen=True, slots=True, eq=False)
class _Remembered:
    """A history and from where on it has to be read again.

    Events whose mark (a position on SQLite, a transaction id on PostgreSQL) is below `since` are all in it; of those
    from there on, the ones at `positions` are.
    """

    history: History
    since: int
    positions: frozenset[int]


class Histories:
    """Remembers the users seen last. Each request asks what is newer; those that wait at the same time ask together.

    `read` belongs to the event loop; the rest may be called from any thread.
    """

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        meanings: Mapping[str, EventMeaning],
        max_history: int,
        *,
        capacity: int = REMEMBERED_USERS,
        on_news: Callable[[ItemNumbers], None] = lambda items: None,  # noqa: ARG005
    ) -> None:
        """`on_news` hears on a thread, before requests that wait do, that the catalogue or these items may be more."""
        self._engine = engine
        self._catalog = catalog
        self._builder = HistoryBuilder(meanings, max_history)
        self._capacity = capacity
        self._on_news = on_news
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()
        self._size = 0
        self._erasures_through = 0
        self._forgotten = 0  # what was being read when something was forgotten is not kept
        self._lock = threading.Lock()
        self._outage_until = 0.0
        self._reader: HistoryReader | None = None
        self._followed: tuple[Any, ...] | None = None  # the state of the catalogue
        self._waiting: dict[str, list[Answer]] = {}
        self._asking = False
        # Users whose whole history is being read, with the requests that came too late to be answered by it.
        self._reading: dict[str, list[Answer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def read(self, user_id: str) -> History | None:
        """The history as committed at this moment; None while the database cannot be asked."""
        if time.monotonic() < self._outage_until:
            return None
        answer: Answer = asyncio.get_running_loop().create_future()
        self._wait_for(user_id, [answer])
        try:
            return await answer
        except Exception as error:
            if not is_outage(error):
                raise
            if time.monotonic() >= self._outage_until:
                log.warning("ranking_without_database", reason=type(error).__name__)
                self._outage_until = time.monotonic() + OUTAGE_SECONDS
            return None

    def remembered(self, user_id: str) -> History | None:
        """What was last read for this user, or None."""
        found = self._remembered.get(user_id)
        return found.history if found is not None else None

    @property
    def items(self) -> ItemNumbers:
        """The items of all histories that were read."""
        return self._builder.items

    @property
    def is_asked(self) -> bool:
        """Whether anyone waits for a history."""
        return self._asking

    async def read_ahead(self, user_ids: Sequence[str]) -> int | None:
        """Read histories that are not remembered before anyone asks; how many there were, or None without room for all.

        They make room before those that were asked for.
        """
        if len(self._remembered) + len(user_ids) > self._capacity or self._size >= REMEMBERED_NUMBERS:
            return None
        new = [user_id for user_id in user_ids if user_id not in self._remembered]
        await asyncio.gather(*[self.read(user_id) for user_id in new])
        with self._lock:
            for user_id in new:
                if user_id in self._remembered:
                    self._remembered.move_to_end(user_id, last=False)
        return len(new)

    def forget_erased(self) -> None:
        """Drop what the catalogue has heard was erased since the last call."""
        with self._lock:
            through, since = self._catalog.erasures_through, self._erasures_through
            if through == since:
                return
            self._erasures_through = through
            self._forgotten += 1
            if any(sequence > since for sequence in self._catalog.erased_items.copy().values()):
                self._remembered.clear()  # its events were in many of them
                self._size = 0
                return
            gone = {user for user, sequence in self._catalog.erased_users.copy().items() if sequence > since}
            for user_id in [user_id for user_id in self._remembered if subject_sha256(user_id) in gone]:
                self._size -= self._remembered.pop(user_id).history.size

    def forget_outage(self) -> None:
        """Ask the database again at once: somebody heard it answer."""
        self._outage_until = 0.0

    async def finish(self) -> None:
        """Let what is being read come to its end, so that no connection is left open, and close."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FINISH_SECONDS):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        self.close()

    def close(self) -> None:
        """Let go of the connection; on the event loop."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # --- asking the database -------------------------------------------------------------------------------------

    def _wait_for(self, user_id: str, answers: list[Answer]) -> None:
        self._waiting.setdefault(user_id, []).extend(answers)
        if not self._asking:
            self._asking = True
            self._start(self._ask())

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self) -> None:
        """Answer all that wait, round by round; what arrives during a round belongs to the next one."""
        while self._waiting:
            # What has arrived by now comes along: twice as many share a round.
            await asyncio.sleep(0)
            waiting = self._next_round()
            try:
                await self._answer(waiting)
            except Exception as error:
                self.close()
                _deliver(chain.from_iterable(waiting.values()), error)
        self._asking = False

    def _next_round(self) -> dict[str, list[Answer]]:
        """All that wait, but for users who are new here and too many: to begin a history takes longer."""
        waiting, self._waiting = self._waiting, {}
        new = [user_id for user_id in waiting if user_id not in self._remembered]
        for user_id in new[MOST_BEGUN:]:
            self._waiting[user_id] = waiting.pop(user_id)
        return waiting

    async def _answer(self, waiting: dict[str, list[Answer]]) -> None:
        known = {user_id: self._remembered.get(user_id) for user_id in waiting}
        forgotten = self._forgotten
        look = await self._look([(user_id, None if was is None else was.since) for user_id, was in known.items()])
        if look.catalog != self._followed:
            await run_in_threadpool(self._follow)
            self._followed = look.catalog
        for user_id, answers in waiting.items():
            was = known[user_id]
            history = self._begun(user_id, look, forgotten) if was is None else self._brought_up(user_id, was, look)
            if history is not None:
                _deliver(answers, history)
            elif user_id in self._reading:
                self._reading[user_id].extend(answers)
            else:
                self._reading[user_id] = []
                self._start(self._answer_whole(user_id, answers))

    async def _look(self, asked: list[Asked]) -> Look:
        used = self._reader
        if used is not None:
            try:
                return await used.look(asked)
            except Exception as error:  # a connection that broke while nobody used it is no outage yet
                used.close()
                self._reader = None
                if not is_outage(error):
                    raise
        self._reader = await run_in_threadpool(open_reader, self._engine, self._builder.needs_values)
        return await self._reader.look(asked)

    def _follow(self) -> None:
        with reading(self._engine) as connection:
            self._catalog.follow(connection)
        self._on_news(self._builder.items)
        self.forget_erased()

    async def _answer_whole(self, user_id: str, answers: list[Answer]) -> None:
        forgotten = self._forgotten
        try:
            found = await run_in_threadpool(self._whole, user_id)
        except Exception as error:
            _deliver(chain(answers, self._reading.pop(user_id)), error)
            return
        with self._lock:
            if self._forgotten == forgotten:
                self._remember(user_id, found)
        _deliver(answers, found.history)
        if later := self._reading.pop(user_id):
            self._wait_for(user_id, later)

    def _remember(self, user_id: str, found: _Remembered) -> None:
        replaced = self._remembered.pop(user_id, None)
        self._remembered[user_id] = found
        self._size += found.history.size - (0 if replaced is None else replaced.history.size)
        while len(self._remembered) > self._capacity or (self._size > REMEMBERED_NUMBERS and len(self._remembered) > 1):
            self._size -= self._remembered.popitem(last=False)[1].history.size

    # --- from events to histories ----------------------------------------------------------------------------------

    def _begun(self, user_id: str, look: Look, forgotten: int) -> History | None:
        """The history of a user who is new here; None if it must be read as a whole."""
        events = look.begun.get(user_id)
        history = None if events is None else self._builder.of_events(events)
        if events is None or history is None:
            return None
        with self._lock:
            if self._forgotten == forgotten:
                self._remember(user_id, _Remembered(history, look.settled, events.late))
        return history

    def _brought_up(self, user_id: str, was: _Remembered, look: Look) -> History | None:
        """The history with what a look found; None if it must be read as a whole."""
        with self._lock:
            found = self._remembered.get(user_id)
            if found is None:  # erased, or pushed out
                return None
            rows = look.rows.get(user_id, ())
            if not rows and found is was and not was.positions:
                if look.settled - was.since > MOST_BEHIND:
                    self._remember(user_id, _Remembered(was.history, look.settled, frozenset()))
                else:
                    self._remembered.move_to_end(user_id)
                return was.history
            fresh = [row for row in rows if row.mark >= found.since and row.position not in found.positions]
            history = self._builder.extended(found.history, fresh) if fresh else found.history
            if history is None:
                return None
            since = max(found.since, look.settled)
            positions = frozenset(row.position for row in rows if row.mark >= since)
            if found is not was:  # read as a whole since the look began: it may know more than the look
                positions |= found.positions
            self._remember(user_id, _Remembered(history, since, positions))
            return history

    def _whole(self, user_id: str) -> _Remembered:
        whole = read_whole(self._engine, user_id, self._builder.needs_values)
        late = frozenset(
            chain.from_iterable(part.positions[part.marks >= whole.settled].tolist() for part in whole.parts)
        )
        history = self._builder.of_whole(whole)
        self._on_news(self._builder.items)
        return _Remembered(history, whole.settled, late)


def _deliver(answers: Iterable[Answer], result: History | Exception) -> None:
    for answer in answers:
        if answer.done():  # who asked went away
            continue
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)
