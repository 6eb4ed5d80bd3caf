"""Events into SQL within one transaction: each row stored, known already, or refused with its reason."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from app.serving.new_events import Key, NewEvent, insert_events
from app.tables import events, items, users
from ml.snapshots import RETRACT

UnknownItems = Literal["create", "hold", "reject"]

# SQLite takes 32,766 parameters a statement.
CHUNK = 5_000
MAX_KNOWN_IDS = 200_000


class Outcome(NamedTuple):
    """What became of one event."""

    event_id: str | None  # None for a row that was rejected unread
    outcome: Literal["stored", "duplicate", "rejected"]
    reason: str | None = None


class KnownSubjects:
    """Users and items that are known to be in the catalogue, so that it is not asked for them again.

    What a transaction found or made counts for later ones once `commit` is called. Only an erasure takes anything away.
    """

    def __init__(self) -> None:
        self.users: set[str] = set()
        self.items: set[str] = set()
        self._new_users: set[str] = set()
        self._new_items: set[str] = set()
        self._last_erasure: int | None = None

    def heed_erasures(self, connection: Connection) -> None:
        """Forget all if anything was erased since the last call."""
        last = connection.exec_driver_sql("SELECT max(sequence) FROM erasures").scalar()
        if last != self._last_erasure:
            self.users.clear()
            self.items.clear()
            self.roll_back()
            self._last_erasure = last

    def add(self, user_ids: set[str], item_ids: set[str]) -> None:
        self._new_users |= user_ids
        self._new_items |= item_ids

    def commit(self) -> None:
        for known, new in ((self.users, self._new_users), (self.items, self._new_items)):
            if len(known) + len(new) > MAX_KNOWN_IDS:
                known.clear()
            known |= new
        self.roll_back()

    def roll_back(self) -> None:
        self._new_users, self._new_items = set(), set()


def store_events(
    connection: Connection,
    batch: Sequence[NewEvent],
    unknown_items: UnknownItems,
    known: KnownSubjects | None = None,
) -> list[Outcome]:
    """Insert events in the given order. One outcome for each; the caller commits, and then `known` as well."""
    known = known or KnownSubjects()
    received_at = datetime.now(UTC)
    outcomes: dict[int, Outcome] = {}
    if unknown_items == "reject":
        wanted = {str(event.item_id) for event in batch if event.type != RETRACT}
        known.heed_erasures(connection)
        found = wanted & known.items
        found |= _known(connection, items.c.item_id, wanted - found)
        for index, event in enumerate(batch):
            if event.type != RETRACT and event.item_id not in found:
                reason = f"item_id: {event.item_id!r} is not in the catalogue"
                outcomes[index] = Outcome(event.event_id, "rejected", reason)
    if not outcomes and not any(event.type == RETRACT for event in batch):
        outcomes = _insert(connection, dict(enumerate(batch)), received_at)
    waiting = [index for index in range(len(batch)) if index not in outcomes]
    while waiting:
        # An id that comes twice is judged the second time by what the first one left in the table.
        first: dict[Key, int] = {}
        later = [index for index in waiting if first.setdefault(batch[index].key, index) != index]
        turn = {index: batch[index] for index in first.values()}
        ordinary = {index: event for index, event in turn.items() if event.type != RETRACT}
        retracts = {index: event for index, event in turn.items() if event.type == RETRACT}
        outcomes |= _insert(connection, ordinary, received_at)
        # After the others: a retract may stand in one list with the event that it takes back.
        if retracts:
            refused, resolved = _resolve(connection, retracts)
            outcomes |= refused
            outcomes |= _insert(connection, resolved, received_at)
        if later:
            # What repeats an event that is stored by now needs no turn of its own, and neither do retracts of nothing:
            # a thousand of one id must not hold the database for a thousand turns.
            outcomes |= _judge_repeats(connection, {index: batch[index] for index in later})
            outcomes |= _resolve(
                connection, {i: batch[i] for i in later if i not in outcomes and batch[i].type == RETRACT}
            )[0]
        waiting = [index for index in later if index not in outcomes]
    # At last: whoever creates an item holds the catalogue's count until the commit, and must wait for nothing more.
    stored = [event for index, event in enumerate(batch) if outcomes[index].outcome == "stored"]
    _create_subjects(connection, stored, received_at, known, hidden=unknown_items == "hold")
    return [outcomes[index] for index in range(len(batch))]


def _insert(connection: Connection, turn: Mapping[int, NewEvent], received_at: datetime) -> dict[int, Outcome]:
    """Insert events, the first of those that share an id; what is in the table already is compared."""
    if not turn:
        return {}
    new = list(turn.values())
    inserted = insert_events(connection, new, received_at)
    if inserted is None:
        return {index: Outcome(event.event_id, "stored") for index, event in turn.items()}
    outcomes: dict[int, Outcome] = {}
    repeats: dict[int, NewEvent] = {}
    for index, event in turn.items():
        if event.key in inserted:
            inserted.remove(event.key)
            outcomes[index] = Outcome(event.event_id, "stored")
        else:
            repeats[index] = event
    return outcomes | _judge_repeats(connection, repeats)


def _insert_or_leave(connection: Connection, table: sa.Table, *key: str) -> "sqlite.Insert | postgresql.Insert":
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    return insert(table).on_conflict_do_nothing(index_elements=list(key))


def _create_subjects(
    connection: Connection, stored: Sequence[NewEvent], now: datetime, known: KnownSubjects, *, hidden: bool
) -> None:
    """Create the users and items that are new. In order of their ids, so that two processes cannot block each other."""
    if not stored:
        return
    user_ids = {event.user_id for event in stored}
    item_ids = {event.item_id for event in stored if event.item_id is not None and event.type != RETRACT}
    # From here on an erasure waits for these events; one that came before may have taken users or items of theirs.
    known.heed_erasures(connection)
    user_ids -= known.users
    item_ids -= known.items
    new_users = sorted(user_ids - _known(connection, users.c.user_id, user_ids))
    new_items = sorted(item_ids - _known(connection, items.c.item_id, item_ids))
    times = {"created_at": now, "updated_at": now, "metadata": {}}
    if new_users:
        connection.execute(
            _insert_or_leave(connection, users, "user_id"), [{"user_id": user_id, **times} for user_id in new_users]
        )
    if new_items:
        connection.execute(
            _insert_or_leave(connection, items, "item_id"),
            [{"item_id": item_id, "categories": [], "hidden": hidden, **times} for item_id in new_items],
        )
    known.add(user_ids, item_ids)


def _known(connection: Connection, column: "sa.ColumnElement[str]", ids: set[str]) -> set[str]:
    if not ids:
        return set()
    known: set[str] = set()
    ordered = list(ids)
    for start in range(0, len(ordered), CHUNK):
        known.update(connection.scalars(sa.select(column).where(column.in_(ordered[start : start + CHUNK]))))
    return known


def _find(connection: Connection, keys: Sequence[Key]) -> "dict[Key, sa.Row[Any]]":
    """Look events up by user and id."""
    found = {}
    for start in range(0, len(keys), CHUNK):
        # SQLite reads the whole table for `(user_id, event_id) IN (…)`; it uses the index for a join.
        wanted = (
            sa.values(sa.column("user_id", sa.String), sa.column("event_id", sa.String), name="wanted")
            .data(list(keys[start : start + CHUNK]))
            .cte()
        )
        statement = sa.select(events).join_from(
            wanted,
            events,
            sa.and_(events.c.user_id == wanted.c.user_id, events.c.event_id == wanted.c.event_id),
        )
        found.update({(row.user_id, row.event_id): row for row in connection.execute(statement)})
    return found


def _judge_repeats(connection: Connection, repeats: Mapping[int, NewEvent]) -> dict[int, Outcome]:
    """Tell duplicates from conflicts; events that are not in the table get no outcome."""
    found = _find(connection, list({event.key for event in repeats.values()}))
    outcomes = {}
    for index, event in repeats.items():
        row = found.get(event.key)
        if row is None:
            continue
        differing = _difference(event, row)
        outcomes[index] = (
            Outcome(event.event_id, "duplicate")
            if differing is None
            else Outcome(
                event.event_id, "rejected", f"event_id: this user has an event of this id with another {differing}"
            )
        )
    return outcomes


def _difference(event: NewEvent, row: "sa.Row[Any]") -> str | None:
    """The first field in which an event differs from the one stored under its id."""
    if event.item_id is not None and event.item_id != row.item_id:
        return "item_id"
    if event.timed_by_caller and event.occurred_at != row.occurred_at:
        return "occurred_at"
    for name in ("type", "value", "recommendation_id", "context", "retracts"):
        if getattr(event, name) != getattr(row, name):
            return name
    return None


def _resolve(
    connection: Connection, retracts: Mapping[int, NewEvent]
) -> tuple[dict[int, Outcome], dict[int, NewEvent]]:
    """Find what retracts take back: those refused, and the others with the item of the event they name."""
    found = _find(connection, list({(event.user_id, str(event.retracts)) for event in retracts.values()}))
    refused: dict[int, Outcome] = {}
    resolved: dict[int, NewEvent] = {}
    for index, event in retracts.items():
        target = found.get((event.user_id, str(event.retracts)))
        reason = None
        if target is None:
            reason = f"retracts: this user has no event {event.retracts!r}"
        elif target.type == RETRACT:
            reason = "retracts: names a retract; post the event again instead, under a new event_id"
        elif event.item_id is not None and event.item_id != target.item_id:
            reason = f"item_id: the event to take back is about {target.item_id!r}"
        if reason is not None or target is None:
            refused[index] = Outcome(event.event_id, "rejected", reason)
        else:
            resolved[index] = event._replace(item_id=target.item_id)
    return refused, resolved
