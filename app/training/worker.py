"""The worker: claims runs, trains each in a process of its own, and says in one transaction what came of it."""

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Engine

from app import audit
from app.database import is_outage, writing
from app.settings import Settings
from app.tables import model_versions
from app.training import promotion, runs, versions
from app.training.lease import Lease, RunCancelled
from app.training.process import TrainingProcess
from app.training.runs import LeaseLost, Run
from app.training.snapshots import take_snapshot
from ml.registry import Registry, VersionDamaged
from ml.snapshots import Snapshot, SnapshotDamaged, read_snapshot
from ml.store import open_store

POLL_SECONDS = 0.5
PROGRESS_SECONDS = 1.0  # between two writes of a training's progress
DISCOVER_SECONDS = 10.0
TIDY_SECONDS = 3600.0
OUTAGE_SECONDS = 1.0  # between two attempts to reach a database that is gone

log = structlog.get_logger(__name__)
Result = TypeVar("Result")


class RunFailed(RuntimeError):  # noqa: N818
    """The training ended with an error that its requester should read."""


class WorkerStopped(Exception):  # noqa: N818 - nothing went wrong
    """The worker was told to stop; its run goes back into the queue."""


class Worker:
    """Works on one run at a time; several workers share the queue through the database."""

    def __init__(self, settings: Settings, engine: Engine, *, name: str | None = None) -> None:
        self.name = name or f"{socket.gethostname()[:200]}:{os.getpid()}"
        self._settings = settings
        self._engine = engine
        self._store = open_store(settings.resolved_store_url)
        self._registry = Registry(self._store, settings.data_dir / "cache")
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let `work` return soon; a run in progress goes back into the queue. Any thread may call this."""
        self._stop.set()

    def work(self) -> None:
        """Train what is in the queue, and keep house in between, until told to stop."""
        log.info("worker started", worker=self.name)
        discover, tidy = 0.0, 0.0
        while not self._stop.is_set():
            try:
                if self.work_once():
                    continue
                if time.monotonic() >= discover:
                    versions.discover(self._engine, self._registry)
                    discover = time.monotonic() + DISCOVER_SECONDS
                if time.monotonic() >= tidy:
                    versions.tidy(self._engine, self._store, self._registry, self._settings)
                    tidy = time.monotonic() + TIDY_SECONDS
            except Exception as error:  # a store or database that is gone must not end the worker
                if is_outage(error):
                    log.warning("database unavailable", worker=self.name, reason=type(error).__name__)
                else:
                    log.exception("worker failed", worker=self.name)
                self._stop.wait(OUTAGE_SECONDS)
            self._stop.wait(POLL_SECONDS)
        log.info("worker stopped", worker=self.name)

    def work_once(self) -> bool:
        """Claim and finish one run; False if none waits."""
        run = runs.claim(
            self._engine,
            self.name,
            lease_seconds=self._settings.lease_seconds,
            max_attempts=self._settings.max_attempts,
        )
        if run is None:
            return False
        with structlog.contextvars.bound_contextvars(run_id=run.run_id, epoch=run.epoch):
            log.info("run claimed", recipe=run.recipe, attempt=run.attempts)
            try:
                with Lease(self._engine, run, self._settings.lease_seconds) as lease:
                    self._do(run, lease)
            except LeaseLost as error:
                log.warning("run lost", reason=str(error))
        return True

    def _do(self, run: Run, lease: Lease) -> None:
        """Train, and write down how it ended. Raises LeaseLost, and what a database said that went away."""
        try:
            self._train(run, lease)
        except LeaseLost:
            raise
        except WorkerStopped:
            self._surely(lambda: runs.release(self._engine, run))
            log.info("run released")
            return
        except RunCancelled as reason:
            self._end(run, "cancelled", str(reason))
        except RunFailed as error:
            self._end(run, "failed", str(error))
        except Exception as error:
            if is_outage(error):
                raise  # not the training's fault: the lease ends, and the run is taken up again
            log.exception("run failed")
            self._end(run, "failed", f"{type(error).__name__}: {error}"[:2000])
        shutil.rmtree(self._settings.runs_dir / run.run_id, ignore_errors=True)

    def _end(self, run: Run, state: str, message: str) -> None:
        def end() -> None:
            with writing(self._engine) as connection:
                runs.finish(connection, run, state, message)

        self._surely(end)
        log.info("run ended", state=state, message=message)

    def _surely(self, write: Callable[[], Result]) -> Result:
        """Write what a training came to, however long the database is gone; the fence tells if it still counts."""
        while True:
            try:
                return write()
            except Exception as error:
                if not is_outage(error) or self._stop.is_set():
                    raise
                log.warning("database unavailable", reason=type(error).__name__)
            self._stop.wait(OUTAGE_SECONDS)

    def _check(self, lease: Lease) -> None:
        lease.check()
        if self._stop.is_set():
            raise WorkerStopped

    def _train(self, run: Run, lease: Lease) -> None:
        snapshot = self._snapshot(run, lease)
        version = f"{run.recipe}-{run.run_id}-{run.epoch}"
        with self._engine.connect() as connection:
            row = promotion.active_version(connection)
        active = None if row is None else str(row.version)
        arguments = self._arguments(run, snapshot, version, active)
        evaluated: dict[str, Any] = {}
        published: dict[str, Any] | None = None
        told = 0.0
        with TrainingProcess(arguments) as process:
            log.info("training started", pid=process.pid, snapshot=snapshot.hash)
            while True:
                self._check(lease)
                try:
                    line = process.next_line(timeout=0.2)
                except TimeoutError:
                    continue
                except EOFError:
                    break
                kind = line.pop("kind")
                if kind == "error":
                    raise RunFailed(str(line.get("message", "the training failed without a message"))[:2000])
                if kind == "evaluated":
                    evaluated = line
                if kind == "published":
                    published = line
                if kind != "progress":
                    log.info(f"training: {kind}", **_brief(line))
                elif time.monotonic() - told < PROGRESS_SECONDS:
                    continue
                else:
                    told = time.monotonic()
                self._tell(run, kind, line)
            status, last_words = process.end()
        self._check(lease)
        if status != 0 or published is None:
            raise RunFailed(_explain(status, last_words))
        self._conclude(run, version, evaluated.get("compared"), active)

    def _snapshot(self, run: Run, lease: Lease) -> Snapshot:
        """The snapshot of the first attempt, so that its checkpoint goes on, or a new one."""
        if run.snapshot is not None:
            try:
                return read_snapshot(self._store, run.snapshot)
            except (KeyError, SnapshotDamaged) as error:
                log.warning("snapshot of the first attempt is gone", reason=str(error))
        self._tell(run, "phase", {"phase": "snapshot"})
        snapshot = take_snapshot(self._engine, self._store, self._settings, check=lambda: self._check(lease))
        events = sum(part.rows for part in snapshot.parts)
        if events == 0:
            raise RunFailed("there are no events to train on: post feedback or import data first")
        details = {"hash": snapshot.hash, "events": events, "parts": len(snapshot.parts)}
        self._surely(lambda: runs.report(self._engine, run, "snapshot", details, snapshot=snapshot.hash))
        return snapshot

    def _arguments(self, run: Run, snapshot: Snapshot, version: str, active: str | None) -> list[str]:
        arguments = ["--snapshot", snapshot.hash, "--store", self._settings.resolved_store_url]
        arguments += ["--recipe", run.recipe, "--version", version]
        arguments += ["--run-id", run.run_id, "--run-epoch", str(run.epoch)]
        arguments += ["--checkpoint-dir", str(self._checkpoints(run))]
        for key, value in run.overrides.items():
            arguments += ["--set", f"{key}={value}"]
        with self._engine.connect() as connection:
            same_recipe = (
                sa.select(model_versions.c.version)
                .where(model_versions.c.recipe == run.recipe)
                .order_by(model_versions.c.created_at.desc(), model_versions.c.version.desc())
                .limit(1)
            )
            newest = connection.execute(same_recipe).scalar_one_or_none() if run.warm_start else None
        if active is not None and run.promote == "guarded":
            arguments += ["--compare", active]
        if newest is not None:
            arguments += ["--warm-start", newest]
        return arguments

    def _checkpoints(self, run: Run) -> Path:
        """A folder of this attempt's own, holding the last attempt's checkpoint.

        Were it shared, the process of a worker that lost the run could still write into it.
        """
        folder = self._settings.runs_dir / run.run_id
        own = folder / f"attempt-{run.epoch}"
        if own.is_dir():
            return own
        for epoch in range(run.epoch - 1, 0, -1):
            earlier = folder / f"attempt-{epoch}"
            if earlier.is_dir():
                unfinished = folder / f"copy-{run.epoch}"
                shutil.rmtree(unfinished, ignore_errors=True)
                shutil.copytree(earlier, unfinished)
                unfinished.rename(own)
                return own
        own.mkdir(parents=True)
        return own

    def _tell(self, run: Run, kind: str, details: dict[str, Any]) -> None:
        values = {"progress": details} if kind in ("phase", "progress", "epoch") else {}
        try:
            runs.report(self._engine, run, kind, details, **values)
        except Exception as error:
            if not is_outage(error):
                raise
            log.warning("progress not written", reason=type(error).__name__)

    def _conclude(self, run: Run, version: str, compared: dict[str, Any] | None, active_at_start: str | None) -> None:
        """Enter the version, promote it if the guard lets it, and end the run: all of it or nothing."""
        try:
            _, manifest = self._registry.load(version)
        except VersionDamaged as error:
            raise RunFailed(f"the version that the training published cannot be loaded: {error}") from error

        def conclude() -> promotion.Decision:
            with writing(self._engine) as connection:
                runs.update_claimed(connection, run, worker=self.name)
                if runs.read(connection, run.run_id).cancel_requested:
                    raise RunCancelled("cancelled just before it was done")
                promotion.lock(connection)
                active = promotion.active_version(connection)
                manifest_now = None if active is None else active.manifest
                decision = promotion.decide(run.promote, manifest.as_json(), manifest_now, compared, active_at_start)
                recipe = versions.recipe_name(manifest)
                promotion.add_candidate(connection, version, recipe, manifest.as_json(), run.run_id)
                audit.record(connection, "worker", "model.publish", version, {"run_id": run.run_id})
                if decision.promote:
                    promotion.activate(connection, version, actor="worker", reason=decision.message)
                outcome = {"version": version, "promoted": decision.promote}
                runs.finish(connection, run, "succeeded", decision.message, **outcome)
                return decision

        decision = self._surely(conclude)
        log.info("run ended", state="succeeded", version=version, promoted=decision.promote, message=decision.message)


def _brief(details: dict[str, Any]) -> dict[str, Any]:
    """What of a line goes into the log: its plain values; the followers of the run get all of it."""
    return {key: value for key, value in details.items() if isinstance(value, str | int | float)}


def _explain(status: int, last_words: str) -> str:
    if status == 0:
        return "the training ended without publishing a version"
    cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    hint = "; it may have run out of memory" if status == -signal.SIGKILL else ""
    return f"the training process {cause}{hint}{': ' + last_words if last_words else ''}"[:2000]


@contextmanager
def stopped_by_signals(worker: Worker) -> Iterator[None]:
    """Let SIGTERM and SIGINT stop the worker. Main thread only."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        worker.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
