"""Bringing a database to the tables of this release, safely when several processes start at once.

Alembic is imported where it has something to do: a database that is at this release takes no part of it.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app.database import writing

if TYPE_CHECKING:
    from alembic.config import Config

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


def config(connection: Connection | None = None) -> "Config":
    """Alembic's configuration, without reading alembic.ini: it holds nothing that a program needs."""
    from alembic.config import Config

    alembic = Config()
    alembic.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    alembic.attributes["connection"] = connection
    return alembic


def head() -> str:
    """The revision that this release works with: the last one, which the names of their files begin with."""
    revisions = [path.name.partition("_")[0] for path in (SCRIPTS / "versions").glob("[0-9]*_*.py")]
    if not revisions:
        raise MigrationError(f"the migrations are missing: {SCRIPTS} must lie beside the package `app`")
    return max(revisions)


def current(connection: Connection) -> str | None:
    """The revision a database is at; None before the first migration."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return revision


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
        _run("upgrade", connection, target)
    return True


def downgrade(engine: Engine, revision: str) -> None:
    """Take migrations back to a revision, `base` for none: the data in dropped tables is lost."""
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        _run("downgrade", connection, revision)


def _run(step: Literal["upgrade", "downgrade"], connection: Connection, revision: str) -> None:
    from alembic import command
    from alembic.util.exc import CommandError

    run = command.upgrade if step == "upgrade" else command.downgrade
    try:
        run(config(connection), revision)
    except CommandError as error:
        raise MigrationError(
            f"this release ({head()}) cannot migrate the database (at {current(connection)}): {error}"
        ) from error
