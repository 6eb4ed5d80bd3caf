"""Files to snapshots: what `python -m ml import` does, so that `python -m ml train` needs no database."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import typer

from ml.importers import RejectLog, Source, open_source
from ml.importers.retractions import Retractions
from ml.importers.sequences import UsersLayout
from ml.snapshots import DEFAULT_MEANINGS, EventMeaning, Snapshot, make_snapshot, publish, write_part
from ml.store import Store, open_store

ROWS_PER_PART = 1_000_000


def import_snapshot(
    source: Source,
    store: Store,
    rejects: RejectLog,
    *,
    meanings: Mapping[str, EventMeaning] = DEFAULT_MEANINGS,
    on_progress: Callable[[float, int], None] = lambda _share, _rows: None,
) -> Snapshot:
    """Write a source's events as parts and publish them as a snapshot; the same source gives the same snapshot.

    Nothing names the parts before all are written, so an import that was killed leaves no snapshot behind. Raises
    TooManyRejects, and ValueError if not one event is left.
    """
    parts, position, newest = [], 0, None
    for table in _tables(source, rejects, on_progress):
        numbered = table.append_column("position", pa.array(range(position + 1, position + 1 + len(table)), pa.int64()))
        parts.append(write_part(store, numbered))
        position += len(table)
        latest = pc.max(table.column("time")).as_py()
        newest = latest if newest is None else max(newest, latest)
    rejects.judge()
    if newest is None:
        raise ValueError(f"{source.name} holds no event ({rejects.rejected:,} rows were bad)")
    moment = newest.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    watermark = {"position": position, "transaction_id": None, "time": moment, "erasures_through": 0}
    snapshot = make_snapshot(parts, meanings, watermark)
    publish(store, snapshot)
    return snapshot


def _tables(source: Source, rejects: RejectLog, on_progress: Callable[[float, int], None]) -> Iterator[pa.Table]:
    """Yield the events in tables of ROWS_PER_PART rows, the last one shorter, and at the end what takes events back."""
    retractions = Retractions()
    pending: list[pa.Table] = []
    waiting = rows = 0
    for whole in source.events():
        rejects.add(whole)
        batch = retractions.without(whole)
        rows += len(batch)
        on_progress(batch.progress, rows)
        pending.append(batch.table)
        waiting += len(batch)
        while waiting >= ROWS_PER_PART:
            joined = pa.concat_tables(pending)
            yield joined.slice(0, ROWS_PER_PART)
            pending = [joined.slice(ROWS_PER_PART)]
            waiting -= ROWS_PER_PART
    if waiting:
        yield pa.concat_tables(pending)
    taken_back, unknown = retractions.resolved(source, first=1)  # positions count from 1
    rejects.refuse(unknown)
    if len(taken_back):
        yield taken_back


def named_columns(texts: list[str]) -> dict[str, str]:
    """Read `user=COLUMN` texts; ValueError for one without a name."""
    columns = {}
    for text in texts:
        role, equals, name = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--column {text!r} names no column: write --column user=COLUMN")
        columns[role.strip()] = name.strip()
    return columns


def import_command(
    *,
    data: Path,
    store_url: str,
    format: str | None,  # noqa: A002
    columns: list[str],
    users: UsersLayout,
    max_bad_share: float,
    rejects_path: Path | None,
    as_json: bool,
) -> None:
    """The body of `ml import`."""
    started = time.perf_counter()
    source = open_source(data, format, named_columns(columns), users=users)
    typer.echo(f"reading {source.describe()}", err=True)
    if rejects_path is not None and rejects_path.resolve() in {file.resolve() for file in source.files}:
        raise ValueError(f"{rejects_path} holds the events: write the bad rows to another file")
    report = _Shown()
    with RejectLog(rejects_path, max_bad_share) as rejects:
        snapshot = import_snapshot(source, open_store(store_url), rejects, on_progress=report)
    report.end()
    seconds = time.perf_counter() - started
    if as_json:
        document = {
            "snapshot": snapshot.hash,
            "events": snapshot.rows,
            "rejected": rejects.rejected,
            "parts": len(snapshot.parts),
            "bytes": sum(part.bytes for part in snapshot.parts),
            "watermark": snapshot.watermark,
            "seconds": seconds,
        }
        typer.echo(json.dumps(document))
        return
    bad = f", {rejects.rejected:,} rows refused" if rejects.rejected else ""
    typer.echo(f"{snapshot.rows:,} events in {len(snapshot.parts)} parts{bad}, {seconds:.1f} s")
    typer.echo(f"snapshot {snapshot.hash}")
    typer.echo(f"train on it: python -m ml train --snapshot {snapshot.hash} --store {store_url} --recipe neumf")


class _Shown:
    """A counter on one line of a terminal, and a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.last = time.monotonic()

    def __call__(self, share: float, rows: int) -> None:
        now = time.monotonic()
        if now - self.last >= (0.1 if self.terminal else 10.0):
            self.last = now
            typer.echo(
                f"{chr(13) if self.terminal else ''}{share:4.0%}  {rows:,} events", nl=not self.terminal, err=True
            )

    def end(self) -> None:
        if self.terminal:
            typer.echo("\r\x1b[K", nl=False, err=True)


def simulate_command(
    *,
    out: Path,
    users: int,
    items: int,
    events: int,
    seed: int,
    format: str,  # noqa: A002
    as_json: bool,
) -> None:
    """The body of `ml simulate`."""
    from ml.simulate import simulate

    started = time.perf_counter()
    report = _Shown()
    simulation = simulate(users, items, events, seed, on_progress=lambda share: report(share, int(share * events)))
    files = simulation.write(out, format)
    report.end()
    seconds = time.perf_counter() - started
    if as_json:
        first, last = (
            datetime.fromtimestamp(int(moment) / 1_000_000, UTC).isoformat().replace("+00:00", "Z")
            for moment in (simulation.time[0], simulation.time[-1])
        )
        facts = {
            "users": users,
            "items": items,
            "events": len(simulation),
            "seed": seed,
            "from": first,
            "through": last,
        }
        typer.echo(json.dumps({**facts, "files": [str(file) for file in files], "seconds": seconds}))
        return
    typer.echo(f"{len(simulation):,} events of {users:,} users and {items:,} items in {out}, {seconds:.1f} s")
    typer.echo(f"try it: python -m ml experiment --data {out} --recipe caser")
