"""Interactions: who took what, when, as dense arrays sorted by user and time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ml.ids import IdMap, Strings
from ml.snapshots import RETRACT, EventMeaning, meaning_of

if TYPE_CHECKING:
    import pandas as pd

    from ml.distributed import Processes

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Interactions:
    """Events that count as positives, sorted by (user_index, time, input position).

    All arrays hold one value a row: the indices int32, `time` int64 in microseconds since the epoch (the input
    position where the source has no times), `weight` float32, or None where every weight is 1. `in_order` is False
    where the source's order says nothing about what came first, so that no row is more recent than another.
    """

    users: IdMap
    items: IdMap
    user_index: npt.NDArray[np.int32]
    item_index: npt.NDArray[np.int32]
    time: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32] | None = None
    in_order: bool = True

    def __len__(self) -> int:
        return len(self.user_index)

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return len(self.items)

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each user's rows start: user u owns rows offsets[u]:offsets[u + 1], oldest first."""
        counts = np.bincount(self.user_index, minlength=self.num_users)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    def history(self, user_index: int) -> npt.NDArray[np.int32]:
        """Return a user's items, oldest first."""
        return self.item_index[self.offsets[user_index] : self.offsets[user_index + 1]]

    def select(self, rows: Array) -> "Interactions":
        """Keep the rows of a boolean mask or of row numbers, in the order they have here."""
        rows = np.asarray(rows)
        if rows.dtype != np.bool_:
            rows = np.sort(rows)
        weight = None if self.weight is None else self.weight[rows]
        return replace(
            self,
            user_index=self.user_index[rows],
            item_index=self.item_index[rows],
            time=self.time[rows],
            weight=weight,
        )

    def merge(self, other: "Interactions") -> "Interactions":
        """Join with interactions over the same id maps; where times tie, these rows come before the other's."""
        if not (self.users.equals(other.users) and self.items.equals(other.items)):
            raise ValueError("interactions over different id maps cannot be merged; build both from one source")
        weight = None
        if self.weight is not None or other.weight is not None:
            weight = np.concatenate([_weights_of(self), _weights_of(other)])
        merged = _sorted(
            self.users,
            self.items,
            np.concatenate([self.user_index, other.user_index]),
            np.concatenate([self.item_index, other.item_index]),
            np.concatenate([self.time, other.time]),
            weight,
        )
        return replace(merged, in_order=self.in_order and other.in_order)

    @classmethod
    def from_arrays(
        cls, user_ids: Strings, item_ids: Strings, time: Any = None, weight: Any = None, position: Array | None = None
    ) -> "Interactions":
        """Build from one id of a user and of an item a row, in input order; without `time` the order is the time."""
        users, user_index = _encode([_strings(user_ids)])
        items, item_index = _encode([_strings(item_ids)])
        times = np.arange(len(user_index), dtype=np.int64) if time is None else np.asarray(time, np.int64)
        weights = None if weight is None else np.asarray(weight, np.float32)
        if not len(user_index) == len(item_index) == len(times) or (weights is not None and len(weights) != len(times)):
            raise ValueError("user_ids, item_ids, time and weight need the same length")
        return _sorted(users, items, user_index, item_index, times, weights, position)

    @classmethod
    def from_frame(
        cls,
        frame: "pd.DataFrame",
        *,
        user: str = "user_id",
        item: str = "item_id",
        time: str | None = "time",
        weight: str | None = None,
    ) -> "Interactions":
        """Build from a data frame, one interaction a row, by the names of its columns.

        Ids are taken as strings; times are datetimes (without a zone: UTC) or whole microseconds, and with `time=None`
        the order of the rows is the time. ValueError for a column that is not there or a missing value.
        """
        import pandas as pd  # here alone: a serving process never needs it

        names = [name for name in (user, item, time, weight) if name is not None]
        if absent := [name for name in names if name not in frame.columns]:
            raise ValueError(
                f"the frame has no column {', '.join(absent)}; it has {', '.join(map(str, frame.columns))}"
            )
        if missing := [name for name in names if frame[name].isna().any()]:
            raise ValueError(f"values are missing in the column {', '.join(missing)}; drop those rows first")
        users, items = (
            pa.array(frame[name].astype("string"), pa.large_string(), from_pandas=True) for name in (user, item)
        )
        times = None if time is None else frame[time]
        if times is not None and not pd.api.types.is_integer_dtype(times):
            times = pd.to_datetime(times, utc=True).dt.as_unit("us").astype("int64")
        return cls.from_arrays(users, items, times, None if weight is None else frame[weight])

    def to_frame(self) -> "pd.DataFrame":
        """Return user_id, item_id, time (int64, as here) and, where there is one, weight: a row an interaction."""
        import pandas as pd

        columns: dict[str, Any] = {
            "user_id": self.users.array.take(pa.array(self.user_index)).to_pandas(),
            "item_id": self.items.array.take(pa.array(self.item_index)).to_pandas(),
            "time": self.time,
        }
        return pd.DataFrame(columns if self.weight is None else {**columns, "weight": self.weight})

    @classmethod
    def from_events(
        cls, events: Any, meanings: Mapping[str, EventMeaning], processes: "Processes | None" = None
    ) -> "Interactions":
        """Build from a table, or tables, of events (PART_SCHEMA), leaving out what their meanings leave out.

        Events that a `retract` takes back are left out wherever the retraction lies. The id maps hold the users and
        items that are left. `position` and `retracts` may be missing; then input order is the order.

        Several `processes` each bring some of the events, with positions, and end with all interactions of some of the
        users, over the id maps of all.
        """
        kept = _Kept()
        if processes is None or processes.size == 1:
            for table in _batches(events):
                kept.add(table, meanings)
            return kept.interactions()
        with processes.together():
            for table in _batches(events):
                kept.add(table, meanings)
        return kept.shared(processes)


class _Kept:
    """What is left of the events read so far: ids dictionary-encoded by batch, so memory holds each id few times."""

    def __init__(self) -> None:
        self.users: list[Any] = []
        self.items: list[Any] = []
        self.times: list[Array] = []
        self.weights: list[Array] = []
        self.positions: list[Array] = []
        self.retracted: list[Array] = []
        self.rows = 0

    def add(self, table: pa.Table, meanings: Mapping[str, EventMeaning]) -> None:
        if "retracts" in table.column_names and table.column("retracts").null_count < len(table):
            self.retracted.append(pc.drop_null(table.column("retracts")).to_numpy())
        mask, weight = _meaning_arrays(table, meanings)
        numbered = "position" in table.column_names and not table.column("position").null_count
        position = (
            table.column("position").to_numpy()
            if numbered
            else np.arange(self.rows, self.rows + len(table), dtype=np.int64)
        )
        self.rows += len(table)
        ids = table.select(["user_id", "item_id"])
        time = _microseconds(table.column("time"))
        if not mask.all():
            ids, time, weight, position = ids.filter(pa.array(mask)), time[mask], weight[mask], position[mask]
        if len(time):
            self.users.append(_dictionary(ids.column("user_id")))
            self.items.append(_dictionary(ids.column("item_id")))
            self.times.append(time)
            self.weights.append(weight)
            self.positions.append(position)

    def interactions(self) -> Interactions:
        users, user_index = _encode(self.users)
        items, item_index = _encode(self.items)
        time = _joined(self.times, np.int64)
        weight = _joined(self.weights, np.float32)
        position = _joined(self.positions, np.int64)
        if self.retracted:
            left = ~np.isin(position, np.concatenate(self.retracted))
            # Ids that only retracted events named are nobody's: look the rest up again.
            return Interactions.from_arrays(
                users.array.take(pa.array(user_index[left])),
                items.array.take(pa.array(item_index[left])),
                time[left],
                None if (weight == 1).all() else weight[left],
                position[left],
            )
        return _sorted(users, items, user_index, item_index, time, None if (weight == 1).all() else weight, position)

    def shared(self, processes: "Processes") -> Interactions:
        """Send each interaction to the process whose user it is of."""
        from ml.distributed import shares

        position = _joined(self.positions, np.int64)
        user_words, user_codes = _words(self.users)
        item_words, item_codes = _words(self.items)
        retracted = processes.gather_array(_joined(self.retracted, np.int64))
        left = ~np.isin(position, retracted)
        users, user_rank = _joint_map(user_words, user_codes[left], processes)
        items, item_rank = _joint_map(item_words, item_codes[left], processes)
        user_index, item_index = user_rank[user_codes[left]], item_rank[item_codes[left]]
        bounds = shares(processes.sum_array(np.bincount(user_index, minlength=len(users))), processes.size)
        owner = np.searchsorted(bounds[1:], user_index, side="right")
        columns = [
            processes.exchange_rows(column, owner)
            for column in (
                user_index,
                item_index,
                _joined(self.times, np.int64)[left],
                _joined(self.weights, np.float32)[left],
                position[left],
            )
        ]
        user_index, item_index, time, weight, position = columns
        all_alike = processes.sum_number(int((weight != 1).sum())) == 0
        order = _order(user_index, time, position) if len(time) else slice(None)
        return Interactions(
            users, items, user_index[order], item_index[order], time[order], None if all_alike else weight[order]
        )


def _meaning_arrays(table: pa.Table, meanings: Mapping[str, EventMeaning]) -> tuple[Array, npt.NDArray[np.float32]]:
    """Return for each event whether it is an interaction, and its weight."""
    types = table.column("type").combine_chunks().dictionary_encode()
    if isinstance(types, pa.ChunkedArray):
        types = types.chunk(0) if types.num_chunks else pa.array([], pa.string()).dictionary_encode()
    names = types.dictionary.to_pylist()
    codes = types.indices.to_numpy(zero_copy_only=False)
    found = [meaning_of(meanings, name) for name in names]
    in_history = np.array([m.in_history and n != RETRACT for n, m in zip(names, found, strict=True)], np.bool_)
    least = np.array([-np.inf if m.minimum_value is None else m.minimum_value for m in found], np.float64)
    weights = np.array([m.weight for m in found], np.float32)
    mask = in_history[codes]
    if np.isfinite(least).any():
        # A missing value becomes not-a-number, which reaches no minimum; without a minimum all are left.
        values = table.column("value").to_numpy().astype(np.float64, copy=False)
        mask &= np.isneginf(least[codes]) | (values >= least[codes])
    return mask, weights[codes]


def _batches(events: Any) -> Iterable[pa.Table]:
    return [events] if isinstance(events, pa.Table) else events


def _strings(ids: Strings) -> Any:
    return _dictionary(ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(list(ids), pa.string()))


def _dictionary(column: Any) -> Any:
    """Encode strings as int32 codes into large strings; a chunked array."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    if pa.types.is_dictionary(column.type):
        return column.cast(pa.dictionary(pa.int32(), pa.large_string()))
    return column.cast(pa.large_string()).dictionary_encode()


def _encode(columns: list[Any]) -> tuple[IdMap, npt.NDArray[np.int32]]:
    """Return the map of all ids and the index of each row."""
    words, codes = _words(columns)
    if not len(codes):
        return IdMap.from_ids([]), np.zeros(0, np.int32)
    used = np.bincount(codes, minlength=len(words)) > 0  # a dictionary may hold words of rows left out
    users = IdMap.from_ids(words.filter(pa.array(used)))
    rank = users.indices(words).astype(np.int32)
    return users, rank[codes]


def _words(columns: list[Any]) -> tuple[Any, npt.NDArray[np.int32]]:
    """Return the distinct ids, in no order, and the place among them of each row's."""
    chunks = [chunk for column in columns for chunk in column.chunks if len(chunk)]
    if not chunks:
        return pa.array([], pa.large_string()), np.zeros(0, np.int32)
    unified = pa.chunked_array(chunks).unify_dictionaries()
    return unified.chunk(0).dictionary, np.concatenate([chunk.indices.to_numpy() for chunk in unified.chunks])


def _joint_map(words: Any, codes: npt.NDArray[np.int32], processes: "Processes") -> tuple[IdMap, npt.NDArray[np.int32]]:
    """Return the map of all processes' ids that rows name, and the index in it of each word; -1 for others."""
    used = words.filter(pa.array(np.bincount(codes, minlength=len(words)) > 0))
    joint = IdMap.from_ids(processes.gather_strings(used))
    return joint, joint.indices(words).astype(np.int32)


def _sorted(
    users: IdMap,
    items: IdMap,
    user_index: npt.NDArray[np.int32],
    item_index: npt.NDArray[np.int32],
    time: npt.NDArray[np.int64],
    weight: npt.NDArray[np.float32] | None,
    position: Array | None = None,
) -> Interactions:
    # Sources are often in order already, and looking costs far less than sorting.
    if position is None or not (position[1:] < position[:-1]).any():
        position = None
        same = user_index[1:] == user_index[:-1]
        if not ((user_index[1:] < user_index[:-1]) | (same & (time[1:] < time[:-1]))).any():
            return Interactions(users, items, user_index, item_index, time, weight)
    order = _order(user_index, time, position)
    return Interactions(
        users,
        items,
        user_index[order],
        item_index[order],
        time[order],
        None if weight is None else weight[order],
    )


def _order(
    user_index: npt.NDArray[np.int32], time: npt.NDArray[np.int64], position: Array | None
) -> npt.NDArray[np.int64]:
    """Return the rows in the order of user, time, position (without: of input)."""
    since = time - time.min()
    unit = next(unit for unit in (1_000_000, 1_000, 1) if unit == 1 or not (since % unit).any())
    since //= unit
    time_bits = int(since.max()).bit_length()
    if int(user_index.max()).bit_length() + time_bits > 63:
        return np.lexsort((time, user_index) if position is None else (position, time, user_index))
    # One key for both sorts some ten times faster than two, but not stably: what ties is put in order afterwards.
    key = (user_index.astype(np.int64) << time_bits) | since
    order = np.argsort(key)
    key = key[order]
    equal = key[1:] == key[:-1]
    if equal.any():
        tied = np.zeros(len(key), np.bool_)
        tied[1:] |= equal
        tied[:-1] |= equal
        rows = order[tied]
        order[tied] = rows[np.lexsort((rows, rows if position is None else position[rows], key[tied]))]
    return order


def _weights_of(interactions: Interactions) -> npt.NDArray[np.float32]:
    return np.ones(len(interactions), np.float32) if interactions.weight is None else interactions.weight


def _joined(arrays: list[Array], dtype: Any) -> Array:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _microseconds(column: Any) -> npt.NDArray[np.int64]:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64())
    return np.asarray(column.to_numpy(), np.int64)
