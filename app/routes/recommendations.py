"""`/users/{user_id}/recommendations`: what to show to a user now."""

from dataclasses import replace
from typing import Annotated, Literal

import fastapi
from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app.errors import Problem, responses
from app.identifiers import Category, ItemId, UserId
from app.security import Recommend
from app.serving.cursors import CursorGone, CursorRefused
from app.serving.filters import EVERY_CATEGORY, CategoryFilter
from app.serving.query import Query
from app.serving.service import Service, ServiceDep

router = APIRouter(tags=["recommendations"])

PATH = "/users/{user_id}/recommendations"

MAX_K = 1_000
# A URL has no room for more; a body has.
MAX_EXCLUDE_IN_URL = 500
MAX_EXCLUDE = 10_000
MAX_CATEGORIES = 50
# Query strings that need not be validated again.
MAX_KNOWN_QUERIES = 1_000
MAX_KNOWN_QUERY_BYTES = 200

K = Annotated[int, Field(ge=1, le=MAX_K, description="How many items at most.")]
InCategory = Annotated[Category | None, Field(description="Only items of this category.")]
Categories = Annotated[list[Category], Field(max_length=MAX_CATEGORIES)]
IncludeSeen = Annotated[bool, Field(description="Whether items that the user has interacted with may come again.")]
UserPath = Annotated[UserId, Path(description="The caller's id of the user; one nobody has seen gets popular items.")]


class CategoryParameters(BaseModel):
    """Filters by category, wherever items are asked for."""

    model_config = ConfigDict(extra="forbid")

    category: InCategory = None
    categories_any: Categories = Field([], description="Only items with at least one of these categories.")
    categories_all: Categories = Field([], description="Only items with every one of these categories.")
    categories_none: Categories = Field([], description="No item with any of these categories.")

    @property
    def filter(self) -> CategoryFilter:
        """The same as serving takes it."""
        if not (self.category or self.categories_any or self.categories_all or self.categories_none):
            return EVERY_CATEGORY
        every = [*self.categories_all, *([] if self.category is None else [self.category])]
        return CategoryFilter(frozenset(self.categories_any), frozenset(every), frozenset(self.categories_none))


class ListParameters(CategoryParameters):
    """What a list can be asked for, whoever it is for."""

    k: K = 10
    exclude: list[ItemId] = []
    include_seen: IncludeSeen = False
    diversity: float = Field(
        0.0, ge=0, le=1, description="How much the items shall differ from one another: 0 ranks by score alone."
    )
    max_per_category: int | None = Field(
        None, ge=1, le=MAX_K, description="How many items of any one category an answer holds at most."
    )
    explain: bool = Field(False, description="Whether each item comes with the reason why it is there.")

    def query(self) -> Query:
        """The same as serving takes it."""
        return Query(
            k=self.k,
            categories=self.filter,
            exclude=frozenset(self.exclude),
            include_seen=self.include_seen,
            diversity=self.diversity,
            max_per_category=self.max_per_category,
            explain=self.explain,
        )


class _Asked(ListParameters):
    """What GET and POST take alike."""

    cursor: str | None = Field(None, description="`next_cursor` of the answer before, with the same filters.")

    def query(self) -> Query:
        return replace(super().query(), cursor=self.cursor)


class RecommendationParameters(_Asked):
    """What a GET takes."""

    exclude: list[ItemId] = Field(
        [], max_length=MAX_EXCLUDE_IN_URL, description="Items to leave out; repeat it. POST takes 10,000."
    )


class RecommendationRequest(_Asked):
    """What a POST takes: the same, with room for long lists."""

    exclude: list[ItemId] = Field([], max_length=MAX_EXCLUDE, description="Items to leave out.")


class Influence(BaseModel):
    """An item of the history that raised the score."""

    item_id: str
    effect: float = Field(description="By how much the score is higher than without it.")


class Reason(BaseModel):
    """Why an item is there."""

    method: Literal["leave_one_out", "fold_in", "popularity", "unseen", "exploration"] = Field(
        description="`leave_one_out`: the user was ranked for again without each of the latest items of the history. "
        "`fold_in`: the same with the vector that is fitted to the latest items. `popularity`: many people chose it. "
        "`unseen`: new since the version was trained. `exploration`: chance put it here."
    )
    because: list[Influence] = Field(
        description="Up to three items of the history that raised the score, most first; none if none did."
    )


class RecommendedItem(BaseModel):
    """One place in the list."""

    item_id: str
    score: float | None = Field(
        description="Comparable within one list only; of popular items, how often they were chosen. Null for an item "
        "that the version was not trained on."
    )
    rank: int = Field(description="From 1.")
    exploration: bool = Field(description="Whether chance put it here; the log has how probable that was.")
    reason: Reason | None = Field(None, description="Only with `explain`.")


class Recommendations(BaseModel):
    """A ranked list for one user, and what it was made from."""

    user_id: str
    recommendation_id: str = Field(description="Send it with the events that this answer leads to.")
    items: list[RecommendedItem] = Field(description="Best first; fewer than k if no more may be shown.")
    source: Literal["model", "folded_in", "popular", "degraded", "empty"] = Field(
        description="`model`: ranked by the active version. `folded_in`: the same, from the history alone, for a user "
        "it was not trained on. `popular`: nothing is known of the user, or no version is active. `degraded`: the "
        "database is away, and what was in memory had to do. `empty`: nothing may be shown; see `reason`."
    )
    model_version: str | None = Field(description="The version that ranked; null where none did.")
    data_through: str | None = Field(description="Time of the newest interaction that the version was trained on.")
    feedback_through: int | None = Field(
        description="Position of the user's newest event that this answer was ranked by; further pages keep that of "
        "the first, and leave out what was consumed since."
    )
    next_cursor: str | None = Field(description="For what comes next, with the same filters; null at the end.")
    reason: str | None = Field(None, description="Why the list is empty; absent otherwise.")


_RESPONSES = responses(401, 403, 404, 410, 422, 503)


@router.get(
    PATH,
    summary="What to show to a user",
    response_model=Recommendations,
    responses=_RESPONSES,
)
async def get_recommendations(
    user_id: UserPath,
    parameters: Annotated[RecommendationParameters, fastapi.Query()],
    service: ServiceDep,
    _: Recommend,
    request: fastapi.Request,
) -> Response:
    """Rank with the active version and what the user did up to this moment. What was answered to `POST /feedback`
    before counts already."""
    query = parameters.query()
    query_string: bytes = request.scope["query_string"]
    if query.cursor is None and len(query_string) <= MAX_KNOWN_QUERY_BYTES:
        if len(service.known_queries) >= MAX_KNOWN_QUERIES:
            service.known_queries.clear()
        service.known_queries[query_string] = query
    return await _respond(service, user_id, query, "query")


@router.post(
    PATH,
    summary="What to show to a user, with long filters",
    response_model=Recommendations,
    responses=responses(401, 403, 404, 410, 413, 422, 503),
)
async def post_recommendations(
    user_id: UserPath, body: RecommendationRequest, service: ServiceDep, _: Recommend
) -> Response:
    """The same as the GET; nothing is stored but the log of what was shown."""
    return await _respond(service, user_id, body.query(), "body")


async def _respond(service: Service, user_id: str, query: Query, place: str) -> Response:
    try:
        return Response(await answer(service, user_id, query), media_type="application/json")
    except CursorRefused as error:
        raise Problem(422, "The request is not valid", str(error), field=f"{place}.cursor") from None
    except CursorGone as error:
        raise Problem(410, detail=str(error), field=f"{place}.cursor") from None


async def answer(service: Service, user_id: str, query: Query) -> bytes:
    """The body of an answer, as JSON. Raises CursorRefused and CursorGone."""
    if service.ranker.is_quick(query):
        body = await service.rounds.answer(user_id, query)
        return service.ranker.answer(user_id, query, None) if body is None else body
    history = await service.histories.read(user_id)
    return await run_in_threadpool(service.ranker.answer, user_id, query, history)
