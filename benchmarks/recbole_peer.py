"""Trains and evaluates one of RecBole's models on prepared files, and prints one JSON line.

    PEER_PYTHON benchmarks/recbole_peer.py --data DIR --model NeuMF --epochs 20 --settings '{"learning_rate": 0.001}'

Runs in an environment of RecBole's own: pip install "setuptools<80" "numpy<2" "pandas<2.3" "torch<2.14" recbole==1.2.1
DIR is what `peers.write_files` returned: one file to hold the last two of each user out of, or three, split already.
Validation and test are full rankings; the epoch with the best validation NDCG@10 is kept and RecBole stops early by it.
RecBole's sequential models rank items that a user has had before; here they are taken out, as for the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import ModelType, get_model, get_trainer, init_seed

CUTOFF = 10
# What full rankings are timed for: RecBole's own choice of metrics, and those with AUC, which needs whole rankings.
LISTS = ["Recall", "MRR", "NDCG", "Hit", "Precision"]
TIMED = {"lists": LISTS, "everything": [*LISTS, "MAP", "GAUC"]}
RANKINGS = 10  # of each kind at most, and none begins after so many seconds
RANKING_SECONDS = 8.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="NeuMF, Caser, BPR, SASRec or another of RecBole's")
    parser.add_argument("--settings", type=json.loads, default={}, help="RecBole's own settings as JSON")
    parser.add_argument("--epochs", type=int, default=20, help="0 to time rankings of an untrained model alone")
    parser.add_argument("--hours", type=float, default=math.inf, help="of processor time, after which no epoch starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time-rankings", action="store_true", help="time full rankings of the test part as well")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it too
    torch.set_num_threads(options.threads)
    # RecBole 1.2.1 was written before torch.load refused objects; the file is one it has just saved itself.
    torch.load = partial(torch.load, weights_only=False)
    with tempfile.TemporaryDirectory() as saved:
        sizes = (options.epochs, options.hours, options.seed)
        print(json.dumps(run(options.data, options.model, options.settings, *sizes, saved, options.time_rankings)))


def run(
    data: Path,
    model_name: str,
    settings: dict[str, Any],
    epochs: int,
    hours: float,
    seed: int,
    saved: str,
    time_rankings: bool,
) -> dict[str, Any]:
    """Train one model; returns its metrics, and the seconds and processor seconds of every epoch.

    Also the least processor seconds of a full ranking, if asked for; without epochs, these and the pairs tested alone.
    """
    is_split = (data / f"{data.name}.train.inter").exists()
    fixed: dict[str, Any] = {
        "data_path": str(data.parent),
        "checkpoint_dir": saved,
        "load_col": {"inter": ["user_id", "item_id"] + ([] if is_split else ["timestamp"])},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "metrics": ["Hit", "Recall", "NDCG"],
        "topk": [CUTOFF],
        "valid_metric": f"NDCG@{CUTOFF}",
        "metric_decimal_place": 6,
        "epochs": epochs,
        "seed": seed,
        "use_gpu": False,
        "show_progress": False,
    }
    if is_split:
        fixed["benchmark_filename"] = ["train", "valid", "test"]
    is_sequential = get_model(model_name).type == ModelType.SEQUENTIAL
    if is_sequential and settings.get("loss_type", "CE") == "CE":
        fixed["train_neg_sample_args"] = None  # a softmax over all items takes no samples
    config = Config(model=model_name, dataset=data.name, config_dict={**fixed, **settings})
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, validation, test = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    pairs = pairs_digest(dataset, test._dataset)

    def rankings() -> dict[str, float]:
        return {
            kind: ranking_seconds({**fixed, **settings, "metrics": metrics}, model_name, data.name, model, train, test)
            for kind, metrics in TIMED.items()
        }

    if not epochs:
        return {"test_pairs": pairs, "ranking_processor_seconds": rankings()}
    training, validating, testing = Timer(), Timer(), Timer()
    trainer._train_epoch = within(hours, training.around(trainer._train_epoch))
    trainer._valid_epoch = validating.around(trainer._valid_epoch)
    out_of_time = False
    try:
        trainer.fit(train, validation, verbose=False, saved=True, show_progress=False)
    except OutOfTimeError:
        out_of_time = True  # the best epoch so far is on disk
    found = {"test": testing.around(trainer.evaluate)(test, load_best_model=True)}
    found["validation"] = trainer.evaluate(validation, load_best_model=False)
    if is_sequential:
        found = {
            "test": filtered(trainer.model, test, dataset, data, held_out=1),
            "validation": filtered(trainer.model, validation, dataset, data, held_out=2),
        }
    return {
        "model": model_name,
        "settings": settings,
        "seed": seed,
        "epochs": len(training.seconds),
        "out_of_time": out_of_time,
        "examples": len(train._dataset),
        "users_tested": len(test._dataset) if is_sequential else len(test.uid_list),
        "test_pairs": pairs,
        "train_seconds": training.seconds,
        "train_processor_seconds": training.processor_seconds,
        "validation_seconds": validating.seconds,
        "test_seconds": testing.seconds[0],
        "test_processor_seconds": testing.processor_seconds[0],
        "ranking_processor_seconds": rankings() if time_rankings else None,
        **{
            part: {"hit_rate@10": m["hit@10"], "recall@10": m["recall@10"], "ndcg@10": m["ndcg@10"]}
            for part, m in found.items()
        },
    }


def ranking_seconds(
    settings: dict[str, Any], model_name: str, data_name: str, model: Any, train: Any, test: Any
) -> float:
    """The least processor seconds of a whole evaluation as RecBole's users call it, without reading the weights."""
    np.float = float  # RecBole 1.2.1's MRR and MAP were written for a numpy that had it
    config = Config(model=model_name, dataset=data_name, config_dict=settings)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.eval_collector.data_collect(train)
    evaluating, ends = Timer(), time.perf_counter() + RANKING_SECONDS
    while len(evaluating.seconds) < RANKINGS and (not evaluating.seconds or time.perf_counter() < ends):
        evaluating.around(trainer.evaluate)(test, load_best_model=False)
    return min(evaluating.processor_seconds)


class OutOfTimeError(Exception):
    """The training has taken as long as it may."""


def within(hours: float, train_epoch: Any) -> Any:
    """Let no epoch but the first begin once so many hours have gone by."""
    started = time.process_time()
    begun = 0

    def limited(*arguments: Any, **keywords: Any) -> Any:
        nonlocal begun
        if begun and time.process_time() - started > hours * 3600:
            raise OutOfTimeError
        begun += 1
        return train_epoch(*arguments, **keywords)

    return limited


class Timer:
    """Notes how long each call of a function takes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def around(self, function: Any) -> Any:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            started, processor = time.perf_counter(), time.process_time()
            result = function(*arguments, **keywords)
            self.seconds.append(time.perf_counter() - started)
            self.processor_seconds.append(time.process_time() - processor)
            return result

        return timed


def filtered(model: Any, loader: Any, dataset: Any, data: Path, held_out: int) -> dict[str, float]:
    """The metrics of a leave-one-out part with each user's history taken out, the `held_out` last items not in it."""
    rows = pd.read_csv(data / f"{data.name}.inter", sep="\t", names=["user", "item", "time"], header=0, dtype=str)
    rows["time"] = rows["time"].astype(float)
    rows = rows.sort_values(["user", "time"], kind="stable")
    kept = rows[rows.groupby("user").cumcount(ascending=False) >= held_out]
    users = dataset.token2id("user_id", kept["user"].to_numpy())
    items = dataset.token2id("item_id", kept["item"].to_numpy())
    history = {user: group.to_numpy() for user, group in pd.Series(items).groupby(users)}
    ranks = []
    model.eval()
    with torch.no_grad():
        for interaction, _, _, targets in loader:
            scores = model.full_sort_predict(interaction.to(model.device)).view(len(interaction), -1).cpu()
            scores[:, 0] = -math.inf
            own = scores.gather(1, targets.unsqueeze(1))
            for row, user in enumerate(interaction["user_id"].tolist()):
                scores[row, history.get(user, [])] = -math.inf
            scores.scatter_(1, targets.unsqueeze(1), own)
            ranks.append((scores > own).sum(1))
    rank = torch.cat(ranks).double()
    hit = (rank < CUTOFF).double()
    return {
        "hit@10": float(hit.mean()),
        "recall@10": float(hit.mean()),
        "ndcg@10": float((hit / torch.log2(rank + 2)).mean()),
    }


def pairs_digest(dataset: Any, part: Any) -> str:
    """Name the held-out pairs, so that what both sides tested can be compared."""
    users = dataset.id2token("user_id", np.asarray(part.inter_feat["user_id"]))
    items = dataset.id2token("item_id", np.asarray(part.inter_feat["item_id"]))
    lines = sorted(f"{user} {item}" for user, item in zip(users, items, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


if __name__ == "__main__":
    main()
