"""Snapshots: immutable Parquet parts of events up to a watermark, with a content hash."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EventMeaning:
    """What events of one type mean to training, history and serving."""

    weight: float = 1.0
    minimum_value: float | None = None  # an event with a lower value is no interaction
    in_history: bool = True  # trains, and is what Caser looks at
    excludes: bool = True  # leaves the item out of later answers

    def is_interaction(self, value: float | None) -> bool:
        """Tell whether an event with this value trains and enters the history; no value reaches no minimum."""
        return self.in_history and (self.minimum_value is None or (value is not None and value >= self.minimum_value))


ANY_TYPE = "*"
RETRACT = "retract"

# `retract` is not listed: it always takes back the event that it names.
DEFAULT_MEANINGS: Mapping[str, EventMeaning] = {
    ANY_TYPE: EventMeaning(),
    "impression": EventMeaning(in_history=False, excludes=False),
    "dislike": EventMeaning(in_history=False, excludes=True),
}


def meaning_of(meanings: Mapping[str, EventMeaning], type: str) -> EventMeaning:  # noqa: A002
    """Return what events of a type mean: its own entry, else the one of `*`, else the default."""
    return meanings.get(type) or meanings.get(ANY_TYPE) or EventMeaning()
