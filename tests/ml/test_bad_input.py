import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from ml.__main__ import app
from ml.recipes import RECIPES
from ml.snapshots import DEFAULT_MEANINGS, make_snapshot, publish, write_part
from ml.store import FolderStore

Rows = list[tuple[str, str, int]]

# What a recommender can hardly learn from, as (user, item, second).
DATA: dict[str, Rows] = {
    "no events": [],
    "one event": [("u", "a", 1)],
    "one user": [("u", f"i{number}", number) for number in range(6)],
    "one user, one item": [("u", "a", second) for second in range(6)],
    "one item": [(f"u{number}", "a", number) for number in range(6)],
    "users with one event": [(f"u{number}", f"i{number % 4}", number) for number in range(12)],
    "one user with more than one event": [("u", f"i{number}", number) for number in range(4)]
    + [(f"v{number}", "i1", number) for number in range(4)],
    "one moment": [(f"u{user}", f"i{(user + number) % 7}", 5) for user in range(8) for number in range(4)],
    "all items taken": [(f"u{user}", f"i{number}", number) for user in range(4) for number in range(4)],
    "the same item again": [(f"u{user}", f"i{user % 2}", second) for user in range(4) for second in range(5)],
}
# Which of them hold nothing that could be trained and tested on.
TOO_LITTLE = {
    "no events",
    "one event",
    "one user, one item",
    "one item",
    "users with one event",
    "the same item again",
}


def quick(recipe: str) -> list[str]:
    return [] if recipe == "popularity" else ["--set", "epochs=1", "--set", "factors=4", "--set", "negatives=4"]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float):
        yield value


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    # A command ends by itself; anything else would be a traceback.
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def check(result: Any, name: str, error: str) -> None:
    """A sound result, or one line that says what is wrong."""
    if name in TOO_LITTLE:
        assert result.exit_code == 2, result.output
        assert len(error.splitlines()) == 1
    else:
        assert result.exit_code == 0, result.output
        found = [number for line in result.stdout.splitlines() for number in numbers(json.loads(line))]
        assert found
        assert all(map(math.isfinite, found))


@pytest.mark.parametrize("name", DATA)
def test_an_experiment_on_poor_data_is_sound_or_a_clear_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "events.csv"
    lines = [f"{user},{item},{1_700_000_000 + second}" for user, item, second in DATA[name]]
    path.write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    for recipe in RECIPES:
        result = run("experiment", "--data", path, "--recipe", recipe, *quick(recipe), "--json")
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        check(result, name, "\n".join(errors))


@pytest.mark.parametrize("name", DATA)
def test_a_training_on_poor_data_is_sound_or_a_clear_error(tmp_path: Path, name: str) -> None:
    store = FolderStore(tmp_path / "store")
    columns = list(zip(*DATA[name], strict=True)) or [(), (), ()]
    times = pa.array([1_700_000_000_000_000 + 1_000_000 * second for second in columns[2]], pa.int64())
    table = pa.table(
        {
            "user_id": pa.array(columns[0], pa.string()),
            "item_id": pa.array(columns[1], pa.string()),
            "type": pa.array(["view"] * len(times), pa.string()),
            "value": pa.nulls(len(times), pa.float64()),
            "time": times.cast(pa.timestamp("us", "UTC")),
        }
    )
    watermark = {"position": 1, "transaction_id": None, "time": None, "erasures_through": 0}
    snapshot = make_snapshot([write_part(store, table)], DEFAULT_MEANINGS, watermark)
    publish(store, snapshot)
    for recipe in RECIPES:
        where = ("--snapshot", snapshot.hash, "--store", store.path)
        result = run("train", *where, "--recipe", recipe, *quick(recipe), "--json")
        check(result, name, "\n".join(line for line in result.stdout.splitlines() if '"error"' in line))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("learning_rate=-0.1", "learning_rate must be more than 0, not -0.1"),
        ("learning_rate=nan", "learning_rate must be more than 0, not nan"),
        ("l2=-1", "l2 must be at least 0, not -1"),
        ("batch_size=0", "batch_size must be at least 1, not 0"),
        ("epochs=some", "epochs must be a whole number, not 'some'"),
        ("color=red", "unknown setting 'color'"),
        ("loss=love", "loss must be one of"),
        ("recency=inf", "recency must be at least 0, not inf"),
    ],
)
def test_a_bad_setting_is_refused_for_every_recipe(tmp_path: Path, setting: str, reason: str) -> None:
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id,timestamp\nu,a,1\n")
    for recipe in RECIPES:
        for command in (("experiment", "--data", path), ("train", "--snapshot", "0", "--store", tmp_path)):
            result = run(*command, "--recipe", recipe, "--set", setting)
            assert result.exit_code == 2
            [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert reason in error
