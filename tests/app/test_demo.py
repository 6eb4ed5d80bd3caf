import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app import demo
from app.database import create_engine
from app.settings import Settings
from app.tables import events, items
from ml.importers import open_source
from ml.simulate import simulate

LAST_LINE = "Ctrl-C stops"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def data(tmp_path: Path) -> Path:
    simulate(200, 60, 4_000, seed=1).write(tmp_path / "shop")
    return tmp_path / "shop"


@pytest.fixture
def start(tmp_path: Path, free_port: int) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(*options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "app.cli", "demo", "--data-dir", str(tmp_path / "data")]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SHORTLIST_")}
        process = subprocess.Popen(
            [*command, "--port", str(free_port), *options],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def read_until(process: "subprocess.Popen[str]", text: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError("ended before it said " + repr(text) + ":\n" + "\n".join(lines))


def send(line: str) -> tuple[int, Any]:
    """What the curl line of the demo would get."""
    words = shlex.split(line)[1:]
    headers, body, url = {}, None, ""
    while words:
        word = words.pop(0)
        if word == "-H":
            name, _, value = words.pop(0).partition(": ")
            headers[name] = value
        elif word == "-d":
            body = words.pop(0).encode()
        else:
            url = word
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.timeout(900)  # some ten processes, of which two train
def test_a_demo_that_was_killed_goes_on_serves_and_starts_again_at_once(start: Start, data: Path) -> None:
    killed = start("--data", str(data))
    read_until(killed, "Training")
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    first = start("--data", str(data))
    lines = read_until(first, LAST_LINE)
    assert any("Using what" in line for line in lines)  # the import was done
    recommendations, click, retrain = (line for line in lines if line.startswith("curl "))
    status, before = send(recommendations)
    assert status == 200
    assert len(before["items"]) == 5
    status, answer = send(click)
    assert (status, answer["results"][0]["outcome"]) == (201, "stored")
    _, after = send(recommendations)
    assert before["items"][0]["item_id"] not in [item["item_id"] for item in after["items"]]
    status, run = send(retrain)
    assert (status, run["recipe"]) == (202, "caser")
    first.send_signal(signal.SIGINT)
    assert "Stopped." in "".join(read_until(first, "Stopped."))
    assert first.wait() == 130

    second = start()
    lines = read_until(second, LAST_LINE)
    assert any("Using what" in line and "shop" in line for line in lines)
    assert not any("Training" in line for line in lines)
    assert send(recommendations)[0] == 401  # the key of the last start is revoked
    status, again = send(next(line for line in lines if line.startswith("curl ")))
    assert status == 200
    assert again["model_version"] == after["model_version"]
    second.send_signal(signal.SIGTERM)
    second.wait()


def test_a_port_that_is_taken_is_said_before_the_work(start: Start, free_port: int, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        process = start()
        output, _ = process.communicate()

    assert process.returncode == 1
    assert f"port {free_port}" in output
    assert "--port" in output
    assert not (tmp_path / "data").exists()


def test_data_that_is_not_there_is_said_at_once(start: Start, tmp_path: Path) -> None:
    process = start("--data", "nowhere")
    output, _ = process.communicate()

    assert process.returncode == 1
    assert "nowhere does not exist" in output


def test_without_data_a_catalogue_with_titles_is_generated_once(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"GENERATED_USERS": 50, "GENERATED_ITEMS": 40, "GENERATED_EVENTS": 500}.items():
        monkeypatch.setattr(demo, name, value)
    settings = Settings(data_dir=tmp_path / "data")
    engine = create_engine(sqlite_url)
    demo._fill(engine, settings, None)
    assert "generated" in capsys.readouterr().err
    demo._fill(engine, settings, None)
    assert "a generated catalogue" in capsys.readouterr().err

    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(events)).scalar_one() == 500
        untitled = sa.select(items.c.item_id).where(items.c.title.is_(None))
        assert connection.execute(untitled).first() is None
    engine.dispose()


def test_an_unfinished_import_is_finished_and_own_events_are_left_alone(
    sqlite_url: str, tmp_path: Path, data: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    engine = create_engine(sqlite_url)
    source = open_source(data)
    demo._fill(engine, settings, source)
    with engine.begin() as connection:
        connection.execute(sa.delete(events).where(events.c.position > 1_000))
    demo.Marker(demo._identity(source), source.name, imported=False).write(settings.data_dir)
    demo._fill(engine, settings, source)
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(events)).scalar_one() == 4_000

    (settings.data_dir / "demo.json").unlink()
    demo._fill(engine, settings, None)  # events that no demo brought
    assert demo.Marker.read(settings.data_dir) is None
    engine.dispose()


def test_other_data_goes_to_a_folder_of_its_own(tmp_path: Path, data: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    source = open_source(data)
    assert demo._folder_for(source, settings).data_dir == tmp_path / "data"

    demo.Marker(demo.GENERATED, "a generated catalogue", imported=True).write(settings.data_dir)
    assert demo._folder_for(None, settings).data_dir == tmp_path / "data"
    assert demo._folder_for(source, settings).data_dir == tmp_path / "data" / "demo-shop"

    demo.Marker(demo._identity(source), source.name, imported=True).write(settings.data_dir)
    assert demo._folder_for(source, settings).data_dir == tmp_path / "data"
