"""What both databases must do alike: times, ids in byte order, durability, one writer at a time."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from app.database import create_engine, is_outage, writing
from app.tables import events, items
from app.times import rfc3339

NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)


def event(**values: object) -> dict[str, object]:
    fixed = {"user_id": "u", "event_id": "e", "item_id": "i", "type": "click"}
    return {**fixed, "occurred_at": NOW, "received_at": NOW, **values}


zones = st.integers(-24 * 60 + 1, 24 * 60 - 1).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(time=st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=zones))
def test_times_keep_microseconds_and_utc(engine: Engine, time: datetime) -> None:
    with engine.connect() as connection:
        connection.execute(sa.insert(events), event(occurred_at=time))
        (kept,) = connection.execute(sa.select(events.c.occurred_at)).one()
        (found,) = connection.execute(sa.select(sa.func.count()).where(events.c.occurred_at == time)).one()
        connection.rollback()
    assert kept == time
    assert kept.tzinfo is UTC
    assert kept.microsecond == time.microsecond
    assert found == 1
    assert datetime.fromisoformat(rfc3339(kept)) == time


def test_times_are_ordered_and_need_a_zone(engine: Engine) -> None:
    times = [NOW + timedelta(microseconds=step) for step in (1, 0, 1_000_000, 999_999)]
    with writing(engine) as connection:
        connection.execute(sa.insert(events), [event(event_id=str(n), occurred_at=t) for n, t in enumerate(times)])
    with engine.connect() as connection:
        ordered = connection.execute(sa.select(events.c.occurred_at).order_by(events.c.occurred_at)).scalars().all()
        assert ordered == sorted(times)
        with pytest.raises(sa.exc.StatementError, match="without a zone"):
            connection.execute(sa.insert(events), event(occurred_at=datetime(2026, 1, 1)))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(ids=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8), unique=True))
def test_ids_are_ordered_by_their_bytes(engine: Engine, ids: list[str]) -> None:
    rows = [
        {"item_id": name, "categories": [], "hidden": False, "metadata": {}, "created_at": NOW, "updated_at": NOW}
        for name in ids
    ]
    with engine.connect() as connection:
        if rows:
            connection.execute(sa.insert(items), rows)
        assert connection.execute(sa.select(items.c.item_id).order_by(items.c.item_id)).scalars().all() == sorted(
            ids, key=str.encode
        )
        connection.rollback()


def test_events_know_their_transaction_on_postgresql_alone(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(sa.insert(events), [event(event_id="1"), event(event_id="2")])
        expected = (
            connection.execute(sa.text("SELECT pg_current_xact_id()::text::bigint")).scalar()
            if engine.dialect.name == "postgresql"
            else None
        )
    with engine.connect() as connection:
        assert connection.execute(sa.select(events.c.transaction_id)).scalars().all() == [expected] * 2


def test_positions_are_never_used_again(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(sa.insert(events), [event(event_id="1"), event(event_id="2")])
        last = connection.execute(sa.select(sa.func.max(events.c.position))).scalar_one()
        connection.execute(sa.delete(events))
        connection.execute(sa.insert(events), event())
        assert connection.execute(sa.select(events.c.position)).scalar_one() > last


def test_sqlite_is_durable_and_waits_for_its_writer(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    with engine.connect() as connection:
        pragmas = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
        assert pragmas == ["wal", 2]
    impatient = create_engine(sqlite_url)
    sa.event.listen(impatient, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout = 1"))
    with writing(engine):
        with impatient.connect() as reader:
            reader.execute(sa.select(events)).all()
        with pytest.raises(sa.exc.OperationalError, match="locked") as locked, writing(impatient):
            pass
    assert is_outage(locked.value)
    with writing(impatient):
        pass
    impatient.dispose()
    engine.dispose()


def test_a_failed_write_leaves_nothing(engine: Engine) -> None:
    def fail() -> None:
        with writing(engine) as connection:
            connection.execute(sa.insert(events), event())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(events)).scalar() == 0


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://a/b"])
def test_databases_that_cannot_serve_are_refused(url: str) -> None:
    with pytest.raises((ValueError, sa.exc.NoSuchModuleError), match=r"SQLite|mysql"):
        create_engine(url)


@pytest.mark.parametrize("prefix", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_name_of_postgresql_is_understood(prefix: str) -> None:
    engine = create_engine(f"{prefix}://u:p@127.0.0.1:1/d")
    assert engine.driver == "psycopg"
    with pytest.raises(sa.exc.OperationalError) as refused:
        engine.connect()
    assert is_outage(refused.value)


@pytest.mark.parametrize("wrong", [lambda c: c.exec_driver_sql("SELECT 1 FROM nowhere WHERE"), lambda c: 1 / 0])
def test_a_wrong_question_is_no_outage(postgresql_url: str, wrong: Callable[[sa.Connection], object]) -> None:
    engine = create_engine(postgresql_url)
    with engine.connect() as connection, pytest.raises(Exception, match=r"nowhere|syntax|division") as error:
        wrong(connection)
    assert not is_outage(error.value)
    engine.dispose()
