"""Trainings and models over HTTP, from the request to the version that answers."""

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app import tables
from app.database import writing
from app.main import create_app
from app.security import create_key
from app.settings import Settings
from app.training import promotion, runs
from app.training.worker import Worker


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(database_url=database_url, data_dir=tmp_path / "data", _env_file=None)


@pytest.fixture
def key(engine: Engine) -> Any:
    return create_key(engine, "operator", ["admin"])


@pytest.fixture
def client(settings: Settings, key: Any, connect: Callable[..., TestClient]) -> Iterator[TestClient]:
    with connect(create_app(settings), key=key.key) as client:
        yield client


def feed(client: TestClient) -> None:
    start = datetime(2026, 11, 1, tzinfo=UTC)
    events = [
        {
            "user_id": f"user-{user}",
            "item_id": f"item-{(user + 3 * number) % 20}",
            "type": "click",
            "occurred_at": (start + timedelta(minutes=20 * user + number)).isoformat(),
        }
        for user in range(30)
        for number in range(8)
    ]
    assert client.post("/feedback", json=events).status_code == 201


def follow(client: TestClient, location: str, **headers: str) -> list[dict[str, Any]]:
    """The events of a run's stream, read to its end."""
    answer = client.get(f"{location}/events", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            events.append({**fields, "data": json.loads(fields["data"])})
    return events


def test_a_retrain_goes_from_request_to_answer(client: TestClient, settings: Settings, engine: Engine) -> None:
    feed(client)
    asked = client.post("/admin/retrain", json={"recipe": "popularity"})
    assert asked.status_code == 202
    location = asked.headers["location"]
    assert location == f"/admin/runs/{asked.json()['run_id']}"
    assert client.get(location).json()["state"] == "queued"
    training = threading.Thread(target=Worker(settings, engine).work_once)
    training.start()
    told = follow(client, location)
    training.join()
    assert [event["data"]["state"] for event in told if event["event"] == "state"] == ["queued", "running", "succeeded"]
    assert {"phase", "snapshot", "evaluated", "published"} <= {event["event"] for event in told}
    # A client that comes back goes on after the last event that it saw.
    assert follow(client, location, **{"Last-Event-ID": told[-3]["id"]}) == told[-2:]
    assert follow(client, location, **{"Last-Event-ID": told[-1]["id"]}) == []

    done = client.get(location).json()
    version = done["version"]
    assert (done["state"], done["promoted"], done["attempts"]) == ("succeeded", True, 1)
    assert "nothing was active before" in done["message"]
    listed = client.get("/admin/models").json()
    assert listed["active"] == version
    assert [model["version"] for model in listed["models"]] == [version]
    model = client.get(f"/admin/models/{version}").json()
    assert (model["state"], model["run_id"], len(model["activated_at"])) == ("active", done["run_id"], 1)
    assert model["metrics"]["test"]["ndcg@10"] == model["metrics"]["popularity"]["ndcg@10"]
    assert model["trained_through"] == "2026-11-01T09:47:00.000000Z"
    assert client.post(f"/admin/models/{version}/activate").json()["state"] == "active"
    answer = client.get("/users/user-1/recommendations").json()
    assert answer["model_version"] == version
    assert client.post("/admin/models/rollback").status_code == 409


def test_an_idempotency_key_answers_the_same_run(client: TestClient) -> None:
    request = {"recipe": "caser", "set": {"epochs": 2, "shared_negatives": True}}
    headers = {"Idempotency-Key": "monday"}
    first = client.post("/admin/retrain", json=request, headers=headers)
    again = client.post("/admin/retrain", json=request, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert first.headers["location"] == again.headers["location"]
    assert first.json()["set"] == {"epochs": "2", "shared_negatives": "true"}
    other = client.post("/admin/retrain", json={"recipe": "neumf"}, headers=headers)
    assert other.status_code == 409
    assert other.json()["errors"][0]["field"] == "header.Idempotency-Key"
    assert len(client.get("/admin/runs").json()["runs"]) == 1


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"recipe": "nope"}, "body.recipe", "neumf, caser"),
        ({"recipe": "caser", "set": {"speed": 9}}, "body.set", "learning_rate"),
        ({"recipe": "caser", "set": {"learning_rate": -1}}, "body.set", "learning_rate must be more than 0"),
        ({"recipe": "caser", "set": {"window_length": 10**9}}, "body.set", "window_length must be at most 1,000"),
        ({"recipe": "neumf", "set": {"loss": "triplet"}}, "body.set", "NeuMF has none"),
        ({"recipe": "caser", "promote": "maybe"}, "body.promote", "guarded"),
        ({"recipe": "caser", "epochs": 3}, "body.epochs", ""),
        ({}, "body.recipe", ""),
    ],
)
def test_a_wrong_request_names_the_field(client: TestClient, body: Any, field: str, message: str) -> None:
    answer = client.post("/admin/retrain", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field
    assert message in answer.json()["errors"][0]["message"]
    assert client.get("/admin/runs").json() == {"runs": [], "next_cursor": None}


def test_runs_are_listed_in_pages(client: TestClient) -> None:
    made = [client.post("/admin/retrain", json={"recipe": "caser"}).json()["run_id"] for _ in range(5)]
    first = client.get("/admin/runs?limit=3").json()
    second = client.get("/admin/runs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [run["run_id"] for run in first["runs"] + second["runs"]] == made[::-1]
    assert second["next_cursor"] is None
    assert client.get("/admin/runs?cursor=nonsense").status_code == 422
    assert client.get("/admin/runs?state=running").json()["runs"] == []
    assert client.get("/admin/runs?limit=0").status_code == 422


def test_cancelling(client: TestClient, engine: Engine) -> None:
    run_id = client.post("/admin/retrain", json={"recipe": "caser"}).json()["run_id"]
    cancelled = client.post(f"/admin/runs/{run_id}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert client.post(f"/admin/runs/{run_id}/cancel").json() == cancelled.json()
    with writing(engine) as connection:
        run, _ = runs.create(connection, "caser")
        connection.execute(sa.update(tables.runs).where(tables.runs.c.run_id == run.run_id).values(state="succeeded"))
    assert client.post(f"/admin/runs/{run.run_id}/cancel").status_code == 409


def test_what_is_unknown_is_not_found(client: TestClient) -> None:
    for path in ("/admin/runs/nope", "/admin/runs/nope/events", "/admin/models/nope"):
        assert client.get(path).status_code == 404
    for path in ("/admin/runs/nope/cancel", "/admin/models/nope/activate"):
        assert client.post(path).status_code == 404
    for path in ("/admin/runs/a%00b", "/admin/models/..%2F..", "/admin/runs/" + "a" * 10_000):
        assert client.get(path).status_code in (404, 422)


def test_admin_actions_leave_a_trail(client: TestClient, engine: Engine, key: Any) -> None:
    run_id = client.post("/admin/retrain", json={"recipe": "caser", "promote": "never"}).json()["run_id"]
    client.post(f"/admin/runs/{run_id}/cancel")
    with engine.connect() as connection:
        query = sa.select(tables.audit_log).where(tables.audit_log.c.subject == run_id)
        rows = connection.execute(query.order_by(tables.audit_log.c.sequence)).all()
    assert [(row.actor, row.action) for row in rows] == [(key.key_id, "run.create"), (key.key_id, "run.cancel")]
    assert rows[0].details == {"recipe": "caser", "set": {}, "promote": "never"}


def test_other_scopes_may_not(settings: Settings, engine: Engine, key: Any, connect: Callable[..., TestClient]) -> None:
    lesser = create_key(engine, "shop", ["recommend", "feedback"]).key
    with connect(create_app(settings), key=lesser) as client:
        for method, path in (
            ("POST", "/admin/retrain"),
            ("GET", "/admin/runs"),
            ("GET", "/admin/runs/nope"),
            ("GET", "/admin/runs/nope/events"),
            ("POST", "/admin/runs/nope/cancel"),
            ("GET", "/admin/models"),
            ("GET", "/admin/models/nope"),
            ("POST", "/admin/models/nope/activate"),
            ("POST", "/admin/models/rollback"),
        ):
            assert client.request(method, path).status_code == 403, path


@pytest.fixture
def refusing_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket whose server refuses everything."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        do_HEAD = do_GET  # noqa: N815 - called so by http.server

        def log_message(self, *_: object) -> None:
            pass

    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "c", "AWS_ALLOW_HTTP": "true"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever).start()
        yield "s3://bucket/shortlist"
        server.shutdown()


def test_a_store_that_is_away_is_a_503(
    settings: Settings, engine: Engine, refusing_bucket: str, key: Any, connect: Callable[..., TestClient]
) -> None:
    with writing(engine) as connection:
        for version in ("v1", "v2"):
            promotion.add_candidate(connection, version, "caser", {"metrics": {}})
            promotion.activate(connection, version, actor="test", reason="test")
    with connect(create_app(settings.model_copy(update={"store_url": refusing_bucket})), key=key.key) as client:
        for path in ("v1/activate", "unknown/activate", "rollback"):
            answer = client.post(f"/admin/models/{path}")
            assert (answer.status_code, answer.json()["title"]) == (503, "Service Unavailable")
            assert "store" in answer.json()["detail"]
            assert "bucket" not in answer.text
            assert int(answer.headers["retry-after"]) > 0
        # What is known without the store is still told.
        assert client.get("/admin/models").json()["active"] == "v2"
