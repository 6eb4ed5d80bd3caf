"""`POST /feedback`: what users did, one event or many, durable before the answer."""

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool

from app.errors import MEDIA_TYPE, FieldError, Problem, ProblemDocument, responses, unavailable
from app.event_rows import MAX_EVENTS, UnreadableError, read_events
from app.security import Feedback
from app.serving.event_store import Outcome
from app.serving.feedback_writer import OverloadedError, StoppedError
from app.serving.new_events import NewEvent
from app.serving.service import Service, ServiceDep

router = APIRouter(tags=["feedback"])

MAX_BYTES_AT_ONCE = 65_536
MAX_ERRORS_SHOWN = 100
RETRY_AFTER_SECONDS = 1


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
    try:
        # A long body takes so long to judge that others would notice.
        judged = read_events(body) if len(body) <= MAX_BYTES_AT_ONCE else await run_in_threadpool(read_events, body)
    except UnreadableError as error:
        raise _unreadable(str(error)) from None
    events = [event for event in judged if isinstance(event, NewEvent)]
    outcomes = iter(await _store(service, events))
    return _answer([next(outcomes) if isinstance(event, NewEvent) else event for event in judged])


def _require_json(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Problem(415, detail="Send JSON, with `Content-Type: application/json`.", field="header.content-type")


def _unreadable(message: str) -> Problem:
    return Problem(
        422, "The request is not valid", f"body: {message}", errors=[FieldError(field="body", message=message)]
    )


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
