"""What Alembic runs: on the connection that `app.migrations` hands over, or on the database of the settings."""

from typing import Any, Literal

from alembic import context
from sqlalchemy.engine import Connection

from app.database import create_engine, writing
from app.migrations import COMPARISON
from app.settings import Settings
from app.tables import UtcDateTime, metadata


def render_item(kind: str, item: object, _context: Any) -> str | Literal[False]:
    """Write our own types as SQLAlchemy's: a migration must not read app/tables.py, which moves on."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


def run(connection: Connection) -> None:
    # SQLite can undo DDL as well, as long as the driver leaves transactions to us (app/database.py sees to it).
    context.configure(
        connection=connection,
        target_metadata=metadata,
        transactional_ddl=True,
        render_item=render_item,
        render_as_batch=connection.dialect.name == "sqlite",
        **COMPARISON,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_offline() -> None:
    context.configure(
        url=Settings().resolved_database_url, target_metadata=metadata, literal_binds=True, transactional_ddl=True
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    run_offline()
elif (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    engine = create_engine(Settings().resolved_database_url)
    with writing(engine) as own:
        run(own)
    engine.dispose()
