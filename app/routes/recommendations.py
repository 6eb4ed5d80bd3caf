"""`/users/{user_id}/recommendations`: what to show to a user now."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from app.errors import responses
from app.identifiers import Category, ItemId, UserId
from app.security import Recommend
from app.serving import ranking
from app.serving.filters import EVERY_CATEGORY, CategoryFilter
from app.serving.service import Service, ServiceDep

router = APIRouter(tags=["recommendations"])

MAX_K = 1_000
# A URL has no room for more; a body has.
MAX_EXCLUDE_IN_URL = 500
MAX_EXCLUDE = 10_000
MAX_CATEGORIES = 50

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


class RecommendationParameters(CategoryParameters):
    """What a GET takes."""

    k: K = 10
    exclude: list[ItemId] = Field(
        [], max_length=MAX_EXCLUDE_IN_URL, description="Items to leave out; repeat it. POST takes 10,000."
    )
    include_seen: IncludeSeen = False


class RecommendationRequest(CategoryParameters):
    """What a POST takes: the same, with room for long lists."""

    k: K = 10
    exclude: list[ItemId] = Field([], max_length=MAX_EXCLUDE, description="Items to leave out.")
    include_seen: IncludeSeen = False


class RecommendedItem(BaseModel):
    """One place in the list."""

    item_id: str
    score: float = Field(description="Comparable within one answer only; of popular items, how often they were chosen.")
    rank: int = Field(description="From 1.")
    exploration: bool = Field(description="Whether chance put it here; never yet.")


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
    feedback_through: int | None = Field(description="Position of the user's newest event that this answer knows.")
    next_cursor: None = Field(None, description="Reserved for further pages: always null.")
    reason: str | None = Field(None, description="Why the list is empty; absent otherwise.")


_RESPONSES = responses(401, 403, 404, 422, 503)


@router.get(
    "/users/{user_id}/recommendations",
    summary="What to show to a user",
    response_model=Recommendations,
    responses=_RESPONSES,
)
def get_recommendations(
    user_id: UserPath, parameters: Annotated[RecommendationParameters, Query()], service: ServiceDep, _: Recommend
) -> Response:
    """Rank with the active version and what the user did up to this moment. What was answered to `POST /feedback`
    before counts already."""
    return _rank(service, user_id, parameters)


@router.post(
    "/users/{user_id}/recommendations",
    summary="What to show to a user, with long filters",
    response_model=Recommendations,
    responses=responses(401, 403, 404, 413, 422, 503),
)
def post_recommendations(user_id: UserPath, body: RecommendationRequest, service: ServiceDep, _: Recommend) -> Response:
    """The same as the GET; nothing is stored but the log of what was shown."""
    return _rank(service, user_id, body)


def _rank(service: Service, user_id: str, asked: RecommendationParameters | RecommendationRequest) -> Response:
    query = ranking.Query(asked.k, asked.filter, frozenset(asked.exclude), asked.include_seen)
    found = service.ranker.rank(user_id, query)
    # Plain values past the model: it describes the answer, and the types above are held to it by a test.
    answer: dict[str, Any] = {
        "user_id": found.user_id,
        "recommendation_id": found.recommendation_id,
        "items": [
            {"item_id": item_id, "score": score, "rank": rank, "exploration": False}
            for rank, (item_id, score) in enumerate(found.items, start=1)
        ],
        "source": found.source,
        "model_version": found.model_version,
        "data_through": found.data_through,
        "feedback_through": found.feedback_through,
        "next_cursor": None,
    }
    if found.reason is not None:
        answer["reason"] = found.reason
    return JSONResponse(answer)
