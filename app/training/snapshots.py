"""Snapshots of the events: from SQL into Parquet parts, up to a watermark that no open transaction lies below.

PostgreSQL hands out positions before it commits them, so that an event may appear below others that were seen long
before. Its watermark is therefore a transaction id: events of all transactions below the oldest one still open are
settled, those of later ones wait for the next snapshot. SQLite has one writer, and positions commit in order.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection, Engine

from app.database import cluster_of, writing
from app.settings import Settings
from app.tables import SETTLED, erasures, events, snapshots
from app.times import rfc3339
from app.training.runs import database_now
from ml.snapshots import (
    PART_SCHEMA,
    PartRef,
    Snapshot,
    SnapshotDamaged,
    make_snapshot,
    publish,
    read_snapshot,
    rewrite_without,
    write_part,
)
from ml.store import Store

ROWS_PER_PART = 1_000_000
ROWS_PER_FETCH = 20_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Horizon:
    """Up to where the events are settled."""

    position: int
    transaction_id: int | None


def take_snapshot(
    engine: Engine,
    store: Store,
    settings: Settings,
    *,
    check: Callable[[], None] = lambda: None,
    rows_per_part: int = ROWS_PER_PART,
) -> Snapshot:
    """Continue the last snapshot with the events since, and publish the result; the last one itself if none came.

    `check` is called often and may raise to give up. Nothing counts before the last step, so that a call that was
    killed is made up for by the next, and several at once do not disturb one another.
    """
    with engine.connect() as connection:
        cluster = cluster_of(connection)
    parent = _parent(engine, store, cluster)
    if parent is None:
        _settle_restored(engine)
    known_erasures = 0 if parent is None else int(parent.watermark["erasures_through"])
    # Read before the events: what is erased from here on may still be in the new parts, and the next call's work.
    erased, erasures_through = _erasures(engine, known_erasures)
    parts: list[PartRef] = []
    for part in () if parent is None else parent.parts:
        check()
        rewritten = rewrite_without(store, part, erased["user"], erased["item"]) if any(erased.values()) else part
        if rewritten is not None:
            parts.append(rewritten)
    newest = None if parent is None or parent.watermark["time"] is None else _parse(parent.watermark["time"])
    position = 0 if parent is None else int(parent.watermark["position"])
    with ExitStack() as stack:
        connection = stack.enter_context(_reading(engine))
        stack.enter_context(connection.begin())
        horizon = _horizon(connection)
        new = _tables(connection, _new_events(connection, parent, horizon), rows_per_part, check)
        for table in stack.enter_context(closing(new)):
            parts.append(write_part(store, table))
            newest = max(filter(None, [newest, _newest(table)]), default=None)
            position = max(position, pc.max(table["position"]).as_py())
    meanings = settings.event_meanings
    if (
        parent is not None
        and list(parent.parts) == parts
        and dict(parent.meanings) == dict(meanings)
        and known_erasures == erasures_through
    ):
        return parent
    watermark = {
        "position": position if horizon.transaction_id is not None else max(position, horizon.position),
        "transaction_id": horizon.transaction_id,
        "time": None if newest is None else rfc3339(newest),
        "erasures_through": erasures_through,
    }
    snapshot = make_snapshot(parts, meanings, watermark, parent=None if parent is None else parent.hash)
    publish(store, snapshot)
    with writing(engine) as connection:
        row = {"hash": snapshot.hash, "cluster": cluster, "created_at": database_now(connection)}
        connection.execute(sa.insert(snapshots).values(row))
    log.info("snapshot taken", hash=snapshot.hash, parts=len(parts), rows=sum(part.rows for part in parts))
    return snapshot


def _parent(engine: Engine, store: Store, cluster: str) -> Snapshot | None:
    """The snapshot to continue; none if the database or the store is not the one that it was taken with."""
    with engine.connect() as connection:
        row = connection.execute(sa.select(snapshots).order_by(snapshots.c.sequence.desc()).limit(1)).one_or_none()
    if row is None:
        return None
    if row.cluster != cluster:
        log.warning("the database was restored: all events go into new parts", last=row.hash)
        return None
    try:
        snapshot = read_snapshot(store, row.hash)
    except (KeyError, SnapshotDamaged) as error:
        log.warning("the last snapshot cannot be read: all events go into new parts", last=row.hash, reason=str(error))
        return None
    missing = [part.sha256 for part in snapshot.parts if not store.exists(f"parts/{part.sha256}.parquet")]
    if missing:
        log.warning("the last snapshot lacks parts: all events go into new parts", last=row.hash, missing=missing[:3])
        return None
    return snapshot


def _settle_restored(engine: Engine) -> None:
    """Mark events of a restored dump, whose transaction ids are another cluster's, as settled.

    They would otherwise look as if their transactions were still to come.
    """
    if engine.dialect.name == "sqlite":
        return
    ahead = sa.text("transaction_id >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    with engine.begin() as connection:
        if connection.execute(sa.select(events.c.position).where(ahead).limit(1)).first() is not None:
            settled = connection.execute(sa.update(events).where(ahead).values(transaction_id=SETTLED)).rowcount
            log.warning("events of a restored dump settled", events=settled)


def _erasures(engine: Engine, after: int) -> tuple[dict[str, dict[str, int]], int]:
    """Erasures since: by kind, each subject's hash and the position that they reach to; and the newest's number."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Waits for erasures under way, so that none with a lower number appears later.
            connection.exec_driver_sql("LOCK TABLE erasures IN SHARE MODE")
        query = sa.select(erasures).where(erasures.c.sequence > after).order_by(erasures.c.sequence)
        erased: dict[str, dict[str, int]] = {"user": {}, "item": {}}
        through = after
        for row in connection.execute(query):
            subjects = erased[row.kind]
            subjects[row.subject_sha256] = max(row.through_position, subjects.get(row.subject_sha256, 0))
            through = row.sequence
    return erased, through


def _reading(engine: Engine) -> Connection:
    """A connection that sees one moment, and fetches rows as they are needed."""
    options: dict[str, Any] = {"stream_results": True, "yield_per": ROWS_PER_FETCH}
    if engine.dialect.name == "postgresql":
        options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    return engine.connect().execution_options(**options)


def _horizon(connection: Connection) -> Horizon:
    if connection.dialect.name == "postgresql":
        oldest_open = connection.exec_driver_sql("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")
        return Horizon(0, oldest_open.scalar_one())
    return Horizon(connection.execute(sa.select(sa.func.max(events.c.position))).scalar_one() or 0, None)


def _new_events(connection: Connection, parent: Snapshot | None, horizon: Horizon) -> sa.Select[Any]:
    if horizon.transaction_id is not None:
        new = events.c.transaction_id < horizon.transaction_id
        if parent is not None:
            new &= events.c.transaction_id >= parent.watermark["transaction_id"]
    else:
        new = events.c.position <= horizon.position
        if parent is not None:
            new &= events.c.position > parent.watermark["position"]
    target = events.alias("target")
    taken_back = sa.select(target.c.position).where(
        target.c.user_id == events.c.user_id, target.c.event_id == events.c.retracts
    )
    # SQLite keeps times as text, which is read much faster at once than one by one.
    on_sqlite = connection.dialect.name == "sqlite"
    time = sa.type_coerce(events.c.occurred_at, sa.String()) if on_sqlite else events.c.occurred_at
    return (
        sa.select(
            events.c.position,
            events.c.user_id,
            events.c.item_id,
            events.c.type,
            events.c.value,
            time,
            sa.case((events.c.retracts.is_not(None), taken_back.scalar_subquery())),
        )
        .where(new)
        .order_by(events.c.position)
    )


def _tables(
    connection: Connection, query: sa.Select[Any], rows_per_part: int, check: Callable[[], None]
) -> Generator[pa.Table, None, None]:
    """The events as tables of at most that many rows."""
    chunks: list[pa.Table] = []
    rows = 0
    with connection.execute(query) as result:
        for fetched in result.partitions(ROWS_PER_FETCH):
            check()
            chunk = _table(fetched)
            while rows + len(chunk) >= rows_per_part:
                taken = rows_per_part - rows
                yield pa.concat_tables([*chunks, chunk.slice(0, taken)]).combine_chunks()
                chunk, chunks, rows = chunk.slice(taken), [], 0
            if len(chunk):
                chunks.append(chunk)
                rows += len(chunk)
    if chunks:
        yield pa.concat_tables(chunks).combine_chunks()


def _table(rows: Sequence[Any]) -> pa.Table:
    columns = []
    for field, values in zip(PART_SCHEMA, zip(*rows, strict=True), strict=True):
        if field.name == "time" and isinstance(values[0], str):
            columns.append(pa.array(values, pa.string()).cast(pa.timestamp("us")).cast(field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=PART_SCHEMA)


def _newest(table: pa.Table) -> datetime:
    newest: datetime = pc.max(table["time"]).as_py()
    return newest.astimezone(UTC)


def _parse(text: str) -> datetime:
    return datetime.fromisoformat(text)
