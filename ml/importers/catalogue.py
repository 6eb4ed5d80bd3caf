"""Items and users of a source: titles, categories and whatever else it knows about them."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet

from ml.ids import id_problem
from ml.importers.text import checked_lines

Problem = Callable[[int, str, str], None]

_YEAR = re.compile(r"\((\d{4})\)\s*$")
_MAX_TITLE_LENGTH = 1000
# What an export of the service adds; neither describes the item or user.
_KEPT_BY_THE_SERVICE = ("metadata", "hidden", "created_at", "updated_at")


@dataclass(frozen=True)
class CatalogueItem:
    """What a source knows about an item."""

    item_id: str
    title: str | None = None
    categories: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceUser:
    """What a source knows about a user."""

    user_id: str
    metadata: dict[str, Any] = field(default_factory=dict)


def movie(item_id: str, title: str, genres: Sequence[str]) -> CatalogueItem:
    """Make an item of a MovieLens film; the year at the end of its title goes to the metadata too."""
    year = _YEAR.search(title)
    categories = [genre for genre in genres if genre and genre not in ("unknown", "(no genres listed)")]
    return CatalogueItem(
        item_id, title.strip()[:_MAX_TITLE_LENGTH] or None, categories, {"year": int(year[1])} if year else {}
    )


def find_items_file(folder: Path, name: str = "items") -> Path | None:
    """Find a folder's items.parquet, items.csv or items.jsonl."""
    files = [folder / f"{name}.{ending}" for ending in ("parquet", "csv", "jsonl")]
    return next((file for file in files if file.is_file()), None)


def read_items(path: Path, problem: Problem) -> Iterator[CatalogueItem]:
    """Read items from Parquet, CSV or JSON Lines: item_id, title, categories (a list, or text split at |).

    Other columns go to the metadata. A row without a usable id goes to `problem`.
    """
    for line, record in _records(path, problem):
        item_id = _text(record.pop("item_id", None))
        reason = id_problem(item_id)
        if reason:
            problem(line, f"{path.name}: item id {reason}", str(record))
            continue
        title = _text(record.pop("title", None)).strip()[:_MAX_TITLE_LENGTH]
        categories = _categories(record.pop("categories", None))
        yield CatalogueItem(item_id, title or None, categories, _metadata(record))


def read_users(path: Path, problem: Problem) -> Iterator[SourceUser]:
    """Read users from Parquet, CSV or JSON Lines: user_id, and any other column as metadata."""
    for line, record in _records(path, problem):
        user_id = _text(record.pop("user_id", None))
        reason = id_problem(user_id)
        if reason:
            problem(line, f"{path.name}: user id {reason}", str(record))
            continue
        yield SourceUser(user_id, _metadata(record))


def _records(path: Path, problem: Problem) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".parquet":
        line = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=10_000):
            for record in batch.to_pylist():
                line += 1
                yield line, record
    elif path.suffix == ".jsonl":
        bad_text: Callable[[int, str], None] = lambda line, raw: problem(line, f"{path.name}: not UTF-8", raw)  # noqa: E731
        for line, text in checked_lines(path, "utf-8", bad_text):
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield line, record
            else:
                problem(line, f"{path.name}: the row is not a JSON object", text)
    else:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as opened:
            reader = csv.DictReader(opened)
            for record in reader:
                if None in record or None in record.values():
                    problem(reader.line_num, f"{path.name}: the row has another number of columns", str(record))
                else:
                    yield reader.line_num, dict(record)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _categories(value: Any) -> list[str]:
    names = value if isinstance(value, list) else _text(value).split("|")
    return list(dict.fromkeys(text for name in names if (text := _text(name).strip())))


def _metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    metadata = record.get("metadata")
    rest = {
        name: value for name, value in record.items() if name not in _KEPT_BY_THE_SERVICE and value not in (None, "")
    }
    if isinstance(metadata, str) and metadata:
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = {"metadata": metadata}
    # Times and other values that JSON has no word for become text.
    return json.loads(json.dumps({**rest, **(metadata if isinstance(metadata, dict) else {})}, default=str))  # type: ignore[no-any-return]
