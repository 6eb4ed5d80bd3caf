"""Promotion: which version is active, the guard before it, and the way back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app import audit
from app.tables import activations, model_versions
from app.training.runs import Promote, database_now

# Activations follow one another: on PostgreSQL this lock makes them wait, on SQLite the write lock does.
ACTIVATION_LOCK = 7_305_140_201
GUARDED_METRIC = "ndcg@10"
# On fewer, the difference of two versions is chance: one click after a training must not decide.
MINIMUM_COMPARED = 50
# Hold-outs of which no larger share is new, and that are as large but for that, tell much the same.
ALIKE_SHARE = 0.1


class NothingToRollBackTo(ValueError):  # noqa: N818
    """No earlier activation whose version is still there."""


@dataclass(frozen=True)
class Decision:
    """Whether a version becomes active, and why."""

    promote: bool
    message: str


def active_version(connection: Connection) -> sa.Row[Any] | None:
    """The row of the version that answers, if one does."""
    return connection.execute(sa.select(model_versions).where(model_versions.c.state == "active")).one_or_none()


def add_candidate(
    connection: Connection, version: str, recipe: str, manifest: Mapping[str, Any], run_id: str | None = None
) -> None:
    """Enter a published version; one that is there already stays as it is."""
    known = sa.select(model_versions.c.version).where(model_versions.c.version == version)
    if connection.execute(known).first() is None:
        row = {"version": version, "recipe": recipe, "state": "candidate", "manifest": dict(manifest)}
        connection.execute(sa.insert(model_versions).values(**row, run_id=run_id, created_at=database_now(connection)))


def decide(
    promote: Promote,
    manifest: Mapping[str, Any],
    active: Mapping[str, Any] | None,
    compared: Mapping[str, Any] | None,
    active_at_start: str | None,
) -> Decision:
    """The guard: nDCG@10 on the hold-out must not be below popularity's, nor below the active version's.

    `active` is the active version's manifest; `compared` is what the training measured of both on the interactions
    that the one active at its start has not trained on: `{"version", "interactions", "this", "that"}`, None if that
    one does not load.
    """
    if promote == "never":
        return Decision(False, "left as a candidate, as asked (promote: never)")
    if promote == "always":
        return Decision(True, "promoted without a comparison, as asked (promote: always)")
    own = _measured(manifest, "test")
    popularity = _measured(manifest, "popularity")
    if own is None or popularity is None:
        return Decision(False, "not promoted: no interaction was held out to measure it on; post more feedback")
    if own < popularity:
        return Decision(False, f"not promoted: nDCG@10 {own:.4f} is below popularity's {popularity:.4f}")
    beats_popularity = f"nDCG@10 {own:.4f} is not below popularity's {popularity:.4f}"
    if active is None:
        return Decision(True, f"promoted: {beats_popularity}; nothing was active before")
    name = active["version"]
    if _hold_out(manifest) is not None and _hold_out(manifest) == _hold_out(active):
        other = _measured(active, "test")
        where = "on the same hold-out"
    elif name != active_at_start:
        return Decision(False, f"not promoted: {name} became active meanwhile, and the two were not compared")
    elif compared is not None and compared["version"] == name and compared["interactions"] >= MINIMUM_COMPARED:
        own, other = _number(compared["this"]), _number(compared["that"])
        where = f"on {compared['interactions']} interactions that it has not trained on"
    elif compared is not None and compared["version"] == name and _alike(manifest, active, compared["interactions"]):
        # The new version knows more recent events: only what is more than chance speaks against it.
        other = _lower_end(active)
        where = "the lower end of its 95 % interval, measured on nearly the same hold-out"
    else:
        why = "does not load"
        if compared is not None:
            why = f"has trained on all but {compared['interactions']} interactions of the hold-out"
            why += f" ({MINIMUM_COMPARED} are needed) and was itself measured on another"
        return Decision(True, f"promoted: {beats_popularity}; not compared with the active {name}, which {why}")
    if own is None or other is None:
        return Decision(False, f"not promoted: its nDCG@10 and that of the active {name} are not both known")
    comparison = f"that of the active {name}, {other:.4f}, {where}"
    if own < other:
        return Decision(False, f"not promoted: nDCG@10 {own:.4f} is below {comparison}")
    return Decision(True, f"promoted: {beats_popularity}, and {own:.4f} is not below {comparison}")


def _measured(manifest: Mapping[str, Any], part: str) -> float | None:
    return _number((manifest["metrics"].get(part) or {}).get(GUARDED_METRIC))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _hold_out(manifest: Mapping[str, Any]) -> tuple[Any, ...] | None:
    evaluated_on = manifest["metrics"].get("evaluated_on") or {}
    if evaluated_on.get("snapshot") is None:
        return None
    return tuple(evaluated_on.get(name) for name in ("snapshot", "split", "from", "through", "interactions"))


def _alike(manifest: Mapping[str, Any], active: Mapping[str, Any], number_new: int) -> bool:
    """Whether both versions were measured on much the same hold-out, of which `number_new` interactions are new."""
    ours, theirs = (found["metrics"].get("evaluated_on") or {} for found in (manifest, active))
    size, other_size = (part.get("interactions") or 0 for part in (ours, theirs))
    # A warm start is measured on what is new alone.
    is_cold = ours.get("warm") is False and theirs.get("warm") is False
    is_same_kind = is_cold and ours.get("split") == theirs.get("split") and _lower_end(active) is not None
    return is_same_kind and max(number_new, abs(size - other_size)) <= ALIKE_SHARE * min(size, other_size)


def _lower_end(manifest: Mapping[str, Any]) -> float | None:
    interval = (manifest["metrics"].get("intervals") or {}).get(GUARDED_METRIC)
    return _number(interval[0]) if interval else None


def lock(connection: Connection) -> None:
    """Let no other activation change what is active before this transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ACTIVATION_LOCK)))


def activate(connection: Connection, version: str, *, actor: str, reason: str) -> bool:
    """Make a version the one that answers; False if it was. Raises KeyError for an unknown version.

    The caller has made sure that the version loads.
    """
    lock(connection)
    active = active_version(connection)
    if active is not None and active.version == version:
        return False
    newest = _newest_activation(connection)
    _switch(connection, version, previous=None if newest is None else newest.sequence)
    details = {"replaced": None if active is None else active.version, "reason": reason}
    audit.record(connection, actor, "model.activate", version, details)
    return True


def rollback_target(connection: Connection) -> sa.Row[Any]:
    """The activation that a rollback returns to. Raises NothingToRollBackTo."""
    newest = _newest_activation(connection)
    active, previous = (None, None) if newest is None else (newest.version, newest.previous)
    while previous is not None:
        row = connection.execute(sa.select(activations).where(activations.c.sequence == previous)).one()
        known = sa.select(model_versions.c.version).where(model_versions.c.version == row.version)
        if row.version != active and connection.execute(known).first() is not None:
            return row
        previous = row.previous
    raise NothingToRollBackTo("no version was active before this one, or none that is still kept")


def rollback(connection: Connection, *, actor: str, expected: str | None = None) -> tuple[str, str | None]:
    """Return to the version that was active before; done again, to the one before that. Answers (now, before).

    With `expected`, raises NothingToRollBackTo when another version is the one to return to by now.
    """
    lock(connection)
    target = rollback_target(connection)
    if expected is not None and target.version != expected:
        raise NothingToRollBackTo("what is active changed at the same time; look at it and try again")
    active = active_version(connection)
    before = None if active is None else active.version
    _switch(connection, target.version, previous=target.previous)
    audit.record(connection, actor, "model.rollback", target.version, {"replaced": before})
    return target.version, before


def _newest_activation(connection: Connection) -> sa.Row[Any] | None:
    return connection.execute(sa.select(activations).order_by(activations.c.sequence.desc()).limit(1)).one_or_none()


def _switch(connection: Connection, version: str, *, previous: int | None) -> None:
    states = model_versions.c.state
    connection.execute(sa.update(model_versions).where(states == "active").values(state="retired"))
    chosen = sa.update(model_versions).where(model_versions.c.version == version).values(state="active")
    if connection.execute(chosen).rowcount != 1:
        raise KeyError(version)
    now = database_now(connection)
    connection.execute(sa.insert(activations).values(version=version, previous=previous, created_at=now))
