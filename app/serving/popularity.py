"""How often each item was chosen by anyone: counted once at the start, then kept in step with the new events."""

import heapq
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
from app.tables import events
from ml.snapshots import ANY_TYPE, RETRACT, EventMeaning, meaning_of

# Orders of categories kept beside the whole one.
REMEMBERED_CATEGORIES = 256


def interaction_condition(meanings: Mapping[str, EventMeaning], table: sa.FromClause) -> sa.ColumnElement[bool]:
    """The SQL for "this event is an interaction", from the same table that history and snapshots read."""
    named = [type_ for type_ in meanings if type_ != ANY_TYPE]

    def enough(meaning: EventMeaning) -> sa.ColumnElement[bool]:
        if not meaning.in_history:
            return sa.false()
        return sa.true() if meaning.minimum_value is None else table.c.value >= meaning.minimum_value

    alternatives = [sa.and_(table.c.type == type_, enough(meanings[type_])) for type_ in named if type_ != RETRACT]
    others = sa.and_(table.c.type.not_in([*named, RETRACT]), enough(meaning_of(meanings, ANY_TYPE)))
    return sa.or_(others, *alternatives)


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

    def rarely_chosen(self, below: int) -> list[str]:
        """Items with fewer interactions than `below`, the most chosen first; whether they may be shown is not asked."""
        order = self._order
        first = bisect_right(order.item_ids, -below, key=lambda item_id: -order.counts.get(item_id, 0))
        return order.item_ids[first:]

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
        through = _safe_through(connection)
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
        mark = _mark(connection)
        retract, earlier = events.alias("retract"), events.alias("earlier")
        taken_back = (
            sa.select(events.c.position, events.c.item_id)
            .join_from(
                retract,
                events,
                sa.and_(events.c.user_id == retract.c.user_id, events.c.event_id == retract.c.retracts),
            )
            .where(
                retract.c.type == RETRACT,
                retract.c[mark] > since,
                retract.c[mark] <= through,
                interaction_condition(self._meanings, events),
                # An event may be taken back more than once, and counts as taken back once.
                ~sa.exists().where(
                    earlier.c.user_id == retract.c.user_id,
                    earlier.c.retracts == retract.c.retracts,
                    earlier.c[mark] <= since,
                ),
            )
            .distinct()
            .subquery()
        )
        counted = (
            sa.select(events.c.item_id, sa.func.count())
            .where(
                events.c[mark] > since,
                events.c[mark] <= through,
                interaction_condition(self._meanings, events),
            )
            .group_by(events.c.item_id)
        )
        added = connection.execute(counted).all()
        by_item = sa.select(taken_back.c.item_id, sa.func.count()).group_by(taken_back.c.item_id)
        removed = connection.execute(by_item).all()
        for item_id, count in added:
            counts[item_id] += count
        for item_id, count in removed:
            counts[item_id] -= count
        return bool(added or removed)

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


def _mark(connection: Connection) -> str:
    return "transaction_id" if connection.dialect.name == "postgresql" else "position"


def _safe_through(connection: Connection) -> int:
    """Up to where no event can still appear: PostgreSQL's commits come out of the order of positions."""
    if connection.dialect.name == "postgresql":
        oldest_running = sa.text("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")
        return int(connection.execute(oldest_running).scalar_one()) - 1
    return int(connection.execute(sa.select(sa.func.max(events.c.position))).scalar() or 0)
