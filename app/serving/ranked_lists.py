"""The items for one user in order, before chance and the log: by the active version, or by popularity.

The same state, filters and catalogue give the same list, in every process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from app.serving.active_models import Active, ActiveModels
from app.serving.candidates import Mask
from app.serving.catalog import Catalog
from app.serving.cursors import NOTHING, Numbers, Position, number_of
from app.serving.diversity import LARGEST_POOL, CategoryCap, category_vectors, chosen_together, pool_size
from app.serving.exploration import Affinity
from app.serving.history import History
from app.serving.popularity import Popularity
from app.serving.query import Query
from app.serving.resurfacing import Resurfacing
from ml.recommender import Recommender

Source = Literal["model", "folded_in", "popular", "degraded", "empty"]
Floats = npt.NDArray[np.float32]

# Of the items that no version was trained on, so many at most may fill the end of a list.
MOST_UNSEEN = 10_000
# No longer list is kept.
LONGEST_KEPT = 20


@dataclass(frozen=True, slots=True)
class State:
    """What is known when a request begins; nothing later looks at anything newer."""

    user_id: str
    active: Active | None
    history: History
    degraded: bool = False


class Ranked(NamedTuple):
    """Items in order. Scores are None where nothing could score an item."""

    item_ids: list[str]
    scores: list[float | None]
    source: Source
    candidate_count: int  # of which these are the first; of popular items, one more than these if there are more
    active: Active | None = None  # what ranked
    encoded: Tensor | None = None  # the user, for what ranked; kept of users who were ranked for alone
    history: Numbers = NOTHING  # what it was ranked by, as far as a further page needs it
    indices: Numbers = NOTHING  # of the first items: those that come after them are unknown to what ranked


class _Begun(NamedTuple):
    """What a user's list is ranked by: indices are the version's."""

    user_index: int
    seen: Numbers  # as far as the version looks at it
    fresh: int
    left_out: Numbers
    returning: Numbers
    candidates: int  # how many, without those that return


class RankedLists:
    """Ranks on the caller's thread."""

    def __init__(
        self, catalog: Catalog, active_models: ActiveModels, popularity: Popularity, resurfacing: Resurfacing
    ) -> None:
        self._catalog = catalog
        self._active_models = active_models
        self._popularity = popularity
        self._resurfacing = resurfacing

    def may_be_kept(self, query: Query) -> bool:
        """Whether a list is short, and nothing enters it but the version, the history, the query and the catalogue."""
        return query.is_simple and query.k <= LONGEST_KEPT and not self._resurfacing.is_on

    def by_model(
        self, active: Active, states: Sequence[State], query: Query, page: Position | None = None
    ) -> list[Ranked | None]:
        """Rank for each user by a version; None where it knows nothing of the user, or may show nothing."""
        mask, count = self._candidates(active, query, page)
        begun = [self._begun(active, state, query, page, mask, count) for state in states]
        users = [user for user in begun if user is not None]
        if not users:
            return [None] * len(begun)
        encoded = active.recommender.encode(
            [user.user_index for user in users], [user.seen for user in users], [user.fresh for user in users]
        )
        chosen: list[tuple[Numbers, Floats]]
        if query.is_diverse or any(len(user.returning) for user in users):
            chosen = [
                self._chosen(
                    active, encoded[row : row + 1], user.left_out, user.returning, query, user.candidates, mask
                )
                for row, user in enumerate(users)
            ]
        else:
            k = max(1, min(query.k, max(user.candidates for user in users)))
            found, scores = active.recommender.top(encoded, [user.left_out for user in users], k, mask)
            chosen = [_without_gaps(*row) for row in zip(found, scores, strict=True)]
        rows = iter(range(len(users)))
        ranked: list[Ranked | None] = []
        for state, user in zip(states, begun, strict=True):
            if user is None:
                ranked.append(None)
                continue
            row = next(rows)
            own = encoded if len(users) == 1 else None
            ranked.append(self._ranked(active, state, user, own, *chosen[row], query, page))
        return ranked

    def _begun(
        self, active: Active, state: State, query: Query, page: Position | None, mask: Mask, count: int
    ) -> "_Begun | None":
        recommender, history = active.recommender, state.history
        user_index = self._active_models.user_index(active, state.user_id)
        numbered = active.item_indices
        if page is None:
            seen = numbered.latest_of_numbers(history.items, history.interactions, recommender.window_length)
        else:
            seen = active.candidates.not_erased(page.history)
        if user_index < 0 and not (recommender.folds_in and len(seen)):
            return None
        left_out, returning = NOTHING, NOTHING
        if not query.include_seen:
            left_out = numbered.of_numbers(history.items, history.left_out)
            count -= int(np.count_nonzero(mask[left_out]))
            if self._resurfacing.is_on:
                returning = numbered.of_numbers(history.items, self._resurfacing.numbers(history))
                returning = returning[mask[returning]]
        if count + len(returning) == 0 and page is None:
            return None
        fresh = 0
        if user_index >= 0 and recommender.model.fits_strangers:
            fresh = len(_since_training(active, history) if page is None else seen)
        return _Begun(user_index, seen, fresh, left_out, returning, count)

    def _ranked(
        self,
        active: Active,
        state: State,
        user: "_Begun",
        encoded: Tensor | None,
        indices: Numbers,
        scores: Floats,
        query: Query,
        page: Position | None,
    ) -> Ranked:
        item_ids = active.item_indices.names(indices)
        all_scores: list[float | None] = scores.tolist()
        count = user.candidates + len(user.returning)
        if count <= query.k:
            count += self._fill(item_ids, active, state, query, page)
            all_scores += [None] * (len(item_ids) - len(all_scores))
        return Ranked(
            item_ids,
            all_scores,
            source="model" if user.user_index >= 0 else "folded_in",
            candidate_count=count,
            active=active,
            encoded=encoded,
            history=_pinned(user.seen, active.recommender, user.user_index, user.fresh),
            indices=indices,
        )

    def _candidates(self, active: Active, query: Query, page: Position | None) -> tuple[Mask, int]:
        """The version's items within the filters and not on an earlier page: a mask, and how many it lets through."""
        allowed = active.candidates.allowed(query.categories)
        if not query.exclude and page is None:
            return allowed.mask, allowed.count
        mask = allowed.mask.copy()
        mask[active.item_indices(query.exclude)] = False
        if page is not None:
            mask[page.shown] = False
        return mask, int(np.count_nonzero(mask))

    def for_stranger(self, active: Active, seen: Numbers, query: Query, session: Numbers) -> Ranked:
        """Rank by a version for somebody of whom nothing is known but what they took, by the version's numbers.

        `session` is left out of the list unless the query includes what was seen.
        """
        recommender = active.recommender
        mask, count = self._candidates(active, query, None)
        left_out = NOTHING if query.include_seen else np.unique(session)
        count -= int(np.count_nonzero(mask[left_out]))
        encoded = recommender.encode([-1], [seen])
        indices, scores = self._chosen(active, encoded, left_out, NOTHING, query, count, mask)
        return Ranked(
            recommender.items.ids(indices), scores.tolist(), "folded_in", count, active=active, encoded=encoded
        )

    def by_popularity(self, state: State, query: Query, page: Position | None = None) -> Ranked:
        """The items most people chose, without those that the user has seen."""
        may_come = self._not_left_out(state, query, page)
        eligible = (
            (item_id, float(count)) for item_id, count in self._popularity.ranked(query.categories) if may_come(item_id)
        )
        size = pool_size(query.k) if query.is_diverse else query.k
        # One more than asked for tells whether there is more.
        pool = list(islice(eligible, size + 1))
        found = pool[: query.k]
        if query.is_diverse:
            found = self._popular_together(pool, query)
            # Caps may leave too few of a pool: look further down.
            while len(found) < query.k and len(pool) > size and size < LARGEST_POOL:
                size = min(4 * size, LARGEST_POOL)
                pool += islice(eligible, size + 1 - len(pool))
                found = self._popular_together(pool, query)
        return Ranked(
            [item_id for item_id, _ in found],
            [count for _, count in found],
            source="popular",
            candidate_count=len(pool),
        )

    def _popular_together(self, pool: list[tuple[str, float]], query: Query) -> list[tuple[str, float]]:
        categories = [self._catalog.categories(item_id) for item_id, _ in pool]
        places = chosen_together(
            # Counts differ a hundredfold between the first items: their order says more than their size.
            np.arange(len(pool), 0, -1).astype(np.float32),
            query.k,
            diversity=query.diversity,
            vectors=category_vectors(categories),
            categories=categories,
            max_per_category=query.max_per_category,
        )
        return [pool[place] for place in places]

    def _chosen(
        self,
        active: Active,
        encoded: Tensor,
        left_out: Numbers,
        returning: Numbers,
        query: Query,
        count: int,
        mask: Mask,
    ) -> tuple[Numbers, Floats]:
        """The best items with those that return, diversified and capped as the query says; (n,) items and scores."""
        recommender = active.recommender
        size = pool_size(query.k) if query.is_diverse else query.k
        while True:
            indices, scores = NOTHING, np.zeros(0, np.float32)
            if count:
                found, found_scores = recommender.top(encoded, [left_out], min(size, count), mask)
                indices, scores = _without_gaps(found[0], found_scores[0])
            if len(returning):
                again = self._resurfacing.scores(recommender, encoded, returning)
                indices, scores = np.concatenate([indices, returning]), np.concatenate([scores, again])
                order = np.lexsort((indices, -scores))[:size]
                indices, scores = indices[order], scores[order]
            if not query.is_diverse:
                return indices, scores
            places = self._together(recommender, indices, scores, query)
            # Caps may leave too few of a pool: look further down.
            if len(places) == query.k or len(indices) < size or size >= LARGEST_POOL:
                return indices[places], scores[places]
            size = min(4 * size, LARGEST_POOL)

    def _together(self, recommender: Recommender, indices: Numbers, scores: Floats, query: Query) -> list[int]:
        categories = [self._catalog.categories(item_id) for item_id in recommender.items.ids(indices)]
        vectors = None
        if query.diversity > 0:
            try:
                vectors = recommender.item_vectors(indices)
            except ValueError:  # popularity has none
                vectors = category_vectors(categories)
        return chosen_together(
            scores,
            query.k,
            diversity=query.diversity,
            vectors=vectors,
            categories=categories,
            max_per_category=query.max_per_category,
        )

    def _fill(self, item_ids: list[str], active: Active, state: State, query: Query, page: Position | None) -> int:
        """Add items that the version was not trained on, those of the user's categories first; how many may come."""
        unseen = active.candidates.unseen()[-MOST_UNSEEN:]
        if not unseen:
            return 0
        may_come = self.may_come(state, query, page)
        affinity = Affinity(self._catalog, state.history)
        # Equals: the newest first.
        fitting = sorted(filter(may_come, reversed(unseen)), key=affinity, reverse=True)
        cap = CategoryCap(self._catalog, query.max_per_category)
        for item_id in item_ids:
            cap.add(item_id)
        for item_id in fitting:
            if len(item_ids) < query.k and not cap.is_full_for(item_id):
                cap.add(item_id)
                item_ids.append(item_id)
        return len(fitting)

    def may_come(self, state: State, query: Query, page: Position | None) -> Callable[[str], bool]:
        """A test for single items: visible, within the filters, not seen, not on an earlier page."""
        catalog, categories = self._catalog, query.categories
        not_left_out = self._not_left_out(state, query, page)
        shown = frozenset[str]()
        if page is not None and state.active is not None and len(page.shown):
            shown = frozenset(state.active.recommender.items.ids(page.shown))

        def test(item_id: str) -> bool:
            return (
                not_left_out(item_id)
                and item_id not in shown
                and catalog.visible(item_id)
                and (not categories or categories.admits(catalog.categories(item_id)))
            )

        return test

    def _not_left_out(self, state: State, query: Query, page: Position | None) -> Callable[[str], bool]:
        """A test of what the user did, what the request excludes, and what pages showed that no version numbers."""
        number_in_histories = state.history.items.find
        left_out = frozenset[int]() if query.include_seen else frozenset(state.history.left_out.tolist())
        exclude = query.exclude
        elsewhere = frozenset[int]() if page is None else page.shown_elsewhere

        def test(item_id: str) -> bool:
            return (
                item_id not in exclude
                and number_in_histories(item_id) not in left_out
                and (not elsewhere or number_of(item_id) not in elsewhere)
            )

        return test


def _without_gaps(indices: Numbers, scores: Floats) -> tuple[Numbers, Floats]:
    """A row of what `Recommender.top` found, as long as there is something."""
    if len(indices) and indices[-1] >= 0:  # what is missing comes last
        return indices, scores
    found = indices >= 0
    return indices[found], scores[found]


def _since_training(active: Active, history: History) -> Numbers:
    """The user's items that the version knows, taken after what it was trained on."""
    through = active.microseconds_through
    if through is None or not len(history.interacted_at):
        return NOTHING
    first = int(np.searchsorted(history.interacted_at, through, side="right"))
    return active.item_indices.of_numbers(history.items, history.interactions[first:])


def _pinned(seen: Numbers, recommender: Recommender, user_index: int, fresh: int) -> Numbers:
    """The end of a history that the model looked at."""
    looked_at = min(recommender.window_length, len(seen))
    if user_index >= 0 and recommender.model.fits_strangers:
        looked_at = min(looked_at, fresh)
    return seen[len(seen) - looked_at :]
