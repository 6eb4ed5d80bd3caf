"""Requests that wait at the same time share a look at the database, and then a ranking."""

import asyncio
from typing import NamedTuple

from app.serving.histories import Histories
from app.serving.history import History
from app.serving.query import Query
from app.serving.ranking import Ranker

# A round takes so many at most; then others of the event loop have their turn.
MOST_TOGETHER = 32


class _Asked(NamedTuple):
    user_id: str
    query: Query
    history: History
    answer: "asyncio.Future[bytes]"


class Rounds:
    """Answers quick queries, on the event loop."""

    def __init__(self, histories: Histories, ranker: Ranker) -> None:
        self._histories = histories
        self._ranker = ranker
        self._waiting: list[_Asked] = []

    async def answer(self, user_id: str, query: Query) -> bytes | None:
        """The body of an answer, as JSON; None while the database cannot be asked."""
        history = await self._histories.read(user_id)
        if history is None:
            return None
        kept = self._ranker.again(query, history)
        if kept is not None:
            return kept
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        if not self._waiting:
            # After all that the same look answered.
            loop.call_soon(self._rank)
        self._waiting.append(_Asked(user_id, query, history, answer))
        return await answer

    def _rank(self) -> None:
        round_, self._waiting = self._waiting[:MOST_TOGETHER], self._waiting[MOST_TOGETHER:]
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._rank)
        by_query: dict[Query, list[_Asked]] = {}
        for asked in round_:
            by_query.setdefault(asked.query, []).append(asked)
        for query, group in by_query.items():
            self._answer(group, query)

    def _answer(self, group: list[_Asked], query: Query) -> None:
        group = [asked for asked in group if not asked.answer.done()]  # the others went away
        if not group:
            return
        try:
            bodies = self._ranker.answer_together([(asked.user_id, asked.history) for asked in group], query)
        except Exception as error:
            if len(group) == 1:
                group[0].answer.set_exception(error)
            else:  # one user's failure is not the others'
                for asked in group:
                    self._answer([asked], query)
            return
        for asked, body in zip(group, bodies, strict=True):
            asked.answer.set_result(body)
