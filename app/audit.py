"""The audit trail: who changed what, written in the transaction that changed it."""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from app.tables import audit_log


def record(
    connection: Connection, actor: str, action: str, subject: str, details: dict[str, Any] | None = None
) -> None:
    """Write down an action of an admin.

    `actor` is a key_id, `cli`, `worker` or `loopback`; `action` a verb of its kind, such as `key.create` or
    `user.erase`. Ids of people do not belong here (name them by hash): the trail outlives an erasure.
    """
    connection.execute(
        sa.insert(audit_log).values(
            actor=actor, action=action, subject=subject, details=details or {}, created_at=datetime.now(UTC)
        )
    )


def read(connection: Connection, *, before: int | None = None, limit: int = 100) -> list[RowMapping]:
    """The newest entries first; `before` is the sequence of the last one already seen."""
    query = sa.select(audit_log).order_by(audit_log.c.sequence.desc()).limit(limit)
    if before is not None:
        query = query.where(audit_log.c.sequence < before)
    return list(connection.execute(query).mappings())
