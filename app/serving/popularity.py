"""How often each item was chosen by anyone: counted once at the start, then kept in step with the new events."""

import heapq
import random
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

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
        # The catalogue may be ahead of the order, which only `poll` brings up to date.
        newer = {change.item_id for change in self._catalog.changes_since(order.revision) or ()}
        for item_id in self._ordered(order, categories):
            if self._may_show(item_id, categories):
                newer.discard(item_id)
                yield item_id, order.counts.get(item_id, 0)
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
        if erasures != self._erasures_through:  # the events of what was erased are gone: count those that are left
            counts, since = Counter[str](), 0
        else:
            counts, since = self._counts, self._through
        changed = through > since and self._count(connection, counts, since, through)
        self._counts, self._through, self._erasures_through = counts, through, erasures
        if changed or not self.loaded or self._order.revision != self._catalog.revision:
            self._sort()
        self.loaded = True

    def _count(self, connection: Connection, counts: Counter[str], since: int, through: int) -> bool:
        came, taken_back = (
            connection.execute(sa.select(rows.c.item_id, sa.func.count()).group_by(rows.c.item_id)).all()
            for rows in new_interactions(self._meanings, mark_of(connection), since, through)
        )
        for item_id, count in came:
            counts[item_id] += count
        for item_id, count in taken_back:
            counts[item_id] -= count
        return bool(came or taken_back)

    def _sort(self) -> None:
        revision = self._catalog.revision
        counts = {item_id: count for item_id, count in self._counts.items() if count > 0}
        # Items that nobody chose yet come last: a new catalogue is better than nothing.
        known = counts.keys() | set(self._catalog.entries)
        item_ids = sorted(known, key=lambda item_id: (-counts.get(item_id, 0), item_id))
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
