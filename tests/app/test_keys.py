"""`shortlist keys` and `shortlist migrate` as people and scripts use them."""

import json

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from typer.testing import CliRunner, Result

from app import migrations
from app.cli import app
from app.migrations import downgrade
from app.security import list_keys


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def _settings(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTLIST_DATABASE_URL", database_url)


def test_keys_from_making_to_revoking(engine: Engine) -> None:
    assert "No keys yet" in run("keys", "list").stdout
    made = run("keys", "create", "web shop", "--scope", "admin", "--expires-days", "30")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    (row,) = list_keys(engine)
    assert key.startswith(f"sl_{row.key_id}_")
    assert (row.name, row.scopes, row.expires_at is None) == ("web shop", ("admin",), False)
    rotated = json.loads(run("keys", "rotate", row.key_id, "--grace-hours", "0", "--json").stdout)
    assert rotated["scopes"] == ["admin"]
    assert run("keys", "revoke", rotated["key_id"]).exit_code == 0
    listed = run("keys", "list", "--json").stdout
    assert [shown["state"] for shown in json.loads(listed)["keys"]] == ["expired", "revoked"]
    table = run("keys", "list").stdout
    assert "web shop" in table
    assert "revoked" in table
    assert key not in listed + table
    assert rotated["key"] not in listed + table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "a", "--scope", "root"], "not root"),
        (["create", ""], "1 to 255"),
        (["create", "a", "--expires-days", "-1"], "in the future"),
        (["create", "a", "--expires-days", "1e30"], "error: "),
        (["revoke", "nobody"], "no key nobody"),
        (["rotate", "nobody"], "no key nobody"),
        (["rotate", "nobody", "--grace-hours", "-1"], "--grace-hours"),
    ],
)
def test_mistakes_are_told(engine: Engine, arguments: list[str], message: str) -> None:
    answer = run("keys", *arguments)
    assert answer.exit_code == 1
    assert message in answer.stderr
    assert list_keys(engine) == []


def test_migrate(engine: Engine) -> None:
    assert run("migrate").stdout == f"Already at {migrations.head()}.\n"
    downgrade(engine, "base")
    assert run("migrate").stdout == f"Migrated {migrations.head()}.\n"
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    for command in (["migrate"], ["keys", "list"]):
        answer = run(*command)
        assert answer.exit_code == 1
        assert "9999" in answer.stderr


def test_a_database_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTLIST_DATABASE_URL", "postgresql://u:hunter2@127.0.0.1:1/d")
    for command in (["migrate"], ["keys", "list"]):
        answer = run(*command)
        assert answer.exit_code == 1
        assert "cannot be reached" in answer.stderr
        assert "hunter2" not in answer.output
