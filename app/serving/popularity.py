"""How often each item was chosen by anyone: read from SQL at the start, then kept in step with the new events."""

import heapq
import random
import threading
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from app.database import outage_reason, reading
from app.serving.catalog import Catalog
from app.serving.filters import EVERY_CATEGORY, CategoryFilter
from app.serving.interaction_counts import Counted, NewInteractions, goes_on, look
from app.serving.saved_counts import Days, ItemCounts, load, save, saved
from ml.snapshots import EventMeaning

log = structlog.get_logger(__name__)

# Counts are saved once so many events came since, or a quarter as many as items have counts.
SAVE_EVERY = 50_000
# More than `app.serving.activity` looks back, which asks up to where all is older.
REMEMBERED_DAYS = 35
# Orders of categories kept beside the whole one.
REMEMBERED_CATEGORIES = 256


@dataclass(frozen=True)
class _Order:
    """Items by count at one moment; the orders of categories are made when asked for."""

    item_ids: list[str]
    counts: dict[str, int]
    revision: int  # of the catalogue
    of_category: dict[str, list[str]] = field(default_factory=dict)


class Popularity:
    """Counts of interactions by item. One thread at a time may `poll`, and one may `save`; `ranked` runs on any."""

    def __init__(self, meanings: Mapping[str, EventMeaning], catalog: Catalog) -> None:
        self.loaded = False
        self._meanings = dict(meanings)
        self._new_interactions = NewInteractions(meanings, _by_item)
        self._catalog = catalog
        self._counts: ItemCounts | None = None
        self._saved = Counted()  # how far the counts in SQL go, as far as is known
        self._order = _Order([], {}, revision=-1)
        self._lock = threading.Lock()

    def ranked(self, categories: CategoryFilter = EVERY_CATEGORY) -> Iterator[tuple[str, int]]:
        """Items that may be shown with their counts, the most chosen first, equals by id."""
        order = self._order
        listed = self._ordered(order, categories)
        for item_id in listed:
            if self._may_show(item_id, categories):
                yield item_id, order.counts.get(item_id, 0)
        # The catalogue may be ahead of the order, which only `poll` brings up to date.
        newer = {change.item_id for change in self._catalog.changes_since(order.revision) or ()}
        if newer:
            newer.difference_update(self._ordered(order, categories))
        for item_id in sorted(newer):
            if self._may_show(item_id, categories):
                yield item_id, order.counts.get(item_id, 0)

    def rarely_chosen(self, below: int, count: int, chance: random.Random) -> list[str]:
        """Draw up to `count` items with fewer interactions than `below`; whether they may be shown is not asked."""
        order = self._order
        first = bisect_right(order.item_ids, -below, key=lambda item_id: -order.counts.get(item_id, 0))
        places = range(first, len(order.item_ids))
        return [order.item_ids[place] for place in chance.sample(places, min(count, len(places)))]

    def _ordered(self, order: _Order, categories: CategoryFilter) -> Iterable[str]:
        """All that the filter may admit, and as little else as is easily had."""
        if categories.all:
            return min((self._of_category(order, category) for category in categories.all), key=len)
        if categories.any:
            parts = [self._of_category(order, category) for category in categories.any]
            merged = heapq.merge(*parts, key=lambda item_id: (-order.counts.get(item_id, 0), item_id))
            return (item_id for item_id, _ in groupby(merged))  # an item of two categories comes twice in a row
        return order.item_ids

    def _may_show(self, item_id: str, categories: CategoryFilter) -> bool:
        entry = self._catalog.entries.get(item_id)
        return entry is not None and not entry.hidden and (not categories or categories.admits(entry.categories))

    def poll(self, connection: Connection) -> None:
        """Count the events that came since, and bring the order up to date."""
        now, counts = look(connection), self._counts
        if counts is None or not goes_on(connection, counts.counted, now):
            counts = load(connection, self._meanings, now) or ItemCounts({}, Counted())
            self._saved = counts.counted
            counts, _ = self._counted(connection, counts, now)
            self._sort(counts.by_item)
        else:
            counts, changed = self._counted(connection, counts, now)
            if changed or self._order.revision != self._catalog.revision:
                self._follow(counts.by_item, changed)
        self._counts = counts
        self.loaded = True

    def quiet_through(self, moment: datetime) -> int:
        """A mark up to which no interaction occurred at this moment or later; 0 where none is known."""
        days = () if self._counts is None else self._counts.days
        return next((mark for mark, latest in reversed(days) if latest < moment), 0)

    def save(self, engine: Engine) -> None:
        """Keep the counts in SQL if many events came since they were kept; what cannot be kept is counted again."""
        counts = self._counts
        if counts is None or not self._is_due(counts):
            return
        self._saved = counts.counted  # also where it fails: the next attempt is made after as many events
        try:
            with reading(engine) as connection:
                there = saved(connection, self._meanings, look(connection))
            if there is not None:  # another process's
                self._saved = there
                if not self._is_due(counts):
                    return
                self._saved = counts.counted
            save(engine, self._meanings, counts)
        except SQLAlchemyError as error:
            log.warning("item_counts_not_saved", reason=outage_reason(error))

    def _is_due(self, counts: ItemCounts) -> bool:
        known, counted = self._saved, counts.counted
        same = (known.erasures_through, known.settled) == (counted.erasures_through, counted.settled)
        came = counted.newest - (known.newest if same and known.newest <= counted.newest else 0)
        return came >= max(SAVE_EVERY, len(counts.by_item) // 4)

    def _counted(self, connection: Connection, counts: ItemCounts, now: Counted) -> tuple[ItemCounts, Set[str]]:
        """The counts up to now, and the items that something came of or was taken back of."""
        since = counts.counted.through
        if now.through <= since:
            return replace(counts, counted=now), set()
        came, taken_back = self._new_interactions(connection, since, now.through)
        changes = Counter[str]()
        for item_id, count, _ in came:
            changes[item_id] += count
        for item_id, count, _ in taken_back:
            changes[item_id] -= count
        latest = [occurred_at for _, _, occurred_at in came]
        by_item = counts.by_item.copy() if changes else counts.by_item
        for item_id, change in changes.items():
            count = by_item.get(item_id, 0) + change
            if count > 0:
                by_item[item_id] = count
            else:
                by_item.pop(item_id, None)
        return ItemCounts(by_item, now, _with(counts.days, now.through, latest)), changes.keys()

    def _sort(self, counts: dict[str, int]) -> None:
        revision = self._catalog.revision
        by_count: dict[int, list[str]] = defaultdict(list)
        # Items that nobody chose yet come last: a new catalogue is better than nothing.
        for item_id in counts.keys() | set(self._catalog.entries):
            by_count[counts.get(item_id, 0)].append(item_id)
        item_ids: list[str] = []
        for _, equal in sorted(by_count.items(), reverse=True):
            equal.sort()  # one sort of everything would let nobody else have the processor for as long as it takes
            item_ids += equal
        self._order = _Order(item_ids, counts, revision)

    def _follow(self, counts: dict[str, int], counted: Set[str]) -> None:
        """Move the items whose count changed to their new places, and those that came or went."""
        order, revision = self._order, self._catalog.revision
        changes = self._catalog.changes_since(order.revision)
        if changes is None or len(changes) + len(counted) > len(order.item_ids) // 2:
            self._sort(counts)
            return

        def place(item_id: str) -> tuple[int, str]:
            return -counts.get(item_id, 0), item_id

        moved = counted | {change.item_id for change in changes}
        rest = [item_id for item_id in order.item_ids if item_id not in moved]
        listed = sorted(
            (item_id for item_id in moved if item_id in counts or item_id in self._catalog.entries), key=place
        )
        item_ids: list[str] = []
        first = 0
        for item_id in listed:
            last = bisect_left(rest, place(item_id), first, key=place)
            item_ids += rest[first:last]
            item_ids.append(item_id)
            first = last
        item_ids += rest[first:]
        self._order = _Order(item_ids, counts, revision)

    def _of_category(self, order: _Order, category: str) -> list[str]:
        item_ids = order.of_category.get(category)
        if item_ids is None:
            item_ids = sorted(
                self._catalog.in_category(category), key=lambda item_id: (-order.counts.get(item_id, 0), item_id)
            )
            with self._lock:
                if len(order.of_category) >= REMEMBERED_CATEGORIES:
                    order.of_category.clear()
                order.of_category[category] = item_ids
        return item_ids


def _by_item(rows: sa.Subquery) -> sa.Select[str, int, datetime]:
    return sa.select(rows.c.item_id, sa.func.count(), sa.func.max(rows.c.occurred_at)).group_by(rows.c.item_id)


def _with(days: Days, through: int, latest: Sequence[datetime]) -> Days:
    """The days with interactions up to a mark, which occurred at the latest then."""
    if not days:
        return ((through, max(latest)),) if latest else ()
    before = days[-1][1]
    newest = max([before, *latest])
    kept = days if newest.date() > before.date() else days[:-1]
    return (*kept, (through, newest))[-REMEMBERED_DAYS:]
