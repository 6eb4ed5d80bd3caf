"""Every error is a problem document that names the field and shows nothing of the inside."""

from collections.abc import Callable
from typing import Annotated

import pytest
from fastapi import FastAPI, Query, Request
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field

from app import errors
from app.body_limit import BodyLimit
from app.database import create_engine
from app.errors import Problem, responses
from app.identifiers import ItemId, Metadata, UserId
from app.telemetry import Metrics, RequestCounts, RequestTelemetry


class Event(BaseModel):
    user_id: UserId
    item_id: ItemId
    context: Metadata = {}


@pytest.fixture
def client(connect: Callable[..., TestClient]) -> TestClient:
    app = FastAPI()
    errors.install(app)
    app.add_middleware(BodyLimit, limit=20_000, larger={"/bulk": 30_000})
    app.add_middleware(RequestTelemetry, counts=RequestCounts(Metrics()))

    @app.post("/events", responses=responses(409, 413, 422))
    def post(events: Annotated[list[Event], Field(max_length=5)]) -> int:
        return len(events)

    @app.post("/bulk")
    async def bulk(request: Request) -> int:
        return len(await request.body())

    @app.get("/users/{user_id}")
    def get(user_id: UserId, k: Annotated[int, Query(ge=1, le=1000)] = 10) -> str:
        return f"{user_id} {k}"

    @app.get("/conflict")
    def conflict() -> None:
        raise Problem(409, "Conflict", "That id is taken.", field="body.event_id", headers={"X-Extra": "1"})

    @app.get("/circle")
    def circle() -> None:
        problem, reason = Problem(409, "Conflict", "That id is taken."), ValueError("taken")
        reason.__cause__ = problem
        raise problem from reason

    @app.get("/gone")
    def gone() -> None:
        with create_engine("postgresql://u:secret@127.0.0.1:1/d").connect():
            pass

    @app.get("/wrong")
    def wrong(request: Request) -> None:
        raise ZeroDivisionError("the inside")

    return connect(app)


GOOD = {"user_id": "a", "item_id": "b"}


def problem(response: object, status: int, *fields: str) -> dict[str, object]:
    assert response.status_code == status, response.text  # type: ignore[attr-defined]
    assert response.headers["content-type"] == "application/problem+json"  # type: ignore[attr-defined]
    document = response.json()  # type: ignore[attr-defined]
    assert set(document) == {"type", "title", "status", "detail", "errors"}
    assert document["status"] == status
    assert document["detail"]
    assert [error["field"] for error in document["errors"]] == list(fields)
    return document  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["user_id", "item_id"])
@pytest.mark.parametrize(
    "value", ["", ".", "..", "a/b", "a\0b", "a\nb", "\x7f", "\u2028", "\ud800", "x" * 256, 5, None, ["a"], {}]
)
def test_an_id_that_cannot_be_is_named(client: TestClient, name: str, value: object) -> None:
    import json

    body = json.dumps([GOOD, GOOD, {**GOOD, name: value}])
    answer = client.post("/events", content=body, headers={"Content-Type": "application/json"})
    document = problem(answer, 422, f"body.2.{name}")
    assert "[^" not in str(document), "a pattern is no explanation"


@pytest.mark.parametrize("value", ["x", "é 😀", "x" * 255, "😀" * 255, "...", " ", "a.b", "‍", "%2F"])
def test_an_id_of_odd_characters_is_taken(client: TestClient, value: str) -> None:
    assert client.post("/events", json=[{**GOOD, "user_id": value}]).status_code == 200


@pytest.mark.parametrize("path", ["/users/%00", "/users/" + "x" * 256, "/users/a%0Ab"])
def test_an_id_in_the_path_is_named(client: TestClient, path: str) -> None:
    problem(client.get(path), 422, "path.user_id")


@pytest.mark.parametrize("k", ["0", "1000000", "-1", "ten", "", "9" * 5000, "1.5"])
def test_a_number_in_the_query_is_named(client: TestClient, k: str) -> None:
    problem(client.get(f"/users/a?k={k}"), 422, "query.k")


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"\xff\xfe\x00",
        b'[{"user_id": "\xe9"}]',
        b"[" * 19_000,
        b"[" + b"9" * 10_000 + b"]",
        b"nul",
        b'["\\ud800',
    ],
)
def test_broken_json_is_told(client: TestClient, body: bytes) -> None:
    document = problem(client.post("/events", content=body, headers={"Content-Type": "application/json"}), 422, "body")
    assert "Error" not in str(document)


@pytest.mark.parametrize(
    "context",
    [
        '"text"',
        "[]",
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": "\\u0000"}',
        '{"\\u0000": 1}',
        '{"a": ["\\ud800"]}',
        "5",
        '{"a": ' * 30 + "1" + "}" * 30,
        '{"a": ' + "9" * 100 + "}",
        '{"a": "' + "x" * 17_000 + '"}',
    ],
)
def test_json_that_cannot_be_kept_is_named(client: TestClient, context: str) -> None:
    body = f'[{{"user_id": "a", "item_id": "b", "context": {context}}}]'
    answer = client.post("/events", content=body, headers={"Content-Type": "application/json"})
    problem(answer, 422, "body.0.context")


def test_all_that_is_wrong_is_told_at_once(client: TestClient) -> None:
    document = problem(client.post("/events", json=[{}, GOOD]), 422, "body.0.user_id", "body.0.item_id")
    assert "and 1 more" in str(document["detail"])
    assert "body" in str(problem(client.post("/events", json=[GOOD] * 6), 422, "body"))


def test_unknown_places_and_methods(client: TestClient) -> None:
    problem(client.get("/nowhere"), 404)
    answer = client.delete("/users/a")
    problem(answer, 405)
    assert answer.headers["allow"] == "GET"


def test_what_a_route_raises(client: TestClient) -> None:
    answer = client.get("/conflict")
    document = problem(answer, 409, "body.event_id")
    assert (document["title"], answer.headers["x-extra"]) == ("Conflict", "1")


def test_errors_that_come_of_each_other(client: TestClient) -> None:
    problem(client.get("/circle"), 409)


@pytest.mark.parametrize("declared", [True, False])
def test_large_bodies(client: TestClient, declared: bool) -> None:
    def body(size: int) -> object:
        return b" " * size if declared else iter([b" " * size])

    headers = {"Content-Type": "application/json"}
    problem(client.post("/events", content=body(20_001), headers=headers), 413, "body")  # type: ignore[arg-type]
    problem(client.post("/bulk", content=body(30_001)), 413, "body")  # type: ignore[arg-type]
    assert client.post("/bulk", content=body(30_000)).json() == 30_000  # type: ignore[arg-type]


def test_the_database_gone_is_a_503(client: TestClient) -> None:
    answer = client.get("/gone")
    assert "secret" not in str(problem(answer, 503))
    assert int(answer.headers["retry-after"]) > 0


def test_the_unexpected_shows_nothing_of_the_inside(client: TestClient) -> None:
    document = problem(client.get("/wrong"), 500)
    assert "inside" not in str(document)
    assert "ZeroDivision" not in str(document)


def test_problems_are_described(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    answers = described["paths"]["/events"]["post"]["responses"]
    assert set(answers) == {"200", "409", "413", "422", "500"}
    for status in ("409", "413", "422", "500"):
        assert answers[status]["content"] == {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}
        }
    assert set(described["paths"]["/users/{user_id}"]["get"]["responses"]) == {"200", "404", "422", "500"}
    assert "HTTPValidationError" not in str(described)
    assert "ProblemDocument" in described["components"]["schemas"]
