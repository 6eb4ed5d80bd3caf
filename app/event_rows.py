"""Bodies of feedback as events: what a caller may send, and why a row of it is refused."""

import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Required

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    TypeAdapter,
    ValidationError,
    model_validator,
    with_config,
)
from pydantic_core import from_json
from typing_extensions import TypedDict

from app.identifiers import EventId, EventType, ItemId, Metadata, UserId, explain
from app.serving.event_store import Outcome
from app.serving.new_events import NewEvent
from ml.snapshots import RETRACT

MAX_EVENTS = 1_000
# Clocks differ: an event may claim to be this much younger than ours says.
AHEAD = timedelta(minutes=5)

_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d+))?([Zz]|[+-]\d\d:\d\d)",
    re.ASCII,
)
# What most callers send of it, all of which `datetime.fromisoformat` reads as it is.
_USUAL_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)


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
Value = Annotated[StrictFloat, Field(allow_inf_nan=False)]
RecommendationId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


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
    value: Value | None = Field(None, description="A rating, a price, seconds watched, …")
    occurred_at: Time | None = Field(
        None, description="RFC 3339 with an offset; at most 5 minutes ahead; the moment of arrival if absent."
    )
    recommendation_id: RecommendationId | None = Field(None, description="Of the answer that showed the item.")
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


@with_config(extra="forbid")
class _PlainEvent(TypedDict, total=False):
    """What most events are: an `Event` that takes nothing back, its time not read yet. Judged several times as fast."""

    event_id: EventId | None
    user_id: Required[UserId]
    item_id: Required[ItemId]
    type: Required[EventType]
    value: Value | None
    occurred_at: str | None
    recommendation_id: RecommendationId | None
    context: Metadata | None


_plain_events: TypeAdapter[list[_PlainEvent]] = TypeAdapter(list[_PlainEvent])


class UnreadableError(ValueError):
    """A body that holds no rows to judge; says why."""


def read_events(body: bytes) -> Sequence[NewEvent | Outcome]:
    """Every row of a body as an event to store, or as rejected. Raises UnreadableError."""
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"is not valid JSON: {error}") from None
    rows = parsed if isinstance(parsed, list) else [parsed]
    if not isinstance(parsed, list | dict):
        raise UnreadableError("must be an event (a JSON object) or a list of them")
    if not 1 <= len(rows) <= MAX_EVENTS:
        raise UnreadableError(f"holds {len(rows)} events; send 1 to {MAX_EVENTS:,} at a time")
    now = datetime.now(UTC)
    events = _plain(rows, now)
    return [_judge(row, now) for row in rows] if events is None else events


def _plain(rows: list[Any], now: datetime) -> list[NewEvent] | None:
    """Rows that are all plain events and not ahead of their time, as events; None if any is otherwise."""
    try:
        valid = _plain_events.validate_python(rows)
    except ValidationError:
        return None
    latest = now + AHEAD
    events = []
    for row in valid:
        occurred_at, given = now, row.get("occurred_at")
        if given is not None:
            if _USUAL_TIME.fullmatch(given) is None:
                return None
            try:
                occurred_at = datetime.fromisoformat(given)
                if occurred_at.tzinfo is not UTC:
                    occurred_at = occurred_at.astimezone(UTC)
            except (ValueError, OverflowError):
                return None
            if occurred_at > latest:
                return None
        kind = row["type"]
        if kind == RETRACT:
            return None
        events.append(
            NewEvent(
                row["user_id"],
                row.get("event_id") or str(uuid.uuid4()),
                row["item_id"],
                kind,
                row.get("value"),
                occurred_at,
                row.get("recommendation_id"),
                row.get("context"),
                None,
                given is not None,
            )
        )
    return events


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
