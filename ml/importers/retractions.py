"""Rows that take an event back: files name it by its id, training by its place."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ml.importers.events import EVENT_SCHEMA, EventBatch, Reject
from ml.importers.source import Source
from ml.snapshots import RETRACT


class Retractions:
    """Takes the rows of type `retract` out of batches and keeps them until all events are read.

    An event may stand before or after the row that takes it back, so a source that has such rows is read once more.
    Memory grows with their number alone.
    """

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._lines: list[int] = []
        self._keys: list[tuple[str, str]] = []  # the user, and the event's id, which is unique to its user

    def without(self, batch: EventBatch) -> EventBatch:
        """Return the batch without its retractions, and keep these."""
        retracts = batch.retracts
        if retracts is None or retracts.null_count == len(retracts):
            return batch
        mask = pc.equal(batch.table.column("type").cast(pa.string()), RETRACT)
        taken = batch.table.filter(mask).cast(EVENT_SCHEMA)
        named = retracts.filter(_whole(mask))
        self._tables.append(taken)
        self._lines += batch.rows[_whole(mask).to_numpy(zero_copy_only=False)].tolist()
        self._keys += zip(taken.column("user_id").to_pylist(), named.to_pylist(), strict=True)
        others = _whole(pc.invert(mask))
        return replace(
            batch,
            table=batch.table.filter(others),
            rows=batch.rows[others.to_numpy(zero_copy_only=False)],
            event_ids=None if batch.event_ids is None else batch.event_ids.filter(others),
            retracts=retracts.filter(others),
        )

    def resolved(self, source: Source, first: int) -> tuple[pa.Table, list[Reject]]:
        """Return the retractions as EVENT_SCHEMA with a column `retracts`, and those that name no event of their user.

        `retracts` is the event's place among the events that are no retraction, counted from `first`.
        """
        places = self._places(source, first) if self._keys else {}
        found = [places.get(key) for key in self._keys]
        rejects = [
            Reject(line, "it takes back an event that this user does not have", f"{user}, {event}")
            for line, (user, event), place in zip(self._lines, self._keys, found, strict=True)
            if place is None
        ]
        table = pa.concat_tables([EVENT_SCHEMA.empty_table(), *self._tables])
        table = table.append_column("retracts", pa.array(found, pa.int64()))
        return table.filter(pc.is_valid(table.column("retracts"))), rejects

    def _places(self, source: Source, first: int) -> dict[tuple[str, str], int]:
        keys = set(self._keys)
        wanted = pa.array(sorted({event for _, event in keys}), pa.string())
        places: dict[tuple[str, str], int] = {}
        for batch in source.encoded():
            events = Retractions().without(batch)
            if events.event_ids is not None:
                near = np.flatnonzero(pc.is_in(events.event_ids, wanted).to_numpy(zero_copy_only=False))
                users = events.table.column("user_id").take(pa.array(near)).cast(pa.string()).to_pylist()
                ids = events.event_ids.take(pa.array(near)).to_pylist()
                for row, key in zip(near.tolist(), zip(users, ids, strict=True), strict=True):
                    if key in keys:
                        places.setdefault(key, first + row)
            first += len(events)
        return places


def _whole(mask: Any) -> Any:
    return mask.combine_chunks() if isinstance(mask, pa.ChunkedArray) else mask
