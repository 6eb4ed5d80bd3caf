"""One user's answer: the active version ranks with what the user did up to now; popular items where it cannot."""

import time
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Literal

import numpy as np
import structlog
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.database import is_outage
from app.serving.active_models import Active, ActiveModels
from app.serving.catalog import Catalog
from app.serving.filters import EVERY_CATEGORY, CategoryFilter
from app.serving.histories import Histories, History
from app.serving.popularity import Popularity
from app.serving.recommendation_log import RecommendationLog, Shown

log = structlog.get_logger(__name__)

Source = Literal["model", "folded_in", "popular", "degraded", "empty"]

# After the database failed to answer, requests do without it this long rather than wait for it one by one.
OUTAGE_SECONDS = 1.0
# Longer lists of excluded items enter the log as their length.
LOGGED_EXCLUDES = 100


@dataclass(frozen=True, slots=True)
class Query:
    """What a caller asks for."""

    k: int = 10
    categories: CategoryFilter = EVERY_CATEGORY
    exclude: frozenset[str] = frozenset()
    include_seen: bool = False


@dataclass(frozen=True, slots=True)
class Ranking:
    """An answer: at most k items, best first, none twice."""

    user_id: str
    items: list[tuple[str, float]]
    source: Source
    model_version: str | None
    data_through: str | None
    feedback_through: int | None
    reason: str | None = None
    candidate_count: int = 0
    recommendation_id: str = field(default_factory=lambda: str(uuid.uuid4()))


class Ranker:
    """Ranks on the caller's thread; every answer goes to the log."""

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        histories: Histories,
        active_models: ActiveModels,
        popularity: Popularity,
        recommendation_log: RecommendationLog,
    ) -> None:
        self._engine = engine
        self._catalog = catalog
        self._histories = histories
        self._active_models = active_models
        self._popularity = popularity
        self._log = recommendation_log
        self._outage_until = 0.0

    def rank(self, user_id: str, query: Query) -> Ranking:
        """Rank for a user, known or not. Answers without the database too, and says so by its source."""
        active = self._active_models.current  # once: nothing below may mix two versions
        history = self._history(user_id)
        degraded = history is None
        if history is None:
            history = self._histories.remembered(user_id)
        ranking = None
        if active is not None and history is not None:
            ranking = self._by_model(active, user_id, history, query)
        if ranking is None:
            ranking = self._by_popularity(user_id, history or History(), query)
        if degraded and ranking.source != "empty":
            ranking = replace(ranking, source="degraded")
        self._record(ranking, query)
        return ranking

    def forget_outage(self) -> None:
        """Ask the database again at once: somebody heard it answer."""
        self._outage_until = 0.0

    def _history(self, user_id: str) -> History | None:
        if time.monotonic() < self._outage_until:
            return None
        try:
            with self._engine.connect() as connection:
                self._catalog.follow(connection)
                return self._histories.read(connection, user_id)
        except SQLAlchemyError as error:
            if not is_outage(error):
                raise
            self._outage_until = time.monotonic() + OUTAGE_SECONDS
            log.warning("ranking_without_database", reason=type(error).__name__)
            return None

    def _by_model(self, active: Active, user_id: str, history: History, query: Query) -> Ranking | None:
        recommender = active.recommender
        user_index = self._active_models.user_index(active, user_id)
        seen = active.item_indices(history.item_ids)
        if user_index < 0 and not (recommender.folds_in and len(seen)):
            return None
        left_out = set(query.exclude) if query.include_seen else query.exclude | history.excluded
        excluded = active.item_indices(left_out)
        allowed = active.candidates.allowed(query.categories)
        candidates = allowed.count - int(np.count_nonzero(allowed.mask[excluded]))
        if candidates <= 0:
            return None
        k = min(query.k, candidates)
        indices, scores = recommender.top_k([user_index], [seen], [excluded], k, allowed.mask)
        found = indices[0] >= 0
        item_ids = recommender.items.ids(indices[0][found])
        return Ranking(
            user_id=user_id,
            items=list(zip(item_ids, scores[0][found].tolist(), strict=True)),
            source="model" if user_index >= 0 else "folded_in",
            model_version=active.version,
            data_through=active.data_through,
            feedback_through=history.feedback_through,
            candidate_count=candidates,
        )

    def _by_popularity(self, user_id: str, history: History, query: Query) -> Ranking:
        left_out = query.exclude if query.include_seen else query.exclude | history.excluded
        eligible = (
            (item_id, float(count))
            for item_id, count in self._popularity.ranked(query.categories)
            if item_id not in left_out
        )
        items = list(islice(eligible, query.k))
        return Ranking(
            user_id=user_id,
            items=items,
            source="popular" if items else "empty",
            model_version=None,
            data_through=None,
            feedback_through=history.feedback_through,
            reason=None if items else self._why_empty(query),
            candidate_count=len(items),
        )

    def _why_empty(self, query: Query) -> str:
        if not any(self._catalog.visible(item_id) for item_id in list(self._catalog.entries)):
            return "the catalogue holds no item that may be shown"
        if query.categories and next(self._popularity.ranked(query.categories), None) is None:
            return f"no item that may be shown has {query.categories}"
        return "every item that may be shown was seen by this user or excluded by the request"

    def _record(self, ranking: Ranking, query: Query) -> None:
        exclude = sorted(query.exclude) if len(query.exclude) <= LOGGED_EXCLUDES else len(query.exclude)
        by_model = ranking.model_version is not None
        self._log.add(
            Shown(
                recommendation_id=ranking.recommendation_id,
                user_id=ranking.user_id,
                surface="recommendations",
                policy="model" if by_model else "popular",
                model_version=ranking.model_version,
                source=ranking.source,
                feedback_through=ranking.feedback_through,
                filters={
                    "k": query.k,
                    "categories_any": sorted(query.categories.any),
                    "categories_all": sorted(query.categories.all),
                    "categories_none": sorted(query.categories.none),
                    "exclude": exclude,
                    "include_seen": query.include_seen,
                },
                candidate_count=ranking.candidate_count,
                item_ids=[item_id for item_id, _ in ranking.items],
                scores=[score for _, score in ranking.items],
                # Nothing is left to chance yet: what is shown was certain to be shown.
                propensities=[1.0] * len(ranking.items),
                explorations=[False] * len(ranking.items),
                created_at=datetime.now(UTC),
            )
        )
