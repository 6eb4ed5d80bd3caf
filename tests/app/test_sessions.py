"""Visitors without an id: ranked for from the items that they bring along."""

from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.routes.sessions import SessionRecommendations
from app.tables import recommendation_log

ITEMS = [f"item-{number:02}" for number in range(40)]
MODELS = ("caser", "neumf", "matrix_factorization")


def activated(client: TestClient) -> None:
    """As the follower does every `model_poll_seconds`."""
    client.app.state.service.poll()  # type: ignore[attr-defined]


def ask(client: TestClient, items: list[str], **fields: Any) -> dict[str, Any]:
    response = client.post("/sessions/recommendations", json={"items": items, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    SessionRecommendations.model_validate(answer)
    assert [item["rank"] for item in answer["items"]] == list(range(1, len(answer["items"]) + 1))
    return answer


def shown(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def expected(recommender: Any, session: list[str], k: int, left_out: list[str] | None = None) -> list[str]:
    numbered = recommender.items.indices
    out = numbered(session if left_out is None else left_out)
    indices, _ = recommender.top_k([-1], [numbered(session)], [out], k)
    found: list[str] = recommender.items.ids(indices[0][indices[0] >= 0])
    return found


@pytest.mark.parametrize("model", MODELS)
def test_ranked_as_a_stranger_with_that_history(client: TestClient, publish: Any, model: str) -> None:
    publish.catalogue(ITEMS, {item_id: ["even"] for item_id in ITEMS[::2]})
    recommender = publish("v1", ITEMS, model=model, trained_through="2026-11-21T09:30:00.000000Z")
    activated(client)
    session = ["item-03", "item-07", "nobody knows this"]
    answer = ask(client, session, k=5)
    assert (answer["source"], answer["model_version"]) == ("folded_in", "v1")
    assert answer["data_through"] == "2026-11-21T09:30:00.000000Z"
    assert "reason" not in answer
    every = expected(recommender, session[:2], 40)
    assert shown(answer) == every[:5]
    assert shown(ask(client, session, k=40, category="even")) == [item for item in every if item in ITEMS[::2]]
    assert shown(ask(client, session, k=5, exclude=every[:2])) == every[2:7]
    seen_too = expected(recommender, session[:2], 40, left_out=[])
    assert shown(ask(client, session, k=40, include_seen=True)) == seen_too
    publish.hide(every[0])
    activated(client)
    assert shown(ask(client, session, k=5)) == every[1:6]


def test_a_session_that_no_version_knows_gets_popular_items_and_the_reason(client: TestClient, publish: Any) -> None:
    publish.catalogue([*ITEMS, "new"])
    assert client.post("/feedback", json={"user_id": "u", "item_id": "item-09", "type": "click"}).status_code == 201
    activated(client)
    answer = ask(client, ["item-01"], k=3)
    assert (answer["source"], answer["reason"]) == ("popular", "no version is active")
    assert shown(answer) == ["item-09", "item-00", "item-02"]
    publish("v1", ITEMS)
    activated(client)
    answer = ask(client, ["new", "nobody knows this"], k=3)
    assert (answer["source"], answer["model_version"]) == ("popular", None)
    assert "knows none" in answer["reason"]
    assert shown(answer)[0] == "item-09"
    assert "no item was given" in ask(client, [])["reason"]


def test_an_empty_answer_says_why(client: TestClient, publish: Any) -> None:
    assert "holds no item" in ask(client, ["item-01"])["reason"]
    publish("v1", ITEMS[:3])
    activated(client)
    answer = ask(client, ["item-01"], category="nobody has this")
    assert (answer["source"], answer["items"]) == ("empty", [])
    assert "'nobody has this'" in answer["reason"]
    answer = ask(client, ITEMS[:3])
    assert answer["source"] == "empty"
    assert "in the session or excluded" in answer["reason"]


@pytest.mark.parametrize("model", ["caser", "neumf"])
def test_the_end_of_a_long_session_counts(client: TestClient, publish: Any, model: str) -> None:
    publish("v1", ITEMS, model=model)
    activated(client)
    session = [ITEMS[number % 10] for number in range(10_000)]
    answer = ask(client, session, k=30)
    assert answer["source"] == "folded_in"
    assert not set(shown(answer)) & set(ITEMS[:10])
    assert shown(answer) == shown(ask(client, session[-1_000:], k=30))
    response = client.post("/sessions/recommendations", json={"items": [*session, "one more"]})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "body.items"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body.items"),
        ({"items": ["a/b"]}, "body.items.0"),
        ({"items": "item-01"}, "body.items"),
        ({"items": [], "k": 0}, "body.k"),
        ({"items": [], "cursor": "x"}, "body.cursor"),
    ],
)
def test_bad_sessions_are_named(client: TestClient, body: dict[str, Any], field: str) -> None:
    response = client.post("/sessions/recommendations", json=body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == field


def test_an_erased_item_that_came_back_is_another_thing(client: TestClient, publish: Any) -> None:
    recommender = publish("v1", ITEMS)
    activated(client)
    assert client.delete("/items/item-03").status_code == 204
    assert client.put("/items/item-03", json={}).status_code == 201
    answer = ask(client, ["item-03"])
    assert (answer["source"], answer["reason"]) == ("popular", "the active version knows none of the items")
    answer = ask(client, ["item-07", "item-03"], k=3, explain=True)
    assert shown(answer) == expected(recommender, ["item-07"], 3, ["item-07", "item-03"])


def test_the_log_knows_the_list_and_not_the_visitor(client: TestClient, publish: Any, engine: Engine) -> None:
    publish("v1", ITEMS)
    activated(client)
    answer = ask(client, ["item-03", "item-04"], k=4)
    client.app.state.service.recommendation_log.stop()  # type: ignore[attr-defined]
    with engine.connect() as connection:
        (row,) = connection.execute(sa.select(recommendation_log)).all()
    assert (row.recommendation_id, row.surface, row.user_id) == (answer["recommendation_id"], "sessions", "")
    assert (row.policy, row.source, row.model_version) == ("model", "folded_in", "v1")
    assert row.item_ids == shown(answer)
    assert row.filters["session_length"] == 2
    assert row.candidate_count == 38


def test_long_sessions_keep_their_order(client: TestClient, publish: Any) -> None:
    items = [f"item-{number:03}" for number in range(700)]
    recommender = publish("v1", items)
    activated(client)
    session = [*items[600:0:-1], "item-650", "nobody knows this", "item-650"]
    assert shown(ask(client, session, k=10)) == expected(recommender, session, 10)
