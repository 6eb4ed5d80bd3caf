"""Times as the HTTP interface writes them."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import PlainSerializer, WithJsonSchema


def rfc3339(time: datetime) -> str:
    """A time in UTC, always to the microsecond, so that texts sort as times do."""
    # Not by strftime, which leaves out zeros of years before 1000.
    return time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


# A field of a response.
UtcTime = Annotated[
    datetime,
    PlainSerializer(rfc3339, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-11-21T09:30:00.123456Z"]}),
]
