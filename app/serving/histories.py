"""What users did, as committed at this moment: kept in memory, and brought up to date by one indexed read a request."""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import structlog
from sqlalchemy.engine import Engine
from starlette.concurrency import run_in_threadpool

from app.database import is_outage
from app.erasure import subject_sha256
from app.serving.catalog import Catalog
from app.serving.history_readers import HistoryReader, Look, Row, Whole, open_reader, read_whole
from ml.snapshots import RETRACT, EventMeaning, meaning_of

log = structlog.get_logger(__name__)

REMEMBERED_USERS = 20_000
# All remembered histories together, in units of four bytes.
REMEMBERED_NUMBERS = 20_000_000
# After the database failed to answer, requests do without it this long rather than wait for it one by one.
OUTAGE_SECONDS = 1.0

Numbers = npt.NDArray[np.int32]
Times = npt.NDArray[np.int64]
T = TypeVar("T", bound=np.generic)


class ItemNumbers:
    """A small number for each item that a history names, so that a history takes four bytes an item."""

    def __init__(self) -> None:
        self.item_ids: list[str] = []
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.item_ids)

    def number(self, item_id: str) -> int:
        """The item's number, a new one at first sight."""
        found = self._numbers.get(item_id)
        if found is not None:
            return found
        with self._lock:
            if item_id not in self._numbers:
                self.item_ids.append(item_id)
                self._numbers[item_id] = len(self.item_ids) - 1
            return self._numbers[item_id]

    def find(self, item_id: str) -> int:
        """The item's number; -1 where no history has named it."""
        return self._numbers.get(item_id, -1)

    def numbers(self, item_ids: Iterable[str]) -> Numbers:
        return np.fromiter(map(self.number, item_ids), np.int32)


_NO_NUMBERS: Numbers = np.zeros(0, np.int32)
_NO_TIMES: Times = np.zeros(0, np.int64)
_NOTHING_NUMBERED = ItemNumbers()


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """One user's interactions, oldest first, and what later answers leave out.

    It never changes: a newer one replaces it. `kept` holds what was worked out of it, and goes with it.
    """

    items: ItemNumbers = _NOTHING_NUMBERED
    interactions: Numbers = field(default_factory=lambda: _NO_NUMBERS)
    interacted_at: Times = field(default_factory=lambda: _NO_TIMES)  # when, in microseconds since 1970
    left_out: Numbers = field(default_factory=lambda: _NO_NUMBERS)  # distinct
    kept_out_for_good: Numbers = field(default_factory=lambda: _NO_NUMBERS)  # by an event that is no interaction
    feedback_through: int | None = None  # position of the user's newest event
    kept: list[Any] = field(default_factory=list)

    @property
    def item_ids(self) -> tuple[str, ...]:
        """The interactions' items."""
        return tuple(self._named(self.interactions))

    def latest(self, count: int) -> list[str]:
        """The items of the last so many interactions, oldest first."""
        return self._named(self.interactions[-count:])

    @property
    def excluded(self) -> frozenset[str]:
        """The items that later answers leave out."""
        return frozenset(self._named(self.left_out))

    def _named(self, numbers: Numbers) -> list[str]:
        item_ids = self.items.item_ids
        return [item_ids[number] for number in numbers.tolist()]


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

    @property
    def size(self) -> int:
        return 3 * len(self.history.interactions) + len(self.history.left_out) + len(self.history.kept_out_for_good)


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
        capacity: int = REMEMBERED_USERS,
    ) -> None:
        self._engine = engine
        self._catalog = catalog
        self._meanings = dict(meanings)
        self._max_history = max_history
        self._capacity = capacity
        self._items = ItemNumbers()
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
                self._size -= self._remembered.pop(user_id).size

    def forget_outage(self) -> None:
        """Ask the database again at once: somebody heard it answer."""
        self._outage_until = 0.0

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
            waiting, self._waiting = self._waiting, {}
            try:
                await self._answer(waiting)
            except Exception as error:
                self.close()
                _deliver(chain.from_iterable(waiting.values()), error)
        self._asking = False

    async def _answer(self, waiting: dict[str, list[Answer]]) -> None:
        known = {user_id: found for user_id in waiting if (found := self._remembered.get(user_id)) is not None}
        look = await self._look([(user_id, found.since) for user_id, found in known.items()])
        if look.catalog != self._followed:
            await run_in_threadpool(self._follow)
            self._followed = look.catalog
        for user_id, answers in waiting.items():
            was = known.get(user_id)
            history = None if was is None else self._brought_up(user_id, was, look)
            if history is not None:
                _deliver(answers, history)
            elif user_id in self._reading:
                self._reading[user_id].extend(answers)
            else:
                self._reading[user_id] = []
                self._start(self._answer_whole(user_id, answers))

    async def _look(self, asked: list[tuple[str, int]]) -> Look:
        used = self._reader
        if used is not None:
            try:
                return await used.look(asked)
            except Exception as error:  # a connection that broke while nobody used it is no outage yet
                used.close()
                self._reader = None
                if not is_outage(error):
                    raise
        self._reader = await run_in_threadpool(open_reader, self._engine)
        return await self._reader.look(asked)

    def _follow(self) -> None:
        with self._engine.connect() as connection:
            self._catalog.follow(connection)
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
        self._size += found.size - (replaced.size if replaced is not None else 0)
        while len(self._remembered) > self._capacity or (self._size > REMEMBERED_NUMBERS and len(self._remembered) > 1):
            self._size -= self._remembered.popitem(last=False)[1].size

    # --- from events to histories ----------------------------------------------------------------------------------

    def _brought_up(self, user_id: str, was: _Remembered, look: Look) -> History | None:
        """The history with what a look found; None if it must be read as a whole."""
        with self._lock:
            found = self._remembered.get(user_id)
            if found is None:  # erased, or pushed out
                return None
            rows = look.rows.get(user_id, ())
            if not rows and found is was and not was.positions:
                self._remembered.move_to_end(user_id)
                return was.history
            fresh = [row for row in rows if row.mark >= found.since and row.position not in found.positions]
            history = self._extended(found.history, fresh) if fresh else found.history
            if history is None:
                return None
            since = max(found.since, look.settled)
            positions = frozenset(row.position for row in rows if row.mark >= since)
            if found is not was:  # read as a whole since the look began: it may know more than the look
                positions |= found.positions
            self._remember(user_id, _Remembered(history, since, positions))
            return history

    def _extended(self, history: History, rows: Sequence[Row]) -> History | None:
        """The history with newer events; None where they do not simply follow it."""
        interactions, interacted_at = history.interactions, history.interacted_at
        left_out, kept_out = history.left_out, history.kept_out_for_good
        through = history.feedback_through or 0
        for row in sorted(rows, key=lambda row: (row.occurred_at, row.position)):
            if row.type == RETRACT:
                return None
            meaning = meaning_of(self._meanings, row.type)
            number = self._items.number(row.item_id)
            interaction = meaning.is_interaction(row.value)
            if meaning.excludes:
                left_out = _with_number(left_out, number)
                if not interaction:
                    kept_out = _with_number(kept_out, number)
            if interaction:
                place = int(np.searchsorted(interacted_at, row.occurred_at, "right"))
                if place and interacted_at[place - 1] == row.occurred_at and row.position < through:
                    return None  # which of the two came first, only their positions tell
                if place or len(interactions) < self._max_history:  # else it is older than all that count
                    interactions = _inserted(interactions, place, number)[-self._max_history :]
                    interacted_at = _inserted(interacted_at, place, row.occurred_at)[-self._max_history :]
        through = max(through, *(row.position for row in rows))
        return History(self._items, interactions, interacted_at, left_out, kept_out, through)

    def _whole(self, user_id: str) -> _Remembered:
        whole = read_whole(self._engine, user_id)
        positions = frozenset(
            position for mark, position in zip(whole.marks, whole.positions, strict=True) if mark >= whole.settled
        )
        return _Remembered(self._history(whole), whole.settled, positions)

    def _history(self, whole: Whole) -> History:
        if not whole.positions:
            return History(self._items)
        taken_back = {retracts for retracts in whole.retracts if retracts is not None}
        meanings = {type_: meaning_of(self._meanings, type_) for type_ in set(whole.types)}
        interactions: list[str] = []
        times: list[int] = []
        left_out: dict[str, None] = {}
        kept_out: dict[str, None] = {}
        columns = (whole.event_ids, whole.item_ids, whole.types, whole.values, whole.occurred_at)
        for event_id, item_id, type_, value, occurred_at in zip(*columns, strict=True):
            if type_ == RETRACT or event_id in taken_back:
                continue
            meaning = meanings[type_]
            interaction = meaning.is_interaction(value)
            if meaning.excludes:
                left_out[item_id] = None
                if not interaction:
                    kept_out[item_id] = None
            if interaction:
                interactions.append(item_id)
                times.append(occurred_at)
        return History(
            self._items,
            self._items.numbers(interactions[-self._max_history :]),
            np.array(times[-self._max_history :], np.int64),
            self._items.numbers(left_out),
            self._items.numbers(kept_out),
            max(whole.positions),
        )


def _inserted(values: npt.NDArray[T], place: int, value: int) -> npt.NDArray[T]:
    new = np.empty(len(values) + 1, values.dtype)
    new[:place], new[place], new[place + 1 :] = values[:place], value, values[place:]
    return new


def _with_number(numbers: Numbers, number: int) -> Numbers:
    return numbers if number in numbers else np.append(numbers, np.int32(number))


def _deliver(answers: Iterable[Answer], result: History | Exception) -> None:
    for answer in answers:
        if answer.done():  # who asked went away
            continue
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)
