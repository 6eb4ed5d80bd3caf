"""Answers as they are sent and logged: all but the id and the cursor of a user's may be sent again as it is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pydantic_core import to_json

from app.serving.exploration import Draw
from app.serving.query import Query
from app.serving.ranked_lists import Source
from app.serving.reasons import Reason
from app.serving.recommendation_log import Row, Shown

# What is listed, with scores; None where nothing could score an item.
Items = Sequence[tuple[str, float | None]]


def listed(
    items: Items, *, explored: Collection[int] | None = None, reasons: Sequence[Reason] | None = None
) -> list[dict[str, Any]]:
    """The items of an answer, best first, as plain values past the model of the route, which a test holds them to.

    `explored` are the ranks that chance filled, where the answer tells of such things; then `reasons` may be there too.
    """
    numbered = enumerate(items, start=1)
    if explored is None:
        return [{"item_id": item_id, "score": score, "rank": rank} for rank, (item_id, score) in numbered]
    sent: list[dict[str, Any]] = [
        {"item_id": item_id, "score": score, "rank": rank, "exploration": rank in explored}
        for rank, (item_id, score) in numbered
    ]
    if reasons is not None:
        for item, reason in zip(sent, reasons, strict=True):
            because = [{"item_id": item_id, "effect": effect} for item_id, effect in reason.because]
            item["reason"] = {"method": reason.method, "because": because}
    return sent


class Found(Protocol):
    """A list that is not a user's own."""

    @property
    def recommendation_id(self) -> str: ...

    @property
    def items(self) -> Items: ...

    @property
    def source(self) -> str: ...

    @property
    def reason(self) -> str | None: ...


def answer_of(found: Found, items: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """An answer without a cursor; `items` as `listed`, if with more than the found ones' scores."""
    answer = {
        "recommendation_id": found.recommendation_id,
        "items": listed(found.items) if items is None else items,
        "source": found.source,
        **more,
    }
    return answer if found.reason is None else {**answer, "reason": found.reason}


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
    row: Row  # of the log

    @classmethod
    def of(cls, ranking: Ranking, policy: str, filters: str) -> "Answer":
        """`filters` are the query's as the log keeps them, as JSON."""
        drawn = {draw.place + 1: draw for draw in ranking.draws}
        items = listed(ranking.items, explored=drawn, reasons=ranking.reasons)
        values = {
            "items": items,
            "source": ranking.source,
            "model_version": ranking.model_version,
            "data_through": ranking.data_through,
            "feedback_through": ranking.feedback_through,
        }
        end = b"}" if ranking.reason is None else b"," + to_json({"reason": ranking.reason})[1:]
        opening = b'{"user_id":' + to_json(ranking.user_id) + b',"recommendation_id":"'
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
        )
        if drawn:
            # What chance did not touch was certain to be shown where it stands.
            shown.propensities, shown.explorations = [1.0] * len(items), [False] * len(items)
            for rank, draw in drawn.items():
                shown.propensities[rank - 1], shown.explorations[rank - 1] = draw.propensity, True
        return cls(opening, b'",' + to_json(values)[1:-1] + b',"next_cursor":', end, ranking.goes_on, shown.as_row())

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
