"""How many samples a second NeuMF and Caser train on a GPU, on generated data, beside what paper allows.

    make bench-training-gpu            # or: python benchmarks/training_gpu.py --small, for a look on any machine

NeuMF has the sizes of NVIDIA's reference (DeepLearningExamples, PyTorch NCF: 34.1 million samples a second on one
A100): the shape of MovieLens 20M, 64 factors, towers of 128 + 128, hidden 256-128-64, 4 negatives; a sample is one
scored pair. Caser has the sizes of the default recipe, and a sample is one target. docs/performance.md works the
ceilings out. Prints a JSON line for each figure.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from ml.ids import IdMap
from ml.interactions import Interactions
from ml.recipes import RECIPES, Recipe, apply_overrides
from ml.train import Progress, train

BANDWIDTH = 4.8e12  # bytes a second of an H200
NEUMF_BYTES = 7_300  # a sample; docs/performance.md
NEUMF = {
    "factors": "64", "tower_factors": "128", "hidden": "256,128,64", "dropout": "0", "embedding_dropout": "0",
    "negatives": "4", "shared_negatives": "false", "targets": "1", "loss": "bce", "recency": "0",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="little data, to see it run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=None, help="positives of a NeuMF step")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.small:
        raise SystemExit("there is no GPU here: --small shows that it runs, on a CPU")
    users, items, events = (100, 80, 1_500) if options.small else (138_493, 26_744, 20_000_000)
    batch = options.batch or (500 if options.small else 262_144)
    data = generated(users, items, events)
    neumf = apply_overrides(RECIPES["neumf-fast"], NEUMF | {"batch_size": str(batch)})
    rate = examples_per_second(neumf, data, options.device) * (1 + neumf.negatives)
    print(json.dumps({"model": "NeuMF", "device": options.device, "million_samples_per_second": rate / 1e6}))
    if not options.small:
        show("gpu_neumf_million_samples_per_second", rate / 1e6, must=34.1, reach=100)
        show("gpu_neumf_share_of_the_ceiling", rate * NEUMF_BYTES / BANDWIDTH, must=0.05, reach=0.15)
    caser = apply_overrides(RECIPES["caser"], {"batch_size": str(min(batch, 16_384))})
    rate = examples_per_second(caser, data, options.device) * caser.targets
    print(json.dumps({"model": "Caser", "device": options.device, "million_samples_per_second": rate / 1e6}))


def generated(users: int, items: int, events: int) -> Interactions:
    """Users of even activity, items of a long tail; what is learnt does not matter here."""
    chosen = np.random.default_rng(0)
    user_index = np.sort(chosen.integers(0, users, events)).astype(np.int32)
    item_index = (items * chosen.random(events) ** 3).astype(np.int32)
    return Interactions(_ids(users), _ids(items), user_index, item_index, np.arange(events))


def examples_per_second(recipe: Recipe, data: Interactions, device: str) -> float:
    """The rate between the first and the last report of the second epoch, when everything has been recorded."""
    marks: list[tuple[float, float]] = []

    def note(progress: Progress) -> None:
        marks.append((time.perf_counter(), progress.fraction if not progress.epoch_ended else progress.epoch / 2))

    train(recipe, data, device=device, epochs=2, on_progress=note)
    second = [mark for mark in marks if mark[1] >= 0.5]  # from the end of the first epoch
    (started, first), (ended, last) = second[0], second[-1]
    return (last - first) * 2 * len(data) / (ended - started)


def _ids(count: int) -> IdMap:
    return IdMap(pa.array([f"{number:08}" for number in range(count)], pa.large_string()))


def show(name: str, value: float, *, must: float, reach: float) -> None:
    met = "reach" if value >= reach else "must" if value >= must else "no"
    print(json.dumps({"name": name, "value": round(value, 3), "must": must, "reach": reach, "met": met}), flush=True)


if __name__ == "__main__":
    main()
