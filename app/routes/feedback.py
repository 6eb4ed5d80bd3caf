"""`POST /feedback`: what users did, one event or many, durable before the answer."""

import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, ValidationError, model_validator
from pydantic_core import from_json, to_json
from starlette.concurrency import run_in_threadpool

from app.errors import MEDIA_TYPE, FieldError, Problem, ProblemDocument, responses, unavailable
from app.identifiers import EventId, EventType, ItemId, Metadata, UserId, explain
from app.security import Feedback
from app.serving.event_store import NewEvent, Outcome
from app.serving.feedback_writer import OverloadedError, StoppedError
from app.serving.service import Service, ServiceDep
from ml.snapshots import RETRACT

router = APIRouter(tags=["feedback"])

MAX_EVENTS = 1_000
MAX_BYTES_AT_ONCE = 65_536
# Clocks differ: an event may claim to be this much younger than ours says.
AHEAD = timedelta(minutes=5)
MAX_ERRORS_SHOWN = 100
RETRY_AFTER_SECONDS = 1

_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d+))?([Zz]|[+-]\d\d:\d\d)",
    re.ASCII,
)


def _parse_time(value: object) -> datetime:
    match = _RFC_3339.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("must be a time like 2026-11-21T09:30:00.123456Z (RFC 3339), with its offset from UTC")
    day, clock, fraction, zone = match.groups()
    offset = "+00:00" if zone in "Zz" else zone
    try:
        return datetime.fromisoformat(f"{day}T{clock}.{(fraction or '')[:6]:0<6}{offset}").astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("is not a time that exists") from None


Time = Annotated[
    datetime,
    BeforeValidator(_parse_time, json_schema_input_type=str),
    Field(json_schema_extra={"format": "date-time"}),
]


class Event(BaseModel):
    """One thing that a user did."""

    model_config = ConfigDict(extra="forbid")

    event_id: EventId | None = Field(
        None,
        description="Unique to the user. Send one, and a request may be repeated without counting twice; "
        "made here if absent.",
    )
    user_id: UserId
    item_id: ItemId | None = Field(None, description="What it was done to; only a `retract` may leave it out.")
    type: EventType = Field(description="`click`, `view`, `like`, `purchase`, `rating`, `impression`, `dislike`, …")
    value: StrictFloat | None = Field(None, allow_inf_nan=False, description="A rating, a price, seconds watched, …")
    occurred_at: Time | None = Field(
        None, description="RFC 3339 with an offset; at most 5 minutes ahead; the moment of arrival if absent."
    )
    recommendation_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="Of the answer that showed the item.",
    )
    context: Metadata | None = Field(None, description="Anything worth keeping beside the event, as a JSON object.")
    retracts: EventId | None = Field(
        None, description="With type `retract`: the `event_id` of the same user's event to take back."
    )

    @model_validator(mode="after")
    def _complete(self) -> "Event":
        if (self.type == RETRACT) != (self.retracts is not None):
            raise ValueError("retracts: goes with the type `retract`, and only with it")
        if self.type != RETRACT and self.item_id is None:
            raise ValueError("item_id: is required")
        return self


class EventResult(BaseModel):
    """What became of one event."""

    index: int = Field(description="Its place in the request, from 0.")
    event_id: str | None = Field(description="Null for a rejected event that brought no usable id.")
    outcome: Literal["stored", "duplicate", "rejected"]
    reason: str | None = Field(None, description="Why it was rejected, beginning with the field; else absent.")


class FeedbackResults(BaseModel):
    """An outcome for every event, in the order of the request."""

    results: list[EventResult]


class FeedbackProblem(ProblemDocument):
    """Nothing was stored. `results` is there when the events were judged one by one."""

    results: list[EventResult] | None = None


_RESPONSES: dict[int | str, dict[str, Any]] = {
    **responses(401, 403, 413, 415, 422, 429, 503),
    200: {"model": FeedbackResults, "description": "Nothing new: every event was known already, or rejected."},
    201: {"model": FeedbackResults, "description": "At least one event was stored."},
    422: {
        "description": "The body is neither an event nor a list of them, or every event was rejected.",
        "model": FeedbackProblem,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/FeedbackProblem"}}},
    },
}

_EVENT = {"$ref": "#/components/schemas/Event"}
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "oneOf": [_EVENT, {"type": "array", "items": _EVENT, "minItems": 1, "maxItems": MAX_EVENTS}],
                "title": "One event or up to 1,000",
            },
            "examples": {
                "one": {"value": {"user_id": "anna", "item_id": "dune", "type": "click"}},
                "many": {
                    "value": [
                        {"event_id": "e-1", "user_id": "anna", "item_id": "dune", "type": "rating", "value": 5},
                        {"event_id": "e-2", "user_id": "ben", "item_id": "alien", "type": "view"},
                        {"user_id": "anna", "type": "retract", "retracts": "e-1"},
                    ]
                },
            },
        }
    },
}


@router.post(
    "/feedback",
    summary="Store what users did",
    status_code=201,
    response_model=FeedbackResults,
    responses=_RESPONSES,
    openapi_extra={"requestBody": _BODY},
)
async def feedback(request: Request, service: ServiceDep, _: Feedback) -> Response:
    """Store one event or up to 1,000. Each is judged by itself: a bad one does not stop the others. What is answered
    as `stored` was committed before the answer. 201 if any event was stored, 200 if none was but some were known
    already, else 422."""
    _require_json(request)
    return await answer(service, await request.body())


POST = router.routes[-1]


async def answer(service: Service, body: bytes) -> Response:
    """Store what a body of JSON holds, and tell what became of it. Raises Problem."""
    # A long body takes so long to judge that others would notice.
    judged = _read(body) if len(body) <= MAX_BYTES_AT_ONCE else await run_in_threadpool(_read, body)
    events = [event for event in judged if isinstance(event, NewEvent)]
    outcomes = iter(await _store(service, events))
    return _answer([next(outcomes) if isinstance(event, NewEvent) else event for event in judged])


def _require_json(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Problem(415, detail="Send JSON, with `Content-Type: application/json`.", field="header.content-type")


def _read(body: bytes) -> list[NewEvent | Outcome]:
    """Every row of a body as an event to store, or as rejected."""
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"is not valid JSON: {error}") from None
    rows = parsed if isinstance(parsed, list) else [parsed]
    if not isinstance(parsed, list | dict):
        raise _unreadable("must be an event (a JSON object) or a list of them")
    if not 1 <= len(rows) <= MAX_EVENTS:
        raise _unreadable(f"holds {len(rows)} events; send 1 to {MAX_EVENTS:,} at a time")
    now = datetime.now(UTC)
    return [_judge(row, now) for row in rows]


def _unreadable(message: str) -> Problem:
    return Problem(
        422, "The request is not valid", f"body: {message}", errors=[FieldError(field="body", message=message)]
    )


def _judge(row: Any, now: datetime) -> NewEvent | Outcome:
    """One row as an event to store, or as rejected."""
    try:
        event = Event.model_validate(row)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        message = explain(dict(found))
        field = ".".join(str(part) for part in found["loc"])
        return Outcome(_usable_id(row), "rejected", f"{field}: {message}" if field else message)
    if event.occurred_at is not None and event.occurred_at > now + AHEAD:
        reason = "occurred_at: lies more than 5 minutes ahead of this server's clock"
        return Outcome(event.event_id, "rejected", reason)
    return NewEvent(
        user_id=event.user_id,
        event_id=event.event_id or str(uuid.uuid4()),
        item_id=event.item_id,
        type=event.type,
        value=event.value,
        occurred_at=event.occurred_at or now,
        recommendation_id=event.recommendation_id,
        context=event.context,
        retracts=event.retracts,
        timed_by_caller=event.occurred_at is not None,
    )


def _usable_id(row: Any) -> str | None:
    """The id of a rejected row, if it can be shown."""
    given = row.get("event_id") if isinstance(row, dict) else None
    return given if isinstance(given, str) and len(given) <= 255 and given.isprintable() else None


async def _store(service: Service, events: Sequence[NewEvent]) -> list[Outcome]:
    if not events:
        return []
    try:
        return await service.feedback_writer.write(events)
    except OverloadedError:
        raise Problem(
            429,
            detail="More feedback arrives than can be committed. Nothing of this request was stored; send it again.",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        ) from None
    except StoppedError:
        raise unavailable("The service is shutting down. Nothing of this request was stored; send it again.") from None


def _answer(outcomes: Sequence[Outcome]) -> Response:
    results = [
        {"index": index, "event_id": outcome.event_id, "outcome": outcome.outcome}
        | ({"reason": outcome.reason} if outcome.reason is not None else {})
        for index, outcome in enumerate(outcomes)
    ]
    kinds = {outcome.outcome for outcome in outcomes}
    if kinds != {"rejected"}:
        status = 201 if "stored" in kinds else 200
        return Response(to_json({"results": results}), status_code=status, media_type="application/json")
    errors = []
    for index, outcome in enumerate(outcomes[:MAX_ERRORS_SHOWN]):
        field, separator, message = (outcome.reason or "").partition(": ")
        place = f"body.{index}" if len(outcomes) > 1 else "body"
        errors.append(
            {"field": f"{place}.{field}", "message": message} if separator else {"field": place, "message": field}
        )
    document = {
        "type": "about:blank",
        "title": "The request is not valid",
        "status": 422,
        "detail": f"{errors[0]['field']}: {errors[0]['message']}"
        + (f" (and {len(outcomes) - 1} more)" if len(outcomes) > 1 else ""),
        "errors": errors,
        "results": results,
    }
    return JSONResponse(document, status_code=422, media_type=MEDIA_TYPE)
