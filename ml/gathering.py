"""Calls that wait at the same time share one piece of work."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Given = TypeVar("Given")


class Gathering(Generic[Asked, Given]):
    """Does each call's work at once while a core is free; calls that had to wait are done together, by one of them.

    `alone` does the work of one call, `together` that of several at once, which is worth it from `fewest` on; `most`
    bounds how many. `cores` is how many calls may work at the same time.
    """

    def __init__(
        self,
        alone: Callable[[Asked], Given],
        together: Callable[[Sequence[Asked]], Sequence[Given]],
        *,
        fewest: int,
        most: int,
        cores: int | None = None,
    ) -> None:
        self._alone, self._together = alone, together
        self._fewest, self._most = fewest, most
        self._free = cores or len(os.sched_getaffinity(0))
        self._lock = threading.Lock()
        self._waiting: list[_Call[Asked, Given]] = []

    def __call__(self, asked: Asked) -> Given:
        """Return what the work gives for this call, or raise what it raised."""
        call = None
        with self._lock:
            if self._free > 0:
                self._free -= 1
            else:
                call = _Call[Asked, Given](asked)
                self._waiting.append(call)
        if call is None:
            try:
                return self._alone(asked)
            finally:
                self._hand_on()
        call.turn.wait()
        if call.done:
            return call.result()
        try:
            self._work([call, *self._taken()])
        finally:
            self._hand_on()
        return call.result()

    @property
    def waiting(self) -> int:
        """How many calls wait for a core."""
        return len(self._waiting)

    def _taken(self) -> "list[_Call[Asked, Given]]":
        with self._lock:
            count = self._most - 1 if len(self._waiting) + 1 >= self._fewest else 0
            taken, self._waiting = self._waiting[:count], self._waiting[count:]
            return taken

    def _work(self, batch: "list[_Call[Asked, Given]]") -> None:
        try:
            if len(batch) == 1:
                given: Sequence[Given] = [self._alone(batch[0].asked)]
            else:
                given = self._together([call.asked for call in batch])
        except BaseException as error:
            for call in batch:
                call.error, call.done = error, True
        else:
            for call, own in zip(batch, given, strict=True):
                call.given, call.done = [own], True
        for call in batch[1:]:
            call.turn.set()

    def _hand_on(self) -> None:
        """Give the core to the call that has waited longest."""
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            following = self._waiting.pop(0)
        following.turn.set()


class _Call(Generic[Asked, Given]):
    """One call: what it asks, and what came of it."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.turn = threading.Event()  # to work, or to take what was done
        self.done = False
        self.given: list[Given] = []
        self.error: BaseException | None = None

    def result(self) -> Given:
        if self.error is not None:
            raise self.error
        return self.given[0]
