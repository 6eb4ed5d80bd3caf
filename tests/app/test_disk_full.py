"""A disk that fills up: nothing half-done counts, nothing acknowledged is lost, and the same command finishes."""

import json
import resource
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from app.cli import app
from app.tables import events

ROWS = 12_000


def test_an_import_is_finished_by_running_it_again(
    sqlite_url: str, tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    runner = CliRunner(env={"SHORTLIST_DATABASE_URL": sqlite_url})
    data = tmp_path / "events.csv"
    lines = [f"user-{row % 500},item-{row * 7919 % 900},2026-01-01T00:00:00Z" for row in range(ROWS)]
    data.write_text("\n".join(["user_id,item_id,time", *lines]))
    file = Path(str(sa.make_url(sqlite_url).database))

    def stored() -> int:
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return int(connection.execute("SELECT count(*) FROM events").fetchone()[0])

    with full_disk(2_000_000):
        refused = runner.invoke(app, ["import", str(data)])
    assert isinstance(refused.exception, SystemExit), refused.exception
    assert refused.exit_code == 1
    before = stored()
    assert 0 < before < ROWS
    error, advice = refused.stderr.splitlines()[-2:]
    assert error.startswith("Error: the database failed: disk"), error
    assert advice == f"{before:,} events were stored; the next import of this file adds the others."

    again = runner.invoke(app, ["import", str(data), "--json"])
    assert again.exit_code == 0, again.stderr
    report = json.loads(again.stdout)
    assert (report["stored"], report["duplicates"]) == (ROWS - before, before)
    assert stored() == ROWS


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_service_refuses_feedback_until_there_is_space(
    live_server: Callable[..., Any], engine: sa.Engine, publish: Any
) -> None:
    publish.catalogue([f"item-{number}" for number in range(20)])
    server = live_server(embedded_worker=False)
    server.start()

    def post(event_id: str) -> Any:
        click = {"event_id": event_id, "user_id": "anna", "item_id": "item-3", "type": "click"}
        return server.client.post("/feedback", json=click)

    assert post("before").status_code == 201
    unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (16_384, unlimited[1]))
    for number in range(3):
        refused = post(f"refused-{number}")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["content-type"] == "application/problem+json"
    for path in ("/users/anna/recommendations", "/users/nobody/recommendations", "/popular", "/health/ready"):
        assert server.client.get(path).status_code == 200
    assert "disk" in server.log.read_text()  # the reason
    assert server.client.put("/items/item-3", json={"title": "Three"}).status_code == 503

    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
    assert post("refused-0").status_code == 201
    assert server.stop() == 0
    with engine.connect() as connection:
        assert sorted(connection.scalars(sa.select(events.c.event_id))) == ["before", "refused-0"]
