"""Diversity and caps, by numbers worked out by hand and through the service."""

from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from app.serving.diversity import category_vectors, chosen_together

ITEMS = [f"item-{number:02}" for number in range(40)]


def ask(client: TestClient, user_id: str = "anna", **parameters: Any) -> list[str]:
    response = client.get(f"/users/{user_id}/recommendations", params=parameters)
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def test_the_next_one_is_good_and_unlike_those_before() -> None:
    # Relevance 1, .9, .5, .45, 0; the second points where the first does, the third at 60 degrees, the fourth at 90.
    scores = np.array([11, 10, 6, 5.5, 1], np.float32)
    vectors = np.array([[2, 0], [1, 0], [0.5, 0.75**0.5], [0, 3], [-1, 0]], np.float32)

    def chosen(diversity: float, k: int = 3) -> list[int]:
        return chosen_together(scores, k, diversity=diversity, vectors=vectors)

    assert chosen(0) == [0, 1, 2]
    # After the first: .9·.9 - .1·1 = .71 against .9·.5 - .1·.5 = .40; then .40 - .00 = .405 of the fourth.
    assert chosen(0.1) == [0, 1, 3]
    # After the first: .225 - 0 of the fourth against .45 - .5, .25 - .25 and 0 - 0, since what points away is unlike
    # and no more; then 0 of the last, -.05 of the second, .25 - .5·.866 of the third.
    assert chosen(0.5, k=5) == [0, 3, 4, 1, 2]
    assert chosen(0.5, k=99) == [0, 3, 4, 1, 2]
    assert chosen(1, k=2) == [0, 3]


def test_equal_scores_and_no_items() -> None:
    same = np.ones(3, np.float32)
    assert chosen_together(same, 2) == [0, 1]
    assert chosen_together(same, 3, diversity=0.5, vectors=np.zeros((3, 2), np.float32)) == [0, 1, 2]
    assert chosen_together(np.zeros(0, np.float32), 3) == []


def test_caps() -> None:
    scores = np.arange(6, 0, -1).astype(np.float32)
    categories = [("a",), ("a", "b"), ("a",), ("b",), (), ("b", "c")]
    assert chosen_together(scores, 6, categories=categories, max_per_category=1) == [0, 3, 4]
    assert chosen_together(scores, 6, categories=categories, max_per_category=2) == [0, 1, 3, 4]
    assert chosen_together(scores, 6, categories=categories, max_per_category=3) == [0, 1, 2, 3, 4, 5]


def test_likeness_by_categories() -> None:
    vectors = category_vectors([("a", "b"), ("a",), (), ("c",)])
    lengths = np.linalg.norm(vectors, axis=1)
    assert vectors[0] @ vectors[1] / (lengths[0] * lengths[1]) == pytest.approx(2**-0.5)
    assert (vectors[0] @ vectors[3], lengths[2]) == (0, 0)
    assert category_vectors([tuple(map(str, range(10_000)))]).shape == (1, 256)


@pytest.mark.parametrize("model", ["caser", "neumf", "matrix_factorization", "popularity"])
def test_every_model_can_be_diversified(client: TestClient, publish: Any, model: str) -> None:
    publish.catalogue(ITEMS, {item_id: [f"c{number % 3}"] for number, item_id in enumerate(ITEMS)})
    recommender = publish("v1", ITEMS, model=model)
    client.app.state.service.poll()  # type: ignore[attr-defined]
    indices, scores = recommender.top_k([0], [[]], [[]], 40)
    items = recommender.items.ids(indices[0])
    categories = [(f"c{ITEMS.index(item) % 3}",) for item in items]
    vectors = category_vectors(categories) if model == "popularity" else recommender.item_vectors(indices[0])
    places = chosen_together(scores[0], 8, diversity=0.7, vectors=vectors)
    assert ask(client, k=8, diversity=0.7) == [items[place] for place in places]
    assert ask(client, k=8, diversity=0) == items[:8]


def test_popular_items_differ_by_category(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS[:9], {item_id: [f"c{number // 3}"] for number, item_id in enumerate(ITEMS[:9])})
    client.app.state.service.poll()  # type: ignore[attr-defined]
    assert ask(client, k=3) == ["item-00", "item-01", "item-02"]
    assert ask(client, k=3, diversity=0.9) == ["item-00", "item-03", "item-06"]
    assert ask(client, k=4, max_per_category=1) == ["item-00", "item-03", "item-06"]


def test_caps_look_as_far_down_as_they_must(client: TestClient, publish: Any) -> None:
    items = [f"item-{number:03}" for number in range(500)]
    # Only the last in the ranking are of another category: far beyond the first pool.
    recommender = publish("v1", items)
    ranked = recommender.items.ids(recommender.top_k([0], [[]], [[]], 500)[0][0])
    publish.put_all(ranked[:450], ["same"])
    client.app.state.service.poll()  # type: ignore[attr-defined]
    assert ask(client, k=10, max_per_category=2) == [*ranked[:2], *ranked[450:458]]
    assert ask(client, k=10, max_per_category=2, category="same") == ranked[:2]
    response = client.get("/users/anna/recommendations", params={"k": 2, "category": "same", "max_per_category": 2})
    following = response.json()["next_cursor"]
    assert ask(client, k=2, category="same", max_per_category=2, cursor=following) == ranked[2:4]


def test_caps_look_as_far_down_among_popular_items(client: TestClient, publish: Any) -> None:
    items = [f"item-{number:03}" for number in range(500)]
    publish.catalogue(items, {item_id: ["same"] for item_id in items[:450]})
    client.app.state.service.poll()  # type: ignore[attr-defined]
    assert ask(client, k=10, max_per_category=2) == [*items[:2], *items[450:458]]
    assert ask(client, k=10, max_per_category=2, category="same") == items[:2]
