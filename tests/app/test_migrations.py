"""Migrations run up and down on both databases, from several processes at once, and leave no drift."""

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Engine

from app import migrations
from app.database import create_engine, writing
from app.migrations import COMPARISON, MigrationError, downgrade, migrate
from app.tables import BLOCK_BITS, metadata

# Of an index that only SQLite has; what it is to be is tested below.
pytestmark = pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")

ROOT = Path(migrations.SCRIPTS).parent


def drift(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        return compare_metadata(MigrationContext.configure(connection, opts=COMPARISON), metadata)


def test_up_leaves_no_drift(engine: Engine) -> None:
    assert drift(engine) == []
    assert migrate(engine) is False


def test_the_last_revision_is_alembics() -> None:
    assert migrations.head() == ScriptDirectory.from_config(migrations.config()).get_current_head()


def test_each_database_has_its_own_index_of_newer_events(engine: Engine) -> None:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            found = connection.execute(sa.text("SELECT name, sql FROM sqlite_master WHERE tbl_name = 'events'"))
        else:
            found = connection.execute(sa.text("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'events'"))
        indexes = {name: written for name, written in found if name in migrations.ONE_SIDED_INDEXES}
    ((name, written),) = indexes.items()
    if engine.dialect.name == "sqlite":
        assert (name, written.partition("(")[2]) == ("ix_events_block_user_id", f"(position >> {BLOCK_BITS}), user_id)")
    else:
        assert name == "ix_events_user_id_transaction_id"
        assert written.endswith("(user_id, transaction_id)")


def test_drift_is_noticed(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(sa.text("DROP INDEX ix_events_transaction_id"))
        connection.execute(sa.text("ALTER TABLE items ADD COLUMN colour TEXT"))
    assert len(drift(engine)) == 2


def test_down_and_up_again(engine: Engine) -> None:
    with engine.connect() as connection:
        before = _constraints(connection)
    downgrade(engine, "base")
    assert sa.inspect(engine).get_table_names() == ["alembic_version"]
    assert migrate(engine) is True
    assert drift(engine) == []
    with engine.connect() as connection:
        assert _constraints(connection) == before


def _constraints(connection: sa.Connection) -> dict[str, object]:
    inspector = sa.inspect(connection)
    return {
        table: (
            sorted(check["name"] or "" for check in inspector.get_check_constraints(table)),
            sorted(unique["name"] or "" for unique in inspector.get_unique_constraints(table)),
            inspector.get_pk_constraint(table)["name"],
        )
        for table in inspector.get_table_names()
    }


def test_constraints_are_those_of_the_code(engine: Engine) -> None:
    """`compare_metadata` looks at neither check constraints nor the names of primary keys."""
    with engine.connect() as connection:
        found = _constraints(connection)
    for table in metadata.sorted_tables:
        checks, uniques, primary_key = found[table.name]  # type: ignore[misc]
        expected = [c for c in table.constraints if isinstance(c, sa.CheckConstraint)]
        assert len(checks) == len(expected)
        assert all(name.startswith(f"ck_{table.name}_") for name in checks)
        assert len(uniques) == len([c for c in table.constraints if isinstance(c, sa.UniqueConstraint)])
        # SQLite writes a counted key into its column, without a name.
        assert primary_key in {f"pk_{table.name}", None}


def test_processes_that_start_together_wait_for_one_another(
    tmp_path: Path, postgresql_server: Engine, postgresql_url: str
) -> None:
    engine = create_engine(postgresql_url)
    downgrade(engine, "base")
    engine.dispose()
    for url in (f"sqlite:///{tmp_path / 'new' / 'shortlist.sqlite3'}", postgresql_url):
        program = (
            "import sys; from app.database import create_engine; from app.migrations import migrate; "
            "engine = create_engine(sys.argv[1]); sys.stdin.readline(); print(migrate(engine))"
        )
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, url],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for _ in range(4)
        ]
        outcomes = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            output, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            outcomes.append(output.strip())
        assert sorted(outcomes) == ["False", "False", "False", "True"]


def test_a_failed_migration_changes_nothing(engine: Engine) -> None:
    downgrade(engine, "base")
    with writing(engine) as connection:
        connection.execute(sa.text("CREATE TABLE runs (empty INTEGER)"))
    with pytest.raises(sa.exc.DBAPIError):
        migrate(engine)
    assert set(sa.inspect(engine).get_table_names()) == {"alembic_version", "runs"}


def test_a_database_of_a_newer_release_is_refused(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(MigrationError, match="9999"):
        migrate(engine)


def test_missing_scripts_are_named(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "SCRIPTS", tmp_path / "alembic")
    with pytest.raises(MigrationError, match="migrations are missing"):
        migrate(engine)


def test_alembic_by_hand_works_on_the_database_of_the_settings(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORTLIST_DATABASE_URL", database_url)
    from alembic.config import Config

    by_hand = Config(str(ROOT / "alembic.ini"))
    command.check(by_hand)
    command.downgrade(by_hand, "base")
    command.upgrade(by_hand, "head")
