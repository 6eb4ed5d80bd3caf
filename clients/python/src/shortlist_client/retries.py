"""When to try again, how long to wait first, and when to give up: decided here, without any input or output."""

import random
import time
from dataclasses import dataclass

import httpx2

from shortlist_client.calls import Call, retry_after
from shortlist_client.errors import ConnectionFailedError

# Refused for now: by the service (429, 503: nothing was stored), or by a proxy that lost it (502, 504: nobody knows).
REFUSED_FOR_NOW = frozenset({429, 502, 503, 504})
# Before any of the request had left.
BEFORE_SENDING = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True, slots=True)
class Retries:
    """How hard to try: at most `tries` times, and no wait that would end more than `within` seconds after the start.

    Waits double from `first_delay` up to `max_delay` (seconds), each shortened by chance to between half and all of it,
    so that clients that failed together do not come back together. `Retry-After` is the least that is waited.
    """

    tries: int = 8
    first_delay: float = 0.1
    max_delay: float = 5.0
    within: float = 30.0

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError("tries must be at least 1: the first one counts")
        if not 0 <= self.first_delay <= self.max_delay:
            raise ValueError("first_delay must lie between 0 and max_delay")

    def delay(self, failures: int, retry_after: float | None) -> float:
        """Seconds to wait after so many failures."""
        longest = min(self.max_delay, self.first_delay * 2.0 ** min(failures - 1, 60))
        wait = longest * random.uniform(0.5, 1)  # noqa: S311 - no secret hangs on it
        return wait if retry_after is None else retry_after + wait


NO_RETRIES = Retries(tries=1)


class Tries:
    """The tries of one call."""

    def __init__(self, call: Call[object], retries: Retries) -> None:
        self._call = call
        self._retries = retries
        self._began = time.monotonic()
        self._failures = 0

    def after_error(self, error: httpx2.RequestError) -> float:
        """Seconds to wait before the next try. Raises ConnectionFailedError if there is none."""
        may_repeat = self._call.repeatable or isinstance(error, BEFORE_SENDING)
        delay = self._delay(None) if may_repeat and isinstance(error, httpx2.TransportError) else None
        if delay is None:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            tries = "1 try" if self._failures < 2 else f"{self._failures} tries"
            raise ConnectionFailedError(f"{self._call.method} {self._call.path}: {what} ({tries})") from error
        return delay

    def after_answer(self, response: httpx2.Response) -> float | None:
        """Seconds to wait before the next try; None if this answer is the last word."""
        again = self._call.repeatable and response.status_code in REFUSED_FOR_NOW
        return self._delay(retry_after(response)) if again else None

    def _delay(self, asked: float | None) -> float | None:
        self._failures += 1
        delay = self._retries.delay(self._failures, asked)
        elapsed = time.monotonic() - self._began
        in_time = elapsed + delay <= self._retries.within
        return delay if self._failures < self._retries.tries and in_time else None
