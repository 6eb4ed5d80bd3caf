"""A quick look at popular items: most targets turn out to rank beyond the last cutoff, and need no further scores."""

import numpy as np
import numpy.typing as npt

from ml.held_out import HeldOut, Mask, batches
from ml.recommender import Indices, Ranker

# Popular items to look at: so many for each place in a list, and this share of the catalogue at least.
_FOR_EACH_PLACE = 8
_LEAST_SHARE = 1 / 16
# Scores of the same pair may differ by rounding from one computation to another; this share of the largest score is
# hundreds of times as much. What is closer than that decides nothing here.
_MARGIN = 1e-3


def users_within_reach(
    recommender: Ranker, held_out: HeldOut, candidates: Mask | None, depth: int, most_scores: int
) -> Indices:
    """Find the users one of whose targets may rank among the first `depth`: places in the arrays of `held_out`.

    Who has `depth` popular items that surely score higher than the best target is left out.
    """
    everyone = np.arange(len(held_out.users))
    popular = _popular_items(held_out, candidates, depth)
    if popular is None:
        return everyone
    column = np.full(held_out.history.num_items, -1)
    column[popular] = np.arange(len(popular))
    is_within = np.ones(len(everyone), np.bool_)
    widest = int(held_out.counts.max(initial=0))
    for batch in batches(everyone, max(1, most_scores // (len(popular) + widest))):
        encoded = recommender.encode_windows(*held_out.queries(batch, recommender.window_length))
        scores = recommender.score_items(encoded, popular)
        best = recommender.score_items(encoded, _targets_side_by_side(held_out, batch)).max(axis=1)
        largest = np.abs(scores).max(axis=1, where=np.isfinite(scores), initial=0)
        margin = _MARGIN * np.maximum(largest, np.where(np.isfinite(best), np.abs(best), 0))
        rows, items = held_out.seen(batch)
        columns = column[items]
        scores[rows[columns >= 0], columns[columns >= 0]] = -np.inf
        # Scores that are not numbers are above nothing here, so that their user is ranked, and refused.
        is_within[batch] = np.count_nonzero(scores > (best + margin)[:, None], axis=1) < depth
    return np.flatnonzero(is_within)


def _popular_items(held_out: HeldOut, candidates: Mask | None, depth: int) -> Indices | None:
    """The candidates taken most often; None where they would be most of the catalogue."""
    size = held_out.history.num_items
    number = max(_FOR_EACH_PLACE * depth, int(_LEAST_SHARE * size))
    if 2 * number > (size if candidates is None else int(candidates.sum())):
        return None
    taken = np.bincount(held_out.history.item_index, minlength=size)
    if candidates is not None:
        taken[~candidates] = -1
    popular: Indices = np.sort(np.argpartition(taken, size - number)[size - number :])
    return popular


def _targets_side_by_side(held_out: HeldOut, batch: Indices) -> npt.NDArray[np.int64]:
    """The targets of each user in a row, (batch, most), filled up with -1."""
    rows, places = held_out.targets(batch)
    targets = np.full((len(batch), int(held_out.counts[batch].max())), -1)
    targets[rows, places - held_out.starts[batch][rows]] = held_out.items[places]
    return targets
