"""Erasing a user or an item: every row about it goes, and a hash stays to keep it out of snapshots and models.

The next snapshot rewrites the parts that held the subject, and versions that are loaded drop its id: both go by the
table `erasures`. Rows of the recommendation log that showed an erased item to other users stay.
"""

import hashlib
from array import array
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app import audit
from app.catalog_rows import SHAPES, Kind
from app.database import writing
from app.serving.interaction_counts import mark_of, safe_through
from app.tables import erasures, events, item_counts, recommendation_log, snapshots

ROWS_AT_A_TIME = 5_000


@dataclass(frozen=True)
class Erased:
    """How many rows went, and whether it was news: erasing again what left no row since changes nothing."""

    catalog: int
    events: int
    log_rows: int
    is_new: bool = True


def subject_sha256(identifier: str) -> str:
    """What is kept of an erased id."""
    return hashlib.sha256(identifier.encode()).hexdigest()


def erase(engine: Engine, kind: Kind, identifier: str, *, actor: str) -> Erased:
    """Erase a user or an item with all its events, for good. Events that come later count as those of a new one."""
    # Events are not indexed by item. All of them are read before the lock is taken, and few again while it is held.
    found = _events_of_item(engine, identifier) if kind == "item" else None
    with writing(engine) as connection:
        return _erase(connection, kind, identifier, actor, found)


@dataclass(frozen=True)
class _Found:
    """Events of an item, complete up to a mark (`app.serving.interaction_counts.mark_of`)."""

    positions: "array[int]"
    through: int


def _events_of_item(engine: Engine, item_id: str) -> _Found:
    with engine.connect() as connection:
        through = safe_through(connection)
        settled = sa.select(events.c.position).where(
            events.c.item_id == item_id, events.c[mark_of(connection)] <= through
        )
        with connection.execute(settled.execution_options(yield_per=ROWS_AT_A_TIME)) as rows:
            return _Found(array("q", rows.scalars()), through)


def _delete_events_of_item(connection: Connection, item_id: str, found: _Found) -> int:
    newer = sa.and_(events.c[mark_of(connection)] > found.through, events.c.item_id == item_id)
    gone = connection.execute(sa.delete(events).where(newer)).rowcount
    for start in range(0, len(found.positions), ROWS_AT_A_TIME):
        part = found.positions[start : start + ROWS_AT_A_TIME].tolist()
        gone += connection.execute(sa.delete(events).where(events.c.position.in_(part))).rowcount
    return gone


def _erase(connection: Connection, kind: Kind, identifier: str, actor: str, found: _Found | None) -> Erased:
    if connection.dialect.name == "postgresql":
        # Waits for rows under way and holds up new ones: no event may commit later below `through_position`, and no
        # answer may enter the log that was judged before the erasure was there to see.
        connection.execute(sa.text("LOCK TABLE events, recommendation_log IN SHARE ROW EXCLUSIVE MODE"))
    through = connection.execute(sa.select(sa.func.max(events.c.position))).scalar() or 0
    if found is not None:
        gone_events = _delete_events_of_item(connection, identifier, found)
    else:
        gone_events = connection.execute(sa.delete(events).where(events.c.user_id == identifier)).rowcount
    gone_rows = 0
    if kind == "user":
        mine = recommendation_log.c.user_id == identifier
        gone_rows = connection.execute(sa.delete(recommendation_log).where(mine)).rowcount
    shape = SHAPES[kind]
    gone = connection.execute(sa.delete(shape.table).where(shape.key == identifier)).rowcount
    subject = subject_sha256(identifier)
    # Versions and snapshots may hold a subject whose rows went in another way, or were never here.
    is_new = bool(gone or gone_events or gone_rows) or _may_be_held(connection, kind, subject)
    erased = Erased(gone, gone_events, gone_rows, is_new)
    if is_new:
        connection.execute(
            sa.insert(erasures).values(
                kind=kind, subject_sha256=subject, through_position=through, erased_at=datetime.now(UTC)
            )
        )
        details = {"catalog": gone, "events": gone_events, "log_rows": gone_rows}
        audit.record(connection, actor, f"{kind}.erase", f"sha256:{subject}", details)
        # They hold ids of items, and count what is gone. After the row above: whoever saves others waits, and sees it.
        connection.execute(sa.delete(item_counts))
    return erased


def _may_be_held(connection: Connection, kind: Kind, subject: str) -> bool:
    """Whether a snapshot may have been written with the subject in it: it was not erased since the newest one."""
    mine = sa.and_(erasures.c.kind == kind, erasures.c.subject_sha256 == subject)
    last = connection.execute(sa.select(sa.func.max(erasures.c.erased_at)).where(mine)).scalar()
    newest = connection.execute(sa.select(sa.func.max(snapshots.c.created_at))).scalar()
    return last is None or (newest is not None and newest >= last)
