"""Runs: the queue of trainings, claimed with a lease and fenced by an epoch.

Every write of a worker names the epoch of its claim. A claim raises the epoch, so that a worker that was silent
past its lease, and lost the run to another, changes nothing any more.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError

from app.database import writing
from app.tables import run_events, runs

Promote = Literal["guarded", "always", "never"]
IDLE_MILLISECONDS = 30_000
FINISHED = ("succeeded", "failed", "cancelled")


class LeaseLost(RuntimeError):  # noqa: N818
    """Another worker has claimed the run, or it is over: whatever this one still has to say does not count."""


class RunIsOver(ValueError):  # noqa: N818
    """A finished run cannot be cancelled."""


class KeyReused(ValueError):  # noqa: N818
    """The idempotency key stands for another request."""


@dataclass(frozen=True)
class Run:
    """One row of `runs`, as it was read."""

    run_id: str
    recipe: str
    overrides: dict[str, str]
    promote: Promote
    warm_start: bool
    state: str
    cancel_requested: bool
    idempotency_key: str | None
    requested_by: str | None
    epoch: int
    worker: str | None
    lease_until: datetime | None
    attempts: int
    progress: dict[str, Any] | None
    snapshot: str | None
    version: str | None
    promoted: bool | None
    message: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def finished(self) -> bool:
        return self.state in FINISHED


def database_now(connection: Connection) -> datetime:
    """The time by the database's clock, which all workers share (SQLite has its host's)."""
    if connection.dialect.name == "sqlite":
        return datetime.now(UTC)
    now: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return now


def create(
    connection: Connection,
    recipe: str,
    *,
    overrides: Mapping[str, str] | None = None,
    promote: Promote = "guarded",
    warm_start: bool = False,
    idempotency_key: str | None = None,
    requested_by: str | None = None,
) -> tuple[Run, bool]:
    """Queue a run; the same idempotency key answers the run that it made before. Tell whether it is new.

    Raises KeyReused if the key came with another request.
    """
    request = {"recipe": recipe, "overrides": dict(overrides or {}), "promote": promote, "warm_start": warm_start}
    known = by_idempotency_key(connection, idempotency_key)
    if known is None:
        now = database_now(connection)
        run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        row = {
            **request,
            "run_id": run_id,
            "state": "queued",
            "cancel_requested": False,
            "idempotency_key": idempotency_key,
            "requested_by": requested_by,
            "epoch": 0,
            "attempts": 0,
            "created_at": now,
        }
        try:
            with connection.begin_nested():  # a request with the same key may come in at the same time
                connection.execute(sa.insert(runs).values(row))
                add_event(connection, run_id, "state", {"state": "queued"})
        except IntegrityError:
            known = by_idempotency_key(connection, idempotency_key)
            if known is None:
                raise
        else:
            return read(connection, run_id), True
    if {name: getattr(known, name) for name in request} != request:
        raise KeyReused(f"the key was used for run {known.run_id}, which asks for something else; take a new key")
    return known, False


def by_idempotency_key(connection: Connection, key: str | None) -> Run | None:
    """The run that was made with this key."""
    if key is None:
        return None
    row = connection.execute(sa.select(runs).where(runs.c.idempotency_key == key)).one_or_none()
    return None if row is None else Run(**row._mapping)


def read(connection: Connection, run_id: str) -> Run:
    """One run. Raises KeyError for an unknown one."""
    row = connection.execute(sa.select(runs).where(runs.c.run_id == run_id)).one_or_none()
    if row is None:
        raise KeyError(run_id)
    return Run(**row._mapping)


def page(connection: Connection, limit: int, *, before: str | None = None, state: str | None = None) -> list[Run]:
    """The newest runs first; with `before`, those older than that one. Raises KeyError if it is unknown."""
    query = sa.select(runs).order_by(runs.c.created_at.desc(), runs.c.run_id.desc()).limit(limit)
    if state is not None:
        query = query.where(runs.c.state == state)
    if before is not None:
        last = read(connection, before)
        older = runs.c.created_at < last.created_at
        tied = sa.and_(runs.c.created_at == last.created_at, runs.c.run_id < last.run_id)
        query = query.where(sa.or_(older, tied))
    return [Run(**row._mapping) for row in connection.execute(query)]


def add_event(connection: Connection, run_id: str, kind: str, details: Mapping[str, Any]) -> None:
    """Append to what the run's progress stream tells."""
    connection.execute(
        sa.insert(run_events).values(
            run_id=run_id, kind=kind, details=dict(details), created_at=database_now(connection)
        )
    )


def events_after(connection: Connection, run_id: str, sequence: int, limit: int = 1000) -> list[sa.Row[Any]]:
    """What the run told after that sequence number, oldest first."""
    query = (
        sa.select(run_events)
        .where(run_events.c.run_id == run_id, run_events.c.sequence > sequence)
        .order_by(run_events.c.sequence)
        .limit(limit)
    )
    return list(connection.execute(query))


def request_cancel(connection: Connection, run_id: str) -> Run:
    """Cancel a run: at once if nobody works on it, else its worker stops within a second or two.

    Raises KeyError for an unknown run and RunIsOver for one that succeeded or failed.
    """
    row = connection.execute(sa.select(runs).where(runs.c.run_id == run_id).with_for_update()).one_or_none()
    if row is None:
        raise KeyError(run_id)
    run = Run(**row._mapping)
    if run.state == "cancelled" or (run.cancel_requested and run.state == "running"):
        return run
    if run.finished:
        raise RunIsOver(f"the run has {run.state}")
    if run.state == "queued" or (run.lease_until is not None and run.lease_until < database_now(connection)):
        _end(connection, run_id, "cancelled", "cancelled before it was done", epoch=run.epoch + 1)
    else:
        connection.execute(sa.update(runs).where(runs.c.run_id == run_id).values(cancel_requested=True))
        add_event(connection, run_id, "cancel_requested", {})
    return read(connection, run_id)


def claim(engine: Engine, worker: str, *, lease_seconds: float, max_attempts: int) -> Run | None:
    """Take the oldest run that waits, or whose worker has been silent past its lease."""
    with engine.connect() as connection:  # an idle worker takes no write lock
        if connection.execute(_claimable(connection)).first() is None:
            return None
    while True:
        with writing(engine) as connection:
            row = connection.execute(_claimable(connection).with_for_update(skip_locked=True)).one_or_none()
            if row is None:
                return None
            run = Run(**row._mapping)
            if run.cancel_requested:
                _end(connection, run.run_id, "cancelled", "cancelled after its worker was lost", epoch=run.epoch + 1)
                continue
            if run.attempts >= max_attempts:
                message = f"given up: its worker was lost in each of {run.attempts} attempts"
                _end(connection, run.run_id, "failed", message, epoch=run.epoch + 1)
                continue
            now = database_now(connection)
            values = {
                "state": "running",
                "epoch": run.epoch + 1,
                "attempts": run.attempts + 1,
                "worker": worker,
                "lease_until": now + timedelta(seconds=lease_seconds),
                "started_at": run.started_at or now,
            }
            connection.execute(sa.update(runs).where(runs.c.run_id == run.run_id).values(values))
            details = {"state": "running", "worker": worker, "attempt": run.attempts + 1}
            add_event(connection, run.run_id, "state", details)
            return read(connection, run.run_id)


def _claimable(connection: Connection) -> sa.Select[Any]:
    silent = sa.and_(runs.c.state == "running", runs.c.lease_until < database_now(connection))
    query = sa.select(runs).where(sa.or_(runs.c.state == "queued", silent))
    return query.order_by(runs.c.created_at, runs.c.run_id).limit(1)


def renew(engine: Engine, run: Run, lease_seconds: float) -> bool:
    """Keep the run for another lease and tell whether it is to be cancelled. Raises LeaseLost."""
    with writing(engine) as connection:
        lease_until = database_now(connection) + timedelta(seconds=lease_seconds)
        update_claimed(connection, run, lease_until=lease_until)
        return read(connection, run.run_id).cancel_requested


def cancel_requested(engine: Engine, run: Run) -> bool:
    """Tell whether the run is to be cancelled, without a write. Raises LeaseLost."""
    with engine.connect() as connection:
        current = read(connection, run.run_id)
    if (current.epoch, current.state) != (run.epoch, "running"):
        raise LeaseLost(f"run {run.run_id} is no longer this worker's")
    return current.cancel_requested


def update_claimed(connection: Connection, run: Run, **values: Any) -> None:
    """Change the run's row if the claim still holds. Raises LeaseLost."""
    if connection.dialect.name == "postgresql":
        # A worker that is paused within its transaction would keep the row from the others for as long.
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {IDLE_MILLISECONDS}")
    mine = sa.and_(runs.c.run_id == run.run_id, runs.c.epoch == run.epoch, runs.c.state == "running")
    if connection.execute(sa.update(runs).where(mine).values(values)).rowcount != 1:
        raise LeaseLost(f"run {run.run_id} is no longer this worker's")


def report(engine: Engine, run: Run, kind: str, details: Mapping[str, Any], **values: Any) -> None:
    """Tell the followers of the run something, and change its row, if the claim still holds. Raises LeaseLost."""
    with writing(engine) as connection:
        update_claimed(connection, run, **(values or {"worker": run.worker}))
        add_event(connection, run.run_id, kind, details)


def finish(connection: Connection, run: Run, state: str, message: str, **values: Any) -> None:
    """End a claimed run, in the caller's transaction. Raises LeaseLost."""
    update_claimed(connection, run, worker=run.worker)
    _end(connection, run.run_id, state, message, epoch=run.epoch, **values)


def release(engine: Engine, run: Run) -> None:
    """Put a claimed run back into the queue; this attempt does not count. Raises LeaseLost."""
    with writing(engine) as connection:
        update_claimed(connection, run, state="queued", worker=None, lease_until=None, attempts=run.attempts - 1)
        add_event(connection, run.run_id, "state", {"state": "queued", "message": "its worker was stopped"})


def _end(connection: Connection, run_id: str, state: str, message: str, *, epoch: int, **values: Any) -> None:
    ended = {
        "state": state,
        "message": message,
        "epoch": epoch,
        "lease_until": None,
        "finished_at": database_now(connection),
    }
    connection.execute(sa.update(runs).where(runs.c.run_id == run_id).values({**ended, **values}))
    add_event(connection, run_id, "state", {"state": state, "message": message, **values})
