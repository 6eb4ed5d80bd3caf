"""The counts of interactions by item in SQL, so that a process that starts counts only what came since.

They stand in parts, all written by one transaction. A part that is damaged, or counts of other events than those that
are there, are as none: everything can be counted anew.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app.database import cluster_of, writing
from app.serving.interaction_counts import Counted, goes_on, look
from app.tables import item_counts
from app.times import rfc3339
from ml.snapshots import EventMeaning

Days = tuple[tuple[int, datetime], ...]

FORMAT = 1  # of the parts: another one is not read
ITEMS_A_PART = 2_000  # some 1 ms of Python's lock each, to write as to read


@dataclass(frozen=True)
class ItemCounts:
    """How often each item was chosen, up to one moment; never changed."""

    by_item: dict[str, int]
    counted: Counted
    # Marks, and when the latest interaction up to each occurred: one for each of the last days that had any.
    days: Days = ()


def saved(connection: Connection, meanings: Mapping[str, EventMeaning], now: Counted) -> Counted | None:
    """How far the counts in SQL go; None where there are none to go on with."""
    found = _state_of_first(connection, meanings, now)
    return None if found is None else found[0]


def _state_of_first(
    connection: Connection, meanings: Mapping[str, EventMeaning], now: Counted
) -> tuple[Counted, Days, str] | None:
    first = connection.execute(sa.select(item_counts).where(item_counts.c.part == 0)).first()
    if first is None or first.sha256 != _sha256(first.part, first.state, first.counts):
        return None
    state = json.loads(first.state)
    if state["format"] != FORMAT:
        return None
    at = datetime.fromisoformat
    counted = Counted(**state["counted"] | {"received_at": at(state["counted"]["received_at"])})
    days = tuple((mark, at(latest)) for mark, latest in state["days"])
    same = state == _state(connection, meanings, counted, days, state["parts"])
    return (counted, days, first.state) if same and goes_on(connection, counted, now) else None


def load(connection: Connection, meanings: Mapping[str, EventMeaning], now: Counted) -> ItemCounts | None:
    """The counts in SQL; None where there are none to go on with."""
    found = _state_of_first(connection, meanings, now)
    if found is None:
        return None
    counted, days, first_state = found
    by_item: dict[str, int] = {}
    parts = 0
    by_part = sa.select(item_counts).order_by(item_counts.c.part).execution_options(yield_per=1)
    with connection.execute(by_part) as rows:
        for part, state, written, sha256 in rows:
            if part != parts or state != first_state or sha256 != _sha256(part, state, written):
                return None
            by_item.update(json.loads(written))
            parts += 1
    return ItemCounts(by_item, counted, days) if parts == json.loads(first_state)["parts"] else None


def save(engine: Engine, meanings: Mapping[str, EventMeaning], counts: ItemCounts) -> None:
    """Put the counts in the place of those in SQL, unless these go further or something was erased meanwhile."""
    counted = counts.counted
    parts = max(1, -(-len(counts.by_item) // ITEMS_A_PART))
    with engine.connect() as connection:
        state = json.dumps(_state(connection, meanings, counted, counts.days, parts))
    # All that takes time is done before the transaction, which on SQLite everybody who writes waits for.
    rows = [
        {"part": part, "state": state, "counts": written, "sha256": _sha256(part, state, written)}
        for part, written in enumerate(_written(counts.by_item))
    ]
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            # Waits for others who save, and for erasures that have come to this table.
            connection.execute(sa.text("LOCK TABLE item_counts IN SHARE ROW EXCLUSIVE MODE"))
        now = look(connection)
        if not counted.newest or not goes_on(connection, counted, now):
            return
        there = saved(connection, meanings, now)
        if there is None or there.through < counted.through:
            connection.execute(sa.delete(item_counts))
            connection.execute(sa.insert(item_counts), rows)


def _written(by_item: Mapping[str, int]) -> Iterator[str]:
    left = iter(by_item.items())
    yield json.dumps(dict(islice(left, ITEMS_A_PART)))
    while part := dict(islice(left, ITEMS_A_PART)):
        yield json.dumps(part)


def _sha256(part: int, state: str, written: str) -> str:
    return hashlib.sha256(f"{part}\n{state}\n{written}".encode()).hexdigest()


def _state(
    connection: Connection, meanings: Mapping[str, EventMeaning], counted: Counted, days: Days, parts: int
) -> dict[str, Any]:
    """All that must be the same for the counts to be of use."""
    received_at = None if counted.received_at is None else rfc3339(counted.received_at)
    return {
        "format": FORMAT,
        "parts": parts,
        "meanings": {type_: asdict(meaning) for type_, meaning in sorted(meanings.items())},
        "cluster": cluster_of(connection),
        "counted": asdict(counted) | {"received_at": received_at},
        "days": [[mark, rfc3339(latest)] for mark, latest in days],
    }
