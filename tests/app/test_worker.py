"""Workers as processes of their own, that are killed, paused, stopped and asked to cancel."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from app import tables
from app.database import create_engine, writing
from app.settings import Settings
from app.training import runs
from app.training.runs import Run
from app.training.worker import Worker
from ml.registry import Manifest, Registry
from ml.store import FolderStore

LEASE_SECONDS = 2.0
# Small enough to be done in seconds, long enough to be met in the middle.
LONG = {"epochs": "40", "patience": "40", "batch_size": "8", "negatives": "4"}


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(data_dir=tmp_path, database_url=database_url, lease_seconds=LEASE_SECONDS, _env_file=None)


def add_events(
    engine: Engine, start: datetime = datetime(2026, 11, 1, tzinfo=UTC), numbers: Iterable[int] = range(8)
) -> None:
    rows = [
        {
            "user_id": f"user-{user}",
            "event_id": f"event-{number}",
            "item_id": f"item-{(user + 3 * number) % 20}",
            "type": "click",
            "occurred_at": start + timedelta(minutes=user * 20 + number),
            "received_at": start,
        }
        for user in range(30)
        for number in numbers
    ]
    with writing(engine) as connection:
        connection.execute(sa.insert(tables.events), rows)


def queue(engine: Engine, recipe: str, **request: Any) -> Run:
    with writing(engine) as connection:
        return runs.create(connection, recipe, **request)[0]


def read(engine: Engine, run: Run) -> Run:
    with engine.connect() as connection:
        return runs.read(connection, run.run_id)


def told(engine: Engine, run: Run) -> list[tuple[str, dict[str, Any]]]:
    with engine.connect() as connection:
        return [(row.kind, row.details) for row in runs.events_after(connection, run.run_id, 0)]


def eventually(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never came to pass: {what}"
        threading.Event().wait(0.05)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class WorkerProcess:
    """`shortlist worker`, with its log."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.log = settings.data_dir / f"{name}.log"
        environment = {
            **os.environ,
            "SHORTLIST_DATABASE_URL": settings.resolved_database_url,
            "SHORTLIST_DATA_DIR": str(settings.data_dir),
            "SHORTLIST_LEASE_SECONDS": str(settings.lease_seconds),
            "SHORTLIST_LOG_FORMAT": "json",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "app.cli", "worker", "--name", name]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def training_pid(self) -> int:
        return int(self.logged("training started")[-1]["pid"])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()


StartWorker = Callable[[str], WorkerProcess]


@pytest.fixture
def start_worker(settings: Settings) -> Iterator[StartWorker]:
    started: list[WorkerProcess] = []

    def start(name: str) -> WorkerProcess:
        started.append(WorkerProcess(name, settings))
        return started[-1]

    yield start
    for worker in started:
        worker.end()


def fitted_epochs(engine: Engine, run: Run) -> list[int]:
    return [details["epoch"] for kind, details in told(engine, run) if kind == "epoch" and details["phase"] == "fit"]


def version_states(engine: Engine) -> dict[str, str]:
    with engine.connect() as connection:
        return {row.version: row.state for row in connection.execute(sa.select(tables.model_versions))}


def test_a_run_of_a_killed_worker_goes_on_from_its_checkpoint(
    engine: Engine, settings: Settings, start_worker: StartWorker
) -> None:
    add_events(engine)
    run = queue(engine, "caser", overrides=LONG, promote="always")
    first = start_worker("first")
    eventually(lambda: read(engine, run).worker == "first", "the first worker's claim")
    start_worker("second")
    eventually(lambda: len(fitted_epochs(engine, run)) >= 3, "three epochs of the first worker")
    training = first.training_pid()
    first.signal(signal.SIGKILL)
    first.process.wait()
    told_by_first = len(fitted_epochs(engine, run))
    eventually(lambda: is_gone(training), "the end of the orphaned training", 10)
    eventually(lambda: read(engine, run).finished, "the end of the run")
    done = read(engine, run)
    assert (done.state, done.worker, done.attempts, done.epoch) == ("succeeded", "second", 2, 2), done.message
    assert version_states(engine) == {f"caser-{run.run_id}-2": "active"}
    # It goes on where the checkpoint is: not before the last epoch told of, and later where telling lagged behind.
    second_attempt = fitted_epochs(engine, run)[told_by_first:]
    assert second_attempt[0] >= told_by_first >= 3
    assert second_attempt == list(range(second_attempt[0], 41))
    eventually(lambda: not (settings.runs_dir / run.run_id).exists(), "the removal of its checkpoints")


def test_a_paused_worker_can_neither_publish_nor_promote(
    engine: Engine, settings: Settings, start_worker: StartWorker
) -> None:
    add_events(engine)
    run = queue(engine, "popularity", promote="always")
    stale = start_worker("stale")
    eventually(lambda: bool(stale.logged("training started")), "the stale worker's training")
    stale.signal(signal.SIGSTOP)
    registry = Registry(FolderStore(settings.resolved_store_url))
    # Its training, which was not paused, publishes under its name.
    eventually(lambda: f"popularity-{run.run_id}-1" in registry.names(), "the stale training's version")
    other = start_worker("other")
    eventually(lambda: read(engine, run).finished, "the end of the run")
    before = read(engine, run), told(engine, run)
    stale.signal(signal.SIGCONT)
    eventually(lambda: bool(stale.logged("run lost")), "the stale worker's insight")
    assert (read(engine, run), told(engine, run)) == before
    assert (before[0].state, before[0].worker) == ("succeeded", "other"), before[0].message
    assert version_states(engine) == {f"popularity-{run.run_id}-2": "active"}
    for worker in (stale, other):
        worker.signal(signal.SIGTERM)
        assert worker.process.wait(30) == 0


def test_a_run_can_be_cancelled_and_a_worker_stopped(
    engine: Engine, settings: Settings, start_worker: StartWorker
) -> None:
    add_events(engine)
    worker = start_worker("worker")
    cancelled = queue(engine, "caser", overrides=LONG)
    eventually(lambda: bool(fitted_epochs(engine, cancelled)), "an epoch")
    training = worker.training_pid()
    with writing(engine) as connection:
        runs.request_cancel(connection, cancelled.run_id)
    eventually(lambda: read(engine, cancelled).state == "cancelled", "the cancelled state", 10)
    assert is_gone(training)
    assert read(engine, cancelled).message == "cancelled while it ran"

    released = queue(engine, "caser", overrides=LONG)
    eventually(lambda: bool(fitted_epochs(engine, released)), "an epoch of the next run")
    training = worker.training_pid()
    worker.signal(signal.SIGTERM)
    assert worker.process.wait(30) == 0
    assert is_gone(training)
    waiting = read(engine, released)
    assert (waiting.state, waiting.attempts, waiting.worker) == ("queued", 0, None)
    assert (settings.runs_dir / released.run_id / "attempt-1").is_dir()
    assert version_states(engine) == {}


def test_a_training_that_fails_tells_why(engine: Engine, settings: Settings) -> None:
    worker = Worker(settings, engine)
    without_data = queue(engine, "popularity")
    assert worker.work_once()
    assert read(engine, without_data).state == "failed"
    assert read(engine, without_data).message == ("there are no events to train on: post feedback or import data first")
    add_events(engine)
    diverging = queue(engine, "caser", overrides={"learning_rate": "1e30", "epochs": "3"})
    assert worker.work_once()
    failed = read(engine, diverging)
    assert failed.state == "failed"
    assert "lower learning rate" in str(failed.message)
    assert not worker.work_once()
    assert version_states(engine) == {}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_run_outlives_a_database_that_goes_away_while_it_is_prepared(engine: Engine, settings: Settings) -> None:
    add_events(engine)
    run = queue(engine, "popularity")
    own = create_engine(settings.resolved_database_url)
    broken: list[str] = []

    def break_once(_connection: object, cursor: Any, statement: str, *_: object) -> None:
        if "FROM events" in statement and not broken:
            broken.append(statement)
            with engine.connect() as connection:
                connection.execute(sa.select(sa.func.pg_terminate_backend(cursor.connection.info.backend_pid)))

    sa.event.listen(own, "before_cursor_execute", break_once)
    worker = Worker(settings, own)
    with pytest.raises(OperationalError):
        worker.work_once()
    assert broken
    assert read(engine, run).state == "running"
    eventually(worker.work_once, "the end of the lease", 30)
    assert read(engine, run).state == "succeeded"
    assert read(engine, run).attempts == 2
    own.dispose()


def test_a_run_that_succeeds_is_guarded_and_the_next_is_compared(engine: Engine, settings: Settings) -> None:
    add_events(engine)
    worker = Worker(settings, engine)
    first, second = queue(engine, "popularity"), queue(engine, "popularity", promote="never")
    assert worker.work_once()
    assert worker.work_once()
    first, second = read(engine, first), read(engine, second)
    assert (first.state, first.promoted) == ("succeeded", True), first.message
    assert "nothing was active before" in str(first.message)
    assert (second.state, second.promoted) == ("succeeded", False), second.message
    assert first.snapshot == second.snapshot
    assert version_states(engine) == {first.version: "active", second.version: "candidate"}
    third = queue(engine, "popularity")
    assert worker.work_once()
    third = read(engine, third)
    assert third.promoted is True
    assert f"that of the active {first.version}" in str(third.message)
    with engine.connect() as connection:
        actions = connection.execute(sa.select(tables.audit_log.c.action).order_by(tables.audit_log.c.sequence))
        assert list(actions.scalars()) == [
            "model.publish",
            "model.activate",
            "model.publish",
            "model.publish",
            "model.activate",
        ]


def test_a_click_after_a_training_lets_no_clearly_worse_version_in(engine: Engine, settings: Settings) -> None:
    """The active version has trained on all of the next hold-out but the click, yet what it reached before is known."""
    add_events(engine)
    worker = Worker(settings, engine)
    good = queue(engine, "caser", overrides={"epochs": "30", "batch_size": "16"}, promote="guarded")
    assert worker.work_once()
    good = read(engine, good)
    assert good.promoted, good.message
    with writing(engine) as connection:
        click = {"user_id": "user-1", "event_id": "click", "item_id": "item-0", "type": "click"}
        now = datetime.now(UTC)
        connection.execute(sa.insert(tables.events), [{**click, "occurred_at": now, "received_at": now}])
    poor = queue(engine, "popularity")
    assert worker.work_once()
    poor = read(engine, poor)
    assert good.snapshot != poor.snapshot
    assert (poor.state, poor.promoted) == ("succeeded", False), poor.message
    assert "measured on nearly the same hold-out" in str(poor.message)
    assert version_states(engine) == {good.version: "active", poor.version: "candidate"}


def test_a_warm_start_goes_on_from_the_newest_version_once_there_is_news(engine: Engine, settings: Settings) -> None:
    add_events(engine)
    worker = Worker(settings, engine)

    def trained() -> tuple[Run, Manifest, list[str]]:
        run = queue(engine, "matrix_factorization", overrides={"epochs": "2"}, warm_start=True)
        assert worker.work_once()
        run = read(engine, run)
        assert run.version is not None, run.message
        notes = [details["message"] for kind, details in told(engine, run) if kind == "note"]
        return run, Registry(FolderStore(settings.resolved_store_url)).manifest(run.version), notes

    first, made, notes = trained()
    assert (made.parent_version, notes) == (None, [])  # there was none to start from
    _, again, notes = trained()
    assert again.parent_version is None
    assert notes[0].startswith(f"trained from scratch, not from {first.version}: too little is new")
    add_events(engine, start=datetime(2026, 11, 20, tzinfo=UTC), numbers=range(8, 10))
    third, warm, notes = trained()
    assert (warm.parent_version, notes) == (again.version, [])
    assert warm.metrics["evaluated_on"]["interactions"] == 30
    assert third.state == "succeeded"
