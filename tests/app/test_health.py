"""For operators: alive, ready, metrics, and a page of the HTTP interface that needs no internet."""

import re
from collections.abc import Callable
from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app.database import create_engine
from app.main import create_app
from app.migrations import migrate
from app.security import create_key
from app.settings import Settings


def test_ready_only_once_migrated_and_loaded(tmp_path: Path, connect: Callable[..., TestClient]) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path, model_poll_seconds=60)
    with connect(create_app(settings)) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        assert client.get("/health/live").json() == {"status": "alive"}
        waiting = client.get("/health/ready")
        assert (waiting.status_code, waiting.json()["status"], waiting.json()["migrated"]) == (503, "starting", False)
        assert "retry-after" in waiting.headers
        engine = create_engine(settings.resolved_database_url)
        migrate(engine)
        engine.dispose()
        assert service.poll()
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (200, "ready")
        assert ready.json()["database"] == "answers"


def test_metrics_are_prometheus_text(client: TestClient) -> None:
    client.post("/feedback", json={"user_id": "anna", "item_id": "dune", "type": "click"})
    client.app.state.service.poll()  # type: ignore[attr-defined]
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "shortlist_feedback_rows_total 1.0" in answer.text
    assert "shortlist_catalog_items 1.0" in answer.text
    assert "shortlist_recommendation_log_lost_total 0.0" in answer.text
    assert 'shortlist_requests_total{method="POST",route="/feedback",status="201"} 1.0' in answer.text
    assert "anna" not in answer.text


def test_metrics_take_a_key_of_any_scope_once_there_is_one(
    settings: Settings, engine: Engine, connect: Callable[..., TestClient]
) -> None:
    key = create_key(engine, "scraper", ["recommend"]).key
    with connect(create_app(settings)) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"X-API-Key": key}).status_code == 200
        assert client.get("/health/ready").status_code == 200


def test_the_page_of_the_interface_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) >= 3
    for address in loaded:
        assert "://" not in address
        asset = client.get(f"/{address}")
        assert asset.status_code == 200
        assert len(asset.content) > 1000
    assert "'openapi.json'" in page.text
    assert client.get("/openapi.json").json()["info"]["title"] == "Shortlist"
