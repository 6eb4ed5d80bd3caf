"""Cursors: a list goes on where it ended, in any process, whatever happened in between; nobody else can make one."""

import base64
import json
from itertools import chain
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from app.main import create_app
from app.serving.cursors import MAX_CURSOR_LENGTH, CursorRefused, Cursors, Position, going_on
from app.settings import Settings
from app.tables import recommendation_log, secrets

ITEMS = [f"item-{number:02}" for number in range(40)]
FILTERS = bytes(range(8))


def ask(client: TestClient, user_id: str = "anna", **parameters: Any) -> dict[str, Any]:
    response = client.get(f"/users/{user_id}/recommendations", params=parameters)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def shown(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def click(client: TestClient, item_id: str, user_id: str = "anna") -> None:
    response = client.post("/feedback", json={"user_id": user_id, "item_id": item_id, "type": "click"})
    assert response.status_code == 201, response.text


def walk(client: TestClient, user_id: str = "anna", **parameters: Any) -> list[list[str]]:
    """All pages of a list."""
    pages, cursor = [], None
    while True:
        answer = ask(client, user_id, **parameters, **({} if cursor is None else {"cursor": cursor}))
        pages.append(shown(answer))
        cursor = answer["next_cursor"]
        if cursor is None:
            return pages
        assert len(pages) <= 50


def ready(client: TestClient) -> TestClient:
    client.app.state.service.poll()  # type: ignore[attr-defined]
    return client


@pytest.mark.parametrize("user_id", ["anna", "a stranger"])
def test_pages_make_up_the_whole_list(client: TestClient, publish: Any, user_id: str) -> None:
    publish("v1", ITEMS)
    publish.catalogue([f"new-{number}" for number in range(5)])  # which the version cannot rank
    click(ready(client), "item-07")
    ready(client)  # popularity counts it now, and not in the middle of the list
    whole = ask(client, user_id, k=100)
    assert whole["next_cursor"] is None
    assert len(shown(whole)) == (44 if user_id == "anna" else 45)
    pages = walk(client, user_id, k=7)
    assert [len(page) for page in pages[:-1]] == [7] * (len(pages) - 1)
    assert list(chain(*pages)) == shown(whole)


def test_what_happens_between_two_pages(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    click(ready(client), "item-07")
    first = ask(client, k=10)
    order = shown(ask(client, k=100))
    click(client, order[12])  # consumed since
    click(client, order[3])  # shown and then consumed
    publish.hide(order[14])  # hidden since
    publish.hide(order[5])
    publish.put("a new one", [])
    second = ask(client, k=10, cursor=first["next_cursor"])
    left = [item for item in order[10:] if item not in (order[12], order[14])]
    # Caser would rank anew by what was clicked: a list that was begun goes on as it was.
    assert shown(second) == left[:10]
    assert shown(ask(client, k=30)) != [*shown(first), *shown(second)]
    assert second["feedback_through"] == first["feedback_through"]
    rest = ask(client, k=100, cursor=second["next_cursor"])
    assert (shown(rest), rest["next_cursor"]) == ([*left[10:], "a new one"], None)
    publish.put(order[20], ["changed"])  # what is shown again by a change does not come twice
    assert set(shown(ask(client, k=100, cursor=second["next_cursor"]))).isdisjoint(shown(first) + shown(second))


def test_popular_items_do_not_repeat_when_their_order_changes(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS)
    first = ask(ready(client), k=10)
    assert (first["source"], shown(first)) == ("popular", ITEMS[:10])
    for user in range(3):
        click(client, "item-30", f"user-{user}")
        click(client, "item-05", f"user-{user}")
    click(client, "item-11")
    ready(client)
    second = ask(client, k=10, cursor=first["next_cursor"])
    assert shown(second)[0] == "item-30"
    assert not {*shown(first), "item-11"} & set(shown(second))
    assert list(chain(*walk(client, "ben", k=9))) == shown(ask(client, "ben", k=100))


def test_any_process_goes_on(client: TestClient, publish: Any, settings: Settings, connect: Any) -> None:
    publish("v1", ITEMS)
    first = ask(ready(client), k=10)
    with connect(create_app(settings)) as another:
        order = shown(ask(client, k=40))
        assert shown(ask(ready(another), k=10, cursor=first["next_cursor"])) == order[10:20]
        body = {"k": 10, "cursor": first["next_cursor"]}
        assert shown(another.post("/users/anna/recommendations", json=body).json()) == order[10:20]


def test_a_version_that_is_gone(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    cursor = ask(ready(client))["next_cursor"]
    popular = ask(client, "a stranger")["next_cursor"]
    publish("v2", ITEMS)
    ready(client)
    response = client.get("/users/anna/recommendations", params={"cursor": cursor})
    assert (response.status_code, response.headers["content-type"]) == (410, "application/problem+json")
    assert response.json()["errors"][0]["field"] == "query.cursor"
    assert "no longer active" in response.json()["detail"]
    assert len(shown(ask(client, "a stranger", cursor=popular))) == 10  # no version was in that


def test_a_user_who_is_gone(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    click(ready(client), "item-01")
    cursor = ask(client)["next_cursor"]
    assert client.delete("/users/anna").status_code == 204
    assert client.get("/users/anna/recommendations", params={"cursor": cursor}).status_code == 410


def test_a_user_without_events_who_is_gone(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    assert ready(client).put("/users/anna", json={}).status_code == 201
    cursor = ask(client)["next_cursor"]
    assert client.delete("/users/anna").status_code == 204
    # Popular items would begin anew, and repeat what was shown.
    assert client.get("/users/anna/recommendations", params={"cursor": cursor}).status_code == 410


def test_a_user_who_is_gone_and_came_back(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    click(ready(client), "item-01", "a stranger")
    cursor = ask(client, "a stranger")["next_cursor"]
    assert client.delete("/users/a stranger").status_code == 204
    click(client, "item-02", "a stranger")
    # It would rank by what was erased.
    parameters = {"cursor": cursor}
    assert client.get("/users/a stranger/recommendations", params=parameters).status_code == 410
    fresh = ask(client, "a stranger")["next_cursor"]
    assert ask(client, "a stranger", cursor=fresh)["items"]


def test_what_is_no_cursor(client: TestClient, publish: Any) -> None:
    publish("v1", ITEMS)
    cursor = ask(ready(client), k=5)["next_cursor"]
    raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    another = base64.urlsafe_b64encode(raw[:20] + bytes([raw[20] ^ 1]) + raw[21:]).decode().rstrip("=")
    last = cursor[:-1] + chr(ord(cursor[-1]) ^ 1)
    listed = base64.urlsafe_b64encode(json.dumps(["item", "item-01"]).encode()).decode().rstrip("=")
    too_long = "A" * (MAX_CURSOR_LENGTH + 4)
    changed = [another, last, cursor[:-2], cursor + "A", f"{cursor}="]
    for wrong in [*changed, listed, too_long, "x", "", "=", "é", " ", "A" * 100]:
        response = client.get("/users/anna/recommendations", params={"cursor": wrong})
        assert response.status_code == 422, wrong
        assert response.json()["errors"] == [
            {"field": "query.cursor", "message": "must be the `next_cursor` of an earlier answer, unchanged"}
        ]
    half_a_pair = {"content": b'{"cursor": "\\ud800"}', "headers": {"Content-Type": "application/json"}}
    response = client.post("/users/anna/recommendations", **half_a_pair)  # type: ignore[arg-type]
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "body.cursor")
    response = client.get("/users/ben/recommendations", params={"cursor": cursor})
    assert (response.status_code, response.json()["detail"]) == (422, "belongs to another user's list")


def test_filters_stay_the_same(client: TestClient, publish: Any) -> None:
    publish.catalogue(ITEMS, {item_id: ["even"] for item_id in ITEMS[::2]})
    publish("v1", ITEMS)
    ready(client)
    filters: dict[str, Any] = {"category": "even", "exclude": ["item-02", "item-04"], "max_per_category": 5}
    cursor = ask(client, **filters)["next_cursor"]
    again = ask(client, **(filters | {"k": 3, "exclude": ["item-04", "item-02"], "cursor": cursor}))
    assert len(shown(again)) == 3
    changes: list[dict[str, Any]] = [
        {"category": "odd"},
        {"categories_none": ["odd"]},
        {"exclude": ["item-02"]},
        {"include_seen": True},
        {"diversity": 0.5},
        {"max_per_category": 4},
    ]
    for change in changes:
        response = client.get("/users/anna/recommendations", params=filters | change | {"cursor": cursor})
        assert response.status_code == 422, change
        assert "belongs to other filters" in response.json()["detail"]


def test_the_log_ties_pages_together(client: TestClient, publish: Any, engine: Engine) -> None:
    publish("v1", ITEMS)
    first = ask(ready(client), k=5)
    second = ask(client, k=5, cursor=first["next_cursor"])
    client.app.state.service.recommendation_log.stop()  # type: ignore[attr-defined]
    with engine.connect() as connection:
        rows = {row.recommendation_id: row for row in connection.execute(sa.select(recommendation_log))}
    assert "list" not in rows[first["recommendation_id"]].filters
    filters = rows[second["recommendation_id"]].filters
    assert (filters["list"], filters["offset"]) == (first["recommendation_id"], 5)


def test_the_secret_is_made_once(engine: Engine) -> None:
    one, two = Cursors(), Cursors()
    assert one.write(bytes(16), going_on(Position(bytes(16)), "anna", FILTERS)) is None
    with pytest.raises(CursorRefused, match="cannot be read yet"):
        two.read("A" * 80, "anna", FILTERS)
    one.load(engine)
    two.load(engine)
    with engine.connect() as connection:
        assert len(bytes.fromhex(connection.execute(sa.select(secrets.c.value)).scalar_one())) == 32
    cursor = one.write(bytes(16), going_on(Position(bytes(16), feedback_through=0), "anna", FILTERS))
    assert cursor is not None
    assert two.read(cursor, "anna", FILTERS).feedback_through == 0


numbers = st.integers(0, 2**31)


@given(
    history=st.lists(numbers, max_size=64),
    shown=st.one_of(st.sets(numbers, max_size=200), st.sets(st.integers(0, 300), max_size=300)),
    elsewhere=st.frozensets(st.integers(0, 2**32 - 1), max_size=50),
    through=st.none() | st.integers(0, 2**62),
)
def test_what_is_written_is_read(
    history: list[int], shown: set[int], elsewhere: frozenset[int], through: int | None
) -> None:
    cursors = Cursors()
    cursors._secret = bytes(32)
    position = Position(
        bytes(range(16)),
        b"version!",
        through,
        np.array(history, np.int64),
        np.array(list(shown), np.int64),
        elsewhere,
    )
    cursor = cursors.write(position.list_id, going_on(position, "anna", FILTERS))
    assert cursor is not None
    assert len(cursor) <= MAX_CURSOR_LENGTH
    read = cursors.read(cursor, "anna", FILTERS)
    assert (read.list_id, read.version, read.feedback_through) == (bytes(range(16)), b"version!", through)
    assert read.history.tolist() == history
    assert read.shown.tolist() == sorted(shown)
    assert read.shown_elsewhere == elsewhere
    assert read.offset == len(shown) + len(elsewhere)


def test_how_far_a_cursor_reaches() -> None:
    cursors = Cursors()
    cursors._secret = bytes(32)
    every_item = Position(bytes(16), shown=np.arange(30_000, dtype=np.int64))
    assert cursors.write(bytes(16), going_on(every_item, "anna", FILTERS)) is not None
    for items in (1_000_000, 10_000_000):
        spread = np.sort(np.random.default_rng(0).choice(items, 2_000, replace=False)).astype(np.int64)
        assert cursors.write(bytes(16), going_on(Position(bytes(16), shown=spread), "anna", FILTERS)) is not None
        many = np.arange(0, items, items // 5_000, dtype=np.int64)
        assert cursors.write(bytes(16), going_on(Position(bytes(16), shown=many), "anna", FILTERS)) is None
