"""Evaluation: rank the catalogue for every user with something held out, in batches, and measure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ml.distributed import ALONE, Processes
from ml.full_ranking import counts_of_ranked, first_items, ranks_of, take_out
from ml.interactions import Interactions
from ml.metrics import Floats, Ranks, confidence_intervals, per_user
from ml.models import Popularity, PopularityConfig
from ml.recommender import Indices, Recommender, windows_from_interactions

CUTOFFS = (5, 10, 20, 50)
# Scores held at once: 16 MiB of float32 stay near the processor's cache and bound memory at any catalogue.
_BATCH_SCORES = 1 << 22
_NEVER = float("-inf")


class Ranker(Protocol):
    """What evaluation asks of a recommender."""

    @property
    def num_items(self) -> int: ...

    @property
    def window_length(self) -> int: ...

    @property
    def folds_in(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def scores(self, user_index: npt.NDArray[np.int64], windows: Indices) -> Tensor: ...


@dataclass(frozen=True)
class Evaluation:
    """Metrics over all users that were ranked for, and for each of them.

    `users` (users,) are their indices, in the order of the arrays in `by_user`. `targets` counts what was looked
    for; `repeated` what was left out because the user had it already; `unknown_users` those a model cannot rank for.
    """

    metrics: dict[str, float]
    by_user: dict[str, Floats]
    users: npt.NDArray[np.int64]
    targets: int
    repeated: int
    unknown_users: int

    def intervals(self, level: float = 0.95, seed: int = 0) -> dict[str, list[float]]:
        """Bootstrap intervals of the metrics over users."""
        # Far beyond that many users, fewer draws give the same interval.
        samples = 1000 if len(self.users) <= 50_000 else 200
        found = confidence_intervals(self.by_user, level=level, samples=samples, seed=seed)
        return {name: list(edges) for name, edges in found.items()}


def evaluate(
    recommender: Ranker,
    history: Interactions,
    targets: Interactions,
    *,
    candidates: npt.NDArray[np.bool_] | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
    negatives: int = 0,
    seed: int = 0,
    known_users: npt.NDArray[np.bool_] | None = None,
    keep_history: bool = False,
    processes: Processes = ALONE,
) -> Evaluation:
    """Rank all items, or `candidates` (num_items,), for each user of `targets`, without the items of their history.

    With `negatives`, only that many sampled items a user stand beside the targets. Ties rank the lower index first,
    as the service does. `known_users` (num_users,) are those the weights were trained on: others are ranked as
    strangers where the model folds in and left out where not. ValueError if nothing is left to rank.
    Several `processes` each rank for their own users, and all get the figures of all users; sampled negatives are then
    other ones than a single process draws.
    """
    size = history.num_items
    pairs = _distinct_pairs(targets)
    distinct = len(pairs)
    if not keep_history:
        pairs = pairs[~_are_among(pairs, _pairs(history))]
    repeated = distinct - len(pairs)
    pair_user, pair_item = pairs // max(size, 1), pairs % max(size, 1)
    users, counts = np.unique(pair_user, return_counts=True)
    unknown = 0
    if known_users is not None and not recommender.folds_in:
        keep = known_users[users]
        unknown = int((~keep).sum())
        kept_pairs = np.repeat(keep, counts)
        users, counts, pair_user, pair_item = users[keep], counts[keep], pair_user[kept_pairs], pair_item[kept_pairs]
    if processes.sum_number(len(users)) == 0:
        raise ValueError("nothing to evaluate: no user has an interaction held out that they had not seen before")
    if negatives < 0 or any(k < 1 for k in cutoffs):
        raise ValueError("negatives must not be below 0, nor a cutoff below 1")
    starts = np.concatenate([[0], np.cumsum(counts)])
    generator = np.random.default_rng(processes.seed(seed))
    left_out = None if candidates is None else torch.from_numpy(~candidates).to(recommender.device)
    depth = max(cutoffs)
    shown = np.zeros((len(cutoffs), size), np.bool_)
    ranks, sizes = np.empty(len(pair_user), np.int64), np.empty(len(users), np.int64)
    step = max(1, _BATCH_SCORES // size)
    for first in range(0, len(users), step):
        batch = slice(first, min(first + step, len(users)))
        batch_users = users[batch]
        own = slice(starts[batch.start], starts[batch.stop])
        rows = np.repeat(np.arange(len(batch_users)), counts[batch])
        asked = batch_users if known_users is None else np.where(known_users[batch_users], batch_users, -1)
        windows = windows_from_interactions(history, batch_users, recommender.window_length)
        with torch.inference_mode():
            scores = recommender.scores(asked, windows)
            if not keep_history:
                seen_rows, seen = _rows_of(history, batch_users)
                take_out(scores, seen_rows, history.item_index[seen])
            if left_out is not None:
                scores.masked_fill_(left_out, _NEVER)
            if negatives:
                _keep_sampled(scores, rows, pair_item[own], negatives, generator)
            sizes[batch] = counts_of_ranked(scores)
            ranks[own] = ranks_of(scores, rows, pair_item[own])
            top = first_items(scores, min(depth, size))
        for level, k in enumerate(cutoffs):
            chosen = top[:, :k]
            shown[level, chosen[chosen >= 0]] = True
    if processes.size > 1:
        # Processes own ascending ranges of users, so that what follows is in the order of users again.
        users, counts = processes.gather_array(users), processes.gather_array(counts)
        ranks, sizes = processes.gather_array(ranks), processes.gather_array(sizes)
        shown = processes.sum_array(shown.astype(np.int32)) > 0
        repeated, unknown = processes.sum_number(repeated), processes.sum_number(unknown)
    by_user = per_user(Ranks(np.repeat(np.arange(len(users)), counts), ranks, sizes), cutoffs)
    metrics = {name: float(values.mean()) for name, values in by_user.items()}
    catalogue = size if candidates is None else int(candidates.sum())
    for level, k in enumerate(cutoffs):
        metrics[f"coverage@{k}"] = float(shown[level].sum() / max(catalogue, 1))
    return Evaluation(metrics, by_user, users, len(ranks), repeated, unknown)


def popularity_of(train: Interactions, processes: Processes = ALONE) -> Recommender:
    """Count how often each item was taken: the baseline beside every result."""
    model = Popularity(max(train.num_users, 1), max(train.num_items, 1), PopularityConfig())
    model.count(torch.from_numpy(train.item_index.astype(np.int64)))
    model.counts.copy_(processes.sum_tensor(model.counts))
    return Recommender(model, train.users, train.items)


def _pairs(interactions: Interactions) -> npt.NDArray[np.int64]:
    """Each (user, item) pair as one number."""
    return interactions.user_index.astype(np.int64) * interactions.num_items + interactions.item_index


def _distinct_pairs(interactions: Interactions) -> npt.NDArray[np.int64]:
    return np.unique(_pairs(interactions))


def _are_among(sorted_numbers: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Tell which of the sorted numbers are among the others, which need no sorting."""
    # Almost all others are told apart by their last bits.
    mask = (1 << max(16, (16 * len(sorted_numbers)).bit_length())) - 1
    marked = np.zeros(mask + 1, np.bool_)
    marked[sorted_numbers & mask] = True
    others = others[marked[others & mask]]
    found = np.zeros(len(sorted_numbers) + 1, np.bool_)
    places = np.searchsorted(sorted_numbers, others)
    found[places[np.append(sorted_numbers, -1)[places] == others]] = True
    return found[:-1]


def _rows_of(
    interactions: Interactions, users: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All rows of the users, and for each the place of its user in `users`."""
    starts = interactions.offsets[users]
    lengths = interactions.offsets[users + 1] - starts
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(np.arange(len(users)), lengths), np.arange(lengths.sum()) + np.repeat(shift, lengths)


def _keep_sampled(
    scores: Tensor,
    rows: npt.NDArray[np.int64],
    items: npt.NDArray[np.int64],
    negatives: int,
    generator: np.random.Generator,
) -> None:
    """Leave in each row the targets and as many of the other candidates, drawn evenly without repetition."""
    # Drawn row by row in one stream, so that the sample does not depend on the size of a batch.
    keys = generator.random(tuple(scores.shape))
    if negatives >= scores.shape[1]:
        return
    keys[(scores == _NEVER).cpu().numpy()] = np.inf
    keys[rows, items] = np.inf
    drawn = np.argpartition(keys, negatives - 1, axis=1)[:, :negatives]
    left_out = np.ones(keys.shape, np.bool_)
    left_out[np.arange(len(keys))[:, None], drawn] = False
    left_out[rows, items] = False
    scores.masked_fill_(torch.from_numpy(left_out).to(scores.device), _NEVER)
