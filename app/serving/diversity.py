"""Which of the best items to show together: maximal marginal relevance, and caps per category."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from app.serving.catalog import Catalog

Floats = npt.NDArray[np.float32]

# Beyond these, nothing is looked at: the choice costs k passes over the pool.
SMALLEST_POOL = 100
LARGEST_POOL = 4_000
# More categories than that share columns.
CATEGORY_COLUMNS = 256


def pool_size(k: int) -> int:
    """How many of the best items to choose k from."""
    return min(max(4 * k, SMALLEST_POOL), LARGEST_POOL)


def chosen_together(
    scores: Floats,
    k: int,
    *,
    diversity: float = 0.0,
    vectors: Floats | None = None,
    categories: Sequence[Collection[str]] = (),
    max_per_category: int | None = None,
) -> list[int]:
    """Choose up to k places of `scores` (n,), best first, in the order to show them.

    Each next one has the highest (1 - diversity) * relevance - diversity * likeness: its score on the scale from the
    lowest (0) to the highest (1) of all n, and the largest cosine of its vector with those chosen before, or 0 if none
    is above. With `max_per_category`, no category of `categories` (n,) comes more often. Ties: the lower place.
    `vectors` (n, d) are needed where `diversity` is above 0.
    Source: Carbonell and Goldstein 1998, MMR.
    """
    size = len(scores)
    if not size:
        return []
    relevance = np.asarray(scores, np.float32)
    lowest, highest = float(relevance.min()), float(relevance.max())
    relevance = (relevance - lowest) / (highest - lowest) if highest > lowest else np.zeros(size, np.float32)
    units = None
    if diversity > 0:
        assert vectors is not None, "likeness needs vectors"
        units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    members: defaultdict[str, list[int]] = defaultdict(list)
    if max_per_category is not None:
        for place, of_item in enumerate(categories):
            for category in of_item:
                members[category].append(place)
    value = (1 - diversity) * relevance
    # To point away is unlike, and no more: it would bring what the user likes least.
    likeness = np.zeros(size, np.float32)
    counts = Counter[str]()
    open_places = np.ones(size, np.bool_)
    chosen: list[int] = []
    while len(chosen) < k:
        marginal = value if units is None else value - diversity * likeness
        best = int(np.where(open_places, marginal, -np.inf).argmax())
        if not open_places[best]:
            break
        chosen.append(best)
        open_places[best] = False
        if units is not None:
            np.maximum(likeness, units @ units[best], out=likeness)
        if max_per_category is not None:
            for category in set(categories[best]):
                counts[category] += 1
                if counts[category] == max_per_category:
                    open_places[members[category]] = False
    return chosen


class CategoryCap:
    """Counts categories against a cap while a list grows; true if there is a cap."""

    def __init__(self, catalog: Catalog, max_per_category: int | None) -> None:
        self._catalog = catalog
        self._most = max_per_category
        self._counts = Counter[str]()

    def __bool__(self) -> bool:
        return self._most is not None

    def add(self, item_id: str) -> None:
        """Count an item that comes."""
        if self._most is not None:
            self._counts.update(set(self._catalog.categories(item_id)))

    def is_full_for(self, item_id: str) -> bool:
        """Whether one of the item's categories has come as often as it may."""
        return self._most is not None and any(
            self._counts[category] >= self._most for category in self._catalog.categories(item_id)
        )


def category_vectors(categories: Sequence[Collection[str]]) -> Floats:
    """Vectors (n, c) whose cosine is the share of categories that two items have in common."""
    columns: dict[str, int] = {}
    for of_item in categories:
        for category in of_item:
            columns.setdefault(category, len(columns) % CATEGORY_COLUMNS)
    vectors = np.zeros((len(categories), min(max(len(columns), 1), CATEGORY_COLUMNS)), np.float32)
    for row, of_item in enumerate(categories):
        vectors[row, [columns[category] for category in of_item]] = 1
    return vectors
