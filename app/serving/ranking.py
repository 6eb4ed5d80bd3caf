"""Users' answers: read what is known, rank, explore, say where the list goes on, and log what was shown."""

from collections.abc import Sequence

import numpy as np

from app.serving.active_models import ActiveModels
from app.serving.answers import Answer, Kept, Ranking
from app.serving.catalog import Catalog
from app.serving.cursors import NO_VERSION, NOTHING, CursorGone, Cursors, Position, going_on, number_of
from app.serving.diversity import CategoryCap
from app.serving.exploration import Affinity, Draw, Explorer, seed_of
from app.serving.histories import Histories
from app.serving.history import History
from app.serving.popularity import Popularity
from app.serving.query import Query
from app.serving.ranked_lists import Ranked, RankedLists, State
from app.serving.reasons import Reason, reasons_of
from app.serving.recommendation_log import RecommendationLog, as_json, new_id

# A ranking within all bounds stays on the event loop.
QUICK_SECONDS = 0.002
QUICK_CATALOG = 50_000
QUICK_CHANGES = 100
QUICK_UNSEEN = 1_000
# So many answers are kept with a history, and none with more JSON: in memory each takes 4 to 9 KB.
MOST_KEPT_BYTES = 4_096
KEPT_ANSWERS = 2

_LIST_GONE = "what this list was made from is gone: ask again without the cursor"


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
        """Whether ranking takes so little time that changing threads for it would take longer."""
        active = self._active_models.current
        return (
            query.is_simple
            and not self._explorer.explores
            and (active is None or active.seconds <= QUICK_SECONDS)
            and (active is None or active.candidates.changes_behind <= QUICK_CHANGES)
            # Its items are looked up at first. A category may leave less than is asked for, and then every unseen
            # item is looked at.
            and (not query.categories or len(self._catalog) <= QUICK_CATALOG)
            and (active is None or not query.categories or active.candidates.unseen_count <= QUICK_UNSEEN)
        )

    def again(self, query: Query, history: History) -> bytes | None:
        """The answer that the same history, query, version and catalogue gave before, if it was kept."""
        active = self._active_models.current
        for kept in history.kept:
            if (
                (kept.query is query or kept.query == query)
                and kept.revision == self._catalog.revision
                and active is not None
                and kept.version == active.version
            ):
                return self._sent(kept.answer, new_id())
        return None

    def answer_together(self, users: Sequence[tuple[str, History]], query: Query) -> list[bytes]:
        """Rank a quick query for several users in one go; the answers as JSON."""
        revision, active = self._catalog.revision, self._active_models.current
        states = [State(user_id, active, history) for user_id, history in users]
        may_be_kept, filters = self._lists.may_be_kept(query), as_json(query.as_logged())
        answers = []  # none is logged before all are there: if one fails, all are made again
        for state, ranked in zip(states, self._ranked(states, query, None), strict=True):
            ranking = self._ranking(state, query, None, ranked, ())
            answer = Answer.of(ranking, self._policy(ranking), filters)
            if ranked.active is not None and may_be_kept and len(answer.middle) <= MOST_KEPT_BYTES:
                kept = state.history.kept
                if len(kept) >= KEPT_ANSWERS:
                    kept.clear()
                kept.append(Kept(query, ranked.active.version, revision, answer))
            answers.append(answer)
        return [self._sent(answer, new_id()) for answer in answers]

    def answer(self, user_id: str, query: Query, history: History | None) -> bytes:
        """Rank for a user, known or not; the answer as JSON.

        Without a history (the database is away) what is remembered has to do, and the source says so. Raises
        CursorRefused and CursorGone where the query's cursor leads nowhere.
        """
        state = self._state(user_id, query, history)
        page = None if query.cursor is None else self._page(state, query)
        (ranked,) = self._ranked([state], query, page)
        recommendation_id = new_id()
        list_id = recommendation_id if page is None else page.list_id
        draws: Sequence[Draw] = ()
        if self._explorer.explores and ranked.item_ids:
            draws = self._explored(state, query, page, ranked, list_id)
        ranking = self._ranking(state, query, page, ranked, draws)
        if query.explain:
            ranking.reasons = self._reasons(state, page, ranked, ranking)
        filters = query.as_logged()
        if page is not None:
            filters |= {"list": _written(page.list_id), "offset": page.offset}
        return self._sent(Answer.of(ranking, self._policy(ranking), as_json(filters)), recommendation_id, list_id)

    def _policy(self, ranking: Ranking) -> str:
        policy = "popular" if ranking.model_version is None else "model"
        return f"{policy}+exploration" if self._explorer.explores else policy

    def _sent(self, answer: Answer, id_: bytes, list_id: bytes | None = None) -> bytes:
        """The answer with an id and a cursor of its own; goes to the log."""
        recommendation_id = _written(id_)
        self._log.add(recommendation_id, answer.row)
        cursor = None if answer.goes_on is None else self._cursors.write(list_id or id_, answer.goes_on)
        return answer.body(recommendation_id, cursor)

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
        if page.version != NO_VERSION and (state.active is None or state.active.digest != page.version):
            raise CursorGone("the version that ranked this list is no longer active: ask again without the cursor")
        through = page.feedback_through
        if through is not None:
            gone = state.history.feedback_through is None and not state.degraded
            if gone or through <= self._catalog.events_gone_through(state.user_id):
                raise CursorGone(_LIST_GONE)
        return page

    def _ranked(self, states: Sequence[State], query: Query, page: Position | None) -> list[Ranked]:
        """The list of each user; all of them of one version."""
        active = states[0].active
        if active is None or (page is not None and page.version == NO_VERSION):
            return [self._lists.by_popularity(state, query, page) for state in states]
        ranked = self._lists.by_model(active, states, query, page)
        if page is not None and ranked[0] is None:  # erased since: popular items would begin anew
            raise CursorGone(_LIST_GONE)
        return [
            self._lists.by_popularity(state, query, page) if own is None else own
            for state, own in zip(states, ranked, strict=True)
        ]

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

    def _ranking(
        self, state: State, query: Query, page: Position | None, ranked: Ranked, draws: Sequence[Draw]
    ) -> Ranking:
        items = list(zip(ranked.item_ids, ranked.scores, strict=True))
        if draws:
            items = self._with_draws(items, draws, ranked, query)
        active = ranked.active if items else None
        source = ranked.source
        if not items:
            source = "empty"
        elif state.degraded:
            source = "degraded"
        return Ranking(
            user_id=state.user_id,
            items=items,
            draws=draws,
            source=source,
            model_version=active.version if active is not None else None,
            data_through=active.data_through if active is not None else None,
            feedback_through=state.history.feedback_through if page is None else page.feedback_through,
            candidate_count=ranked.candidate_count,
            goes_on=self._goes_on(state, query, page, ranked, items),
            reason=None if items else self._why_empty(query, page),
        )

    def _with_draws(
        self, items: list[tuple[str, float | None]], draws: Sequence[Draw], ranked: Ranked, query: Query
    ) -> list[tuple[str, float | None]]:
        """Put what was drawn into its places; the last of the others make room, and those that the caps forbid now."""
        scores: list[float | None] = [None] * len(draws)
        if ranked.active is not None and ranked.encoded is not None:
            indices = ranked.active.item_indices.of_each([draw.item_id for draw in draws])
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

    def _goes_on(
        self,
        state: State,
        query: Query,
        page: Position | None,
        ranked: Ranked,
        items: list[tuple[str, float | None]],
    ) -> bytes | None:
        if not items or ranked.candidate_count <= len(items):
            return None
        version, known, others = NO_VERSION, NOTHING, [item_id for item_id, _ in items]
        if ranked.active is not None:
            version, known = ranked.active.digest, ranked.indices
            if others != ranked.item_ids:  # what was drawn stands among them
                numbered = ranked.active.item_indices.of_each(others)
                known, others = numbered[numbered >= 0], [others[row] for row in np.flatnonzero(numbered < 0)]
            else:
                others = others[len(known) :]
        elsewhere = frozenset(map(number_of, others))
        if page is None:
            position = Position(b"", version, state.history.feedback_through, ranked.history, known, elsewhere)
        else:
            shown = np.concatenate([page.shown, known])
            elsewhere |= page.shown_elsewhere
            position = Position(page.list_id, version, page.feedback_through, page.history, shown, elsewhere)
        return going_on(position, state.user_id, query.filters_digest())

    def _reasons(self, state: State, page: Position | None, ranked: Ranked, ranking: Ranking) -> list[Reason]:
        active, user_index, seen = ranked.active, -1, NOTHING
        if active is not None:
            user_index, history = self._active_models.user_index(active, state.user_id), state.history
            if page is not None and len(page.history):  # all that is left of what a further page is ranked by
                seen = active.candidates.not_erased(page.history)
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


def _written(id_: bytes) -> str:
    """16 bytes as UUIDs are written."""
    digits = id_.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
