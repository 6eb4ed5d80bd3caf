"""Popular, trending and latest items: by category and window, in step with events and catalogue."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.routes.popular import Chart
from app.tables import recommendation_log

ITEMS = ("dune", "alien", "solaris", "heat")


def ask(client: TestClient, surface: str, **parameters: Any) -> dict[str, Any]:
    response = client.get(f"/{surface}", params=parameters)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    Chart.model_validate(answer)
    assert [item["rank"] for item in answer["items"]] == list(range(1, len(answer["items"]) + 1))
    assert answer["source"] == (surface if answer["items"] else "empty")
    assert ("reason" in answer) == (not answer["items"])
    return answer


def scores(client: TestClient, surface: str, **parameters: Any) -> dict[str, float]:
    return {item["item_id"]: item["score"] for item in ask(client, surface, **parameters)["items"]}


def happen(client: TestClient, item_id: str, times: int, hours_ago: float, **fields: Any) -> list[str]:
    moment = datetime.now(UTC) - timedelta(hours=hours_ago)
    rows = [
        {"user_id": f"u{n}", "item_id": item_id, "type": "click", "occurred_at": moment.isoformat(), **fields}
        for n in range(times)
    ]
    response = client.post("/feedback", json=rows)
    assert response.status_code == 201, response.text
    return [result["event_id"] for result in response.json()["results"]]


def followed(client: TestClient) -> None:
    """As the follower does every `model_poll_seconds`; on PostgreSQL once no older transaction (of the log) is open."""
    for _ in range(3):
        client.app.state.service.poll()  # type: ignore[attr-defined]


def test_popular_by_window(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS)
    first = happen(client, "dune", 3, hours_ago=5)
    happen(client, "alien", 4, hours_ago=60)
    happen(client, "solaris", 5, hours_ago=24 * 40)
    happen(client, "heat", 9, hours_ago=2, type="impression")
    followed(client)
    assert scores(client, "popular") == {"solaris": 5, "alien": 4, "dune": 3, "heat": 0}
    assert scores(client, "popular", window_hours=24 * 28) == {"alien": 4, "dune": 3}
    assert scores(client, "popular", window_hours=24) == {"dune": 3}
    # What comes later counts with what was there; what is taken back does not, however often.
    happen(client, "dune", 2, hours_ago=60)
    for _ in range(2):
        event = {"user_id": "u0", "type": "retract", "retracts": first[0]}
        assert client.post("/feedback", json=event).status_code == 201
    followed(client)
    assert scores(client, "popular", window_hours=24 * 28) == {"alien": 4, "dune": 4}
    assert [item["item_id"] for item in ask(client, "popular", window_hours=100)["items"]] == ["alien", "dune"]
    assert scores(client, "popular", window_hours=24) == {"dune": 2}
    assert client.delete("/items/dune").status_code == 204
    followed(client)
    assert scores(client, "popular", window_hours=24 * 28) == {"alien": 4}


def test_trending_is_growth_in_standard_deviations(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS)
    happen(client, "dune", 4, hours_ago=3)  # nothing before: (4 - 0) / sqrt(0 + 1)
    happen(client, "alien", 3, hours_ago=3)
    happen(client, "alien", 3, hours_ago=40)  # one a window expected, a little more in the hour that has begun
    happen(client, "solaris", 6, hours_ago=3)
    happen(client, "solaris", 36, hours_ago=40)  # twelve expected: falling
    followed(client)
    found = scores(client, "trending")
    assert list(found) == ["dune", "alien"]
    assert found["dune"] == 4
    expected = [(3 - e) / (e + 1) ** 0.5 for e in (25 / 24, 1)]
    assert expected[0] <= found["alien"] <= expected[1]
    assert list(scores(client, "trending", window_hours=168)) == ["solaris", "alien", "dune"]


def test_latest_follows_the_catalogue(client: TestClient) -> None:
    for item_id in ITEMS:
        assert client.put(f"/items/{item_id}", json={"categories": ["film"]}).status_code in (200, 201)
    found = scores(client, "latest")
    assert list(found) == list(reversed(ITEMS))
    assert all(abs(score - datetime.now(UTC).timestamp()) < 600 for score in found.values())
    assert client.put("/items/a new one", json={}).status_code == 201
    assert client.put("/items/heat", json={"hidden": True}).status_code == 200
    assert list(scores(client, "latest")) == ["a new one", "solaris", "alien", "dune"]
    assert list(scores(client, "latest", k=2)) == ["a new one", "solaris"]
    assert list(scores(client, "latest", categories_any="film", window_hours=1)) == ["solaris", "alien", "dune"]


@pytest.mark.parametrize("surface", ["popular", "trending", "latest"])
def test_categories_hidden_items_and_reasons(client: TestClient, publish: Any, surface: str) -> None:
    assert "holds no item" in ask(client, surface)["reason"]
    publish.catalogue(ITEMS, {"dune": ["film", "old"], "alien": ["film"], "heat": ["old"]})
    for item_id in ITEMS:
        happen(client, item_id, 2, hours_ago=1)
    followed(client)
    assert set(scores(client, surface, category="film")) == {"dune", "alien"}
    assert set(scores(client, surface, categories_any=["film", "old"])) == {"dune", "alien", "heat"}
    assert set(scores(client, surface, categories_all=["film", "old"])) == {"dune"}
    assert set(scores(client, surface, categories_none="film", window_hours=2)) == {"solaris", "heat"}
    assert "'nobody has this'" in ask(client, surface, category="nobody has this")["reason"]
    publish.hide("dune")
    followed(client)
    assert set(scores(client, surface, category="film")) == {"alien"}


def test_a_window_in_which_nothing_happened(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS)
    followed(client)
    assert "was chosen in the last 3 hours" in ask(client, "popular", window_hours=3)["reason"]
    assert "more often than before" in ask(client, "trending")["reason"]


@pytest.mark.parametrize(
    ("surface", "hours"),
    [("popular", 0), ("popular", 673), ("trending", 169), ("latest", -1), ("latest", 10_000), ("latest", "a day")],
)
def test_windows_out_of_range(client: TestClient, surface: str, hours: object) -> None:
    response = client.get(f"/{surface}", params={"window_hours": hours})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "query.window_hours"


def test_every_chart_is_logged_for_nobody(client: TestClient, publish: Any, engine: Engine) -> None:
    publish.catalogue(ITEMS)
    answers = {surface: ask(client, surface, k=2, category="film") for surface in ("popular", "trending", "latest")}
    client.app.state.service.recommendation_log.stop()  # type: ignore[attr-defined]
    with engine.connect() as connection:
        rows = {row.surface: row for row in connection.execute(sa.select(recommendation_log))}
    for surface, answer in answers.items():
        assert rows[surface].recommendation_id == answer["recommendation_id"]
        assert (rows[surface].user_id, rows[surface].source) == ("", answer["source"])
        assert rows[surface].filters["categories_all"] == ["film"]
