"""What is logged and counted: never a secret, never a path in a metric, one id a request."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
import structlog
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app import errors
from app.database import create_engine
from app.security import Admin, KeyRing, create_key, require
from app.settings import Settings
from app.telemetry import Metrics, RequestCounts, RequestTelemetry, configure_logging, redact

SECRET = "hunter2-Zz9"
KEY = "sl_0123456789ab_" + "k" * 43


@pytest.fixture
def captured() -> Iterator[io.StringIO]:
    """Everything that is logged at any level, as JSON lines; logging is put back afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    stream = io.StringIO()
    configure_logging(Settings(log_format="json", log_level="debug", access_log=True), stream)
    yield stream
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.parametrize(
    "text",
    [
        f"key {KEY} is wrong",
        f"GET /users?api_key={SECRET}&k=3",
        f"Authorization: Bearer {SECRET}",
        f"{{'x-api-key': '{SECRET}', 'accept': '*/*'}}",
        f"(b'authorization', b'Basic {SECRET}')",
        f"postgresql+psycopg://shortlist:{SECRET}@db:5432/shortlist",
        f"host=db password={SECRET} dbname=shortlist",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f'{{"password": "{SECRET}"}}',
        f"postgres://u:{SECRET}@@x@host/d",
    ],
)
def test_secrets_are_taken_out_of_text(text: str) -> None:
    assert SECRET not in redact(text)
    assert KEY not in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("part", ["a", "password", "secret-", "token =", "token=", "bearer ", "sl_aaaa", "x://a:"])
def test_long_texts_take_no_longer_than_they_are_long(part: str) -> None:
    """A caller chooses the path of a request: a pattern that looks back and forth would stop the process."""
    text = part * (60_000 // len(part))
    begun = time.process_time()
    redact(text)
    assert time.process_time() - begun < 1


def test_other_text_stays() -> None:
    text = "retrain of neumf at https://example.org:8000/a@b took 3.2 s; tokens are tokens"
    assert redact(text) == text


def test_secrets_are_taken_out_of_every_part_of_a_log_line(captured: io.StringIO) -> None:
    log = structlog.get_logger("test")
    log.info("plain", authorization=SECRET, headers={"X-API-Key": SECRET, "n": [f"Bearer {SECRET}"]}, url=KEY)
    logging.getLogger("library").warning("password=%s of %s", SECRET, KEY)
    try:
        raise RuntimeError(f"cannot open postgresql://a:{SECRET}@h/d with {KEY}")
    except RuntimeError:
        log.exception("failed")
        logging.getLogger("library").exception("failed too")
    lines = [json.loads(line) for line in captured.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["plain", "password=[redacted] of [redacted]", "failed", "failed too"]
    assert "Traceback" in lines[2]["exception"]
    assert "Traceback" in lines[3]["exception"]
    assert SECRET not in captured.getvalue()
    assert KEY not in captured.getvalue()


def test_no_caller_can_forge_a_line(captured: io.StringIO) -> None:
    configure_logging(Settings(log_format="console"), captured)
    structlog.get_logger("test").warning("odd path", path="/x\n2026-01-01 [info] all is well\x1b[2J")
    assert captured.getvalue().count("\n") == 1
    assert "\x1b" not in captured.getvalue()


def make_app(engine: Engine) -> tuple[FastAPI, Metrics]:
    app = FastAPI()
    metrics = Metrics()
    app.state.keys = KeyRing(engine, 5)
    errors.install(app)
    app.add_middleware(RequestTelemetry, counts=RequestCounts(metrics, access_log=True))

    @app.get("/users/{user_id}/recommendations")
    def recommendations(user_id: str, _: Annotated[Any, Depends(require("recommend"))]) -> str:
        return user_id

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError(f"inside: {SECRET} {KEY}, password={SECRET}")

    @app.get("/admin")
    def admin(_: Admin) -> None:
        return None

    return app, metrics


def test_no_key_reaches_the_log_through_requests(
    engine: Engine, captured: io.StringIO, connect: Callable[..., TestClient]
) -> None:
    app, _ = make_app(engine)
    key = create_key(engine, "reader", ["recommend"]).key
    wrong = KEY.replace("k", "w")
    client = connect(app)
    bearer = {"Authorization": f"Bearer {key}"}
    assert client.get("/users/a/recommendations", headers=bearer).status_code == 200
    assert client.get("/users/a/recommendations", headers={"X-API-Key": key}).status_code == 200
    assert client.get(f"/users/a/recommendations?api_key={key}").status_code == 401
    assert client.get(f"/users/{key}/recommendations", headers=bearer).status_code == 200
    assert client.get("/users/a/recommendations", headers={"Authorization": f"Bearer {wrong}"}).status_code == 401
    assert client.get("/users/a/recommendations", headers={"Authorization": f"Basic {SECRET}"}).status_code == 401
    assert client.get("/admin", headers=bearer).status_code == 403
    assert client.get(f"/nowhere/{key}", headers={"X-Request-ID": key}).status_code == 404
    assert client.get("/admin", headers={**bearer, "Cookie": f"session={SECRET}"}).status_code == 403
    engine.dispose()
    for line in (key, wrong, SECRET):
        assert line not in captured.getvalue()
    assert captured.getvalue().count('"event": "request"') == 9


def test_the_password_of_a_database_that_is_gone_stays_out_of_the_log(
    captured: io.StringIO, connect: Callable[..., TestClient]
) -> None:
    gone = create_engine(f"postgresql://shortlist:{SECRET}@127.0.0.1:1/shortlist")
    app, _ = make_app(gone)
    answer = connect(app, key=KEY).get("/admin")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    try:
        gone.connect()
    except sa.exc.OperationalError:
        structlog.get_logger("test").exception("cannot connect", url=gone.url.render_as_string(hide_password=False))
    assert "cannot connect" in captured.getvalue()
    assert SECRET not in captured.getvalue() + answer.text
    assert KEY not in captured.getvalue()


def test_the_unexpected_is_logged_and_answered_without_internals(
    sqlite_url: str, captured: io.StringIO, connect: Callable[..., TestClient]
) -> None:
    engine = create_engine(sqlite_url)
    app, metrics = make_app(engine)
    answer = connect(app).get("/broken", headers={"X-Request-ID": "mine-1"})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "mine-1"
    assert "inside" not in answer.text
    error = next(line for line in map(json.loads, captured.getvalue().splitlines()) if line["level"] == "error")
    assert "RuntimeError" in error["exception"]
    assert error["request_id"] == "mine-1"
    assert KEY not in captured.getvalue()
    assert b'shortlist_requests_total{method="GET",route="/broken",status="500"} 1.0' in metrics.render()
    engine.dispose()


def test_requests_are_counted_by_route_not_by_path(sqlite_url: str, connect: Callable[..., TestClient]) -> None:
    engine = create_engine(sqlite_url)
    app, metrics = make_app(engine)
    client = connect(app)
    ids = {client.get(f"/users/{name}/recommendations").headers["x-request-id"] for name in ("anna", "ben")}
    client.get("/nowhere/anna")
    client.request("BREW", "/nowhere")
    text = metrics.render().decode()
    assert 'shortlist_requests_total{method="GET",route="/users/{user_id}/recommendations",status="200"} 2.0' in text
    assert 'route="unmatched",status="404"} 1.0' in text
    assert 'method="other"' in text
    assert "anna" not in text
    assert len(ids) == 2
    engine.dispose()


def test_several_processes_answer_for_all(tmp_path: Path) -> None:
    program = (
        "from app.telemetry import Metrics; m = Metrics(); m.counter('rows', 'Rows.').inc(2); "
        "m.gauge('queue', 'Waiting.').set(3); print(m.render().decode())"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    for expected in ("2.0", "4.0"):
        output = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True, check=True
        ).stdout
        assert f"shortlist_rows_total {expected}" in output


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_no_key_reaches_the_log_of_a_real_server(engine: Engine, live_server: Callable[..., Any]) -> None:
    keys = [create_key(engine, "any", [scope]).key for scope in ("recommend", "admin")]
    server = live_server(log_level="debug", access_log=True, embedded_worker=False)
    server.start()
    for key in (*keys, KEY):
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}, {"Authorization": f"Basic {key}"}):
            server.client.get("/users/a/recommendations", headers=headers)
            server.client.put("/items/a", headers=headers, json={"metadata": {"password": SECRET}})
            server.client.post("/feedback", headers=headers, content=f'{{"token": "{SECRET}"')
            server.client.get(f"/users/a/recommendations?api_key={key}&k=0", headers=headers)
            server.client.get("/metrics", headers=headers)
    assert server.stop() == 0
    text = server.log.read_text()
    assert text.count('"event": "request"') >= 3 * 3 * 5
    for secret in (*keys, KEY, SECRET):
        assert secret not in text
        assert secret.rpartition("_")[2] not in text
