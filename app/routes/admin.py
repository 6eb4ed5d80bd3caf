"""Trainings and models over HTTP: `/admin/retrain`, `/admin/runs`, `/admin/models`."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio
import sqlalchemy as sa
import structlog
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from app import audit
from app.database import writing
from app.errors import Problem, responses
from app.security import Admin, require
from app.tables import activations, model_versions
from app.times import UtcTime, rfc3339
from app.training import runs, versions
from app.training.promotion import NothingToRollBackTo
from app.training.runs import KeyReused, Promote, Run, RunIsOver
from ml.recipes import apply_overrides, recipe_named
from ml.registry import Registry, VersionDamaged

FOLLOW_SECONDS = 0.3  # between two looks for news of a run

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/admin", tags=["admin"])

RunId = Annotated[str, Path(pattern=r"^[A-Za-z0-9-]{1,64}$", examples=["20261121-093000-1f2e3d"])]
Version = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Limit = Annotated[int, Query(ge=1, le=200, description="How many to answer with at most.")]
Cursor = Annotated[
    str | None, Query(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="`next_cursor` of the page before.")
]


class RetrainRequest(BaseModel):
    """What to train, and what to do with the result."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = Field(max_length=128, examples=["caser"])
    overrides: dict[str, str | bool | int | float] = Field(
        default_factory=dict,
        alias="set",
        max_length=50,
        description="Settings of the recipe to change for this run.",
        examples=[{"epochs": 5}],
    )
    warm_start: bool = Field(False, description="Start from the newest version of this recipe.")
    promote: Promote = Field(
        "guarded", description="Make the result active if it passes the guard, in any case, or not at all."
    )


class RunAnswer(BaseModel):
    """A training run: what it was asked for, how far it is and what came of it."""

    model_config = ConfigDict(from_attributes=True)

    run_id: str
    recipe: str
    overrides: dict[str, str] = Field(serialization_alias="set")
    promote: Promote
    warm_start: bool
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    cancel_requested: bool
    requested_by: str | None
    attempts: int
    worker: str | None
    progress: dict[str, Any] | None = Field(description="The newest phase or progress line of the training.")
    snapshot: str | None
    version: str | None = Field(description="The version that it published.")
    promoted: bool | None
    message: str | None = Field(description="Why it failed, or why its version was or was not promoted.")
    created_at: UtcTime
    started_at: UtcTime | None
    finished_at: UtcTime | None


class RunPage(BaseModel):
    """Runs, newest first."""

    runs: list[RunAnswer]
    next_cursor: str | None


class ModelAnswer(BaseModel):
    """A version and what the service does with it."""

    version: str
    recipe: str
    state: Literal["candidate", "active", "shadow", "retired"]
    run_id: str | None
    created_at: UtcTime = Field(description="When the service came to know it.")
    snapshot: str | None
    trained_through: UtcTime | None
    metrics: dict[str, Any]


class ModelDetails(ModelAnswer):
    """A version with its manifest and the times it became active."""

    manifest: dict[str, Any]
    activated_at: list[UtcTime]


class ModelPage(BaseModel):
    """Versions, newest first."""

    active: str | None
    models: list[ModelAnswer]
    next_cursor: str | None


class RollbackAnswer(BaseModel):
    """What a rollback changed."""

    version: str
    replaced: str | None


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.service.engine
    return engine


def _registry(request: Request) -> Registry:
    registry: Registry = request.app.state.service.registry
    return registry


EngineDep = Annotated[Engine, Depends(_engine)]
RegistryDep = Annotated[Registry, Depends(_registry)]


@router.post("/retrain", status_code=202, responses=responses(409, 413, 422))
def retrain(
    body: RetrainRequest,
    caller: Admin,
    engine: EngineDep,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(pattern=r"^[\x21-\x7e]{1,255}$", description="A retry with the same key answers the same run."),
    ] = None,
) -> RunAnswer:
    """Queue a training; `Location` names its run."""
    overrides = {key: _text(value) for key, value in body.overrides.items()}
    check_recipe(body.recipe, overrides)
    try:
        with writing(engine) as connection:
            run, is_new = runs.create(
                connection,
                body.recipe,
                overrides=overrides,
                promote=body.promote,
                warm_start=body.warm_start,
                idempotency_key=idempotency_key,
                requested_by=caller.key_id,
            )
            if is_new:
                details = {"recipe": run.recipe, "set": run.overrides, "promote": run.promote}
                audit.record(connection, caller.key_id, "run.create", run.run_id, details)
    except KeyReused as error:
        raise Problem(409, detail=str(error), field="header.Idempotency-Key") from error
    response.headers["Location"] = f"/admin/runs/{run.run_id}"
    return RunAnswer.model_validate(run)


def check_recipe(recipe: str, overrides: dict[str, str]) -> None:
    """Raise a Problem that names the field unless such a run can be trained."""
    try:
        known = recipe_named(recipe)
    except ValueError as error:
        raise Problem(422, detail=str(error), field="body.recipe") from error
    try:
        apply_overrides(known, overrides)
    except ValueError as error:
        raise Problem(422, detail=str(error), field="body.set") from error


def _text(value: str | bool | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@router.get("/runs", responses=responses(422))
def list_runs(
    _: Admin,
    engine: EngineDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: Annotated[Literal["queued", "running", "succeeded", "failed", "cancelled"] | None, Query()] = None,
) -> RunPage:
    """List the runs, newest first."""
    with engine.connect() as connection:
        try:
            found = runs.page(connection, limit + 1, before=cursor, state=state)
        except KeyError as error:
            raise Problem(422, detail="is not the cursor of a page of runs", field="query.cursor") from error
    answers = [RunAnswer.model_validate(run) for run in found[:limit]]
    return RunPage(runs=answers, next_cursor=answers[-1].run_id if len(found) > limit else None)


def _run(run_id: RunId, engine: EngineDep) -> Run:
    with engine.connect() as connection:
        try:
            return runs.read(connection, run_id)
        except KeyError as error:
            raise _no_run(run_id) from error


def _no_run(run_id: str) -> Problem:
    return Problem(404, detail=f"There is no run {run_id}; GET /admin/runs lists them.")


RunDep = Annotated[Run, Depends(_run)]


@router.get("/runs/{run_id}", responses=responses(404, 422))
def get_run(_: Admin, run: RunDep) -> RunAnswer:
    """Tell how a run is doing, or did."""
    return RunAnswer.model_validate(run)


@router.get(
    "/runs/{run_id}/events",
    response_class=EventSourceResponse,
    responses=responses(404, 422),
    dependencies=[Depends(require("admin"))],
)
async def follow_run(
    run: RunDep,
    engine: EngineDep,
    last_event_id: Annotated[
        str | None, Header(pattern=r"^[0-9]{1,18}$", description="Go on after this event; browsers send it.")
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Follow a run by server-sent events, from its beginning or after `Last-Event-ID`, until it ends."""
    sequence = int(last_event_id or 0)
    while True:
        try:
            ended, rows = await run_in_threadpool(_news, engine, run.run_id, sequence)
        except SQLAlchemyError as error:  # the answer has begun; the client comes back with Last-Event-ID
            log.warning("run no longer followed", run_id=run.run_id, reason=type(error).__name__)
            return
        for row in rows:
            sequence = row.sequence
            data = {**row.details, "at": rfc3339(row.created_at)}
            yield ServerSentEvent(data=data, event=row.kind, id=str(sequence))
        if ended and not rows:
            return
        if not rows:
            await anyio.sleep(FOLLOW_SECONDS)


def _news(engine: Engine, run_id: str, sequence: int) -> tuple[bool, list[Any]]:
    with engine.connect() as connection:
        # The state first: whatever ended the run was told in the same transaction.
        ended = runs.read(connection, run_id).finished
        return ended, runs.events_after(connection, run_id, sequence)


@router.post("/runs/{run_id}/cancel", responses=responses(404, 409, 422))
def cancel_run(run_id: RunId, caller: Admin, engine: EngineDep) -> RunAnswer:
    """Cancel a run: at once while it waits, within a second or two while it trains."""
    with writing(engine) as connection:
        try:
            run = runs.request_cancel(connection, run_id)
        except KeyError as error:
            raise _no_run(run_id) from error
        except RunIsOver as error:
            raise Problem(409, detail=f"The run {run_id} cannot be cancelled: {error}.") from error
        audit.record(connection, caller.key_id, "run.cancel", run_id)
    return RunAnswer.model_validate(run)


@router.get("/models", responses=responses(422))
def list_models(
    _: Admin, engine: EngineDep, registry: RegistryDep, limit: Limit = 50, cursor: Cursor = None
) -> ModelPage:
    """List the versions, newest first; those that were published elsewhere are found by listing the store."""
    try:
        versions.discover(engine, registry)
    except Exception as error:  # whatever is wrong with the store, SQL still tells what is known
        log.warning("store not listed", reason=str(error))
    with engine.connect() as connection:
        query = sa.select(model_versions).order_by(model_versions.c.created_at.desc(), model_versions.c.version.desc())
        if cursor is not None:
            last = _version(connection, cursor)
            if last is None:
                raise Problem(422, detail="is not the cursor of a page of models", field="query.cursor")
            tied = sa.and_(model_versions.c.created_at == last.created_at, model_versions.c.version < last.version)
            query = query.where(sa.or_(model_versions.c.created_at < last.created_at, tied))
        rows = connection.execute(query.limit(limit + 1)).all()
        active = connection.execute(
            sa.select(model_versions.c.version).where(model_versions.c.state == "active")
        ).scalar_one_or_none()
    models = [ModelAnswer(**_model(row)) for row in rows[:limit]]
    return ModelPage(active=active, models=models, next_cursor=models[-1].version if len(rows) > limit else None)


def _version(connection: Connection, version: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(model_versions).where(model_versions.c.version == version)).one_or_none()


def _model(row: sa.Row[Any]) -> dict[str, Any]:
    own = {name: getattr(row, name) for name in ("version", "recipe", "state", "run_id", "created_at")}
    return own | {name: row.manifest.get(name) for name in ("snapshot", "trained_through", "metrics")}


def _details(engine: Engine, version: str) -> ModelDetails:
    with engine.connect() as connection:
        row = _version(connection, version)
        if row is None:
            raise _no_version(version)
        times = sa.select(activations.c.created_at).where(activations.c.version == version)
        activated = connection.execute(times.order_by(activations.c.sequence)).scalars().all()
    return ModelDetails(**_model(row), manifest=row.manifest, activated_at=list(activated))


def _no_version(version: str) -> Problem:
    return Problem(404, detail=f"There is no version {version}; GET /admin/models lists them.")


@router.get("/models/{version}", responses=responses(404, 422))
def get_model(version: Version, _: Admin, engine: EngineDep) -> ModelDetails:
    """Tell all about a version: its manifest, its metrics and when it was active."""
    return _details(engine, version)


@router.post("/models/rollback", responses=responses(409))
def rollback(request: Request, caller: Admin, engine: EngineDep, registry: RegistryDep) -> RollbackAnswer:
    """Return to the version that was active before this one; called again, to the one before that."""
    try:
        version, replaced = versions.rollback(engine, registry, actor=caller.key_id)
    except (NothingToRollBackTo, VersionDamaged) as error:
        raise Problem(409, detail=f"Nothing was rolled back: {error}") from error
    _follow_active(request)
    return RollbackAnswer(version=version, replaced=replaced)


@router.post("/models/{version}/activate", responses=responses(404, 409, 422))
def activate(
    request: Request, version: Version, caller: Admin, engine: EngineDep, registry: RegistryDep
) -> ModelDetails:
    """Make a version the one that answers, once it was seen to load."""
    try:
        versions.activate(engine, registry, version, actor=caller.key_id, reason="by hand")
    except KeyError as error:
        raise _no_version(version) from error
    except VersionDamaged as error:
        raise Problem(409, detail=str(error)) from error
    _follow_active(request)
    return _details(engine, version)


def _follow_active(request: Request) -> None:
    """Let this process serve what was just activated without waiting for its next look."""
    request.app.state.service.poll()
