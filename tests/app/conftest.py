"""What tests of the service share."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app import catalog_rows, tables
from app.database import writing
from app.main import create_app
from app.settings import Settings
from app.training import promotion
from app.training.promotion import add_candidate
from ml.ids import IdMap
from ml.models import build_model
from ml.recommender import Recommender
from ml.registry import Registry
from ml.store import open_store

Connect = Callable[..., TestClient]


@pytest.fixture
def connect() -> Connect:
    """`connect(app)` gives a client on this machine, as the service sees it; `key=` sends an API key.

    Use it as a context manager where the application has a lifespan.
    """

    def make(app: FastAPI, key: str | None = None, client: str = "127.0.0.1", **options: object) -> TestClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return TestClient(app, base_url="http://127.0.0.1", headers=headers, client=(client, 50_000), **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Settings of a service on a database of the test's own, that nothing outside the test can change."""
    return Settings(_env_file=None, data_dir=tmp_path / "data", database_url=database_url, model_poll_seconds=0.05)


@pytest.fixture
def client(settings: Settings, connect: Connect) -> Iterator[TestClient]:
    """A client of a running service; `client.app.state.service` is what it holds."""
    with connect(create_app(settings)) as client:
        yield client


class Publish:
    """Puts small models with random weights into the registry and makes them active."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.registry = Registry(open_store(settings.resolved_store_url))
        self.engine = engine

    def __call__(
        self,
        version: str,
        items: Sequence[str],
        users: Sequence[str] = ("anna", "ben"),
        model: str = "caser",
        activate: bool = True,
        **manifest: object,
    ) -> Recommender:
        torch.manual_seed(len(version))
        user_map, item_map = IdMap.from_ids(users), IdMap.from_ids(items)
        built = build_model(model, len(user_map), len(item_map))
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter)
        recommender = Recommender(built, user_map, item_map)
        published = self.registry.publish(recommender, recipe={"name": model}, version=version, **manifest)  # type: ignore[arg-type]
        self.catalogue(items)
        with writing(self.engine) as connection:
            add_candidate(connection, version, model, published.as_json())
            if activate:
                promotion.activate(connection, version, actor="test", reason="test")
        return recommender

    def catalogue(self, items: Sequence[str], categories: Mapping[str, Sequence[str]] | None = None) -> None:
        """Put items into the catalogue that are not in it yet."""
        now = datetime.now(UTC)
        known = sa.select(tables.items.c.item_id)
        with writing(self.engine) as connection:
            missing = sorted(set(items) - set(connection.scalars(known)))
            rows = [
                {
                    "item_id": item_id,
                    "title": f"The {item_id}",
                    "categories": list((categories or {}).get(item_id, [])),
                    "hidden": False,
                    "metadata": {},
                    "created_at": now,
                    "updated_at": now,
                }
                for item_id in missing
            ]
            if rows:
                connection.execute(sa.insert(tables.items), rows)

    def put(self, item_id: str, categories: Sequence[str]) -> None:
        """Give an item these categories, as another process would."""
        self.put_all([item_id], categories)

    def put_all(self, item_ids: Sequence[str], categories: Sequence[str]) -> None:
        """Give items these categories, all at once."""
        with writing(self.engine) as connection:
            for item_id in item_ids:
                given: dict[str, Any] = {"title": None, "categories": list(categories), "hidden": False, "metadata": {}}
                catalog_rows.replace(connection, "item", item_id, given)

    def hide(self, item_id: str) -> None:
        """Hide an item, as another process would."""
        with writing(self.engine) as connection:
            connection.execute(
                sa.update(tables.items)
                .where(tables.items.c.item_id == item_id)
                .values(hidden=True, updated_at=datetime.now(UTC))
            )


@pytest.fixture
def publish(settings: Settings, engine: Engine) -> Publish:
    """`publish("v1", items)` trains nothing: it publishes and activates a model with random weights."""
    return Publish(settings, engine)


@pytest.fixture
def address(settings: Settings) -> Iterator[str]:
    """Where a server in a thread of this process answers."""
    config = uvicorn.Config(create_app(settings), port=0, lifespan="on", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    ready = threading.Event()

    async def startup(sockets: object = None) -> None:
        await uvicorn.Server.startup(server)
        ready.set()

    server.startup = startup  # type: ignore[assignment]
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(30)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


class LiveServer:
    """`shortlist serve` as a process of its own."""

    def __init__(self, settings: Settings, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.settings = settings.model_copy(update={"port": port, "log_format": "json"})
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)

    def launch(self) -> "subprocess.Popen[bytes]":
        """Start it and return at once."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SHORTLIST_")}
        environment |= self.settings.as_environment() | {"OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve"], env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        return self.process

    def start(self) -> None:
        """Start it and return once it is ready."""
        process = self.launch()
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert process.poll() is None, self.log.read_text()
            try:
                if self.client.get("/health/ready").status_code == 200:
                    return
            except httpx2.TransportError:
                process.poll()
        raise AssertionError(f"the server was not ready in time:\n{self.log.read_text()}")

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end; its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    def close(self) -> None:
        self.client.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()


@pytest.fixture
def live_server(settings: Settings, tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """`live_server(embedded_worker=False)` makes a server on a free port with the test's database; start it."""
    servers: list[LiveServer] = []

    def make(**changes: object) -> LiveServer:
        server = LiveServer(settings.model_copy(update=changes), tmp_path / f"server-{len(servers)}.log")
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.close()
