"""Histories without times: `sequences` (a user a line), `pairs` (an event a line) and `predefined` (a given split)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ml.importers.events import RawRows, Reading, Reject
from ml.importers.source import Source
from ml.importers.text import Block, pair_rows, read_blocks, token_lists

UsersLayout = Literal["auto", "first", "lines"]

PARTS = (("train", ("train.txt",)), ("validation", ("valid.txt", "validation.txt", "val.txt")), ("test", ("test.txt",)))


class Sequences(Source):
    """One user a line, the items oldest first; the user is the first word, or the number of the line.

    `users_layout` says which: `first` or `lines`. Where it was not given, the first words decide: they are users if
    there is more than one line and all of them differ.
    """

    format = "sequences"
    has_times = False

    def __init__(self, path: Path, files: Sequence[Path], users: UsersLayout, reading: Reading) -> None:
        super().__init__(path, files, reading)
        if users not in ("auto", "first", "lines"):
            raise ValueError(f"users is auto, first or lines, not {users!r}")
        self.users_layout = users if users != "auto" else ("first" if _first_words_differ(files[0]) else "lines")

    def raw_rows(self) -> Iterator[RawRows]:
        """Yield an event for each item."""
        done, done_bytes = 0, 0
        total = max(self.total_bytes, 1)
        for file in self.files:
            size = file.stat().st_size
            for block in read_blocks(file):
                rows = _events_of(block, self.users_layout, done, file.name if len(self.files) > 1 else "")
                done += len(rows.rows)
                yield RawRows(
                    user=rows.user,
                    item=rows.item,
                    type=None,
                    value=None,
                    time=None,
                    rows=rows.rows,
                    raw=rows.raw,
                    progress=(done_bytes + block.progress * size) / total,
                    rejects=rows.rejects,
                )
            done_bytes += size

    def describe(self) -> str:
        """Say what was recognised."""
        users = "the first word of a line" if self.users_layout == "first" else "the number of the line"
        return f"{super().describe()}; the user is {users}"


class Predefined(Sequences):
    """A split that somebody else made: train.txt, valid.txt and test.txt, each `user item item …`."""

    format = "predefined"

    def __init__(self, path: Path, reading: Reading) -> None:
        found = [next((path / name for name in names if (path / name).is_file()), None) for _, names in PARTS]
        if found[0] is None or found[2] is None:
            raise ValueError(f"{path} has to hold train.txt and test.txt (and may hold valid.txt)")
        self.parts = [number for number, file in enumerate(found) if file is not None]
        super().__init__(path, [file for file in found if file is not None], "first", reading)

    def part_ends(self) -> npt.NDArray[np.int64]:
        """Return the last row number of each part; a part that is missing ends where the one before does."""
        ends = np.zeros(3, np.int64)
        done = 0
        for number, file in zip(self.parts, self.files, strict=True):
            for block in read_blocks(file):
                done += len(_events_of(block, "first", done, "").rows)
            ends[number:] = done
        return ends


class Pairs(Source):
    """An event a line, `user item`, split by white space or a comma, in the order in which they happened."""

    format = "pairs"
    has_times = False

    def raw_rows(self) -> Iterator[RawRows]:
        """Yield the pairs."""
        for block in read_blocks(self.files[0]):
            yield pair_rows(block)


def _events_of(block: Block, users: str, done: int, file: str) -> RawRows:
    lists, kept, rejects = token_lists(block)
    lengths = lists.value_lengths().to_numpy().astype(np.int64)
    tokens = lists.flatten()
    starts = np.cumsum(lengths) - lengths
    if users == "first":
        is_item = np.ones(len(tokens), np.bool_)
        is_item[starts[lengths > 0]] = False
        for index in kept[lengths < 2].tolist():
            rejects.append(Reject(int(block.lines[index]), "the row has a user and no item", block.text(index)[:200]))
        item = tokens.filter(pa.array(is_item))
        counts = np.maximum(lengths - 1, 0)
        owner = np.repeat(np.arange(len(lengths)), counts)
        user = tokens.take(pa.array(starts[owner]))
    else:
        item = tokens
        counts = lengths
        owner = np.repeat(np.arange(len(lengths)), counts)
        numbers = pa.array(block.lines[kept]).cast(pa.large_string())
        user = numbers.take(pa.array(owner))
    if file:
        rejects = [reject._replace(reason=f"{file}: {reject.reason}") for reject in rejects]
    return RawRows(
        user=user,
        item=item,
        type=None,
        value=None,
        time=None,
        rows=np.arange(done + 1, done + 1 + len(item)),
        raw=lambda index: f"line {block.lines[kept[owner[index]]]}: {item[index]}",
        progress=block.progress,
        rejects=rejects,
    )


def _first_words_differ(file: Path) -> bool:
    """Look for a word that begins two lines; eight bytes of memory a line, and an early end where there is one."""
    hashes = np.zeros(0, np.int64)
    pending: list[npt.NDArray[np.int64]] = []
    count = 0
    for block in read_blocks(file):
        lists, _, _ = token_lists(block)
        lengths = lists.value_lengths().to_numpy().astype(np.int64)
        starts = (np.cumsum(lengths) - lengths)[lengths > 0]
        words = lists.flatten().take(pa.array(starts)).to_pylist()
        pending.append(np.fromiter(map(hash, words), np.int64, len(words)))
        count += len(starts)
        if len(np.unique(pending[-1])) < len(pending[-1]):
            return False
        if sum(map(len, pending)) >= len(hashes):  # doubling keeps the sorting cheap
            hashes, pending = np.concatenate([hashes, *pending]), []
            if len(np.unique(hashes)) < len(hashes):
                return False
    hashes = np.concatenate([hashes, *pending])
    return count > 1 and len(np.unique(hashes)) == len(hashes)
