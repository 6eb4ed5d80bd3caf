"""Events as importers yield them: checked, in one schema, with the rows that were refused beside them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ml.ids import id_problem
from ml.snapshots import RETRACT

EVENT_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("type", pa.string()),
        ("value", pa.float64()),
        ("time", pa.timestamp("us", "UTC")),
    ]
)
# Events of a source without times get this moment plus one second a row, so that their order survives.
SYNTHETIC_START = datetime(2000, 1, 1, tzinfo=UTC)

_SHOWN = 200  # characters of a refused row that are kept
_MAX_TYPE_LENGTH = 64
_EARLIEST = int(datetime(1, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
_LATEST = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp()) * 1_000_000

Mask = npt.NDArray[np.bool_]


class Reject(NamedTuple):
    """A row that was refused."""

    line: int
    reason: str
    raw: str


@dataclass(frozen=True)
class EventBatch:
    """Some rows of a source: `table` as EVENT_SCHEMA, `rows` their numbers, unique and rising over the source.

    The number is the line for text with an event a line, and otherwise counts the events; a source that has not
    changed gives every event the same number again. `progress` is the share of the input read so far. Where the source
    has ids of events, `event_ids` are these (null: none), and `retracts` the id of the event that each takes back.
    """

    table: pa.Table
    rows: npt.NDArray[np.int64]
    rejects: list[Reject]
    progress: float
    event_ids: Any | None = None
    retracts: Any | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class RawRows:
    """Rows as a file holds them: bytes, strings, numbers or times by column, not checked yet."""

    user: Any
    item: Any
    type: Any | None
    value: Any | None
    time: Any | None
    rows: npt.NDArray[np.int64]
    raw: Callable[[int], str]  # the text of the row at an index
    progress: float
    rejects: list[Reject] = field(default_factory=list)
    event_id: Any | None = None
    retracts: Any | None = None


@dataclass(frozen=True)
class Reading:
    """How rows become events: the type of those without one, and the latest time that is believed."""

    default_type: str
    latest: datetime | None = None


class _Checked(NamedTuple):
    values: Any
    bad: Mask
    reason: Callable[[int], str]


def shorten(raw: str) -> str:
    """Cut a refused row to what a person needs to find it."""
    return raw if len(raw) <= _SHOWN else raw[: _SHOWN - 1] + "…"


def clean(raw: RawRows, reading: Reading) -> EventBatch:
    """Check rows and put them into EVENT_SCHEMA, the strings dictionary-encoded."""
    size = len(raw.rows)
    user = _ids(raw.user, "user id")
    item = _ids(raw.item, "item id")
    event_id = _optional_ids(raw.event_id, "event id", size)
    retracts = _optional_ids(raw.retracts, "the id of the event taken back", size)
    type_ = _types(raw.type, reading.default_type, size, retracts.values)
    value = _values(raw.value, size)
    time = _times(raw.time, raw.rows, reading.latest)
    columns = (user, item, type_, value, time)
    checked = (*columns, event_id, retracts)
    bad = np.logical_or.reduce([column.bad for column in checked])
    named = [event_id.values, retracts.values]
    table = pa.table([column.values for column in columns], names=EVENT_SCHEMA.names)
    rejects = list(raw.rejects)
    rows = raw.rows
    if bad.any():
        for index in np.flatnonzero(bad).tolist():
            reason = next(column.reason(index) for column in checked if column.bad[index])
            rejects.append(Reject(int(rows[index]), reason, shorten(raw.raw(index))))
        good = pa.array(~bad)
        table, rows = table.filter(good), rows[~bad]
        named = [None if column is None else column.filter(good) for column in named]
    rejects.sort(key=lambda reject: reject.line)
    return EventBatch(table, rows, rejects, raw.progress, *named)


def _coded(column: Any, name: str) -> tuple[npt.NDArray[np.int64], list[str | None] | None, Any]:
    """Return for each row its word's number (-1: none), the words where some are not UTF-8, else their array."""
    column = _whole(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type) or pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    elif not (_is_text(column.type) or _is_bytes(column.type)):
        raise ValueError(f"the column of the {name} holds {column.type}; it has to hold strings or integers")
    encoded = column.dictionary_encode()
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    words = encoded.dictionary
    try:
        words = words.cast(pa.string())
        words.validate(full=True)
    except pa.ArrowInvalid:
        decoded = [_decoded(word) for word in words.cast(pa.binary()).to_pylist()]
        return codes, decoded, pa.array([word or "" for word in decoded], pa.string())
    return codes, None, words


def _decoded(word: bytes) -> str | None:
    try:
        return word.decode()
    except UnicodeDecodeError:
        return None


def _checked_words(
    column: Any, name: str, plain: str, problem_of: Callable[[str], str | None]
) -> tuple[npt.NDArray[np.int64], Any, Mask, dict[int, str]]:
    """Check each distinct word once: those that match `plain` need no look in Python."""
    codes, decoded, words = _coded(column, name)
    problems: dict[int, str] = {}
    suspects = np.flatnonzero(~pc.match_substring_regex(words, plain).to_numpy(zero_copy_only=False))
    for code in suspects.tolist():
        if decoded is not None and decoded[code] is None:
            problems[code] = f"{name} is not UTF-8"
        elif problem := problem_of(words[code].as_py()):
            problems[code] = f"{name} {problem}"
    bad_words = np.zeros(len(words) + 1, np.bool_)  # one more, for the rows without a word (-1)
    bad_words[list(problems)] = True
    bad_words[-1] = True
    return codes, words, bad_words[codes], problems


def _dictionary_array(codes: npt.NDArray[np.int64], words: Any) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32), mask=codes < 0), words)


def _ids(column: Any, name: str) -> _Checked:
    codes, words, bad, problems = _checked_words(column, name, r"^[!-.0-~]{1,255}$", id_problem)
    return _Checked(
        _dictionary_array(codes, words), bad, lambda row: problems.get(int(codes[row]), f"{name} is missing")
    )


def _optional_ids(column: Any | None, name: str, size: int) -> _Checked:
    """Check ids of events, of which a row may have none; None for all of them where the source has no such column."""
    if column is None:
        return _Checked(None, np.zeros(size, np.bool_), lambda _: "")
    codes, words, bad, problems = _checked_words(column, name, r"^[!-.0-~]{0,255}$", id_problem)
    empty = np.append(pc.equal(words, "").to_numpy(zero_copy_only=False), True)  # the last one: no word (-1)
    ids = _dictionary_array(np.where(empty[codes], -1, codes), words).cast(pa.string())
    return _Checked(ids, bad & (codes >= 0), lambda row: problems[int(codes[row])])


def _type_problem(word: str) -> str | None:
    if word == RETRACT:
        return "is `retract`, and no column `retracts` names the event that it takes back"
    if len(word) > _MAX_TYPE_LENGTH:
        return f"is longer than {_MAX_TYPE_LENGTH} characters"
    return None if word.isprintable() else "holds an unprintable character"  # an empty one means the default


def _types(column: Any | None, default: str, size: int, retracts: Any | None) -> _Checked:
    if column is None:
        codes, words, bad = np.zeros(size, np.int64), pa.array([default], pa.string()), np.zeros(size, np.bool_)
        return _Checked(_dictionary_array(codes, words), bad, lambda _: "")
    codes, words, bad, problems = _checked_words(column, "type", r"^[a-qs-z][a-z_-]{0,63}$", _type_problem)
    bad &= codes >= 0
    if retracts is not None:
        bad &= retracts.is_null().to_numpy(zero_copy_only=False) | (codes != pc.index(words, RETRACT).as_py())
    names = [word or default for word in words.to_pylist()]
    if (codes < 0).any():
        codes, names = np.where(codes < 0, len(names), codes), [*names, default]
    encoded = pa.array(names, pa.string()).dictionary_encode()  # two words may have become the default
    codes = encoded.indices.to_numpy()[codes].astype(np.int64)
    original = _whole(column)
    return _Checked(
        _dictionary_array(codes, encoded.dictionary),
        bad,
        lambda row: problems.get(_code_of(words, original[row].as_py()), "type is not readable"),
    )


def _code_of(words: Any, word: Any) -> int:
    text = word if isinstance(word, str) else (_decoded(word) or "")
    return int(pc.index(words, text).as_py())


def _values(column: Any | None, size: int) -> _Checked:
    if column is None:
        return _Checked(pa.nulls(size, pa.float64()), np.zeros(size, np.bool_), lambda _: "")
    column = _whole(column)
    if _is_text(column.type) or _is_bytes(column.type):
        numbers, unparsable = _parsed(column, [lambda text: text.cast(pa.float64())], pa.float64(), _one_number)
    elif pa.types.is_boolean(column.type) or pa.types.is_temporal(column.type) or pa.types.is_nested(column.type):
        raise ValueError(f"the column of the value holds {column.type}; it has to hold numbers")
    else:
        numbers, unparsable = column.cast(pa.float64(), safe=False), np.zeros(size, np.bool_)
    infinite = ~pc.fill_null(pc.is_finite(numbers), True).to_numpy(zero_copy_only=False)
    return _Checked(
        numbers,
        unparsable | infinite,
        lambda row: "value is not a number" if unparsable[row] else "value is not finite",
    )


def _times(column: Any | None, rows: npt.NDArray[np.int64], latest: datetime | None) -> _Checked:
    size = len(rows)
    if column is None:
        start = int(SYNTHETIC_START.timestamp()) * 1_000_000
        return _Checked(
            pa.array(start + rows * 1_000_000).cast(EVENT_SCHEMA.field("time").type),
            np.zeros(size, np.bool_),
            lambda _: "",
        )
    column = _whole(column)
    unparsable = np.zeros(size, np.bool_)
    if _is_text(column.type) or _is_bytes(column.type):
        column, unparsable = _parsed(column, _TIME_CASTS, pa.int64(), _one_time)
    else:
        column = _microseconds(column)
    missing = column.is_null().to_numpy(zero_copy_only=False) & ~unparsable
    numbers = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
    outside = (numbers < _EARLIEST) | (numbers > _LATEST)
    last = None if latest is None else round(latest.timestamp() * 1_000_000)
    future = np.zeros(size, np.bool_) if last is None else numbers > last

    def reason(row: int) -> str:
        if missing[row]:
            return "time is missing"
        if unparsable[row] or outside[row]:
            return "time is neither RFC 3339 nor a number of seconds or milliseconds since 1970"
        return "time lies in the future"

    bad = missing | unparsable | outside | future
    safe = np.where(bad, 0, numbers)
    return _Checked(pa.array(safe).cast(EVENT_SCHEMA.field("time").type), bad, reason)


def scale_numbers(column: Any) -> Any:
    """Turn numbers since 1970 into microseconds: seconds below 1e11, then milliseconds, microseconds, nanoseconds."""
    nulls = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(column.type):
        numbers = pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
        numbers = np.where(np.isfinite(numbers), numbers, 1e30)
        size = np.abs(numbers)
        factor = np.select([size < 1e11, size < 1e14, size < 1e17], [1e6, 1e3, 1.0], 1e-3)
        scaled = np.clip(np.round(numbers * factor), -9e18, 9e18).astype(np.int64)
    else:
        numbers = pc.fill_null(column.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
        size = np.abs(numbers)
        # A multiplication of what is too large would wrap around, so each size has its own.
        scaled = np.select(
            [size < 10**11, size < 10**14, size < 10**17],
            [numbers * 1_000_000, numbers * 1_000, numbers],
            numbers // 1_000,
        )
    return pa.array(scaled, mask=nulls)


def _microseconds(column: Any) -> Any:
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        # A time without a zone is read as UTC.
        zone = column.type.tz if pa.types.is_timestamp(column.type) else None
        return column.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
    if pa.types.is_null(column.type):
        return column.cast(pa.int64())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return scale_numbers(column)
    raise ValueError(f"the column of the time holds {column.type}; it has to hold times, strings or numbers")


_TIME_CASTS: list[Callable[[Any], Any]] = [
    lambda text: scale_numbers(text.cast(pa.int64())),
    lambda text: scale_numbers(text.cast(pa.float64())),
    lambda text: text.cast(pa.timestamp("us", "UTC")).cast(pa.int64()),
    lambda text: text.cast(pa.timestamp("us")).cast(pa.int64()),
]


def _parsed(
    column: Any, casts: list[Callable[[Any], Any]], type_: Any, one: Callable[[str], int | float | None]
) -> tuple[Any, Mask]:
    """Parse text, an empty one as missing: the whole column at once if all of it can be, else each distinct word."""
    column = pc.if_else(pc.equal(pc.binary_length(column), 0), pa.scalar(None, column.type), column)
    try:
        text = column.cast(pa.string())
        for cast in casts:
            try:
                return cast(text), np.zeros(len(column), np.bool_)
            except pa.ArrowInvalid:
                continue
    except pa.ArrowInvalid:  # not UTF-8
        pass
    encoded = column.dictionary_encode()
    words = encoded.dictionary.cast(pa.binary()).to_pylist()
    parsed = [None if (text := _decoded(word)) is None else one(text.strip()) for word in words]
    values = pa.array(parsed, type_).take(encoded.indices)
    unparsable = values.is_null().to_numpy(zero_copy_only=False) & column.is_valid().to_numpy(zero_copy_only=False)
    return values, unparsable


def _one_number(text: str) -> float | None:
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _one_time(text: str) -> int | None:
    number = _one_number(text)
    if number is not None:
        exact = pa.array([int(text)] if text.lstrip("+-").isdigit() and len(text) < 19 else [number])
        return int(scale_numbers(exact)[0].as_py())
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _whole(column: Any) -> Any:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column


def _is_text(type_: Any) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _is_bytes(type_: Any) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))
