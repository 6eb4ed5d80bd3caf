"""Tuning: search a recipe's settings by cross-validation in time; the test part is never read."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from ml.evaluate import popularity_of
from ml.experiment import VALIDATION, SplitEvaluator, chosen_device, chosen_recipe, split_of
from ml.importers import load, open_source
from ml.interactions import Interactions
from ml.losses import MARGIN_LOSSES
from ml.recipes import Recipe, apply_overrides
from ml.recommender import ScoresNotNumbers
from ml.split import SMALLEST_HISTORY, Split, check_no_leak, random_split
from ml.train import NotFiniteError, train

if TYPE_CHECKING:
    import optuna

METRIC = "ndcg@10"
# How the file of a study begins, as Optuna writes it.
_STUDY_BEGINS = b'{"op_code"'


@dataclass(frozen=True)
class Range:
    """A number to search on a logarithmic scale."""

    low: float
    high: float


@dataclass(frozen=True)
class Choices:
    """Whole numbers to choose from."""

    values: tuple[int, ...]


SPACE: dict[str, Range | Choices] = {
    "margin": Range(0.05, 5.0),
    "factors": Choices((16, 32, 64, 128)),
    "learning_rate": Range(3e-4, 3e-2),
    "negatives": Choices((1, 4, 16, 64, 256, 512, 1024)),
    "l2": Range(1e-8, 1e-3),
    "batch_size": Choices((256, 512, 1024, 2048, 4096)),
    "dropout": Range(0.05, 0.7),
    "window_length": Choices((5, 10, 20, 50)),
    "targets": Choices((1, 2, 3, 5)),
}
USUAL = ("learning_rate", "factors", "negatives")


def folds_of(split: Split, number: int) -> Iterator[Split]:
    """Cut training and validation into folds: in time, each holds out one interaction a user and forgets what follows.

    Fold 0 holds out the last, fold 1 the one before, and so on. Where the data has no order, a tenth at random.
    """
    pool = split.history_for_test()
    for fold in range(number):
        if split.name in ("predefined", "random"):
            drawn = random_split(pool, seed=fold)
            yield Split(split.name, drawn.train.merge(drawn.validation), drawn.test, _nothing(pool), split.candidates)
            continue
        place = pool.offsets[1:][pool.user_index] - np.arange(len(pool))  # 1 is a user's last
        known = pool.select(place > fold)
        counts = np.diff(known.offsets)
        held = np.zeros(len(known), np.bool_)
        held[known.offsets[1:][counts >= SMALLEST_HISTORY - 1] - 1] = True
        yield Split(split.name, known.select(~held), known.select(held), _nothing(pool), split.candidates)


def run_command(
    *,
    data: Path,
    format: str | None,  # noqa: A002
    split: str | None,
    recipe_name: str,
    settings: Sequence[str],
    trials: int,
    folds: int,
    parameters: Sequence[str],
    study_file: Path | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """The body of `ml tune`."""
    try:
        import optuna
    except ImportError:
        raise ValueError("tuning needs the package optuna: pip install 'shortlist[tune]'") from None
    recipe = chosen_recipe(recipe_name, settings)
    device = chosen_device(device)
    space = searched(recipe, parameters)
    loaded = load(open_source(data, format))
    whole = split_of(loaded, split, seed)
    parts = []
    for part in folds_of(whole, folds):
        check_no_leak(part, part.train.merge(part.validation))
        if VALIDATION not in SplitEvaluator(part).parts:
            raise ValueError(f"too few interactions for {folds} folds: use fewer --folds, or more data")
        parts.append(part)
    popularity = float(
        np.mean([SplitEvaluator(p).evaluate(popularity_of(p.train), VALIDATION).metrics[METRIC] for p in parts])
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kind = _identity(recipe, space, whole, folds)
    study = optuna.create_study(
        study_name=f"{recipe.name}-{loaded.source.name}-{kind[:12]}",  # one file may hold several searches
        storage=None if study_file is None else _storage(study_file),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
        direction="maximize",
        load_if_exists=True,
    )
    # One that was killed or interrupted does not count.
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    over = [trial for trial in study.trials if trial.state in states]
    # A search that goes on must not draw the same settings again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(over))
    if not over:
        study.enqueue_trial(current(recipe, space))  # the recipe as it is comes first

    def objective(trial: "optuna.Trial") -> float:
        values = {key: _suggest(trial, key, space[key]) for key in space}
        try:
            changed = apply_overrides(recipe, values)
        except ValueError as error:
            raise optuna.TrialPruned(str(error)) from None
        scores: list[float] = []
        for number, part in enumerate(parts):
            try:
                result = train(changed, part.train, SplitEvaluator(part).stopping_metric, device=device, seed=seed)
            except (NotFiniteError, ScoresNotNumbers) as error:
                raise optuna.TrialPruned(str(error)) from None
            scores.append(max(row[METRIC] for row in result.history))
            trial.report(float(np.mean(scores)), number)
            if number + 1 < len(parts) and trial.should_prune():
                raise optuna.TrialPruned
        return float(np.mean(scores))

    def told(_study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
        value = "stopped early" if trial.value is None else f"{METRIC} {trial.value:.4f}"
        typer.echo(f"trial {trial.number + 1}/{trials}: {value} with {as_options(_texts(trial.params))}", err=True)

    if len(over) < trials:
        study.optimize(objective, n_trials=trials - len(over), callbacks=[told])
    try:
        best = study.best_trial
    except ValueError:
        raise ValueError("no trial gave a figure: the trainings diverged; try a smaller learning_rate") from None
    document = {
        "recipe": recipe.name,
        "metric": f"validation {METRIC}",
        "folds": folds,
        "best": {"value": best.value, "settings": best.params, "options": as_options(_texts(best.params))},
        "popularity": popularity,
        "trials": [
            {
                "number": trial.number + 1,
                "value": trial.value,
                "settings": trial.params,
                "state": trial.state.name.lower(),
            }
            for trial in study.trials
        ],
    }
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
        return
    typer.echo(f"best {METRIC} over {folds} folds of validation: {best.value:.4f} (popularity {popularity:.4f})")
    typer.echo(
        " ".join(["--recipe", recipe.name, *(f"--set {text}" for text in settings), as_options(_texts(best.params))])
    )


def _identity(recipe: Recipe, space: Mapping[str, Any], split: Split, folds: int) -> str:
    """Name a search by all that makes its trials comparable."""
    digest = hashlib.sha256(json.dumps([recipe.as_dict(), list(space), split.name, folds], sort_keys=True).encode())
    pool = split.history_for_test()
    for array in (pool.user_index, pool.item_index, pool.weight):
        if array is not None:
            digest.update(array.tobytes())
    return digest.hexdigest()


def searched(recipe: Recipe, parameters: Sequence[str]) -> dict[str, Range | Choices]:
    """Choose what to search: what is named, else the usual settings that the recipe has, the margin if it counts."""
    own = {**recipe.as_dict(), **recipe.as_dict()["config"]}
    if not parameters:
        parameters = [key for key in USUAL if key in own] + (["margin"] if recipe.loss in MARGIN_LOSSES else [])
        if recipe.model == "popularity":
            raise ValueError("popularity has nothing to tune")
    for key in parameters:
        if key not in SPACE or key not in own:
            known = ", ".join(name for name in SPACE if name in own)
            raise ValueError(f"cannot tune {key!r} of {recipe.name}; it can tune {known}")
    if "margin" in parameters and recipe.loss not in MARGIN_LOSSES:
        losses = " or ".join(f"--set loss={name}" for name in MARGIN_LOSSES)
        raise ValueError(f"the {recipe.loss} loss has no margin: use {losses}")
    return {key: _with_current(SPACE[key], own[key]) for key in dict.fromkeys(parameters)}


def current(recipe: Recipe, space: Mapping[str, Range | Choices]) -> dict[str, Any]:
    """The recipe's own values of what is searched."""
    own = {**recipe.as_dict(), **recipe.as_dict()["config"]}
    return {key: own[key] for key, range_ in space.items() if isinstance(range_, Choices) or own[key] > 0}


def as_options(settings: Mapping[str, str]) -> str:
    """Write settings as options of the command line."""
    return " ".join(f"--set {key}={value}" for key, value in settings.items())


def _with_current(space: Range | Choices, value: Any) -> Range | Choices:
    if isinstance(space, Choices):
        return Choices(tuple(sorted({*space.values, value})))
    return space if value <= 0 else Range(min(space.low, value), max(space.high, value))


def _suggest(trial: "optuna.Trial", key: str, space: Range | Choices) -> str:
    if isinstance(space, Choices):
        value: float = trial.suggest_categorical(key, space.values)
    else:
        # Four digits say all that a search can know, and make a line that people can copy.
        value = trial.suggest_float(key, space.low, space.high, log=True)
    return _text(value)


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: _text(value) for key, value in values.items()}


def _nothing(interactions: Interactions) -> Interactions:
    return interactions.select(np.zeros(len(interactions), np.bool_))


def _storage(path: Path) -> "optuna.storages.BaseStorage":
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # Optuna tells by the file's time whether a lock was left behind
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()  # other searches may write to the same study
    try:
        content = path.read_bytes()
        if content and not (content.startswith(_STUDY_BEGINS) and b"\n" in content):
            raise ValueError(f"{path} is not a study: name another file with --study")
        whole, _, last = content.rpartition(b"\n")
        if last:  # cut off while it was written, it would run into the next line
            try:
                json.loads(last)
            except ValueError:
                os.truncate(path, len(whole) + 1)
            else:
                with path.open("ab") as file:
                    file.write(b"\n")
    finally:
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the study {path} is damaged ({error}): name another file with --study") from None
