"""`python -m ml …`: everything offline. Commands are declared here; their bodies live in their modules."""

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

# Nothing heavy is imported up here: `--help` answers at once, and a command loads only what it needs.

app = typer.Typer(
    name="ml",
    help="Train and evaluate models offline, and look at the versions in a store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


LARGEST_SEED = 2**32 - 1  # of NumPy's older generators, which the search of `tune` draws from


class Device(StrEnum):
    """Where to compute; `auto` takes a GPU where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class UsersIn(StrEnum):
    """Where a line of sequences names its user; `auto` looks whether the first words of all lines differ."""

    AUTO = "auto"
    FIRST = "first"
    LINES = "lines"


Data = Annotated[Path, typer.Option("--data", help="A data set: a folder or a file.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", help="movielens, csv, jsonl, parquet, sequences, pairs or predefined; guessed where left out."
    ),
]
SplitName = Annotated[
    str | None,
    typer.Option(
        "--split", help="leave-one-out, temporal, random, predefined or seeds; by default what suits the format."
    ),
]
RecipeName = Annotated[str, typer.Option("--recipe", help="neumf, caser, matrix_factorization, popularity, …")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting of the recipe: key=value. Repeatable.")
]
Negatives = Annotated[int, typer.Option(min=0, help="Rank among this many sampled items; 0 ranks all items.")]
OnDevice = Annotated[Device, typer.Option("--device", help="Where to compute.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output for scripts.")]
StoreUrl = Annotated[str, typer.Option("--store", help="A folder, or s3://bucket/prefix.")]


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """End with one clear line and exit code 2 on what a user can put right."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@app.command("import")
def import_(
    data: Data,
    store: StoreUrl,
    format: Format = None,  # noqa: A002
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", help="Name a column: user=, item=, type=, value= or time=COLUMN. Repeatable."),
    ] = None,
    users: Annotated[
        UsersIn, typer.Option(help="What names the user of a line of sequences: its first word or its number.")
    ] = UsersIn.AUTO,
    max_bad_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="End with an error if more than this share of the rows is bad.")
    ] = 0.05,
    rejects: Annotated[Path | None, typer.Option(help="Write the bad rows to this file: line, reason, raw.")] = None,
    as_json: Json = False,
) -> None:
    """Read files of events into a snapshot, which `train` trains on."""
    with plain_errors():
        from ml.importing import import_command

        import_command(
            data=data, store_url=store, format=format, columns=columns or [], users=users.value,
            max_bad_share=max_bad_share, rejects_path=rejects, as_json=as_json,
        )  # fmt: skip


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="The folder to write events and items to.")],
    users: Annotated[int, typer.Option(min=1, help="Number of users.")] = 2_000,
    items: Annotated[int, typer.Option(min=20, help="Number of items.")] = 1_000,
    events: Annotated[int, typer.Option(min=2, help="Number of events.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="The same seed gives the same data.")] = 0,
    format: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",  # noqa: A002
    as_json: Json = False,
) -> None:
    """Generate users with tastes and habits, items with titles and categories, and what the users did."""
    with plain_errors():
        from ml.importing import simulate_command

        simulate_command(out=out, users=users, items=items, events=events, seed=seed, format=format, as_json=as_json)


@app.command()
def experiment(
    data: Data,
    recipe: RecipeName,
    format: Format = None,  # noqa: A002
    split: SplitName = None,
    overrides: Overrides = None,
    negatives: Negatives = 0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of weights, samples and random splits.")] = 0,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Run with this many seeds, from --seed on; figures become mean and std.")
    ] = None,
    device: OnDevice = Device.AUTO,
    metrics_out: Annotated[Path | None, typer.Option(help="Write a JSON line for every epoch and result.")] = None,
    as_json: Json = False,
) -> None:
    """Split a data set, train a recipe, evaluate it beside popularity: the whole offline loop."""
    with plain_errors():
        from ml.experiment import run_command

        run_command(
            data=data, format=format, split=split, recipe_name=recipe, settings=overrides or [], negatives=negatives,
            seed=seed, seeds=seeds, device=device.value, metrics_out=metrics_out, as_json=as_json,
        )  # fmt: skip


@app.command()
def train(
    snapshot: Annotated[str, typer.Option(help="Hash of the snapshot to train on.")],
    store: StoreUrl,
    recipe: RecipeName,
    overrides: Overrides = None,
    version: Annotated[str | None, typer.Option(help="Name of the version to publish; made up where left out.")] = None,
    run_id: Annotated[str | None, typer.Option(help="The run this training belongs to, for the manifest.")] = None,
    run_epoch: Annotated[int | None, typer.Option(help="The run's fencing number, for the manifest.")] = None,
    warm_start: Annotated[str | None, typer.Option(help="Start from the weights of this version.")] = None,
    compare: Annotated[str | None, typer.Option(help="Also rank this version on what it has not seen.")] = None,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Keep what is done here, and go on from it.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of weights and samples.")] = 0,
    device: OnDevice = Device.AUTO,
    exit_with_stdin: Annotated[bool, typer.Option(help="Stop when standard input closes.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe on a snapshot, evaluate it in time, refit it on everything and publish the version."""
    from ml.production import run_command

    code = run_command(
        snapshot_hash=snapshot, store_url=store, recipe_name=recipe, settings=overrides or [], version=version,
        run_id=run_id, run_epoch=run_epoch, warm_start=warm_start, compare=compare, checkpoint_dir=checkpoint_dir,
        seed=seed, device=device.value, exit_with_stdin=exit_with_stdin, as_json=as_json,
    )  # fmt: skip
    raise typer.Exit(code)


@app.command()
def evaluate(
    version: Annotated[str, typer.Option(help="The version to evaluate.")],
    store: StoreUrl,
    data: Annotated[Path | None, typer.Option(help="A data set: a folder or a file.")] = None,
    snapshot: Annotated[str | None, typer.Option(help="Or the hash of a snapshot in the store.")] = None,
    format: Format = None,  # noqa: A002
    split: SplitName = None,
    negatives: Negatives = 0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of samples and random splits.")] = 0,
    as_json: Json = False,
) -> None:
    """Evaluate a published version on the test part of a data set or snapshot, beside popularity."""
    with plain_errors():
        from ml.versions import evaluate_command

        evaluate_command(
            version=version, store_url=store, data=data, snapshot_hash=snapshot, format=format, split=split,
            negatives=negatives, seed=seed, as_json=as_json,
        )  # fmt: skip


@app.command()
def versions(store: StoreUrl, as_json: Json = False) -> None:
    """List the versions in a store; those without a sound manifest or with missing files with the reason."""
    with plain_errors():
        from ml.versions import list_command

        list_command(store, as_json=as_json)


@app.command()
def tune(
    data: Data,
    recipe: RecipeName,
    format: Format = None,  # noqa: A002
    split: SplitName = None,
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="How many settings to try, those of the study included.")] = 20,
    folds: Annotated[int, typer.Option(min=1, help="Cross-validate each setting on this many folds in time.")] = 3,
    parameters: Annotated[
        list[str] | None, typer.Option("--tune", help="A setting to search. Repeatable; by default what suits.")
    ] = None,
    study: Annotated[Path | None, typer.Option(help="Keep the trials in this file, and go on from it.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the search and of every training.")] = 0,
    device: OnDevice = Device.AUTO,
    as_json: Json = False,
) -> None:
    """Search a recipe's settings (margin, factors, rate, samples) by cross-validation; the test part is never read."""
    with plain_errors():
        from ml.tune import run_command

        run_command(
            data=data, format=format, split=split, recipe_name=recipe, settings=overrides or [], trials=trials,
            folds=folds, parameters=parameters or [], study_file=study, seed=seed, device=device.value, as_json=as_json,
        )  # fmt: skip


if __name__ == "__main__":
    app(prog_name="python -m ml")
