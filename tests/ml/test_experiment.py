import json
import math
import os
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ml import experiment
from ml.__main__ import app
from ml.evaluate import popularity_of
from ml.experiment import SHOWN_METRICS
from ml.importers import load_interactions
from ml.interactions import Interactions
from ml.recipes import RECIPES, apply_overrides, recipe_named
from ml.registry import Registry
from ml.split import leave_one_out, split_by_name
from ml.store import FolderStore
from ml.train import train
from ml.versions import microseconds, rfc3339

QUICK = ["--set", "epochs=2", "--set", "factors=8", "--set", "negatives=8"]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Users who keep to one of four tastes."""
    generator = np.random.default_rng(0)
    rows = ["user_id,item_id,timestamp"]
    for user in range(80):
        liked = generator.permutation([item for item in range(60) if item % 4 == user % 4])[:9]
        rows += [f"u{user},i{item},{1_700_000_000 + 60 * turn + user}" for turn, item in enumerate(liked)]
    path = tmp_path / "events.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    found: dict[str, Any] = json.loads(result.stdout)
    assert_finite(found)
    return found


def assert_finite(value: Any) -> None:
    if isinstance(value, dict):
        for inner in value.values():
            assert_finite(inner)
    elif isinstance(value, list):
        for inner in value:
            assert_finite(inner)
    elif isinstance(value, float):
        assert math.isfinite(value)


def test_one_json_document_with_everything(csv: Path) -> None:
    found = document("experiment", "--data", csv, "--recipe", "matrix_factorization", "--set", "epochs=10", "--seed", 3)
    assert found["recipe"] == "matrix_factorization"
    assert found["seed"] == 3
    assert found["data"] == {
        "name": "events.csv", "format": "csv", "rejected": 0, "interactions": 720, "users": 80, "items": 60,
    }  # fmt: skip
    assert found["split"] == {"name": "leave-one-out", "train": 560, "validation": 80, "test": 80, "candidates": 60}
    assert {*SHOWN_METRICS, "precision@10", "ndcg@50", "coverage@5"} <= set(found["test"])
    assert set(found["validation"]) == set(found["test"])
    low, high = found["intervals"]["test"]["ndcg@10"]
    assert low <= found["test"]["ndcg@10"] <= high
    # Popularity knows no tastes; a factorisation learns them.
    assert found["test"]["ndcg@10"] > found["popularity"]["test"]["ndcg@10"] * 1.5
    assert found["settings"]["epochs"] == 10
    assert found["seconds"] > 0


def test_a_seed_reproduces_to_the_last_digit(csv: Path) -> None:
    first, second, other = (
        document("experiment", "--data", csv, "--recipe", "caser", *QUICK, "--seed", seed)["test"] for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_seeds_give_mean_and_spread(csv: Path, tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    found = document("experiment", "--data", csv, "--recipe", "neumf", *QUICK, "--seeds", 2, "--metrics-out", lines)
    assert found["seed"] == [0, 1]
    values = [run["test"]["ndcg@10"] for run in found["runs"]]
    assert found["test"]["ndcg@10"] == {
        "mean": pytest.approx(np.mean(values)),
        "std": pytest.approx(np.std(values, ddof=1)),
    }
    kinds = [json.loads(line)["kind"] for line in lines.read_text().splitlines()]
    assert kinds == ["epoch", "epoch", "result"] * 2


@pytest.mark.parametrize("split", ["leave-one-out", "temporal", "random"])
@pytest.mark.parametrize("negatives", [0, 10])
def test_splits_and_negatives(csv: Path, split: str, negatives: int) -> None:
    found = document("experiment", "--data", csv, "--recipe", "popularity", "--split", split, "--negatives", negatives)
    assert found["split"]["name"] == split
    assert found["test"] == found["popularity"]["test"]


def test_the_format_chooses_the_split(tmp_path: Path) -> None:
    for name, text in (("train", "0 1 2 3\n1 2 3 4\n"), ("valid", "0 4\n1 5\n"), ("test", "0 5\n1 1\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    found = document("experiment", "--data", tmp_path, "--recipe", "popularity")
    assert found["split"] == {"name": "predefined", "train": 6, "validation": 2, "test": 2, "candidates": 5}
    assert (
        document("experiment", "--data", tmp_path, "--recipe", "popularity", "--split", "leave-one-out")["split"][
            "name"
        ]
        == "leave-one-out"
    )


def test_the_seeds_split_has_no_validation(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [
        f"{user}\t{item}\t3\t{1000 + n}"
        for user in range(1, 21)
        for n, item in enumerate(generator.permutation(30)[:6] + 1)
    ]
    (tmp_path / "u.data").write_text("\n".join(rows) + "\n")
    found = document(
        "experiment", "--data", tmp_path, "--recipe", "caser-seeds", "--split", "seeds", "--set", "epochs=2"
    )
    assert found["validation"] == {}
    assert found["epochs"] == 2
    assert found["split"]["candidates"] == 20


def test_people_get_a_table(csv: Path) -> None:
    result = run("experiment", "--data", csv, "--recipe", "popularity")
    assert result.exit_code == 0
    assert "ndcg@10" in result.stdout
    assert "95 % interval" in result.stdout
    assert "epoch 1/1" in result.stderr
    assert "±" in run("experiment", "--data", csv, "--recipe", "popularity", "--seeds", 2).stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--recipe", "nope"], "the recipes are"),
        (["--recipe", "caser", "--set", "negatives=-1"], "negatives must be"),
        (["--recipe", "caser", "--set", "learning_rate=-0.1"], "learning_rate must be"),
        (["--recipe", "caser", "--set", "colour=red"], "unknown setting 'colour'"),
        (["--recipe", "caser", "--set", "loss"], "--set key=value"),
        (["--recipe", "caser", "--split", "newest"], "the splits are"),
        (["--recipe", "caser", "--split", "predefined"], "no split of its own"),
        (["--recipe", "caser", "--split", "seeds"], "numbers"),
        (["--recipe", "neumf", "--set", "loss=triplet"], "triplet"),
        (["--recipe", "caser", "--set", "learning_rate=1e30"], "finite"),
    ],
)
def test_what_a_user_did_wrong_is_one_line(csv: Path, arguments: list[str], reason: str) -> None:
    result = run("experiment", "--data", csv, *arguments)
    assert result.exit_code == 2
    assert reason in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("recipe", ["neumf", "caser", "matrix_factorization", "popularity"])
@pytest.mark.parametrize(
    ("rows", "sound"),
    [
        ([], False),
        (["a,1,1"], False),
        (["a,1,1", "a,2,2", "a,3,3"], True),
        (["a,1,1", "a,1,2", "a,1,3"], False),
        (["a,1,5", "a,2,5", "b,2,5", "b,3,5", "b,1,5", "a,3,5"], True),
        (["a,1,1", "b,1,1", "c,1,1"], False),
    ],
    ids=["nothing", "one event", "one user", "one item", "one moment", "one event each"],
)
def test_degenerate_data_is_a_clear_error_or_a_sound_result(
    tmp_path: Path, rows: list[str], sound: bool, recipe: str
) -> None:
    path = tmp_path / "few.csv"
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    quick = [] if recipe == "popularity" else QUICK
    result = run("experiment", "--data", path, "--recipe", recipe, *quick, "--json")
    assert "Traceback" not in result.output
    assert result.exit_code == (0 if sound else 2), result.output
    if sound:
        assert_finite(json.loads(result.stdout))
    else:
        assert result.stderr.splitlines()[-1].startswith("error: ")


def test_tune_searches_without_the_test_part(csv: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.journal"
    base = ["tune", "--data", csv, "--recipe", "matrix_factorization", *QUICK, "--set", "loss=hinge", "--folds", 2]
    found = document(*base, "--tune", "margin", "--tune", "learning_rate", "--trials", 3, "--study", study)
    assert len(found["trials"]) == 3
    assert found["trials"][0]["settings"] == {"margin": 1.0, "learning_rate": 0.002}
    assert found["best"]["value"] == max(trial["value"] for trial in found["trials"] if trial["value"] is not None)
    assert found["best"]["options"].startswith("--set margin=")
    more = document(*base, "--tune", "margin", "--tune", "learning_rate", "--trials", 4, "--study", study)
    assert more["trials"][:3] == found["trials"]
    assert len(more["trials"]) == 4
    options = found["best"]["options"].split()
    assert (
        run("experiment", "--data", csv, "--recipe", "matrix_factorization", *QUICK, *options, "--json").exit_code == 0
    )


def test_a_search_goes_on_from_a_study_that_was_cut_off_and_leaves_other_files_alone(csv: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.journal"
    base = ["tune", "--data", csv, "--recipe", "matrix_factorization", *QUICK, "--folds", 1, "--tune", "factors"]
    first = document(*base, "--trials", 1, "--study", study)
    whole = study.read_bytes()
    Path(f"{study}.lock").symlink_to(study)  # left behind by one that was killed
    os.utime(study, (0, 0))
    for cut_off in (whole[:-5], whole[:-1], whole + b'{"op_code":4,"wor'):
        study.write_bytes(cut_off)
        found = document(*base, "--trials", 2, "--study", study)
        assert first["trials"][0]["settings"] in [trial["settings"] for trial in found["trials"]]
        assert found["trials"][-1]["state"] == "complete"
        assert study.read_bytes().endswith(b"\n")
    lines = whole.splitlines(keepends=True)
    for content, reason in (
        (b'{"op_code": 0, "mine": "precious"}', "is not a study"),
        (b"notes", "is not a study"),
        (b"".join([*lines[:2], b"garbage\n", *lines[2:]]), "is damaged"),
    ):
        study.write_bytes(content)
        result = run(*base, "--trials", 1, "--study", study)
        assert result.exit_code == 2
        assert f"{study} {reason}" in result.stderr
        assert study.read_bytes() == content


def test_refused_memory_is_a_clear_error(csv: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, limits[1]))
    try:
        huge = ["--set", "factors=65536", "--set", "negatives=10000", "--set", "batch_size=1000"]
        result = run(
            "experiment", "--data", csv, "--recipe", "matrix_factorization", *huge, "--set", "shared_negatives=false"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert result.exit_code == 2
    assert "not enough memory for this training: choose a smaller batch_size" in result.stderr


def test_one_file_keeps_searches_apart_and_starts_with_the_recipe(csv: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.journal"
    base = ["tune", "--recipe", "matrix_factorization", *QUICK, "--folds", 1, "--tune", "factors", "--study", study]
    own = {"factors": 8}

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ml.tune.train", killed)  # the trial has no figure
        assert run(*base, "--data", csv, "--trials", 1).exit_code == 130
    found = document(*base, "--data", csv, "--trials", 1)
    assert [trial["settings"] for trial in found["trials"] if trial["state"] == "complete"] == [own]
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / csv.name
    other.write_text("\n".join(csv.read_text().splitlines()[:400]))
    for arguments in (["--data", csv, "--split", "random"], ["--data", other]):
        assert len(document(*base, *arguments, "--trials", 1)["trials"]) == 1


def test_a_setting_that_diverges_does_not_end_a_search(csv: Path) -> None:
    wild = ["--set", "learning_rate=1e20", "--set", "loss=bpr", "--set", "epochs=9", "--folds", 1]
    result = run("tune", "--data", csv, "--recipe", "neumf", *wild, "--tune", "factors", "--trials", 2)
    assert result.exit_code == 2
    assert "trial 2/2: stopped early" in result.stderr
    assert "error: no trial gave a figure" in result.stderr


def test_popularity_is_measured_over_the_same_users(tmp_path: Path) -> None:
    # Half of the users come only at the end, where a temporal split tests.
    rows = [f"u{user},i{(user + turn) % 9},{turn * 10 + user}" for user in range(10) for turn in range(5)]
    rows += [f"late{user},i{user % 9},{100 + user}" for user in range(10)]
    rows += [f"u{user},i{(user + 5) % 9},{100 + user}" for user in range(10)]
    path = tmp_path / "events.csv"
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    parts = split_by_name("temporal", load_interactions(path)[0])
    ranked_for = []
    known = np.diff(parts.train.offsets) > 0
    for name in ("neumf", "caser"):
        outcome = experiment.run(apply_overrides(recipe_named(name), {"epochs": "1"}), parts)
        assert outcome.popularity["test"].users.tolist() == outcome.evaluations["test"].users.tolist()
        ranked_for.append(len(outcome.popularity["test"].users))
        assert not known[outcome.evaluations["test"].users].all()  # strangers are ranked for too
    assert ranked_for[0] == ranked_for[1]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_bounded(csv: Path, seed: int) -> None:
    assert run("experiment", "--data", csv, "--recipe", "popularity", "--seed", seed).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--recipe", "neumf", "--tune", "margin"], "has no margin"),
        (["--recipe", "neumf", "--tune", "window_length"], "cannot tune 'window_length'"),
        (["--recipe", "popularity"], "nothing to tune"),
        (["--recipe", "neumf", "--folds", "9"], "too few interactions for 9 folds"),
    ],
)
def test_tune_refuses_what_makes_no_sense(csv: Path, arguments: list[str], reason: str) -> None:
    result = run("tune", "--data", csv, *arguments)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_versions_are_listed_and_evaluated(csv: Path, tmp_path: Path) -> None:
    interactions, _ = load_interactions(csv)
    store = tmp_path / "store"
    registry = Registry(FolderStore(store))
    through = rfc3339(int(np.sort(interactions.time)[-40]))
    registry.publish(
        popularity_of(interactions), recipe=RECIPES["popularity"].as_dict(), version="v1", trained_through=through
    )
    (store / "versions" / "bad").mkdir()
    (store / "versions" / "bad" / "manifest.json").write_text("{")
    registry.publish(popularity_of(interactions), recipe=RECIPES["popularity"].as_dict(), version="cut")
    next((store / "versions" / "cut").glob("users-*")).unlink()
    found = document("versions", "--store", store)
    assert [version["version"] for version in found["versions"]] == ["v1"]
    assert [version["version"] for version in found["damaged"]] == ["bad", "cut"]
    assert "users-" in found["damaged"][1]["problem"]
    listed = run("versions", "--store", store)
    assert "v1" in listed.stdout
    assert "not JSON" in listed.stderr
    evaluated = document("evaluate", "--version", "v1", "--store", store, "--data", csv)
    assert evaluated["test_not_seen_in_training"] == 39
    strange = tmp_path / "strange.csv"
    strange.write_text(re.sub(r",i(\d)", r",j\1", csv.read_text()))
    result = run("evaluate", "--version", "v1", "--store", store, "--data", strange)
    assert result.exit_code == 2
    assert "version v1 knows none of the items" in result.stderr
    assert evaluated["evaluated"]["test"]["users"] == 80
    for arguments in (["--version", "bad", "--data", csv], ["--version", "v1"]):
        assert run("evaluate", "--store", store, *arguments).exit_code == 2


def test_times_are_read_back() -> None:
    for time in (0, 1, 1_700_000_000_123_456, 4_000_000_000_000_000, -1):
        assert microseconds(rfc3339(time)) == time
    assert rfc3339(1_700_000_000_123_456) == "2023-11-14T22:13:20.123456Z"
    with pytest.raises(ValueError, match="RFC 3339"):
        microseconds("yesterday")


@pytest.mark.parametrize("name", ["neumf", "caser", "matrix_factorization"])
def test_weights_do_not_depend_on_what_is_held_out(name: str) -> None:
    """Target, window and the negatives' mask see training rows alone; a planted leak shows at once."""
    generator = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{item}") for user in range(40) for item in generator.permutation(30)[:8]]
    # The same data, but for everybody's last two items.
    other = [
        (user, f"i{(int(item[1:]) + 7) % 30}" if turn % 8 >= 6 else item) for turn, (user, item) in enumerate(rows)
    ]
    recipe = apply_overrides(recipe_named(name), {"epochs": "2", "negatives": "8", "factors": "4"})

    def weights(events: list[tuple[str, str]], leak: bool = False) -> list[torch.Tensor]:
        data = Interactions.from_arrays(*map(list, zip(*events, strict=True)))
        split = leave_one_out(data)
        part = split.train.merge(split.test) if leak else split.train
        return list(train(recipe, part, None, seed=0).model.state_dict().values())

    assert all(map(torch.equal, weights(rows), weights(other)))
    assert not all(map(torch.equal, weights(rows, leak=True), weights(other, leak=True)))


@pytest.mark.real_data
def test_movielens_100k_gives_the_known_figures() -> None:
    data = Path(os.environ["SHORTLIST_DATA"]) / "ml-100k"
    found = document("experiment", "--data", data, "--recipe", "popularity")
    assert found["split"] == {
        "name": "leave-one-out", "train": 98114, "validation": 943, "test": 943, "candidates": 1682,
    }  # fmt: skip
    assert found["test"]["hit_rate@10"] == pytest.approx(0.0859, abs=1e-4)
    seeds = document("experiment", "--data", data, "--recipe", "popularity", "--split", "seeds")
    assert seeds["split"]["candidates"] == 943
    assert seeds["test"]["hit_rate@50"] == pytest.approx(0.2153, abs=1e-4)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "users", "items", "split"),
    [
        ("beauty-sequences", 22_363, 12_101, "leave-one-out"),
        ("ml-1m-sequences", 6_040, 3_416, "leave-one-out"),
        ("ml-1m-predefined", 6_039, 3_628, "predefined"),
    ],
)
def test_the_other_data_sets_are_read_and_split(name: str, users: int, items: int, split: str) -> None:
    found = document("experiment", "--data", Path(os.environ["SHORTLIST_DATA"]) / name, "--recipe", "popularity")
    assert (found["data"]["users"], found["data"]["items"], found["split"]["name"]) == (users, items, split)
