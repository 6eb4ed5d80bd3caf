"""How often each item was chosen of late: interactions by hour, counted once at the start, then kept in step."""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app.serving.interaction_counts import Counted, HourOf, NewInteractions, goes_on, look
from app.tables import events
from ml.snapshots import EventMeaning

# The longest window of trending, the same three times before it, and the hour that has begun.
REFERENCE_WINDOWS = 3
MAX_TRENDING_HOURS = 24 * 7
MAX_POPULAR_HOURS = MAX_TRENDING_HOURS * (1 + REFERENCE_WINDOWS)
REMEMBERED_ORDERS = 64

Kind = Literal["popular", "trending"]
Counts = npt.NDArray[np.int64]


class _Hour:
    """The interactions of one hour: item numbers, sorted, and how often each was chosen."""

    __slots__ = ("counts", "numbers")

    def __init__(self) -> None:
        self.numbers = np.zeros(0, np.int32)
        self.counts = np.zeros(0, np.int32)

    def add(self, numbers: list[int], counts: list[int]) -> None:
        every = np.concatenate([self.numbers, np.asarray(numbers, np.int32)])
        weights = np.concatenate([self.counts, np.asarray(counts, np.int32)])
        self.numbers, places = np.unique(every, return_inverse=True)
        self.counts = np.bincount(places, weights, len(self.numbers)).astype(np.int32)


class _Numbers:
    """Items by number, in the order in which they were met."""

    __slots__ = ("_known", "item_ids")

    def __init__(self) -> None:
        self.item_ids: list[str] = []
        self._known: dict[str, int] = {}

    def of(self, item_id: str) -> int:
        number = self._known.get(item_id)
        if number is None:
            self.item_ids.append(item_id)
            number = self._known[item_id] = len(self.item_ids) - 1
        return number


@dataclass(frozen=True)
class _Order:
    """Item numbers by score, the highest first, at one moment."""

    state: tuple[int, int]  # the generation of the counts, and the hour
    numbers: npt.NDArray[np.intp]
    negated: npt.NDArray[np.float64]  # the scores, so that they rise
    item_ids: list[str]


class Activity:
    """Counts of the last four weeks by hour. `poll` runs on one thread; `ranked` on any.

    What happened counts by `occurred_at`, so that importing old events makes nothing trend. Hours are whole: a window
    of w hours is the w before the running one, and the running one.
    """

    def __init__(
        self,
        meanings: Mapping[str, EventMeaning],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        quiet_through: Callable[[datetime], int] = lambda _: 0,
    ) -> None:
        self._new_interactions = NewInteractions(meanings, _by_hour)
        self._clock = clock
        self._quiet_through = quiet_through  # a mark up to which all interactions are older than a moment
        self._hours: dict[int, _Hour] = {}
        self._numbers = _Numbers()
        self._counted: Counted | None = None
        self._generation = 0
        self._orders: OrderedDict[tuple[Kind, int], _Order] = OrderedDict()
        self._lock = threading.Lock()

    def ranked(self, kind: Kind, hours: int) -> Iterator[tuple[str, float]]:
        """Items with their scores in a window of the last `hours`, best first, equals by id; hidden ones included.

        `popular` scores by c, the interactions within the window. `trending` scores by (c - e) / sqrt(e + 1), where
        e is what the three windows before let expect in as much time, and lists what has more than that: the growth
        in standard deviations of a Poisson count, with one more so that a single click is no sensation.
        """
        order = self._order_of(kind, hours)
        first = 0
        while first < len(order.numbers):
            # Ids are compared only where scores tie, and only once the caller has come that far.
            last = int(np.searchsorted(order.negated, order.negated[first], side="right"))
            score = -float(order.negated[first])
            for item_id in sorted(order.item_ids[number] for number in order.numbers[first:last].tolist()):
                yield item_id, score
            first = last

    def _order_of(self, kind: Kind, hours: int) -> _Order:
        now = self._clock()
        with self._lock:
            state = (self._generation, _hour_of(now))
            order = self._orders.get((kind, hours))
            if order is None or order.state != state:
                order = self._orders[kind, hours] = self._order(kind, hours, now, state)
                if len(self._orders) > REMEMBERED_ORDERS:
                    self._orders.popitem(last=False)
            self._orders.move_to_end((kind, hours))
            return order

    def poll(self, connection: Connection) -> None:
        """Count the events that came since, and let go of what is too long ago."""
        now, counted = look(connection), self._counted
        oldest = _hour_of(self._clock()) - MAX_POPULAR_HOURS
        if counted is not None and goes_on(connection, counted, now):
            again, since, numbers = False, counted.through, self._numbers
        else:
            again, since, numbers = True, self._quiet_through(_start_of(oldest)), _Numbers()
        changes = self._changes(connection, numbers, since, now.through, oldest) if now.through > since else {}
        with self._lock:
            if again:
                self._hours, self._numbers = {}, numbers
            expired = [hour for hour in self._hours if hour < oldest]
            for hour in expired:
                del self._hours[hour]
            for hour, (chosen, counts) in changes.items():
                self._hours.setdefault(hour, _Hour()).add(chosen, counts)
            self._generation += bool(changes or expired or again)
            self._counted = now

    def _changes(
        self, connection: Connection, numbers: "_Numbers", since: int, through: int, oldest: int
    ) -> dict[int, tuple[list[int], list[int]]]:
        """Item numbers and counts to add, by hour."""
        changes: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        found = self._new_interactions(connection, since, through, moment=_start_of(oldest))
        for rows, sign in zip(found, (1, -1), strict=True):
            for item_id, hour, count in rows:
                chosen, counts = changes[hour]
                chosen.append(numbers.of(item_id))
                counts.append(sign * count)
        return changes

    def _counts(self, first: int, last: int) -> Counts:
        """Interactions by item number in the hours from `first` to `last`, both included; never below zero."""
        hours = [self._hours[hour] for hour in range(first, last + 1) if hour in self._hours]
        counts = np.zeros(len(self._numbers.item_ids), np.int64)
        for hour in hours:
            counts[hour.numbers] += hour.counts
        return np.maximum(counts, 0)

    def _order(self, kind: Kind, hours: int, now: datetime, state: tuple[int, int]) -> _Order:
        hour = _hour_of(now)
        recent = self._counts(hour - hours, hour + 1)  # clocks of callers may run ahead by five minutes
        scores = recent.astype(np.float64)
        if kind == "trending":
            earlier = self._counts(hour - hours * (1 + REFERENCE_WINDOWS), hour - hours - 1)
            elapsed = hours + (now - _start_of(hour)) / timedelta(hours=1)
            expected = earlier * (elapsed / (REFERENCE_WINDOWS * hours))
            scores = (scores - expected) / np.sqrt(expected + 1)
        chosen = np.flatnonzero((recent > 0) & (scores > 0))
        chosen = chosen[np.argsort(-scores[chosen])]
        return _Order(state, chosen, -scores[chosen], self._numbers.item_ids)


def _by_hour(rows: sa.Subquery) -> sa.Select[str, int, int]:
    hour, moment = HourOf(rows.c.occurred_at), sa.bindparam("moment", type_=events.c.occurred_at.type)
    return (
        sa.select(rows.c.item_id, hour, sa.func.count())
        .where(rows.c.occurred_at >= moment)
        .group_by(rows.c.item_id, hour)
    )


def _hour_of(moment: datetime) -> int:
    """Hours since 1970."""
    return int(moment.timestamp() // 3600)


def _start_of(hour: int) -> datetime:
    return datetime.fromtimestamp(hour * 3600, UTC)
