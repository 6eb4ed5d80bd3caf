"""What a user is shown: ranked by the active version and what the user did up to the request."""

from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.routes.recommendations import Recommendations
from app.tables import recommendation_log

ITEMS = [f"item-{number:02}" for number in range(40)]


def activated(client: TestClient) -> None:
    """As the follower does every `model_poll_seconds`."""
    client.app.state.service.poll()  # type: ignore[attr-defined]


def recommend(client: TestClient, user_id: str = "anna", **parameters: Any) -> dict[str, Any]:
    response = client.get(f"/users/{user_id}/recommendations", params=parameters)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    Recommendations.model_validate(answer)
    assert [item["rank"] for item in answer["items"]] == list(range(1, len(answer["items"]) + 1))
    return answer


def shown(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def click(client: TestClient, item_id: str, user_id: str = "anna", **fields: Any) -> str:
    event = {"user_id": user_id, "item_id": item_id, "type": "click"} | fields
    response = client.post("/feedback", json=event)
    assert response.status_code == 201, response.text
    event_id: str = response.json()["results"][0]["event_id"]
    return event_id


def expected(recommender: Any, user: int, history: list[str], k: int, excluded: list[str] | None = None) -> list[str]:
    out = history if excluded is None else excluded
    indices, _ = recommender.top_k([user], [recommender.items.indices(history)], [recommender.items.indices(out)], k)
    found: list[str] = recommender.items.ids(indices[0][indices[0] >= 0])
    return found


def test_the_contract(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS, trained_through="2026-11-21T09:30:00.000000Z")
    activated(client)
    answer = recommend(client, k=3)
    assert set(answer) == {
        "user_id",
        "recommendation_id",
        "items",
        "source",
        "model_version",
        "data_through",
        "feedback_through",
        "next_cursor",
    }
    assert all(set(item) == {"item_id", "score", "rank", "exploration"} for item in answer["items"])
    assert (answer["user_id"], answer["source"], answer["model_version"]) == ("anna", "model", "v1")
    assert answer["data_through"] == "2026-11-21T09:30:00.000000Z"
    assert answer["feedback_through"] is None
    assert isinstance(answer["next_cursor"], str)


def test_the_next_answer_knows_the_feedback(client: TestClient, publish: Any) -> None:
    recommender = publish("v1", ITEMS)
    activated(client)
    history: list[str] = []
    seen_orders = set()
    for _ in range(6):
        answer = recommend(client, k=10)
        assert answer["source"] == "model"
        assert shown(answer) == expected(recommender, 0, history, 10)
        seen_orders.add(tuple(shown(answer)[1:4]))
        through = answer["feedback_through"]
        click(client, shown(answer)[0])
        history.append(shown(answer)[0])
        assert (recommend(client)["feedback_through"] or 0) > (through or 0)
    assert len(seen_orders) == 6  # Caser ranks anew each time


def test_history_is_in_order_of_time_and_arrival(client: TestClient, publish: Any) -> None:
    recommender = publish("v1", ITEMS)
    activated(client)
    times = [
        ("item-03", "2026-01-03T00:00:00Z"),
        ("item-01", "2026-01-01T00:00:00Z"),
        ("item-02", "2026-01-03T00:00:00Z"),
    ]
    for item_id, time in times:
        click(client, item_id, occurred_at=time)
    assert shown(recommend(client)) == expected(recommender, 0, ["item-01", "item-03", "item-02"], 10)


def test_what_events_mean(client: TestClient, publish: Any) -> None:
    recommender = publish("v1", ITEMS)
    activated(client)
    click(client, "item-01")
    click(client, "item-02", type="impression")
    click(client, "item-03", type="dislike")
    taken_back = click(client, "item-04")
    click(client, "item-04", type="retract", retracts=taken_back)
    answer = recommend(client, k=40)
    assert shown(answer) == expected(recommender, 0, ["item-01"], 40, excluded=["item-01", "item-03"])
    again = recommend(client, k=40, include_seen=True)
    assert shown(again) == expected(recommender, 0, ["item-01"], 40, excluded=[])


def test_a_user_unseen_in_training_is_folded_in_or_gets_popular_items(client: TestClient, publish: Any) -> None:
    recommender = publish("v1", ITEMS)
    activated(client)
    assert recommend(client, "carla")["source"] == "popular"
    click(client, "item-05", "carla")
    answer = recommend(client, "carla")
    assert (answer["source"], answer["model_version"]) == ("folded_in", "v1")
    assert shown(answer) == expected(recommender, -1, ["item-05"], 10)
    click(client, "an item nobody trained on", "dora")
    assert recommend(client, "dora")["source"] == "popular"


@pytest.mark.parametrize("model", ["neumf", "matrix_factorization", "popularity"])
def test_every_model_folds_in(client: TestClient, publish: Any, model: str) -> None:
    recommender = publish("v1", ITEMS, model=model)
    activated(client)
    click(client, "item-05", "carla")
    answer = recommend(client, "carla")
    assert (answer["source"], answer["model_version"]) == ("folded_in", "v1")
    assert shown(answer) == expected(recommender, -1, ["item-05"], 10)
    assert recommend(client, "ben")["source"] == "model"


@pytest.mark.parametrize("model", ["neumf", "matrix_factorization"])
def test_what_came_after_the_training_moves_a_user_with_a_row(client: TestClient, publish: Any, model: str) -> None:
    recommender = publish("v1", ITEMS, model=model, trained_through="2026-03-01T00:00:00.000000Z")
    activated(client)
    numbers = recommender.items.indices

    def ranked(history: list[str], fresh: int, k: int) -> list[str]:
        encoded = recommender.encode([0], [numbers(history)], [fresh])
        indices, _ = recommender.top(encoded, [numbers(history)], k)
        found: list[str] = recommender.items.ids(indices[0])
        return found

    click(client, "item-05", occurred_at="2026-02-28T00:00:00Z")  # the row knows it
    assert shown(recommend(client)) == expected(recommender, 0, ["item-05"], 10) == ranked(["item-05"], 0, 10)
    click(client, "item-07", occurred_at="2026-03-02T00:00:00Z")
    click(client, "item-09", occurred_at="2026-03-03T00:00:00Z")
    history = ["item-05", "item-07", "item-09"]
    first = recommend(client)
    assert first["source"] == "model"
    assert shown(first) == ranked(history, 2, 10) != expected(recommender, 0, history, 10)
    assert shown(recommend(client, cursor=first["next_cursor"])) == ranked(history, 2, 20)[10:]


def test_filters(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS, {item_id: ["even", "all"] for item_id in ITEMS[::2]})
    recommender = publish("v1", ITEMS)
    activated(client)
    every = shown(recommend(client, k=40))
    assert every == expected(recommender, 0, [], 40)
    assert shown(recommend(client, k=40, category="even")) == [item for item in every if item in ITEMS[::2]]
    left = [item for item in every if item not in every[:3]]
    assert shown(recommend(client, k=40, exclude=[*every[:3], "nobody knows this"])) == left
    body = {"k": 5, "exclude": [*every[:3], *(f"unknown-{number}" for number in range(9_997))]}
    response = client.post("/users/anna/recommendations", json=body)
    assert response.status_code == 200
    assert shown(response.json()) == left[:5]


def test_filters_by_several_categories(client: TestClient, publish: Any) -> None:
    of = {item: [f"by {step}" for step in (2, 3, 5) if number % step == 0] for number, item in enumerate(ITEMS)}
    publish.catalogue([*ITEMS, "unseen"], of | {"unseen": ["by 2", "by 3"]})
    publish("v1", ITEMS)
    activated(client)

    def numbers(user_id: str, **filters: Any) -> set[int]:
        answer = recommend(client, user_id, k=50, **filters)
        assert answer["source"] == ("model" if user_id == "anna" else "popular")
        return {ITEMS.index(item) for item in shown(answer) if item != "unseen"}

    every = set(range(40))
    for user_id in ("anna", "a stranger"):
        by_2, by_3, by_5 = (set(range(0, 40, step)) for step in (2, 3, 5))
        assert numbers(user_id, categories_any=["by 3", "by 5"]) == by_3 | by_5
        assert numbers(user_id, categories_all=["by 3", "by 2"]) == by_2 & by_3
        assert numbers(user_id, category="by 2", categories_all=["by 3"]) == by_2 & by_3
        assert numbers(user_id, categories_none=["by 2", "by 3"]) == every - by_2 - by_3
        assert numbers(user_id, categories_any=["by 2", "by 3"], categories_none=["by 5"]) == (by_2 | by_3) - by_5
        assert numbers(user_id, categories_any=["nobody has this", "by 5"]) == by_5
        assert numbers(user_id, category="by 2", categories_any=["by 3"], categories_none=["by 5"]) == {
            number for number in every if number % 2 == 0 and number % 3 == 0 and number % 5
        }
    answer = recommend(client, categories_all=["by 2", "nobody has this"])
    assert (answer["source"], answer["items"]) == ("empty", [])
    assert answer["reason"].endswith("has all of the categories 'by 2', 'nobody has this'")


def test_filters_follow_the_catalogue(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS, {item_id: ["first"] for item_id in ITEMS[:5]})
    publish("v1", ITEMS)
    activated(client)

    def of_both() -> list[str]:
        assert set(shown(recommend(client, k=40, categories_none=["first"]))) == set(ITEMS) - first
        found = sorted(item for item in shown(recommend(client, k=40, category="first")) if item in ITEMS)
        popular = shown(recommend(client, "a stranger", k=40, category="first"))
        assert found == sorted(item for item in popular if item in ITEMS)
        return found

    first = set(ITEMS[:5])
    assert of_both() == ITEMS[:5]
    publish.hide("item-00")  # by another process, as all that follows
    first |= {"item-00"}
    assert of_both() == ITEMS[1:5]
    publish.put("item-30", ["first", "second"])
    publish.put("item-01", ["second"])
    publish.put("a new one that the version does not know", ["first"])
    first = {"item-00", "item-02", "item-03", "item-04", "item-30"}
    assert of_both() == ["item-02", "item-03", "item-04", "item-30"]
    assert shown(recommend(client, k=40, categories_all=["first", "second"])) == ["item-30"]


def test_an_empty_answer_says_why(client: TestClient, publish: Any) -> None:
    assert "holds no item" in recommend(client)["reason"]
    publish("v1", ITEMS[:3])
    activated(client)
    answer = recommend(client, category="nobody has this")
    assert (answer["source"], answer["items"]) == ("empty", [])
    assert "'nobody has this'" in answer["reason"]
    for item_id in ITEMS[:3]:
        click(client, item_id)
    answer = recommend(client)
    assert (answer["source"], answer["items"], answer["model_version"]) == ("empty", [], None)
    assert "seen by this user or excluded" in answer["reason"]
    assert "reason" not in recommend(client, include_seen=True)


def test_fewer_than_asked_for(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS[:3])
    activated(client)
    assert sorted(shown(recommend(client, k=1000))) == ITEMS[:3]


def test_hidden_items_leave_at_once(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    activated(client)
    first = shown(recommend(client))[0]
    assert first in [item["item_id"] for item in client.get("/popular", params={"k": 40}).json()["items"]]
    publish.hide(first)  # by another process: nothing tells this one
    assert first not in shown(recommend(client, k=40))
    assert first not in shown(recommend(client, "somebody new", k=40))
    assert first not in [item["item_id"] for item in client.get("/popular", params={"k": 40}).json()["items"]]


def test_bad_parameters_are_named(client: TestClient) -> None:
    for parameters, field in [
        ({"k": 0}, "query.k"),
        ({"k": 1_000_000}, "query.k"),
        ({"k": "ten"}, "query.k"),
        ({"category": "\0"}, "query.category"),
        ({"exclude": ["fine", "\0"]}, "query.exclude.1"),
        ({"include_seen": "perhaps"}, "query.include_seen"),
        ({"explain": "maybe"}, "query.explain"),  # what does not exist yet is not passed over
        ({"cursor": "x"}, "query.cursor"),
        ({"diversity": 1.5}, "query.diversity"),
        ({"diversity": "nan"}, "query.diversity"),
        ({"max_per_category": 0}, "query.max_per_category"),
        ({"categories_any": ["fine", "a|b"]}, "query.categories_any.1"),
        ({"categories_none": [str(number) for number in range(51)]}, "query.categories_none"),
    ]:
        response = client.get("/users/anna/recommendations", params=parameters)  # type: ignore[arg-type]
        assert response.status_code == 422, parameters
        assert response.headers["content-type"] == "application/problem+json"
        assert [error["field"] for error in response.json()["errors"]] == [field]
    too_many = {"exclude": [str(number) for number in range(10_001)]}
    response = client.post("/users/anna/recommendations", json=too_many)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "body.exclude")
    response = client.get(f"/users/{'x' * 256}/recommendations")
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "path.user_id")


def test_the_log_holds_what_was_shown(client: TestClient, publish: Any, engine: Engine) -> None:
    publish("v1", ITEMS)
    activated(client)
    click(client, "item-01")
    answers = [recommend(client, k=4, exclude=["item-02"]), recommend(client, "somebody new")]
    client.app.state.service.recommendation_log.stop()  # type: ignore[attr-defined]
    with engine.connect() as connection:
        rows = {row.recommendation_id: row for row in connection.execute(sa.select(recommendation_log))}
    assert len(rows) == 2
    for answer in answers:
        row = rows[answer["recommendation_id"]]
        assert (row.user_id, row.source, row.model_version) == (
            answer["user_id"],
            answer["source"],
            answer["model_version"],
        )
        assert row.item_ids == shown(answer)
        assert row.scores == [item["score"] for item in answer["items"]]
        assert row.feedback_through == answer["feedback_through"]
        assert row.propensities == [1.0] * len(row.item_ids)
        assert row.explorations == [False] * len(row.item_ids)
        assert (row.surface, row.experiment, row.variant) == ("recommendations", None, None)
    by_model = rows[answers[0]["recommendation_id"]]
    assert by_model.filters == {
        "k": 4,
        "categories_any": [],
        "categories_all": [],
        "categories_none": [],
        "exclude": ["item-02"],
        "include_seen": False,
        "diversity": 0.0,
        "max_per_category": None,
    }
    assert (by_model.policy, by_model.candidate_count) == ("model", 38)


def test_popular_counts_interactions(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS[:4], {"item-01": ["crime"], "item-03": ["crime"]})
    for user in range(3):
        click(client, "item-03", f"user-{user}")
    for user in range(2):
        click(client, "item-01", f"user-{user}")
        click(client, "item-02", f"user-{user}", type="impression")
    taken_back = click(client, "item-00", "user-0")
    activated(client)
    found = client.get("/popular").json()["items"]
    assert [(item["item_id"], item["score"], item["rank"]) for item in found] == [
        ("item-03", 3, 1),
        ("item-01", 2, 2),
        ("item-00", 1, 3),
        ("item-02", 0, 4),
    ]
    click(client, "item-00", "user-0", type="retract", retracts=taken_back)
    activated(client)
    click(client, "item-00", "user-7")
    click(client, "item-00", "user-0", type="retract", retracts=taken_back)  # again: that changes nothing
    click(client, "item-01", "user-5")
    click(client, "item-01", "user-6")
    activated(client)
    found = client.get("/popular", params={"k": 3}).json()["items"]
    assert [(item["item_id"], item["score"]) for item in found] == [("item-01", 4), ("item-03", 3), ("item-00", 1)]
    found = client.get("/popular", params={"category": "crime"}).json()["items"]
    assert [item["item_id"] for item in found] == ["item-01", "item-03"]
    answer = recommend(client, "user-0")
    assert (answer["source"], shown(answer)) == ("popular", ["item-00", "item-02"])
