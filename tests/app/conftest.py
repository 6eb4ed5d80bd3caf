"""What tests of the service share."""

from collections.abc import Callable

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

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
