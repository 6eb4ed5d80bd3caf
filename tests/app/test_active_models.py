"""Which version answers: loaded beside the old one, swapped whole, and never a damaged one."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.database import writing
from app.erasure import erase
from app.settings import Settings
from app.training import promotion
from ml.store import FolderStore, open_store

ITEMS = [f"item-{number:02}" for number in range(30)]


def poll(client: TestClient) -> None:
    client.app.state.service.poll()  # type: ignore[attr-defined]


def recommend(client: TestClient, user_id: str = "anna", **parameters: Any) -> dict[str, Any]:
    response = client.get(f"/users/{user_id}/recommendations", params=parameters)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def shown(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def test_the_follower_notices_what_another_process_activated(client: TestClient, publish: Any) -> None:
    assert client.get("/health/ready").json()["active_version"] is None
    publish("v1", ITEMS)
    swapped = threading.Event()
    models = client.app.state.service.active_models  # type: ignore[attr-defined]
    while models.current is None:
        swapped.wait(0.01)
    assert recommend(client)["model_version"] == "v1"
    publish("v2", ITEMS, model="neumf")
    while models.current.version != "v2":
        swapped.wait(0.01)
    assert recommend(client)["model_version"] == "v2"
    assert client.get("/health/ready").json()["active_version"] == "v2"


def test_requests_during_swaps_never_fail_and_never_mix(
    client: TestClient, publish: Callable[..., Any], engine: Engine
) -> None:
    # Every version knows items of its own alone, so that a mixed answer would show.
    versions = {f"v{number}" + "x" * number: [f"{number}-{item}" for item in ITEMS] for number in range(3)}
    for version, items in versions.items():
        publish(version, items)
    poll(client)
    answers: list[dict[str, Any]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(recommend(client))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for swap in range(15):
            with writing(engine) as connection:
                promotion.activate(connection, list(versions)[swap % 3], actor="test", reason="test")
            poll(client)
            before = len(answers)
            while len(answers) < before + 8 and any(thread.is_alive() for thread in threads):
                stop.wait(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {answer["model_version"] for answer in answers} == set(versions)
    for answer in answers:
        assert len(answer["items"]) == 10
        assert set(shown(answer)) <= set(versions[answer["model_version"]])


@pytest.mark.parametrize("damage", ["missing", "changed", "foreign"])
def test_a_version_that_fails_to_load_leaves_the_active_one(
    client: TestClient, publish: Any, settings: Settings, damage: str
) -> None:
    publish("v1", ITEMS)
    poll(client)
    publish("broken", ITEMS, activate=False)
    store = open_store(settings.resolved_store_url)
    assert isinstance(store, FolderStore)
    if damage == "missing":
        store.delete("versions/broken/manifest.json")
    elif damage == "changed":
        (name,) = [name for name in store.list("versions/broken") if "/model" in name]
        body = bytearray(store.get(name))
        body[-1] ^= 1
        store.put(name, bytes(body))
    else:
        store.put("versions/broken/manifest.json", b'{"format": 99}')
    with writing(publish.engine) as connection:
        promotion.activate(connection, "broken", actor="test", reason="test")
    poll(client)
    ready = client.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json()["active_version"] == "v1"
    assert ready.json()["failed_version"]["version"] == "broken"
    assert "broken" in ready.json()["failed_version"]["reason"]
    assert "shortlist_version_failed 1.0" in client.get("/metrics").text
    answer = recommend(client)
    assert (answer["source"], answer["model_version"]) == ("model", "v1")
    with writing(publish.engine) as connection:
        promotion.activate(connection, "v1", actor="test", reason="test")
    poll(client)
    assert client.get("/health/ready").json()["failed_version"] is None
    assert "shortlist_version_failed 0.0" in client.get("/metrics").text


def test_an_erased_user_is_unknown_to_a_loaded_version(client: TestClient, publish: Any, engine: Engine) -> None:
    publish("v1", ITEMS)
    poll(client)
    client.post("/feedback", json={"user_id": "anna", "item_id": "item-01", "type": "click"})
    assert recommend(client)["source"] == "model"
    erase(engine, "user", "anna", actor="test")  # by another process
    answer = recommend(client)
    assert (answer["source"], answer["feedback_through"]) == ("popular", None)
    poll(client)
    remembered = client.app.state.service.histories.remembered("anna")  # type: ignore[attr-defined]
    assert remembered is None or remembered.item_ids == ()
    client.post("/feedback", json={"user_id": "anna", "item_id": "item-02", "type": "click"})
    assert recommend(client)["source"] == "folded_in"  # back, and not known by the old weights


def test_an_erased_item_leaves_and_its_old_weights_do_not_come_back(
    client: TestClient, publish: Any, engine: Engine
) -> None:
    publish("v1", ITEMS)
    poll(client)
    first = shown(recommend(client))[0]
    erase(engine, "item", first, actor="test")
    assert first not in shown(recommend(client, k=30))
    publish.catalogue([first])  # the same id, another thing: at the end, among what nothing could score
    assert recommend(client, k=30)["items"][-1] == {"item_id": first, "score": None, "rank": 30, "exploration": False}
    assert first in shown(recommend(client, "somebody new", k=30))
    recommender = publish("v2", ITEMS)  # nothing says that its training data came after the erasure
    poll(client)
    assert recommend(client, k=30)["items"][-1]["score"] is None
    for user, numbers in (("anna", [0]), ("somebody else", [-1])):
        other = next(item_id for item_id in shown(recommend(client, user)) if item_id != first)  # popular by now
        for item_id in (first, other):
            client.post("/feedback", json={"user_id": user, "item_id": item_id, "type": "click"})
        known = [recommender.items.index(other)]
        best = recommender.top_k(numbers, [known], [[*known, recommender.items.index(first)]], 5)[0][0]
        assert shown(recommend(client, user, k=5)) == recommender.items.ids(best)  # by the other one alone
