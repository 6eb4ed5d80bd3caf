"""What is long is answered like the rest: a history of 100,000, 10,000 exclusions, 1,000 diverse items."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from app.database import writing
from app.main import create_app
from app.settings import Settings
from app.tables import events

ITEMS = [f"item-{number:04}" for number in range(3_000)]
LENGTH = 100_000


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_long_histories_and_filters(engine: Engine, settings: Settings, connect: Any, publish: Any) -> None:
    recommender = publish("v1", ITEMS)
    history = [ITEMS[position * 7 % 2_000] for position in range(LENGTH)]  # two thirds of the catalogue, over and over
    began = datetime(2026, 1, 1, tzinfo=UTC)
    with writing(engine) as connection:
        rows = [
            {"user_id": "anna", "event_id": f"e-{position}", "item_id": item_id, "type": "click", "occurred_at": at}
            | {"received_at": at}
            for position, item_id in enumerate(history)
            for at in [began + timedelta(seconds=position)]
        ]
        connection.execute(sa.insert(events), rows)

    def ask(k: int = 10, **body: Any) -> dict[str, Any]:
        response = client.post("/users/anna/recommendations", json={"k": k} | body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def shown(answer: dict[str, Any]) -> list[str]:
        return [item["item_id"] for item in answer["items"]]

    def best(k: int) -> list[str]:
        seen, left_out = recommender.items.indices(history[-50:]), recommender.items.indices(ITEMS[:2_000])
        found: list[str] = recommender.items.ids(recommender.top_k([0], [seen], [left_out], k)[0][0])
        return found

    with connect(create_app(settings)) as client:
        client.app.state.service.poll()
        first = ask()
        assert (first["source"], shown(first)) == ("model", best(10))
        assert first["feedback_through"] == LENGTH
        event = {"user_id": "anna", "item_id": shown(first)[0], "type": "click"}
        assert client.post("/feedback", json=event).status_code == 201
        second = ask(cursor=first["next_cursor"])
        assert shown(second) == best(20)[10:]
        history.append(shown(first)[0])
        left = [item for item in best(1_000) if item != history[-1]]
        assert shown(ask(1_000)) == left
        unknown = [f"nobody knows {number}" for number in range(9_990)]
        answer = ask(exclude=[*left[:10], *unknown])
        assert shown(answer) == left[10:20]
        again = ask(exclude=[*left[:10], *unknown], cursor=answer["next_cursor"])
        assert shown(again) == left[20:30]
        diverse = shown(ask(1_000, diversity=1.0))
        assert sorted(diverse) == sorted(left)
        assert ask(categories_any=[f"category {number}" for number in range(50)])["source"] == "empty"
        assert "was seen by this user" in ask(exclude=left)["reason"]
