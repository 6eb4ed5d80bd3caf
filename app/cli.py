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
keys = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
models = typer.Typer(help="See, activate and roll back model versions.", no_args_is_help=True)
runs = typer.Typer(help="See and cancel training runs.", no_args_is_help=True)


@keys.callback()
def keys_group() -> None:
    """Make, list and revoke API keys."""


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


app.add_typer(keys, name="keys")
app.add_typer(models, name="models")
app.add_typer(runs, name="runs")

if __name__ == "__main__":
    app()
