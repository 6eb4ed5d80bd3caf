"""Why each item of an answer is there, in the caller's ids."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from app.serving.active_models import Active
from app.serving.catalog import Catalog
from app.serving.cursors import Numbers
from ml.explain import Method, explain


@dataclass(frozen=True, slots=True)
class Reason:
    """How the reason was found, and what raised the item's score by how much, most first."""

    method: Method | Literal["unseen", "exploration"]
    because: tuple[tuple[str, float], ...] = ()


POPULAR = Reason("popularity")
UNSEEN = Reason("unseen")
DRAWN = Reason("exploration")


def reasons_of(
    catalog: Catalog,
    active: Active | None,
    user_index: int,
    seen: Numbers,
    item_ids: Sequence[str],
    drawn: Collection[str] = (),
) -> list[Reason]:
    """Reasons for the items that a version ranked for a user with this history; no version, no history.

    What is hidden by now is not named.
    """
    if active is None:
        return [DRAWN if item_id in drawn else POPULAR for item_id in item_ids]
    recommender = active.recommender
    numbered = active.item_indices.of_each(item_ids)
    ranked = [place for place, index in enumerate(numbered) if index >= 0 and item_ids[place] not in drawn]
    reasons = [DRAWN if item_id in drawn else UNSEEN for item_id in item_ids]
    explained = explain(recommender, user_index, seen, [int(numbered[place]) for place in ranked])
    for place, influences in zip(ranked, explained.influences, strict=True):
        named = recommender.items.ids([influence.item for influence in influences])
        because = tuple(
            (item_id, influence.effect)
            for item_id, influence in zip(named, influences, strict=True)
            if catalog.visible(item_id)
        )
        reasons[place] = Reason(explained.method, because)
    return reasons
