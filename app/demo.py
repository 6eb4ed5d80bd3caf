"""`shortlist demo`: from nothing to ranked items. Every step that is done already is left out, so that a second start
takes seconds and one that was killed goes on."""

import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
import typer
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from app.database import create_engine, outage_reason, writing
from app.embedded_worker import EmbeddedWorker
from app.importing import figures, import_source, summary
from app.migrations import migrate
from app.progress import shown, shown_together
from app.security import create_key, list_keys, revoke_key
from app.settings import Settings
from app.tables import events
from app.telemetry import configure_logging
from app.terminal import fail
from app.training import runs
from app.training.promotion import active_version
from app.training.runs import Run
from ml.importers import Source, open_source

RECIPES = ("neumf", "caser")
GENERATED = "generated"
GENERATED_USERS, GENERATED_ITEMS, GENERATED_EVENTS = 1_000, 1_500, 80_000
KEY_NAME = "demo"
ACTOR = "demo"
KEY_PREFIX = "demo-"  # of the idempotency keys of its runs
# A worker that was killed with the demo holds its run no longer than this.
LEASE_SECONDS = 10.0
POLL_SECONDS = 0.25
READY_SECONDS = 60.0


@dataclass(frozen=True)
class Marker:
    """What a data folder holds of the demo, kept in a file in it."""

    source: str  # format and name of the imported files, or `generated`
    name: str
    imported: bool

    @staticmethod
    def read(folder: Path) -> "Marker | None":
        try:
            return Marker(**json.loads((folder / "demo.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".demo.json"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(folder / "demo.json")


def run_demo(data: Path | None, *, port: int | None, data_dir: Path | None) -> None:
    """Import or generate, train, promote and serve on this machine until interrupted."""
    begun = time.monotonic()
    try:
        source = None if data is None else open_source(data)
    except (ValueError, OSError) as error:
        fail(str(error))
    settings = _settings(port, data_dir)
    settings = _folder_for(source, settings)
    _check_port(settings)
    configure_logging(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    engine = create_engine(settings.resolved_database_url)
    try:
        # The server returns without an interrupt where the shell that started this had it ignored.
        with suppress(KeyboardInterrupt):
            migrate(engine)
            _fill(engine, settings, source)
            _train(engine, settings)
            key = _new_key(engine)
            with engine.connect() as connection:
                user = connection.execute(sa.select(events.c.user_id).order_by(events.c.position).limit(1)).scalar_one()
                has_model = active_version(connection) is not None
            from app import serve  # here, because it loads torch, which what went wrong before need not wait for

            serve.run(settings, on_ready=lambda url: _in_background(_welcome, url, key, user, has_model, begun))
    except (OSError, OperationalError, engine.dialect.loaded_dbapi.OperationalError) as error:  # such as a full disk
        fail(f"{outage_reason(error)}. Run the same command again to go on from here")
    typer.echo("Stopped. Run the same command again to go on from here.", err=True)
    raise typer.Exit(130)


def _settings(port: int | None, data_dir: Path | None) -> Settings:
    given: dict[str, Any] = {"host": "127.0.0.1", "workers": 1, "lease_seconds": LEASE_SECONDS}
    if port is not None:
        given["port"] = port
    if data_dir is not None:
        given["data_dir"] = data_dir
    settings = Settings(**given)
    if "log_level" not in settings.model_fields_set:
        settings = Settings(**given, log_level="warning")  # what is worth reading here is the demo's own
    return settings


def _folder_for(source: Source | None, settings: Settings) -> Settings:
    """Keep data sets apart: a folder that holds the demo on other data gets one of this data's own inside."""
    marker = Marker.read(settings.data_dir)
    if source is None or marker is None or marker.source == _identity(source):
        return settings
    folder = settings.data_dir / f"demo-{source.name}"
    typer.echo(f"{settings.data_dir} holds the demo on {marker.name}; this one goes to {folder}.", err=True)
    return settings.model_copy(update={"data_dir": folder})


def _identity(source: Source) -> str:
    return f"{source.format} {source.name}"


def _check_port(settings: Settings) -> None:
    """Fail before the work rather than after it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            fail(f"port {settings.port} of {settings.host} cannot be used ({error.strerror}); choose another: --port")


# --- events --------------------------------------------------------------------------------------------------------


def _has_events(engine: Engine) -> bool:
    with engine.connect() as connection:
        return connection.execute(sa.select(events.c.position).limit(1)).first() is not None


def _fill(engine: Engine, settings: Settings, source: Source | None) -> None:
    """Import the data unless that was done; an import that was killed is finished."""
    marker = Marker.read(settings.data_dir)
    if _has_events(engine):
        if marker is None and source is None:
            typer.echo(f"Using the events that are in {settings.data_dir} already.", err=True)
            return
        if marker is not None and marker.imported:
            typer.echo(f"Using what {settings.data_dir} holds already: {marker.name}.", err=True)
            return
    if source is None:
        typer.echo(
            "No data given, so a catalogue and its users' events are generated; nothing in it is real. For real data: "
            "shortlist fetch ml-100k, then shortlist demo --data datasets/ml-100k",
            err=True,
        )
        source = _generated(settings)
        marker = Marker(GENERATED, "a generated catalogue", imported=False)
    else:
        marker = Marker(_identity(source), source.name, imported=False)
    marker.write(settings.data_dir)
    with shown(f"Importing {marker.name}") as show:
        report = import_source(engine, source, on_progress=lambda report, share: show(share, figures(report)))
    typer.echo(summary(report), err=True)
    Marker(marker.source, marker.name, imported=True).write(settings.data_dir)


def _generated(settings: Settings) -> Source:
    """A made-up catalogue and its events, the same at every start."""
    from ml.simulate import simulate

    folder = settings.data_dir / "generated"
    simulate(GENERATED_USERS, GENERATED_ITEMS, GENERATED_EVENTS).write(folder)
    return open_source(folder)


# --- trainings -----------------------------------------------------------------------------------------------------


def _train(engine: Engine, settings: Settings) -> None:
    """Train both models through the queue of runs, side by side; nothing if a version is active and none waits."""
    with engine.connect() as connection:
        mine = [run for run in runs.page(connection, 1_000) if (run.idempotency_key or "").startswith(KEY_PREFIX)]
        if active_version(connection) is not None and all(run.finished for run in mine):
            return
    queued = [_queued(engine, recipe) for recipe in RECIPES]
    if all(run.finished for run in queued):
        typer.echo("Popular items are served: no model was promoted yet.", err=True)
        return
    cores = os.cpu_count() or 1
    workers = min(len(RECIPES), cores)
    environment = settings.as_environment()
    # Small models gain more from a core each than from sharing two.
    environment["OMP_NUM_THREADS"] = str(max(1, cores // workers))
    typer.echo(f"Training {' and '.join(RECIPES)}, {workers} at a time.", err=True)
    with _working([EmbeddedWorker(environment) for _ in range(workers)]):
        finished = _follow(engine, queued)
    with engine.connect() as connection:
        active = active_version(connection)
    for run in finished:
        typer.echo(f"{run.recipe}: {run.state}: {run.message}", err=True)
    if all(run.state != "succeeded" for run in finished):
        fail("no training succeeded; the messages above say why")
    if active is None:
        typer.echo("No model was promoted, so popular items are served; the messages above say why.", err=True)
    else:
        typer.echo(f"Active: {active.version}", err=True)


@contextmanager
def _working(workers: Sequence[EmbeddedWorker]) -> Iterator[None]:
    """Run workers during the block; all are told to stop before any is waited for."""
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        stopping = [threading.Thread(target=worker.stop) for worker in workers]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()


def _queued(engine: Engine, recipe: str) -> Run:
    """The demo's run of a recipe; a new one if the last one failed or was cancelled."""
    attempt = 0
    with writing(engine) as connection:
        while True:
            attempt += 1
            key = f"{KEY_PREFIX}{recipe}-{attempt}"
            known = runs.by_idempotency_key(connection, key)
            if known is None:
                known, _ = runs.create(connection, recipe, idempotency_key=key, requested_by=ACTOR)
            if known.state not in ("failed", "cancelled"):
                return known


def _follow(engine: Engine, queued: Sequence[Run]) -> list[Run]:
    """Show how runs go on until all of them have ended."""
    with shown_together([run.recipe for run in queued]) as shows:
        ended: set[str] = set()
        while True:
            with engine.connect() as connection:
                current = [runs.read(connection, run.run_id) for run in queued]
            for run, show in zip(current, shows, strict=True):
                if run.run_id not in ended:
                    show(*_progress_of(run))
                if run.finished:
                    ended.add(run.run_id)
            if all(run.finished for run in current):
                return current
            time.sleep(POLL_SECONDS)


def _progress_of(run: Run) -> tuple[float | None, str]:
    progress = run.progress or {}
    if run.finished:
        return 1.0, run.state
    if run.state == "queued" or not progress:
        return None, run.state
    parts = [str(progress.get("phase", ""))]
    if progress.get("epoch"):
        parts.append(f"epoch {progress['epoch']}/{progress['epochs']}")
    if progress.get("examples_per_second"):
        parts.append(f"{progress['examples_per_second']:,.0f} examples/s")
    return progress.get("fraction"), ", ".join(parts)


# --- serving -------------------------------------------------------------------------------------------------------


def _new_key(engine: Engine) -> str:
    """A key for this start; the last start's is revoked."""
    now = datetime.now(UTC)
    for old in list_keys(engine):
        if old.name == KEY_NAME and old.usable(now):
            revoke_key(engine, old.key_id, actor=ACTOR)
    return create_key(engine, KEY_NAME, ["admin"], actor=ACTOR).key


def _in_background(target: Any, *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _welcome(url: str, key: str, user: str, has_model: bool, begun: float) -> None:
    """Wait until the service is ready, and say what to try."""
    _await_ready(url, has_model)
    path = f"{url}/users/{quote(user, safe='')}/recommendations?k=5"
    answer = _get(path, key)
    # The click is on what stands first now, so that asking again shows it gone.
    item = answer["items"][0]["item_id"] if answer["items"] else "item-1"
    header = shlex.quote(f"Authorization: Bearer {key}")
    json_header = "-H 'Content-Type: application/json'"
    click = shlex.quote(json.dumps({"user_id": user, "item_id": item, "type": "click"}, ensure_ascii=False))
    retrain = shlex.quote(json.dumps({"recipe": "caser"}))
    lines = (
        f"\nReady after {time.monotonic() - begun:.0f} s on {url}. Try:\n",
        f"curl -H {header} {shlex.quote(path)}\n",
        f"curl -H {header} {json_header} -d {click} {url}/feedback\n",
        f"curl -H {header} {json_header} -d {retrain} {url}/admin/retrain\n",
        f"The HTTP interface is described at {url}/docs. The key works until the next start. Ctrl-C stops.",
    )
    typer.echo("\n".join(lines))


def _await_ready(url: str, has_model: bool) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as response:  # noqa: S310
                if not has_model or json.load(response)["active_version"] is not None:
                    return
        except (urllib.error.URLError, TimeoutError):
            pass
        time.sleep(POLL_SECONDS)
    typer.echo(f"The service is not ready after {READY_SECONDS:.0f} s; see {url}/health/ready", err=True)


def _get(url: str, key: str) -> dict[str, Any]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        answer: dict[str, Any] = json.load(response)
    return answer
