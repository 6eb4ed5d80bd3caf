"""Items like one item: by the vectors of the active version, else by their categories, else what most people choose."""

import uuid
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

# Vectors compared at a time: bounds the memory of a request, whatever the size of the catalogue.
BLOCK = 65_536


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
        self._log.add(shown_to_nobody(found.recommendation_id, "similar", source, items, filters, len(items), version))
        return found

    def _by_vectors(self, active: Active, item_id: str, k: int, categories: CategoryFilter) -> list[tuple[str, float]]:
        recommender = active.recommender
        index = recommender.items.index(item_id)
        if index < 0 or active.candidates.was_erased(index):
            return []
        try:
            cosines = _cosines(recommender, index)
        except ValueError:  # a version that has no vectors
            return []
        allowed = active.candidates.allowed(categories).mask
        cosines[~allowed] = -np.inf
        cosines[index] = -np.inf
        scores, indices = best(torch.from_numpy(cosines).unsqueeze(0), min(k, len(cosines)))
        found = indices[0] >= 0
        return list(zip(recommender.items.ids(indices[0][found].numpy()), scores[0][found].tolist(), strict=True))

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


def _cosines(recommender: Recommender, index: int) -> npt.NDArray[np.float32]:
    """The cosine of each item's vector with one item's: (num_items,)."""
    own = recommender.item_vectors([index])[0]
    cosines = np.empty(recommender.num_items, np.float32)
    for first in range(0, recommender.num_items, BLOCK):
        vectors = recommender.item_vectors(np.arange(first, min(first + BLOCK, recommender.num_items)))
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(own)
        cosines[first : first + BLOCK] = vectors @ own / np.maximum(lengths, np.finfo(np.float32).tiny)
    return cosines
