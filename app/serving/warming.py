"""Reads the histories of users who were there last before they ask, so that a new process is soon as fast as others."""

import asyncio
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Engine
from starlette.concurrency import run_in_threadpool

from app.database import is_outage
from app.serving.histories import Histories
from app.tables import events

log = structlog.get_logger(__name__)

# Users are looked for among so many events at most, the newest first, in parts.
LATEST_EVENTS = 2_000_000
PART = 10_000
# So many users are read together, in about a millisecond.
TOGETHER = 4
# After each look others have the processor as long, and so many times as long while requests wait.
RESTS_BETWEEN_REQUESTS = 9
READY_POLL_SECONDS = 0.5


class Warming:
    """`run` belongs to the event loop. What it reads is kept, and kept in step, as if somebody had asked."""

    def __init__(
        self,
        engine: Engine,
        histories: Histories,
        *,
        is_ready: Callable[[], bool],
        is_asked: Callable[[], bool],
        look_up: Callable[[Sequence[str]], None],
    ) -> None:
        """`is_ready` tells whether the database has been reached, `is_asked` whether a request waits.

        `look_up` finds users in what ranks for them.
        """
        self._engine = engine
        self._histories = histories
        self._look_up = look_up
        self._is_ready = is_ready
        self._is_asked = is_asked

    async def run(self) -> None:
        """Read histories until memory has no more room for them, or the events come to an end."""
        try:
            while not self._is_ready():
                await asyncio.sleep(READY_POLL_SECONDS)
            started = time.monotonic()
            users = await self._read()
            if users:
                log.info("histories_read_ahead", users=users, seconds=round(time.monotonic() - started, 1))
        except Exception as error:  # requests read what they need
            log.warning("histories_not_read_ahead", reason=type(error).__name__, exc_info=not is_outage(error))

    async def _read(self) -> int:
        """Read, and return for how many users."""
        users = 0
        newest = await run_in_threadpool(self._newest)
        for last in range(newest, max(newest - LATEST_EVENTS, 0), -PART):
            user_ids = await run_in_threadpool(self._users, last)
            for first in range(0, len(user_ids), TOGETHER):
                before = time.perf_counter()
                some = user_ids[first : first + TOGETHER]
                read = await self._histories.read_ahead(some)
                if read is None:
                    return users
                self._look_up(some)
                users += read
                if read:
                    await self._rest(time.perf_counter() - before)
        return users

    async def _rest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._is_asked():
            await asyncio.sleep((RESTS_BETWEEN_REQUESTS - 1) * seconds)

    def _newest(self) -> int:
        with self._engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.max(events.c.position))) or 0

    def _users(self, last: int) -> list[str]:
        """The users of one part of the events, which ends with a position."""
        those = (events.c.position > last - PART) & (events.c.position <= last)
        with self._engine.connect() as connection:
            return list(connection.scalars(sa.select(events.c.user_id).where(those).distinct()))
