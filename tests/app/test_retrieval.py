"""A large catalogue is ranked through an index where its version measured that this finds enough; metrics say so."""

from dataclasses import asdict
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from ml.recommender import Recommender
from ml.retrieval import Retrieval, measured_retrieval

ITEMS = [f"item-{number:03}" for number in range(36)]
RARE = ITEMS[::9]
MANY = [f"item-{number:03}" for number in range(600)]  # random ones, of which an index finds the half


@pytest.fixture
def large(settings: Settings) -> Settings:
    """Settings by which the test's catalogue is a large one."""
    return settings.model_copy(update={"retrieval_from": 30})


def numbers(client: TestClient) -> dict[str, float]:
    """The metrics that tell of rankings."""
    lines = [line.rpartition(" ") for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines if "rankings_total" in name or "version_retrieves" in name}


def shown(client: TestClient, **parameters: Any) -> list[str]:
    answer = client.get("/users/anna/recommendations", params=parameters)
    assert (answer.status_code, answer.json()["source"]) == (200, "model")
    return [item["item_id"] for item in answer.json()["items"]]


def exactly(recommender: Recommender, k: int, among: list[str]) -> list[str]:
    best = recommender.top_k([0], [[]], [[]], recommender.num_items)[0][0]
    return [item_id for item_id in recommender.items.ids(best) if item_id in among][:k]


def measured(recommender: Recommender) -> dict[str, object]:
    products = recommender.model.inner_products()
    assert products is not None
    return asdict(measured_retrieval(Retrieval(products.as_products()), recommender.encode([0, 1], [[], []])))


@pytest.mark.parametrize("model", ["caser", "matrix_factorization"])
def test_candidates_come_from_the_index(large: Settings, connect: Any, publish: Any, model: str) -> None:
    publish.catalogue(ITEMS, {item_id: ["rare"] for item_id in RARE})
    found = measured(publish("v1", ITEMS, model=model, activate=False))
    assert found["recall"] == 1.0
    recommender = publish("v2", ITEMS, model=model, retrieval=found)
    with connect(create_app(large)) as client:
        assert client.get("/admin/models/v2").json()["manifest"]["retrieval"] == found
        before = numbers(client)
        assert before["shortlist_version_retrieves"] == 1
        assert shown(client, k=10) == exactly(recommender, 10, ITEMS)
        assert shown(client, k=3, category="rare") == exactly(recommender, 3, RARE)
        after = numbers(client)
    moved = {name: value - before[name] for name, value in after.items() if value != before[name]}
    assert moved == {
        'shortlist_rankings_total{way="retrieved"}': 1,
        'shortlist_rankings_total{way="starved"}': 1,  # the filter leaves too little for an index
    }


@pytest.mark.parametrize("is_measured", [True, False])
def test_a_version_that_falls_short_is_ranked_exactly(
    large: Settings, connect: Any, publish: Any, is_measured: bool
) -> None:
    recommender = publish("v1", MANY, activate=False)
    found = measured(recommender) if is_measured else None
    assert found is None or 0.1 < found["recall"] < 0.9  # type: ignore[operator]
    recommender = publish("v2", MANY, retrieval=found)
    with connect(create_app(large)) as client:
        assert shown(client, k=10) == exactly(recommender, 10, MANY)
        after = numbers(client)
    assert after["shortlist_version_retrieves"] == 0
    assert after['shortlist_rankings_total{way="scored"}'] > 0
    assert after['shortlist_rankings_total{way="retrieved"}'] == after['shortlist_rankings_total{way="starved"}'] == 0
