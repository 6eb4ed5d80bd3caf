"""Events as tables with named columns: CSV, JSON Lines and Parquet."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ml.importers.catalogue import CatalogueItem, SourceUser, find_items_file, read_items, read_users
from ml.importers.events import RawRows, Reading
from ml.importers.source import BATCH_ROWS, Source
from ml.importers.text import delimited_rows, json_rows, read_blocks

# What the columns may be called where nobody says otherwise; the first that is there counts.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "user": ("user_id", "userId", "user"),
    "item": ("item_id", "itemId", "movieId", "item"),
    "type": ("type", "event_type"),
    "value": ("value", "rating"),
    "time": ("occurred_at", "time", "timestamp"),
    "event_id": ("event_id",),
    "retracts": ("retracts",),
}
_REQUIRED = ("user", "item")
_LONGEST_HEADER = 1 << 20
_BLOCKS_LOOKED_AT = 16  # for a first row that is good


def check_column_options(columns: Mapping[str, str]) -> None:
    """Refuse an option for a part that events do not have."""
    for role in columns:
        if role not in COLUMN_NAMES:
            raise ValueError(f"no column can be named for {role!r}; there are {', '.join(COLUMN_NAMES)}")


def choose_columns(found: Sequence[str], named: Mapping[str, str], where: str) -> dict[str, str]:
    """Return the column of each part of an event; ValueError if one that is needed or named is not there."""
    chosen = {}
    for role, usual in COLUMN_NAMES.items():
        if role in named:
            if named[role] not in found:
                raise ValueError(f"{where} has no column {named[role]!r} for the {role}; it has {', '.join(found)}")
            chosen[role] = named[role]
        elif name := next((name for name in usual if name in found), None):
            chosen[role] = name
        elif role in _REQUIRED:
            raise ValueError(
                f"{where} has no column {usual[0]!r}; it has {', '.join(found)[:300]}. Say which one holds the {role}: "
                f"{role}=NAME"
            )
    return chosen


class _Table(Source):
    """A source whose catalogue, if there is one, is a file `items` beside the events."""

    def __init__(self, path: Path, files: Sequence[Path], reading: Reading) -> None:
        super().__init__(path, files, reading)
        self.folder = files[0].parent

    def catalogue(self) -> Iterator[CatalogueItem]:
        self.catalogue_rejects.clear()
        file = find_items_file(self.folder)
        return read_items(file, self._bad_item) if file else iter(())

    def users(self) -> Iterator[SourceUser]:
        file = find_items_file(self.folder, "users")
        return read_users(file, lambda _line, _reason, _raw: None) if file else iter(())


class Csv(_Table):
    """A CSV file with a header, its columns split by comma, semicolon or tab."""

    format = "csv"

    def __init__(self, path: Path, file: Path, columns: Mapping[str, str], reading: Reading) -> None:
        super().__init__(path, [file], reading)
        with file.open(encoding="utf-8-sig", errors="replace") as opened:
            first = opened.readline(_LONGEST_HEADER).rstrip("\r\n")
        if not first:
            raise ValueError(f"{file} has no header line; CSV needs one that names its columns")
        self._delimiter = max(",\t;", key=first.count)
        try:
            self._names = next(csv.reader([first], delimiter=self._delimiter))
        except csv.Error as error:
            raise ValueError(f"{file} has no header line that names its columns: {error}") from None
        chosen = choose_columns(self._names, columns, f"{file.name} (its first line)")
        self._columns = {role: self._names.index(name) for role, name in chosen.items()}
        self.has_times = "time" in chosen

    def raw_rows(self) -> Iterator[RawRows]:
        """Yield the rows below the header."""
        for block in read_blocks(self.files[0], skip_lines=1, quoted=True):
            yield delimited_rows(block, self._delimiter, len(self._names), self._columns, True)


class JsonLines(_Table):
    """One JSON object a line."""

    format = "jsonl"

    def __init__(self, path: Path, file: Path, columns: Mapping[str, str], reading: Reading) -> None:
        super().__init__(path, [file], reading)
        self._fields = {role: (columns[role],) if role in columns else names for role, names in COLUMN_NAMES.items()}
        blocks = islice(read_blocks(file, block_bytes=1 << 16), _BLOCKS_LOOKED_AT)
        first = next((rows for block in blocks if len((rows := json_rows(block, self._fields)).rows)), None)
        if first is not None:
            for role in _REQUIRED:
                if getattr(first, role).null_count == len(first.rows):
                    raise ValueError(
                        f"{file.name} has no field {self._fields[role][0]!r}. Say which one holds the {role}: "
                        f"{role}=NAME"
                    )
            self.has_times = first.time is not None and first.time.null_count < len(first.rows)

    def raw_rows(self) -> Iterator[RawRows]:
        """Yield the objects."""
        fields = {role: names for role, names in self._fields.items() if role != "time" or self.has_times}
        for block in read_blocks(self.files[0]):
            yield json_rows(block, fields)


class Parquet(_Table):
    """A Parquet file, or a folder of them in the order of their names."""

    format = "parquet"

    def __init__(self, path: Path, files: Sequence[Path], columns: Mapping[str, str], reading: Reading) -> None:
        super().__init__(path, files, reading)
        self._columns: dict[str, str] = {}
        for file in files:
            try:
                names = pyarrow.parquet.read_schema(file).names
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file} is not a Parquet file: {error}") from None
            chosen = choose_columns(names, columns, file.name)
            if twice := [name for name in chosen.values() if names.count(name) > 1]:
                raise ValueError(f"{file.name} has several columns {twice[0]!r}; give them different names")
            if self._columns and chosen != self._columns:
                raise ValueError(f"{file.name} has other columns than {files[0].name}; all files need the same")
            self._columns = chosen
        self.has_times = "time" in self._columns

    def raw_rows(self) -> Iterator[RawRows]:
        """Yield the rows."""
        done = 0
        total = max(sum(pyarrow.parquet.read_metadata(file).num_rows for file in self.files), 1)
        for file in self.files:
            with pyarrow.parquet.ParquetFile(file) as opened:
                wanted = list(dict.fromkeys(self._columns.values()))
                for batch in opened.iter_batches(batch_size=4 * BATCH_ROWS, columns=wanted):
                    rows = np.arange(done + 1, done + 1 + batch.num_rows)
                    done += batch.num_rows
                    parts = {role: batch.column(name) for role, name in self._columns.items()}
                    yield RawRows(
                        user=parts["user"],
                        item=parts["item"],
                        type=parts.get("type"),
                        value=parts.get("value"),
                        time=parts.get("time"),
                        rows=rows,
                        raw=lambda index, parts=parts: ", ".join(str(column[index]) for column in parts.values()),  # type: ignore[misc]
                        progress=done / total,
                        event_id=parts.get("event_id"),
                        retracts=parts.get("retracts"),
                    )
