"""Answers as they are sent and logged: all but the id and the cursor may be sent again as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic_core import to_json

from app.serving.exploration import Draw
from app.serving.query import Query
from app.serving.ranked_lists import Source
from app.serving.reasons import Reason, add_reasons
from app.serving.recommendation_log import Shown


@dataclass(slots=True)
class Ranking:
    """A list of at most k items, best first, none twice."""

    user_id: str
    items: list[tuple[str, float | None]]  # with scores; None where nothing could score an item
    draws: Sequence[Draw]  # the items among them that chance put there
    source: Source
    model_version: str | None
    data_through: str | None
    feedback_through: int | None
    candidate_count: int
    goes_on: bytes | None = None  # what its cursors say beside the id of the list; None at the end of the list
    reason: str | None = None
    reasons: Sequence[Reason] | None = None  # of each item, where they were asked for


class Answer(NamedTuple):
    """What is sent for a ranking, around its id and its cursor, and what is logged of it."""

    opening: bytes
    middle: bytes
    end: bytes
    goes_on: bytes | None
    shown: Shown

    @classmethod
    def of(cls, ranking: Ranking, policy: str, filters: dict[str, Any]) -> "Answer":
        """`filters` are the query's as the log keeps them."""
        drawn = {draw.place + 1: draw for draw in ranking.draws}
        # Plain values past the model of the route, which is held to them by a test.
        items: list[dict[str, Any]] = [
            {"item_id": item_id, "score": score, "rank": rank, "exploration": rank in drawn}
            for rank, (item_id, score) in enumerate(ranking.items, start=1)
        ]
        if ranking.reasons is not None:
            add_reasons(items, ranking.reasons)
        values = {
            "items": items,
            "source": ranking.source,
            "model_version": ranking.model_version,
            "data_through": ranking.data_through,
            "feedback_through": ranking.feedback_through,
        }
        end = b"}" if ranking.reason is None else b"," + to_json({"reason": ranking.reason})[1:]
        opening = b'{"user_id":' + to_json(ranking.user_id) + b',"recommendation_id":"'
        # What chance did not touch was certain to be shown where it stands.
        propensities, explorations = [1.0] * len(items), [False] * len(items)
        for rank, draw in drawn.items():
            propensities[rank - 1], explorations[rank - 1] = draw.propensity, True
        shown = Shown(
            user_id=ranking.user_id,
            surface="recommendations",
            policy=policy,
            model_version=ranking.model_version,
            source=ranking.source,
            feedback_through=ranking.feedback_through,
            filters=filters,
            candidate_count=ranking.candidate_count,
            item_ids=[item_id for item_id, _ in ranking.items],
            scores=[score for _, score in ranking.items],
            propensities=propensities,
            explorations=explorations,
        )
        return cls(opening, b'",' + to_json(values)[1:-1] + b',"next_cursor":', end, ranking.goes_on, shown)

    def body(self, recommendation_id: str, cursor: str | None) -> bytes:
        """The answer as JSON."""
        # Neither holds what JSON would write otherwise.
        next_cursor = b"null" if cursor is None else b'"%b"' % cursor.encode()
        return b"".join((self.opening, recommendation_id.encode(), self.middle, next_cursor, self.end))


class Kept(NamedTuple):
    """An answer beside the history that it came from, and what else went into it."""

    query: Query
    version: str
    revision: int  # of the catalogue
    answer: Answer
