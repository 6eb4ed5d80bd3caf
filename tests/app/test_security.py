"""Keys and scopes, revocation, the loopback rule, and what goes on while the database is gone."""

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app import errors
from app.database import create_engine, writing
from app.security import (
    SCOPES,
    Admin,
    AnyKey,
    Feedback,
    KeyRing,
    Recommend,
    UnsafeAddressError,
    create_key,
    ensure_safe_to_listen,
    is_loopback,
    list_keys,
    revoke_key,
    rotate_key,
)
from app.tables import api_keys, audit_log

Connect = Callable[..., TestClient]


def make_app(engine: Engine, cache_seconds: float = 5.0) -> FastAPI:
    app = FastAPI()
    app.state.keys = KeyRing(engine, cache_seconds)
    errors.install(app)

    @app.get("/recommend")
    def recommend(caller: Recommend) -> str:
        return caller.key_id

    @app.post("/feedback")
    def feedback(caller: Feedback) -> str:
        return caller.key_id

    @app.post("/admin")
    def admin(caller: Admin) -> str:
        return caller.key_id

    @app.get("/any")
    def any_key(caller: AnyKey) -> str:
        return caller.key_id

    return app


def statuses(client: TestClient) -> list[int]:
    return [
        client.get("/recommend").status_code,
        client.post("/feedback").status_code,
        client.post("/admin").status_code,
        client.get("/any").status_code,
    ]


def test_keys_are_kept_as_hashes_alone(engine: Engine) -> None:
    keys = [create_key(engine, "shop", ["feedback", "recommend"]) for _ in range(20)]
    assert len({key.key for key in keys}) == 20
    for key in keys:
        assert re.fullmatch(rf"sl_{key.key_id}_[A-Za-z0-9_-]{{43}}", key.key)
    with engine.connect() as connection:
        rows = connection.execute(sa.select(api_keys)).mappings().all()
        trail = connection.execute(sa.select(audit_log)).mappings().all()
    for key in keys:
        assert key.key.removeprefix(f"sl_{key.key_id}_") not in f"{rows}{trail}"
    assert {tuple(row.scopes) for row in list_keys(engine)} == {("recommend", "feedback")}
    assert {(row["actor"], row["action"]) for row in trail} == {("cli", "key.create")}


@pytest.mark.parametrize(
    ("name", "scopes", "expires_in"),
    [("", SCOPES, None), ("a\n", SCOPES, None), ("a", [], None), ("a", ["root"], None), ("a", SCOPES, timedelta(0))],
)
def test_keys_that_make_no_sense_are_refused(
    sqlite_url: str, name: str, scopes: list[str], expires_in: timedelta | None
) -> None:
    engine = create_engine(sqlite_url)
    with pytest.raises(ValueError, match="must"):
        create_key(engine, name, scopes, expires_in=expires_in)
    engine.dispose()


def test_scopes_open_what_they_name(engine: Engine, connect: Connect) -> None:
    app = make_app(engine)
    for scopes, expected in [
        (["recommend"], [200, 403, 403, 200]),
        (["feedback"], [403, 200, 403, 200]),
        (["recommend", "feedback"], [200, 200, 403, 200]),
        (["admin"], [200, 200, 200, 200]),
    ]:
        key = create_key(engine, "any", scopes)
        assert statuses(connect(app, key=key.key)) == expected
        assert connect(app).get("/any", headers={"X-API-Key": key.key}).json() == key.key_id
        # From anywhere: the loopback rule is for those without a key.
        assert connect(app, key=key.key, client="203.0.113.9").get("/any").status_code == 200


def test_unknown_broken_and_expired_keys_are_refused(engine: Engine, connect: Connect) -> None:
    key = create_key(engine, "shop", ["admin"], expires_in=timedelta(days=1))
    app = make_app(engine)
    assert statuses(connect(app)) == [401] * 4
    wrong = key.key[:-1] + ("A" if key.key[-1] != "A" else "B")
    for sent in (wrong, key.key[:-1], key.key + "x", key.key_id, "x", "sl_" + "0" * 12 + "_" + "a" * 43, "x" * 9000):
        answer = connect(app, key=sent).get("/any")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
    assert connect(app).get("/any", headers={"Authorization": f"Basic {key.key}"}).status_code == 401
    assert connect(app).get("/any", headers={"X-API-Key": "é".encode()}).status_code == 401
    assert connect(app, key=key.key).get("/any").status_code == 200
    with writing(engine) as connection:
        connection.execute(sa.update(api_keys).values(expires_at=datetime.now(UTC) - timedelta(microseconds=1)))
    assert connect(make_app(engine), key=key.key).get("/any").status_code == 401


def test_a_revoked_key_is_refused_everywhere_once_its_cache_ends(engine: Engine, connect: Connect) -> None:
    key = create_key(engine, "shop", ["recommend"])
    seconds = 0.3
    processes = [connect(make_app(engine, seconds), key=key.key) for _ in range(2)]
    assert all(client.get("/recommend").status_code == 200 for client in processes)
    assert revoke_key(engine, key.key_id) is True
    revoked = time.monotonic()
    assert revoke_key(engine, key.key_id) is False
    assert revoke_key(engine, "nobody") is False
    for client in processes:
        while time.monotonic() - revoked <= seconds:
            client.get("/recommend")
        assert client.get("/recommend").status_code == 401
    assert connect(make_app(engine), key=key.key).get("/recommend").status_code == 401


def test_most_requests_are_checked_without_sql(engine: Engine, connect: Connect) -> None:
    key = create_key(engine, "shop", ["recommend"])
    client = connect(make_app(engine), key=key.key)
    asked: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
    for _ in range(5):
        assert client.get("/recommend").status_code == 200
    assert len([statement for statement in asked if "api_keys" in statement]) == 1


def test_a_rotated_key_works_until_its_grace_ends(engine: Engine, connect: Connect) -> None:
    old = create_key(engine, "shop", ["feedback"])
    new = rotate_key(engine, old.key_id, grace=timedelta(hours=1))
    app = make_app(engine)
    assert connect(app, key=old.key).post("/feedback").status_code == 200
    assert connect(app, key=new.key).post("/feedback").status_code == 200
    rows = {row.key_id: row for row in list_keys(engine)}
    assert rows[new.key_id].scopes == ("feedback",)
    expires_at = rows[old.key_id].expires_at
    assert expires_at is not None
    assert timedelta(minutes=59) < expires_at - datetime.now(UTC) <= timedelta(hours=1)
    final = rotate_key(engine, new.key_id, grace=timedelta(0))
    assert connect(app, key=final.key).post("/feedback").status_code == 200
    for unusable in (new.key_id, "nobody"):
        with pytest.raises(KeyError):
            rotate_key(engine, unusable, grace=timedelta(hours=1))


def test_without_a_key_only_this_machine_is_served(engine: Engine, connect: Connect) -> None:
    app = make_app(engine, cache_seconds=0.01)
    for client in ("127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1"):
        assert statuses(connect(app, client=client)) == [200] * 4
    for client in ("203.0.113.9", "192.168.0.2", "::2", "testclient"):
        assert statuses(connect(app, client=client)) == [401] * 4
    local = connect(app)
    for headers in (
        {"X-Forwarded-For": "203.0.113.9"},  # a proxy on this machine
        {"Forwarded": "for=203.0.113.9"},
        {"Host": "rebound.example:8000"},  # a name that a page made to point here
        {"Origin": "https://example.org"},  # a page of another site
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "rebound.example, 127.0.0.1"},  # not a name at all: nothing to fall back from
        {"Host": "127.0.0.1@rebound.example"},
        {"Host": "["},
    ):
        assert local.get("/any", headers=headers).status_code == 401, headers
    for headers in ({"Host": "localhost:8000"}, {"Host": "[::1]:8000"}, {"Origin": "http://localhost:8000"}):
        assert local.get("/any", headers=headers).json() == "loopback", headers
    assert connect(app, key="anything").get("/any").status_code == 401
    key = create_key(engine, "first", ["recommend"])
    deadline = time.monotonic() + 5
    while local.get("/any").status_code == 200:
        assert time.monotonic() < deadline
    revoke_key(engine, key.key_id)
    assert local.get("/any").status_code == 401, "revoking the last key must not open the service"
    assert connect(make_app(engine)).get("/any").status_code == 401


def test_other_addresses_need_a_usable_key(engine: Engine) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        ensure_safe_to_listen(engine, host)
    for host in ("0.0.0.0", "::", "192.168.0.2", "shop.example", ""):
        with pytest.raises(UnsafeAddressError, match="shortlist keys create"):
            ensure_safe_to_listen(engine, host)
    key = create_key(engine, "first", ["admin"])
    ensure_safe_to_listen(engine, "0.0.0.0")
    revoke_key(engine, key.key_id)
    with pytest.raises(UnsafeAddressError):
        ensure_safe_to_listen(engine, "0.0.0.0")


def test_addresses() -> None:
    assert not is_loopback(None)
    assert not is_loopback("localhost.example.org")
    assert not is_loopback("127.0.0.1.example.org")


def take_away(postgresql_server: Engine, name: str) -> None:
    with postgresql_server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def test_known_callers_go_on_reading_while_the_database_is_gone(
    postgresql_server: Engine, postgresql_url: str, connect: Connect
) -> None:
    engine = create_engine(postgresql_url)
    key = create_key(engine, "all", ["admin"])
    stranger = create_key(engine, "stranger", ["admin"])
    app = make_app(engine, cache_seconds=0.001)
    client = connect(app, key=key.key)
    assert statuses(client) == [200] * 4
    assert engine.url.database is not None
    take_away(postgresql_server, engine.url.database)
    assert statuses(client) == [200, 503, 503, 200]
    assert client.post("/admin").headers["retry-after"]
    assert statuses(connect(app, key=stranger.key)) == [503] * 4
    assert statuses(connect(app)) == [401] * 4
    engine.dispose()


def test_this_machine_goes_on_reading_while_the_database_is_gone(
    postgresql_server: Engine, postgresql_url: str, connect: Connect
) -> None:
    engine = create_engine(postgresql_url)
    app = make_app(engine, cache_seconds=0.001)
    unknown = make_app(engine)
    assert statuses(connect(app)) == [200] * 4
    assert engine.url.database is not None
    take_away(postgresql_server, engine.url.database)
    assert statuses(connect(app)) == [200, 503, 503, 200]
    assert statuses(connect(unknown)) == [503] * 4
    engine.dispose()
