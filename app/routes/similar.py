"""`GET /items/{item_id}/similar`: what is like an item."""

from typing import Annotated, Literal

import fastapi
from fastapi import APIRouter, Path, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from app.errors import Problem, responses
from app.identifiers import ItemId
from app.routes.recommendations import CategoryParameters, K
from app.security import Recommend
from app.serving.answers import answer_of
from app.serving.service import ServiceDep
from app.serving.similar import UnknownItem

router = APIRouter(tags=["recommendations"])


class SimilarParameters(CategoryParameters):
    """What a GET takes."""

    k: K = 10


class SimilarItem(BaseModel):
    """One place in the list."""

    item_id: str
    score: float = Field(
        description="By `source`: the cosine of the vectors, -1 to 1; the share of categories in common, 0 to 1; or "
        "how many interactions the item had."
    )
    rank: int = Field(description="From 1.")


class SimilarItems(BaseModel):
    """Items that may be shown, the most alike first."""

    item_id: str
    recommendation_id: str = Field(description="Send it with the events that this answer leads to.")
    items: list[SimilarItem]
    source: Literal["model", "categories", "popular", "empty"] = Field(
        description="`model`: by the vectors of the active version. `categories`: it does not know the item, whose "
        "categories others share. `popular`: nothing is known of the item but that it is there. `empty`: see `reason`."
    )
    model_version: str | None = Field(description="The version whose vectors were compared.")
    reason: str | None = Field(None, description="Why the list is empty; absent otherwise.")


@router.get(
    "/items/{item_id}/similar",
    summary="What is like an item",
    response_model=SimilarItems,
    responses=responses(401, 403, 404, 422, 503),
)
def similar(
    item_id: Annotated[ItemId, Path(description="An item of the catalogue, hidden or not.")],
    parameters: Annotated[SimilarParameters, fastapi.Query()],
    service: ServiceDep,
    _: Recommend,
) -> Response:
    """Hidden items do not come, nor the item itself."""
    try:
        found = service.similar.rank(item_id, parameters.k, parameters.filter)
    except UnknownItem:
        raise Problem(404, detail=f"there is no item {item_id!r} in the catalogue", field="path.item_id") from None
    return JSONResponse(answer_of(found, item_id=item_id, model_version=found.model_version))
