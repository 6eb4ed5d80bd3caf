"""Items like an item: by vectors, by categories, by popularity."""

from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from app.routes.similar import SimilarItems

ITEMS = [f"item-{number:02}" for number in range(30)]


def activated(client: TestClient) -> None:
    """As the follower does every `model_poll_seconds`."""
    client.app.state.service.poll()  # type: ignore[attr-defined]


def ask(client: TestClient, item_id: str, **parameters: Any) -> dict[str, Any]:
    response = client.get(f"/items/{item_id}/similar", params=parameters)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    SimilarItems.model_validate(answer)
    assert [item["rank"] for item in answer["items"]] == list(range(1, len(answer["items"]) + 1))
    return answer


def shown(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


@pytest.mark.parametrize("model", ["caser", "neumf", "matrix_factorization"])
def test_by_the_vectors_of_the_active_version(client: TestClient, publish: Any, model: str) -> None:
    publish.catalogue(ITEMS, {item_id: ["even"] for item_id in ITEMS[::2]})
    recommender = publish("v1", ITEMS, model=model)
    activated(client)
    vectors = recommender.item_vectors(range(30)).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[5]
    order = [ITEMS[index] for index in np.argsort(-cosines) if index != 5]
    answer = ask(client, "item-05", k=30)
    assert (answer["source"], answer["model_version"], answer["item_id"]) == ("model", "v1", "item-05")
    assert shown(answer) == order
    assert answer["items"][0]["score"] == pytest.approx(np.sort(cosines)[-2], abs=1e-5)
    assert shown(ask(client, "item-05", k=3, category="even")) == [i for i in order if i in ITEMS[::2]][:3]
    publish.hide(order[0])
    publish.hide("item-05")  # what is hidden does not come, and can still be asked about
    activated(client)
    assert shown(ask(client, "item-05", k=3)) == order[1:4]


def test_an_item_that_the_version_does_not_know(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS[:4])
    publish.catalogue(
        ["dune", "alien", "solaris", "heat", "bare"],
        {"dune": ["film", "desert"], "alien": ["film"], "solaris": ["film", "desert"], "heat": ["city"]},
    )
    for _ in range(2):
        assert client.post("/feedback", json={"user_id": "u", "item_id": "heat", "type": "click"}).status_code == 201
    activated(client)
    answer = ask(client, "dune")
    assert (answer["source"], answer["model_version"]) == ("categories", None)
    assert {item["item_id"]: item["score"] for item in answer["items"]} == {"solaris": 1.0, "alien": 0.5}
    assert shown(answer) == ["solaris", "alien"]
    answer = ask(client, "bare", k=1)
    assert (answer["source"], shown(answer)) == ("popular", ["heat"])
    answer = ask(client, "bare", category="nobody has this")
    assert (answer["source"], answer["items"]) == ("empty", [])
    assert "'nobody has this'" in answer["reason"]


def test_an_erased_item_that_came_back_is_another_thing(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS[:4])
    activated(client)
    assert ask(client, "item-00")["source"] == "model"
    assert client.delete("/items/item-00").status_code == 204
    assert client.put("/items/item-00", json={}).status_code == 201
    activated(client)
    assert ask(client, "item-00")["source"] == "popular"
    assert "item-00" not in shown(ask(client, "item-01"))


def test_a_version_without_vectors(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS[:3], {"item-00": ["a"], "item-02": ["a"]})
    publish("v1", ITEMS[:3], model="popularity")
    activated(client)
    answer = ask(client, "item-00")
    assert (answer["source"], shown(answer)) == ("categories", ["item-02"])


def test_an_unknown_item_is_not_found(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS[:3])
    activated(client)
    response = client.get("/items/nobody knows this/similar")
    assert response.status_code == 404
    assert response.json()["errors"][0]["field"] == "path.item_id"
    assert client.get("/items/item-00/similar", params={"k": 1001}).status_code == 422
