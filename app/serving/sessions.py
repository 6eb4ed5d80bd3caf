"""Recommendations for visitors without an id: from the items that they bring along."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from app.serving.active_models import Active, ActiveModels
from app.serving.catalog import Catalog
from app.serving.history import History, ItemNumbers
from app.serving.popularity import Popularity
from app.serving.query import Query
from app.serving.ranked_lists import RankedLists, State
from app.serving.reasons import Reason, reasons_of
from app.serving.recommendation_log import NOBODY, RecommendationLog, new_id, shown_to_nobody


@dataclass(frozen=True, slots=True)
class SessionRanking:
    """An answer: at most k items, best first."""

    recommendation_id: str
    items: list[tuple[str, float | None]]
    source: Literal["folded_in", "popular", "empty"]
    model_version: str | None
    data_through: str | None
    reason: str | None
    reasons: Sequence[Reason] | None


class Sessions:
    """Ranks on the caller's thread; every answer goes to the log, without the items that the visitor brought."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        active_models: ActiveModels,
        popularity: Popularity,
        lists: RankedLists,
        recommendation_log: RecommendationLog,
        max_history: int,
    ) -> None:
        self._catalog = catalog
        self._active_models = active_models
        self._popularity = popularity
        self._lists = lists
        self._log = recommendation_log
        self._max_history = max_history

    def rank(self, item_ids: Sequence[str], query: Query) -> SessionRanking:
        """Rank for a visitor who took these items, oldest first; popular items where no version knows one of them."""
        active = self._active_models.current  # once: nothing below may mix two versions
        seen = np.zeros(0, np.int64) if active is None else active.item_indices.in_order(item_ids[-self._max_history :])
        reason = None
        ranked = None
        if active is None:
            reason = "no version is active"
        elif not len(seen):
            reason = "the active version knows none of the items" if item_ids else "no item was given"
        else:
            ranked = self._lists.for_stranger(active, seen, query, active.item_indices(item_ids))
            if not ranked.item_ids:
                reason, ranked = "the active version knows no other item that may be shown", None
        if ranked is None:
            numbers = ItemNumbers()
            history = History(items=numbers, left_out=np.unique(numbers.numbers(item_ids)))
            ranked = self._lists.by_popularity(State(NOBODY, None, history), query)
        by_model = ranked.active
        items = list(zip(ranked.item_ids, ranked.scores, strict=True))
        source: Literal["folded_in", "popular", "empty"] = "folded_in" if by_model is not None else "popular"
        if not items:
            source, reason = "empty", self._why_empty(query)
        found = SessionRanking(
            recommendation_id=str(uuid.UUID(bytes=new_id())),
            items=items,
            source=source,
            model_version=None if by_model is None else by_model.version,
            data_through=None if by_model is None else by_model.data_through,
            reason=reason,
            reasons=reasons_of(self._catalog, by_model, -1, seen, ranked.item_ids) if query.explain else None,
        )
        self._record(found, query, len(item_ids), ranked.candidate_count, by_model)
        return found

    def _why_empty(self, query: Query) -> str:
        if next(self._popularity.ranked(), None) is None:
            return "the catalogue holds no item that may be shown"
        if query.categories and next(self._popularity.ranked(query.categories), None) is None:
            return f"no item that may be shown has {query.categories}"
        return "every item that may be shown is in the session or excluded by the request"

    def _record(
        self, found: SessionRanking, query: Query, length: int, candidate_count: int, active: Active | None
    ) -> None:
        items = [(item_id, score) for item_id, score in found.items if score is not None]
        filters = {**query.as_logged(), "session_length": length}
        version = None if active is None else active.version
        row = shown_to_nobody("sessions", found.source, items, filters, candidate_count, version)
        self._log.add(found.recommendation_id, row)
