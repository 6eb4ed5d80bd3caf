"""`shortlist retrain | runs | models` on a database of the test's own."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from typer.testing import CliRunner, Result

from app import tables
from app.cli import app
from app.database import writing
from app.settings import Settings
from app.training.worker import Worker

Run = Callable[..., Result]


@pytest.fixture
def run(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("SHORTLIST_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("SHORTLIST_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


def add_events(engine: Engine) -> None:
    time = datetime(2026, 11, 1, tzinfo=UTC)
    rows = [
        {
            "user_id": f"user-{user}",
            "event_id": f"event-{number}",
            "item_id": f"item-{(user + number) % 9}",
            "type": "click",
            "occurred_at": time + timedelta(minutes=number),
            "received_at": time,
        }
        for user in range(10)
        for number in range(5)
    ]
    with writing(engine) as connection:
        connection.execute(sa.insert(tables.events), rows)


def test_a_run_and_its_version_from_the_command_line(run: Run, engine: Engine) -> None:
    add_events(engine)
    queued = json.loads(run("retrain", "popularity", "--json").stdout)
    assert (queued["state"], queued["requested_by"]) == ("queued", "cli")
    run_id = queued["run_id"]
    assert "queued run " in run("retrain", "popularity", "--promote", "always").stdout
    worker = Worker(Settings(), engine)
    while worker.work_once():
        pass
    watched = run("runs", "watch", run_id)
    assert watched.exit_code == 0
    assert "succeeded: promoted" in watched.stdout
    shown = json.loads(run("runs", "show", run_id, "--json").stdout)
    assert (shown["state"], shown["promoted"]) == ("succeeded", True)
    assert run_id in run("runs", "list").stdout
    models = json.loads(run("models", "list", "--json").stdout)
    newer, older = [model["version"] for model in models]
    assert [model["state"] for model in models] == ["active", "retired"]
    assert f"{older} is active, in place of {newer}" in run("models", "rollback").stdout
    assert f"{newer} is active" in run("models", "activate", newer).stdout
    assert f"{newer} is active, as it was" in run("models", "activate", newer).stdout
    assert older in run("models", "show", older).stdout


def test_cancelling(run: Run) -> None:
    run_id = json.loads(run("retrain", "caser", "--set", "epochs=2", "--json").stdout)["run_id"]
    assert run("runs", "cancel", run_id).stdout == "cancelled\n"
    assert run("runs", "watch", run_id).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrain", "nope"], "unknown recipe 'nope'; the recipes are neumf, caser"),
        (["retrain", "caser", "--set", "epochs"], "'epochs' is not key=value"),
        (["retrain", "caser", "--set", "epochs=x"], "epochs must be a whole number"),
        (["retrain", "caser", "--promote", "maybe"], "promote must be one of guarded, always, never"),
        (["runs", "show", "nope"], "there is no run nope; `shortlist runs list` lists them"),
        (["runs", "cancel", "nope"], "there is no run nope"),
        (["models", "show", "nope"], "there is no version nope; `shortlist models list` lists them"),
        (["models", "activate", "nope"], "there is no version nope"),
        (["models", "rollback"], "no version was active before this one"),
    ],
)
def test_a_wrong_command_says_what_to_do(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""
