"""`GET /popular`, `/trending`, `/latest`: what to show to anybody, for callers without a known user."""

from typing import Annotated, Literal

import fastapi
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from app.errors import responses
from app.routes.recommendations import CategoryParameters, K
from app.security import Recommend
from app.serving.activity import MAX_POPULAR_HOURS, MAX_TRENDING_HOURS
from app.serving.answers import answer_of
from app.serving.charts import ChartQuery, Surface
from app.serving.service import Service, ServiceDep

router = APIRouter(tags=["recommendations"])

MAX_LATEST_HOURS = 24 * 366


class PopularParameters(CategoryParameters):
    """What `GET /popular` takes."""

    k: K = 10
    window_hours: int | None = Field(
        None, ge=1, le=MAX_POPULAR_HOURS, description="Count the last so many hours; everything if absent."
    )


class TrendingParameters(CategoryParameters):
    """What `GET /trending` takes."""

    k: K = 10
    window_hours: int = Field(
        24, ge=1, le=MAX_TRENDING_HOURS, description="Hold the last so many hours against three times as many before."
    )


class LatestParameters(CategoryParameters):
    """What `GET /latest` takes."""

    k: K = 10
    window_hours: int | None = Field(
        None, ge=1, le=MAX_LATEST_HOURS, description="Only items added in the last so many hours; all if absent."
    )


class ChartItem(BaseModel):
    """One place in the list."""

    item_id: str
    score: float = Field(
        description="Of popular items, how many interactions they had; of trending ones, how far these are above what "
        "was to be expected, in standard deviations; of the latest, when they were added, in seconds since 1970."
    )
    rank: int = Field(description="From 1.")


class Chart(BaseModel):
    """Items that may be shown, best first."""

    recommendation_id: str = Field(description="Send it with the events that this answer leads to.")
    items: list[ChartItem]
    source: Literal["popular", "trending", "latest", "empty"] = Field(description="`empty`: see `reason`.")
    reason: str | None = Field(None, description="Why the list is empty; absent otherwise.")


_RESPONSES = responses(401, 403, 422, 503)


@router.get("/popular", summary="What most people choose", response_model=Chart, responses=_RESPONSES)
def popular(parameters: Annotated[PopularParameters, fastapi.Query()], service: ServiceDep, _: Recommend) -> Response:
    """Counts follow the events within `model_poll_seconds`; hidden and deleted items leave at once. Without a window,
    items that nobody chose yet come last; with one, they do not come."""
    return _chart(service, "popular", parameters)


@router.get("/trending", summary="What is chosen more often than before", response_model=Chart, responses=_RESPONSES)
def trending(parameters: Annotated[TrendingParameters, fastapi.Query()], service: ServiceDep, _: Recommend) -> Response:
    """Sorted by (c - e) / sqrt(e + 1), where c is how often an item was chosen in the window and e what the three
    windows before it let expect in as much time; items with c above e come."""
    return _chart(service, "trending", parameters)


@router.get("/latest", summary="What came into the catalogue last", response_model=Chart, responses=_RESPONSES)
def latest(parameters: Annotated[LatestParameters, fastapi.Query()], service: ServiceDep, _: Recommend) -> Response:
    """Sorted by `created_at`, the newest first."""
    return _chart(service, "latest", parameters)


def _chart(
    service: Service, surface: Surface, asked: PopularParameters | TrendingParameters | LatestParameters
) -> Response:
    found = service.charts.rank(surface, ChartQuery(asked.k, asked.filter, asked.window_hours))
    return JSONResponse(answer_of(found))
