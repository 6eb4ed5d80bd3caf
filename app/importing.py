"""Files to SQL: events with ids derived from where they stand, titles and categories, and a file of refused rows.

An import that was killed is finished by running it again: every row gets the same event_id as before, and an event
that is stored is not stored twice.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import typer
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from app.catalogue_writer import upsert_items, upsert_users
from app.event_writer import EVENT_COLUMNS, open_writer
from ml.importers import EventBatch, RejectLog, Source, open_source

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
    for changed in upsert_items(engine, source.catalogue()):
        report.items += changed
    for changed in upsert_users(engine, source.users()):
        report.users += changed

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


class _Buffer(NamedTuple):
    table: pa.Table
    rows: npt.NDArray[np.int64]
    progress: float


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
    return _Buffer(table, np.concatenate([batch.rows for batch in batches]), progress)


def _events(buffer: _Buffer, source: Source) -> pa.Table:
    """The rows as `app.event_writer` takes them: with event ids, and stably sorted by user.

    The order of input is kept within each user, which is all that an order of interactions leans on.
    """
    table = buffer.table
    encoded = {name: _encoded(table[name]) for name in ("user_id", "item_id", "type")}
    columns = {
        **{name: table[name].cast(pa.string()) for name in ("user_id", "item_id", "type")},
        "value": table["value"],
        "event_id": _event_ids(buffer, encoded, source),
        "occurred_at": table["time"].cast(pa.timestamp("us")),
        "retracts": pa.nulls(table.num_rows, pa.string()),
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
        parts.append(f"{report.items:,} items described")
    return f"Imported {report.source} ({report.format}): {', '.join(parts)}, in {report.seconds:.1f} s."


def figures(report: ImportReport) -> str:
    """The running figures that stand beside a progress bar."""
    done = report.stored + report.duplicates
    return f"{done:,} events, {done / max(report.seconds, 1e-6):,.0f}/s"


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
    report: ImportReport | None = None

    def follow(current: ImportReport, share: float) -> None:
        nonlocal report
        report = current
        show(share, figures(current))

    try:
        source = open_source(path, format=format, columns=columns, latest=datetime.now(UTC) + FUTURE_TOLERANCE)
        migrate(engine)
        with RejectLog(rejects, max_bad_share) as log, shown(f"Importing {path.name}") as show:
            report = import_source(engine, source, rejects=log, on_progress=follow)
    except (ValueError, OSError, DBAPIError) as error:
        reason = f"the database failed: {error.orig}" if isinstance(error, DBAPIError) else str(error)
        typer.echo(f"Error: {reason}", err=True)
        if report is not None:
            typer.echo(f"{report.stored:,} events were stored; the next import of this file adds the others.", err=True)
        raise typer.Exit(1) from error
    finally:
        engine.dispose()
    details: dict[str, Any] = asdict(report)
    typer.echo(json.dumps(details) if as_json else summary(report))
