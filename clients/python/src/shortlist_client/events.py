"""Events to send, each with an id of its own from the moment it is made."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

MAX_EVENTS = 1_000
# The service takes 2,000,000 bytes unless it is set otherwise.
MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a user did: `Event("anna", "dune", "click")`.

    `type` is `click`, `view`, `like`, `purchase`, `rating`, `impression`, `dislike`, … The `event_id` is made with the
    event: send the same object again, and it counts once. Without `occurred_at` (which needs a time zone) the moment of
    arrival counts.
    """

    user_id: str
    item_id: str | None
    type: str
    value: float | None = None
    occurred_at: datetime | None = None
    recommendation_id: str | None = None
    context: Mapping[str, Any] | None = None
    retracts: str | None = None
    event_id: str = field(default_factory=lambda: str(uuid4()))

    def __post_init__(self) -> None:
        if self.occurred_at is not None and self.occurred_at.tzinfo is None:
            raise ValueError("occurred_at needs a time zone: datetime.now(UTC), not datetime.now()")

    def retraction(self) -> "Event":
        """The event that takes this one back."""
        return Event(self.user_id, None, "retract", retracts=self.event_id)

    def as_json(self) -> str:
        """The event as `POST /feedback` takes it, without what is None. Raises ValueError for what JSON cannot hold."""
        names = ("event_id", "user_id", "item_id", "type", "value", "recommendation_id", "retracts")
        plain: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.occurred_at is not None:
            plain["occurred_at"] = self.occurred_at.astimezone(UTC).isoformat()
        if self.context is not None:
            plain["context"] = dict(self.context)
        return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def bodies(events: Iterable[Event]) -> Iterator[tuple[int, bytes]]:
    """JSON lists of at most 1,000 events and about a megabyte each, with how many events came before."""
    rows: list[bytes] = []
    size = before = 0
    for event in events:
        row = event.as_json().encode()
        if rows and (len(rows) == MAX_EVENTS or size + len(row) > MAX_BYTES):
            yield before, b"[" + b",".join(rows) + b"]"
            before += len(rows)
            rows, size = [], 0
        rows.append(row)
        size += len(row) + 1
    if rows:
        yield before, b"[" + b",".join(rows) + b"]"
