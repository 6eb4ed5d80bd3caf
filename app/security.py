"""Who may do what: API keys with scopes, and loopback alone for as long as no key was ever made."""

import hashlib
import ipaddress
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import sqlalchemy as sa
from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from app import audit
from app.database import is_outage, writing
from app.errors import Problem, unavailable
from app.tables import api_keys

Scope = Literal["recommend", "feedback", "admin"]
SCOPES: tuple[Scope, ...] = ("recommend", "feedback", "admin")

# What goes on for a caller known before while the database cannot be asked.
READING: tuple[Scope | None, ...] = (None, "recommend")

KEY_PATTERN = re.compile(r"sl_[0-9a-f]{12}_[A-Za-z0-9_-]{43}")
MAX_CACHED_KEYS = 10_000


# --- keys in SQL ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewKey:
    """A key as it is shown once, to the person who made it; only its hash is kept."""

    key_id: str
    key: str


@dataclass(frozen=True)
class Caller:
    """Who sent a request: `key_id` goes into the audit trail."""

    key_id: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


@dataclass(frozen=True)
class KeyRow:
    """What is kept of a key."""

    key_id: str
    name: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @cached_property
    def caller(self) -> Caller:
        return Caller(self.key_id, frozenset(self.scopes))

    def usable(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


_COLUMNS = [api_keys.c[name] for name in ("key_id", "name", "scopes", "created_at", "expires_at", "revoked_at")]


def _row(row: sa.Row[Any]) -> KeyRow:
    values = dict(row._mapping)
    return KeyRow(**{**values, "scopes": tuple(values["scopes"])})


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(
    engine: Engine,
    name: str,
    scopes: Sequence[str] = ("recommend", "feedback"),
    *,
    expires_in: timedelta | None = None,
    actor: str = "cli",
) -> NewKey:
    """Make a key of 256 random bits and keep its hash. `admin` includes the other scopes."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise ValueError(f"scopes must be some of {', '.join(SCOPES)}" + (f", not {unknown[0]}" if unknown else ""))
    if not 1 <= len(name) <= 255 or not name.isprintable():
        raise ValueError("a key's name must be 1 to 255 printable characters")
    if expires_in is not None and expires_in <= timedelta(0):
        raise ValueError("a key must expire in the future")
    key_id = secrets.token_hex(6)
    key = f"sl_{key_id}_{secrets.token_urlsafe(32)}"
    now = datetime.now(UTC)
    kept = [scope for scope in SCOPES if scope in scopes]
    with writing(engine) as connection:
        connection.execute(
            sa.insert(api_keys).values(
                key_id=key_id,
                name=name,
                sha256=_sha256(key),
                scopes=kept,
                created_at=now,
                expires_at=now + expires_in if expires_in else None,
            )
        )
        audit.record(connection, actor, "key.create", key_id, {"name": name, "scopes": kept})
    return NewKey(key_id, key)


def revoke_key(engine: Engine, key_id: str, *, actor: str = "cli") -> bool:
    """Revoke a key; every process refuses it within `key_cache_seconds`. False if no such key can still be used."""
    with writing(engine) as connection:
        changed = connection.execute(
            sa.update(api_keys)
            .where(api_keys.c.key_id == key_id, api_keys.c.revoked_at.is_(None))
            .values(revoked_at=datetime.now(UTC))
        )
        if changed.rowcount:
            audit.record(connection, actor, "key.revoke", key_id)
        return bool(changed.rowcount)


def rotate_key(engine: Engine, key_id: str, *, grace: timedelta, actor: str = "cli") -> NewKey:
    """Make a key like an old one, which works on for `grace` and then expires. KeyError if it cannot be used."""
    now = datetime.now(UTC)
    with engine.connect() as connection:
        found = connection.execute(sa.select(*_COLUMNS).where(api_keys.c.key_id == key_id)).one_or_none()
    if found is None or not (old := _row(found)).usable(now):
        raise KeyError(key_id)
    new = create_key(engine, old.name, old.scopes, actor=actor)
    expires_at = now + grace if old.expires_at is None else min(now + grace, old.expires_at)
    with writing(engine) as connection:
        connection.execute(sa.update(api_keys).where(api_keys.c.key_id == key_id).values(expires_at=expires_at))
        audit.record(connection, actor, "key.rotate", key_id, {"successor": new.key_id})
    return new


def list_keys(engine: Engine) -> list[KeyRow]:
    """Every key ever made, oldest first."""
    with engine.connect() as connection:
        return [_row(row) for row in connection.execute(sa.select(*_COLUMNS).order_by(api_keys.c.created_at))]


def any_key_exists(connection: Connection) -> bool:
    """Whether a key was ever made: one that was revoked since does not open the service again."""
    return connection.execute(sa.select(api_keys.c.key_id).limit(1)).first() is not None


class UnsafeAddressError(ValueError):
    """The service would be open to others while it has no key."""


def ensure_safe_to_listen(engine: Engine, host: str) -> None:
    """Refuse to listen on anything but loopback while no key can be used."""
    if is_loopback(host):
        return
    now = datetime.now(UTC)
    if not any(key.usable(now) for key in list_keys(engine)):
        raise UnsafeAddressError(
            f"will not listen on {host} without an API key: make one first with "
            "`shortlist keys create NAME --scope admin`, or listen on 127.0.0.1"
        )


def is_loopback(host: str | None) -> bool:
    """Whether an address, or the name of one, is this machine's own."""
    if host is None:
        return False
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


# --- keys in requests ----------------------------------------------------------------------------------------------


LOOPBACK = Caller("loopback", frozenset(SCOPES))


class KeyRing:
    """Keys that were looked up lately, so that most requests are checked without SQL.

    Reads go on with a key seen before while the database cannot be asked; nothing else does.
    """

    def __init__(self, engine: Engine, cache_seconds: float) -> None:
        self._engine = engine
        self._cache_seconds = cache_seconds
        self._keys: OrderedDict[str, tuple[float, KeyRow]] = OrderedDict()
        # Once a key was seen to exist, the loopback rule is over for good: keys are never deleted.
        self._has_keys = False
        self._keyless_until = float("-inf")

    def cached(self, sha256: str) -> KeyRow | None:
        """A key that was looked up recently enough; touches memory alone."""
        entry = self._keys.get(sha256)
        return entry[1] if entry is not None and time.monotonic() - entry[0] < self._cache_seconds else None

    def known(self, key: str) -> Caller | None:
        """Who holds a key that can be used and was looked up recently enough; touches memory alone."""
        if not KEY_PATTERN.fullmatch(key):
            return None
        row = self.cached(_sha256(key))
        return row.caller if row is not None and row.usable(datetime.now(UTC)) else None

    def look_up(self, sha256: str) -> KeyRow | None:
        """A key from SQL, whatever its state."""
        asked = time.monotonic()  # before the answer, so that the age of a cached key is never understated
        with self._engine.connect() as connection:
            found = connection.execute(sa.select(*_COLUMNS).where(api_keys.c.sha256 == sha256)).one_or_none()
        if found is None:
            self._keys.pop(sha256, None)
            return None
        row = _row(found)
        self._has_keys = True
        self._keys[sha256] = (asked, row)
        while len(self._keys) > MAX_CACHED_KEYS:
            self._keys.popitem(last=False)
        return row

    def last_known(self, sha256: str) -> KeyRow | None:
        """A key as it was when it was last looked up, however long ago."""
        entry = self._keys.get(sha256)
        return entry[1] if entry is not None else None

    def known_keyless(self) -> bool:
        """Whether no key existed a moment ago; touches memory alone."""
        return not self._has_keys and time.monotonic() < self._keyless_until

    def was_keyless(self) -> bool:
        """Whether no key existed when it was last asked, however long ago."""
        return not self._has_keys and self._keyless_until > float("-inf")

    def is_keyless(self) -> bool:
        """Whether no key was ever made, from SQL."""
        if self._has_keys:
            return False
        asked = time.monotonic()
        with self._engine.connect() as connection:
            self._has_keys = any_key_exists(connection)
        self._keyless_until = asked + self._cache_seconds
        return not self._has_keys


_bearer = HTTPBearer(auto_error=False, scheme_name="Bearer", description="`Authorization: Bearer sl_…`")
_header = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="X-API-Key")

_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def require(scope: Scope | None) -> Callable[..., Coroutine[Any, Any, Caller]]:
    """A dependency that lets only callers with a scope through; `None` asks for any usable key.

    `caller: Annotated[Caller, Depends(require("admin"))]`. Needs `app.state.keys`, a KeyRing.
    """

    async def dependency(
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
        header: Annotated[str | None, Security(_header)] = None,
    ) -> Caller:
        keys: KeyRing = request.app.state.keys
        key = bearer.credentials if bearer is not None else header
        try:
            caller = await (_keyless(request, keys, scope) if key is None else _holder(keys, key, scope))
        except SQLAlchemyError as error:
            if is_outage(error):
                raise unavailable("The database cannot be reached, so the key cannot be checked; try again.") from error
            raise
        if scope is not None and not caller.may(scope):
            raise Problem(403, detail=f"This key lacks the scope `{scope}`.")
        return caller

    return dependency


async def _holder(keys: KeyRing, key: str, scope: Scope | None) -> Caller:
    row = None
    if KEY_PATTERN.fullmatch(key):
        sha256 = _sha256(key)
        row = keys.cached(sha256)
        if row is None:
            try:
                row = await run_in_threadpool(keys.look_up, sha256)
            except SQLAlchemyError as error:
                # What only reads still answers a caller that was known when the database was last there.
                row = keys.last_known(sha256) if is_outage(error) and scope in READING else None
                if row is None:
                    raise
    if row is None or not row.usable(datetime.now(UTC)):
        raise Problem(401, detail="The API key is unknown, expired or revoked.", headers=_CHALLENGE)
    return row.caller


async def _keyless(request: Request, keys: KeyRing, scope: Scope | None) -> Caller:
    keyless = keys.known_keyless()
    if not keyless:
        try:
            keyless = await run_in_threadpool(keys.is_keyless)
        except SQLAlchemyError as error:
            keyless = is_outage(error) and scope in READING and keys.was_keyless()
            if not keyless:
                raise
    if not keyless:
        detail = "Send an API key as `Authorization: Bearer …` or `X-API-Key: …`."
        raise Problem(401, detail=detail, headers=_CHALLENGE)
    client = request.client.host if request.client else None
    # A page in a browser on this machine, or a proxy on it, must not lend its place to others: hence the names too.
    origin = request.headers.get("origin")
    forwarded = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    host = request.headers.get("host")
    local = is_loopback(client) and (host is None or is_loopback(_hostname(f"//{host}"))) and not forwarded
    if not local or (origin is not None and not is_loopback(_hostname(origin))):
        detail = "While no API key exists, only programs on this machine may call, by a loopback address."
        raise Problem(401, detail=f"{detail} Make a key with `shortlist keys create`.", headers=_CHALLENGE)
    return LOOPBACK


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # a bracket left open
        return None


# What routes declare: `caller: Admin`, `_: Recommend`.
Recommend = Annotated[Caller, Depends(require("recommend"))]
Feedback = Annotated[Caller, Depends(require("feedback"))]
Admin = Annotated[Caller, Depends(require("admin"))]
AnyKey = Annotated[Caller, Depends(require(None))]
