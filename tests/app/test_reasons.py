"""Why each item of an answer is there."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.routes.recommendations import Recommendations
from app.settings import Settings
from ml.explain import explain

ITEMS = [f"item-{number:02}" for number in range(30)]


def activated(client: TestClient) -> None:
    """As the follower does every `model_poll_seconds`."""
    client.app.state.service.poll()  # type: ignore[attr-defined]


def recommend(client: TestClient, user_id: str = "anna", **parameters: Any) -> dict[str, Any]:
    response = client.get(f"/users/{user_id}/recommendations", params={"explain": True, **parameters})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    Recommendations.model_validate(answer)
    return answer


def click(client: TestClient, item_id: str, user_id: str = "anna") -> None:
    event = {"user_id": user_id, "item_id": item_id, "type": "click"}
    assert client.post("/feedback", json=event).status_code == 201


@pytest.mark.parametrize(("model", "method"), [("caser", "leave_one_out"), ("neumf", "fold_in")])
def test_items_of_the_history_that_raised_the_score(client: TestClient, publish: Any, model: str, method: str) -> None:
    recommender = publish("v1", ITEMS, model=model)
    activated(client)
    history = [3, 9, 4, 8]
    for user_id, user_index in (("anna", 0), ("a stranger", -1)):
        for number in history:
            click(client, ITEMS[number], user_id)
        answer = recommend(client, user_id, k=5)
        found = explain(recommender, user_index, history, [ITEMS.index(item["item_id"]) for item in answer["items"]])
        for item, influences in zip(answer["items"], found.influences, strict=True):
            assert item["reason"]["method"] == method
            because = {one["item_id"]: one["effect"] for one in item["reason"]["because"]}
            assert because == pytest.approx({ITEMS[one.item]: one.effect for one in influences}, rel=1e-4)
    session = client.post(
        "/sessions/recommendations", json={"items": [ITEMS[number] for number in history], "k": 5, "explain": True}
    ).json()
    strangers = recommend(client, "a stranger", k=5)["items"]
    assert [item["item_id"] for item in session["items"]] == [item["item_id"] for item in strangers]
    for one, other in zip(session["items"], strangers, strict=True):
        effects = [{it["item_id"]: it["effect"] for it in item["reason"]["because"]} for item in (one, other)]
        assert effects[0] == pytest.approx(effects[1], rel=1e-4)


def test_further_pages_and_hidden_items(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    activated(client)
    for number in (3, 9, 4):
        click(client, ITEMS[number])
    first = recommend(client, k=5)
    second = recommend(client, k=5, cursor=first["next_cursor"])
    assert any(item["reason"]["because"] for item in second["items"])
    publish.hide("item-09")
    activated(client)
    answer = recommend(client, k=20)
    named = {one["item_id"] for item in answer["items"] for one in item["reason"]["because"]}
    assert named
    assert named <= {"item-03", "item-04"}


def test_other_reasons(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS[:5])
    publish.catalogue(["new"])
    activated(client)
    popular = recommend(client, "a stranger")
    assert popular["source"] == "popular"
    assert {item["reason"]["method"] for item in popular["items"]} == {"popularity"}
    reasons = {item["item_id"]: item["reason"] for item in recommend(client, k=10)["items"]}
    assert reasons["new"] == {"method": "unseen", "because": []}
    assert reasons["item-00"] == {"method": "leave_one_out", "because": []}  # nothing happened yet
    without = client.get("/users/anna/recommendations").json()
    assert all("reason" not in item for item in without["items"])


def test_what_chance_put_there_says_so(settings: Settings, publish: Any, connect: Any) -> None:
    publish("v1", ITEMS)
    with connect(create_app(settings.model_copy(update={"exploration_share": 0.5}))) as client:
        click(client, "item-03")
        activated(client)
        items = [item for _ in range(5) for item in recommend(client, k=10)["items"]]
    assert any(item["exploration"] for item in items)
    assert all((item["reason"]["method"] == "exploration") == item["exploration"] for item in items)


def test_an_item_that_was_erased_between_two_pages(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    activated(client)
    for number in (3, 9):
        click(client, ITEMS[number], "a stranger")
    cursor = recommend(client, "a stranger", k=5)["next_cursor"]

    def named() -> set[str]:
        items = recommend(client, "a stranger", k=20, cursor=cursor)["items"]
        return {one["item_id"] for item in items for one in item["reason"]["because"]}

    assert named() == {ITEMS[3], ITEMS[9]}
    assert client.delete(f"/items/{ITEMS[3]}").is_success
    assert client.put(f"/items/{ITEMS[3]}", json={"title": "another thing"}).is_success
    assert named() == {ITEMS[9]}  # nobody took what stands under the id now
