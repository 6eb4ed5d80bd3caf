"""Erasing a user or an item: every row about it goes, and a hash stays to keep it out of snapshots and models.

The next snapshot rewrites the parts that held the subject, and versions that are loaded drop its id: both go by the
table `erasures`. Rows of the recommendation log that showed an erased item to other users stay.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app import audit
from app.catalog_rows import SHAPES, Kind
from app.database import writing
from app.tables import erasures, events, recommendation_log


@dataclass(frozen=True)
class Erased:
    """How many rows went; all zero when there was nothing to erase."""

    catalog: int
    events: int
    log_rows: int

    def __bool__(self) -> bool:
        return bool(self.catalog or self.events or self.log_rows)


def subject_sha256(identifier: str) -> str:
    """What is kept of an erased id."""
    return hashlib.sha256(identifier.encode()).hexdigest()


def erase(engine: Engine, kind: Kind, identifier: str, *, actor: str) -> Erased:
    """Erase a user or an item with all its events, for good. Events that come later count as those of a new one."""
    with writing(engine) as connection:
        return _erase(connection, kind, identifier, actor)


def _erase(connection: Connection, kind: Kind, identifier: str, actor: str) -> Erased:
    if connection.dialect.name == "postgresql":
        # Waits for rows under way and holds up new ones: no event may commit later below `through_position`, and no
        # answer may enter the log that was judged before the erasure was there to see.
        connection.execute(sa.text("LOCK TABLE events, recommendation_log IN SHARE ROW EXCLUSIVE MODE"))
    through = connection.execute(sa.select(sa.func.max(events.c.position))).scalar() or 0
    column = events.c.user_id if kind == "user" else events.c.item_id
    gone_events = connection.execute(sa.delete(events).where(column == identifier)).rowcount
    gone_rows = 0
    if kind == "user":
        mine = recommendation_log.c.user_id == identifier
        gone_rows = connection.execute(sa.delete(recommendation_log).where(mine)).rowcount
    shape = SHAPES[kind]
    gone = connection.execute(sa.delete(shape.table).where(shape.key == identifier)).rowcount
    erased = Erased(gone, gone_events, gone_rows)
    if erased:
        subject = subject_sha256(identifier)
        connection.execute(
            sa.insert(erasures).values(
                kind=kind, subject_sha256=subject, through_position=through, erased_at=datetime.now(UTC)
            )
        )
        details = {"catalog": gone, "events": gone_events, "log_rows": gone_rows}
        audit.record(connection, actor, f"{kind}.erase", f"sha256:{subject}", details)
    return erased
