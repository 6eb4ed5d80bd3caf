"""The catalogue by age, the newest first: in order as of some moment, and merged with what changed since."""

import heapq
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from app.serving.catalog import Catalog
from app.serving.filters import EVERY_CATEGORY, CategoryFilter

# After more changes than that the order is brought up to date.
MANY_CHANGES = 1_000

_Aged = tuple[datetime, str]


@dataclass(frozen=True)
class _Order:
    items: list[_Aged]
    revision: int  # of the catalogue


class Latest:
    """Items by the time they came into the catalogue; safe to call from several threads at once."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._order = _Order([], revision=-1)
        self._lock = threading.Lock()

    def ranked(self, categories: CategoryFilter = EVERY_CATEGORY) -> Iterator[tuple[str, datetime]]:
        """Items that may be shown with the times they were added, the newest first, equals by id from the end."""
        order = self._order
        changed = {change.item_id for change in self._catalog.changes_since(order.revision) or ()}
        unchanged = (aged for aged in order.items if aged[1] not in changed) if changed else order.items
        for created_at, item_id in heapq.merge(unchanged, self._aged(changed), reverse=True):
            entry = self._catalog.entries.get(item_id)
            if entry is not None and not entry.hidden and (not categories or categories.admits(entry.categories)):
                yield item_id, created_at

    def poll(self) -> None:
        """Bring the order up to date if much has changed."""
        with self._lock:
            revision, order = self._catalog.revision, self._order
            changes = self._catalog.changes_since(order.revision) if order.revision >= 0 else None
            if changes is None:
                self._order = _Order(self._aged(self._catalog.entries.copy()), revision)
            elif len(changes) > MANY_CHANGES:
                changed = {change.item_id for change in changes}
                items = [aged for aged in order.items if aged[1] not in changed]
                items += self._aged(changed)
                items.sort(reverse=True)  # two runs: fast
                self._order = _Order(items, revision)

    def _aged(self, item_ids: Iterable[str]) -> list[_Aged]:
        entries = self._catalog.entries
        found = ((entries.get(item_id), item_id) for item_id in item_ids)
        return sorted(((entry.created_at, item_id) for entry, item_id in found if entry is not None), reverse=True)
