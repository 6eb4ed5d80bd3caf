"""What in a newer OpenAPI description would break callers of an older one.

Two rules decide about every schema: what callers could send before must still be taken, and what comes back must be
something that could come back before. A field that is added to an answer breaks nobody; one more value of an
enumeration does, since a caller may have a case for each.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

Schema = Mapping[str, Any]
Direction = Literal["request", "response"]

METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
UPPER_BOUNDS = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
LOWER_BOUNDS = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
ANY = "anything"


def breaking_changes(before: Schema, after: Schema) -> list[str]:
    """One line for each change that breaks callers, beginning with the operation: `GET /popular: is gone`."""
    comparison = _Comparison(before, after)
    changes = []
    newer = dict(_operations(after))
    for name, operation in _operations(before):
        found = comparison.operation(operation, newer[name]) if name in newer else ["is gone"]
        changes += [f"{name}: {change}" for change in found]
    return changes


def _operations(description: Schema) -> Iterator[tuple[str, Schema]]:
    for path, methods in description["paths"].items():
        for method in METHODS:
            if method in methods:
                yield f"{method.upper()} {path}", methods[method]


class _Comparison:
    """Two descriptions, and the pairs of their schemas that are being compared: some contain themselves."""

    def __init__(self, before: Schema, after: Schema) -> None:
        self._before = before
        self._after = after
        self._under_way: set[tuple[int, int]] = set()

    def operation(self, old: Schema, new: Schema) -> Iterator[str]:
        if old.get("operationId") != new.get("operationId"):
            yield f"is now called {new.get('operationId')}, by which generated clients name it"
        yield from _security(old, new)
        yield from self._parameters(old, new)
        yield from self._body(old.get("requestBody"), new.get("requestBody"))
        for status, answer in old["responses"].items():
            if status in new["responses"]:
                yield from self._answer(status, answer, new["responses"][status])
            elif status.startswith("2"):
                yield f"no longer answers {status}"

    def _parameters(self, old: Schema, new: Schema) -> Iterator[str]:
        older, newer = _by_name(old), _by_name(new)
        for name, parameter in older.items():
            if name not in newer:
                yield f"{name} is gone"
                continue
            if newer[name].get("required") and not parameter.get("required"):
                yield f"{name} is now required"
            yield from self._schema(parameter["schema"], newer[name]["schema"], name, "request")
        for name in newer.keys() - older.keys():
            if newer[name].get("required"):
                yield f"{name} is now required"

    def _body(self, old: Schema | None, new: Schema | None) -> Iterator[str]:
        if old is None or new is None:
            if new is not None and new.get("required"):
                yield "body is now required"
            if old is not None:
                yield "body is no longer taken"
            return
        if new.get("required") and not old.get("required"):
            yield "body is now required"
        for media_type, content in old["content"].items():
            if media_type not in new["content"]:
                yield f"body is no longer taken as {media_type}"
            else:
                yield from self._schema(content["schema"], new["content"][media_type]["schema"], "body", "request")

    def _answer(self, status: str, old: Schema, new: Schema) -> Iterator[str]:
        for media_type, content in old.get("content", {}).items():
            if media_type not in new.get("content", {}):
                yield f"{status} is no longer answered as {media_type}"
            elif "schema" in content:
                newer = new["content"][media_type].get("schema", {})
                yield from self._schema(content["schema"], newer, status, "response")

    def _schema(self, old: Schema, new: Schema, place: str, direction: Direction) -> list[str]:
        found: list[str] = []
        if direction == "request" and "default" in old and old["default"] != new.get("default"):
            found.append(f"{place} is {_shown(new.get('default'))} if absent, and was {_shown(old['default'])}")
        older = list(_alternatives(self._before, old))
        newer = list(_alternatives(self._after, new))
        # Each form that may still be sent, or may now come back, is held against the closest of the other side's.
        given, allowed = (older, newer) if direction == "request" else (newer, older)
        for one in given:
            kind = _kind(one)
            candidates = [other for other in allowed if _kind(other) in (kind, ANY) or (kind, _kind(other)) == WIDENED]
            if not candidates:
                found.append(f"{place} {'no longer takes' if direction == 'request' else 'may now be'} {kind}")
                continue
            compared: list[list[str]] = [
                self._same_kind(*((one, other) if direction == "request" else (other, one)), place, direction)
                for other in candidates
            ]
            closest = min(compared, key=len)
            found += closest
        return found

    def _same_kind(self, old: Schema, new: Schema, place: str, direction: Direction) -> list[str]:
        pair = (id(old), id(new))
        if pair in self._under_way:
            return []
        self._under_way.add(pair)
        found = _values(old, new, place, direction)
        if direction == "request":
            found += _bounds(old, new, place)
        if "items" in old and "items" in new:
            found += self._schema(old["items"], new["items"], f"{place}[]", direction)
        found += self._properties(old, new, place, direction)
        self._under_way.remove(pair)
        return found

    def _properties(self, old: Schema, new: Schema, place: str, direction: Direction) -> list[str]:
        found = []
        older, newer = old.get("properties", {}), new.get("properties", {})
        for name in older:
            if name not in newer:
                found.append(f"{place}.{name} is gone")
            else:
                found += self._schema(older[name], newer[name], f"{place}.{name}", direction)
        before, after = set(old.get("required", ())), set(new.get("required", ()))
        if direction == "request":
            found += [f"{place}.{name} is now required" for name in sorted(after - before)]
        else:
            found += [f"{place}.{name} may now be absent" for name in sorted((before - after) & newer.keys())]
        others_before, others_after = old.get("additionalProperties", True), new.get("additionalProperties", True)
        if isinstance(others_before, Mapping) and isinstance(others_after, Mapping):
            found += self._schema(others_before, others_after, f"{place}.*", direction)
        elif direction == "request" and others_after is False and others_before is not False:
            found.append(f"{place} no longer takes other fields")
        return found


# What is one of these may stand where the other one did: each integer is a number.
WIDENED = ("integer", "number")


def _security(old: Schema, new: Schema) -> Iterator[str]:
    before, after = old.get("security") or [{}], new.get("security") or [{}]
    for way in before:
        if not any(set(other) <= set(way) for other in after):
            yield f"can no longer be called with {' and '.join(sorted(way)) or 'no key'}"


def _by_name(operation: Schema) -> dict[str, Schema]:
    return {f"{one['in']}.{one['name']}": one for one in operation.get("parameters", ())}


def _alternatives(description: Schema, schema: Schema) -> Iterator[Schema]:
    """The forms of a schema, each of one kind: references, unions and lists of types taken apart."""
    if "$ref" in schema:
        yield from _alternatives(description, _resolve(description, schema["$ref"]))
        return
    for union in ("anyOf", "oneOf"):
        if union in schema:
            for one in schema[union]:
                yield from _alternatives(description, one)
            return
    if isinstance(schema.get("type"), list):
        for kind in schema["type"]:
            yield {**schema, "type": kind}
        return
    yield schema


def _resolve(description: Schema, reference: str) -> Schema:
    found: Any = description
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    assert isinstance(found, Mapping)
    return found


def _kind(schema: Schema) -> str:
    kind = schema.get("type")
    if kind is None:
        values = _allowed(schema)
        kinds = {KINDS[type(value)] for value in values or ()}
        kind = kinds.pop() if len(kinds) == 1 else ANY
    return str(kind)


KINDS = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}


def _allowed(schema: Schema) -> Sequence[Any] | None:
    """The only values there may be; None where there is no such list."""
    if "const" in schema:
        return [schema["const"]]
    values: Sequence[Any] | None = schema.get("enum")
    return values


def _values(old: Schema, new: Schema, place: str, direction: Direction) -> list[str]:
    before, after = _allowed(old), _allowed(new)
    given, allowed = (before, after) if direction == "request" else (after, before)
    if allowed is None:
        return []
    if given is None:
        values = ", ".join(_shown(value) for value in allowed)
        return [
            f"{place} takes nothing but {values} now" if direction == "request" else f"{place} may now be any value"
        ]
    says = "no longer takes" if direction == "request" else "may now be"
    return [f"{place} {says} {_shown(value)}" for value in given if value not in allowed]


def _bounds(old: Schema, new: Schema, place: str) -> list[str]:
    found = []
    for name in (*UPPER_BOUNDS, *LOWER_BOUNDS):
        if name in new:
            before, after = old.get(name), new[name]
            if before is None or (after < before if name in UPPER_BOUNDS else after > before):
                found.append(f"{place} has {name} {after}, and had {'none' if before is None else before}")
    found += [
        f"{place} has the {name} {new[name]}, and had {old.get(name, 'none')}"
        for name in ("pattern", "format", "multipleOf")
        if name in new and old.get(name) != new[name]
    ]
    return found


def _shown(value: object) -> str:
    return "absent" if value is None else repr(value)
