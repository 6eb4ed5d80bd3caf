"""Metrics of rankings, from the ranks of what was held out; vectorised over users.

A rank counts from 0. A positive that could not be ranked at all (not among the candidates) has rank ABSENT and gains
nothing. Definitions agree with ir-measures (Success, R, P, nDCG, RR, AP).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ABSENT = np.iinfo(np.int64).max

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """Where each user's positives stand; `user` (positives,) counts users from 0 and is sorted.

    `candidates` (users,) is how many items each user's ranking holds, positives included.
    """

    user: Integers
    rank: Integers
    candidates: Integers

    @property
    def num_users(self) -> int:
        """How many users were ranked for."""
        return len(self.candidates)


def per_user(ranks: Ranks, cutoffs: Sequence[int]) -> dict[str, Floats]:
    """Compute every metric for every user: arrays (users,) by name, such as "ndcg@10" or "auc".

    AUC is the share of (positive, negative) pairs that are in the right order; 1 where there is no negative.
    """
    size = ranks.num_users
    order = np.lexsort((ranks.rank, ranks.user))
    user, rank = ranks.user[order], ranks.rank[order]
    positives = np.bincount(user, minlength=size)
    starts = np.cumsum(positives) - positives
    place = np.arange(len(user)) - starts[user]  # how many positives of the same user stand above
    found = rank != ABSENT
    depth = np.where(found, rank, 0) + 1.0

    def total(values: Floats | npt.NDArray[np.bool_]) -> Floats:
        return np.bincount(user, values.astype(np.float64), minlength=size).astype(np.float64, copy=False)

    metrics: dict[str, Floats] = {}
    gains = np.where(found, 1 / np.log2(depth + 1), 0)
    largest = int(max([*positives, 0], default=0))
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(largest) + 2.0))])
    divisor = np.maximum(positives, 1)
    for k in cutoffs:
        inside = rank < k
        hits = total(inside)
        metrics[f"hit_rate@{k}"] = (hits > 0).astype(np.float64)
        metrics[f"recall@{k}"] = hits / divisor
        metrics[f"precision@{k}"] = hits / k
        best = ideal[np.minimum(positives, k)]
        metrics[f"ndcg@{k}"] = np.divide(total(np.where(inside, gains, 0)), best, out=np.zeros(size), where=best > 0)
        metrics[f"mrr@{k}"] = total(np.where(inside & (place == 0), 1 / depth, 0))
    metrics["mrr"] = total(np.where(found & (place == 0), 1 / depth, 0))
    metrics["map"] = total(np.where(found, (place + 1) / depth, 0)) / divisor
    negatives = (ranks.candidates - total(found)).astype(np.float64)
    share_above = np.divide(
        np.where(found, rank - place, 0), negatives[user], out=np.zeros(len(user)), where=negatives[user] > 0
    )
    metrics["auc"] = total(np.where(found, 1 - share_above, 0)) / divisor
    return metrics


def confidence_intervals(
    values: dict[str, Floats], *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bootstrap the interval of every metric's mean over users: the percentiles of means of users drawn anew."""
    names = list(values)
    matrix = np.stack([values[name] for name in names], axis=1)
    size = len(matrix)
    if size == 0:
        raise ValueError("an interval needs at least one user")
    generator = np.random.default_rng(seed)
    means = np.empty((samples, len(names)))
    for row in range(samples):
        means[row] = np.bincount(generator.integers(0, size, size), minlength=size) @ matrix / size
    edges = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: (float(edges[0, column]), float(edges[1, column])) for column, name in enumerate(names)}


def mean_and_std(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Summarise the same metrics over several runs: mean and sample standard deviation (0 for one run)."""
    return {
        name: {
            "mean": float(np.mean([run[name] for run in runs])),
            "std": float(np.std([run[name] for run in runs], ddof=1)) if len(runs) > 1 else 0.0,
        }
        for name in runs[0]
    }
