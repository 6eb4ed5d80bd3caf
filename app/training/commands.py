"""The bodies of `shortlist worker | retrain | runs | models`."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import Any

import sqlalchemy as sa
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from sqlalchemy.engine import Engine

from app import audit
from app.database import create_engine, writing
from app.migrations import migrate
from app.settings import Settings
from app.tables import model_versions
from app.telemetry import configure_logging
from app.terminal import fail, print_table
from app.times import rfc3339
from app.training import runs, versions
from app.training.promotion import NothingToRollBackTo
from app.training.runs import Promote, Run, RunIsOver
from ml.recipes import apply_overrides, recipe_named
from ml.registry import Registry, VersionDamaged
from ml.store import StoreUnavailable, open_store

ACTOR = "cli"
FOLLOW_SECONDS = 0.3


@contextmanager
def _opened(settings: Settings | None) -> Iterator[tuple[Settings, Engine]]:
    settings = settings or Settings()
    engine = create_engine(settings.resolved_database_url)
    try:
        migrate(engine)
        yield settings, engine
    except StoreUnavailable as error:
        fail(str(error))
    finally:
        engine.dispose()


def _registry(settings: Settings) -> Registry:
    return Registry(open_store(settings.resolved_store_url), settings.data_dir / "cache")


def _print_json(document: Any) -> None:
    def plain(value: Any) -> str:
        return rfc3339(value) if isinstance(value, datetime) else str(value)

    typer.echo(json.dumps(document, default=plain, indent=2))


# --- worker ----------------------------------------------------------------------------------------------------------


def worker_command(*, name: str | None = None, once: bool = False, settings: Settings | None = None) -> None:
    """Train what is in the queue until stopped; with `once`, until the queue is empty."""
    from app.training.worker import Worker, stopped_by_signals

    settings = settings or Settings()
    configure_logging(settings)
    with _opened(settings) as (own_settings, engine):
        worker = Worker(own_settings, engine, name=name)
        with stopped_by_signals(worker):
            if once:
                while worker.work_once():
                    pass
            else:
                worker.work()


# --- retrain and runs ------------------------------------------------------------------------------------------------


def retrain_command(
    recipe: str,
    *,
    overrides: Sequence[str] = (),
    promote: str = "guarded",
    warm_start: bool = False,
    wait: bool = False,
    as_json: bool = False,
    settings: Settings | None = None,
) -> None:
    """Queue a run; with `wait`, follow it to its end and exit with 1 unless it succeeded."""
    changes = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            fail(f"{override!r} is not key=value")
        changes[key] = value
    try:
        apply_overrides(recipe_named(recipe), changes)
    except ValueError as error:
        fail(str(error))
    modes: dict[str, Promote] = {"guarded": "guarded", "always": "always", "never": "never"}
    if promote not in modes:
        fail(f"promote must be one of {', '.join(modes)}, not {promote!r}")
    with _opened(settings) as (_, engine):
        with writing(engine) as connection:
            run, _is_new = runs.create(
                connection,
                recipe,
                overrides=changes,
                promote=modes[promote],
                warm_start=warm_start,
                requested_by=ACTOR,
            )
            details = {"recipe": recipe, "set": changes, "promote": promote}
            audit.record(connection, ACTOR, "run.create", run.run_id, details)
        if wait:
            run = _follow(engine, run.run_id, quiet=as_json)
        if as_json:
            _print_json(asdict(run))
        elif not wait:
            typer.echo(f"queued run {run.run_id}; follow it with `shortlist runs watch {run.run_id}`")
    if wait and run.state != "succeeded":
        raise typer.Exit(1)


def runs_list_command(*, limit: int = 20, as_json: bool = False, settings: Settings | None = None) -> None:
    """Print the newest runs."""
    with _opened(settings) as (_, engine), engine.connect() as connection:
        found = runs.page(connection, limit)
    if as_json:
        _print_json([asdict(run) for run in found])
        return
    columns = ["run", "recipe", "state", "created", "version", "promoted", "message"]
    print_table(columns, [[*_summary(run), run.version, run.promoted, run.message] for run in found])


def _summary(run: Run) -> list[object]:
    return [run.run_id, run.recipe, run.state, f"{run.created_at:%Y-%m-%d %H:%M:%S}"]


def runs_show_command(run_id: str, *, as_json: bool = False, settings: Settings | None = None) -> None:
    """Print one run in full."""
    with _opened(settings) as (_, engine):
        run = _read(engine, run_id)
    _print_one(asdict(run), as_json)


def _print_one(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(values)
    else:
        print_table(["", ""], [[key, value] for key, value in values.items() if value is not None])


def _read(engine: Engine, run_id: str) -> Run:
    with engine.connect() as connection:
        try:
            return runs.read(connection, run_id)
        except KeyError:
            fail(f"there is no run {run_id}; `shortlist runs list` lists them")


def runs_cancel_command(run_id: str, *, settings: Settings | None = None) -> None:
    """Cancel a run."""
    with _opened(settings) as (_, engine):
        _read(engine, run_id)
        try:
            with writing(engine) as connection:
                run = runs.request_cancel(connection, run_id)
                audit.record(connection, ACTOR, "run.cancel", run_id)
        except RunIsOver as error:
            fail(f"run {run_id} cannot be cancelled: {error}")
    typer.echo("cancelled" if run.state == "cancelled" else "its worker will stop within a second or two")


def runs_watch_command(run_id: str, *, settings: Settings | None = None) -> None:
    """Follow a run to its end; exit with 1 unless it succeeded."""
    with _opened(settings) as (_, engine):
        _read(engine, run_id)
        run = _follow(engine, run_id)
    if run.state != "succeeded":
        raise typer.Exit(1)


def _follow(engine: Engine, run_id: str, *, quiet: bool = False) -> Run:
    """Show the run's progress: a bar on a terminal, lines elsewhere, nothing if quiet."""
    console = Console(quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}"),
    )
    sequence = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(run_id, total=1.0, note="")
        while True:
            with engine.connect() as connection:
                run = runs.read(connection, run_id)
                rows = runs.events_after(connection, run_id, sequence)
            for row in rows:
                sequence = row.sequence
                if row.kind == "progress":
                    note = describe("progress", row.details)
                    bar.update(task, completed=row.details.get("fraction") or 0, note=note)
                else:
                    console.print(describe(row.kind, row.details), highlight=False, markup=False)
            if run.finished and not rows:
                return run
            time.sleep(FOLLOW_SECONDS)


def describe(kind: str, details: dict[str, Any]) -> str:
    """One line for a person about what a run told."""
    if kind == "state":
        return f"{details['state']}{': ' + details['message'] if details.get('message') else ''}"
    shown = {key: value for key, value in details.items() if value is not None}
    return f"{kind}: " + ", ".join(f"{key} {_brief(value)}" for key, value in shown.items())


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        wanted = {key: entry for key, entry in value.items() if isinstance(entry, (int, float))}
        chosen = {key: wanted[key] for key in ("ndcg@10", "hit_rate@10") if key in wanted} or wanted
        return " ".join(f"{key} {_brief(entry)}" for key, entry in list(chosen.items())[:4])
    return str(value)


# --- models ----------------------------------------------------------------------------------------------------------


def models_list_command(*, limit: int = 20, as_json: bool = False, settings: Settings | None = None) -> None:
    """Print the newest versions, those found in the store too."""
    with _opened(settings) as (own_settings, engine):
        versions.discover(engine, _registry(own_settings))
        newest = sa.select(model_versions).order_by(model_versions.c.created_at.desc()).limit(limit)
        with engine.connect() as connection:
            rows = [dict(row._mapping) for row in connection.execute(newest)]
    if as_json:
        _print_json(rows)
        return
    lines = []
    for row in rows:
        metrics = row["manifest"].get("metrics", {})
        measured = [_ndcg(metrics, part) for part in ("test", "popularity")]
        lines.append([row["version"], row["state"], f"{row['created_at']:%Y-%m-%d %H:%M:%S}", *measured])
    print_table(["version", "state", "created", "nDCG@10", "popularity's"], lines)


def _ndcg(metrics: dict[str, Any], part: str) -> str:
    value = (metrics.get(part) or {}).get("ndcg@10")
    return "" if value is None else f"{value:.4f}"


def models_show_command(version: str, *, as_json: bool = False, settings: Settings | None = None) -> None:
    """Print one version in full."""
    with _opened(settings) as (own_settings, engine):
        versions.discover(engine, _registry(own_settings))
        with engine.connect() as connection:
            row = connection.execute(sa.select(model_versions).where(model_versions.c.version == version)).one_or_none()
    if row is None:
        fail(f"there is no version {version}; `shortlist models list` lists them")
    _print_one(dict(row._mapping), as_json)


def models_activate_command(version: str, *, settings: Settings | None = None) -> None:
    """Make a version the active one."""

    def change(engine: Engine, registry: Registry) -> str:
        changed = versions.activate(engine, registry, version, actor=ACTOR, reason="by hand")
        return f"{version} is active" + ("" if changed else ", as it was")

    _change(change, settings)


def models_rollback_command(*, settings: Settings | None = None) -> None:
    """Return to the version that was active before."""

    def change(engine: Engine, registry: Registry) -> str:
        version, replaced = versions.rollback(engine, registry, actor=ACTOR)
        return f"{version} is active, in place of {replaced}"

    _change(change, settings)


def _change(change: Callable[[Engine, Registry], str], settings: Settings | None) -> None:
    with _opened(settings) as (own_settings, engine):
        try:
            typer.echo(change(engine, _registry(own_settings)))
        except KeyError as error:
            fail(f"there is no version {error.args[0]}; `shortlist models list` lists them")
        except (VersionDamaged, NothingToRollBackTo) as error:
            fail(str(error))
