"""JSON to dataclasses: what an answer lacks is an error, what it has beyond them is passed over."""

import dataclasses
import functools
import types
from datetime import datetime
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shortlist_client.errors import AnswerError

T = TypeVar("T")


def read(kind: type[T], value: object) -> T:
    """A dataclass from a JSON object. Raises AnswerError that names the field."""
    built: T = _convert(kind, value, kind.__name__)
    return built


def _convert(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, place)
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        (inner,) = [part for part in get_args(kind) if part is not type(None)]
        return _convert(inner, value, place)
    if origin is tuple and isinstance(value, list):
        inner = get_args(kind)[0]
        return tuple(_convert(inner, part, f"{place}[{index}]") for index, part in enumerate(value))
    if origin is dict and isinstance(value, dict):
        inner = get_args(kind)[1]
        return {key: _convert(inner, part, f"{place}.{key}") for key, part in value.items()}
    if origin is Literal and isinstance(value, str):
        return value  # a later release may know more of them, and a caller may not care
    if kind is datetime and isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            raise AnswerError(f"{place} is no time: {value!r}") from None
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (str, int, bool) and type(value) is kind:
        return value
    raise AnswerError(f"{place} is not what this client expects: {type(value).__name__}")


@functools.cache
def _fields(kind: Any) -> list[tuple[str, Any, bool]]:
    """Name, type and whether it must be there, of each field."""
    hints = get_type_hints(kind)
    absent = dataclasses.MISSING
    return [
        (field.name, hints[field.name], field.default is absent and field.default_factory is absent)
        for field in dataclasses.fields(kind)
    ]


def _object(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise AnswerError(f"{place} is not an object")
    found = {}
    for name, inner, required in _fields(kind):
        if name in value:
            found[name] = _convert(inner, value[name], f"{place}.{name}")
        elif required:
            raise AnswerError(f"{place}.{name} is missing")
    return kind(**found)
