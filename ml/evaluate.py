"""Evaluation: rank the catalogue for every user with something held out, in batches, and measure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ml.distributed import ALONE, Processes
from ml.full_ranking import counts_of_ranked, first_items, ranks_of, take_out
from ml.held_out import HeldOut, batches, held_out
from ml.interactions import Interactions
from ml.metrics import ABSENT, Floats, Ranks, confidence_intervals, per_user
from ml.models import Popularity, PopularityConfig
from ml.quick_look import QuickLook, quick_look
from ml.recommender import Indices, Ranker, Recommender

CUTOFFS = (5, 10, 20, 50)
# Scores held at once: 16 MiB of float32 stay near the processor's cache and bound memory at any catalogue.
_BATCH_SCORES = 1 << 22
# Users encoded at once: what a model computes on the way stays near the cache, too.
_MOST_ENCODED = 1000
_NEVER = float("-inf")


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
    lists_only: bool = False,
    processes: Processes = ALONE,
) -> Evaluation:
    """Rank all items, or `candidates` (num_items,), for each user of `targets`, without the items of their history.

    With `negatives`, only that many sampled items a user stand beside the targets. Ties rank the lower index first,
    as the service does. `known_users` (num_users,) are those the weights were trained on: others are ranked as
    strangers where the model folds in and left out where not. ValueError if nothing is left to rank.
    `lists_only` leaves the metrics that have a cutoff, without coverage: the same figures, but users whose targets turn
    out to be beyond the last cutoff need few scores.
    Several `processes` each rank for their own users, and all get the figures of all users; sampled negatives are then
    other ones than a single process draws.
    """
    found = held_out(
        history,
        targets,
        known_users=known_users,
        strangers=known_users is None or recommender.folds_in,
        keep_history=keep_history,
    )
    if processes.sum_number(len(found.users)) == 0:
        raise ValueError("nothing to evaluate: no user has an interaction held out that they had not seen before")
    if negatives < 0 or any(k < 1 for k in cutoffs):
        raise ValueError("negatives must not be below 0, nor a cutoff below 1")
    size, depth = history.num_items, max(cutoffs)
    generator = np.random.default_rng(processes.seed(seed))
    left_out = None if candidates is None else torch.from_numpy(~candidates).to(recommender.device)
    shown = np.zeros((len(cutoffs), size), np.bool_)
    ranks, sizes = np.full(len(found.items), ABSENT), np.zeros(len(found.users), np.int64)
    # glibc keeps twice as much freed memory as the largest piece that was ever freed: without this one, pages may be
    # mapped anew for every batch, which can take as long as what is computed in them.
    torch.empty(_BATCH_SCORES)
    look = quick_look(recommender, found, candidates, depth) if lists_only and not negatives else None
    for batch, encoded in _encoded(recommender, found, look):
        rows, own = found.targets(batch)
        with torch.inference_mode():
            scores = recommender.score_all(encoded)
            take_out(scores, *found.seen(batch))
            if left_out is not None:
                scores.masked_fill_(left_out, _NEVER)
            if negatives:
                _keep_sampled(scores, rows, found.items[own], negatives, generator)
            ranks[own] = ranks_of(scores, rows, found.items[own])
            if lists_only:
                continue
            sizes[batch] = counts_of_ranked(scores)
            top = first_items(scores, min(depth, size))
        for level, k in enumerate(cutoffs):
            chosen = top[:, :k]
            shown[level, chosen[chosen >= 0]] = True
    # Processes own ascending ranges of users, so that everybody's are in the order of users again.
    users, counts, ranks, sizes = map(processes.gather_array, (found.users, found.counts, ranks, sizes))
    by_user = per_user(Ranks(np.repeat(np.arange(len(users)), counts), ranks, sizes), cutoffs)
    if lists_only:
        by_user = {name: values for name, values in by_user.items() if "@" in name}
    metrics = {name: float(values.mean()) for name, values in by_user.items()}
    if not lists_only:
        shown = processes.sum_array(shown.astype(np.int32)) > 0
        catalogue = size if candidates is None else int(candidates.sum())
        for level, k in enumerate(cutoffs):
            metrics[f"coverage@{k}"] = float(shown[level].sum() / max(catalogue, 1))
    repeated, unknown = processes.sum_number(found.repeated), processes.sum_number(found.unknown_users)
    return Evaluation(metrics, by_user, users, len(ranks), repeated, unknown)


def _encoded(recommender: Ranker, found: HeldOut, look: QuickLook | None) -> Iterator[tuple[Indices, Tensor]]:
    """Whom to rank for, some at a time: their places in `found`, and what the recommender knows of them."""
    ranked_at_once = max(1, _BATCH_SCORES // found.history.num_items)
    looked_at_once = ranked_at_once if look is None else max(1, min(_MOST_ENCODED, _BATCH_SCORES // look.scores_each))
    for batch in batches(len(found.users), looked_at_once):
        encoded = recommender.encode_windows(*found.queries(batch, recommender.window_length))
        if look is not None:
            within = look.within_reach(batch, encoded)
            batch, encoded = batch[within], encoded[torch.from_numpy(within).to(encoded.device)]
        for part in batches(len(batch), ranked_at_once):
            yield batch[part], encoded[part[0] : part[-1] + 1]


def popularity_of(train: Interactions, processes: Processes = ALONE) -> Recommender:
    """Count how often each item was taken: the baseline beside every result."""
    model = Popularity(max(train.num_users, 1), max(train.num_items, 1), PopularityConfig())
    model.count(torch.from_numpy(train.item_index.astype(np.int64)))
    model.counts.copy_(processes.sum_tensor(model.counts))
    return Recommender(model, train.users, train.items)


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
