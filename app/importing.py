"""Files to SQL: events with ids derived from where they stand, titles and categories, and a file of refused rows.

An import that was killed is finished by running it again: every row gets the same event_id as before, and an event
that is stored is not stored twice.
"""

import csv
import hashlib
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from pydantic import ValidationError
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from app import catalog_rows
from app.bulk_import import LINES, PAUSE_SECONDS, ROWS_A_COMMIT, import_lines
from app.catalog_rows import Kind
from app.database import writing
from app.errors import Problem
from app.identifiers import explain
from app.imported_events import EVENT_COLUMNS, open_writer
from ml.importers import EventBatch, Reject, RejectLog, Source, TooManyRejects, open_source

# Rows that are sorted by user before they are written: the more, the fewer pages of the index a chunk touches.
BUFFERED_ROWS = 1 << 18
# As for feedback: clocks differ a little, and a time further ahead is a mistake.
FUTURE_TOLERANCE = timedelta(minutes=5)


@dataclass
class ImportReport:
    """What an import did."""

    source: str
    format: str
    stored: int = 0
    duplicates: int = 0  # stored before, as by an import that was killed
    rejected: int = 0
    items: int = 0  # whose title, categories or metadata are new or changed
    users: int = 0  # whose metadata are new or changed
    seconds: float = 0.0


OnProgress = Callable[[ImportReport, float], None]


def _silent(_report: ImportReport, _share: float) -> None:
    pass


def import_source(
    engine: Engine, source: Source, *, rejects: RejectLog | None = None, on_progress: OnProgress = _silent
) -> ImportReport:
    """Store a source's catalogue and events; `on_progress` hears of every commit, and the share of the input done.

    Raises TooManyRejects, having stored what came before.
    """
    begun = time.monotonic()
    log = rejects if rejects is not None else RejectLog()
    report = ImportReport(source.name, source.format)
    items = (
        {"item_id": item.item_id, **_said(item.title, item.categories, item.metadata)} for item in source.catalogue()
    )
    report.items = _merge(engine, "item", items, log)
    users = ({"user_id": user.user_id, **_said(metadata=user.metadata)} for user in source.users())
    report.users = _merge(engine, "user", users, log)
    log.add_rejects(source.catalogue_rejects)
    report.rejected = log.rejected

    def judged() -> Iterator[EventBatch]:
        for batch in source.encoded():
            log.add(batch)
            report.rejected = log.rejected
            yield batch

    share = 0.0
    with closing(open_writer(engine)) as writer:
        for buffer in _buffers(judged()):
            done = 0
            for count, stored in writer.write(_events(buffer, source)):
                done += count
                report.stored += stored
                report.duplicates += count - stored
                report.seconds = time.monotonic() - begun
                on_progress(report, share + (buffer.progress - share) * done / buffer.table.num_rows)
            share = buffer.progress
    report.seconds = time.monotonic() - begun
    log.judge()
    return report


def _said(title: str | None = None, categories: object = None, metadata: object = None) -> dict[str, Any]:
    """What a source says of an item or user: no title is overwritten by none."""
    known = {"title": title, "categories": categories, "metadata": metadata}
    return {name: value for name, value in known.items() if value}


def _merge(engine: Engine, kind: Kind, rows: Iterable[dict[str, Any]], log: RejectLog) -> int:
    """Add users or items and what is known of them; returns the number that are new or changed."""
    changed = 0
    checked = (row for number, row in enumerate(rows, 1) if _is_valid(kind, number, row, log))
    while page := list(islice(checked, ROWS_A_COMMIT)):
        with writing(engine) as connection:
            written = catalog_rows.merge(connection, kind, page)
        changed += written.created + written.updated
        if engine.dialect.name == "sqlite":
            time.sleep(PAUSE_SECONDS)
    return changed


def _is_valid(kind: Kind, number: int, row: dict[str, Any], log: RejectLog) -> bool:
    try:
        LINES[kind].model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        log.add_rejects([Reject(number, f"{kind}: {first['loc'][0]}: {explain(dict(first))}", str(row)[:200])])
        return False
    return True


class _Buffer(NamedTuple):
    table: pa.Table
    rows: npt.NDArray[np.int64]
    progress: float
    event_ids: pa.Array
    retracts: pa.Array


def _buffers(batches: Iterable[EventBatch]) -> Iterator[_Buffer]:
    """Join batches until they are worth sorting."""
    held: list[EventBatch] = []
    count, progress = 0, 0.0
    for batch in batches:
        progress = batch.progress
        if len(batch):
            held.append(batch)
            count += len(batch)
        if count >= BUFFERED_ROWS:
            yield _joined(held, progress)
            held, count = [], 0
    if held:
        yield _joined(held, progress)


def _joined(batches: list[EventBatch], progress: float) -> _Buffer:
    table = pa.concat_tables([batch.table for batch in batches]).unify_dictionaries().combine_chunks()
    return _Buffer(
        table,
        np.concatenate([batch.rows for batch in batches]),
        progress,
        _named([(batch.event_ids, len(batch)) for batch in batches]),
        _named([(batch.retracts, len(batch)) for batch in batches]),
    )


def _named(parts: Iterable[tuple[pa.Array | None, int]]) -> pa.Array:
    return pa.concat_arrays([pa.nulls(rows, pa.string()) if ids is None else ids for ids, rows in parts])


def _events(buffer: _Buffer, source: Source) -> pa.Table:
    """The rows as `app.imported_events` takes them: with event ids, and stably sorted by user.

    The order of input is kept within each user, which is all that an order of interactions leans on.
    """
    table = buffer.table
    encoded = {name: _encoded(table[name]) for name in ("user_id", "item_id", "type")}
    columns = {
        **{name: table[name].cast(pa.string()) for name in ("user_id", "item_id", "type")},
        "value": table["value"],
        "event_id": pc.coalesce(buffer.event_ids, _event_ids(buffer, encoded, source)),
        "occurred_at": table["time"].cast(pa.timestamp("us")),
        "retracts": buffer.retracts,
    }
    codes, words = encoded["user_id"]
    ranks = np.empty(len(words), np.int64)
    ranks[pc.sort_indices(words).to_numpy()] = np.arange(len(words))
    order = np.argsort(ranks[codes], kind="stable")
    return pa.table({name: columns[name] for name in EVENT_COLUMNS}).take(pa.array(order))


def _encoded(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], pa.Array]:
    encoded = column.combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


def _event_ids(
    buffer: _Buffer, encoded: Mapping[str, tuple[npt.NDArray[np.int64], pa.Array]], source: Source
) -> pa.Array:
    """`import-<source>-<row>-<content>`: the same when the file is imported again, also after rows were appended.

    The content is part of it so that another file under the same name is not taken for this one.
    """
    prefix = hashlib.sha256(f"{source.format}\0{source.name}".encode()).hexdigest()[:12]
    content = np.zeros(len(buffer.rows), np.uint64)
    for codes, words in encoded.values():
        checksums = np.array([zlib.crc32(word.encode()) for word in words.to_pylist()], np.uint64)
        _mix(content, checksums[codes])
    values = pc.fill_null(buffer.table["value"], float("nan")).to_numpy()
    _mix(content, np.where(np.isnan(values), np.uint64(1), values.view(np.uint64)))
    _mix(content, buffer.table["time"].cast(pa.int64()).to_numpy().view(np.uint64))
    return pc.binary_join_element_wise(
        f"import-{prefix}",
        pa.array(buffer.rows).cast(pa.string()),
        pa.array(content >> np.uint64(32)).cast(pa.string()),
        "-",
    )


def _mix(content: npt.NDArray[np.uint64], more: npt.NDArray[np.uint64]) -> None:
    """Hash another column into each row, in place (a multiply-and-fold, as in splitmix64)."""
    content ^= more
    content *= np.uint64(0x9E3779B97F4A7C15)
    content ^= content >> np.uint64(29)
    content *= np.uint64(0xBF58476D1CE4E5B9)


def summary(report: ImportReport) -> str:
    """One sentence for people."""
    parts = [f"{report.stored:,} events stored"]
    if report.duplicates:
        parts.append(f"{report.duplicates:,} stored before")
    if report.rejected:
        parts.append(f"{report.rejected:,} bad rows left out")
    if report.items:
        parts.append(f"{report.items:,} items added or changed")
    if report.users:
        parts.append(f"{report.users:,} users added or changed")
    return f"Imported {report.source} ({report.format}): {', '.join(parts)}, in {report.seconds:.1f} s."


def figures(report: ImportReport) -> str:
    """The running figures that stand beside a progress bar."""
    done = report.stored + report.duplicates
    return f"{done:,} events, {done / max(report.seconds, 1e-6):,.0f}/s"


def catalogue_kind(path: Path) -> Kind | None:
    """Whether a file holds items or users, as `shortlist export` writes them, rather than events."""
    if not path.is_file():
        return None
    if path.suffix == ".parquet":
        names = set(pq.read_schema(path).names)
    elif path.suffix in (".csv", ".jsonl"):
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            first = file.readline(1 << 20)
        names = set(next(csv.reader([first]), [])) if path.suffix == ".csv" else _keys(first)
    else:
        return None
    kinds: dict[Kind, str] = {"item": "item_id", "user": "user_id"}
    found: list[Kind] = [kind for kind, column in kinds.items() if column in names]
    # With both ids it holds events; with other columns it may, under names that the options give.
    plain = {"item_id", "title", "categories", "hidden", "user_id", "metadata", "created_at", "updated_at"}
    return found[0] if len(found) == 1 and names <= plain else None


def _keys(line: str) -> set[str]:
    try:
        record = json.loads(line)
    except ValueError:
        return set()
    return set(record) if isinstance(record, dict) else set()


def import_catalogue(engine: Engine, path: Path, kind: Kind, *, rejects: RejectLog | None = None) -> ImportReport:
    """Store a file of items or users; what a line leaves out stays as it is. Raises TooManyRejects at the end."""
    begun = time.monotonic()
    log = rejects if rejects is not None else RejectLog()
    report = ImportReport(path.name, path.suffix.removeprefix("."))
    with ExitStack() as stack:
        if path.suffix == ".parquet":
            file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            _as_json_lines(path, file)
            file.seek(0)
        else:
            file = stack.enter_context(path.open("rb"))
        try:
            outcome = import_lines(engine, kind, "csv" if path.suffix == ".csv" else "jsonl", file)
        except Problem as problem:
            raise TooManyRejects(
                "; ".join([problem.detail or problem.title, *map(str, problem.errors[:3])])
            ) from problem
    log.accepted += outcome.rows - outcome.rejected
    log.add_rejects(Reject(error.line, error.message, error.field or "") for error in outcome.errors)
    report.rejected = log.rejected = outcome.rejected
    changed = outcome.created + outcome.updated
    report.items, report.users = (changed, 0) if kind == "item" else (0, changed)
    report.seconds = time.monotonic() - begun
    log.judge()
    return report


def _as_json_lines(path: Path, out: IO[bytes]) -> None:
    with pq.ParquetFile(path) as opened:
        for batch in opened.iter_batches(batch_size=10_000):
            for row in batch.to_pylist():
                if isinstance(row.get("metadata"), str):
                    row["metadata"] = json.loads(row["metadata"])
                said = {name: value for name, value in row.items() if value is not None}
                out.write(json.dumps(said, default=str).encode() + b"\n")


def import_command(
    path: Path,
    *,
    format: str,  # noqa: A002
    columns: dict[str, str],
    max_bad_share: float,
    rejects: Path | None,
    as_json: bool,
) -> None:
    """The body of `shortlist import`."""
    from app.database import create_engine
    from app.migrations import migrate
    from app.progress import shown
    from app.settings import Settings

    engine = create_engine(Settings().resolved_database_url)
    failure = engine.dialect.loaded_dbapi.Error  # the bulk writers speak to the driver without SQLAlchemy
    report: ImportReport | None = None

    def follow(current: ImportReport, share: float) -> None:
        nonlocal report
        report = current
        show(share, figures(current))

    try:
        kind = None if columns or format not in ("auto", "csv", "jsonl", "parquet") else catalogue_kind(path)
        latest = datetime.now(UTC) + FUTURE_TOLERANCE
        source = None if kind else open_source(path, format=format, columns=columns, latest=latest)
        migrate(engine)
        with RejectLog(rejects, max_bad_share) as log, shown(f"Importing {path.name}") as show:
            if kind:
                report = import_catalogue(engine, path, kind, rejects=log)
            elif source:
                report = import_source(engine, source, rejects=log, on_progress=follow)
    except (ValueError, OSError, DBAPIError, failure) as error:
        said = error.orig if isinstance(error, DBAPIError) else error
        reason = f"the database failed: {said}" if isinstance(said, failure) else str(error)
        typer.echo(f"Error: {reason}", err=True)
        if report is not None:
            typer.echo(f"{report.stored:,} events were stored; the next import of this file adds the others.", err=True)
        raise typer.Exit(1) from error
    finally:
        engine.dispose()
    assert report is not None, "a file holds a catalogue or events"
    details: dict[str, Any] = asdict(report)
    typer.echo(json.dumps(details) if as_json else summary(report))
