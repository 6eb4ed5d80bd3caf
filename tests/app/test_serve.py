"""`shortlist serve` as real processes: killed, restarted, several at once."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from app.database import create_engine
from app.security import UnsafeAddressError, create_key
from app.serve import prepare
from app.settings import Settings
from app.tables import events


def test_acknowledged_events_survive_kill_9(live_server: Callable[..., Any], engine: Engine) -> None:
    server = live_server(embedded_worker=False)
    server.start()
    acknowledged: list[tuple[str, str]] = []
    unanswered: list[dict[str, str]] = []
    enough = threading.Event()

    def post_until_it_dies(client_number: int) -> None:
        with httpx2.Client(base_url=server.client.base_url, timeout=20) as client:
            for number in range(100_000):
                rows = [
                    {
                        "event_id": f"{number}-{row}",
                        "user_id": f"u{client_number}",
                        "item_id": f"i{row}",
                        "type": "view",
                    }
                    for row in range(3)
                ]
                try:
                    response = client.post("/feedback", json=rows)
                except httpx2.TransportError:
                    unanswered.extend(rows)
                    return
                assert response.status_code == 201
                acknowledged.extend((row["user_id"], row["event_id"]) for row in rows)
                if len(acknowledged) > 300:
                    enough.set()

    threads = [threading.Thread(target=post_until_it_dies, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert enough.wait(60)
    server.kill()
    for thread in threads:
        thread.join()
    assert unanswered

    server.start()
    answer = server.client.post("/feedback", json=unanswered).json()  # as a client that heard nothing would
    assert {result["outcome"] for result in answer["results"]} <= {"stored", "duplicate"}
    with engine.connect() as connection:
        found = [tuple(row) for row in connection.execute(sa.select(events.c.user_id, events.c.event_id))]
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert set(found) == set(acknowledged) | {(row["user_id"], row["event_id"]) for row in unanswered}
    assert server.stop() == 0


def lines(log: Path, message: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in found if line.get("event") == message]


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not collected by its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


@pytest.fixture
def sqlite_settings(tmp_path: Path, sqlite_url: str) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path / "data", database_url=sqlite_url)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_embedded_worker_is_restarted_and_ends_with_the_server(live_server: Callable[..., Any]) -> None:
    server = live_server(embedded_worker=True)
    server.start()
    until(lambda: lines(server.log, "worker_started"))
    first = lines(server.log, "worker_started")[0]["pid"]
    os.kill(first, signal.SIGKILL)
    until(lambda: len(lines(server.log, "worker_started")) == 2)
    assert lines(server.log, "worker_died")[0]["status"] == -signal.SIGKILL
    second = lines(server.log, "worker_started")[1]["pid"]
    until(lambda: lines(server.log, "worker started"))
    server.kill()  # nobody is left to stop the worker
    until(lambda: not alive(second))
    assert not alive(first)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_several_processes_know_at_once_what_one_was_told(live_server: Callable[..., Any], publish: Any) -> None:
    publish("v1", [f"item-{number:02}" for number in range(30)])
    server = live_server(embedded_worker=False, workers=2)
    server.start()
    seen: set[str] = set()
    for _ in range(12):
        with httpx2.Client(base_url=server.client.base_url) as client:  # a new connection, perhaps to the other process
            answer = client.get("/users/anna/recommendations").json()
            assert answer["model_version"] == "v1"
            assert not seen & {item["item_id"] for item in answer["items"]}
            item_id = answer["items"][0]["item_id"]
            seen.add(item_id)
            event = {"user_id": "anna", "item_id": item_id, "type": "click"}
            assert client.post("/feedback", json=event).status_code == 201
    counted = 'shortlist_requests_total{method="POST",route="/feedback",status="201"} 12.0'
    assert counted in server.client.get("/metrics").text  # of both processes together
    assert server.stop() == 0


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_processes_that_start_end_with_the_one_that_started_them(live_server: Callable[..., Any]) -> None:
    server = live_server(embedded_worker=False, workers=2)
    process = server.launch()

    def serving() -> list[int]:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    until(lambda: len(serving()) == 2)
    started = serving()
    server.kill()  # before they have read a line of ours
    try:
        until(lambda: not any(map(alive, started)))
    finally:
        for pid in filter(alive, started):
            os.kill(pid, signal.SIGKILL)


def test_it_listens_on_loopback_alone_until_there_is_a_key(sqlite_settings: Settings) -> None:
    open_to_all = sqlite_settings.model_copy(update={"host": "0.0.0.0"})
    with pytest.raises(UnsafeAddressError, match="shortlist keys create"):
        prepare(open_to_all)
    prepare(sqlite_settings)
    engine = create_engine(sqlite_settings.resolved_database_url)
    create_key(engine, "shop")
    engine.dispose()
    prepare(open_to_all)
