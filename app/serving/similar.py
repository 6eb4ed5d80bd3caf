"""Items like one item: by the vectors of the active version, else by their categories, else what most people choose."""

import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from app.serving.active_models import Active, ActiveModels
from app.serving.catalog import Catalog
from app.serving.filters import CategoryFilter
from app.serving.popularity import Popularity
from app.serving.recommendation_log import RecommendationLog, new_id, shown_to_nobody
from ml.recommender import Recommender, best

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Vectors compared at a time: bounds the memory of a request, whatever the size of the catalogue.
BLOCK = 65_536
# The items most like one, kept for those that were asked about last: comparing a million vectors takes 0.3 s.
KEPT_ITEMS = 1_000
KEPT_NEIGHBOURS = 512


@dataclass(frozen=True, slots=True)
class Alike:
    """An answer: at most k items, the most alike first, never the item itself."""

    recommendation_id: str
    items: list[tuple[str, float]]
    source: Literal["model", "categories", "popular", "empty"]
    model_version: str | None
    reason: str | None


class UnknownItem(LookupError):  # noqa: N818
    """The catalogue has no such item."""


class SimilarItems:
    """Ranks on the caller's thread; every answer goes to the log."""

    def __init__(
        self,
        catalog: Catalog,
        active_models: ActiveModels,
        popularity: Popularity,
        recommendation_log: RecommendationLog,
    ) -> None:
        self._catalog = catalog
        self._active_models = active_models
        self._popularity = popularity
        self._log = recommendation_log
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], tuple[Numbers, Floats]] = OrderedDict()

    def rank(self, item_id: str, k: int, categories: CategoryFilter) -> Alike:
        """The items most like this one that may be shown. Raises UnknownItem."""
        entry = self._catalog.entries.get(item_id)
        if entry is None:
            raise UnknownItem(item_id)
        active = self._active_models.current  # once: nothing below may mix two versions
        items = [] if active is None else self._by_vectors(active, item_id, k, categories)
        source: Literal["model", "categories", "popular", "empty"] = "model"
        if not items and entry.categories:
            items, source = self._by_categories(item_id, entry.categories, k, categories), "categories"
        if not items:
            others = ((other, float(count)) for other, count in self._popularity.ranked(categories) if other != item_id)
            items, source = list(islice(others, k)), "popular"
        reason = None
        if not items:
            source = "empty"
            among = f" with {categories}" if categories else ""
            reason = f"there is no other item{among} that may be shown"
        version = active.version if active is not None and source == "model" else None
        found = Alike(str(uuid.UUID(bytes=new_id())), items, source, version, reason)
        filters = {"k": k, "item_id": item_id, **categories.as_logged()}
        self._log.add(found.recommendation_id, shown_to_nobody("similar", source, items, filters, len(items), version))
        return found

    def _by_vectors(self, active: Active, item_id: str, k: int, categories: CategoryFilter) -> list[tuple[str, float]]:
        recommender = active.recommender
        known = active.item_indices([item_id])
        if not len(known):
            return []
        index = int(known[0])
        try:
            indices, cosines = self._neighbours(active, index)
        except ValueError:  # a version that has no vectors
            return []
        allowed = active.candidates.allowed(categories)
        shown = allowed.mask[indices]
        if np.count_nonzero(shown) < min(k, allowed.count - bool(allowed.mask[index])):  # they lie further down
            indices, cosines = _ranked(_cosines(recommender, index), index, k, allowed.mask)
            shown = np.ones(len(indices), np.bool_)
        indices, cosines = indices[shown][:k], cosines[shown][:k]
        return list(zip(recommender.items.ids(indices), cosines.tolist(), strict=True))

    def _neighbours(self, active: Active, index: int) -> tuple[Numbers, Floats]:
        """The items most like one, whether they may be shown or not, and their cosines."""
        key = (active.version, index)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = _ranked(_cosines(active.recommender, index), index, KEPT_NEIGHBOURS)
        with self._lock:
            self._kept[key] = found
            if len(self._kept) > KEPT_ITEMS:
                self._kept.popitem(last=False)
        return found

    def _by_categories(
        self, item_id: str, own: tuple[str, ...], k: int, categories: CategoryFilter
    ) -> list[tuple[str, float]]:
        """By the share of categories in common (Jaccard), then by popularity."""
        wanted, sharing = frozenset(own), CategoryFilter(any=frozenset(own))

        def alike() -> Iterator[tuple[str, float]]:
            for other, _ in self._popularity.ranked(sharing):
                theirs = self._catalog.categories(other)
                if other != item_id and (not categories or categories.admits(theirs)):
                    yield other, len(wanted.intersection(theirs)) / len(wanted.union(theirs))

        return sorted(alike(), key=lambda pair: -pair[1])[:k]


def _ranked(cosines: Floats, index: int, k: int, mask: npt.NDArray[np.bool_] | None = None) -> tuple[Numbers, Floats]:
    """The k most alike but for the item itself, the lower index first where cosines tie."""
    if mask is not None:
        cosines[~mask] = -np.inf
    cosines[index] = -np.inf
    values, indices = best(torch.from_numpy(cosines).unsqueeze(0), min(k, len(cosines)))
    found = indices[0] >= 0
    return indices[0][found].numpy(), values[0][found].numpy()


def _cosines(recommender: Recommender, index: int) -> Floats:
    """The cosine of each item's vector with one item's: (num_items,)."""
    own = recommender.item_vectors([index])[0]
    cosines = np.empty(recommender.num_items, np.float32)
    for first in range(0, recommender.num_items, BLOCK):
        vectors = recommender.item_vectors(np.arange(first, min(first + BLOCK, recommender.num_items)))
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(own)
        cosines[first : first + BLOCK] = vectors @ own / np.maximum(lengths, np.finfo(np.float32).tiny)
    return cosines
