"""The catalogue in memory: what may be shown. Follows SQL by the numbers of changes and erasures."""

import json
import threading
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app.erasure import subject_sha256
from app.tables import catalog_state, erasures, items

JOURNAL_LENGTH = 100_000

_PROBE = sa.select(
    sa.select(catalog_state.c.changes).scalar_subquery().label("changes"),
    sa.select(sa.func.max(erasures.c.sequence)).scalar_subquery().label("erasure"),
)
# As texts, which take a third of the time to read.
_ITEMS = sa.select(
    items.c.item_id, items.c.hidden, sa.cast(items.c.categories, sa.Text), sa.cast(items.c.created_at, sa.Text)
)
ROWS_AT_A_TIME = 1_000
# Lists of categories that are alike share one tuple; so many are remembered.
REMEMBERED_CATEGORIES = 10_000
_ERASURES = sa.select(
    erasures.c.sequence, erasures.c.kind, erasures.c.subject_sha256, erasures.c.through_position
).order_by(erasures.c.sequence)


class Entry(NamedTuple):
    """What serving needs to know of an item."""

    hidden: bool
    categories: tuple[str, ...]
    created_at: datetime


class Change(NamedTuple):
    """An item that was added, changed or removed."""

    revision: int
    item_id: str
    erasure: int = 0  # the number of the item's erasure, where that was the change


class Catalog:
    """Items, their categories and what was erased. Readers take no lock; one refresh runs at a time."""

    def __init__(self) -> None:
        self.loaded = False
        self.revision = 0
        self.entries: dict[str, Entry] = {}
        self.by_category: dict[str, set[str]] = {}
        self.erased_users: dict[str, int] = {}  # SHA-256 of the id -> newest erasure
        self.erased_items: dict[str, int] = {}
        self._events_gone_through: dict[str, int] = {}
        self.erasures_through = 0
        self._journal: deque[Change] = deque(maxlen=JOURNAL_LENGTH)
        self._changes_through = -1
        self._categories: dict[str, tuple[str, ...]] = {}  # as the database writes them
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.entries)

    def visible(self, item_id: str) -> bool:
        """Whether the item may be shown."""
        entry = self.entries.get(item_id)
        return entry is not None and not entry.hidden

    def categories(self, item_id: str) -> tuple[str, ...]:
        """The categories of an item; none where it is not known."""
        entry = self.entries.get(item_id)
        return () if entry is None else entry.categories

    def events_gone_through(self, user_id: str) -> int:
        """The position up to which a user's events were erased; 0 where none were."""
        return self._events_gone_through.get(subject_sha256(user_id), 0) if self._events_gone_through else 0

    def in_category(self, category: str) -> list[str]:
        """The ids of a category, hidden ones included."""
        with self._lock:
            return list(self.by_category.get(category, ()))

    def changes_since(self, revision: int) -> list[Change] | None:
        """What changed after `revision`, oldest first; None when that is too long ago to tell."""
        with self._lock:
            missing = self.revision - revision
            if missing > len(self._journal):
                return None
            return list(islice(reversed(self._journal), missing))[::-1]

    def follow(self, connection: Connection) -> None:
        """Bring up to date, if anything changed; the connection sees one moment (`app.database.reading`)."""
        probe = connection.execute(_PROBE).one()
        with self._lock:
            # What another thread read meanwhile is newer than what this connection sees, and stays.
            if (probe.erasure or 0) > self.erasures_through:
                newer = connection.execute(_ERASURES.where(erasures.c.sequence > self.erasures_through)).all()
                self._erase(newer)
            if probe.changes > self._changes_through:
                self._read(connection)
                self._changes_through = probe.changes
            self.loaded = True

    def _read(self, connection: Connection) -> None:
        """Read the items whose change is newer than what is known; at first, all."""
        changed = _ITEMS if self._changes_through < 0 else _ITEMS.where(items.c.change > self._changes_through)
        entries, known = self.entries, self._categories
        # Closed also where the connection breaks in between, which leaves the database's cursor to nobody else.
        with connection.execute(changed.execution_options(yield_per=10_000)) as rows:
            for part in rows.partitions(ROWS_AT_A_TIME):
                for item_id, hidden, written, created_at in part:
                    categories = known.get(written)
                    if categories is None:
                        if len(known) >= REMEMBERED_CATEGORIES:
                            known.clear()
                        categories = known[written] = tuple(json.loads(written))
                    entry = Entry(hidden, categories, _time(created_at))
                    if entries.get(item_id) != entry:
                        self._put(item_id, entry)

    def _put(self, item_id: str, entry: Entry) -> None:
        if item_id in self.entries:
            self._leave_categories(item_id)
        elif self.loaded and self.erased_items:
            # Versions may know an item that was erased while the catalogue did not.
            erasure = self.erased_items.get(subject_sha256(item_id))
            if erasure is not None:
                self._record(item_id, erasure)
        self.entries[item_id] = entry
        for category in entry.categories:
            self.by_category.setdefault(category, set()).add(item_id)
        self._record(item_id)

    def _leave_categories(self, item_id: str) -> None:
        old = self.entries.get(item_id)
        for category in old.categories if old is not None else ():
            members = self.by_category.get(category, set())
            members.discard(item_id)
            if not members:
                self.by_category.pop(category, None)

    def _erase(self, rows: Sequence[sa.Row[int, str, str, int]]) -> None:
        erased_now: set[str] = set()
        for sequence, kind, subject, through in rows:
            if kind == "user":
                self.erased_users[subject] = sequence
                self._events_gone_through[subject] = through
            else:
                self.erased_items[subject] = sequence
                erased_now.add(subject)
            self.erasures_through = max(self.erasures_through, sequence)
        if not erased_now:
            return
        # Only hashes are kept of what was erased, so that every id must be hashed to find it; erasures are rare.
        for item_id in [item_id for item_id in self.entries if subject_sha256(item_id) in erased_now]:
            self._leave_categories(item_id)
            del self.entries[item_id]
            self._record(item_id, self.erased_items[subject_sha256(item_id)])

    def _record(self, item_id: str, erasure: int = 0) -> None:
        self.revision += 1
        self._journal.append(Change(self.revision, item_id, erasure))


def _time(written: str) -> datetime:
    """A time in UTC as either database writes it; SQLite does not say so."""
    return datetime.fromisoformat(written if "+" in written else f"{written}+00:00")
