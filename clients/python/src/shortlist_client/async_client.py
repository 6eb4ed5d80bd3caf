"""The asynchronous client: the calls of `Client`, awaited."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2

from shortlist_client import calls
from shortlist_client.answers import (
    Chart,
    EventResult,
    Item,
    Model,
    ModelDetails,
    Page,
    Promote,
    Recommendations,
    Rollback,
    Run,
    RunState,
    SessionRecommendations,
    SimilarItems,
    User,
)
from shortlist_client.calls import Call, ChartOptions, RecommendationOptions, SimilarOptions
from shortlist_client.errors import RunTimeoutError
from shortlist_client.events import Event
from shortlist_client.retries import Retries, Tries

T = TypeVar("T")
P = TypeVar("P", bound=Page)


class AsyncClient:
    """Calls a Shortlist service: `async with AsyncClient("http://127.0.0.1:8000", key) as shortlist: …`.

    The tasks of one event loop may share it; it keeps connections open until it is closed. `timeout` (seconds)
    bounds connecting and every silence of a try, `retries` how often and how long a call is tried: after a failed
    connection, 429 and 503 (a proxy's 502 and 504 too), and never after another refusal.

    Every call raises ProblemError for a refusal, ConnectionFailedError where no answer came, AnswerError for one that
    cannot be read, and ValueError for what cannot be sent.
    """

    def __init__(
        self, address: str, key: str | None = None, *, timeout: float = 10.0, retries: Retries | None = None
    ) -> None:
        self._retries = retries or Retries()
        self._http = httpx2.AsyncClient(base_url=calls.base_url(address), headers=calls.headers(key), timeout=timeout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._http.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # --- recommendations and feedback ---

    async def recommendations(
        self, user_id: str, *, cursor: str | None = None, **options: Unpack[RecommendationOptions]
    ) -> Recommendations:
        """What to show to a user now, as the options of RecommendationOptions say; a stranger gets popular items.

        With the `next_cursor` of an answer and the same options: what comes after it.
        """
        return await self._send(calls.recommendations(user_id, options, cursor))

    async def recommendation_pages(
        self, user_id: str, **options: Unpack[RecommendationOptions]
    ) -> AsyncIterator[Recommendations]:
        """A list in parts of `k` items, to its end: nothing comes twice, nor what the user consumed meanwhile.

        Raises GoneError where the version that ranked has left between two pages: begin again.
        """
        async for page in self._pages(lambda cursor: calls.recommendations(user_id, options, cursor)):
            yield page

    async def session_recommendations(
        self, items: Iterable[str], **options: Unpack[RecommendationOptions]
    ) -> SessionRecommendations:
        """What to show to a visitor without an id who took these items, oldest first; the items are not kept."""
        return await self._send(calls.session_recommendations(items, options))

    async def similar(self, item_id: str, **options: Unpack[SimilarOptions]) -> SimilarItems:
        """What is like an item; NotFoundError if there is no such item."""
        return await self._send(calls.similar(item_id, options))

    async def popular(self, **options: Unpack[ChartOptions]) -> Chart:
        """What most people choose, or chose in the window."""
        return await self._send(calls.chart("popular", options))

    async def trending(self, **options: Unpack[ChartOptions]) -> Chart:
        """What is chosen more often than before, the steepest rise first."""
        return await self._send(calls.chart("trending", options))

    async def latest(self, **options: Unpack[ChartOptions]) -> Chart:
        """What came into the catalogue last."""
        return await self._send(calls.chart("latest", options))

    async def feedback(self, event: Event) -> EventResult:
        """Tell what a user did. Once this returns, the event is on disk; InvalidError if it was rejected.

        The outcome `duplicate` means that the service knew the event: from before, or from a try whose answer got lost.
        """
        return await self._send(calls.feedback(event))

    async def feedback_many(self, events: Iterable[Event]) -> list[EventResult]:
        """Tell what users did, in requests of up to 1,000 events, with an outcome for each, rejected ones too.

        After an error, send the same events again: those that were stored are known by their ids.
        """
        results: list[EventResult] = []
        for call in calls.feedback_many(events):
            results += await self._send(call)
        return results

    # --- catalogue ---

    async def item(self, item_id: str) -> Item:
        """Read an item; NotFoundError if there is none."""
        return await self._send(calls.item(item_id))

    async def put_item(
        self,
        item_id: str,
        *,
        title: str | None = None,
        categories: Iterable[str] = (),
        hidden: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> Item:
        """Create an item or replace what is known of it: what is left out here takes its default."""
        return await self._send(
            calls.put_item(item_id, title=title, categories=categories, hidden=hidden, metadata=metadata or {})
        )

    async def delete_item(self, item_id: str) -> None:
        """Erase an item and all events about it, for good; nothing happens where there is none."""
        await self._send(calls.delete_item(item_id))

    async def items(self, *, page_size: int = 100) -> AsyncIterator[Item]:
        """All items in order of their ids, page by page."""
        async for page in self._pages(lambda cursor: calls.items(page_size, cursor)):
            for found in page.items:
                yield found

    async def user(self, user_id: str) -> User:
        """Read a user; NotFoundError if there is none."""
        return await self._send(calls.user(user_id))

    async def put_user(self, user_id: str, *, metadata: Mapping[str, Any] | None = None) -> User:
        """Create a user or replace what is known of them."""
        return await self._send(calls.put_user(user_id, metadata=metadata or {}))

    async def delete_user(self, user_id: str) -> None:
        """Erase a user with all their events, for good; nothing happens where there is none."""
        await self._send(calls.delete_user(user_id))

    async def users(self, *, page_size: int = 100) -> AsyncIterator[User]:
        """All users in order of their ids, page by page."""
        async for page in self._pages(lambda cursor: calls.users(page_size, cursor)):
            for found in page.users:
                yield found

    # --- trainings and models ---

    async def retrain(
        self,
        recipe: str,
        *,
        overrides: Mapping[str, str | bool | int | float] | None = None,
        warm_start: bool = False,
        promote: Promote = "guarded",
        idempotency_key: str | None = None,
    ) -> Run:
        """Queue a training. With the key of an earlier call this answers its run; without one, each call makes one."""
        return await self._send(
            calls.retrain(
                recipe,
                overrides=overrides or {},
                warm_start=warm_start,
                promote=promote,
                idempotency_key=idempotency_key,
            )
        )

    async def run(self, run_id: str) -> Run:
        """How a training is doing, or did."""
        return await self._send(calls.run(run_id))

    async def wait_for_run(self, run_id: str, *, poll: float = 1.0, timeout: float | None = None) -> Run:
        """The run once it has ended, however it did: see its `state`. Looks every `poll` seconds.

        Raises RunTimeoutError after `timeout` seconds; the training goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (run := await self.run(run_id)).finished:
            if deadline is not None and time.monotonic() + poll > deadline:
                raise RunTimeoutError(f"run {run_id} is {run.state} after {timeout} seconds")
            await asyncio.sleep(poll)
        return run

    async def runs(self, *, state: RunState | None = None, page_size: int = 50) -> AsyncIterator[Run]:
        """Runs, newest first, page by page."""
        async for page in self._pages(lambda cursor: calls.runs(page_size, cursor, state)):
            for found in page.runs:
                yield found

    async def cancel_run(self, run_id: str) -> Run:
        """Cancel a training; ConflictError if it is over."""
        return await self._send(calls.cancel_run(run_id))

    async def models(self, *, page_size: int = 50) -> AsyncIterator[Model]:
        """Versions, newest first, page by page; the `state` of the one that answers is `active`."""
        async for page in self._pages(lambda cursor: calls.models(page_size, cursor)):
            for found in page.models:
                yield found

    async def model(self, version: str) -> ModelDetails:
        """All about a version."""
        return await self._send(calls.model(version))

    async def activate(self, version: str) -> ModelDetails:
        """Make a version the one that answers."""
        return await self._send(calls.activate(version))

    async def rollback(self) -> Rollback:
        """Return to the version that was active before; not tried again once it was sent."""
        return await self._send(calls.rollback())

    # --- sending ---

    async def _send(self, call: Call[T]) -> T:
        tries = Tries(call, self._retries)
        while True:
            try:
                response = await self._http.request(call.method, call.path, content=call.content, headers=call.headers)
            except httpx2.RequestError as error:
                delay = tries.after_error(error)
            else:
                again = tries.after_answer(response)
                if again is None:
                    return call.result(response)
                delay = again
            await asyncio.sleep(delay)

    async def _pages(self, call: Callable[[str | None], Call[P]]) -> AsyncIterator[P]:
        cursor = None
        while True:
            page = await self._send(call(cursor))
            yield page
            cursor = page.next_cursor
            if cursor is None:
                return
