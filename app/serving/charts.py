"""What works without a user: popular, trending and latest items, by category and window, each answer logged."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Literal

from app.serving.activity import Activity
from app.serving.catalog import Catalog
from app.serving.filters import CategoryFilter
from app.serving.latest import Latest
from app.serving.popularity import Popularity
from app.serving.recommendation_log import RecommendationLog, new_id, shown_to_nobody

Surface = Literal["popular", "trending", "latest"]


@dataclass(frozen=True, slots=True)
class ChartQuery:
    """What a caller asks for; no window means all of the past."""

    k: int
    categories: CategoryFilter
    window_hours: int | None


@dataclass(frozen=True, slots=True)
class Chart:
    """An answer: at most k items, best first."""

    recommendation_id: str
    items: list[tuple[str, float]]
    source: Surface | Literal["empty"]
    reason: str | None


class Charts:
    """Ranks on the caller's thread; answers come from memory alone."""

    def __init__(
        self,
        catalog: Catalog,
        popularity: Popularity,
        activity: Activity,
        latest: Latest,
        recommendation_log: RecommendationLog,
    ) -> None:
        self._catalog = catalog
        self._popularity = popularity
        self._activity = activity
        self._latest = latest
        self._log = recommendation_log

    def rank(self, surface: Surface, query: ChartQuery) -> Chart:
        """Rank for everybody alike."""
        items = list(islice(self._ranked(surface, query), query.k))
        chart = Chart(
            str(uuid.UUID(bytes=new_id())),
            items,
            surface if items else "empty",
            None if items else self._why_empty(surface, query),
        )
        self._record(chart, surface, query)
        return chart

    def _ranked(self, surface: Surface, query: ChartQuery) -> Iterable[tuple[str, float]]:
        categories, hours = query.categories, query.window_hours
        if surface == "latest":
            since = None if hours is None else datetime.now(UTC) - timedelta(hours=hours)
            for item_id, created_at in self._latest.ranked(categories):
                if since is not None and created_at < since:
                    return
                yield item_id, created_at.timestamp()
        elif hours is None:
            for item_id, count in self._popularity.ranked(categories):
                yield item_id, float(count)
        else:
            for item_id, score in self._activity.ranked(surface, hours):
                entry = self._catalog.entries.get(item_id)
                if entry is not None and not entry.hidden and (not categories or categories.admits(entry.categories)):
                    yield item_id, score

    def _why_empty(self, surface: Surface, query: ChartQuery) -> str:
        if next(self._popularity.ranked(), None) is None:
            return "the catalogue holds no item that may be shown"
        if query.categories and next(self._popularity.ranked(query.categories), None) is None:
            return f"no item that may be shown has {query.categories}"
        happened = {"popular": "was chosen", "trending": "was chosen more often than before", "latest": "was added"}
        among = f" of those that have {query.categories}" if query.categories else ""
        return f"no item that may be shown{among} {happened[surface]} in the last {query.window_hours} hours"

    def _record(self, chart: Chart, surface: Surface, query: ChartQuery) -> None:
        filters = {"k": query.k, "window_hours": query.window_hours, **query.categories.as_logged()}
        row = shown_to_nobody(surface, chart.source, chart.items, filters, len(chart.items))
        self._log.add(chart.recommendation_id, row)
