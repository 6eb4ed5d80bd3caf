"""`GET /popular`: what most people choose, for callers without a known user."""

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.errors import responses
from app.routes.recommendations import InCategory, K
from app.security import Recommend
from app.serving.filters import in_category
from app.serving.service import ServiceDep

router = APIRouter(tags=["recommendations"])


class PopularParameters(BaseModel):
    """What a GET takes."""

    model_config = ConfigDict(extra="forbid")

    k: K = 10
    category: InCategory = None


class PopularItem(BaseModel):
    """One place in the list."""

    item_id: str
    score: float = Field(description="How many interactions it has had.")
    rank: int = Field(description="From 1.")


class PopularItems(BaseModel):
    """Items that may be shown, the most chosen first; those nobody chose yet come last."""

    items: list[PopularItem]


@router.get("/popular", summary="What most people choose", responses=responses(401, 403, 422, 503))
def popular(parameters: Annotated[PopularParameters, Query()], service: ServiceDep, _: Recommend) -> PopularItems:
    """Counts follow the events within `model_poll_seconds`; hidden and deleted items leave at once."""
    ranked = islice(service.popularity.ranked(in_category(parameters.category)), parameters.k)
    return PopularItems(
        items=[PopularItem(item_id=item_id, score=count, rank=rank) for rank, (item_id, count) in enumerate(ranked, 1)]
    )
