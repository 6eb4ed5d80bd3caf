"""What every importer gives: checked batches of events, the catalogue, and what it knows about items and users."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ml.importers.catalogue import CatalogueItem, SourceUser
from ml.importers.events import EVENT_SCHEMA, EventBatch, RawRows, Reading, Reject, clean

BATCH_ROWS = 1 << 16


class Source(ABC):
    """Files of one format, read as often as asked, each time from the start."""

    format: str
    has_times: bool = True  # without times the order of the rows is the order of the events

    def __init__(self, path: Path, files: Sequence[Path], reading: Reading) -> None:
        self.path = path
        self.files = list(files)
        self.reading = reading
        self.name = path.resolve().name
        self.catalogue_rejects: list[Reject] = []

    @property
    def total_bytes(self) -> int:
        """Size of the files that hold the events."""
        return sum(file.stat().st_size for file in self.files)

    @abstractmethod
    def raw_rows(self) -> Iterator[RawRows]:
        """Yield the rows of events as the files hold them."""

    def encoded(self) -> Iterator[EventBatch]:
        """Yield batches as large as they are read, the strings of their tables dictionary-encoded."""
        for raw in self.raw_rows():
            yield clean(raw, self.reading)

    def events(self, batch_rows: int = BATCH_ROWS) -> Iterator[EventBatch]:
        """Yield the events in input order, as EVENT_SCHEMA; ValueError where the source cannot be read at all."""
        for batch in self.encoded():
            table = batch.table.cast(EVENT_SCHEMA)
            rejects = batch.rejects
            for start in range(0, max(len(batch), 1), batch_rows):
                rows = batch.rows[start : start + batch_rows]
                ids, retracts = (
                    None if column is None else column.slice(start, batch_rows)
                    for column in (batch.event_ids, batch.retracts)
                )
                part = table.slice(start, batch_rows)
                yield replace(batch, table=part, rows=rows, rejects=rejects, event_ids=ids, retracts=retracts)
                rejects = []

    def catalogue(self) -> Iterator[CatalogueItem]:
        """Yield what the source knows about items; bad rows go to `catalogue_rejects`."""
        return iter(())

    def users(self) -> Iterator[SourceUser]:
        """Yield what the source knows about users."""
        return iter(())

    def _bad_item(self, line: int, reason: str, raw: str) -> None:
        self.catalogue_rejects.append(Reject(line, reason, raw[:200]))

    def describe(self) -> str:
        """Say what was recognised."""
        return f"{self.name} as {self.format}{'' if self.has_times else ', without times: the order of rows counts'}"
