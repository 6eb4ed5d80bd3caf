"""Seen items come again after the set time, at the set discount."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings

ITEMS = [f"item-{number:02}" for number in range(40)]

Returning = Callable[..., TestClient]


@pytest.fixture
def returning(settings: Settings, connect: Any) -> Iterator[Returning]:
    """`returning(resurface_discount=0.5)` starts a service where items return after 30 days."""
    clients: list[TestClient] = []

    def start(**changes: Any) -> TestClient:
        client: TestClient = connect(create_app(settings.model_copy(update={"resurface_after_days": 30.0} | changes)))
        client.__enter__()
        clients.append(client)
        client.app.state.service.poll()  # type: ignore[attr-defined]
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def tell(client: TestClient, item_id: str, days_ago: float, type_: str = "click") -> None:
    when = (datetime.now(UTC) - timedelta(days=days_ago)).isoformat()
    event = {"user_id": "anna", "item_id": item_id, "type": type_, "occurred_at": when}
    assert client.post("/feedback", json=event).status_code == 201


def ask(client: TestClient, **parameters: Any) -> dict[str, float]:
    response = client.get("/users/anna/recommendations", params={"k": 40} | parameters)
    assert response.status_code == 200, response.text
    return {item["item_id"]: item["score"] for item in response.json()["items"]}


def test_items_return_at_a_discount(returning: Returning, publish: Any) -> None:
    recommender = publish("v1", ITEMS)
    client = returning(resurface_discount=0.25)
    for item_id, days_ago in [("item-01", 40), ("item-02", 40), ("item-02", 3), ("item-03", 50), ("item-04", 60)]:
        tell(client, item_id, days_ago)
    tell(client, "item-04", 35, "dislike")
    history = recommender.items.indices(["item-04", "item-03", "item-01", "item-02", "item-02"])
    scores = recommender.score_items(recommender.encode([0], [history]), [range(40)])[0]
    average = scores.mean()  # of all 40, since the catalogue is smaller than the sample
    expected = {
        ITEMS[index]: average + 0.75 * (score - average) if index in (1, 3) and score > average else score
        for index, score in enumerate(scores.tolist())
        if index not in (2, 4)
    }
    found = ask(client)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-2)  # in 32 bits, by sums in another order
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert ask(client, exclude=["item-01"]).keys() == found.keys() - {"item-01"}
    assert ask(client, k=5, diversity=0.1).keys() <= found.keys()


def test_pages_hold_returning_items_once(returning: Returning, publish: Any) -> None:
    publish("v1", ITEMS)
    client = returning(resurface_discount=0)
    for number in range(20):
        tell(client, ITEMS[number], 40 + number)
    whole = list(ask(client))
    assert sorted(whole) == ITEMS
    listed: list[str] = []
    parameters: dict[str, Any] = {"k": 7}
    while True:
        answer = client.get("/users/anna/recommendations", params=parameters).json()
        listed += [item["item_id"] for item in answer["items"]]
        if answer["next_cursor"] is None:
            break
        parameters["cursor"] = answer["next_cursor"]
    assert listed == whole


def test_everything_was_seen(returning: Returning, publish: Any) -> None:
    publish("v1", ITEMS[:3])
    client = returning()
    for item_id in ITEMS[:3]:
        tell(client, item_id, 31)
    assert sorted(ask(client)) == ITEMS[:3]
    assert np.isfinite(list(ask(client).values())).all()


def test_nothing_returns_unless_set(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    client.app.state.service.poll()  # type: ignore[attr-defined]
    tell(client, "item-01", 4_000)
    assert "item-01" not in ask(client)
