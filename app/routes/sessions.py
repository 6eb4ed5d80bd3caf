"""`POST /sessions/recommendations`: what to show to a visitor without an id."""

from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from app.errors import responses
from app.identifiers import ItemId
from app.routes.recommendations import MAX_EXCLUDE, ListParameters, RecommendedItem
from app.security import Recommend
from app.serving.answers import answer_of, listed
from app.serving.service import ServiceDep

router = APIRouter(tags=["recommendations"])

MAX_SESSION = 10_000


class SessionRequest(ListParameters):
    """What the visitor took so far, and what a list may hold."""

    items: list[ItemId] = Field(
        max_length=MAX_SESSION,
        description="What the visitor took, oldest first; the last `max_history` count. They do not come again.",
    )
    exclude: list[ItemId] = Field([], max_length=MAX_EXCLUDE, description="Further items to leave out.")


class SessionRecommendations(BaseModel):
    """A ranked list for a visitor, and what it was made from."""

    recommendation_id: str = Field(description="Send it with the events that this answer leads to.")
    items: list[RecommendedItem] = Field(description="Best first; fewer than k if no more may be shown.")
    source: Literal["folded_in", "popular", "empty"] = Field(
        description="`folded_in`: ranked by the active version from the items given. `popular`: no version knows any "
        "of them; see `reason`. `empty`: nothing may be shown; see `reason`."
    )
    model_version: str | None = Field(description="The version that ranked; null where none did.")
    data_through: str | None = Field(description="Time of the newest interaction that the version was trained on.")
    reason: str | None = Field(None, description="Why the version did not rank, or why the list is empty.")


@router.post(
    "/sessions/recommendations",
    summary="What to show to a visitor without an id",
    response_model=SessionRecommendations,
    responses=responses(401, 403, 413, 422, 503),
)
def session_recommendations(body: SessionRequest, service: ServiceDep, _: Recommend) -> Response:
    """Rank with the active version from the items in the request alone. Nothing is stored but the log of what was
    shown."""
    found = service.sessions.rank(body.items, body.query())
    items = listed(found.items, explored=(), reasons=found.reasons)
    return JSONResponse(answer_of(found, items, model_version=found.model_version, data_through=found.data_through))
