"""Versions and what they leave behind: found in the store, entered into SQL, removed when nobody needs them."""

import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError

from app.database import writing
from app.settings import Settings
from app.tables import activations, model_versions, run_events, runs, snapshots
from app.training import promotion
from app.training.runs import FINISHED, database_now
from ml.registry import Manifest, Registry, VersionDamaged
from ml.snapshots import collect as collect_parts
from ml.store import Store

PROGRESS_KEPT = timedelta(hours=1)  # of a finished run: the line-by-line progress, not its milestones

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Collected:
    """What a collection removed."""

    versions: list[str]
    parts: list[str]


def discover(engine: Engine, registry: Registry) -> list[str]:
    """Enter versions that were published by hand or by another service as candidates; answer the new ones.

    A version that names a run counts only through that run, so that a worker which lost its run cannot publish.
    """
    with engine.connect() as connection:
        known = set(connection.execute(sa.select(model_versions.c.version)).scalars())
    found = []
    for name in registry.names():
        if name in known:
            continue
        try:
            manifest = registry.manifest(name)
        except VersionDamaged as error:
            log.warning("version passed over", version=name, reason=str(error))
            continue
        if manifest.run_id is None and _enter(engine, manifest):
            found.append(name)
    return found


def _enter(engine: Engine, manifest: Manifest) -> bool:
    try:
        with writing(engine) as connection:
            promotion.add_candidate(connection, manifest.version, recipe_name(manifest), manifest.as_json())
    except IntegrityError:  # another process found it at the same time
        return False
    return True


def recipe_name(manifest: Manifest) -> str:
    """The name of the recipe that made a version."""
    return str(manifest.recipe.get("name", manifest.model.get("name", "unknown")))[:128]


def activate(engine: Engine, registry: Registry, version: str, *, actor: str, reason: str) -> bool:
    """Make a version the active one after loading it once; False if it was.

    Raises KeyError for an unknown version and VersionDamaged for one that does not load.
    """
    if not _is_known(engine, version):
        discover(engine, registry)  # it may have been published a moment ago
    if not _is_known(engine, version):
        raise KeyError(version)
    registry.load(version)
    with writing(engine) as connection:
        return promotion.activate(connection, version, actor=actor, reason=reason)


def rollback(engine: Engine, registry: Registry, *, actor: str) -> tuple[str, str | None]:
    """Return to the version that was active before, after loading it once; answers it and the one it replaced.

    Raises NothingToRollBackTo, and VersionDamaged if it does not load.
    """
    with engine.connect() as connection:
        target = promotion.rollback_target(connection)
    registry.load(target.version)
    with writing(engine) as connection:
        return promotion.rollback(connection, actor=actor, expected=target.version)


def _is_known(engine: Engine, version: str) -> bool:
    with engine.connect() as connection:
        known = sa.select(model_versions.c.version).where(model_versions.c.version == version)
        return connection.execute(known).first() is not None


def tidy(engine: Engine, store: Store, registry: Registry, settings: Settings) -> Collected:
    """Remove versions, snapshots, parts and run files that nobody needs and that are older than the retention.

    What is active, what a rollback returns to, what an unfinished run or one younger than the retention names, and
    versions that were published elsewhere stay.
    """
    retention = timedelta(days=settings.retention_days)
    with writing(engine) as connection:
        promotion.lock(connection)
        now = database_now(connection)
        young = sa.or_(runs.c.state.not_in(FINISHED), runs.c.finished_at > now - retention)
        rows = connection.execute(sa.select(runs.c.run_id, runs.c.version, runs.c.snapshot).where(young)).all()
        run_ids = {row.run_id for row in rows}
        expired = _expired_versions(connection, now - retention, {row.version for row in rows})
        connection.execute(sa.delete(model_versions).where(model_versions.c.version.in_(expired)))
        kept = connection.execute(sa.select(model_versions.c.manifest)).scalars().all()
        newest = sa.select(snapshots.c.hash).order_by(snapshots.c.sequence.desc()).limit(1)
        keep = {row.snapshot for row in rows} | {manifest.get("snapshot") for manifest in kept}
        keep |= set(connection.execute(newest).scalars())
        ended = sa.select(runs.c.run_id).where(runs.c.finished_at < now - PROGRESS_KEPT)
        old_progress = sa.and_(run_events.c.kind == "progress", run_events.c.run_id.in_(ended))
        connection.execute(sa.delete(run_events).where(old_progress))
    expired += _unclaimed_versions(engine, registry, now - retention, run_ids)
    for version in expired:
        registry.delete(version)
    parts = collect_parts(store, {name for name in keep if name}, retention.total_seconds())
    store.remove_leftovers(max(retention.total_seconds(), 3600))
    _remove_run_files(engine, settings)
    if expired or parts:
        log.info("collected", versions=expired, parts=len(parts))
    return Collected(expired, parts)


def _expired_versions(connection: Connection, before: datetime, named: Collection[str]) -> list[str]:
    """Candidates and retired versions of our own runs that were last of use before that time."""
    last_used: dict[str, datetime] = {}
    previous: str | None = None
    for row in connection.execute(sa.select(activations).order_by(activations.c.sequence)):
        last_used[row.version] = row.created_at
        if previous is not None:
            last_used[previous] = row.created_at
        previous = row.version
    try:
        kept = {*named, promotion.rollback_target(connection).version}
    except promotion.NothingToRollBackTo:
        kept = set(named)
    unused = sa.select(model_versions).where(
        model_versions.c.state.in_(["candidate", "retired"]), model_versions.c.run_id.is_not(None)
    )
    return [
        row.version
        for row in connection.execute(unused)
        if row.version not in kept and max(row.created_at, last_used.get(row.version, row.created_at)) <= before
    ]


def _unclaimed_versions(engine: Engine, registry: Registry, before: datetime, unfinished: Collection[str]) -> list[str]:
    """Versions that a worker published after it had lost its run, or died before it could say so."""
    with engine.connect() as connection:
        known = set(connection.execute(sa.select(model_versions.c.version)).scalars())
        ours = set(connection.execute(sa.select(runs.c.run_id)).scalars())
    unclaimed = []
    for name in registry.names():
        if name in known:
            continue
        try:
            manifest = registry.manifest(name)
        except VersionDamaged:
            continue
        made_here = manifest.run_id in ours and manifest.run_id not in unfinished
        if made_here and datetime.fromisoformat(manifest.created_at) <= before:
            unclaimed.append(name)
    return unclaimed


def _remove_run_files(engine: Engine, settings: Settings) -> None:
    """Remove checkpoints whose run is over, or was never heard of for a day."""
    if not settings.runs_dir.is_dir():
        return
    with engine.connect() as connection:
        states = {row.run_id: row.state for row in connection.execute(sa.select(runs.c.run_id, runs.c.state))}
    for folder in settings.runs_dir.iterdir():
        state = states.get(folder.name)
        if state in FINISHED or (state is None and folder.stat().st_mtime < time.time() - 86_400):
            shutil.rmtree(folder, ignore_errors=True)
