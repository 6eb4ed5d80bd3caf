"""Who has something held out, and what: whom an evaluation ranks for, and where it looks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ml.interactions import Interactions
from ml.recommender import UNKNOWN, Indices, windows_from_interactions

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class HeldOut:
    """Users (users,) in order, and the `items` of each, `counts` (users,) of them, one after the other.

    `asked` (users,) are the users as a recommender knows them, -1 for strangers; places in these arrays stand for users
    everywhere below. `repeated` counts the targets left out because the user had them already, `unknown_users` those
    left out because they are strangers. With `keep_history`, what a user has may be ranked again.
    """

    history: Interactions
    users: Indices
    asked: Indices
    counts: Indices
    items: Indices
    repeated: int
    unknown_users: int
    keep_history: bool

    @cached_property
    def starts(self) -> Indices:
        """Where each user's items start, and where the last ones end."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def queries(self, batch: Indices, window_length: int) -> tuple[Indices, Indices]:
        """User indices and windows, as Recommender.encode_windows takes them."""
        return self.asked[batch], windows_from_interactions(self.history, self.users[batch], window_length)

    def targets(self, batch: Indices) -> tuple[Indices, Indices]:
        """Where in `items` the targets of some users are: for each its row in the batch, and its place."""
        return _rows_between(self.starts, batch)

    def seen(self, batch: Indices) -> tuple[Indices, npt.NDArray[np.int32]]:
        """What is not ranked for some users: rows in the batch, and items."""
        users, history = self.users[batch[:0] if self.keep_history else batch], self.history
        if len(users) and users[-1] - users[0] + 1 == len(users):  # one after the other, and so are their rows
            rows = slice(history.offsets[users[0]], history.offsets[users[-1] + 1])
            return history.user_index[rows] - users[0], history.item_index[rows]
        numbers, places = _rows_between(history.offsets, users)
        return numbers, history.item_index[places]


def held_out(
    history: Interactions, targets: Interactions, *, known_users: Mask | None, strangers: bool, keep_history: bool
) -> HeldOut:
    """Find the targets that users do not have in their history; users not among `known_users` only as `strangers`."""
    size = max(history.num_items, 1)
    pairs = np.unique(_pairs(targets))
    distinct = len(pairs)
    if not keep_history:
        pairs = pairs[~_are_among(pairs, _pairs(history))]
    pair_user, items = pairs // size, pairs % size
    users, counts = np.unique(pair_user, return_counts=True)
    known = np.ones(len(users), np.bool_) if known_users is None else known_users[users]
    asked = np.where(known, users, UNKNOWN)
    if not strangers:
        items, users, counts, asked = items[np.repeat(known, counts)], users[known], counts[known], asked[known]
    unknown = 0 if strangers else int((~known).sum())
    return HeldOut(history, users, asked, counts, items, distinct - len(pairs), unknown, keep_history)


def batches(number: int, step: int) -> Iterator[Indices]:
    """Split so many places, from 0 on, into parts of at most `step`."""
    for first in range(0, number, step):
        yield np.arange(first, min(first + step, number))


def _pairs(interactions: Interactions) -> Indices:
    """Each (user, item) pair as one number."""
    pairs: Indices = interactions.user_index.astype(np.int64) * interactions.num_items + interactions.item_index
    return pairs


def _are_among(sorted_numbers: Indices, others: Indices) -> Mask:
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


def _rows_between(offsets: Indices, numbers: Indices) -> tuple[Indices, Indices]:
    """All of offsets[n]:offsets[n + 1] for each number n, and beside them the places of the numbers."""
    starts = offsets[numbers]
    lengths = offsets[numbers + 1] - starts
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(np.arange(len(numbers)), lengths), np.arange(lengths.sum()) + np.repeat(shift, lengths)
