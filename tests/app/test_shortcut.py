"""The short way answers as the long way does, or leaves the answer to it."""

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.main import create_app
from app.security import create_key
from app.serving.query import Query
from app.serving.ranked_lists import State
from app.serving.ranking import Ranker
from app.settings import Settings
from app.tables import recommendation_log

ITEMS = [f"item-{number:02}" for number in range(40)]


@pytest.fixture
def shop(settings: Settings, publish: Any, connect: Callable[..., TestClient]) -> Iterator[TestClient]:
    publish("v1", ITEMS)
    with connect(create_app(settings)) as client:
        for item_id in ITEMS[:3]:
            assert client.post("/feedback", json={"user_id": "anna", "item_id": item_id, "type": "click"}).is_success
        client.app.state.service.poll()  # type: ignore[attr-defined]  # counted now, not between two answers
        yield client


def both_ways(client: TestClient, path: str, **options: Any) -> list[Any]:
    """The same request twice: by the long way, which remembers the query string, and then the short one if it may."""
    service = client.app.state.service  # type: ignore[attr-defined]
    service.known_queries.clear()
    return [client.get(path, **options), client.get(path, **options)]


@pytest.mark.parametrize(
    ("user_id", "query"),
    [
        ("anna", ""),
        ("anna", "k=3"),
        ("anna", "k=5&exclude=item-07&exclude=item-09&include_seen=true"),
        ("ben", "k=40"),
        ("nobody", "k=2"),
        ("with%20space%C3%A9", "k=2"),
        ("anna", "k=4&diversity=0.5"),
        ("anna", "k=0"),
        ("anna", "kk=1"),
        ("anna", "k=3&cursor=forged"),
        ("a%2Fb", "k=3"),
        ("", "k=3"),
        ("..", "k=3"),
        ("x" * 256, "k=3"),
        ("%00", "k=3"),
        ("%ff", "k=3"),
        ("caf%C3%A9%E9", "k=3"),
        ("%EF%BF%BD", "k=3"),
        ("anna", "k=3&category=%ff"),
    ],
)
def test_both_ways_give_the_same(shop: TestClient, engine: Engine, user_id: str, query: str) -> None:
    key = create_key(engine, "shop").key
    headers = {"Authorization": f"Bearer {key}", "X-Request-ID": "mine-1"}
    long, short = both_ways(shop, f"/users/{user_id}/recommendations?{query}", headers=headers)
    assert short.status_code == long.status_code
    ours = {"recommendation_id", "next_cursor"}
    assert {k: v for k, v in short.json().items() if k not in ours} == {
        k: v for k, v in long.json().items() if k not in ours
    }
    if long.is_success:
        assert all((short.json()[name] is None) == (long.json()[name] is None) for name in ours)
        assert short.json()["recommendation_id"] != long.json()["recommendation_id"]
    changing = {"content-length", "date"}
    assert {k: v for k, v in short.headers.items() if k not in changing} == {
        k: v for k, v in long.headers.items() if k not in changing
    }
    assert short.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "Basic {}", "{}", "Bearer {}x", "Bearer", "Bearer  {}"])
def test_a_key_is_checked_alike(shop: TestClient, engine: Engine, form: str) -> None:
    key = create_key(engine, "shop").key
    good = {"Authorization": f"Bearer {key}"}
    for given in ({"Authorization": form.format(key)}, {"X-API-Key": form.format(key)}, {}):
        assert shop.get("/users/anna/recommendations?k=3", headers=good).status_code == 200  # both are known now
        short = shop.get("/users/anna/recommendations?k=3", headers=given)
        shop.app.state.service.known_queries.clear()  # type: ignore[attr-defined]
        long = shop.get("/users/anna/recommendations?k=3", headers=given)
        assert short.status_code == long.status_code


def test_scopes_and_expiry_hold(shop: TestClient, engine: Engine) -> None:
    narrow = create_key(engine, "writer", ["feedback"]).key
    broad = create_key(engine, "admin", ["admin"]).key
    statuses = []
    for key in (narrow, broad):
        headers = {"Authorization": f"Bearer {key}"}
        answers = both_ways(shop, "/users/anna/recommendations", headers=headers)
        statuses.append([answer.status_code for answer in answers])
    assert statuses == [[403, 403], [200, 200]]
    keys = shop.app.state.service.keys  # type: ignore[attr-defined]
    expiring = create_key(engine, "soon", expires_in=timedelta(seconds=0.2))
    headers = {"Authorization": f"Bearer {expiring.key}"}
    assert shop.get("/users/anna/recommendations", headers=headers).status_code == 200
    while keys.known(expiring.key) is not None:
        pass
    assert shop.get("/users/anna/recommendations", headers=headers).status_code == 401


def test_the_next_answer_knows_what_just_happened(shop: TestClient, engine: Engine, publish: Any) -> None:
    key = create_key(engine, "shop").key
    shop.headers["Authorization"] = f"Bearer {key}"
    seen = set(ITEMS[:3])
    for _ in range(5):
        answer = shop.get("/users/anna/recommendations?k=2").json()
        first, second = [item["item_id"] for item in answer["items"]]
        assert not seen & {first, second}
        shop.post("/feedback", json={"user_id": "anna", "item_id": first, "type": "click"})
        publish.hide(second)  # as another process would
        seen |= {first, second}
    version = publish("v2", ITEMS)
    shop.app.state.service.poll()  # type: ignore[attr-defined]
    answer = shop.get("/users/anna/recommendations?k=2").json()
    assert answer["model_version"] == "v2"
    assert version.num_items == len(ITEMS)


def test_one_users_failure_is_not_the_others(shop: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    service, ranking = shop.app.state.service, Ranker._ranking  # type: ignore[attr-defined]

    def failing(ranker: Ranker, state: State, *others: Any) -> Any:
        if state.user_id == "ben":
            raise ValueError("ben")
        return ranking(ranker, state, *others)

    async def together() -> list[Any]:
        answers = [service.rounds.answer(user_id, Query(k=3)) for user_id in ("anna", "ben", "carl")]
        return await asyncio.gather(*answers, return_exceptions=True)

    monkeypatch.setattr(Ranker, "_ranking", failing)
    assert shop.portal is not None
    assert [type(answer) for answer in shop.portal.call(together)] == [bytes, ValueError, bytes]
    service.recommendation_log.stop()
    with engine.connect() as connection:
        logged = connection.execute(sa.select(recommendation_log.c.user_id)).scalars().all()
    assert sorted(logged) == ["anna", "carl"]  # each once


def test_it_is_counted_under_its_route(shop: TestClient, engine: Engine) -> None:
    key = create_key(engine, "shop").key
    shop.headers["Authorization"] = f"Bearer {key}"
    for _ in range(3):
        shop.get("/users/anna/recommendations?k=2")
    line = 'shortlist_requests_total{method="GET",route="/users/{user_id}/recommendations",status="200"} 3.0'
    assert line in shop.get("/metrics").text


def test_remembered_queries_are_bounded(shop: TestClient) -> None:
    service = shop.app.state.service  # type: ignore[attr-defined]
    for number in range(30):
        shop.get(f"/users/anna/recommendations?k=1&exclude=item-{number}")
    assert len(service.known_queries) == 30
    service.known_queries |= {b"%d" % number: None for number in range(1_000)}
    shop.get("/users/anna/recommendations?k=7")
    assert list(service.known_queries) == [b"k=7"]
    shop.get(f"/users/anna/recommendations?exclude={'x' * 250}")
    assert list(service.known_queries) == [b"k=7"]


CLICK = {"event_id": "e-1", "user_id": "anna", "item_id": "item-30", "type": "click"}


@pytest.mark.parametrize(
    ("content", "statuses"),
    [
        (json.dumps(CLICK), [201, 200]),
        (json.dumps([CLICK, CLICK | {"event_id": "e-2"}, CLICK | {"user_id": "a/b"}]), [201, 200]),
        (json.dumps(CLICK | {"item_id": None}), [422, 422]),
        (json.dumps(CLICK | {"surplus": 1}), [422, 422]),
        ("[]", [422, 422]),
        ("{", [422, 422]),
        ("", [422, 422]),
        (b"\xff", [422, 422]),
        (json.dumps(CLICK | {"context": {"text": "x" * 2_000_000}}), [413, 413]),
    ],
)
def test_feedback_is_answered_alike(
    shop: TestClient, engine: Engine, content: str | bytes, statuses: list[int]
) -> None:
    key = create_key(engine, "shop").key
    headers = {"Authorization": f"Bearer {key}", "X-Request-ID": "mine-1", "Content-Type": "application/json"}
    shop.get("/users/anna/recommendations", headers=headers)  # the key is known now
    short = shop.post("/feedback", content=content, headers=headers)
    long = shop.post(
        "/feedback", content=content, headers=headers | {"Content-Type": "application/json; charset=utf-8"}
    )
    assert [short.status_code, long.status_code] == statuses
    assert short.headers["content-type"] == long.headers["content-type"]
    assert short.headers["x-request-id"] == long.headers["x-request-id"] == "mine-1"
    if not short.is_success:
        assert short.json() == long.json()
    else:
        replaced = {"stored": "duplicate", "rejected": "rejected"}
        assert [result | {"outcome": replaced[result["outcome"]]} for result in short.json()["results"]] == long.json()[
            "results"
        ]


def test_what_is_odd_goes_the_whole_way(shop: TestClient, engine: Engine) -> None:
    key = create_key(engine, "shop").key
    shop.get("/users/anna/recommendations?k=3", headers={"Authorization": f"Bearer {key}"})
    json_type = ("Content-Type", "application/json")
    for status, method, path, headers in (
        (422, "POST", "/feedback?x=%ff", [json_type]),
        (415, "POST", "/feedback", [("Content-Type", "text/plain"), json_type]),
        (413, "GET", "/users/anna/recommendations?k=3", [("Content-Length", "99999999")]),
    ):
        body = json.dumps(CLICK) if method == "POST" else None
        answers = [
            shop.request(method, path, content=body, headers=[held, *headers])
            for held in (("Authorization", f"Bearer {key}"), ("X-API-Key", key))
        ]
        assert [answer.status_code for answer in answers] == [status, status]
        assert answers[0].json() == answers[1].json()


def test_feedback_in_pieces_is_put_together(shop: TestClient, engine: Engine) -> None:
    key = create_key(engine, "shop").key
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    shop.get("/users/anna/recommendations", headers=headers)
    body = json.dumps(CLICK).encode()
    # A length makes it plain; without one it comes in chunks, by the long way.
    for given in (headers | {"Content-Length": str(len(body))}, headers):
        pieces = (body[start : start + 20] for start in range(0, len(body), 20))
        answer = shop.post("/feedback", content=pieces, headers=given)
        assert answer.is_success, answer.text


def test_feedback_needs_its_scope(shop: TestClient, engine: Engine) -> None:
    reader = create_key(engine, "reader", ["recommend"]).key
    writer = create_key(engine, "writer", ["feedback"]).key
    for key, expected in ((reader, [403, 403]), (writer, [201, 200])):
        headers = {"Authorization": f"Bearer {key}"}
        statuses = [shop.post("/feedback", json=CLICK, headers=headers).status_code for _ in range(2)]
        assert statuses == expected
    both = {"Authorization": f"Bearer {writer}", "X-API-Key": "sl_other"}
    assert shop.post("/feedback", json=CLICK, headers=both).status_code == 200
    line = 'shortlist_requests_total{method="POST",route="/feedback",status="200"} 2.0'
    assert (
        line in shop.get("/metrics", headers={"Authorization": f"Bearer {create_key(engine, 'a', ['admin']).key}"}).text
    )


@pytest.mark.parametrize("path", ["/users/%ff/recommendations?k=3", "/users/anna/recommendations?category=%ff"])
def test_an_address_that_is_not_utf8_is_refused(shop: TestClient, path: str) -> None:
    field = "query" if "?c" in path else "path"
    for answer in both_ways(shop, path):
        assert answer.status_code == 422
        assert [error["field"] for error in answer.json()["errors"]] == [field]


@pytest.mark.parametrize("content_type", [b"application/json", b"application/json; charset=utf-8"])
def test_a_caller_who_goes_away_is_no_failure(
    shop: TestClient, engine: Engine, content_type: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    key = create_key(engine, "shop").key
    shop.headers["Authorization"] = f"Bearer {key}"
    shop.get("/users/anna/recommendations")  # the key is known now
    headers = [
        (b"content-type", content_type),
        (b"content-length", b"999"),
        (b"authorization", f"Bearer {key}".encode()),
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/feedback",
        "raw_path": b"/feedback",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "root_path": "",
        "http_version": "1.1",
    }
    begun: dict[str, Any] = {"type": "http.request", "body": b"[", "more_body": True}
    messages = iter([begun, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(_message: Any) -> None:
        pass

    assert shop.portal is not None
    shop.portal.call(shop.app, scope, receive, send)
    assert "unexpected error" not in "".join(capfd.readouterr())
    lines = shop.get("/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith('shortlist_requests_total{method="POST",route="/feedback"')]
    assert any('status="499"' in line for line in counted)
    assert not any('status="5' in line or 'status="0"' in line for line in counted)


def test_what_is_logged_on_the_way_names_the_request(
    shop: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = shop.app.state.service.rounds  # type: ignore[attr-defined]
    answer, bound = rounds.answer, []

    async def listening(user_id: str, query: Query) -> bytes | None:
        bound.append(structlog.contextvars.get_contextvars().get("request_id"))
        body: bytes | None = await answer(user_id, query)
        return body

    monkeypatch.setattr(rounds, "answer", listening)
    headers = {"Authorization": f"Bearer {create_key(engine, 'shop').key}"}
    answers = [*both_ways(shop, "/users/anna/recommendations?k=3", headers=headers)]
    answers.append(shop.get("/users/anna/recommendations?k=3", headers=headers | {"X-Request-ID": "mine-2"}))
    assert bound[-2:] == [answer.headers["x-request-id"] for answer in answers[-2:]]
    assert bound[-1] == "mine-2"
