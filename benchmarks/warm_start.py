"""Measures what a warm start saves and loses: a retrain after 1 % new events beside one from scratch.

    python benchmarks/warm_start.py --data SEQUENCES [--recipe caser] [--seeds 5] [--results warm.jsonl]

For each seed, some users' latest interactions and all those of a few users, 1 % together, are the news. The old model
is trained on the rest, then a full training and a warm start on everything; all are ranked on the same test, each
user's last interaction, which none has seen. With --results a seed that was measured before is not measured again.
Prints one JSON line for each figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ml.experiment import TEST, SplitEvaluator, chosen_recipe
from ml.importers import load, open_source
from ml.interactions import Interactions
from ml.models import RankingModel
from ml.production import grown
from ml.recipes import Recipe
from ml.recommender import Recommender
from ml.split import leave_one_out
from ml.train import train

NEW_SHARE = 0.01
# Of the news, the share that comes from users nobody has seen before; the others each did a few things more.
FROM_NEW_USERS = 0.2
NEW_A_USER = 5
# Student's t, two-sided 95 %, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def news(data: Interactions, seed: int) -> npt.NDArray[np.bool_]:
    """Mark the rows that came after the old model's training."""
    random = np.random.default_rng(seed)
    counts = np.diff(data.offsets)
    marked = np.zeros(len(data), np.bool_)
    wanted = NEW_SHARE * len(data)
    for user in random.permutation(np.flatnonzero(counts)):
        start, end = data.offsets[user], data.offsets[user + 1]
        if marked.sum() < FROM_NEW_USERS * wanted:
            marked[start:end] = True
        elif marked.sum() < wanted:
            marked[max(start + 1, end - NEW_A_USER) : end] = True
    return marked


def without_the_unknown(data: Interactions) -> Interactions:
    """The same interactions with id maps of the users and items that occur in them."""
    return Interactions.from_arrays(
        data.users.array.take(data.user_index), data.items.array.take(data.item_index), data.time, data.weight
    )


def ranked(model: RankingModel, evaluator: SplitEvaluator) -> float:
    """nDCG@10 on the test."""
    train_part = evaluator.split.train
    found = evaluator.evaluate(Recommender(model, train_part.users, train_part.items), TEST, cutoffs=(10,))
    return found.metrics["ndcg@10"]


def measure(data: Interactions, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train the three models of one seed and rank the test with them."""
    split = leave_one_out(data)
    evaluator = SplitEvaluator(split)
    started = time.process_time()
    full = train(recipe, split.train, evaluator.stopping_metric, seed=seed)
    full_seconds = time.process_time() - started
    old_data = without_the_unknown(split.train.select(~news(split.train, seed)))
    old = train(recipe, old_data, epochs=full.best_epoch, seed=seed)
    initial = grown(recipe, split.train, Recommender(old.model, old_data.users, old_data.items), seed)
    stale = ranked(initial, evaluator)
    started = time.process_time()
    warm = train(recipe.warm(), split.train, evaluator.stopping_metric, seed=seed, initial=initial)
    warm_seconds = time.process_time() - started
    return {
        "seed": seed,
        "full": ranked(full.model, evaluator),
        "stale": stale,
        "warm": ranked(warm.model, evaluator),
        "full_seconds": full_seconds,
        "warm_seconds": warm_seconds,
        "full_epochs": full.epochs_run,
        "warm_epochs": warm.epochs_run,
    }


def report(rows: list[dict[str, Any]]) -> bool:
    """Print a JSON line for each figure; returns whether all are reached."""
    lost = [1 - row["warm"] / row["full"] for row in rows]
    half = STUDENT[len(rows) - 1] * statistics.stdev(lost) / len(rows) ** 0.5 if len(rows) > 1 else float("nan")
    share = sum(row["warm_seconds"] for row in rows) / sum(row["full_seconds"] for row in rows)
    figures = [("ndcg_lost_mean", statistics.fmean(lost), 0.03), ("share_of_full_time", share, 0.2)]
    if len(rows) > 1:
        figures.insert(1, ("ndcg_lost_upper", statistics.fmean(lost) + half, 0.03))
    for name, value, must in figures:
        met = value < must
        print(
            json.dumps(
                {"name": f"warm_start/{name}", "value": round(value, 4), "must": must, "reach": must, "met": met}
            )
        )
    return all(value < must for _, value, must in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a warm start after 1 % new events with a full training.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", default="caser")
    parser.add_argument("--set", action="append", default=[], help="change a setting of the recipe: key=value")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--users", type=int, help="only so many users, for a quick look")
    parser.add_argument("--results", type=Path, help="keep each seed's figures here, and go on from them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = chosen_recipe(arguments.recipe, arguments.set)
    data = load(open_source(arguments.data, None)).interactions
    if arguments.users is not None:
        chosen = np.random.default_rng(0).permutation(data.num_users)[: arguments.users]
        data = without_the_unknown(data.select(np.isin(data.user_index, chosen)))
    key = {"recipe": recipe.as_dict(), "warm": recipe.warm().as_dict(), "interactions": len(data)}
    rows = []
    if arguments.results is not None and arguments.results.exists():
        lines = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        rows = [line["row"] for line in lines if line["key"] == key and line["row"]["seed"] < arguments.seeds]
    for seed in range(arguments.seeds):
        if seed in [row["seed"] for row in rows]:
            continue
        rows.append(measure(data, recipe, seed))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.results is not None:
            with arguments.results.open("a") as file:
                file.write(json.dumps({"key": key, "row": rows[-1]}) + "\n")
    raise SystemExit(0 if report(rows) else 1)


if __name__ == "__main__":
    main()
