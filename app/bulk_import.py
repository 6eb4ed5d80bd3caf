"""Bulk import of users and items over HTTP: JSON Lines or CSV, an outcome for every line."""

import csv
import json
import time
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from app import catalog_rows
from app.catalog_rows import Kind
from app.database import is_outage, writing
from app.errors import FieldError, Problem, unavailable
from app.identifiers import Category, ItemId, Metadata, Title, UserId, explain

# A transaction: short enough that feedback waits for none of them.
ROWS_A_COMMIT = 500
# SQLite's writers do not queue: between two transactions, the others get a chance.
PAUSE_SECONDS = 0.011
MAX_ERRORS_SHOWN = 100
MAX_CATEGORIES = 100


class UserLine(BaseModel):
    """A user as one line of an import; what it leaves out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    user_id: UserId
    metadata: Metadata = {}
    # An export has them; what is imported gets its own.
    created_at: object = Field(None, exclude=True)
    updated_at: object = Field(None, exclude=True)


class ItemLine(BaseModel):
    """An item as one line of an import; what it leaves out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    item_id: ItemId
    title: Title | None = None
    categories: list[Category] = Field([], max_length=MAX_CATEGORIES)
    hidden: bool = False
    metadata: Metadata = {}
    created_at: object = Field(None, exclude=True)
    updated_at: object = Field(None, exclude=True)


LINES: dict[Kind, type[UserLine] | type[ItemLine]] = {"user": UserLine, "item": ItemLine}


class LineError(BaseModel):
    """Why a line was not imported."""

    line: int = Field(description="Counted from 1; a CSV header is line 1.")
    field: str | None
    message: str


class ImportOutcome(BaseModel):
    """What a bulk import did."""

    rows: int
    created: int
    updated: int
    unchanged: int
    rejected: int
    errors: list[LineError] = Field(description="The first rejected lines, 100 at most.")


class _Line(NamedTuple):
    number: int
    row: dict[str, Any] | None
    error: LineError | None = None


def import_lines(engine: Engine, kind: Kind, format: str, body: IO[bytes]) -> ImportOutcome:  # noqa: A002
    """Import what a file holds, `jsonl` or `csv`, committing every 500 lines.

    Bad lines are counted and skipped; a Problem is raised where no line was good.
    """
    lines = _json_lines(body) if format == "jsonl" else _csv_lines(body, kind)
    outcome = ImportOutcome(rows=0, created=0, updated=0, unchanged=0, rejected=0, errors=[])
    checked = (_check(kind, line) for line in lines)
    while chunk := list(islice(checked, ROWS_A_COMMIT)):
        good = [line.row for line in chunk if line.row is not None]
        outcome.rows += len(chunk)
        outcome.rejected += len(chunk) - len(good)
        outcome.errors += [line.error for line in chunk if line.error][: MAX_ERRORS_SHOWN - len(outcome.errors)]
        if good:
            try:
                with writing(engine) as connection:
                    written = catalog_rows.merge(connection, kind, good)
            except SQLAlchemyError as error:
                if not is_outage(error):
                    raise
                done = outcome.created + outcome.updated + outcome.unchanged
                raise unavailable(
                    f"The database went away after {done} lines were imported; send the body again, as lines "
                    "that are imported twice change nothing."
                ) from error
            if engine.dialect.name == "sqlite":
                time.sleep(PAUSE_SECONDS)
            outcome.created += written.created
            outcome.updated += written.updated
            # Lines that name an id again are part of the row that the id became.
            outcome.unchanged += len(good) - written.created - written.updated
    if outcome.rejected and outcome.rejected == outcome.rows:
        raise Problem(
            422,
            "Nothing was imported",
            f"None of the {outcome.rows} lines can be imported.",
            errors=[
                FieldError(field=".".join(["body", str(e.line), *([e.field] if e.field else [])]), message=e.message)
                for e in outcome.errors
            ],
        )
    return outcome


def _rejected(number: int, message: str, field: str | None = None) -> _Line:
    return _Line(number, None, LineError(line=number, field=field, message=message))


def _check(kind: Kind, line: _Line) -> _Line:
    if line.row is None:
        return line
    try:
        checked = LINES[kind].model_validate(line.row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return _rejected(line.number, explain(dict(first)), ".".join(str(part) for part in first["loc"]) or None)
    return _Line(line.number, checked.model_dump(exclude_unset=True))


def _json_lines(body: IO[bytes]) -> Iterator[_Line]:
    for number, raw in enumerate(body, 1):
        text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):  # JSON or UTF-8 that is broken, numbers of thousands of digits, depth
            yield _rejected(number, "is not valid JSON")
            continue
        yield _Line(number, row) if isinstance(row, dict) else _rejected(number, "must be a JSON object")


def _csv_lines(body: IO[bytes], kind: Kind) -> Iterator[_Line]:
    # Bytes that are no UTF-8 become halves of surrogate pairs, which no field accepts.
    text = (
        (raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw).decode("utf-8", "surrogateescape")
        for number, raw in enumerate(body)
    )
    reader = csv.reader(text)
    header = _header(reader, kind)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _rejected(number, f"is not valid CSV: {error}")
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            yield _rejected(number, f"has {len(cells)} cells where the header has {len(header)}")
            continue
        try:
            yield _Line(number, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if cell})
        except (ValueError, RecursionError):
            yield _rejected(number, "must be a JSON object", "metadata")


def _header(reader: Iterator[list[str]], kind: Kind) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise Problem(422, detail=f"The header is not valid CSV: {error}", field="body.1") from error
    known = list(LINES[kind].model_fields)
    unknown = [name for name in header if name not in known]
    if unknown or f"{kind}_id" not in header or len(set(header)) != len(header):
        what = f"has the column {unknown[0]!a}" if unknown else f"lacks {kind}_id or names a column twice"
        detail = f"The first line must name the columns, {kind}_id and any of {', '.join(known[1:])}; it {what}."
        raise Problem(422, detail=detail, field="body.1")
    return header


def _cell(name: str, cell: str) -> Any:
    if name == "categories":
        return cell.split("|")
    return json.loads(cell) if name == "metadata" else cell
