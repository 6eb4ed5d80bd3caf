"""How fast training and evaluation are, beside RecBole on the same data, and whether a step grows with the catalogue.

    make bench-training [DATA=DIR] [RANKING_DATA=DIR] [PEER_PYTHON=…/bin/python]

DIR holds MovieLens 100K; without it, data of that shape are generated. RANKING_DATA holds more data, on which full
rankings by Caser are timed as well. PEER_PYTHON is the interpreter of an environment
that has RecBole (recbole_peer.py says how to make one); without it the figures that compare are left out. All on one
thread, and all times are processor seconds, so that a busy machine does both sides the same harm. Ours and the peer's
runs take turns; the best epoch of each counts. Prints a JSON line for each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pyarrow as pa
import torch

from ml import train as training
from ml.evaluate import evaluate
from ml.experiment import SplitEvaluator
from ml.ids import IdMap
from ml.importers import load_interactions
from ml.interactions import Interactions
from ml.recipes import RECIPES, Recipe, apply_overrides
from ml.recommender import Recommender
from ml.split import Split, split_by_name

STEP_EXAMPLES = 4096
STEPS = 150
RANKINGS = 10
# The sizes and batches of RecBole 1.2.1's own settings; it counts negatives into a batch. It draws one sample for each
# target; ours share: all targets of a window, or some of a user, are scored against the same few. What else there is to
# choose (loss, rate, dropout, precision) was chosen on validation.
PEERS: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "NeuMF": (
        {"train_batch_size": 2048},
        "neumf-fast",
        {
            "factors": "64", "tower_factors": "64", "hidden": "128,64", "dropout": "0", "embedding_dropout": "0",
            "negatives": "16", "shared_negatives": "false", "targets": "32", "loss": "softmax", "recency": "0.8",
            "batch_size": "1024", "learning_rate": "0.02", "precision": "bfloat16",
        },
    ),
    "Caser": (
        {"MAX_ITEM_LIST_LENGTH": 5, "loss_type": "BPR", "train_batch_size": 2048},
        "caser",
        {
            "factors": "64", "horizontal_filters": "8", "vertical_filters": "4", "window_length": "5", "dropout": "0.2",
            "embedding_dropout": "0", "negatives": "4", "shared_negatives": "false", "targets": "4", "loss": "softmax",
            "batch_size": "2048", "learning_rate": "0.02",
        },
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("DATA") or None)
    parser.add_argument("--peer-python", default=None, help="the interpreter that has RecBole (or PEER_PYTHON)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--largest", type=int, default=10_000_000, help="users and items of the largest catalogue")
    parser.add_argument("--ranking-data", default=os.environ.get("RANKING_DATA") or None)
    parts = ["steps", *PEERS, "ranking"]
    parser.add_argument("--part", action="append", choices=parts, help="measure this alone; all otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = options.part or parts
    if "steps" in parts:
        steps_by_catalogue(options.largest)
    if parts == ["steps"]:
        return
    python = peers.peer_python(options.peer_python)
    if python is None:
        print("no interpreter with RecBole (--peer-python or PEER_PYTHON): its figures and the ratios are left out")
    models = [model for model in PEERS if model in parts]
    if models:
        split = split_by_name(None, *(load_interactions(options.data) if options.data else (generated(), None)))
        for model in models:
            beside_the_peer(model, split, python, options.epochs, options.turns)
    if "ranking" in parts and options.ranking_data:
        rank_beside_the_peer("Caser", Path(options.ranking_data), python)


def steps_by_catalogue(largest: int) -> None:
    """The time of a step on a small and on a large catalogue, sampling included."""
    small = min(step_seconds(10_000) for _ in range(2))
    large = min(step_seconds(largest) for _ in range(2))
    print(json.dumps({"rows": largest, "small_step_ms": small * 1000, "large_step_ms": large * 1000}))
    show("step_time_growth_with_catalogue", large / small, must=1.6, reach=1.3)


def step_seconds(rows: int) -> float:
    """Processor seconds of a step of NeuMF, of half as many users as items and users together."""
    recipe = apply_overrides(
        RECIPES["neumf-fast"],
        {"negatives": "1", "shared_negatives": "false", "targets": "1", "loss": "bpr", "recency": "0"}
        | {"batch_size": str(STEP_EXAMPLES)},
    )
    chosen, count = np.random.default_rng(0), STEPS * STEP_EXAMPLES
    ids = IdMap(pa.array([f"{number:08}" for number in range(rows // 2)], pa.large_string()))
    users = np.sort(chosen.integers(0, rows // 2, count)).astype(np.int32)
    items = chosen.integers(0, rows // 2, count).astype(np.int32)
    data = Interactions(ids, ids, users, items, np.arange(count))
    marks: list[tuple[float, float]] = []

    def note(progress: training.Progress) -> None:
        if not progress.epoch_ended:
            marks.append((time.process_time(), progress.fraction))

    training.train(recipe, data, on_progress=note, epochs=1)
    (started, first), (ended, last) = marks[0], marks[-1]  # the first steps lay the tables out
    return (ended - started) / ((last - first) * STEPS)


def beside_the_peer(model: str, split: Split, python: str | None, epochs: int, turns: int) -> None:
    """Examples a second, evaluation seconds and quality after the same epochs, ours and the peer's in turns."""
    settings, name, overrides = PEERS[model]
    recipe = apply_overrides(RECIPES[name], overrides | {"epochs": str(epochs), "patience": str(epochs)})
    ours, theirs = [], []
    with tempfile.TemporaryDirectory(prefix="shortlist-training-") as folder:
        files = peers.write_files(split, Path(folder))
        for turn in range(turns):
            ours.append(run_ours(recipe, split, turn))
            if python is not None:
                theirs.append(
                    peers.run_recbole(python, files, split, model, settings, epochs, seed=turn, time_rankings=True)
                )
    key = model.lower()
    rate, rankings = max(r["rate"] for r in ours), least([r["rankings"] for r in ours])
    quality = float(np.mean([r["ndcg"] for r in ours]))
    print(json.dumps({"model": model, "examples_per_second": rate, "ranking": rankings, "validation": quality}))
    if not theirs:
        return
    peer_rate = max(r["examples"] / min(r["train_processor_seconds"]) for r in theirs)
    peer_rankings = least([r["ranking_processor_seconds"] for r in theirs])
    peer_quality = float(np.mean([r["validation"]["ndcg@10"] for r in theirs]))
    print(
        json.dumps(
            {
                "model": f"RecBole {model}",
                "examples_per_second": peer_rate,
                "ranking": peer_rankings,
                "validation": peer_quality,
            }
        )
    )
    show(f"{key}_examples_per_second_over_recbole", rate / peer_rate, must=3, reach=5 if model == "NeuMF" else 8)
    show(f"{key}_validation_ndcg_over_recbole", quality / peer_quality, must=1, reach=1.5)
    show_rankings(key, rankings, peer_rankings)


def rank_beside_the_peer(model: str, data: Path, python: str | None) -> None:
    """Full rankings of other data: ours after one epoch, the peer's untrained, which takes it as long."""
    settings, name, overrides = PEERS[model]
    split = split_by_name(None, *load_interactions(data))
    trained = training.train(apply_overrides(RECIPES[name], overrides), split.train, epochs=1).model
    ours = ranking_seconds(Recommender(trained, split.train.users, split.train.items), split)
    print(json.dumps({"model": model, "data": data.name, "ranking": ours}))
    if python is None:
        return
    with tempfile.TemporaryDirectory(prefix="shortlist-training-") as folder:
        files = peers.write_files(split, Path(folder))
        theirs = peers.run_recbole(python, files, split, model, settings, epochs=0)["ranking_processor_seconds"]
    print(json.dumps({"model": f"RecBole {model}", "data": data.name, "ranking": theirs}))
    show_rankings(f"{model.lower()}_{data.name.replace('-', '_')}", ours, theirs)


def show_rankings(key: str, ours: dict[str, float], theirs: dict[str, float]) -> None:
    """How many times as fast ours is: with the metrics that need whole rankings, and with those of lists alone."""
    show(f"{key}_full_ranking_speed_over_recbole", theirs["everything"] / ours["everything"], must=10, reach=20)
    show(f"{key}_full_ranking_of_lists_speed_over_recbole", theirs["lists"] / ours["lists"], must=10, reach=20)


def least(rankings: list[dict[str, float]]) -> dict[str, float]:
    return {kind: min(found[kind] for found in rankings) for kind in rankings[0]}


def ranking_seconds(recommender: Recommender, split: Split) -> dict[str, float]:
    """The least processor seconds of a whole evaluation on the test part, with every metric and of lists alone.

    Both sides put histories together beforehand.
    """
    found, history = {}, split.history_for_test()
    for kind in ("everything", "lists"):
        seconds = []
        for _ in range(RANKINGS):
            started = time.process_time()
            evaluate(recommender, history, split.test, cutoffs=(10,), lists_only=kind == "lists")
            seconds.append(time.process_time() - started)
        found[kind] = min(seconds)
    return found


def run_ours(recipe: Recipe, split: Split, seed: int) -> dict[str, Any]:
    """Train with a validation after each epoch, as the peer does, and rank the test."""
    evaluator = SplitEvaluator(split)
    marks = [time.process_time()]
    seconds: list[float] = []

    def validate(model: Any) -> dict[str, float]:
        seconds.append(time.process_time() - marks[-1])
        metrics = evaluator.stopping_metric(model)
        marks.append(time.process_time())
        return metrics

    result = training.train(recipe, split.train, validate, seed=seed)
    recommender = Recommender(result.model, split.train.users, split.train.items)
    ndcg = max(row["ndcg@10"] for row in result.history)
    return {"rate": len(split.train) / min(seconds), "rankings": ranking_seconds(recommender, split), "ndcg": ndcg}


def generated() -> Interactions:
    """Interactions of the shape of MovieLens 100K."""
    from ml.simulate import simulate

    made = simulate(943, 1682, 100_000)
    return Interactions.from_arrays(
        [made.user_ids[user] for user in made.user_index], [made.item_ids[item] for item in made.item_index], made.time
    )


def show(name: str, value: float, *, must: float, reach: float) -> None:
    more_is_better = must < reach
    met = "reach" if (value >= reach if more_is_better else value <= reach) else None
    met = met or ("must" if (value >= must if more_is_better else value <= must) else "no")
    print(json.dumps({"name": name, "value": round(value, 3), "must": must, "reach": reach, "met": met}), flush=True)


if __name__ == "__main__":
    main()
