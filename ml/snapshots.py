"""Snapshots: immutable Parquet parts of events up to a watermark, with a content hash.

In a store, `parts/<sha256>.parquet` holds events and `snapshots/<hash>.json` names the parts of one snapshot. Both are
written whole under the hash of their content and never change. Any engine that writes Parquet can make them.
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ml.store import Store

FORMAT = 1

# `position` numbers the events, and `retracts` names the one that a `retract` takes back; foreign parts may lack both.
PART_SCHEMA = pa.schema(
    [
        pa.field("position", pa.int64()),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("type", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("retracts", pa.int64()),
    ]
)
_OPTIONAL = ("position", "retracts")
_TEXTS = ["user_id", "item_id", "type"]
_ENCODED_SCHEMA = pa.schema(
    [
        field.with_type(pa.dictionary(pa.int32(), pa.string())) if field.name in _TEXTS else field
        for field in PART_SCHEMA
    ]
)


@dataclass(frozen=True)
class EventMeaning:
    """What events of one type mean to training, history and serving."""

    weight: float = 1.0
    minimum_value: float | None = None  # an event with a lower value is no interaction
    in_history: bool = True  # trains, and is what Caser looks at
    excludes: bool = True  # leaves the item out of later answers

    def is_interaction(self, value: float | None) -> bool:
        """Tell whether an event with this value trains and enters the history; no value reaches no minimum."""
        return self.in_history and (self.minimum_value is None or (value is not None and value >= self.minimum_value))


ANY_TYPE = "*"
RETRACT = "retract"

# `retract` is not listed: it always takes back the event that it names.
DEFAULT_MEANINGS: Mapping[str, EventMeaning] = {
    ANY_TYPE: EventMeaning(),
    "impression": EventMeaning(in_history=False, excludes=False),
    "dislike": EventMeaning(in_history=False, excludes=True),
}


def meaning_of(meanings: Mapping[str, EventMeaning], type: str) -> EventMeaning:  # noqa: A002
    """Return what events of a type mean: its own entry, else the one of `*`, else the default."""
    return meanings.get(type) or meanings.get(ANY_TYPE) or EventMeaning()


class SnapshotDamaged(ValueError):  # noqa: N818 - the name the callers read
    """A snapshot or a part whose bytes are not those of its hash, or that is not there."""


@dataclass(frozen=True)
class PartRef:
    """A part by its content hash, with its size."""

    sha256: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class Snapshot:
    """Parts of events, what their types mean, and how far they reach.

    `watermark` holds `position` and `transaction_id` (what the database had settled), `time` (of the newest event) and
    `erasures_through` (the last erasure that the parts no longer show). `hash` covers parts, meanings and watermark.
    """

    hash: str
    parts: tuple[PartRef, ...]
    meanings: dict[str, EventMeaning]
    watermark: dict[str, Any]
    created_at: str
    parent: str | None = None

    @property
    def rows(self) -> int:
        """Number of events, retracts and retracted ones among them."""
        return sum(part.rows for part in self.parts)


def make_snapshot(
    parts: Sequence[PartRef],
    meanings: Mapping[str, EventMeaning],
    watermark: Mapping[str, Any],
    *,
    parent: str | None = None,
) -> Snapshot:
    """Put a snapshot together and compute its hash."""
    created_at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    content_hash = _content_hash(parts, meanings, watermark)
    return Snapshot(content_hash, tuple(parts), dict(meanings), dict(watermark), created_at, parent)


def _content_hash(parts: Sequence[PartRef], meanings: Mapping[str, EventMeaning], watermark: Mapping[str, Any]) -> str:
    content = {
        "parts": [asdict(part) for part in parts],
        "meanings": {kind: asdict(meaning) for kind, meaning in meanings.items()},
        "watermark": dict(watermark),
    }
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def part_name(sha256: str) -> str:
    """Where a part lies in a store."""
    return f"parts/{sha256}.parquet"


def snapshot_name(snapshot_hash: str) -> str:
    """Where a snapshot lies in a store."""
    return f"snapshots/{snapshot_hash}.json"


def write_part(store: Store, table: pa.Table) -> PartRef:
    """Write events as a part, under the hash of the Parquet file; the same events give the same part."""
    sink = pa.BufferOutputStream()
    pq.write_table(_conform(table), sink, compression="zstd", row_group_size=1 << 18)
    data = sink.getvalue().to_pybytes()
    part = PartRef(hashlib.sha256(data).hexdigest(), table.num_rows, len(data))
    store.put(part_name(part.sha256), data)
    return part


def _conform(table: pa.Table, schema: pa.Schema = PART_SCHEMA) -> pa.Table:
    """The table with the columns of PART_SCHEMA, in that order; ValueError if one is missing or of another kind."""
    columns = []
    for field in schema:
        if field.name in table.column_names:
            # Other engines write times to the nanosecond.
            columns.append(table[field.name].cast(field.type, safe=field.name != "time"))
        elif field.name in _OPTIONAL:
            columns.append(pa.nulls(table.num_rows, field.type))
        else:
            raise ValueError(f"a part needs the column {field.name}; it has {', '.join(table.column_names)}")
    for field, column in zip(schema, columns, strict=True):
        if not field.nullable and column.null_count:
            raise ValueError(f"the column {field.name} of a part must not hold nulls")
    return pa.Table.from_arrays(columns, schema=schema)


def publish(store: Store, snapshot: Snapshot) -> None:
    """Write a snapshot whose parts are all there; publishing it again changes nothing."""
    body = {
        "format": FORMAT,
        "hash": snapshot.hash,
        "parts": [asdict(part) for part in snapshot.parts],
        "meanings": {kind: asdict(meaning) for kind, meaning in snapshot.meanings.items()},
        "watermark": snapshot.watermark,
        "created_at": snapshot.created_at,
        "parent": snapshot.parent,
    }
    store.put_if_absent(snapshot_name(snapshot.hash), json.dumps(body, indent=1, allow_nan=False).encode())


def read_snapshot(store: Store, snapshot_hash: str) -> Snapshot:
    """Read a snapshot. Raises KeyError for an unknown one and SnapshotDamaged for one that was changed."""
    data = store.get(snapshot_name(snapshot_hash))
    try:
        body = json.loads(data)
        if body["format"] != FORMAT:
            raise SnapshotDamaged(f"snapshot {snapshot_hash} has format {body['format']}, this program reads {FORMAT}")
        snapshot = Snapshot(
            hash=body["hash"],
            parts=tuple(PartRef(**part) for part in body["parts"]),
            meanings={kind: EventMeaning(**meaning) for kind, meaning in body["meanings"].items()},
            watermark=body["watermark"],
            created_at=body["created_at"],
            parent=body["parent"],
        )
        content_hash = _content_hash(snapshot.parts, snapshot.meanings, snapshot.watermark)
    except SnapshotDamaged:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SnapshotDamaged(f"snapshot {snapshot_hash} cannot be read ({error}); take a new one") from error
    if not snapshot_hash == snapshot.hash == content_hash:
        raise SnapshotDamaged(f"snapshot {snapshot_hash} was changed after it was published; take a new one")
    return snapshot


def read_part(store: Store, part: PartRef, columns: Sequence[str] | None = None, *, encoded: bool = False) -> pa.Table:
    """Read one part after checking its hash; the columns are those of PART_SCHEMA, or the named ones of them.

    With `encoded`, strings come as the dictionaries that the file holds them by: twice as fast, in less memory.
    """
    try:
        data = store.get(part_name(part.sha256))
    except KeyError:
        raise SnapshotDamaged(f"part {part.sha256} is not in the store; take a new snapshot") from None
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise SnapshotDamaged(f"part {part.sha256} was changed after it was written; take a new snapshot")
    table = pq.read_table(pa.BufferReader(data), read_dictionary=_TEXTS if encoded else None)
    table = _conform(table, _ENCODED_SCHEMA if encoded else PART_SCHEMA)
    return table if columns is None else table.select(list(columns))


def read_parts(store: Store, snapshot: Snapshot, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read the parts of a snapshot one after another. Raises SnapshotDamaged."""
    for part in snapshot.parts:
        yield read_part(store, part, columns)


def subject_sha256(subject_id: str) -> str:
    """The hash that an erased user or item is remembered by."""
    return hashlib.sha256(subject_id.encode()).hexdigest()


def rewrite_without(store: Store, part: PartRef, users: Mapping[str, int], items: Mapping[str, int]) -> PartRef | None:
    """Leave out the events of erased users and items: the part itself if it holds none, None if nothing is left.

    Both map the SHA-256 of an id to the position up to which its events go.
    """
    table = read_part(store, part)
    gone = pc.or_(_erased(table, "user_id", users), _erased(table, "item_id", items))
    number = pc.sum(gone).as_py() or 0
    if number == 0:
        return part
    return None if number == table.num_rows else write_part(store, table.filter(pc.invert(gone)))


def _erased(table: pa.Table, column: str, through: Mapping[str, int]) -> pa.ChunkedArray:
    """Tell for each row whether its subject was erased after it."""
    ids = pc.unique(table[column])
    # Below all positions where nothing was erased; an event without a position always counts as erased before.
    limits = pa.array([through.get(subject_sha256(subject), -1) for subject in ids.to_pylist()], pa.int64())
    limit = limits.take(pc.index_in(table[column], ids).combine_chunks())
    return pc.less_equal(pc.fill_null(table["position"], 0), limit)


def collect(store: Store, keep: Collection[str], older_than_seconds: float) -> list[str]:
    """Remove snapshots that are not to be kept, and parts that no remaining snapshot names, once they are old enough.

    Returns the names of what was removed. The age protects a snapshot that is being made.
    """
    before = time.time() - older_than_seconds
    removed = []
    for name in store.list("snapshots"):
        if name.removeprefix("snapshots/").removesuffix(".json") not in keep and _is_old(store, name, before):
            store.delete(name)
            removed.append(name)
    named = set()
    for name in store.list("snapshots"):
        try:
            snapshot = read_snapshot(store, name.removeprefix("snapshots/").removesuffix(".json"))
        except KeyError:
            continue
        except SnapshotDamaged:
            return removed  # nobody can tell which parts it names
        named |= {part_name(part.sha256) for part in snapshot.parts}
    for name in store.list("parts"):
        if name not in named and _is_old(store, name, before):
            store.delete(name)
            removed.append(name)
    store.remove_leftovers(older_than_seconds)
    return removed


def _is_old(store: Store, name: str, before: float) -> bool:
    try:
        return store.modified(name) <= before
    except KeyError:
        return False
