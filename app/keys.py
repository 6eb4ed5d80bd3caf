"""The bodies of `shortlist keys …` and `shortlist migrate`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import typer
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from app import migrations
from app.database import create_engine, is_outage, outage_reason
from app.migrations import MigrationError, migrate
from app.security import KeyRow, NewKey, create_key, list_keys, revoke_key, rotate_key
from app.settings import Settings
from app.terminal import fail, print_table
from app.times import rfc3339


@contextmanager
def _database() -> Iterator[tuple[Engine, bool]]:
    """The engine, brought to this release, and whether that changed anything."""
    engine = create_engine(Settings().resolved_database_url)
    try:
        yield engine, migrate(engine)
    except MigrationError as error:
        fail(str(error))
    except SQLAlchemyError as error:
        if not is_outage(error):
            raise
        fail(f"the database cannot be reached ({outage_reason(error)}): check SHORTLIST_DATABASE_URL")
    finally:
        engine.dispose()


def keys_create_command(name: str, *, scopes: Sequence[str], expires_days: float | None, as_json: bool) -> None:
    """Make a key. It goes to standard output alone, so that `KEY=$(shortlist keys create …)` holds it."""
    try:
        expires_in = timedelta(days=expires_days) if expires_days is not None else None
        with _database() as (engine, _):
            key = create_key(engine, name, scopes, expires_in=expires_in)
    except (ValueError, OverflowError) as error:
        fail(str(error))
    _show_new(key, scopes, as_json)


def keys_rotate_command(key_id: str, *, grace_hours: float, as_json: bool) -> None:
    """Make a key like an old one, which works on for a while."""
    if not 0 <= grace_hours <= 24 * 365:
        fail("--grace-hours must be between 0 and 8760")
    with _database() as (engine, _):
        try:
            new = rotate_key(engine, key_id, grace=timedelta(hours=grace_hours))
        except KeyError:
            fail(f"no key {key_id} can be used; `shortlist keys list` shows them all")
        scopes = next(row.scopes for row in list_keys(engine) if row.key_id == new.key_id)
    _show_new(new, scopes, as_json)


def _show_new(key: NewKey, scopes: Sequence[str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"key_id": key.key_id, "key": key.key, "scopes": list(scopes)}))
        return
    note = "It is shown only now; send it as `Authorization: Bearer …`."
    typer.echo(f"Made the key {key.key_id} ({', '.join(scopes)}). {note}", err=True)
    typer.echo(key.key)


def keys_revoke_command(key_id: str) -> None:
    """Revoke a key."""
    with _database() as (engine, _):
        if not revoke_key(engine, key_id):
            fail(f"no key {key_id} can be used; `shortlist keys list` shows them all")
    seconds = Settings().key_cache_seconds
    typer.echo(f"Revoked {key_id}; every process refuses it in {seconds:g} seconds at most.")


def _state(row: KeyRow) -> str:
    if row.revoked_at is not None:
        return "revoked"
    return "usable" if row.usable(datetime.now(UTC)) else "expired"


def keys_list_command(*, as_json: bool) -> None:
    """List the keys; their secrets are not kept anywhere."""
    with _database() as (engine, _):
        rows = list_keys(engine)
    shown = [
        {
            "key_id": row.key_id,
            "name": row.name,
            "scopes": list(row.scopes),
            "state": _state(row),
            "created_at": rfc3339(row.created_at),
            "expires_at": rfc3339(row.expires_at) if row.expires_at else None,
            "revoked_at": rfc3339(row.revoked_at) if row.revoked_at else None,
        }
        for row in rows
    ]
    if as_json:
        typer.echo(json.dumps({"keys": shown}, indent=2))
        return
    if not shown:
        typer.echo("No keys yet: only programs on this machine may call. `shortlist keys create NAME` makes one.")
        return
    lines = []
    for row, values in zip(rows, shown, strict=True):
        created = f"{row.created_at:%Y-%m-%d %H:%M}"
        expires = f"{row.expires_at:%Y-%m-%d %H:%M}" if row.expires_at else "never"
        lines.append([row.key_id, row.name, ", ".join(row.scopes), values["state"], created, expires])
    print_table(["key", "name", "scopes", "state", "created", "expires"], lines)


def migrate_command() -> None:
    """Bring the database to the tables of this release."""
    with _database() as (_, changed):
        typer.echo(f"{'Migrated' if changed else 'Already at'} {migrations.head()}.")
