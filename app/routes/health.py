"""For operators: is the process alive, can it answer, what does it count."""

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from app.errors import responses
from app.security import AnyKey
from app.serving.service import Service, ServiceDep
from app.telemetry import CONTENT_TYPE

router = APIRouter(tags=["operations"])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class FailedVersion(BaseModel):
    """A version that should be active and could not be loaded; the one before it goes on."""

    version: str
    reason: str


class Readiness(BaseModel):
    """Whether requests can be answered, and by what."""

    status: Literal["ready", "starting"]
    database: Literal["answers", "unreachable"]
    migrated: bool = Field(description="Whether the database has the tables of this release.")
    items: int = Field(description="Items in the catalogue.")
    active_version: str | None = Field(description="The version that ranks; popular items are answered without one.")
    failed_version: FailedVersion | None
    log_waiting: int = Field(description="Answers that wait to be written to the recommendation log.")
    feedback_waiting: int = Field(description="Feedback requests that wait for their commit.")


@router.get("/health/live", summary="Is the process alive?", responses=responses())
async def live() -> Alive:
    return Alive()


@router.get(
    "/health/ready",
    summary="Can requests be answered?",
    responses={
        **responses(),
        503: {"model": Readiness, "description": "Not yet: the database or its tables are missing."},
    },
)
def ready(service: ServiceDep, response: Response) -> Readiness:
    """200 once the tables are there and the catalogue is loaded, and from then on: without its database the service
    goes on to answer reads."""
    readiness = _readiness(service)
    if readiness.status != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = "1"
    return readiness


def _readiness(service: Service) -> Readiness:
    active, failure = service.active_models.current, service.active_models.failure
    return Readiness(
        status="ready" if service.ready else "starting",
        database="answers" if service.ask_database() else "unreachable",
        migrated=service.migrated,
        items=len(service.catalog),
        active_version=active.version if active is not None else None,
        failed_version=FailedVersion(version=failure.version, reason=failure.reason) if failure is not None else None,
        log_waiting=len(service.recommendation_log),
        feedback_waiting=len(service.feedback_writer),
    )


class PrometheusText(Response):
    media_type = CONTENT_TYPE


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PrometheusText, responses=responses())
def metrics(service: ServiceDep, _: AnyKey) -> PrometheusText:
    return PrometheusText(service.metrics.render())
