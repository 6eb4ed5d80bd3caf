"""How often each item was chosen by anyone: counted once at the start, then kept in step with the new events."""

import heapq
import random
import threading
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app.serving.catalog import Catalog
from app.serving.filters import EVERY_CATEGORY, CategoryFilter
from app.serving.interaction_counts import mark_of, new_interactions, safe_through
from ml.snapshots import EventMeaning

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
    """Counts of interactions by item. `poll` runs on one thread; `ranked` on any."""

    def __init__(self, meanings: Mapping[str, EventMeaning], catalog: Catalog) -> None:
        self.loaded = False
        self._meanings = dict(meanings)
        self._catalog = catalog
        self._counts = Counter[str]()
        self._through = 0  # a position on SQLite, a transaction id on PostgreSQL
        self._erasures_through = 0
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
        erasures = self._catalog.erasures_through
        through = safe_through(connection)
        again = erasures != self._erasures_through  # the events of what was erased are gone: count those that are left
        counts, since = (Counter[str](), 0) if again else (self._counts, self._through)
        counted = self._count(connection, counts, since, through) if through > since else set()
        self._counts, self._through, self._erasures_through = counts, through, erasures
        if again or not self.loaded:
            self._sort()
        elif counted or self._order.revision != self._catalog.revision:
            self._follow(counted)
        self.loaded = True

    def _count(self, connection: Connection, counts: Counter[str], since: int, through: int) -> set[str]:
        """Add to the counts; the items whose count changed."""
        came, taken_back = (
            connection.execute(sa.select(rows.c.item_id, sa.func.count()).group_by(rows.c.item_id)).all()
            for rows in new_interactions(self._meanings, mark_of(connection), since, through)
        )
        for item_id, count in came:
            counts[item_id] += count
        for item_id, count in taken_back:
            counts[item_id] -= count
        return {item_id for item_id, _ in chain(came, taken_back)}

    def _sort(self) -> None:
        revision = self._catalog.revision
        counts = {item_id: count for item_id, count in self._counts.items() if count > 0}
        by_count: dict[int, list[str]] = defaultdict(list)
        # Items that nobody chose yet come last: a new catalogue is better than nothing.
        for item_id in counts.keys() | set(self._catalog.entries):
            by_count[counts.get(item_id, 0)].append(item_id)
        item_ids: list[str] = []
        for _, equal in sorted(by_count.items(), reverse=True):
            equal.sort()  # one sort of everything would let nobody else have the processor for as long as it takes
            item_ids += equal
        self._order = _Order(item_ids, counts, revision)

    def _follow(self, counted: set[str]) -> None:
        """Move the items whose count changed to their new places, and those that came or went."""
        order, revision = self._order, self._catalog.revision
        changes = self._catalog.changes_since(order.revision)
        if changes is None or len(changes) + len(counted) > len(order.item_ids) // 2:
            self._sort()
            return
        counts = order.counts.copy()
        for item_id in counted:
            count = self._counts[item_id]
            if count > 0:
                counts[item_id] = count
            else:
                counts.pop(item_id, None)

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
