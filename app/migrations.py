"""Bringing a database to the tables of this release, safely when several processes start at once."""

import warnings
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.engine import Connection, Engine

from app.database import writing

# Beside `app/` in a checkout and in the image alike.
SCRIPTS = Path(__file__).resolve().parent.parent / "alembic"

# "short" in bytes: any number that no other user of this PostgreSQL database takes for its advisory lock.
LOCK = 0x73_68_6F_72_74

# What Alembic cannot compare: an index that only PostgreSQL has, and SQLAlchemy reads none of expressions.
ONE_SIDED_INDEXES = {"ix_events_user_id_transaction_id", "ix_events_block_user_id"}
warnings.filterwarnings("ignore", "Skipped unsupported reflection of expression-based index ix_events_block_user_id")


def _is_compared(_thing: object, name: str | None, kind: str, *_: object) -> bool:
    return kind != "index" or name not in ONE_SIDED_INDEXES


# How the tables of the code and those of a database are told apart, here and by `alembic check`.
COMPARISON: dict[str, Any] = {
    "compare_type": True,
    "compare_server_default": True,
    "include_object": _is_compared,
}


class MigrationError(RuntimeError):
    """The database cannot be brought to the tables of this release."""


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, without reading alembic.ini: it holds nothing that a program needs."""
    if not (SCRIPTS / "env.py").is_file():
        raise MigrationError(f"the migrations are missing: {SCRIPTS} must lie beside the package `app`")
    alembic = Config()
    alembic.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    alembic.attributes["connection"] = connection
    return alembic


def head() -> str:
    """The revision that this release works with."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None, "there is at least one migration"
    return revision


def current(connection: Connection) -> str | None:
    """The revision a database is at; None before the first migration."""
    return MigrationContext.configure(connection).get_current_revision()


def migrate(engine: Engine, revision: str = "head") -> bool:
    """Upgrade the database to this release, in one transaction; True if anything had to be done.

    Processes that start together wait for one another: on a lock of PostgreSQL, or on SQLite's only writer.
    """
    target = head() if revision == "head" else revision
    with engine.connect() as connection:
        if current(connection) == target:
            return False
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        if current(connection) == target:
            return False
        _run(command.upgrade, connection, target)
    return True


def downgrade(engine: Engine, revision: str) -> None:
    """Take migrations back to a revision, `base` for none: the data in dropped tables is lost."""
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        _run(command.downgrade, connection, revision)


def _run(step: Any, connection: Connection, revision: str) -> None:
    try:
        step(config(connection), revision)
    except CommandError as error:
        raise MigrationError(
            f"this release ({head()}) cannot migrate the database (at {current(connection)}): {error}"
        ) from error
