"""Cursors: where a list goes on, signed, so that any process can go on with what another began.

A cursor holds the whole state of a list: what ranked it, the end of the history it was ranked by, and what was shown so
far. The server keeps nothing, and items that come, go or change their place between two pages can neither repeat
nor push another one out.
"""

import base64
import binascii
import hashlib
import hmac
import secrets as randomness
import struct
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from operator import sub
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Engine

from app.database import writing
from app.tables import secrets

# A cursor travels in URLs, which proxies bound at 8,192 characters.
MAX_CURSOR_LENGTH = 6_000
NAME = "cursors"
NOT_OURS = "must be the `next_cursor` of an earlier answer, unchanged"

_FORMAT = 2
_SIGNATURE_BYTES = 16
_MAX_GOES_ON = MAX_CURSOR_LENGTH * 3 // 4 - _SIGNATURE_BYTES - 17
# Format, list, user, filters, version, position of the history (-1: none).
_HEAD = struct.Struct("<B16s8s8s8sq")
_BEGINNING = struct.Struct("<B16s")  # of that
_OTHERWISE = struct.Struct("<8s8s8sq")  # what follows the beginning
_SECTION = struct.Struct("<BI")  # width of one number in bytes, or 0 for a bitmap; bytes that follow
_LETTERS = {1: "B", 2: "H", 4: "I", 8: "Q"}
FEW = 64

Numbers = npt.NDArray[np.int64]
NOTHING: Numbers = np.zeros(0, np.int64)


def nothing() -> Numbers:
    """No numbers: the default of a field."""
    return NOTHING


class CursorRefused(ValueError):  # noqa: N818 - what the caller is told
    """A cursor that was not made here, or belongs to another question."""


class CursorGone(ValueError):  # noqa: N818
    """A cursor whose list cannot go on: what ranked it is gone."""


def digest(text: str) -> bytes:
    """Eight bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


NO_VERSION = bytes(8)


def number_of(item_id: str) -> int:
    """What a cursor keeps of an item that its version does not number: 32 bits.

    Two items that share it would hide one another from one list in billions: that is borne.
    """
    return zlib.crc32(item_id.encode())


@dataclass(frozen=True, slots=True)
class Position:
    """How far a list has come, and what it is pinned to."""

    list_id: bytes  # of the answer that began it, 16 bytes; empty until it has one
    version: bytes = NO_VERSION  # digest of its name; NO_VERSION where none ranked
    feedback_through: int | None = None
    history: Numbers = field(
        default_factory=nothing
    )  # the items that it was ranked by, as the version numbers them, oldest first
    shown: Numbers = field(default_factory=nothing)  # likewise, in any order
    shown_elsewhere: frozenset[int] = frozenset()  # `number_of` items that the version does not know

    @property
    def offset(self) -> int:
        """How many items were shown so far."""
        return len(self.shown) + len(self.shown_elsewhere)


class Cursors:
    """Writes and reads cursors with one secret that all processes on a database share."""

    def __init__(self) -> None:
        self._secret: bytes | None = None

    @property
    def loaded(self) -> bool:
        """Whether the secret is known: before, no cursor can be written or read."""
        return self._secret is not None

    def load(self, engine: Engine) -> None:
        """Read the secret; the first process on a database makes it."""
        if self._secret is not None:
            return
        wanted = sa.select(secrets.c.value).where(secrets.c.name == NAME)
        with engine.connect() as connection:
            found = connection.scalar(wanted)
        if found is None:
            with writing(engine) as connection:
                insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
                row = {"name": NAME, "value": randomness.token_hex(32), "created_at": datetime.now(UTC)}
                connection.execute(insert(secrets).values(row).on_conflict_do_nothing())
                found = connection.scalar(wanted)
        assert found is not None, "it was just written"
        self._secret = bytes.fromhex(found)

    def write(self, list_id: bytes, goes_on: bytes) -> str | None:
        """The cursor of a list for what `going_on` told; None where it would be too long, or there is no secret yet."""
        if self._secret is None or len(goes_on) > _MAX_GOES_ON:
            return None
        body = _BEGINNING.pack(_FORMAT, list_id) + goes_on
        return _text(body + self._sign(body))

    def read(self, cursor: str, user_id: str, filters: bytes) -> Position:
        """Where to go on. Raises CursorRefused."""
        if len(cursor) > MAX_CURSOR_LENGTH:
            raise CursorRefused(NOT_OURS)
        try:
            signed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            signed = b""
        if _text(signed) != cursor:  # the last character has bits that stand for nothing
            signed = b""
        body, signature = signed[:-_SIGNATURE_BYTES], signed[-_SIGNATURE_BYTES:]
        if not body or not hmac.compare_digest(signature, self._sign(body)):
            raise CursorRefused(NOT_OURS)
        # What follows was written here, and by this release or one that wrote the same format.
        if body[0] != _FORMAT:
            raise CursorRefused("was made by another release: ask again without it")
        _, list_id, of_user, of_filters, version, through = _HEAD.unpack_from(body)
        if of_user != digest(user_id):
            raise CursorRefused("belongs to another user's list")
        if of_filters != filters:
            raise CursorRefused("belongs to other filters: send those of the first page, all but k, or no cursor")
        start = _HEAD.size
        sections: list[Numbers] = []
        for ordered in (False, True, True):
            width, size = _SECTION.unpack_from(body, start)
            start += _SECTION.size
            sections.append(_numbers(body[start : start + size], width, ordered=ordered))
            start += size
        history, shown, elsewhere = sections
        return Position(
            list_id, version, None if through < 0 else through, history, shown, frozenset(elsewhere.tolist())
        )

    def _sign(self, body: bytes) -> bytes:
        if self._secret is None:
            raise CursorRefused("cannot be read yet: the service has not reached its database since it started")
        return hashlib.blake2b(body, digest_size=_SIGNATURE_BYTES, key=self._secret).digest()


def going_on(position: Position, user_id: str, filters: bytes) -> bytes:
    """What a cursor says beside the id of the list, the same for every list that comes this far."""
    elsewhere = position.shown_elsewhere
    through = -1 if position.feedback_through is None else position.feedback_through
    return b"".join(
        (
            _OTHERWISE.pack(digest(user_id), filters, position.version, through),
            _section(position.history, ordered=False),
            _section(position.shown, ordered=True),
            _section(np.fromiter(elsewhere, np.int64), ordered=True) if elsewhere else _NO_SECTION,
        )
    )


def _text(signed: bytes) -> str:
    return base64.urlsafe_b64encode(signed).rstrip(b"=").decode()


def _section(numbers: Numbers, *, ordered: bool) -> bytes:
    """Numbers in as few bytes as is simple: `ordered` ones as steps of one width, or a bitmap where that is shorter."""
    if len(numbers) <= FEW:  # as on every first page: many times as fast without arrays
        values: list[int] = numbers.tolist()
        if ordered:
            values.sort()
            values = list(map(sub, values, [0, *values]))
        count, width = len(values), _width(max(values)) if values else 1
        return _few(count, width).pack(width, width * count, *values)
    numbers = np.sort(numbers) if ordered else numbers
    steps = np.diff(numbers, prepend=0) if ordered else numbers
    width = _width(int(steps.max()))
    if ordered and int(numbers[-1]) // 8 < len(numbers) * width:
        bits = np.zeros(int(numbers[-1]) + 1, np.bool_)
        bits[numbers] = True
        bitmap = np.packbits(bits).tobytes()
        return _SECTION.pack(0, len(bitmap)) + bitmap
    written = steps.astype(f"<u{width}").tobytes()
    return _SECTION.pack(width, len(written)) + written


@lru_cache(maxsize=4 * (FEW + 1))
def _few(count: int, width: int) -> struct.Struct:
    return struct.Struct(f"<BI{count}{_LETTERS[width]}")


def _width(largest: int) -> int:
    return 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4 if largest < 1 << 32 else 8


_NO_SECTION = _section(NOTHING, ordered=True)


def _numbers(written: bytes, width: int, *, ordered: bool) -> Numbers:
    if width == 0:
        return np.flatnonzero(np.unpackbits(np.frombuffer(written, np.uint8)))
    values: npt.NDArray[Any] = np.frombuffer(written, f"<u{width}").astype(np.int64)
    return np.cumsum(values) if ordered else values
