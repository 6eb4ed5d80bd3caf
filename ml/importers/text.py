"""Text read in blocks of whole rows and split into columns, a block at a time, so that memory stays the same."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from ml.importers.events import RawRows, Reject, shorten

BLOCK_BYTES = 4 << 20
_LONGEST_ROW = 64 << 20
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """Whole rows of a file: `starts` and `ends` of each that is not blank, and its line number."""

    data: bytes
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64]
    progress: float
    first_line: int
    broken_quotes: bool = False  # a quote opens and nothing closes it

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, index: int) -> bytes:
        return self.data[self.starts[index] : self.ends[index]]

    def text(self, index: int) -> str:
        return self.row(index).decode(errors="replace")


def read_blocks(
    path: Path, *, skip_lines: int = 0, quoted: bool = False, block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Read a file in blocks that end where a row ends; where `quoted`, not at a line end within quotes."""
    size = max(path.stat().st_size, 1)
    line = 1
    carried = b""
    with path.open("rb") as source:
        start = source.read(3)
        if start != _BOM:
            source.seek(0)
        for _ in range(skip_lines):
            source.readline()
            line += 1
        asked = block_bytes
        while True:
            chunk = source.read(asked)
            data = carried + chunk
            if not data:
                return
            at_end = len(chunk) < asked
            end = len(data) if at_end else _last_row_end(data, quoted)
            if end == 0:
                if len(data) > _LONGEST_ROW:
                    raise ValueError(f"{path.name}: line {line} is longer than {_LONGEST_ROW >> 20} MiB; is this text?")
                carried = data
                asked = len(data)  # doubled, so that a long row is not looked through again and again
                continue
            whole, carried, asked = data[:end], data[end:], block_bytes
            block, line = _block(whole, line, quoted, source.tell() / size)
            if len(block):
                yield block
            if at_end:
                return


def _last_row_end(data: bytes, quoted: bool) -> int:
    last = data.rfind(b"\n") + 1
    if not quoted or b'"' not in data:
        return last
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE)
    outside = ends[_quotes_before(data, ends) % 2 == 0]
    if len(outside):
        return int(outside[-1]) + 1
    # A quote that is never closed must not swallow the file.
    return last if len(data) > 4 * BLOCK_BYTES else 0


def _quotes_before(data: bytes, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    quotes = np.flatnonzero(np.frombuffer(data, np.uint8) == _QUOTE)
    return np.searchsorted(quotes, places).astype(np.int64)


def _block(data: bytes, line: int, quoted: bool, progress: float) -> tuple[Block, int]:
    view = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(view == _NEWLINE)
    line_count = len(newlines) + (data[-1:] != b"\n")
    ends = newlines
    broken = False
    if quoted and b'"' in data:
        broken = data.count(b'"') % 2 == 1
        if not broken:
            ends = newlines[_quotes_before(data, newlines) % 2 == 0]
    if len(ends) == 0 or ends[-1] != len(data) - 1:
        ends = np.append(ends, len(data))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    lines = line + np.searchsorted(newlines, starts)
    returns = (ends > starts) & (view[np.maximum(ends - 1, 0)] == _RETURN)
    ends = ends - returns
    filled = ends > starts
    return Block(data, starts[filled], ends[filled], lines[filled], progress, line, broken), line + line_count


def delimited_rows(block: Block, delimiter: str, width: int, columns: Mapping[str, int], quoted: bool) -> RawRows:
    """Split a block's rows at a delimiter; a row with another number of columns than `width` is refused."""
    spans_lines = len(block) < block.data.count(b"\n")
    if not block.broken_quotes:
        try:
            found, kept, wrong = _parse_delimited(block, delimiter, width, columns, quoted)
        except pa.ArrowInvalid:
            pass
        else:
            swallowed = quoted and spans_lines and any(_holds_line_end(column) for column in found.values())
            if len(kept) + len(wrong) == len(block) and not swallowed:
                rejects = [
                    Reject(int(block.lines[index]), _wrong_width(width, count), shorten(block.text(index)))
                    for index, count in wrong
                ]
                return _raw_rows(found, kept, block, rejects)
    by_line, _ = _block(block.data, block.first_line, False, block.progress)
    return _delimited_by_row(by_line, delimiter, width, columns)


def _wrong_width(width: int, count: int) -> str:
    return f"the row has {count} columns instead of {width}"


def _raw_rows(found: Mapping[str, Any], kept: npt.NDArray[np.int64], block: Block, rejects: list[Reject]) -> RawRows:
    return RawRows(
        user=found["user"],
        item=found["item"],
        type=found.get("type"),
        value=found.get("value"),
        time=found.get("time"),
        rows=block.lines[kept],
        raw=lambda index: block.text(int(kept[index])),
        progress=block.progress,
        rejects=rejects,
        event_id=found.get("event_id"),
        retracts=found.get("retracts"),
    )


def _holds_line_end(column: Any) -> bool:
    return bool(pc.any(pc.greater_equal(pc.find_substring(column, "\n"), 0)).as_py())


def _parse_delimited(
    block: Block, delimiter: str, width: int, columns: Mapping[str, int], quoted: bool
) -> tuple[dict[str, Any], npt.NDArray[np.int64], list[tuple[int, int]]]:
    data = block.data
    if len(delimiter) > 1:
        data, delimiter = data.replace(delimiter.encode(), b"\x1f"), "\x1f"
    wrong: list[tuple[int, int]] = []

    def skip(row: Any) -> str:
        wrong.append((row.number - 1, row.actual_columns))
        return "skip"

    names = [f"column {index}" for index in range(width)]
    wanted = {role: names[index] for role, index in columns.items()}
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        pyarrow.csv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
        pyarrow.csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if quoted else False,
            newlines_in_values=quoted,
            invalid_row_handler=skip,
        ),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(wanted.values(), pa.binary()),
            include_columns=list(dict.fromkeys(wanted.values())),
            strings_can_be_null=False,
            quoted_strings_can_be_null=False,
        ),
    )
    kept = np.arange(len(block))
    if wrong:
        kept = np.delete(kept, [index for index, _ in wrong if index < len(block)])
    if len(kept) != len(table):
        raise pa.ArrowInvalid("the rows found are not the rows parsed")
    return {role: table.column(name) for role, name in wanted.items()}, kept, wrong


def _delimited_by_row(block: Block, delimiter: str, width: int, columns: Mapping[str, int]) -> RawRows:
    """Split line by line: slow, for the blocks whose quotes do not match."""
    found: dict[str, list[bytes]] = {role: [] for role in columns}
    kept, rejects = [], []
    for index in range(len(block)):
        text = block.row(index).decode(errors="surrogateescape")
        try:
            fields = next(csv.reader([text], delimiter=delimiter, strict=True))
        except csv.Error:
            rejects.append(Reject(int(block.lines[index]), "the quotes do not match", shorten(block.text(index))))
            continue
        if len(fields) != width:
            reason = _wrong_width(width, len(fields))
            rejects.append(Reject(int(block.lines[index]), reason, shorten(block.text(index))))
            continue
        kept.append(index)
        for role, column in columns.items():
            found[role].append(fields[column].encode(errors="surrogateescape"))
    arrays = {role: pa.array(values, pa.binary()) for role, values in found.items()}
    return _raw_rows(arrays, np.array(kept, np.int64), block, rejects)


def token_lists(block: Block) -> tuple[Any, npt.NDArray[np.int64], list[Reject]]:
    """Split rows at white space or commas: a list array, the indices of its rows, and the rows that are not UTF-8."""
    # Rows end where the next one starts: the line end goes with the white space.
    offsets = np.append(block.starts, len(block.data)).astype(np.int64)
    rows = pa.Array.from_buffers(
        pa.large_string(), len(block), [None, pa.py_buffer(offsets), pa.py_buffer(block.data.replace(b",", b" "))]
    )
    rejects: list[Reject] = []
    kept = np.arange(len(block))
    try:
        rows.validate(full=True)
    except pa.ArrowInvalid:
        good = []
        for index in range(len(block)):
            try:
                good.append(block.row(index).decode().replace(",", " "))
            except UnicodeDecodeError:
                rejects.append(Reject(int(block.lines[index]), "the row is not UTF-8", shorten(block.text(index))))
                kept[index] = -1
        rows, kept = pa.array(good, pa.large_string()), kept[kept >= 0]
    return pc.ascii_split_whitespace(pc.ascii_trim_whitespace(rows)), kept, rejects


def pair_rows(block: Block) -> RawRows:
    """Read rows of `user item`."""
    lists, kept, rejects = token_lists(block)
    lengths = lists.value_lengths().to_numpy()
    right = lengths == 2
    for index in kept[~right].tolist():
        rejects.append(Reject(int(block.lines[index]), "the row is not `user item`", shorten(block.text(index))))
    tokens = lists.filter(pa.array(right)).flatten()
    pairs = {"user": tokens[::2], "item": tokens[1::2]} if len(tokens) else dict.fromkeys(("user", "item"), tokens)
    return _raw_rows(pairs, kept[right], block, rejects)


def json_rows(block: Block, columns: Mapping[str, Sequence[str]]) -> RawRows:
    """Read one JSON object a row; `columns` names the fields that may hold each part, the first found counts."""
    fast = _parse_json(block, columns)
    if fast is not None:
        return _raw_rows(fast, np.arange(len(block)), block, [])
    found: dict[str, list[str | None]] = {role: [] for role in columns}
    kept, rejects = [], []
    for index in range(len(block)):
        try:
            values = _json_values(block.row(index), columns)
        except ValueError as error:
            rejects.append(Reject(int(block.lines[index]), str(error), shorten(block.text(index))))
            continue
        kept.append(index)
        for role, value in values.items():
            found[role].append(value)
    arrays = {role: pa.array(values, pa.string()) for role, values in found.items()}
    return _raw_rows(arrays, np.array(kept, np.int64), block, rejects)


def _parse_json(block: Block, columns: Mapping[str, Sequence[str]]) -> dict[str, Any] | None:
    """Parse a block whose rows look all like its first one; None where they do not."""
    try:
        first = json.loads(block.row(0))
    except (ValueError, RecursionError):
        return None
    if not isinstance(first, dict):
        return None
    chosen = {role: next((name for name in names if name in first), names[0]) for role, names in columns.items()}
    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = []
    for role, name in chosen.items():
        type_ = types.get(type(first.get(name)), pa.string())
        if type_ == pa.float64() and role in ("user", "item", "type"):
            return None
        # 3 and 3.5 may both be values.
        schema.append((name, pa.float64() if role == "value" and type_ == pa.int64() else type_))
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block.data),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(block.data) + 1),
            pyarrow.json.ParseOptions(
                explicit_schema=pa.schema(schema), newlines_in_values=False, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowInvalid:
        return None
    if len(table) != len(block):
        return None
    # Where a part is missing another name may hold it: a row at a time finds out.
    if any(len(columns[role]) > 1 and table.column(name).null_count for role, name in chosen.items()):
        return None
    return {role: table.column(name) for role, name in chosen.items()}


def _json_values(row: bytes, columns: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    try:
        record = json.loads(row)
    except (ValueError, RecursionError):  # also what is not UTF-8, or nested without end
        raise ValueError("the row is not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("the row is not a JSON object")
    values: dict[str, str | None] = {}
    for role, names in columns.items():
        value = next((record[name] for name in names if record.get(name) is not None), None)
        if isinstance(value, bool | list | dict) or (isinstance(value, float) and role in ("user", "item", "type")):
            raise ValueError(f"{names[0]} is neither a string nor a number")
        text = None if value is None else str(value)
        if text is not None and not text.isascii():
            text = text.encode(errors="replace").decode()  # a lone surrogate is no text
        values[role] = text
    return values


def checked_lines(path: Path, encoding: str, problem: Callable[[int, str], None]) -> Iterator[tuple[int, str]]:
    """Read a small file line by line; what cannot be decoded goes to `problem`."""
    with path.open("rb") as source:
        for number, raw in enumerate(source, 1):
            text = raw.removeprefix(_BOM) if number == 1 else raw
            try:
                line = text.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError:
                problem(number, raw.decode(errors="replace").rstrip("\r\n"))
                continue
            if line.strip():
                yield number, line
