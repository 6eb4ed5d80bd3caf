"""Refused rows: counted, written to a file, and an end to the reading where they are too many."""

import csv
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ml.importers.events import EventBatch, Reject

MAX_BAD_SHARE = 0.05
# A share of a few rows says nothing: a shorter source is judged at its end.
_JUDGED_FROM = 1_000


class TooManyRejects(ValueError):  # noqa: N818
    """More of the rows are bad than the reader allows."""


class RejectLog:
    """Counts good and refused rows of a source, and writes the refused to a CSV file: line, reason, raw."""

    def __init__(self, path: Path | None = None, max_bad_share: float = MAX_BAD_SHARE) -> None:
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"the share of bad rows lies between 0 and 1, not at {max_bad_share:g}")
        self.path = path
        self.max_bad_share = max_bad_share
        self.accepted = 0
        self.rejected = 0
        self.examples: list[Reject] = []
        self._file = None if path is None else path.open("w", newline="", encoding="utf-8")
        self._writer = None if self._file is None else csv.writer(self._file)
        if self._writer is not None:
            self._writer.writerow(Reject._fields)

    def add(self, batch: EventBatch) -> None:
        """Count a batch; TooManyRejects once at least 1,000 rows were read and too many of them are bad."""
        self.accepted += len(batch)
        self.add_rejects(batch.rejects)
        if self.accepted + self.rejected >= _JUDGED_FROM:
            self.judge()

    def add_rejects(self, rejects: Iterable[Reject]) -> None:
        """Count and write refused rows."""
        for reject in rejects:
            self.rejected += 1
            if len(self.examples) < 3:
                self.examples.append(reject)
            if self._writer is not None:
                self._writer.writerow(reject)

    def refuse(self, rejects: Iterable[Reject]) -> None:
        """Count and write rows that were good when they were added and are refused after all."""
        refused = list(rejects)
        self.accepted -= len(refused)
        self.add_rejects(refused)

    def judge(self) -> None:
        """Raise TooManyRejects if the share of bad rows is above the limit."""
        rows = self.accepted + self.rejected
        if self.rejected > self.max_bad_share * rows:
            examples = "".join(f"\n  line {line}: {reason}: {raw}" for line, reason, raw in self.examples)
            where = f"; all are in {self.path}" if self.path else ""
            raise TooManyRejects(
                f"{self.rejected:,} of {rows:,} rows are bad, more than {self.max_bad_share:.1%}{where}. "
                f"Is the format right? The first ones:{examples}"
            )

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "RejectLog":
        return self

    def __exit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
