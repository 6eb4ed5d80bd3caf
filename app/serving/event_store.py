"""Events into SQL within one transaction: each row stored, known already, or refused with its reason."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from app.tables import events, items, users
from ml.snapshots import RETRACT

UnknownItems = Literal["create", "hold", "reject"]
Key = tuple[str, str]

# SQLite takes 32,766 parameters a statement.
CHUNK = 5_000


@dataclass(frozen=True, slots=True)
class NewEvent:
    """One event as it came in; times and ids that the caller left out are filled in, and marked as ours."""

    user_id: str
    event_id: str
    item_id: str | None  # only a retract may leave it out
    type: str
    value: float | None
    occurred_at: datetime
    recommendation_id: str | None = None
    context: dict[str, Any] | None = None
    retracts: str | None = None
    timed_by_caller: bool = True

    @property
    def key(self) -> Key:
        return self.user_id, self.event_id


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one event."""

    event_id: str | None  # None for a row that was rejected unread
    outcome: Literal["stored", "duplicate", "rejected"]
    reason: str | None = None


def store_events(connection: Connection, batch: Sequence[NewEvent], unknown_items: UnknownItems) -> list[Outcome]:
    """Insert events in the given order. One outcome for each; the caller commits."""
    received_at = datetime.now(UTC)
    outcomes: dict[int, Outcome] = {}
    if unknown_items == "reject":
        wanted = {str(event.item_id) for event in batch if event.type != RETRACT}
        known = _known_items(connection, wanted)
        for index, event in enumerate(batch):
            if event.type != RETRACT and event.item_id not in known:
                reason = f"item_id: {event.item_id!r} is not in the catalogue"
                outcomes[index] = Outcome(event.event_id, "rejected", reason)
    waiting = [index for index in range(len(batch)) if index not in outcomes]
    while waiting:
        # An id that comes twice is judged the second time by what the first one left in the table.
        first: dict[Key, int] = {}
        later = [index for index in waiting if first.setdefault(batch[index].key, index) != index]
        turn = {index: batch[index] for index in first.values()}
        ordinary = {index: event for index, event in turn.items() if event.type != RETRACT}
        retracts = {index: event for index, event in turn.items() if event.type == RETRACT}
        outcomes |= _insert(connection, ordinary, received_at, unknown_items)
        # After the others: a retract may stand in one list with the event that it takes back.
        if retracts:
            refused, resolved = _resolve(connection, retracts)
            outcomes |= refused
            outcomes |= _insert(connection, resolved, received_at, unknown_items)
        if later:
            # What repeats an event that is stored by now needs no turn of its own, and neither do retracts of nothing:
            # a thousand of one id must not hold the database for a thousand turns.
            outcomes |= _judge_repeats(connection, {index: batch[index] for index in later})
            outcomes |= _resolve(
                connection, {i: batch[i] for i in later if i not in outcomes and batch[i].type == RETRACT}
            )[0]
        waiting = [index for index in later if index not in outcomes]
    return [outcomes[index] for index in range(len(batch))]


def _insert(
    connection: Connection, turn: Mapping[int, NewEvent], received_at: datetime, unknown_items: UnknownItems
) -> dict[int, Outcome]:
    """Insert events with ids that differ from one another; those that are in the table already are compared."""
    if not turn:
        return {}
    rows = [
        {
            "user_id": event.user_id,
            "event_id": event.event_id,
            "item_id": event.item_id,
            "type": event.type,
            "value": event.value,
            "occurred_at": event.occurred_at,
            "received_at": received_at,
            "recommendation_id": event.recommendation_id,
            "context": event.context,
            "retracts": event.retracts,
        }
        for event in turn.values()
    ]
    statement = _insert_or_leave(connection, events, "user_id", "event_id")
    returned = connection.execute(statement.returning(events.c.user_id, events.c.event_id), rows)
    inserted = {(user_id, event_id) for user_id, event_id in returned}
    stored = {index: event for index, event in turn.items() if event.key in inserted}
    if stored:
        _create_subjects(connection, stored.values(), received_at, hidden=unknown_items == "hold")
    outcomes = {index: Outcome(event.event_id, "stored") for index, event in stored.items()}
    if len(stored) < len(turn):
        outcomes |= _judge_repeats(connection, {i: event for i, event in turn.items() if i not in stored})
    return outcomes


def _insert_or_leave(connection: Connection, table: sa.Table, *key: str) -> "sqlite.Insert | postgresql.Insert":
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    return insert(table).on_conflict_do_nothing(index_elements=list(key))


def _create_subjects(connection: Connection, stored: Iterable[NewEvent], now: datetime, *, hidden: bool) -> None:
    """Create the users and items that are new. In order of their ids, so that two processes cannot block each other."""
    user_ids: set[str] = set()
    item_ids: set[str] = set()
    for event in stored:
        user_ids.add(event.user_id)
        if event.type != RETRACT and event.item_id is not None:
            item_ids.add(event.item_id)
    new_users = sorted(user_ids - _known(connection, users.c.user_id, user_ids))
    new_items = sorted(item_ids - _known_items(connection, item_ids))
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


def _known_items(connection: Connection, item_ids: set[str]) -> set[str]:
    return _known(connection, items.c.item_id, item_ids)


def _known(connection: Connection, column: "sa.ColumnElement[str]", ids: set[str]) -> set[str]:
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
            resolved[index] = replace(event, item_id=target.item_id)
    return refused, resolved
