"""What looks at the database tell of users' events, and what gives them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

# A user, and the mark from which on events are wanted; None for all of them, unless they are many.
Asked = tuple[str, int | None]

NOTHING_LATE = frozenset[int]()
# More events than this are not read within a look.
MOST_EVENTS = 1_000
# Whole histories come in parts of so many events, for each is worked on without letting the event loop in between.
PART = 1_000


class Row(NamedTuple):
    """An event as a history needs it."""

    mark: int  # the position on SQLite, the transaction id on PostgreSQL
    position: int
    item_id: str
    type: str
    value: float | None
    occurred_at: int  # microseconds since 1970


class Events(NamedTuple):
    """All events of one user in order of time, equal times by position, as columns."""

    through: int  # the highest position; 0 where there are none
    late: frozenset[int]  # positions of those that are not settled
    item_ids: Sequence[str]
    types: Sequence[str]
    values: Sequence[float | None] | None  # None where the reader was not asked for them
    occurred_at: npt.NDArray[np.int64]


class Look(NamedTuple):
    """What one look found, all as of one moment."""

    catalog: tuple[Any, ...]  # changes with every change to the catalogue and every erasure
    settled: int  # every event whose mark is lower was there to see
    rows: dict[str, list[Row]]  # newer ones by user; those without any are not named
    begun: dict[str, Events]  # of the users all of whose events were wanted; those with too many are not named


class Columns(NamedTuple):
    """Some events of one user, in any order."""

    marks: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    item_ids: Sequence[str]
    types: Sequence[str]
    values: Sequence[float | None] | None  # None where nobody asked for them
    occurred_at: npt.NDArray[np.int64]


class Whole(NamedTuple):
    """All events of one user, in parts."""

    settled: int
    parts: list[Columns]
    taken_back: list[int]  # positions of those that another one takes back


def in_order(events: Events, positions: npt.NDArray[np.int64]) -> Events:
    """Events that came with these positions, in any order, in order of time."""
    times = events.occurred_at
    if (times[1:] > times[:-1]).all():
        return events
    order = np.lexsort((positions, times))
    places = order.tolist()
    item_ids, types, values = events.item_ids, events.types, events.values
    return events._replace(
        item_ids=[item_ids[place] for place in places],
        types=[types[place] for place in places],
        values=None if values is None else [values[place] for place in places],
        occurred_at=times[order],
    )


class HistoryReader(Protocol):
    async def look(self, asked: Sequence[Asked]) -> Look:
        """Read what is newer. Raises SQLAlchemy's errors; after one the reader is of no more use."""

    def close(self) -> None: ...
