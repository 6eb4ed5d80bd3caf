"""Id maps: the caller's strings to a model's dense integers, without a dictionary in memory."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

# Arrow's arrays carry no types that a checker knows.
Strings: TypeAlias = Sequence[str] | Any

# Below this share of the map, searching for each id costs less than hashing the whole map.
_SEARCH_SHARE = 1 / 64


def _large_strings(values: Any) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
        if isinstance(values, pa.ChunkedArray):  # what older versions of pyarrow return for no chunk at all
            values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    elif not isinstance(values, pa.Array):
        values = pa.array(values if isinstance(values, list) else list(values), pa.large_string())
    return values.cast(pa.large_string())


class IdMap:
    """Sorted unique ids; an id's index is its rank in the order of its UTF-8 bytes."""

    def __init__(self, sorted_ids: pa.Array) -> None:
        """Wrap ids that are already sorted, unique and of type large_string; `from_ids` makes them so."""
        self._ids = sorted_ids
        _, offsets, data = sorted_ids.buffers()
        size = len(sorted_ids)
        self._offsets: npt.NDArray[np.int64] = (
            np.frombuffer(offsets, np.int64)[sorted_ids.offset : sorted_ids.offset + size + 1]
            if size
            else np.zeros(1, np.int64)
        )
        self._data = memoryview(data if data is not None else b"")

    @classmethod
    def from_ids(cls, ids: Strings) -> "IdMap":
        """Build the map of the distinct ids; ValueError for a missing one."""
        strings = _large_strings(ids)
        if strings.null_count:
            raise ValueError(f"{strings.null_count} ids are missing (null); an id is a string of 1 to 255 characters")
        distinct = strings.unique()
        return cls(distinct.take(pc.array_sort_indices(distinct)))

    @classmethod
    def open(cls, path: Path | str) -> "IdMap":
        """Open a saved map memory-mapped; ValueError if the file is not one."""
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not an id map (an Arrow IPC file): {error}") from None
        if table.schema.names != ["id"] or table.schema.field("id").type != pa.large_string():
            raise ValueError(f"{path} is not an id map: it needs one column `id` of type large_string")
        column = table.column("id")
        if column.num_chunks > 1 or column.null_count:
            raise ValueError(f"{path} is not an id map: it needs one record batch and no missing id")
        return cls(column.chunk(0) if column.num_chunks else pa.array([], pa.large_string()))

    def save(self, path: Path | str) -> None:
        """Write the map as an Arrow IPC file that `open` maps into memory."""
        table = pa.table({"id": self._ids})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    @property
    def array(self) -> pa.Array:
        """All ids in order."""
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def equals(self, other: "IdMap") -> bool:
        """Tell whether both maps hold the same ids."""
        return self is other or bool(self._ids.equals(other._ids))

    def _bytes(self, index: int) -> bytes:
        return bytes(self._data[self._offsets[index] : self._offsets[index + 1]])

    def id(self, index: int) -> str:
        """Return the id of an index; IndexError outside the map."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} lies outside a map of {len(self)} ids")
        return self._bytes(index).decode()

    def ids(self, indices: Iterable[int] | npt.NDArray[Any]) -> list[str]:
        """Return the ids of several indices."""
        return [self.id(int(index)) for index in indices]

    def index(self, id: str) -> int:  # noqa: A002
        """Return the index of an id, -1 if it is not in the map."""
        try:
            wanted = id.encode()
        except UnicodeEncodeError:  # a lone surrogate is in no map
            return -1
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._bytes(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self._bytes(low) == wanted else -1

    def indices(self, ids: Strings) -> npt.NDArray[np.int64]:
        """Return the index of each id, -1 where it is not in the map."""
        if len(ids) <= len(self) * _SEARCH_SHARE and not isinstance(ids, pa.Array | pa.ChunkedArray):
            return np.fromiter(map(self.index, ids), np.int64, len(ids))
        found = pc.fill_null(pc.index_in(_large_strings(ids), value_set=self._ids), -1)
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)

    def members(self, ids: Strings) -> npt.NDArray[np.int64]:
        """Return, in ascending order, the indices of those ids that are in the map: one pass over it for all."""
        among = pc.is_in(self._ids, value_set=_large_strings(ids))
        return np.flatnonzero(among.to_numpy(zero_copy_only=False)).astype(np.int64)


MAX_ID_LENGTH = 255


def id_problem(id: str) -> str | None:  # noqa: A002
    """Say what makes a string no user or item id, or None: 1 to 255 printable characters without a slash."""
    if not id:
        return "is missing"
    if len(id) > MAX_ID_LENGTH:
        return f"is longer than {MAX_ID_LENGTH} characters"
    if "/" in id:
        return "holds a slash"
    if not id.isprintable():
        return "holds an unprintable character"
    return None
