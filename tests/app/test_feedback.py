"""`POST /feedback`: an outcome for every row, nothing counted twice, nothing lost with its neighbour."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from app import event_rows
from app.main import create_app
from app.settings import Settings
from app.tables import events, items, users

PROBLEM = "application/problem+json"


def post(client: TestClient, body: Any) -> tuple[int, Any]:
    response = client.post("/feedback", json=body)
    return response.status_code, response.json()


def outcomes(answer: Any) -> list[str]:
    assert [result["index"] for result in answer["results"]] == list(range(len(answer["results"])))
    return [result["outcome"] for result in answer["results"]]


def stored(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(events).order_by(events.c.position)))


def test_one_event_is_stored_with_all_its_fields(client: TestClient, engine: Engine) -> None:
    event = {
        "event_id": "e-1",
        "user_id": "anna",
        "item_id": "dune",
        "type": "rating",
        "value": 4.5,
        "occurred_at": "2026-01-02T03:04:05.123456789+02:00",
        "recommendation_id": "r-1",
        "context": {"page": "home", "place": [1, 2.5, None, "ü"]},
    }
    status, answer = post(client, event)
    assert (status, answer) == (201, {"results": [{"index": 0, "event_id": "e-1", "outcome": "stored"}]})
    (row,) = stored(engine)
    assert (row.user_id, row.item_id, row.type, row.value) == ("anna", "dune", "rating", 4.5)
    assert row.occurred_at == datetime(2026, 1, 2, 1, 4, 5, 123456, UTC)
    assert (row.recommendation_id, row.context) == ("r-1", event["context"])
    assert datetime.now(UTC) - row.received_at < timedelta(minutes=1)


def test_what_is_left_out_is_filled_in(client: TestClient, engine: Engine) -> None:
    before = datetime.now(UTC)
    status, answer = post(client, {"user_id": "anna", "item_id": "dune", "type": "click"})
    (row,) = stored(engine)
    assert status == 201
    assert row.event_id == answer["results"][0]["event_id"]
    assert len(row.event_id) == 36
    assert before <= row.occurred_at <= datetime.now(UTC)


def test_a_list_keeps_its_order_where_times_tie(client: TestClient, engine: Engine) -> None:
    names = [f"item-{(7 * number) % 50}" for number in range(50)]
    status, _ = post(client, [{"user_id": "anna", "item_id": name, "type": "click"} for name in names])
    assert status == 201
    with engine.connect() as connection:
        ordered = sa.select(events.c.item_id).order_by(events.c.occurred_at, events.c.position)
        assert list(connection.scalars(ordered)) == names


def test_a_bad_row_does_not_stop_the_others(client: TestClient, engine: Engine) -> None:
    good = {"user_id": "anna", "item_id": "dune", "type": "click"}
    ahead = (datetime.now(UTC) + timedelta(minutes=6)).isoformat()
    bad: dict[str, Any] = {
        "user_id": good | {"user_id": "a/b"},
        "item_id": {"user_id": "anna", "type": "click"},
        "type": good | {"type": 3},
        "value": good | {"value": "4"},
        "occurred_at": good | {"occurred_at": ahead},
        "event_id": good | {"event_id": "x" * 256},
        "retracts": good | {"type": "retract"},
        "recommendation_id": good | {"recommendation_id": "\0"},
        "context.surplus": good | {"context": {"surplus": "\0"}},
        "surplus": good | {"surplus": 1},
    }
    status, answer = post(client, [good, *bad.values(), None, 3, "text", [good], good])
    assert status == 201
    assert outcomes(answer) == ["stored"] + ["rejected"] * (len(bad) + 4) + ["stored"]
    for field, result in zip(bad, answer["results"][1:], strict=False):
        assert result["reason"].startswith(field.split(".")[0] + ": "), result
    assert len(stored(engine)) == 2


def test_times_are_rfc_3339_with_their_zone(client: TestClient) -> None:
    refused = [
        "2026-01-02T03:04:05",  # which zone?
        "2026-01-02",
        "2026-13-02T03:04:05Z",
        "2026-02-30T03:04:05Z",
        "2026-01-02T25:04:05Z",
        "0001-01-01T00:00:00+23:59",  # before the first year
        "9999-12-31T23:59:59-23:59",
        "20260102T030405Z",
        "2026-01-02T03:04:05+01:00:30",
        "yesterday",
        1767322800,
        True,
    ]
    taken = [
        "2026-01-02t03:04:05z",
        "2026-01-02 03:04:05.1+00:00",
        "1970-01-01T00:00:00-12:00",
        None,  # the same as left out
    ]
    event = {"user_id": "anna", "item_id": "dune", "type": "click"}
    _, answer = post(client, [event | {"occurred_at": time} for time in refused + taken])
    assert outcomes(answer) == ["rejected"] * len(refused) + ["stored"] * len(taken)
    assert all(result["reason"].startswith("occurred_at: ") for result in answer["results"][: len(refused)])


def test_the_clock_of_a_caller_may_be_five_minutes_ahead(client: TestClient) -> None:
    ahead = (datetime.now(UTC) + timedelta(minutes=4, seconds=50)).isoformat()
    assert post(client, {"user_id": "anna", "item_id": "dune", "type": "click", "occurred_at": ahead})[0] == 201


def test_nothing_stored_is_a_problem_that_names_the_fields(client: TestClient, engine: Engine) -> None:
    response = client.post("/feedback", json=[{"user_id": "a/b"}, {"user_id": "anna", "item_id": "x", "type": ""}])
    assert response.status_code == 422
    assert response.headers["content-type"] == PROBLEM
    answer = response.json()
    assert [error["field"] for error in answer["errors"]] == ["body.0.user_id", "body.1.type"]
    assert outcomes(answer) == ["rejected", "rejected"]
    assert not stored(engine)


def test_a_body_that_is_no_event_at_all_is_a_problem(client: TestClient) -> None:
    bodies = [b"", b"{", b"[1,", b"null", b"3", b'"text"', b"[]", b"\xff\xfe", b'{"value": NaN}', b"[" * 5000]
    for body in [*bodies, b"[" + b"1," * 1000 + b"1]"]:
        response = client.post("/feedback", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 422, body[:20]
        assert response.headers["content-type"] == PROBLEM
        assert response.json()["errors"][0]["field"] == "body"
        assert "results" not in response.json()


def test_other_content_types_are_refused(client: TestClient) -> None:
    event = json.dumps({"user_id": "anna", "item_id": "dune", "type": "click"})
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = client.post("/feedback", content=event, headers={"Content-Type": content_type})
        assert response.status_code == 415
        assert response.json()["errors"][0]["field"] == "header.content-type"
    response = client.post("/feedback", content=event, headers={"Content-Type": "application/json; charset=utf-8"})
    assert response.status_code == 201


def test_an_oversized_body_is_a_problem(client: TestClient, engine: Engine) -> None:
    event = {"user_id": "anna", "item_id": "dune", "type": "click", "context": {"text": "x" * 2_000_000}}
    response = client.post("/feedback", json=event)
    assert response.status_code == 413
    assert response.headers["content-type"] == PROBLEM
    assert not stored(engine)


def test_long_bodies_are_judged_beside_the_event_loop(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of checks on the event loop would hold up every other request."""
    judged_by: list[int] = []
    read = event_rows.from_json

    def noting(body: bytes, **options: Any) -> Any:
        judged_by.append(threading.get_ident())
        return read(body, **options)

    monkeypatch.setattr(event_rows, "from_json", noting)
    event = {"user_id": "anna", "item_id": "dune", "type": "click"}
    assert post(client, event)[0] == 201
    assert post(client, event | {"context": {"zeros": [0] * 5_000}})[0] == 201
    assert judged_by[0] == judged_by[1]
    many = [event | {"event_id": str(number), "context": {"text": "x" * 100}} for number in range(1_000)]
    assert outcomes(post(client, many)[1]) == ["stored"] * 1_000
    assert judged_by[2] != judged_by[0]


def test_a_repeated_event_is_a_duplicate(client: TestClient, engine: Engine) -> None:
    event = {"event_id": "e-1", "user_id": "anna", "item_id": "dune", "type": "click", "context": {"a": [1, 2.0]}}
    assert post(client, event)[0] == 201
    status, answer = post(client, event)
    assert (status, outcomes(answer)) == (200, ["duplicate"])
    # The time was ours, so that the repetition cannot know it; another user may have the same id.
    assert post(client, event | {"user_id": "ben"})[0] == 201
    assert len(stored(engine)) == 2


def test_an_id_with_other_content_is_a_conflict(client: TestClient, engine: Engine) -> None:
    event = {
        "event_id": "e-1",
        "user_id": "anna",
        "item_id": "dune",
        "type": "click",
        "value": 1,
        "occurred_at": "2026-01-02T03:04:05Z",
        "recommendation_id": "r-1",
        "context": {"a": 1},
    }
    changes: list[dict[str, Any]] = [
        {"item_id": "alien"},
        {"type": "view"},
        {"value": 2},
        {"occurred_at": "2026-01-02T03:04:06Z"},
        {"recommendation_id": "r-2"},
        {"context": {"a": 2}},
        {"context": None},
    ]
    assert post(client, event)[0] == 201
    for change in changes:
        status, answer = post(client, event | change)
        assert (status, outcomes(answer)) == (422, ["rejected"])
        assert answer["results"][0]["reason"].startswith("event_id: ")
        assert next(iter(change)) in answer["results"][0]["reason"]
    assert post(client, event)[0] == 200
    assert len(stored(engine)) == 1


def test_repetitions_within_one_request(client: TestClient, engine: Engine) -> None:
    event = {"event_id": "e-1", "user_id": "anna", "item_id": "dune", "type": "click"}
    status, answer = post(client, [event, event | {"item_id": "alien"}, event, event])
    assert (status, outcomes(answer)) == (201, ["stored", "rejected", "duplicate", "duplicate"])
    assert len(stored(engine)) == 1
    with engine.connect() as connection:  # a rejected event leaves no item behind
        assert list(connection.scalars(sa.select(items.c.item_id))) == ["dune"]


def test_repetitions_between_concurrent_requests(client: TestClient, engine: Engine) -> None:
    batch = [{"event_id": f"e-{n}", "user_id": f"u-{n % 7}", "item_id": f"i-{n}", "type": "click"} for n in range(100)]
    with ThreadPoolExecutor(8) as pool:
        turned = [batch[8 * shift :] + batch[: 8 * shift] for shift in range(8)]
        answers = list(pool.map(lambda rows: post(client, rows)[1], turned))
    found = sorted(outcome for answer in answers for outcome in outcomes(answer))
    assert found == ["duplicate"] * 700 + ["stored"] * 100
    assert len(stored(engine)) == 100


def test_a_retract_takes_back_an_event(client: TestClient, engine: Engine) -> None:
    click = {"event_id": "e-1", "user_id": "anna", "item_id": "dune", "type": "click"}
    retract = {"event_id": "e-2", "user_id": "anna", "type": "retract", "retracts": "e-1"}
    status, answer = post(client, [retract, click])  # in either order
    assert (status, outcomes(answer)) == (201, ["stored", "stored"])
    assert [(row.type, row.item_id, row.retracts) for row in stored(engine)] == [
        ("click", "dune", None),
        ("retract", "dune", "e-1"),
    ]
    assert outcomes(post(client, [retract, retract | {"item_id": "dune"}])[1]) == ["duplicate", "duplicate"]


def test_a_retract_must_name_an_event_of_its_user(client: TestClient) -> None:
    post(client, {"event_id": "e-1", "user_id": "anna", "item_id": "dune", "type": "click"})
    post(client, {"event_id": "e-2", "user_id": "anna", "type": "retract", "retracts": "e-1"})
    reasons = {
        "retracts: this user has no event": {"user_id": "ben", "type": "retract", "retracts": "e-1"},
        "retracts: names a retract": {"user_id": "anna", "type": "retract", "retracts": "e-2"},
        "item_id: the event to take back is about 'dune'": {
            "user_id": "anna",
            "item_id": "alien",
            "type": "retract",
            "retracts": "e-1",
        },
    }
    status, answer = post(client, list(reasons.values()))
    assert status == 422
    for reason, result in zip(reasons, answer["results"], strict=True):
        assert result["reason"].startswith(reason)


@pytest.fixture
def client_that(settings: Settings, connect: Callable[..., TestClient]) -> Iterator[Callable[[str], TestClient]]:
    clients = []

    def make(unknown_items: str) -> TestClient:
        changed = settings.model_copy(update={"unknown_items": unknown_items})
        clients.append(connect(create_app(changed)).__enter__())
        return clients[-1]

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("unknown_items", "status", "hidden"), [("create", 201, [False]), ("hold", 201, [True]), ("reject", 422, [])]
)
def test_unknown_items(
    client_that: Callable[[str], TestClient], engine: Engine, unknown_items: str, status: int, hidden: list[bool]
) -> None:
    event = {"user_id": "anna", "item_id": "dune", "type": "click"}
    answered, answer = post(client_that(unknown_items), event)
    assert answered == status
    with engine.connect() as connection:
        assert list(connection.scalars(sa.select(items.c.hidden))) == hidden
        assert list(connection.scalars(sa.select(users.c.user_id))) == (["anna"] if hidden else [])
    if unknown_items == "reject":
        assert answer["results"][0]["reason"] == "item_id: 'dune' is not in the catalogue"


def test_a_known_item_is_not_changed_by_feedback(client: TestClient, engine: Engine) -> None:
    post(client, {"user_id": "anna", "item_id": "dune", "type": "click"})
    with engine.begin() as connection:
        connection.execute(sa.update(items).values(title="Dune", hidden=True, categories=["Sci-Fi"]))
    post(client, {"user_id": "ben", "item_id": "dune", "type": "click"})
    with engine.connect() as connection:
        (row,) = connection.execute(sa.select(items))
    assert (row.title, row.hidden, row.categories) == ("Dune", True, ["Sci-Fi"])


def test_odd_ids_come_back_as_they_were_sent(client: TestClient, engine: Engine) -> None:
    names = ["ü", "日本", "a b", "%2F", "'; DROP TABLE events; --", "\U0001f600", "...", "x" * 255, "\\", '"', "#?&=+"]
    status, answer = post(client, [{"user_id": n, "item_id": n, "event_id": n, "type": "view"} for n in names])
    assert (status, set(outcomes(answer))) == (201, {"stored"})
    rows = [(row.user_id, row.item_id, row.event_id) for row in stored(engine)]
    assert sorted(rows) == sorted((name, name, name) for name in names)


_SOMETIMES_ODD = st.one_of(
    st.sampled_from(["anna", "a/b", "..", "", "x" * 256, "ü", None, 3, True, 2.5, -1, 10**400, [], {}, {"a": [1]}]),
    st.sampled_from(
        ["retract", "click", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05.1234567Z", "2026-02-30T03:04:05Z"]
    ),
    st.sampled_from(["2026-01-02T03:04:05.5+02:00", "0001-01-01T00:00:00+01:00", "2999-01-01T00:00:00Z", "\0"]),
)
_FIELDS = ("event_id", "user_id", "item_id", "type", "value", "occurred_at", "recommendation_id", "context", "retracts")
_GOOD = {"event_id": "e", "user_id": "anna", "item_id": "dune", "type": "click", "value": 1}


@given(changes=st.dictionaries(st.sampled_from([*_FIELDS, "surplus"]), _SOMETIMES_ODD, max_size=3))
def test_plain_events_are_judged_as_all_are(changes: dict[str, Any]) -> None:
    """What is recognised as plain becomes the same event as by the whole validation; nothing refused by it is taken."""
    row = json.loads(json.dumps(_GOOD | changes))
    now = datetime.now(UTC)
    plain = event_rows._plain([row], now)
    whole = event_rows._judge(row, now)
    if plain is not None:
        assert plain == [whole]
        assert [type(value) for value in plain[0]] == [type(value) for value in whole]
    if not changes:
        assert plain is not None
