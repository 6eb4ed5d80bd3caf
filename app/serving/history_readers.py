"""Readers of histories by database. They go past SQLAlchemy, whose statements take several times as long here."""

from typing import Any

import numpy as np
from sqlalchemy.engine import Engine

from app.serving import postgres_reader, sqlite_reader
from app.serving.looks import HistoryReader, Whole

ROWS_AT_A_TIME = 1_000


def open_reader(engine: Engine, needs_values: bool) -> HistoryReader:
    """The reader that suits the database; `needs_values` asks for the values in `Look.begun` as well."""
    if engine.dialect.name == "postgresql":
        return postgres_reader.PostgresReader(engine, needs_values)
    return sqlite_reader.SqliteReader(engine, needs_values)


def read_whole(engine: Engine, user_id: str) -> Whole:
    """Read all events of a user; blocks."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            # Before the events: what commits between the two is read again, and known by its position.
            settled = int(connection.exec_driver_sql(postgres_reader.SETTLED).scalar_one())
            found = connection.exec_driver_sql(postgres_reader.WHOLE, (user_id,))
        else:
            settled = connection.exec_driver_sql(sqlite_reader.STATE).one()[2] + 1
            found = connection.exec_driver_sql(sqlite_reader.WHOLE, (user_id,))
        columns: list[list[Any]] = [[] for _ in range(8)]
        # In parts, for each is worked on without letting the event loop in between.
        for rows in found.partitions(ROWS_AT_A_TIME):
            for column, values in zip(columns, zip(*rows, strict=True), strict=True):
                column.extend(values)
            if engine.dialect.name == "sqlite":
                written = columns[7][-len(rows) :]
                columns[7][-len(rows) :] = np.array(written, "datetime64[us]").astype(np.int64).tolist()
    return Whole(settled, *columns)
