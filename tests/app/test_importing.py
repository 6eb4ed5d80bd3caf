import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from typer.testing import CliRunner

from app.cli import app
from app.database import create_engine, writing
from app.exporting import export
from app.imported_events import SqliteWriter
from app.importing import catalogue_kind, import_catalogue, import_source
from app.tables import events, items, users
from ml.importers import RejectLog, TooManyRejects, open_source

START = 1_600_000_000


def write_events(path: Path, count: int, *, seed: int = 0) -> Path:
    chosen = random.Random(seed)
    with path.open("w") as file:
        file.write("user_id,item_id,type,value,time\n")
        for number in range(count):
            user, item = chosen.randrange(200), chosen.randrange(300)
            file.write(f"u{user},i{item},rating,{number % 5 + 1},{START + number}\n")
    return path


def count(engine: Engine, table: sa.Table) -> int:
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def stored(engine: Engine) -> list[tuple[Any, ...]]:
    columns = [events.c[name] for name in ("user_id", "item_id", "type", "value", "occurred_at")]
    with engine.connect() as connection:
        return sorted(tuple(row) for row in connection.execute(sa.select(*columns)))


def test_events_titles_and_categories_are_stored(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "u.data").write_text("1\t10\t4\t880000000\n2\t20\t5\t880000001\n1\t20\t3\t880000000\n")
    (folder / "u.item").write_text(
        "10|Toy Story (1995)|01-Jan-1995|||0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "20|Été (1996)|01-Jan-1996|||0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0\n",
        encoding="latin-1",
    )
    report = import_source(engine, open_source(folder))

    assert (report.stored, report.duplicates, report.rejected, report.items) == (3, 0, 0, 2)
    moment = datetime.fromtimestamp(880_000_000, UTC)
    assert stored(engine)[:2] == [("1", "10", "rating", 4.0, moment), ("1", "20", "rating", 3.0, moment)]
    with engine.connect() as connection:
        titles = connection.execute(sa.select(items.c.title, items.c.categories).order_by(items.c.item_id)).all()
        # A tie in time keeps the order of the file.
        same_user = sa.select(events.c.item_id).where(events.c.user_id == "1").order_by(events.c.position)
        assert connection.execute(same_user).scalars().all() == ["10", "20"]
    assert [tuple(row) for row in titles] == [
        ("Toy Story (1995)", ["Animation", "Children's", "Comedy"]),
        ("Été (1996)", ["Drama"]),
    ]
    assert count(engine, users) == 2


def test_a_second_import_stores_nothing_and_an_appended_file_only_what_is_new(engine: Engine, tmp_path: Path) -> None:
    path = write_events(tmp_path / "events.csv", 500)
    first = import_source(engine, open_source(path))
    again = import_source(engine, open_source(path))
    with path.open("a") as file:
        file.write("u1,i1,rating,1,1700000000\n")
    appended = import_source(engine, open_source(path))

    assert (first.stored, first.duplicates) == (500, 0)
    assert (again.stored, again.duplicates) == (0, 500)
    assert (appended.stored, appended.duplicates) == (1, 500)
    assert count(engine, events) == 501


def test_another_file_of_the_same_name_is_another_source(engine: Engine, tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        report = import_source(engine, open_source(write_events(folder / "events.csv", 100, seed=number)))
        assert report.duplicates < 3  # rows that happen to be equal, at the same line

    assert count(engine, events) > 195


def test_a_title_is_not_overwritten_by_none(engine: Engine, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    with writing(engine) as connection:
        for item in ("a", "b"):
            row = {"item_id": item, "title": "kept", "categories": ["kept"], "hidden": True, "metadata": {"x": 1}}
            connection.execute(sa.insert(items).values(**row, created_at=now, updated_at=now))
    (tmp_path / "events.csv").write_text("user_id,item_id\nu,a\n")
    (tmp_path / "items.jsonl").write_text('{"item_id": "a", "color": "red"}\n{"item_id": "b", "title": "new"}\n')
    report = import_source(engine, open_source(tmp_path / "events.csv"))

    assert report.items == 2
    with engine.connect() as connection:
        rows = connection.execute(sa.select(items).order_by(items.c.item_id)).all()
    assert [(row.title, row.categories, row.hidden, row._mapping["metadata"]) for row in rows] == [
        ("kept", ["kept"], True, {"color": "red"}),
        ("new", ["kept"], True, {"x": 1}),
    ]


def test_bad_rows_are_left_out_counted_and_kept_with_their_reason(sqlite_url: str, tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id,time\nu,i,1600000000\nu,a/b,1600000000\n,i,1600000000\nu,i,someday\n")
    rejects = tmp_path / "rejects.csv"
    arguments = ["import", str(path), "--rejects", str(rejects), "--max-bad-share", "0.9", "--json"]
    result = CliRunner(env={"SHORTLIST_DATABASE_URL": sqlite_url}).invoke(app, arguments)

    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["stored"], report["rejected"]) == (1, 3)
    lines = rejects.read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["3", "item id holds a slash"],
        ["4", "user id is missing"],
        ["5", "time is neither RFC 3339 nor a number of seconds or milliseconds since 1970"],
    ]


def test_too_many_bad_rows_stop_the_import_with_a_reason(sqlite_url: str, tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id\nu,i\nu,\n")
    result = CliRunner(env={"SHORTLIST_DATABASE_URL": sqlite_url}).invoke(app, ["import", str(path)])

    assert result.exit_code == 1
    assert "1 of 2 rows are bad" in result.output
    assert "item id is missing" in result.output


def test_a_wrong_column_stops_a_large_import_at_its_beginning(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id\n" + "u,\n" * 2_000)
    with pytest.raises(TooManyRejects):
        import_source(engine, open_source(path), rejects=RejectLog(max_bad_share=0.5))
    assert count(engine, events) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "does not exist"),
        (["events.csv", "--user-column", "person"], "no column 'person'"),
        (["events.csv", "--format", "xml"], "no format 'xml'"),
    ],
)
def test_what_cannot_be_read_is_said_at_once(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    write_events(tmp_path / "events.csv", 1)
    monkeypatch.chdir(tmp_path)
    result = CliRunner(env={"SHORTLIST_DATABASE_URL": sqlite_url}).invoke(app, ["import", *arguments])

    assert result.exit_code == 1
    assert message in result.output


def test_columns_can_be_named(sqlite_url: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("who;what;when;how;stars\nu;i;2024-02-29T12:00:00.000001Z;purchase;5\n")
    options = "--user-column who --item-column what --time-column when --type-column how --value-column stars"
    result = CliRunner(env={"SHORTLIST_DATABASE_URL": sqlite_url}).invoke(app, ["import", str(path), *options.split()])

    assert result.exit_code == 0, result.output
    engine = create_engine(sqlite_url)
    assert stored(engine) == [("u", "i", "purchase", 5.0, datetime(2024, 2, 29, 12, 0, 0, 1, tzinfo=UTC))]
    engine.dispose()


@pytest.fixture
def import_process(database_url: str) -> Iterator[Any]:
    """Starts `shortlist import` as a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "app.cli", "import", str(path)]
        environment = {**os.environ, "SHORTLIST_DATABASE_URL": database_url, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_an_import_that_was_killed_is_finished_by_the_next_with_no_row_twice(
    engine: Engine, import_process: Any, tmp_path: Path
) -> None:
    path = write_events(tmp_path / "events.csv", 45_000)
    process = import_process(path)
    deadline = time.monotonic() + 60
    while count(engine, events) == 0:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = count(engine, events)
    assert 0 < left < 45_000

    process = import_process(path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"{left:,} stored before" in output
    assert count(engine, events) == 45_000
    with engine.connect() as connection:
        first = sa.select(events.c.event_id).distinct().subquery()
        assert connection.execute(sa.select(sa.func.count()).select_from(first)).scalar_one() == 45_000
        # Positions rise with the rows within each user, as in one import from beginning to end.
        order = connection.execute(sa.select(events.c.user_id, events.c.occurred_at).order_by(events.c.position)).all()
    last: dict[str, datetime] = {}
    for user, moment in order:
        assert last.setdefault(user, moment) <= moment
        last[user] = moment


def test_a_writer_gets_in_between_the_chunks(sqlite_url: str, tmp_path: Path) -> None:
    """Feedback commits while an import runs. How long it waits at most is measured by benchmarks/import_speed.py."""
    engine = create_engine(sqlite_url)
    path = write_events(tmp_path / "events.csv", 20_000)
    done = threading.Event()

    def importing() -> None:
        import_source(engine, open_source(path))
        done.set()

    thread = threading.Thread(target=importing)
    thread.start()
    now = datetime.now(UTC)
    commits, during = 0, 0
    while not done.is_set() and commits < 100_000:
        with writing(engine) as connection:
            event = {"user_id": "live", "event_id": f"live-{commits}", "item_id": "i1", "type": "click"}
            connection.execute(sa.insert(events).values(**event, occurred_at=now, received_at=now))
        commits += 1
        during += not done.is_set()
    thread.join()

    assert during >= 2  # a chunk holds 10,000 rows at the most
    assert count(engine, events) == 20_000 + commits
    engine.dispose()


def test_the_pragmas_of_an_import_stay_its_own(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    writer = SqliteWriter(engine)
    writer.close()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar_one() == 1000
    engine.dispose()


def everything(engine: Engine) -> dict[str, list[Any]]:
    """All that an export keeps, without the times of writing."""
    left_out = {"position", "received_at", "created_at", "updated_at", "transaction_id", "change"}
    kept = {}
    with engine.connect() as connection:
        for table in (events, items, users):
            columns = [column for column in table.c if column.name not in left_out]
            kept[table.name] = sorted(map(str, connection.execute(sa.select(*columns)).all()))
    return kept


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_an_import_reads_back_what_an_export_wrote(engine: Engine, tmp_path: Path, format: str) -> None:  # noqa: A002
    (tmp_path / "items.jsonl").write_text(
        '{"item_id": "i1", "title": "Ein \\"Titel\\", 1", "categories": ["a", "b"], "metadata": {"year": 1999}}\n'
    )
    (tmp_path / "users.jsonl").write_text('{"user_id": "u1", "metadata": {"plan": "free"}}\n')
    import_source(engine, open_source(write_events(tmp_path / "source.csv", 300)))
    now = datetime.now(UTC)
    with writing(engine) as connection:
        taken_back = connection.execute(sa.select(events.c.user_id, events.c.event_id).limit(1)).one()
        retract = {"user_id": taken_back.user_id, "event_id": "r", "item_id": "i1", "type": "retract"}
        times = {"occurred_at": now, "received_at": now}
        connection.execute(sa.insert(events).values(**retract, retracts=taken_back.event_id, **times))
    before = everything(engine)
    folder = tmp_path / "exported"
    folder.mkdir()
    for what in ("events", "items", "users"):
        with (folder / f"{what}.{format}").open("wb") as out:
            export(engine, what, format, out)

    # Into the same database: everything is there already.
    again = import_source(engine, open_source(folder / f"events.{format}"))
    assert (again.stored, again.duplicates, again.rejected) == (0, 301, 0)
    assert everything(engine) == before

    with writing(engine) as connection:
        for table in (events, items, users):
            connection.execute(sa.delete(table))
    for what, kind in (("items", "item"), ("users", "user")):
        path = folder / f"{what}.{format}"
        assert catalogue_kind(path) == kind
        import_catalogue(engine, path, kind)
    assert catalogue_kind(folder / f"events.{format}") is None
    import_source(engine, open_source(folder / f"events.{format}"))
    assert everything(engine) == before


def test_a_catalogue_alone_can_be_imported(sqlite_url: str, tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\na,Title\nb/c,Bad\n")
    runner = CliRunner(env={"SHORTLIST_DATABASE_URL": sqlite_url})
    too_many = runner.invoke(app, ["import", str(path)])
    enough = runner.invoke(app, ["import", str(path), "--max-bad-share", "0.5", "--rejects", str(tmp_path / "bad.csv")])

    assert too_many.exit_code == 1
    assert "1 of 2 rows are bad" in too_many.output
    assert enough.exit_code == 0, enough.output
    assert "1 bad rows left out" in enough.output
    assert '3,"must be 1 to 255' in (tmp_path / "bad.csv").read_text()
