"""Events into SQL within one transaction: each row stored, known already, or refused with its reason."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from app.tables import events, items, users
from ml.snapshots import RETRACT

UnknownItems = Literal["create", "hold", "reject"]
Key = tuple[str, str]

# SQLite takes 32,766 parameters a statement.
CHUNK = 5_000
MAX_KNOWN_IDS = 200_000


class NewEvent(NamedTuple):
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
        return self[:2]


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
    waiting = [index for index in range(len(batch)) if index not in outcomes]
    while waiting:
        # An id that comes twice is judged the second time by what the first one left in the table.
        first: dict[Key, int] = {}
        later = [index for index in waiting if first.setdefault(batch[index].key, index) != index]
        turn = {index: batch[index] for index in first.values()}
        ordinary = {index: event for index, event in turn.items() if event.type != RETRACT}
        retracts = {index: event for index, event in turn.items() if event.type == RETRACT}
        outcomes |= _insert(connection, ordinary, received_at, unknown_items, known)
        # After the others: a retract may stand in one list with the event that it takes back.
        if retracts:
            refused, resolved = _resolve(connection, retracts)
            outcomes |= refused
            outcomes |= _insert(connection, resolved, received_at, unknown_items, known)
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
    connection: Connection,
    turn: Mapping[int, NewEvent],
    received_at: datetime,
    unknown_items: UnknownItems,
    known: KnownSubjects,
) -> dict[int, Outcome]:
    """Insert events with ids that differ from one another; those that are in the table already are compared."""
    if not turn:
        return {}
    insert = insert_on_sqlite if connection.dialect.name == "sqlite" else insert_on_postgresql
    inserted = insert(connection, list(turn.values()), received_at)
    stored = turn if inserted is None else {index: event for index, event in turn.items() if event.key in inserted}
    if stored:
        _create_subjects(connection, stored.values(), received_at, known, hidden=unknown_items == "hold")
    outcomes = {index: Outcome(event.event_id, "stored") for index, event in stored.items()}
    if len(stored) < len(turn):
        outcomes |= _judge_repeats(connection, {i: event for i, event in turn.items() if i not in stored})
    return outcomes


_COLUMNS = "user_id, event_id, item_id, type, value, occurred_at, received_at, recommendation_id, context, retracts"
_INSERT_SQLITE = (
    f"INSERT INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
    " ON CONFLICT (user_id, event_id) DO NOTHING"
)
# One text for any number of rows, which the server prepares once.
_INSERT_POSTGRESQL = f"""
    INSERT INTO events ({_COLUMNS})
    SELECT user_id, event_id, item_id, type, value, occurred_at, %s, recommendation_id, context::json, retracts
    FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::float8[], %s::timestamptz[], %s::text[], %s::text[],
        %s::text[]) AS new (user_id, event_id, item_id, type, value, occurred_at, recommendation_id, context, retracts)
    ON CONFLICT (user_id, event_id) DO NOTHING
    RETURNING user_id, event_id
"""  # noqa: S608


def insert_on_sqlite(connection: Connection, new: Sequence[NewEvent], received_at: datetime) -> set[Key] | None:
    """Insert events; the keys of those that were not there before, or None if none was."""
    before = connection.exec_driver_sql("SELECT max(position) FROM events").scalar() or 0
    received = _sqlite_time(received_at)
    rows = [
        (
            event.user_id,
            event.event_id,
            event.item_id,
            event.type,
            event.value,
            _sqlite_time(event.occurred_at),
            received,
            event.recommendation_id,
            _json(event.context),
            event.retracts,
        )
        for event in new
    ]
    if connection.exec_driver_sql(_INSERT_SQLITE, rows).rowcount == len(rows):
        return None
    inserted = connection.exec_driver_sql("SELECT user_id, event_id FROM events WHERE position > ?", (before,))
    return {(user_id, event_id) for user_id, event_id in inserted}


def insert_on_postgresql(connection: Connection, new: Sequence[NewEvent], received_at: datetime) -> set[Key] | None:
    """Insert events; the keys of those that were not there before, or None if none was."""
    arrays = (
        _array([event.user_id for event in new]),
        _array([event.event_id for event in new]),
        _array([event.item_id for event in new]),
        _array([event.type for event in new]),
        _array([None if event.value is None else repr(event.value) for event in new]),
        _array([event.occurred_at.isoformat() for event in new]),
        _array([event.recommendation_id for event in new]),
        _array([_json(event.context) for event in new]),
        _array([event.retracts for event in new]),
    )
    inserted = connection.exec_driver_sql(_INSERT_POSTGRESQL, (received_at, *arrays))
    if inserted.rowcount == len(new):
        return None
    return {(user_id, event_id) for user_id, event_id in inserted}


def _array(values: Sequence[str | None]) -> str:
    """An array as PostgreSQL reads it."""
    quoted = [
        "NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values
    ]
    return "{" + ",".join(quoted) + "}"


def _sqlite_time(time: datetime) -> str:
    """A time as `UtcDateTime` keeps it."""
    return time.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


def _json(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value)


def _insert_or_leave(connection: Connection, table: sa.Table, *key: str) -> "sqlite.Insert | postgresql.Insert":
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    return insert(table).on_conflict_do_nothing(index_elements=list(key))


def _create_subjects(
    connection: Connection, stored: Iterable[NewEvent], now: datetime, known: KnownSubjects, *, hidden: bool
) -> None:
    """Create the users and items that are new. In order of their ids, so that two processes cannot block each other."""
    user_ids: set[str] = set()
    item_ids: set[str] = set()
    for event in stored:
        user_ids.add(event.user_id)
        if event.type != RETRACT and event.item_id is not None:
            item_ids.add(event.item_id)
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
