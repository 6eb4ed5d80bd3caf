"""An experiment: split a data set, train a recipe, evaluate it beside popularity. Nothing is published."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import typer

from ml import progress
from ml.distributed import ALONE, Processes, joined, shares
from ml.evaluate import CUTOFFS, Evaluation, evaluate, popularity_of
from ml.importers import Loaded, load, open_source
from ml.interactions import Interactions
from ml.metrics import mean_and_std
from ml.models import MODELS, RankingModel
from ml.recipes import Recipe, apply_overrides, recipe_named
from ml.recommender import Ranker, Recommender
from ml.split import Split, split_by_name
from ml.train import Progress, TrainResult, train

if TYPE_CHECKING:
    from rich.table import Table

VALIDATION, TEST = "validation", "test"
# What people read first; the rest is in the JSON.
SHOWN_METRICS = ("hit_rate@10", "recall@10", "ndcg@10", "hit_rate@50", "mrr", "map", "auc", "coverage@10")


@dataclass(frozen=True)
class Outcome:
    """What one seed gave: evaluations by part, "validation" (absent where the split has none) and "test"."""

    seed: int
    split: Split
    evaluations: dict[str, Evaluation]
    popularity: dict[str, Evaluation]
    training: TrainResult
    seconds: float


def run(
    recipe: Recipe,
    split: Split,
    *,
    seed: int = 0,
    device: str = "cpu",
    negatives: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    processes: Processes = ALONE,
) -> Outcome:
    """Train on the split's training part, stop early by its validation, and evaluate the test once, at the end.

    Each of several `processes` brings the split of its own users.
    """
    started = time.perf_counter()
    evaluator = SplitEvaluator(split, negatives=negatives, seed=seed, processes=processes)
    popular, strangers = popularity_of(split.train, processes), MODELS[recipe.model].folds_in
    baseline = {part: evaluator.evaluate(popular, part, strangers=strangers) for part in evaluator.parts}
    result = train(
        recipe,
        split.train,
        evaluator.stopping_metric if VALIDATION in evaluator.parts else None,
        device=device,
        seed=seed,
        on_progress=on_progress,
        processes=processes,
    )
    recommender = evaluator.recommender(result.model)
    found = {part: evaluator.evaluate(recommender, part) for part in evaluator.parts}
    return Outcome(seed, split, found, baseline, result, time.perf_counter() - started)


class SplitEvaluator:
    """Evaluate on the parts of a split: validation after training, test after both.

    Each of several `processes` brings the split of its own users, and all get the figures over everybody.
    """

    def __init__(self, split: Split, *, negatives: int = 0, seed: int = 0, processes: Processes = ALONE) -> None:
        self.split = split
        self.processes = processes
        self.negatives = negatives
        self.seed = seed
        # Users without training rows were never learnt: what the model holds for them is noise.
        self.known_users: npt.NDArray[np.bool_] = np.diff(split.train.offsets) > 0
        self.histories: dict[str, Interactions] = {VALIDATION: split.train, TEST: split.history_for_test()}
        self.targets = {VALIDATION: split.validation, TEST: split.test}
        self.parts = [VALIDATION, TEST] if self._can_validate() else [TEST]

    def evaluate(
        self,
        recommender: Ranker,
        part: str,
        negatives: int | None = None,
        cutoffs: Sequence[int] = CUTOFFS,
        *,
        strangers: bool = True,
        lists_only: bool = False,
    ) -> Evaluation:
        """Rank for the users of "validation" or "test".

        Without `strangers`, users that were not trained on are left out even if the recommender can rank for them: a
        baseline has to be over the same users as the model that it stands beside. `lists_only` as for ml.evaluate.
        """
        targets = self.targets[part]
        if not strangers:
            targets = targets.select(self.known_users[targets.user_index])
        return evaluate(
            recommender,
            self.histories[part],
            targets,
            candidates=self.split.candidates,
            cutoffs=cutoffs,
            negatives=self.negatives if negatives is None else negatives,
            seed=self.seed,
            known_users=self.known_users,
            lists_only=lists_only,
            processes=self.processes,
        )

    def recommender(self, model: RankingModel) -> Recommender:
        """What ranks by a model that was trained on the split's training part."""
        train = self.split.train
        return Recommender(model, train.users, train.items, trained_users=self.known_users)

    def stopping_metric(self, model: RankingModel) -> dict[str, float]:
        """Measure a model in training on the validation part, against the whole catalogue."""
        recommender = self.recommender(model)
        return self.evaluate(recommender, VALIDATION, negatives=0, cutoffs=(10,), lists_only=True).metrics

    def _can_validate(self) -> bool:
        train, held = self.split.train, self.split.validation
        # One user is enough, and almost always the first will do.
        found = any(
            self.known_users[user] and item not in train.history(user)
            for user, item in zip(held.user_index, held.item_index, strict=True)
        )
        return self.processes.sum_number(int(found)) > 0


def chosen_device(name: str) -> str:
    """Resolve `auto`; ValueError if a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("no GPU is available to PyTorch: use --device cpu")
    return ("cuda" if available else "cpu") if name == "auto" else name


def chosen_recipe(name: str, settings: Sequence[str]) -> Recipe:
    """Find a recipe and change it by `key=value` texts; ValueError names what is valid."""
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting!r} has no value: write --set key=value")
        overrides[key.strip()] = value.strip()
    return apply_overrides(recipe_named(name), overrides)


def split_of(loaded: Loaded, name: str | None, seed: int) -> Split:
    """Split what was read from a source, by default as suits it."""
    return split_by_name(name, loaded.interactions, loaded.labels, seed, has_times=loaded.source.has_times)


def run_command(
    *,
    data: Path,
    format: str | None,  # noqa: A002
    split: str | None,
    recipe_name: str,
    settings: Sequence[str],
    negatives: int,
    seed: int,
    seeds: int | None,
    device: str,
    metrics_out: Path | None,
    as_json: bool,
) -> None:
    """The body of `ml experiment`."""
    recipe = chosen_recipe(recipe_name, settings)
    device = chosen_device(device)
    with joined(device) as processes:
        document = _experiment(
            recipe,
            data,
            format,
            split,
            negatives,
            seed,
            seeds,
            device,
            metrics_out if processes.is_first else None,
            processes,
        )
    if not processes.is_first:
        return
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        _show(document)


def _experiment(
    recipe: Recipe,
    data: Path,
    format: str | None,  # noqa: A002
    split: str | None,
    negatives: int,
    seed: int,
    seeds: int | None,
    device: str,
    metrics_out: Path | None,
    processes: Processes,
) -> dict[str, Any]:
    """Run every seed; returns what is printed."""
    started = time.perf_counter()
    with processes.together():
        loaded = load(open_source(data, format))
    interactions = loaded.interactions
    described = (
        f"{len(interactions):,} interactions of {interactions.num_users:,} users, {interactions.num_items:,} items"
    )
    if processes.is_first:
        typer.echo(f"{loaded.source.name}: {described}", err=True)
    outcomes = []
    with _JsonLines(metrics_out) as lines:
        for number in range(seed, seed + (seeds or 1)):
            with processes.together():
                whole = split_of(loaded, split, number)
            parts = _share_of(whole, processes)
            title = recipe.name if seeds is None else f"{recipe.name}, seed {number}"
            with progress.shown(title) as report:

                def on_progress(step: Progress, seed: int = number, report: progress.Report = report) -> None:
                    report(step)
                    if step.epoch_ended:
                        lines.write({"kind": "epoch", "seed": seed, **progress.as_json(step)})

                outcome = run(
                    recipe,
                    parts,
                    seed=number,
                    device=device,
                    negatives=negatives,
                    on_progress=on_progress if processes.is_first else None,
                    processes=processes,
                )
            outcomes.append(_one(outcome))
            lines.write({"kind": "result", **outcomes[-1]})
    return {
        "recipe": recipe.name,
        "seed": seed if seeds is None else [outcome["seed"] for outcome in outcomes],
        "data": {
            "name": loaded.source.name,
            "format": loaded.source.format,
            "rejected": loaded.rejected,
            "interactions": len(interactions),
            "users": interactions.num_users,
            "items": interactions.num_items,
        },
        "split": _split_facts(whole),
        "negatives": negatives,
        "settings": recipe.as_dict(),
        "device": device,
        **(outcomes[0] if seeds is None else _several(outcomes)),
        "seconds": time.perf_counter() - started,
    }


def _share_of(split: Split, processes: Processes) -> Split:
    """The part of a split that is about a process's own users."""
    if processes.size == 1:
        return split
    bounds = shares(np.diff(split.train.offsets), processes.size)
    first, end = bounds[processes.rank : processes.rank + 2]
    train, validation, test = (
        part.select((part.user_index >= first) & (part.user_index < end))
        for part in (split.train, split.validation, split.test)
    )
    return replace(split, train=train, validation=validation, test=test)


def _split_facts(split: Split) -> dict[str, Any]:
    sizes = {"train": len(split.train), VALIDATION: len(split.validation), TEST: len(split.test)}
    candidates = split.train.num_items if split.candidates is None else int(split.candidates.sum())
    return {"name": split.name, **sizes, "candidates": candidates}


def _one(outcome: Outcome) -> dict[str, Any]:
    """The JSON of one seed."""
    return {
        "seed": outcome.seed,
        VALIDATION: outcome.evaluations[VALIDATION].metrics if VALIDATION in outcome.evaluations else {},
        TEST: outcome.evaluations[TEST].metrics,
        "intervals": {part: found.intervals() for part, found in outcome.evaluations.items()},
        "popularity": {part: found.metrics for part, found in outcome.popularity.items()},
        "evaluated": {part: counts_of(found) for part, found in outcome.evaluations.items()},
        "epochs": outcome.training.best_epoch,
        "epochs_run": outcome.training.epochs_run,
        "examples_per_second": outcome.training.examples_per_second,
        "seconds": outcome.seconds,
    }


def _several(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON of several seeds: mean and standard deviation of every metric, and each run."""
    return {
        VALIDATION: mean_and_std([run[VALIDATION] for run in runs]),
        TEST: mean_and_std([run[TEST] for run in runs]),
        "popularity": {part: mean_and_std([run["popularity"][part] for run in runs]) for part in runs[0]["popularity"]},
        "runs": runs,
    }


def counts_of(evaluation: Evaluation) -> dict[str, int]:
    """How many users and targets an evaluation is over, and what it left out."""
    return {
        "users": len(evaluation.users),
        "targets": evaluation.targets,
        "repeated": evaluation.repeated,
        "unknown_users": evaluation.unknown_users,
    }


class _JsonLines:
    """A file of JSON lines, or nothing where no path is given."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __enter__(self) -> "_JsonLines":
        self._file = None if self._path is None else self._path.open("w", encoding="utf-8")
        return self

    def write(self, values: dict[str, Any]) -> None:
        """Write one line, at once."""
        if self._file is not None:
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console

    split = document["split"]
    title = f"{document['recipe']} on {document['data']['name']}, {split['name']}, {split['candidates']:,} items"
    console = Console()
    console.print(metrics_table(title, document[TEST], document["popularity"][TEST], _ranges(document)))
    console.print(f"{document['seconds']:.1f} s in all; every figure, validation too, is in the JSON: --json")


def _ranges(document: dict[str, Any]) -> dict[str, str]:
    if "intervals" in document:
        return {name: f"{low:.4f} to {high:.4f}" for name, (low, high) in document["intervals"][TEST].items()}
    return {name: f"± {value['std']:.4f} over seeds" for name, value in document[TEST].items()}


def metrics_table(title: str, test: dict[str, Any], popularity: dict[str, Any], ranges: dict[str, str]) -> "Table":
    """Lay the main test metrics beside popularity's."""
    from rich.table import Table

    table = Table("test", "value", "95 % interval" if "±" not in "".join(ranges.values()) else "spread", "popularity")
    table.title = title
    for name in SHOWN_METRICS:
        value, base = (row[name]["mean"] if isinstance(row[name], dict) else row[name] for row in (test, popularity))
        table.add_row(name, f"{value:.4f}", ranges.get(name, ""), f"{base:.4f}")
    return table
