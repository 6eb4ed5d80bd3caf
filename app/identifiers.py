"""Ids and free-form JSON as callers may send them: what passes here can be stored, and be named in a URL."""

import json
import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, JsonValue, StringConstraints, TypeAdapter, ValidationError

from app.tables import MAX_ID_LENGTH

# Printable: no control character (NUL among them), no line separator, no half of a surrogate pair. `_ID` takes one
# such character that is no slash, `_NO_DOT` one that is no dot either.
_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_ID = rf"[^/{_UNPRINTABLE}]"
_NO_DOT = rf"[^./{_UNPRINTABLE}]"

# Any of those but `.` and `..`, which clients take out of a path before they send it.
ID_PATTERN = rf"^(?:\.{{0,2}}{_NO_DOT}{_ID}*|\.{{3}}{_ID}*)$"
EVENT_TYPE_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,63}$"
# `|` stands between categories in CSV.
CATEGORY_PATTERN = rf"^[^|{_UNPRINTABLE}]+$"
TEXT_PATTERN = r"^[^\x00]*$"

_SURROGATE = re.compile("[\ud800-\udfff]")

MAX_METADATA_BYTES = 16_384
MAX_METADATA_DEPTH = 16

Identifier = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_LENGTH, pattern=ID_PATTERN)]
UserId = Identifier
ItemId = Identifier
EventId = Identifier
EventType = Annotated[str, StringConstraints(pattern=EVENT_TYPE_PATTERN)]
Category = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_LENGTH, pattern=CATEGORY_PATTERN)]
Title = Annotated[str, StringConstraints(max_length=1000, pattern=TEXT_PATTERN)]


def _check_json(value: Any) -> Any:
    """Refuse what one of the databases, or the way back to a caller, could not carry.

    Walks without recursion: a body of nothing but brackets must not exhaust the stack.
    """
    level = [value]
    for _ in range(MAX_METADATA_DEPTH):
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                below.extend(part.keys())
                below.extend(part.values())
            elif isinstance(part, list):
                below.extend(part)
            elif isinstance(part, str):
                if "\0" in part or _SURROGATE.search(part):
                    raise ValueError("text must be Unicode without NUL and without halves of surrogate pairs")
            elif isinstance(part, float) and not math.isfinite(part):
                raise ValueError("numbers must be finite")
            elif isinstance(part, int) and not -(2**63) <= part < 2**64:
                raise ValueError("integers must fit into 64 bits")
        if not below:
            break
        level = below
    else:
        raise ValueError(f"nested deeper than {MAX_METADATA_DEPTH} levels")
    return value


def _check_size(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if len(json.dumps(value, ensure_ascii=False).encode()) > MAX_METADATA_BYTES:
        raise ValueError(f"larger than {MAX_METADATA_BYTES} bytes as JSON")
    return value


# Free JSON beside a user, an item or an event.
Metadata = Annotated[dict[str, JsonValue], BeforeValidator(_check_json), AfterValidator(_check_size)]

_identifier: TypeAdapter[str] = TypeAdapter(Identifier)
_event_type: TypeAdapter[str] = TypeAdapter(EventType)


def id_problem(value: object) -> str | None:
    """Why a value cannot be the id of a user, an item or an event; None if it can."""
    return _problem(_identifier, value)


def event_type_problem(value: object) -> str | None:
    """Why a value cannot be the type of an event; None if it can."""
    return _problem(_event_type, value)


def _problem(adapter: TypeAdapter[str], value: object) -> str | None:
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        return explain(dict(error.errors(include_url=False)[0]))
    return None


def explain(error: dict[str, Any]) -> str:
    """The message of one of pydantic's errors, in words where it would show a pattern."""
    if error.get("type") == "string_pattern_mismatch":
        pattern = error.get("ctx", {}).get("pattern")
        if pattern == ID_PATTERN:
            return "must be 1 to 255 printable characters without '/', other than '.' and '..'"
        if pattern == EVENT_TYPE_PATTERN:
            return "must be 1 to 64 letters, digits, '_', '.', ':' or '-', the first one a letter, digit or '_'"
        if pattern == CATEGORY_PATTERN:
            return "must be 1 to 255 printable characters without '|'"
        if pattern == TEXT_PATTERN:
            return "must not hold NUL"
    return str(error.get("msg", "is not valid")).removeprefix("Value error, ")
