"""Why an item ranks where it does: the items of the history that moved its score most, found by leaving them out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ml.models import Popularity
from ml.recommender import Recommender
from ml.screening import AnyIndices

Method = Literal["leave_one_out", "fold_in", "popularity"]

# Where no window says how far back a model looks, the latest so many items are left out in turn.
MOST_LEFT_OUT = 30


@dataclass(frozen=True, slots=True)
class Influence:
    """An item of the history, and by how much the score is higher with it than without."""

    item: int
    effect: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """How reasons were found, and for each item asked about what raised its score, most first."""

    method: Method
    influences: list[list[Influence]]


def explain(
    recommender: Recommender, user_index: int, history: AnyIndices, items: Sequence[int], most: int = 3
) -> Explanation:
    """Explain the scores of `items` for one user by at most so many items of the history, oldest first, each.

    `leave_one_out` encodes the user once without each item that the model looks at; older items move up in its place.
    `fold_in` does the same with the vector that is fitted to the latest events, also for users who have a row of their
    own, which no single event can be taken out of. `popularity` looks at no history.
    """
    model = recommender.model
    if isinstance(model, Popularity):
        return Explanation("popularity", [[] for _ in items])
    method: Method = "fold_in" if model.fits_strangers else "leave_one_out"
    whole = np.asarray(history, np.int64)
    whole = whole[whole >= 0]
    looked_at = whole[-(MOST_LEFT_OUT if model.fits_strangers else recommender.window_length) :]
    left_out = list(dict.fromkeys(looked_at[::-1].tolist()))  # the latest first, each once
    if not left_out or not items:
        return Explanation(method, [[] for _ in items])
    variants = [whole, *(whole[whole != item] for item in left_out)]
    user = -1 if model.fits_strangers else user_index
    encoded = recommender.encode([user] * len(variants), variants)
    scores = recommender.score_items(encoded, np.tile(np.asarray(items, np.int64), (len(variants), 1)))
    effects = scores[0] - scores[1:]  # (left out, items)
    found = []
    for column in effects.T:
        best = np.argsort(-column, kind="stable")[:most]
        found.append([Influence(left_out[row], float(column[row])) for row in best if column[row] > 0])
    return Explanation(method, found)
