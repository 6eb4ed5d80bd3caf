"""What breaks callers is found, each kind of it, and what breaks nobody is not."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.api_changes import breaking_changes
from app.cli import app
from app.openapi import as_text, description

DOCS = Path(__file__).parents[2] / "docs"
CHANGELOG = DOCS.parent / "CHANGELOG.md"

K = {"type": "integer", "minimum": 1, "maximum": 9, "default": 5}
BEFORE: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "Pets", "version": "1"},
    "paths": {
        "/pets": {
            "get": {
                "operationId": "list_pets",
                "security": [{"Bearer": []}, {"X-API-Key": []}],
                "parameters": [
                    {
                        "name": "k",
                        "in": "query",
                        "schema": {"type": "integer", "minimum": 1, "maximum": 9, "default": 5},
                    },
                    {"name": "kind", "in": "query", "schema": {"enum": ["cat", "dog"]}},
                    {"name": "name", "in": "query", "schema": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
                ],
                "responses": {
                    "200": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Page"}}}},
                    "422": {"content": {"application/problem+json": {"schema": {"type": "object"}}}},
                },
            },
            "post": {
                "operationId": "add_pet",
                "requestBody": {
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/NewPet"}},
                        "text/csv": {"schema": {"type": "string"}},
                    }
                },
                "responses": {"201": {}, "409": {}},
            },
        }
    },
    "components": {
        "schemas": {
            "Page": {
                "type": "object",
                "properties": {
                    "pets": {"type": "array", "items": {"$ref": "#/components/schemas/Pet"}},
                    "next_cursor": {"type": ["string", "null"]},
                },
                "required": ["pets", "next_cursor"],
            },
            "Pet": {
                "type": "object",
                "properties": {
                    "kind": {"type": "string", "enum": ["cat", "dog"]},
                    "weight": {"type": "number"},
                    "mother": {"anyOf": [{"$ref": "#/components/schemas/Pet"}, {"type": "null"}]},
                    "tags": {"type": "object", "additionalProperties": {"type": "string"}},
                },
                "required": ["kind", "weight", "tags"],
            },
            "NewPet": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 20},
                    "kind": {"enum": ["cat", "dog"]},
                    "born": {"type": "string", "format": "date"},
                    "toys": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
                },
                "required": ["name"],
            },
        }
    },
}

Change = Callable[[dict[str, Any]], object]


def get(described: dict[str, Any]) -> Any:
    return described["paths"]["/pets"]["get"]


def post(described: dict[str, Any]) -> Any:
    return described["paths"]["/pets"]["post"]


def parameter(described: dict[str, Any], name: str) -> Any:
    return next(one for one in get(described)["parameters"] if one["name"] == name)


def schema(described: dict[str, Any], name: str) -> Any:
    return described["components"]["schemas"][name]


def field(described: dict[str, Any], name: str, of: str) -> Any:
    return schema(described, of)["properties"][name]


REQUIRED = {"name": "x", "in": "header", "required": True, "schema": {"type": "string"}}
GET, POST, PET = "GET /pets: ", "POST /pets: ", "GET /pets: 200.pets[]"

BREAKING: list[tuple[Change, list[str]]] = [
    # operations
    (lambda d: d["paths"].pop("/pets"), [GET + "is gone", POST + "is gone"]),
    (lambda d: d["paths"]["/pets"].pop("post"), [POST + "is gone"]),
    (
        lambda d: get(d).update(operationId="pets"),
        [GET + "is now called pets, by which generated clients name it"],
    ),
    (lambda d: get(d)["security"].pop(), [GET + "can no longer be called with X-API-Key"]),
    (
        lambda d: get(d).update(security=[{"Bearer": [], "X-API-Key": []}]),
        [GET + "can no longer be called with Bearer", GET + "can no longer be called with X-API-Key"],
    ),
    (lambda d: post(d).update(security=[{"Bearer": []}]), [POST + "can no longer be called with no key"]),
    # parameters
    (lambda d: get(d)["parameters"].pop(0), [GET + "query.k is gone"]),
    (lambda d: get(d)["parameters"].append(REQUIRED), [GET + "header.x is now required"]),
    (lambda d: parameter(d, "k").update(required=True), [GET + "query.k is now required"]),
    (lambda d: parameter(d, "k").update({"in": "header"}), [GET + "query.k is gone"]),
    (lambda d: parameter(d, "k")["schema"].update(maximum=8), [GET + "query.k has maximum 8, and had 9"]),
    (lambda d: parameter(d, "k")["schema"].update(minimum=2), [GET + "query.k has minimum 2, and had 1"]),
    (lambda d: parameter(d, "k")["schema"].update(default=6), [GET + "query.k is 6 if absent, and was 5"]),
    (lambda d: parameter(d, "k")["schema"].update(type="string"), [GET + "query.k no longer takes integer"]),
    (lambda d: parameter(d, "kind")["schema"]["enum"].pop(), [GET + "query.kind no longer takes 'dog'"]),
    (lambda d: parameter(d, "kind").update(schema={"const": "dog"}), [GET + "query.kind no longer takes 'cat'"]),
    (lambda d: parameter(d, "name")["schema"]["anyOf"].pop(), [GET + "query.name no longer takes null"]),
    (
        lambda d: parameter(d, "name")["schema"]["anyOf"][0].update(pattern="^a"),
        [GET + "query.name has the pattern ^a, and had none"],
    ),
    (
        lambda d: parameter(d, "name")["schema"]["anyOf"][0].update(enum=["a", "b"]),
        [GET + "query.name takes nothing but 'a', 'b' now"],
    ),
    # bodies
    (lambda d: post(d).pop("requestBody"), [POST + "body is no longer taken"]),
    (lambda d: post(d)["requestBody"].update(required=True), [POST + "body is now required"]),
    (
        lambda d: get(d).update(requestBody={"required": True, "content": {}}),
        [GET + "body is now required"],
    ),
    (lambda d: post(d)["requestBody"]["content"].pop("text/csv"), [POST + "body is no longer taken as text/csv"]),
    (lambda d: schema(d, "NewPet")["properties"].pop("born"), [POST + "body.born is gone"]),
    (lambda d: schema(d, "NewPet")["required"].append("kind"), [POST + "body.kind is now required"]),
    (lambda d: schema(d, "NewPet").update(additionalProperties=False), [POST + "body no longer takes other fields"]),
    (lambda d: field(d, "name", "NewPet").update(maxLength=19), [POST + "body.name has maxLength 19, and had 20"]),
    (lambda d: field(d, "name", "NewPet").update(minLength=1), [POST + "body.name has minLength 1, and had none"]),
    (lambda d: field(d, "kind", "NewPet")["enum"].remove("cat"), [POST + "body.kind no longer takes 'cat'"]),
    (
        lambda d: field(d, "born", "NewPet").update(format="date-time"),
        [POST + "body.born has the format date-time, and had date"],
    ),
    (lambda d: field(d, "toys", "NewPet").update(maxItems=2), [POST + "body.toys has maxItems 2, and had 3"]),
    (
        lambda d: field(d, "toys", "NewPet")["items"].update(type="integer"),
        [POST + "body.toys[] no longer takes string"],
    ),
    # answers
    (lambda d: post(d)["responses"].pop("201"), [POST + "no longer answers 201"]),
    (
        lambda d: get(d)["responses"]["200"].update(content={"text/csv": {"schema": {}}}),
        [GET + "200 is no longer answered as application/json"],
    ),
    (
        lambda d: get(d)["responses"]["422"].update(content={"text/plain": {}}),
        [GET + "422 is no longer answered as application/problem+json"],
    ),
    (
        lambda d: field(d, "pets", "Page")["items"].update({"$ref": "#/components/schemas/NewPet"}),
        [PET + ".weight is gone", PET + ".mother is gone", PET + ".tags is gone", PET + ".kind may now be absent"],
    ),
    (lambda d: schema(d, "Page")["properties"].pop("next_cursor"), [GET + "200.next_cursor is gone"]),
    (lambda d: schema(d, "Pet")["properties"].pop("mother"), [PET + ".mother is gone"]),
    (lambda d: schema(d, "Pet")["required"].remove("weight"), [PET + ".weight may now be absent"]),
    (lambda d: field(d, "weight", "Pet").update(type=["number", "null"]), [PET + ".weight may now be null"]),
    (lambda d: field(d, "weight", "Pet").update(type="string"), [PET + ".weight may now be string"]),
    (lambda d: schema(d, "Pet")["properties"].update(weight={}), [PET + ".weight may now be anything"]),
    (lambda d: field(d, "kind", "Pet")["enum"].append("cow"), [PET + ".kind may now be 'cow'"]),
    (lambda d: field(d, "kind", "Pet").pop("enum"), [PET + ".kind may now be any value"]),
    (
        lambda d: field(d, "tags", "Pet").update(additionalProperties={"type": "integer"}),
        [PET + ".tags.* may now be integer"],
    ),
]

COMPATIBLE: list[Change] = [
    lambda d: None,
    lambda d: d["paths"].update({"/more": copy.deepcopy(d["paths"]["/pets"])}),
    lambda d: get(d)["parameters"].append(REQUIRED | {"required": False}),
    lambda d: get(d)["parameters"].reverse(),
    lambda d: get(d)["security"].append({}),
    lambda d: get(d).update(deprecated=True, summary="Pets"),
    lambda d: parameter(d, "k")["schema"].update(type="number", maximum=10, minimum=0),
    lambda d: parameter(d, "k")["schema"].pop("maximum"),
    lambda d: parameter(d, "kind")["schema"]["enum"].append("cow"),
    lambda d: parameter(d, "kind").update(schema={"type": "string"}),
    lambda d: parameter(d, "name").update(schema={"type": ["null", "string", "integer"]}),
    lambda d: parameter(d, "name").update(schema={}),
    lambda d: get(d).update(requestBody={"content": {}}),
    lambda d: schema(d, "NewPet")["required"].clear(),
    lambda d: schema(d, "NewPet")["properties"].update(color={"type": "string"}),
    lambda d: field(d, "name", "NewPet").update(maxLength=21),
    lambda d: post(d)["requestBody"]["content"].update({"application/xml": {"schema": {}}}),
    lambda d: post(d)["responses"].update({"200": {}}),
    lambda d: post(d)["responses"].pop("409"),
    lambda d: schema(d, "Pet")["properties"].update(color={"type": "string"}),
    lambda d: schema(d, "Pet")["required"].append("mother"),
    lambda d: field(d, "weight", "Pet").update(type="integer"),
    lambda d: field(d, "next_cursor", "Page").update(type="string"),
    lambda d: field(d, "kind", "Pet")["enum"].remove("cat"),
    lambda d: field(d, "kind", "Pet").update(enum=["dog"]) or field(d, "kind", "Pet").update(maxLength=3),
]


@pytest.mark.parametrize(("change", "found"), BREAKING, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_each_kind_of_breaking_change_is_found(change: Change, found: list[str]) -> None:
    after = copy.deepcopy(BEFORE)
    change(after)
    assert breaking_changes(BEFORE, after) == found


@pytest.mark.parametrize("change", COMPATIBLE)
def test_what_breaks_nobody_is_not_told(change: Change) -> None:
    after = copy.deepcopy(BEFORE)
    change(after)
    assert breaking_changes(BEFORE, after) == []


def test_the_committed_description_is_up_to_date() -> None:
    committed = (DOCS / "openapi.json").read_text(encoding="utf-8")
    assert committed == as_text(description()), "the HTTP interface has changed: run `make openapi` and commit the file"


def test_what_breaks_callers_of_the_last_release_stands_in_the_changelog() -> None:
    """docs/decisions says what the baseline is and when it changes."""
    baseline = json.loads((DOCS / "openapi-baseline.json").read_text(encoding="utf-8"))
    newest, section = re.split(r"^## (.+)$", CHANGELOG.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:3]
    changes = breaking_changes(baseline, description())
    assert [change for change in changes if f"`{change}`" not in section] == []
    if "unreleased" not in newest:
        assert baseline == description(), "a release: copy docs/openapi.json to docs/openapi-baseline.json"


def test_every_operation_field_and_parameter_is_watched() -> None:
    """Take each away from the real description, and it is missed."""
    full, less = description(), description()
    for path, methods in less["paths"].items():
        for method, operation in methods.items():
            parameters = operation.pop("parameters", [])
            missed = [f"{method.upper()} {path}: {one['in']}.{one['name']} is gone" for one in parameters]
            assert breaking_changes(full, less) == missed
            operation["parameters"] = parameters
    for named in less["components"]["schemas"].values():
        fields = named.pop("properties", {})
        missed = breaking_changes(full, less)
        for name in fields:
            assert any(change.endswith(f".{name} is gone") for change in missed), name
        named["properties"] = fields


def test_the_command_compares_and_exports(tmp_path: Path) -> None:
    runner, file = CliRunner(), tmp_path / "openapi.json"
    assert runner.invoke(app, ["openapi", "--out", str(file)]).exit_code == 0
    assert runner.invoke(app, ["openapi"]).stdout == file.read_text(encoding="utf-8")
    same = runner.invoke(app, ["openapi", "--against", str(file)])
    assert (same.exit_code, same.stdout) == (0, "")
    older = json.loads(file.read_text(encoding="utf-8"))
    older["paths"]["/older"] = older["paths"]["/popular"]
    file.write_text(json.dumps(older), encoding="utf-8")
    changed = runner.invoke(app, ["openapi", "--against", str(file)])
    assert (changed.exit_code, changed.stdout) == (1, "GET /older: is gone\n")
    for wrong, said in ((tmp_path / "none.json", "cannot read"), (CHANGELOG, "is no OpenAPI description")):
        refused = runner.invoke(app, ["openapi", "--against", str(wrong)])
        assert refused.exit_code == 1
        assert said in refused.stderr
