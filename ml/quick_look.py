"""A quick look at popular items: most targets turn out to rank beyond the last cutoff, and need no further scores."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ml.held_out import HeldOut, Mask
from ml.recommender import Indices, Ranker

# Popular items to look at: so many for each place in a list, and this share of the catalogue at least.
_FOR_EACH_PLACE = 8
_LEAST_SHARE = 1 / 32
# Scores of the same pair may differ by rounding from one computation to another; this share of the largest score is
# hundreds of times as much. What is closer than that decides nothing here.
_MARGIN = 1e-3


def quick_look(recommender: Ranker, held_out: HeldOut, candidates: Mask | None, depth: int) -> "QuickLook | None":
    """Choose the popular items to look at; None where they were most of the catalogue."""
    size = held_out.history.num_items
    number = max(_FOR_EACH_PLACE * depth, int(_LEAST_SHARE * size))
    if 2 * number > (size if candidates is None else int(candidates.sum())):
        return None
    taken = np.bincount(held_out.history.item_index, minlength=size)
    if candidates is not None:
        taken[~candidates] = -1
    popular: Indices = np.sort(np.argpartition(taken, size - number)[size - number :])
    return QuickLook(recommender, held_out, popular, depth)


class QuickLook:
    """Finds who has `depth` popular items that surely score higher than the best target: no target is in the list."""

    def __init__(self, recommender: Ranker, held_out: HeldOut, popular: Indices, depth: int) -> None:
        self._recommender, self._held_out, self._depth = recommender, held_out, depth
        self._popular = popular
        self._column = np.full(held_out.history.num_items, -1, np.int32)
        self._column[popular] = np.arange(len(popular))

    @property
    def scores_each(self) -> int:
        """How many scores a user needs."""
        return len(self._popular) + int(self._held_out.counts.max(initial=0))

    def within_reach(self, batch: Indices, encoded: Tensor) -> Mask:
        """Tell which of some users, by their places in `held_out`, have a target that may be in the list."""
        scores = self._recommender.score_items(encoded, self._popular)
        best = self._recommender.score_items(encoded, self._targets(batch)).max(axis=1)
        sizes = np.abs(np.concatenate((scores, best[:, None]), axis=1))
        sizes[~np.isfinite(sizes)] = 0
        margin = _MARGIN * sizes.max(axis=1)
        rows, items = self._held_out.seen(batch)
        columns = self._column[items]
        among = np.flatnonzero(columns >= 0)
        scores.reshape(-1)[rows[among] * scores.shape[1] + columns[among]] = -np.inf
        # Scores that are not numbers are above nothing here, so that their user is ranked, and refused.
        is_beyond: Mask = np.count_nonzero(scores > (best + margin)[:, None], axis=1) >= self._depth
        return ~is_beyond

    def _targets(self, batch: Indices) -> npt.NDArray[np.int64]:
        """The targets of each user in a row, (batch, most), filled up with -1."""
        rows, places = self._held_out.targets(batch)
        targets = np.full((len(batch), int(self._held_out.counts[batch].max())), -1)
        targets[rows, places - self._held_out.starts[batch][rows]] = self._held_out.items[places]
        return targets
