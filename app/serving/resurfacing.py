"""Items that a user has seen come again after a set time, at a set discount."""

from datetime import UTC, datetime, timedelta
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch import Tensor

from app.serving.history import History, Numbers
from ml.recommender import Indices, Recommender

# So many items stand for the catalogue where an average score is asked for.
SAMPLE = 256


class Resurfacing:
    """Decides which items return. Off where `after_days` is None."""

    def __init__(self, after_days: float | None, discount: float) -> None:
        self._after = None if after_days is None else timedelta(days=after_days)
        self._discount = discount

    @property
    def is_on(self) -> bool:
        return self._after is not None

    def numbers(self, history: History) -> Numbers:
        """Items of the history, by their numbers, that were long not interacted with; none kept out for good."""
        if self._after is None or not len(history.interactions):
            return history.interactions[:0]
        before = (datetime.now(UTC) - self._after).timestamp() * 1e6
        # Oldest first: the first of the reversed is the last of an item.
        items, last = np.unique(history.interactions[::-1], return_index=True)
        items = items[history.interacted_at[::-1][last] <= before]
        return items[np.isin(items, history.left_out) & ~np.isin(items, history.kept_out_for_good)]

    def scores(self, recommender: Recommender, encoded: Tensor, items: Indices) -> npt.NDArray[np.float32]:
        """What returning items (n,) score: the discount is the share that they lose of their lead over an average item.

        Models' scores have no zero of their own, so that a share of the score itself would mean nothing.
        """
        sample = _sample(recommender.num_items)
        scores = recommender.score_items(encoded, np.concatenate([items, sample])[None])[0]
        own, average = scores[: len(items)], scores[len(items) :].mean()
        lead = own - average
        # An item below the average has no lead to lose.
        scored: npt.NDArray[np.float32] = np.where(lead > 0, average + (1 - self._discount) * lead, own)
        return scored.astype(np.float32)


@lru_cache(maxsize=4)
def _sample(num_items: int) -> Indices:
    return np.random.default_rng(0).choice(num_items, min(SAMPLE, num_items), replace=False).astype(np.int64)
