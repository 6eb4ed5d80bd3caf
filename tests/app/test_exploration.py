"""Exploration: the share that was set, probabilities that are true, and the same draw for the same answer."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.main import create_app
from app.serving import ranking
from app.serving.diversity import CategoryCap
from app.serving.exploration import Affinity, seed_of
from app.serving.filters import CategoryFilter
from app.serving.history import History
from app.serving.query import Query
from app.settings import Settings
from app.tables import recommendation_log

ITEMS = [f"item-{number:02}" for number in range(40)]
NEW = [f"new-{number}" for number in range(6)]

Exploring = Callable[..., TestClient]


@pytest.fixture
def exploring(settings: Settings, connect: Any) -> Iterator[Exploring]:
    """`exploring(exploration_share=0.2)` starts a service; below 1 interaction an item is rarely chosen."""
    clients: list[TestClient] = []

    def start(**changes: Any) -> TestClient:
        client: TestClient = connect(create_app(settings.model_copy(update={"exploration_below": 1} | changes)))
        client.__enter__()
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def click(client: TestClient, item_id: str, user_id: str) -> None:
    response = client.post("/feedback", json={"user_id": user_id, "item_id": item_id, "type": "click"})
    assert response.status_code == 201, response.text


def ask(client: TestClient, user_id: str = "anna", **parameters: Any) -> dict[str, Any]:
    response = client.get(f"/users/{user_id}/recommendations", params=parameters)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def prepared(client: TestClient, publish: Any, categories: dict[str, list[str]]) -> Any:
    """Every item the version knows was chosen, so that only the new ones are explored."""
    publish.catalogue([*ITEMS, *NEW], categories)
    recommender = publish("v1", ITEMS)
    events = [{"user_id": "crowd", "item_id": item_id, "type": "click"} for item_id in ITEMS]
    assert client.post("/feedback", json=events).status_code == 201
    client.app.state.service.poll()  # type: ignore[attr-defined]
    return recommender


def test_new_items_come_with_their_probability(exploring: Exploring, publish: Any, engine: Engine) -> None:
    client = exploring(exploration_share=0.25)
    # The history is all of "a": new-0 and new-1 weigh 10, the other four 1.
    recommender = prepared(client, publish, {"item-00": ["a"], "new-0": ["a"], "new-1": ["a", "b"], "new-2": ["b"]})
    click(client, "item-00", "anna")
    indices, _ = recommender.top_k(
        [0], [recommender.items.indices(["item-00"])], [recommender.items.indices(["item-00"])], 10
    )
    best = recommender.items.ids(indices[0])
    answers = [ask(client) for _ in range(200)]
    client.app.state.service.recommendation_log.stop()  # type: ignore[attr-defined]
    with engine.connect() as connection:
        rows = {row.recommendation_id: row for row in connection.execute(sa.select(recommendation_log))}
    first_draws, slots = Counter[str](), 0
    for answer in answers:
        row = rows[answer["recommendation_id"]]
        explored = [item for item in answer["items"] if item["exploration"]]
        assert row.explorations == [item["exploration"] for item in answer["items"]]
        assert row.scores == [item["score"] for item in answer["items"]]
        assert row.policy == "model+exploration"
        plain = [item["item_id"] for item in answer["items"] if not item["exploration"]]
        assert plain == best[: len(plain)]
        assert len(answer["items"]) == 10
        assert answer["items"][0]["exploration"] is False
        weights = dict.fromkeys(NEW, 1.0) | {"new-0": 10.0, "new-1": 10.0}
        for item, propensity in zip(answer["items"], row.propensities, strict=True):
            if not item["exploration"]:
                assert propensity == 1.0
                continue
            assert item["score"] is None
            assert propensity == pytest.approx(weights[item["item_id"]] / sum(weights.values()))
            del weights[item["item_id"]]
        assert len(explored) in (2, 3)
        slots += len(explored)
        first_draws[explored[0]["item_id"]] += 1
    # A quarter of 2,000 places; by chance each answer has 2 or 3, so that the deviation is sqrt(200)/2 = 7.
    assert abs(slots - 500) < 36
    # 20 of 24 first draws fall on the two of the user's category: 167 of 200, deviation 5.3.
    assert abs(first_draws["new-0"] + first_draws["new-1"] - 167) < 27


def test_the_same_answer_explores_the_same(exploring: Exploring, publish: Any) -> None:
    client = exploring(exploration_share=0.3)
    recommender = prepared(client, publish, {})
    service = client.app.state.service  # type: ignore[attr-defined]
    catalog, explorer = service.catalog, service.ranker._explorer
    best = recommender.items.ids(recommender.top_k([0], [[]], [[]], 10)[0][0])

    def draw(list_id: bytes, offset: int = 0) -> list[Any]:
        draws: list[Any] = explorer.draw(
            seed=seed_of(list_id, offset),
            k=10,
            ranked=best,
            version=service.active_models.current,
            may_come=catalog.visible,
            affinity=Affinity(catalog, History()),
            cap=CategoryCap(catalog, None),
        )
        return draws

    first = ask(client)
    # What the answer, and so the log, says is enough to draw again.
    again = draw(UUID(first["recommendation_id"]).bytes)
    explored = [(item["rank"] - 1, item["item_id"]) for item in first["items"] if item["exploration"]]
    assert [(drawn.place, drawn.item_id) for drawn in again] == explored
    assert draw(bytes(16)) != draw(bytes(16), offset=10) != draw(bytes(15) + b"1", offset=10)
    # A page is the same however often it is asked for, and what was explored before does not come again.
    pages = [ask(client, cursor=first["next_cursor"]) for _ in range(3)]
    assert pages[0]["items"] == pages[1]["items"] == pages[2]["items"]
    listed, answer = [item["item_id"] for item in first["items"]], first
    while answer["next_cursor"] is not None:
        answer = ask(client, cursor=answer["next_cursor"])
        listed += [item["item_id"] for item in answer["items"]]
    assert sorted(listed) == sorted([*ITEMS, *NEW])


def test_filters_hold_for_what_is_explored(exploring: Exploring, publish: Any) -> None:
    client = exploring(exploration_share=0.5)
    prepared(client, publish, {item_id: ["new"] for item_id in NEW} | {item_id: ["old"] for item_id in ITEMS})
    publish.hide("new-0")
    click(client, "new-1", "anna")
    came = Counter[str]()
    for _ in range(20):
        answer = ask(client, exclude=["new-2"])
        came.update(item["item_id"] for item in answer["items"] if item["exploration"])
        assert not any(item["exploration"] for item in ask(client, category="old")["items"])
        capped = [item["item_id"] for item in ask(client, max_per_category=2)["items"]]
        assert sum(item in NEW for item in capped) <= 2
        assert len(capped) <= 4
    assert set(came) == {"new-3", "new-4", "new-5"}


def test_caps_hold_where_they_leave_less_to_draw_than_was_meant(exploring: Exploring, publish: Any) -> None:
    client = exploring(exploration_share=0.5)
    recommender = prepared(client, publish, {item_id: [f"of {item_id}"] for item_id in ITEMS})
    ranked = [item["item_id"] for item in ask(client, k=40)["items"] if item["item_id"] in ITEMS]
    assert ranked == recommender.items.ids(recommender.top_k([0], [[]], [[]], 40)[0][0])[: len(ranked)]
    # One that five draws would push out, and all that can be drawn: only one of them may come.
    publish.put_all([ranked[7], *NEW], ["shared"])
    client.app.state.service.poll()  # type: ignore[attr-defined]
    for _ in range(5):
        answer = [item["item_id"] for item in ask(client, k=10, max_per_category=1)["items"]]
        assert len({ranked[7], *NEW} & set(answer)) == 1


def test_rarely_chosen_items_are_explored_with_their_scores(exploring: Exploring, publish: Any) -> None:
    client = exploring(exploration_share=0.4)
    recommender = publish("v1", ITEMS)
    events = [{"user_id": "crowd", "item_id": item_id, "type": "click"} for item_id in ITEMS[:-2]]
    assert client.post("/feedback", json=events).status_code == 201
    client.app.state.service.poll()  # type: ignore[attr-defined]
    encoded = recommender.encode([0], [[]])
    for _ in range(5):
        for item in ask(client)["items"]:
            index = recommender.items.index(item["item_id"])
            assert item["score"] == pytest.approx(float(recommender.score_items(encoded, [[index]])[0, 0]), rel=1e-5)
            assert not item["exploration"] or item["item_id"] in ITEMS[-2:]
        popular = ask(client, "a stranger")
        explored = {item["item_id"] for item in popular["items"] if item["exploration"]}
        assert (popular["source"], len(popular["items"])) == ("popular", 10)
        assert explored == set(ITEMS[-2:])


def test_one_place_is_never_given_away(exploring: Exploring, publish: Any) -> None:
    client = exploring(exploration_share=0.5)
    prepared(client, publish, {})
    assert not any(ask(client, k=1)["items"][0]["exploration"] for _ in range(10))


def test_unseen_items_fill_what_the_version_cannot(client: TestClient, publish: Any) -> None:
    prepared(client, publish, {"item-00": ["a"], "item-01": ["b"], "new-0": ["b"], "new-1": ["a"], "new-2": ["b", "a"]})
    click(client, "item-00", "anna")
    assert ask(client, category="a")["source"] == "popular"  # of which the version has nothing left to rank
    answer = ask(client, category="b")
    assert answer["source"] == "model"
    # One of a category of the history comes first.
    assert [item["item_id"] for item in answer["items"]] == ["item-01", "new-2", "new-0"]
    assert [item["score"] is None for item in answer["items"]] == [False, True, True]
    assert not any(item["exploration"] for item in answer["items"])
    answer = ask(client, categories_any=["a", "b"], k=2)
    rest = ask(client, categories_any=["a", "b"], k=2, cursor=answer["next_cursor"])
    assert [item["item_id"] for item in answer["items"] + rest["items"]] == ["item-01", "new-2", "new-1", "new-0"]
    assert rest["next_cursor"] is None


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_looking_at_many_unseen_items_is_not_quick(
    client: TestClient, publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("v1", ITEMS)
    ranker = client.app.state.service.ranker  # type: ignore[attr-defined]
    rare = Query(categories=CategoryFilter(all=frozenset(["rare"])))
    for count, quick in ((1_000, True), (1_001, False)):
        publish.catalogue([f"new-{number}" for number in range(count)])
        client.app.state.service.poll()  # type: ignore[attr-defined]
        ask(client)
        # The list of a category may end in any of them; that of all items does not come so far.
        assert (ranker.is_quick(rare), ranker.is_quick(Query())) == (quick, True)
    # Nor does it matter to it how many items the catalogue has that the version does not know.
    monkeypatch.setattr(ranking, "QUICK_CATALOG", 10)
    assert (ranker.is_quick(rare), ranker.is_quick(Query())) == (False, True)
