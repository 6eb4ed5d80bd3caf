"""`shortlist …`: the commands and their options. The bodies live in modules of their own, imported when called,
so that `shortlist --help` answers at once."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="shortlist",
    help="A self-hosted recommendation service: events in, trained models out, ranked items to every user.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="Make, list, rotate and revoke API keys.", no_args_is_help=True)
models = typer.Typer(help="See, activate and roll back model versions.", no_args_is_help=True)
runs = typer.Typer(help="See and cancel training runs.", no_args_is_help=True)


@keys.callback()
def keys_group() -> None:
    """Make, list, rotate and revoke API keys."""


@models.callback()
def models_group() -> None:
    """See, activate and roll back model versions."""


@runs.callback()
def runs_group() -> None:
    """See and cancel training runs."""


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document for scripts.")]


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Data to import, MovieLens or any format of `shortlist import`; generated if not given."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on; the setting `port` (8000) if not given.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the database and the models; the setting `data_dir` if not given.")
    ] = None,
) -> None:
    """Import or generate data, train NeuMF and Caser, promote the better one and serve it."""
    from app.demo import run_demo

    run_demo(data, port=port, data_dir=data_dir)


@app.command()
def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; the setting `host` (127.0.0.1) if not given.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; the setting `port` (8000) if not given.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Serving processes; the setting `workers` (1) if not given.")
    ] = None,
) -> None:
    """Answer requests, and train beside it; the database is brought to this release first."""
    from app.serve import serve_command

    serve_command(host=host, port=port, workers=workers)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="File or folder to read.")],
    format: Annotated[  # noqa: A002
        str,
        typer.Option(help="auto, movielens, csv, jsonl, parquet, sequences, pairs or predefined."),
    ] = "auto",
    user_column: Annotated[str | None, typer.Option(help="Column of the user ids.")] = None,
    item_column: Annotated[str | None, typer.Option(help="Column of the item ids.")] = None,
    time_column: Annotated[str | None, typer.Option(help="Column of the times.")] = None,
    value_column: Annotated[str | None, typer.Option(help="Column of the values.")] = None,
    type_column: Annotated[str | None, typer.Option(help="Column of the event types.")] = None,
    max_bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Stop when more than this share of the rows is bad.")
    ] = 0.05,
    rejects: Annotated[
        Path | None, typer.Option(help="Write the bad rows here, as CSV with line number and reason.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Import events, titles and categories from a file or folder into the database."""
    from app.importing import import_command

    columns = {
        "user": user_column,
        "item": item_column,
        "time": time_column,
        "value": value_column,
        "type": type_column,
    }
    import_command(
        path,
        format=format,
        columns={name: column for name, column in columns.items() if column},
        max_bad_share=max_bad_share,
        rejects=rejects,
        as_json=json,
    )


@app.command()
def export(
    what: Annotated[str, typer.Argument(help="events, items or users.")],
    format: Annotated[str, typer.Option(help="jsonl, csv or parquet.")] = "jsonl",  # noqa: A002
    out: Annotated[str, typer.Option(help="File to write; - is the standard output.")] = "-",
) -> None:
    """Export events, items or users from the database."""
    from app.exporting import export_command

    export_command(what, format=format, out=out)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="The data set: ml-100k.")],
    to: Annotated[Path, typer.Option(help="Folder to unpack into.")] = Path("datasets"),
) -> None:
    """Download a public data set, check it and unpack it."""
    from app.fetch import fetch_command

    fetch_command(name, to)


@app.command()
def worker(
    name: Annotated[
        str | None, typer.Option(help="Name in the runs it works on; host and process if not given.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End when no run waits.")] = False,
) -> None:
    """Train the runs that wait, one after another, until stopped."""
    from app.training.commands import worker_command

    worker_command(name=name, once=once)


@app.command()
def retrain(
    recipe: Annotated[str, typer.Argument(help="The recipe to train, such as neumf or caser.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting of the recipe, key=value; repeatable.")
    ] = None,
    promote: Annotated[str, typer.Option(help="guarded, always or never.")] = "guarded",
    warm_start: Annotated[bool, typer.Option("--warm-start", help="Start from this recipe's newest version.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    json: JsonOption = False,
) -> None:
    """Queue a training for a worker."""
    from app.training.commands import retrain_command

    retrain_command(recipe, overrides=overrides or (), promote=promote, warm_start=warm_start, wait=wait, as_json=json)


@app.command()
def migrate() -> None:
    """Bring the database to the tables of this release; every command that needs them does so by itself."""
    from app.keys import migrate_command

    migrate_command()


@app.command()
def openapi(
    out: Annotated[str, typer.Option(help="File to write; - is the standard output.")] = "-",
    against: Annotated[
        Path | None,
        typer.Option(
            help="An older description: print what breaks its callers instead, and exit with 1 if anything does."
        ),
    ] = None,
) -> None:
    """Export the OpenAPI description of the service, or compare it with an older one."""
    from app.openapi import openapi_command

    openapi_command(out=out, against=against)


KeyArgument = Annotated[str, typer.Argument(help="The key's id: the 12 characters after `sl_`.")]


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="recommend, feedback or admin; repeatable; recommend and feedback if not given."),
    ] = None,
    expires_days: Annotated[float | None, typer.Option(help="Days until it expires; never if not given.")] = None,
    json: JsonOption = False,
) -> None:
    """Make a key and print it, this once."""
    from app.keys import keys_create_command

    keys_create_command(name, scopes=scope or ("recommend", "feedback"), expires_days=expires_days, as_json=json)


@keys.command("list")
def keys_list(json: JsonOption = False) -> None:
    """List the keys, oldest first."""
    from app.keys import keys_list_command

    keys_list_command(as_json=json)


@keys.command("rotate")
def keys_rotate(
    key_id: KeyArgument,
    grace_hours: Annotated[float, typer.Option(help="How long the old key still works.")] = 24.0,
    json: JsonOption = False,
) -> None:
    """Make a key with the scopes of an old one, which works on for a while."""
    from app.keys import keys_rotate_command

    keys_rotate_command(key_id, grace_hours=grace_hours, as_json=json)


@keys.command("revoke")
def keys_revoke(key_id: KeyArgument) -> None:
    """Revoke a key."""
    from app.keys import keys_revoke_command

    keys_revoke_command(key_id)


LimitOption = Annotated[int, typer.Option(min=1, max=1000, help="How many to show at most.")]
RunArgument = Annotated[str, typer.Argument(help="The run's id.")]
VersionArgument = Annotated[str, typer.Argument(help="The version's name.")]


@runs.command("list")
def runs_list(limit: LimitOption = 20, json: JsonOption = False) -> None:
    """List the runs, newest first."""
    from app.training.commands import runs_list_command

    runs_list_command(limit=limit, as_json=json)


@runs.command("show")
def runs_show(run_id: RunArgument, json: JsonOption = False) -> None:
    """Show all about a run."""
    from app.training.commands import runs_show_command

    runs_show_command(run_id, as_json=json)


@runs.command("watch")
def runs_watch(run_id: RunArgument) -> None:
    """Follow a run to its end; the exit status is 1 unless it succeeds."""
    from app.training.commands import runs_watch_command

    runs_watch_command(run_id)


@runs.command("cancel")
def runs_cancel(run_id: RunArgument) -> None:
    """Cancel a run."""
    from app.training.commands import runs_cancel_command

    runs_cancel_command(run_id)


@models.command("list")
def models_list(limit: LimitOption = 20, json: JsonOption = False) -> None:
    """List the versions, newest first, those found in the store too."""
    from app.training.commands import models_list_command

    models_list_command(limit=limit, as_json=json)


@models.command("show")
def models_show(version: VersionArgument, json: JsonOption = False) -> None:
    """Show all about a version."""
    from app.training.commands import models_show_command

    models_show_command(version, as_json=json)


@models.command("activate")
def models_activate(version: VersionArgument) -> None:
    """Make a version the one that answers."""
    from app.training.commands import models_activate_command

    models_activate_command(version)


@models.command("rollback")
def models_rollback() -> None:
    """Return to the version that was active before."""
    from app.training.commands import models_rollback_command

    models_rollback_command()


app.add_typer(keys, name="keys")
app.add_typer(models, name="models")
app.add_typer(runs, name="runs")

if __name__ == "__main__":
    app()
