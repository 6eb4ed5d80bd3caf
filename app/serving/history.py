"""What one user did, in four bytes an item, and how it comes of events."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from app.serving.looks import Events, Row, Whole
from ml.snapshots import RETRACT, EventMeaning, meaning_of

Numbers = npt.NDArray[np.int32]
Times = npt.NDArray[np.int64]
T = TypeVar("T", bound=np.generic)

# Callers name the types of events: what so many mean is remembered.
MANY_TYPES = 1_000


class ItemNumbers:
    """A small number for each item that a history names, so that a history takes four bytes an item."""

    def __init__(self) -> None:
        self.item_ids: list[str] = []
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.item_ids)

    def number(self, item_id: str) -> int:
        """The item's number, a new one at first sight."""
        found = self._numbers.get(item_id)
        if found is None:
            self._add((item_id,))
            found = self._numbers[item_id]
        return found

    def _add(self, item_ids: Iterable[str]) -> None:
        with self._lock:
            known, named = self._numbers, self.item_ids
            for item_id in item_ids:
                if item_id not in known:
                    named.append(item_id)  # first: other threads read both
                    known[item_id] = len(named) - 1

    def find(self, item_id: str) -> int:
        """The item's number; -1 where no history has named it."""
        return self._numbers.get(item_id, -1)

    def numbers(self, item_ids: Sequence[str]) -> Numbers:
        """The items' numbers, new ones at first sight."""
        try:
            return np.fromiter(map(self._numbers.__getitem__, item_ids), np.int32, len(item_ids))
        except KeyError:
            self._add(item_ids)
            return np.fromiter(map(self._numbers.__getitem__, item_ids), np.int32, len(item_ids))


_NO_NUMBERS: Numbers = np.zeros(0, np.int32)
_NO_TIMES: Times = np.zeros(0, np.int64)
_NOTHING_NUMBERED = ItemNumbers()


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """One user's interactions, oldest first, and what later answers leave out.

    It never changes: a newer one replaces it. `kept` holds what was worked out of it, and goes with it.
    """

    items: ItemNumbers = _NOTHING_NUMBERED
    interactions: Numbers = field(default_factory=lambda: _NO_NUMBERS)
    interacted_at: Times = field(default_factory=lambda: _NO_TIMES)  # when, in microseconds since 1970
    left_out: Numbers = field(default_factory=lambda: _NO_NUMBERS)  # distinct
    kept_out_for_good: Numbers = field(default_factory=lambda: _NO_NUMBERS)  # by an event that is no interaction
    feedback_through: int | None = None  # position of the user's newest event
    kept: list[Any] = field(default_factory=list)

    @property
    def item_ids(self) -> tuple[str, ...]:
        """The interactions' items."""
        return tuple(self._named(self.interactions))

    def latest(self, count: int) -> list[str]:
        """The items of the last so many interactions, oldest first."""
        return self._named(self.interactions[-count:])

    @property
    def excluded(self) -> frozenset[str]:
        """The items that later answers leave out."""
        return frozenset(self._named(self.left_out))

    @property
    def size(self) -> int:
        """In units of four bytes."""
        return 3 * len(self.interactions) + len(self.left_out) + len(self.kept_out_for_good)

    def _named(self, numbers: Numbers) -> list[str]:
        item_ids = self.items.item_ids
        return [item_ids[number] for number in numbers.tolist()]


class HistoryBuilder:
    """Makes histories of events, which mean what the settings say; safe to call from several threads at once."""

    def __init__(self, meanings: Mapping[str, EventMeaning], max_history: int) -> None:
        self._given = dict(meanings)
        self._meanings: dict[str, EventMeaning] = {}  # of the types that were met
        self._max_history = max_history
        self._items = ItemNumbers()

    @property
    def items(self) -> ItemNumbers:
        """The items of all its histories."""
        return self._items

    @property
    def needs_values(self) -> bool:
        """Whether it depends on an event's value what it means."""
        return any(meaning.minimum_value is not None for meaning in self._given.values())

    def of_whole(self, whole: Whole) -> History:
        """The history of all events of a user."""
        parts = whole.parts
        if not parts:
            return History(self._items)
        numbers = np.concatenate([self._items.numbers(part.item_ids) for part in parts])
        positions = np.concatenate([part.positions for part in parts])
        times = np.concatenate([part.occurred_at for part in parts])
        types = list(chain.from_iterable(part.types for part in parts))
        values = list(chain.from_iterable(part.values or () for part in parts))
        kept = np.array([type_ != RETRACT for type_ in types], np.bool_)
        kept[np.isin(positions, whole.taken_back)] = False
        order = np.lexsort((positions, times))
        order = order[kept[order]]
        places = order.tolist()
        types = [types[place] for place in places]
        in_order = [values[place] for place in places] if values else None
        return self._built(numbers[order], types, in_order, times[order], int(positions.max()))

    def of_events(self, events: Events) -> History | None:
        """The history of all events of a user; None where one takes another back."""
        if RETRACT in events.types:
            return None
        numbers = self._items.numbers(events.item_ids)
        return self._built(numbers, events.types, events.values, events.occurred_at, events.through)

    def _built(
        self,
        numbers: Numbers,
        types: Sequence[str],
        values: Sequence[float | None] | None,
        times: Times,
        through: int,
    ) -> History:
        """`values` may be left out where no meaning asks for them."""
        if not through:
            return History(self._items)
        left_out, kept_out = numbers, _NO_NUMBERS
        meanings = {type_: self._meaning(type_) for type_ in set(types)}
        if not all(
            meaning.excludes and meaning.in_history and meaning.minimum_value is None for meaning in meanings.values()
        ):
            excludes = np.array([meanings[type_].excludes for type_ in types], np.bool_)
            if values is None:
                counts = np.array([meanings[type_].in_history for type_ in types], np.bool_)
            else:
                pairs = zip(types, values, strict=True)
                counts = np.array([meanings[type_].is_interaction(value) for type_, value in pairs], np.bool_)
            left_out, kept_out = numbers[excludes], np.unique(numbers[excludes & ~counts])
            numbers, times = numbers[counts], times[counts]
        in_order = np.sort(left_out)
        if (in_order[1:] == in_order[:-1]).any():
            left_out = np.unique(in_order)
        return History(
            self._items,
            self._latest(numbers),
            self._latest(times),
            left_out,  # mostly the same array as the interactions
            kept_out,
            through,
        )

    def extended(self, history: History, rows: Sequence[Row]) -> History | None:
        """The history with newer events; None where they do not simply follow it."""
        interactions, interacted_at = history.interactions, history.interacted_at
        left_out, kept_out = history.left_out, history.kept_out_for_good
        through = newest = history.feedback_through or 0
        if len(rows) > 1:
            rows = sorted(rows, key=lambda row: (row.occurred_at, row.position))
        for row in rows:
            if row.type == RETRACT:
                return None
            meaning = self._meaning(row.type)
            number = self._items.number(row.item_id)
            interaction = meaning.is_interaction(row.value)
            was_interactions = left_out is interactions
            if interaction:
                place = len(interactions)
                if place and row.occurred_at <= interacted_at.item(-1):
                    place = int(interacted_at.searchsorted(row.occurred_at, "right"))
                    if place and interacted_at[place - 1] == row.occurred_at and row.position < through:
                        return None  # which of the two came first, only their positions tell
                if place or len(interactions) < self._max_history:  # else it is older than all that count
                    interactions = self._latest(_inserted(interactions, place, number))
                    interacted_at = self._latest(_inserted(interacted_at, place, row.occurred_at))
            if meaning.excludes:
                if not _holds(left_out, number):
                    # Mostly both are the same array, and stay so.
                    same = was_interactions and len(interactions) == len(left_out) + 1
                    left_out = interactions if same else _inserted(left_out, len(left_out), number)
                if not interaction and not _holds(kept_out, number):
                    kept_out = _inserted(kept_out, len(kept_out), number)
            newest = max(newest, row.position)
        return History(self._items, interactions, interacted_at, left_out, kept_out, newest)

    def _latest(self, values: npt.NDArray[T]) -> npt.NDArray[T]:
        return values if len(values) <= self._max_history else values[-self._max_history :]

    def _meaning(self, type_: str) -> EventMeaning:
        found = self._meanings.get(type_)
        if found is None:
            if len(self._meanings) >= MANY_TYPES:
                self._meanings.clear()
            found = self._meanings[type_] = meaning_of(self._given, type_)
        return found


def _holds(numbers: Numbers, number: int) -> bool:
    return bool(np.count_nonzero(numbers == number))  # several times as fast as `in`


def _inserted(values: npt.NDArray[T], place: int, value: int) -> npt.NDArray[T]:
    new = np.empty(len(values) + 1, values.dtype)
    new[:place] = values[:place] if place < len(values) else values
    new[place] = value
    if place < len(values):
        new[place + 1 :] = values[place:]
    return new
