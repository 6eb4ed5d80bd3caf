"""Importers: files of many formats, read as streams of checked events."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ml.importers.catalogue import CatalogueItem, SourceUser
from ml.importers.detect import FORMATS, detect
from ml.importers.events import EVENT_SCHEMA, SYNTHETIC_START, EventBatch, Reading, Reject
from ml.importers.movielens import MovieLens
from ml.importers.rejects import MAX_BAD_SHARE, RejectLog, TooManyRejects
from ml.importers.retractions import Retractions
from ml.importers.sequences import Pairs, Predefined, Sequences, UsersLayout
from ml.importers.source import Source
from ml.importers.tables import Csv, JsonLines, Parquet, check_column_options
from ml.interactions import Interactions
from ml.snapshots import DEFAULT_MEANINGS, EventMeaning

__all__ = [
    "EVENT_SCHEMA",
    "FORMATS",
    "MAX_BAD_SHARE",
    "SYNTHETIC_START",
    "CatalogueItem",
    "EventBatch",
    "Loaded",
    "Reject",
    "RejectLog",
    "Source",
    "SourceUser",
    "TooManyRejects",
    "load",
    "load_interactions",
    "open_source",
]


def open_source(
    path: Path | str,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    *,
    users: UsersLayout = "auto",
    default_type: str | None = None,
    latest: datetime | None = None,
) -> Source:
    """Open files of events; the format is looked for where it is not given.

    `columns` names columns other than the usual ones: {"user": …, "item": …, "type": …, "value": …, "time": …}. `users`
    tells how `sequences` name users. Events without a type get `default_type`: `rating` for MovieLens, else `view`.
    Events after `latest` are refused. ValueError says what was found where files cannot be read as the format.
    """
    path = Path(path)
    columns = {} if columns is None else columns
    check_column_options(columns)
    chosen, files = detect(path, None if format in (None, "auto") else format)
    reading = Reading(default_type or ("rating" if chosen == "movielens" else "view"), latest)
    if chosen == "movielens":
        return MovieLens(path, files[0], reading)
    if chosen == "csv":
        return Csv(path, files[0], columns, reading)
    if chosen == "jsonl":
        return JsonLines(path, files[0], columns, reading)
    if chosen == "parquet":
        return Parquet(path, files, columns, reading)
    if chosen == "sequences":
        return Sequences(path, files, users, reading)
    if chosen == "pairs":
        return Pairs(path, files, reading)
    return Predefined(path, reading)


@dataclass(frozen=True)
class Loaded:
    """A source read into memory; `labels` is None, or 0, 1 or 2 a row: train, validation, test of `predefined`."""

    source: Source
    interactions: Interactions
    labels: npt.NDArray[np.int8] | None
    rejected: int


def load(
    source: Source,
    *,
    meanings: Mapping[str, EventMeaning] = DEFAULT_MEANINGS,
    rejects: RejectLog | None = None,
    on_progress: Callable[[float], None] = lambda _share: None,
) -> Loaded:
    """Read a source into interactions, less what is taken back; without times, their time is the row number.

    TooManyRejects ends the reading if more rows are bad than `rejects` allows.
    """
    log = rejects if rejects is not None else RejectLog()

    def tables() -> Iterator[pa.Table]:
        retractions = Retractions()
        for whole in source.encoded():
            log.add(whole)
            on_progress(whole.progress)
            batch = retractions.without(whole)
            table = batch.table
            if not source.has_times:
                table = table.set_column(table.schema.get_field_index("time"), "time", pa.array(batch.rows))
            yield table
        table, unknown = retractions.resolved(source, first=0)
        log.refuse(unknown)
        yield table

    interactions = Interactions.from_events(tables(), meanings)
    log.judge()
    labels = None
    if isinstance(source, Predefined):
        labels = np.searchsorted(source.part_ends(), interactions.time).astype(np.int8)
        interactions = replace(interactions, in_order=False)  # a given split is seldom one in time
    return Loaded(source, interactions, labels, log.rejected)


def load_interactions(
    path: Path | str,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    *,
    users: UsersLayout = "auto",
    meanings: Mapping[str, EventMeaning] = DEFAULT_MEANINGS,
    max_bad_share: float = MAX_BAD_SHARE,
    rejects_path: Path | None = None,
) -> tuple[Interactions, npt.NDArray[np.int8] | None]:
    """Read files into interactions, and for `predefined` the label of each: 0 train, 1 validation, 2 test."""
    source = open_source(path, format, columns, users=users)
    with RejectLog(rejects_path, max_bad_share) as log:
        loaded = load(source, meanings=meanings, rejects=log)
    if not len(loaded.interactions):
        raise ValueError(f"{path} holds no interaction ({loaded.rejected:,} rows were bad)")
    return loaded.interactions, loaded.labels
