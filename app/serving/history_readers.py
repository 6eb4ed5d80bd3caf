"""Readers of histories by database, past SQLAlchemy, and one for histories that are long or not just growing."""

import numpy as np
import sqlalchemy as sa
from pydantic_core import from_json
from sqlalchemy.engine import Engine

from app.database import reading
from app.serving import postgres_reader, sqlite_reader
from app.serving.looks import Columns, HistoryReader, Whole
from ml.snapshots import RETRACT

_TAKEN_BACK = sa.text("""
    SELECT position FROM events WHERE user_id = :user_id
    AND event_id IN (SELECT retracts FROM events WHERE user_id = :user_id AND retracts IS NOT NULL)
""")


def open_reader(engine: Engine, needs_values: bool) -> HistoryReader:
    """The reader that suits the database; `needs_values` asks for the values in `Look.begun` as well."""
    if engine.dialect.name == "postgresql":
        return postgres_reader.PostgresReader(engine, needs_values)
    return sqlite_reader.SqliteReader(engine, needs_values)


def read_whole(engine: Engine, user_id: str, needs_values: bool) -> Whole:
    """Read all events of a user; blocks."""
    database = postgres_reader if engine.dialect.name == "postgresql" else sqlite_reader
    parts: list[Columns] = []
    taken_back: list[int] = []
    with reading(engine) as connection:
        settled: int = connection.exec_driver_sql(database.SETTLED).scalar_one()
        for columns in database.parts(connection, user_id, needs_values):
            marks, positions, item_ids, types, times, values = map(from_json, columns)
            occurred_at = np.array(times, "datetime64[us]").astype(np.int64)
            amounts = [None if value is None else float(value) for value in values] if needs_values else None
            parts.append(
                Columns(np.array(marks, np.int64), np.array(positions, np.int64), item_ids, types, amounts, occurred_at)
            )
        if any(RETRACT in part.types for part in parts):
            taken_back = list(connection.scalars(_TAKEN_BACK, {"user_id": user_id}))
    return Whole(settled, parts, taken_back)
