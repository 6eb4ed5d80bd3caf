"""A production training: evaluated in time beside popularity, refitted on everything, published.

It goes through the phases load, fit, evaluate, refit and publish. With a checkpoint folder, one that was killed goes
on where it was when it is started again with the same arguments.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ml import retrieval
from ml.distributed import ALONE, Processes, joined
from ml.evaluate import popularity_of
from ml.experiment import TEST, VALIDATION, SplitEvaluator, chosen_device, chosen_recipe, counts_of
from ml.fold_in import PRIOR_STRENGTH, chosen_strength
from ml.interactions import Interactions
from ml.models import RankingModel, build_model, grown_from
from ml.progress import Reporter, Silent
from ml.recipes import Recipe
from ml.recommender import Recommender
from ml.registry import Manifest, Registry, VersionDamaged, VersionExists, code_version
from ml.split import Split, check_no_leak, leave_one_out
from ml.store import open_store
from ml.train import train
from ml.versions import compared, interactions_of, microseconds, rfc3339
from ml.workspace import Workspace

# With fewer users to evaluate on than this, what came after the parent version says too little.
FEWEST_NEW_USERS = 20
# From so many items on, services may retrieve candidates from an index: what it finds is measured with so many users.
RETRIEVAL_MEASURED_FROM = 100_000
RETRIEVAL_MEASURED_USERS = 500


@dataclass(frozen=True)
class Training:
    """What to train, from what, and under which name to publish it."""

    snapshot: str
    recipe: Recipe
    version: str | None = None
    run_id: str | None = None
    run_epoch: int | None = None
    warm_start: str | None = None
    compare: str | None = None
    seed: int = 0
    device: str = "cpu"

    def identity(self) -> str:
        """Name everything that the work on disk depends on.

        Not the version's name nor the run's epoch: a run that is taken up again has new ones.
        """
        parts = [self.snapshot, self.recipe.as_dict(), self.warm_start, self.seed, self.device, code_version()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def produce(
    training: Training,
    store_url: str,
    checkpoint_dir: Path | None,
    report: Reporter,
    processes: Processes = ALONE,
) -> Manifest:
    """Do all phases that are not done yet and return the manifest of the published version.

    Of several `processes` each trains on its own users, and the first reports, keeps checkpoints and publishes.

    ValueError for data that is too little, a snapshot or version that is damaged, or a training that diverges.
    """
    store = open_store(store_url)
    registry = Registry(store, None if checkpoint_dir is None else checkpoint_dir / "versions")
    if (already := _published(registry, training)) is not None:
        return _report_published(already, report)
    workspace = Workspace(checkpoint_dir, training.identity(), processes)
    report.phase("load")
    interactions = interactions_of(store, training.snapshot, processes)
    _check_enough(interactions, processes)
    parent = None if training.warm_start is None else registry.load(training.warm_start)
    if parent is not None:
        _check_same_model(training.recipe, parent[0].model, parent[1].version)
    evaluated = workspace.finished("evaluate")
    # What it was compared with may have been replaced since; the fit itself is still in its checkpoint.
    if evaluated is None or evaluated["compare"] != training.compare:
        evaluated = _fit_and_evaluate(training, interactions, parent, registry, workspace, report, processes)
        workspace.finish("evaluate", evaluated)
    metrics = evaluated["metrics"]
    report.emit(
        "evaluated",
        f"test ndcg@10 {metrics[TEST]['ndcg@10']:.4f}, popularity {metrics['popularity']['ndcg@10']:.4f}",
        validation=metrics[VALIDATION],
        test=metrics[TEST],
        popularity=metrics["popularity"],
        compared=metrics["compared"],
        evaluated_on=metrics["evaluated_on"],
        epochs=evaluated["epochs"],
    )

    # What is published is made as what was measured: from the parent only if the fit was, too.
    warm_parent = parent[0] if parent is not None and metrics["evaluated_on"]["warm"] else None
    epochs = evaluated["epochs"]
    report.phase("refit", epochs=epochs)
    with report.training("refit") as on_progress:
        result = train(
            training.recipe if warm_parent is None else training.recipe.warm(),
            interactions,
            None,
            device=training.device,
            seed=training.seed,
            checkpoint=workspace.checkpoint("refit"),
            on_progress=on_progress,
            epochs=epochs,
            initial=None if warm_parent is None else grown(training.recipe, interactions, warm_parent, training.seed),
            processes=processes,
        )
    report.phase("publish")
    _, newest = _reach(interactions, processes)
    name = ""
    with processes.together():
        if processes.is_first:
            strength = PRIOR_STRENGTH
            if result.model.fits_strangers:
                strength = chosen_strength(result.model, interactions, training.seed)
            published = Recommender(result.model, interactions.users, interactions.items, prior_strength=strength)
            try:
                name = registry.publish(
                    published,
                    recipe=training.recipe.as_dict(),
                    version=training.version,
                    snapshot=training.snapshot,
                    metrics=metrics,
                    trained_through=newest,
                    refit=True,
                    parent_version=None if warm_parent is None else training.warm_start,
                    run_id=training.run_id,
                    run_epoch=training.run_epoch,
                    retrieval=_measured_retrieval(published, interactions, training.seed),
                ).version
            except VersionExists:
                # The same training ran twice at once, and the other was the first.
                if (already := _published(registry, training)) is None:
                    raise
                name = already.version
    manifest = registry.manifest(processes.gather_values(name)[0])
    workspace.remove_checkpoints()
    return _report_published(manifest, report)


def _measured_retrieval(recommender: Recommender, interactions: Interactions, seed: int) -> dict[str, Any] | None:
    """Measure what an index over the version's items finds; None where no service would build one."""
    with torch.inference_mode():
        products = recommender.model.inner_products()
        if products is None or interactions.num_items < RETRIEVAL_MEASURED_FROM or not retrieval.is_installed():
            return None
        # Of several processes, this one may hold the histories of some of the users.
        users = np.flatnonzero(np.diff(interactions.offsets))
        count = min(RETRIEVAL_MEASURED_USERS, len(users))
        users = np.random.default_rng(seed).choice(users, count, replace=False)
        encoded = recommender.encode(users, [interactions.history(user) for user in users.tolist()])
        return asdict(retrieval.measured_retrieval(retrieval.Retrieval(products.as_products()), encoded))


def _fit_and_evaluate(
    training: Training,
    interactions: Interactions,
    parent: tuple[Recommender, Manifest] | None,
    registry: Registry,
    workspace: Workspace,
    report: Reporter,
    processes: Processes,
) -> dict[str, Any]:
    """Train on all but the hold-out, stop early by validation, and rank the test once."""
    started = time.perf_counter()
    split, initial = leave_one_out(interactions), None
    if parent is not None and parent[1].trained_through is not None:
        # The parent was trained on what came before, so only what came after is a test for its heirs.
        newer = leave_one_out(interactions, after=microseconds(parent[1].trained_through))
        held_out = processes.sum_number(len(newer.validation)), processes.sum_number(len(newer.test))
        if min(held_out) >= FEWEST_NEW_USERS:
            split, initial = newer, grown(training.recipe, interactions, parent[0], training.seed)
    if parent is not None and initial is None:
        message = (
            f"trained from scratch, not from {parent[1].version}: too little is new since then to measure a warm start "
            f"on ({FEWEST_NEW_USERS} users with two new interactions are needed)"
        )
        report.emit("note", message, message=message)
    check_no_leak(split, interactions)
    report.phase("fit", warm=initial is not None)
    evaluator = SplitEvaluator(split, seed=training.seed, processes=processes)
    # First, as it ends here if there is nothing to measure on.
    popularity = evaluator.evaluate(popularity_of(split.train, processes), TEST).metrics
    with report.training("fit") as on_progress:
        result = train(
            training.recipe if initial is None else training.recipe.warm(),
            split.train,
            evaluator.stopping_metric if VALIDATION in evaluator.parts else None,
            device=training.device,
            seed=training.seed,
            checkpoint=workspace.checkpoint("fit"),
            on_progress=on_progress,
            initial=initial,
            processes=processes,
        )
    report.phase("evaluate")
    recommender = Recommender(result.model, interactions.users, interactions.items)
    found = {part: evaluator.evaluate(recommender, part) for part in evaluator.parts}
    oldest, newest = _reach(split.test, processes)
    return {
        "epochs": max(result.best_epoch, 1),
        "compare": training.compare,
        "metrics": {
            VALIDATION: found[VALIDATION].metrics if VALIDATION in found else {},
            TEST: found[TEST].metrics,
            "popularity": popularity,
            "intervals": found[TEST].intervals(),
            "compared": _compare(training, split, recommender, registry, report, processes),
            "evaluated_on": {
                "snapshot": training.snapshot,
                "split": split.name,
                "from": oldest,
                "through": newest,
                "interactions": processes.sum_number(len(split.test)),
                "warm": initial is not None,
                "seed": training.seed,
                "warm_start": training.warm_start,
                **counts_of(found[TEST]),
            },
            "epochs_run": result.epochs_run,
            "examples_per_second": result.examples_per_second,
            "seconds": time.perf_counter() - started,
        },
    }


def _compare(
    training: Training,
    split: Split,
    recommender: Recommender,
    registry: Registry,
    report: Reporter,
    processes: Processes,
) -> dict[str, Any] | None:
    if training.compare is None:
        return None
    try:
        other, manifest = registry.load(training.compare)
    except VersionDamaged as error:
        # A version that went bad must not keep a better one from coming.
        report.emit("note", f"not compared: {error}", message=f"not compared: {error}")
        return None
    figures = compared(recommender, other, manifest.trained_through, split.history_for_test(), split.test, processes)
    return {"version": training.compare, **figures}


def grown(recipe: Recipe, interactions: Interactions, parent: Recommender, seed: int) -> RankingModel:
    """Start from the parent's weights: its rows for the users and items it knew, fresh rows for the others."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        fresh = build_model(recipe.model, interactions.num_users, interactions.num_items, recipe.config)
    user_rows = parent.users.indices(interactions.users.array)
    item_rows = parent.items.indices(interactions.items.array)
    return grown_from(parent.model, fresh, user_rows, item_rows)


def _check_same_model(recipe: Recipe, model: RankingModel, version: str) -> None:
    """Refuse to start a recipe from a version of another shape, before anything is trained."""
    if type(model.config) is not type(recipe.config):
        differences = f"a {type(model).__name__}"
    else:
        ours, theirs = asdict(recipe.config), asdict(model.config)
        unlike = [key for key in ours if ours[key] != theirs[key]]
        differences = ", ".join(f"{key} is {theirs[key]} there and {ours[key]} here" for key in unlike)
    if differences:
        raise ValueError(
            f"{recipe.name} cannot start from version {version}: {differences}; train without a warm start, or with "
            "the same model and settings"
        )


def _reach(interactions: Interactions, processes: Processes) -> tuple[str, str]:
    """The times of the first and the last interaction, over all processes; there is at least one."""
    times = interactions.time
    ends = processes.gather_values([int(times.min()), int(times.max())] if len(times) else [])
    moments = [moment for pair in ends for moment in pair]
    return rfc3339(min(moments)), rfc3339(max(moments))


def _check_enough(interactions: Interactions, processes: Processes) -> None:
    number = processes.sum_number(len(interactions))
    if not number:
        raise ValueError("the snapshot holds no interaction: post feedback or import events first")
    if interactions.num_items < 2 or not processes.sum_number(int((np.diff(interactions.offsets) >= 3).sum())):
        raise ValueError(
            f"there is too little to train and evaluate on: {number} interactions of "
            f"{interactions.num_users} users with {interactions.num_items} items. "
            "At least two items and a user with three interactions are needed"
        )


def _published(registry: Registry, training: Training) -> Manifest | None:
    """Return the manifest if this very training has published its version before."""
    if training.version is None or not registry.exists(training.version):
        return None
    manifest = registry.manifest(training.version)
    asked = (training.snapshot, training.run_id, training.seed, training.warm_start)
    on = manifest.metrics.get("evaluated_on", {})  # of older versions without what they were asked for
    recorded = (on.get("seed", training.seed), on.get("warm_start", training.warm_start))
    if asked != (manifest.snapshot, manifest.run_id, *recorded) or Recipe.from_dict(manifest.recipe) != training.recipe:
        raise ValueError(f"version {training.version} exists already and is another training's: choose another name")
    return manifest


def _report_published(manifest: Manifest, report: Reporter) -> Manifest:
    report.emit("published", manifest.version, version=manifest.version, metrics=manifest.metrics)
    return manifest


def exit_when_stdin_closes() -> None:
    """End the process when whoever started it is gone, so that no orphan trains on."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def run_command(
    *,
    snapshot_hash: str,
    store_url: str,
    recipe_name: str,
    settings: Sequence[str],
    version: str | None,
    run_id: str | None,
    run_epoch: int | None,
    warm_start: str | None,
    compare: str | None,
    checkpoint_dir: Path | None,
    seed: int,
    device: str,
    exit_with_stdin: bool,
    as_json: bool,
) -> int:
    """The body of `ml train`: 0 when published, 2 for what a user can put right, 1 for anything else."""
    if exit_with_stdin:
        exit_when_stdin_closes()
    report = Reporter(as_json=as_json)
    try:
        training = Training(
            snapshot=snapshot_hash,
            recipe=chosen_recipe(recipe_name, settings),
            version=version,
            run_id=run_id,
            run_epoch=run_epoch,
            warm_start=warm_start,
            compare=compare,
            seed=seed,
            device=chosen_device(device),
        )
        with joined(training.device) as processes:
            if not processes.is_first:
                # Its errors are for the reader of the output, not for the program that follows the first one.
                report = Reporter(as_json=False)
            produce(training, store_url, checkpoint_dir, report if processes.is_first else Silent(), processes)
    except (ValueError, OSError) as error:
        report.emit("error", f"error: {error}", message=str(error))
        return 2
    except Exception as error:
        report.emit("error", f"error: {error}", message=f"{type(error).__name__}: {error}")
        raise
    return 0
