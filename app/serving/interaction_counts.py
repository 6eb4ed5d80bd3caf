"""Which interactions came, and which were taken back, since an earlier look at the events."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from app.tables import SETTLED, erasures, events
from ml.snapshots import ANY_TYPE, RETRACT, EventMeaning, meaning_of


class HourOf(FunctionElement[int]):
    """The hours since 1970 of a column of times."""

    type = sa.BigInteger()
    inherit_cache = True

    def __init__(self, column: sa.ColumnElement[datetime]) -> None:
        super().__init__(column)


@compiles(HourOf, "postgresql")
def _hour_postgresql(element: HourOf, compiler: SQLCompiler, **options: Any) -> str:
    return f"floor(extract(epoch from {compiler.process(element.clauses, **options)}) / 3600)::bigint"


@compiles(HourOf)
def _hour_elsewhere(element: HourOf, compiler: SQLCompiler, **options: Any) -> str:
    return f"(CAST(strftime('%s', {compiler.process(element.clauses, **options)}) AS INTEGER) / 3600)"


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


class NewInteractions:
    """Sums up the interactions that came, and those that were taken back, between two marks.

    Step by step they come to the same as all at once: an event may be taken back more than once and counts as taken
    back once, and what was taken back before it came never comes.
    """

    def __init__(
        self, meanings: Mapping[str, EventMeaning], summed_up: Callable[[sa.Subquery], sa.Select[*tuple[Any, ...]]]
    ) -> None:
        """`summed_up` selects from an event a row, with the columns position, item_id and occurred_at."""
        self._meanings = dict(meanings)
        self._summed_up = summed_up
        # Each is built once: it takes milliseconds, and leaves hundreds of objects that refer to themselves.
        self._built: dict[tuple[str, bool], list[sa.Select[*tuple[Any, ...]]]] = {}

    def __call__(
        self, connection: Connection, since: int, through: int, **values: object
    ) -> tuple[Sequence[sa.Row[*tuple[Any, ...]]], Sequence[sa.Row[*tuple[Any, ...]]]]:
        """What came after `since` and up to `through`, and what was taken back; `values` are for `summed_up`."""
        key = mark_of(connection), since == 0
        if key not in self._built:
            self._built[key] = [self._summed_up(rows) for rows in _new_interactions(self._meanings, *key)]
        came, taken_back = self._built[key]
        values |= {"since": since, "through": through}
        return connection.execute(came, values).all(), connection.execute(taken_back, values).all()


def _new_interactions(
    meanings: Mapping[str, EventMeaning], mark: str, from_start: bool
) -> tuple[sa.Subquery, sa.Subquery]:
    since, through = sa.bindparam("since", type_=sa.BigInteger), sa.bindparam("through", type_=sa.BigInteger)
    retract, earlier = events.alias("retract"), events.alias("earlier")
    columns = (events.c.position, events.c.item_id, events.c.occurred_at)
    came = sa.select(*columns).where(events.c[mark] <= through, interaction_condition(meanings, events))
    taken_back = (
        sa.select(*columns)
        .join_from(
            retract, events, sa.and_(events.c.user_id == retract.c.user_id, events.c.event_id == retract.c.retracts)
        )
        .where(retract.c.type == RETRACT, events.c[mark] <= through, interaction_condition(meanings, events))
        .distinct()
    )
    if from_start:
        # Not `mark <= through`, which SQLite would read all events by, instead of the index of those that take back.
        taken_back = taken_back.where(retract.c[mark] + 0 <= through)
    else:
        known = sa.exists().where(
            earlier.c.user_id == events.c.user_id, earlier.c.retracts == events.c.event_id, earlier.c[mark] <= since
        )
        came = came.where(events.c[mark] > since, ~known)
        taken_back = taken_back.where(retract.c[mark] > since, retract.c[mark] <= through, ~known)
    return came.subquery(), taken_back.subquery()


def mark_of(connection: Connection) -> str:
    """The column that says how far the events were read."""
    return "transaction_id" if connection.dialect.name == "postgresql" else "position"


def safe_through(connection: Connection) -> int:
    """Up to where no event can still appear: PostgreSQL's commits come out of the order of positions."""
    if connection.dialect.name == "postgresql":
        oldest_running = sa.text("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")
        return int(connection.execute(oldest_running).scalar_one()) - 1
    return int(connection.execute(sa.select(sa.func.max(events.c.position))).scalar() or 0)


@dataclass(frozen=True)
class Counted:
    """How far the events were counted, and what tells that they are the same ones still."""

    through: int = 0  # a position on SQLite, a transaction id on PostgreSQL
    newest: int = 0  # the position of the newest event
    received_at: datetime | None = None  # of the newest event
    erasures_through: int = 0
    settled: bool = False  # whether events of a restored dump became visible


def look(connection: Connection) -> Counted:
    """How far the events can be counted that a connection sees."""
    newest = connection.execute(
        sa.select(events.c.position, events.c.received_at).order_by(events.c.position.desc()).limit(1)
    ).first()
    position, received_at = (0, None) if newest is None else newest
    erased = connection.scalar(sa.select(sa.func.max(erasures.c.sequence))) or 0
    if connection.dialect.name != "postgresql":
        return Counted(position, position, received_at, erased)
    settled = bool(connection.scalar(sa.select(sa.exists().where(events.c.transaction_id <= SETTLED))))
    return Counted(safe_through(connection), position, received_at, erased, settled)


def goes_on(connection: Connection, earlier: Counted, now: Counted) -> bool:
    """Whether counts of an earlier look need only what came since: nothing was erased, emptied or restored."""
    if (earlier.erasures_through, earlier.settled) != (now.erasures_through, now.settled):
        return False
    if earlier.through > now.through or earlier.newest > now.newest:
        return False
    newest = sa.select(events.c.received_at).where(events.c.position == earlier.newest)
    return not earlier.newest or connection.scalar(newest) == earlier.received_at
