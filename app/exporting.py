"""SQL to files: events, items and users as JSON Lines, CSV or Parquet, streamed in bounded memory.

`shortlist import` reads back what this writes.
"""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
import typer
from sqlalchemy.engine import Engine

from app.tables import events, items, users
from app.times import rfc3339

PAGE = 10_000

_TEXT, _TIME = pa.string(), pa.timestamp("us", tz="UTC")
# What is exported, in the order of the columns; JSON columns are text in CSV and Parquet, but for lists of strings.
SCHEMAS: dict[str, pa.Schema] = {
    "events": pa.schema(
        [
            ("event_id", _TEXT),
            ("user_id", _TEXT),
            ("item_id", _TEXT),
            ("type", _TEXT),
            ("value", pa.float64()),
            ("occurred_at", _TIME),
            ("received_at", _TIME),
            ("recommendation_id", _TEXT),
            ("context", _TEXT),
            ("retracts", _TEXT),
        ]
    ),
    "items": pa.schema(
        [
            ("item_id", _TEXT),
            ("title", _TEXT),
            ("categories", pa.list_(_TEXT)),
            ("hidden", pa.bool_()),
            ("metadata", _TEXT),
            ("created_at", _TIME),
            ("updated_at", _TIME),
        ]
    ),
    "users": pa.schema([("user_id", _TEXT), ("metadata", _TEXT), ("created_at", _TIME), ("updated_at", _TIME)]),
}
# Each table with the column that pages it: events leave in the order in which they came.
TABLES: dict[str, tuple[sa.Table, sa.Column[Any]]] = {
    "events": (events, events.c.position),
    "items": (items, items.c.item_id),
    "users": (users, users.c.user_id),
}

Row = dict[str, Any]


def rows(engine: Engine, what: str) -> Iterator[list[Row]]:
    """The rows of a table in pages, each read in a transaction of its own: no long read holds up the database."""
    table, key = TABLES[what]
    columns = [table.c[name] for name in SCHEMAS[what].names]
    query = sa.select(key.label("page_key"), *columns).order_by(key).limit(PAGE)
    last: Any = None
    while True:
        with engine.connect() as connection:
            page = connection.execute(query if last is None else query.where(key > last)).mappings().all()
        if not page:
            return
        last = page[-1]["page_key"]
        yield [{name: row[name] for name in SCHEMAS[what].names} for row in page]


def _json_text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


class Sink(Protocol):
    def write(self, page: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


class JsonLinesSink:
    def __init__(self, out: IO[bytes], _schema: pa.Schema) -> None:
        self._out = out

    def write(self, page: Sequence[Row]) -> None:
        lines = []
        for row in page:
            shown = {name: rfc3339(value) if isinstance(value, datetime) else value for name, value in row.items()}
            lines.append(json.dumps({k: v for k, v in shown.items() if v is not None}, ensure_ascii=False))
        self._out.write(("\n".join(lines) + "\n").encode())

    def close(self) -> None:
        pass


class CsvSink:
    """CSV with a header; `|` between categories (one that holds a `|` survives in the other formats alone)."""

    def __init__(self, out: IO[bytes], schema: pa.Schema) -> None:
        self._out, self._names = out, schema.names
        self._put([self._names])

    def _put(self, table: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        self._out.write(text.getvalue().encode())

    @staticmethod
    def _cell(value: Any) -> Any:
        if isinstance(value, datetime):
            return rfc3339(value)
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            return "|".join(value)
        return _json_text(value) if isinstance(value, dict) else value

    def write(self, page: Sequence[Row]) -> None:
        self._put([[self._cell(row[name]) for name in self._names] for row in page])

    def close(self) -> None:
        pass


class ParquetSink:
    def __init__(self, out: IO[bytes], schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(out, schema, compression="zstd")

    def write(self, page: Sequence[Row]) -> None:
        plain = [{k: _json_text(v) if isinstance(v, dict) else v for k, v in row.items()} for row in page]
        self._writer.write_table(pa.Table.from_pylist(plain, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


SINKS: dict[str, Callable[[IO[bytes], pa.Schema], Sink]] = {
    "jsonl": JsonLinesSink,
    "csv": CsvSink,
    "parquet": ParquetSink,
}


def export(engine: Engine, what: str, format: str, out: IO[bytes]) -> int:  # noqa: A002
    """Write a table to an open file; returns the number of rows."""
    sink = SINKS[format](out, SCHEMAS[what])
    count = 0
    for page in rows(engine, what):
        sink.write(page)
        count += len(page)
    sink.close()
    return count


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when all of it is written, and not at all on an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def export_command(what: str, *, format: str, out: str) -> None:  # noqa: A002
    """The body of `shortlist export`."""
    from app.database import create_engine
    from app.settings import Settings

    for value, known, name in ((what, TABLES, "WHAT"), (format, SINKS, "--format")):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=name)
    engine = create_engine(Settings().resolved_database_url)
    try:
        if out == "-":
            export(engine, what, format, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            with whole_file(Path(out)) as file:
                count = export(engine, what, format, file)
            typer.echo(f"Exported {count:,} {what} to {out}.", err=True)
    except sa.exc.DBAPIError as error:
        typer.echo(f"Error: the database cannot be read ({error.orig}). Is it migrated? shortlist migrate", err=True)
        raise typer.Exit(1) from error
    except BrokenPipeError:
        # The reader has seen enough, as in `| head`; the interpreter must not try to flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    finally:
        engine.dispose()
