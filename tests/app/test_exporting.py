import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from typer.testing import CliRunner

from app import exporting
from app.cli import app
from app.database import writing
from app.exporting import export
from app.tables import events, items, users

TIME = datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC)
SHOWN = "2024-02-29T12:30:15.123456Z"


@pytest.fixture
def filled(engine: Engine) -> Engine:
    common: dict[str, Any] = {"received_at": TIME, "occurred_at": TIME}
    with writing(engine) as connection:
        connection.execute(
            sa.insert(events),
            [
                {"user_id": "zoë", "event_id": "e1", "item_id": "b", "type": "click", **common},
                {"user_id": "amy", "event_id": "e2", "item_id": "a", "type": "rating", **common},
            ],
        )
        connection.execute(sa.update(events).where(events.c.event_id == "e2").values(value=4.5, context={"page": "x"}))
        for number, categories in enumerate([["Drama", "Crime"], ["Sci-Fi"], []]):
            values = {"title": f'Title "{number}", part', "categories": categories, "hidden": number == 1}
            row = {"item_id": str(number), "metadata": {}, "created_at": TIME, "updated_at": TIME}
            connection.execute(sa.insert(items).values(**values, **row))
        user = {"user_id": "amy", "metadata": {"plan": "free"}, "created_at": TIME, "updated_at": TIME}
        connection.execute(sa.insert(users).values(**user))
    return engine


def exported(engine: Engine, what: str, format: str) -> bytes:  # noqa: A002
    out = io.BytesIO()
    export(engine, what, format, out)
    return out.getvalue()


def test_events_leave_in_the_order_in_which_they_came(filled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "PAGE", 1)  # each page of one row, so that paging is seen
    lines = [json.loads(line) for line in exported(filled, "events", "jsonl").splitlines()]

    common = {"occurred_at": SHOWN, "received_at": SHOWN}
    assert lines == [
        {"event_id": "e1", "user_id": "zoë", "item_id": "b", "type": "click", **common},
        {
            "event_id": "e2",
            "user_id": "amy",
            "item_id": "a",
            "type": "rating",
            "value": 4.5,
            "context": {"page": "x"},
            **common,
        },
    ]


def test_csv_quotes_what_it_must(filled: Engine) -> None:
    rows = list(csv.DictReader(io.StringIO(exported(filled, "items", "csv").decode())))

    assert [row["title"] for row in rows] == ['Title "0", part', 'Title "1", part', 'Title "2", part']
    assert [row["categories"] for row in rows] == ["Drama|Crime", "Sci-Fi", ""]
    assert [row["hidden"] for row in rows] == ["false", "true", "false"]
    assert rows[0]["created_at"] == SHOWN


def test_parquet_keeps_types(filled: Engine) -> None:
    table = pq.read_table(io.BytesIO(exported(filled, "events", "parquet")))
    assert table["occurred_at"].to_pylist() == [TIME, TIME]
    assert table["value"].to_pylist() == [None, 4.5]
    assert table["context"].to_pylist() == [None, '{"page": "x"}']

    people = pq.read_table(io.BytesIO(exported(filled, "users", "parquet")))
    assert people["metadata"].to_pylist() == ['{"plan": "free"}']


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_an_empty_table_is_a_readable_file(engine: Engine, format: str) -> None:  # noqa: A002
    body = exported(engine, "events", format)

    if format == "parquet":
        assert pq.read_table(io.BytesIO(body)).num_rows == 0
    else:
        assert len(body.splitlines()) == (1 if format == "csv" else 0)


def test_the_command_writes_a_file_or_the_standard_output(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORTLIST_DATABASE_URL", sqlite_url)
    target = tmp_path / "users.csv"

    to_file = CliRunner().invoke(app, ["export", "users", "--format", "csv", "--out", str(target)])
    assert to_file.exit_code == 0, to_file.output
    assert target.read_text() == "user_id,metadata,created_at,updated_at\n"
    assert "Exported 0 users" in to_file.stderr

    to_stdout = CliRunner().invoke(app, ["export", "users", "--format", "csv"])
    assert to_stdout.stdout == target.read_text()


def test_an_export_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTLIST_DATABASE_URL", f"sqlite:///{tmp_path / 'empty' / 'new.sqlite3'}")
    result = CliRunner().invoke(app, ["export", "events", "--out", str(tmp_path / "events.jsonl")])

    assert result.exit_code == 1
    assert "shortlist migrate" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("arguments", [["export", "things"], ["export", "events", "--format", "xml"]])
def test_unknown_words_are_answered_with_the_known_ones(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 2
    assert "is none of" in result.output
