"""What a user did, read from SQL at every request; the last known is kept for when the database is gone."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app.erasure import subject_sha256
from app.tables import events
from ml.snapshots import RETRACT, EventMeaning, meaning_of

REMEMBERED_USERS = 10_000

_READ = (
    sa.select(events.c.position, events.c.event_id, events.c.item_id, events.c.type, events.c.value, events.c.retracts)
    .where(events.c.user_id == sa.bindparam("user_id"))
    .order_by(events.c.occurred_at, events.c.position)
)
_READ_WITH_TIMES = _READ.add_columns(events.c.occurred_at)


@dataclass(frozen=True, slots=True)
class History:
    """One user's interactions, oldest first, and what later answers leave out."""

    item_ids: tuple[str, ...] = ()
    excluded: frozenset[str] = frozenset()
    feedback_through: int | None = None  # position of the user's newest event
    # Only where seen items may return:
    times: tuple[float, ...] = ()  # of each of item_ids, in seconds since 1970
    kept_out: frozenset[str] = frozenset()  # those excluded by an event that is no interaction, such as a dislike


class Histories:
    """Reads one indexed range of `events` per request and remembers the users seen last."""

    def __init__(
        self,
        meanings: Mapping[str, EventMeaning],
        max_history: int,
        capacity: int = REMEMBERED_USERS,
        *,
        with_times: bool = False,
    ) -> None:
        self._meanings = dict(meanings)
        self._max_history = max_history
        self._capacity = capacity
        self._with_times = with_times
        self._remembered: OrderedDict[str, History] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, connection: Connection, user_id: str) -> History:
        """The history as committed at this moment."""
        statement = _READ_WITH_TIMES if self._with_times else _READ
        history = self._history(connection.execute(statement, {"user_id": user_id}).all())
        with self._lock:
            self._remembered[user_id] = history
            self._remembered.move_to_end(user_id)
            if len(self._remembered) > self._capacity:
                self._remembered.popitem(last=False)
        return history

    def remembered(self, user_id: str) -> History | None:
        """What was last read for this user, or None."""
        return self._remembered.get(user_id)

    def forget(self, user_hashes: Collection[str]) -> None:
        """Drop erased users, given by the SHA-256 of their ids."""
        with self._lock:
            for user_id in [user for user in self._remembered if subject_sha256(user) in user_hashes]:
                del self._remembered[user_id]

    def _history(self, rows: Sequence[Any]) -> History:
        if not rows:
            return History()
        taken_back = {row.retracts for row in rows if row.type == RETRACT}
        item_ids: list[str] = []
        times: list[float] = []
        excluded: set[str] = set()
        kept_out: set[str] = set()
        through = 0
        for row in rows:
            position, event_id, item_id, type_, value, _, *occurred_at = row
            through = max(through, position)
            if type_ == RETRACT or event_id in taken_back:
                continue
            meaning = meaning_of(self._meanings, type_)
            if meaning.excludes:
                excluded.add(item_id)
            if meaning.is_interaction(value):
                item_ids.append(item_id)
                times.extend(time.timestamp() for time in occurred_at)
            elif meaning.excludes and self._with_times:
                kept_out.add(item_id)
        newest = slice(-self._max_history, None)
        return History(tuple(item_ids[newest]), frozenset(excluded), through, tuple(times[newest]), frozenset(kept_out))
