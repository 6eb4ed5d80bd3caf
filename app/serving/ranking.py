"""One user's answer: read what is known, rank, explore, say where the list goes on, and log what was shown."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from app.serving.active_models import ActiveModels
from app.serving.catalog import Catalog
from app.serving.cursors import NO_VERSION, NOTHING, CursorGone, Cursors, Position, digest, number_of
from app.serving.diversity import CategoryCap
from app.serving.exploration import Affinity, Draw, Explorer, seed_of
from app.serving.histories import Histories, History
from app.serving.popularity import Popularity
from app.serving.query import Query
from app.serving.ranked_lists import Ranked, RankedLists, Source, State
from app.serving.reasons import Reason, reasons_of
from app.serving.recommendation_log import RecommendationLog, Shown, new_id

# A ranking within all bounds stays on the event loop.
QUICK_SECONDS = 0.002
QUICK_CATALOG = 50_000
QUICK_CHANGES = 100
QUICK_UNSEEN = 1_000

_LIST_GONE = "what this list was made from is gone: ask again without the cursor"


@dataclass(frozen=True, slots=True)
class Ranking:
    """An answer: at most k items, best first, none twice."""

    user_id: str
    recommendation_id: str
    items: list[tuple[str, float | None]]  # with scores; None where nothing could score an item
    draws: Sequence[Draw]  # the items among them that chance put there
    source: Source
    model_version: str | None
    data_through: str | None
    feedback_through: int | None
    candidate_count: int
    next_cursor: str | None = None
    reason: str | None = None
    reasons: Sequence[Reason] | None = None  # of each item, where they were asked for


class Ranker:
    """Ranks on the caller's thread; every answer goes to the log."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        histories: Histories,
        active_models: ActiveModels,
        popularity: Popularity,
        lists: RankedLists,
        explorer: Explorer,
        cursors: Cursors,
        recommendation_log: RecommendationLog,
    ) -> None:
        self._catalog = catalog
        self._histories = histories
        self._active_models = active_models
        self._popularity = popularity
        self._lists = lists
        self._explorer = explorer
        self._cursors = cursors
        self._log = recommendation_log

    def is_quick(self, query: Query) -> bool:
        """Whether `rank` takes so little time that changing threads for it would take longer."""
        active = self._active_models.current
        return (
            query.is_simple
            and not self._explorer.explores
            and (active is None or active.seconds <= QUICK_SECONDS)
            and (active is None or active.candidates.changes_behind <= QUICK_CHANGES)
            # A category may leave less than is asked for, and then every unseen item is looked at.
            and (active is None or not query.categories or active.candidates.unseen_count <= QUICK_UNSEEN)
            and len(self._catalog) <= QUICK_CATALOG
        )

    def rank(self, user_id: str, query: Query, history: History | None) -> Ranking:
        """Rank for a user, known or not.

        Without a history (the database is away) what is remembered has to do, and the source says so. Raises
        CursorRefused and CursorGone where the query's cursor leads nowhere.
        """
        state = self._state(user_id, query, history)
        page = None if query.cursor is None else self._page(state, query)
        ranked = self._ranked(state, query, page)
        list_id = new_id() if page is None else page.list_id
        draws: Sequence[Draw] = ()
        if self._explorer.explores and ranked.item_ids:
            draws = self._explored(state, query, page, ranked, list_id)
        ranking = self._answer(state, query, page, ranked, list_id, draws)
        if query.explain:
            ranking = replace(ranking, reasons=self._reasons(state, page, ranked, ranking))
        self._record(ranking, query, page)
        return ranking

    def _state(self, user_id: str, query: Query, history: History | None) -> State:
        active = self._active_models.current  # once: nothing below may mix two versions
        if history is not None:
            return State(user_id, active, history)
        remembered = self._histories.remembered(user_id)
        if remembered is None and query.cursor is None:
            active = None  # a version would rank as if nothing had happened yet; a cursor brings its history along
        return State(user_id, active, remembered or History(), degraded=True)

    def _page(self, state: State, query: Query) -> Position:
        assert query.cursor is not None
        page = self._cursors.read(query.cursor, state.user_id, query.filters_digest())
        if page.version != NO_VERSION and (state.active is None or digest(state.active.version) != page.version):
            raise CursorGone("the version that ranked this list is no longer active: ask again without the cursor")
        if page.feedback_through is not None and state.history.feedback_through is None and not state.degraded:
            raise CursorGone(_LIST_GONE)
        return page

    def _ranked(self, state: State, query: Query, page: Position | None) -> Ranked:
        active = state.active
        if active is not None and (page is None or page.version != NO_VERSION):
            ranked = self._lists.by_model(active, state, query, page)
            if ranked is not None:
                return ranked
            if page is not None:  # erased since: popular items would begin anew
                raise CursorGone(_LIST_GONE)
        return self._lists.by_popularity(state, query, page)

    def _explored(
        self, state: State, query: Query, page: Position | None, ranked: Ranked, list_id: bytes
    ) -> list[Draw]:
        return self._explorer.draw(
            seed=seed_of(list_id, 0 if page is None else page.offset),
            k=query.k,
            ranked=ranked.item_ids,
            version=ranked.active,
            may_come=self._lists.may_come(state, query, page),
            affinity=Affinity(self._catalog, state.history),
            cap=CategoryCap(self._catalog, query.max_per_category),
        )

    def _answer(
        self,
        state: State,
        query: Query,
        page: Position | None,
        ranked: Ranked,
        list_id: bytes,
        draws: Sequence[Draw],
    ) -> Ranking:
        items = list(zip(ranked.item_ids, ranked.scores, strict=True))
        if draws:
            items = self._with_draws(items, draws, ranked, query)
        active = ranked.active
        source = ranked.source
        if not items:
            source = "empty"
        elif state.degraded:
            source = "degraded"
        through = state.history.feedback_through if page is None else page.feedback_through
        by_model = active is not None and bool(items)
        return Ranking(
            user_id=state.user_id,
            recommendation_id=_written(list_id if page is None else new_id()),
            items=items,
            draws=draws,
            source=source,
            model_version=active.version if active is not None and by_model else None,
            data_through=active.data_through if active is not None and by_model else None,
            feedback_through=through,
            candidate_count=ranked.candidate_count,
            next_cursor=self._next_cursor(state, query, page, ranked, list_id, items),
            reason=None if items else self._why_empty(query, page),
        )

    def _with_draws(
        self, items: list[tuple[str, float | None]], draws: Sequence[Draw], ranked: Ranked, query: Query
    ) -> list[tuple[str, float | None]]:
        """Put what was drawn into its places; the last of the others make room, and those that the caps forbid now."""
        scores: list[float | None] = [None] * len(draws)
        if ranked.active is not None and ranked.encoded is not None:
            indices = ranked.active.recommender.items.indices([draw.item_id for draw in draws])
            scored = ranked.active.recommender.score_items(ranked.encoded, indices[None])[0]
            scores = [float(score) if index >= 0 else None for index, score in zip(indices, scored, strict=True)]
        cap = CategoryCap(self._catalog, query.max_per_category)
        for draw in draws:
            cap.add(draw.item_id)
        mixed: list[tuple[str, float | None]] = []
        for item_id, own in items[: query.k - len(draws)]:
            if not cap.is_full_for(item_id):
                cap.add(item_id)
                mixed.append((item_id, own))
        for draw, score in zip(draws, scores, strict=True):
            mixed.insert(draw.place, (draw.item_id, score))
        return mixed

    def _next_cursor(
        self,
        state: State,
        query: Query,
        page: Position | None,
        ranked: Ranked,
        list_id: bytes,
        items: list[tuple[str, float | None]],
    ) -> str | None:
        if not items or ranked.candidate_count <= len(items):
            return None
        version, known, others = NO_VERSION, NOTHING, [item_id for item_id, _ in items]
        if ranked.active is not None:
            version, known = digest(ranked.active.version), ranked.indices
            if others != ranked.item_ids:  # what was drawn stands among them
                numbered = ranked.active.recommender.items.indices(others)
                known, others = numbered[numbered >= 0], [others[row] for row in np.flatnonzero(numbered < 0)]
            else:
                others = others[len(known) :]
        history, shown, elsewhere = ranked.history, np.sort(known), frozenset(map(number_of, others))
        if page is not None:
            history, shown = page.history, np.sort(np.concatenate([page.shown, known]))
            elsewhere |= page.shown_elsewhere
        through = state.history.feedback_through if page is None else page.feedback_through
        position = Position(list_id, version, through, history, shown, elsewhere)
        return self._cursors.write(position, state.user_id, query.filters_digest())

    def _reasons(self, state: State, page: Position | None, ranked: Ranked, ranking: Ranking) -> list[Reason]:
        active, user_index, seen = ranked.active, -1, NOTHING
        if active is not None:
            user_index, history = self._active_models.user_index(active, state.user_id), state.history
            if page is not None and len(page.history):  # all that is left of what a further page is ranked by
                seen = page.history
            else:
                seen = active.item_indices.of_numbers(history.items, history.interactions)
        drawn = {draw.item_id for draw in ranking.draws}
        return reasons_of(self._catalog, active, user_index, seen, [item_id for item_id, _ in ranking.items], drawn)

    def _why_empty(self, query: Query, page: Position | None) -> str:
        if page is not None:
            return "nothing that may be shown is left of this list"
        if not any(self._catalog.visible(item_id) for item_id in list(self._catalog.entries)):
            return "the catalogue holds no item that may be shown"
        if query.categories and next(self._popularity.ranked(query.categories), None) is None:
            return f"no item that may be shown has {query.categories}"
        return "every item that may be shown was seen by this user or excluded by the request"

    def _record(self, ranking: Ranking, query: Query, page: Position | None) -> None:
        by_model = ranking.model_version is not None
        filters = query.as_logged()
        if page is not None:
            filters |= {"list": _written(page.list_id), "offset": page.offset}
        # What chance did not touch was certain to be shown where it stands.
        propensities, explorations = [1.0] * len(ranking.items), [False] * len(ranking.items)
        for draw in ranking.draws:
            propensities[draw.place], explorations[draw.place] = draw.propensity, True
        self._log.add(
            Shown(
                recommendation_id=ranking.recommendation_id,
                user_id=ranking.user_id,
                surface="recommendations",
                policy=("model" if by_model else "popular") + ("+exploration" if self._explorer.explores else ""),
                model_version=ranking.model_version,
                source=ranking.source,
                feedback_through=ranking.feedback_through,
                filters=filters,
                candidate_count=ranking.candidate_count,
                item_ids=[item_id for item_id, _ in ranking.items],
                scores=[score for _, score in ranking.items],
                propensities=propensities,
                explorations=explorations,
                created_at=datetime.now(UTC),
            )
        )


def _written(id_: bytes) -> str:
    """16 bytes as UUIDs are written."""
    digits = id_.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
