"""The catalogue over HTTP: single users and items, pages, bulk import and export, erasure, the audit trail."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.engine import Engine

from app import bulk_import
from app.main import create_app
from app.security import create_key
from app.settings import Settings
from app.tables import audit_log, erasures, events, items, users

JSONL = {"Content-Type": "application/x-ndjson"}
CSV = {"Content-Type": "text/csv"}


@pytest.fixture
def client(database_url: str, tmp_path: Path, connect: Callable[..., TestClient]) -> Iterator[TestClient]:
    settings = Settings(database_url=database_url, data_dir=tmp_path / "data", max_import_bytes=300_000)
    with connect(create_app(settings)) as client:
        yield client


def test_items_are_put_read_and_replaced(client: TestClient) -> None:
    item = {"title": "Alien", "categories": ["Horror", "Sci-Fi/Space"], "hidden": True, "metadata": {"year": 1979}}
    created = client.put("/items/tt 1.é", json=item)
    assert created.status_code == 201
    assert created.json() | item == created.json()
    assert created.json()["created_at"] == created.json()["updated_at"]
    replaced = client.put("/items/tt 1.é", json={"title": "Aliens"})
    assert replaced.status_code == 200
    read = client.get("/items/tt 1.é").json()
    assert read == replaced.json()
    assert (read["title"], read["categories"], read["hidden"], read["metadata"]) == ("Aliens", [], False, {})
    assert read["created_at"] == created.json()["created_at"]
    assert read["updated_at"] > read["created_at"]
    assert len(read["updated_at"]) == len("2026-11-21T09:30:00.123456Z")


def test_users_are_put_read_and_replaced(client: TestClient) -> None:
    assert client.put("/users/u1", json={"metadata": {"country": "is"}}).status_code == 201
    assert client.get("/users/u1").json()["metadata"] == {"country": "is"}
    assert client.put("/users/u1", json={}).status_code == 200
    assert client.get("/users/u1").json()["metadata"] == {}


def test_no_id_is_hidden_behind_a_route(client: TestClient) -> None:
    for name in ("export", "import", "...", "a b", "ü", "%", "a:b"):
        path = f"/items/{name.replace('%', '%25')}"
        assert client.put(path, json={"title": name}).status_code == 201
        assert client.get(path).json()["item_id"] == name
        assert client.delete(path).status_code == 204


def test_bad_items_are_refused_by_field(client: TestClient) -> None:
    for body, field in [
        ({"title": "x" * 1001}, "body.title"),
        ({"title": "a\0"}, "body.title"),
        ({"categories": ["a|b"]}, "body.categories.0"),
        ({"categories": ["a"] * 101}, "body.categories"),
        ({"categories": [""]}, "body.categories.0"),
        ({"hidden": "perhaps"}, "body.hidden"),
        ({"metadata": {"a": "\0"}}, "body.metadata"),
        ({"metadata": []}, "body.metadata"),
        ({"titel": "a"}, "body.titel"),
        ([], "body"),
    ]:
        answer = client.put("/items/a", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)
    assert client.get("/items/a").status_code == 404


def test_lists_come_in_pages_that_hold_still(client: TestClient) -> None:
    names = ["B", "a", "b", "c", "ä", "Ω", "😀"]  # in order of their bytes
    for name in reversed(names):
        client.put(f"/items/{name}", json={})
        client.put(f"/users/{name}", json={})
    for what in ("items", "users"):
        seen: list[str] = []
        cursor = None
        while True:
            page = client.get(f"/{what}", params={"limit": 3, **({"cursor": cursor} if cursor else {})}).json()
            seen += [row[f"{what[:-1]}_id"] for row in page[what]]
            client.put(f"/{what}/A", json={})  # sorts before: must not shift the pages that follow
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert seen == names
    other = client.get("/items?limit=1").json()["next_cursor"]
    for wrong in ("x", "", "=", "é", other, other[:-3]):
        answer = client.get("/users", params={"cursor": wrong})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "query.cursor")
    assert client.get("/items?limit=0").status_code == 422


def test_json_lines_are_imported_line_by_line(client: TestClient) -> None:
    client.put("/items/old", json={"title": "Old", "categories": ["x"]})
    lines = [
        b'\xef\xbb\xbf{"item_id": "a", "title": "A", "categories": ["x", "y"], "metadata": {"n": 1}}',
        b'{"item_id": "old", "hidden": true}',
        b"{",
        b"",
        b'{"title": "no id"}',
        b'{"item_id": "b/c"}',
        b"[1]",
        b'{"item_id": "c", "title": "\xff"}',
        b'{"item_id": "a", "title": "A again"}',
        b'{"item_id": "d", "colour": 1}',
        b"[" * 5000,
        b'{"item_id": "e", "metadata": {"n": ' + b"9" * 5000 + b"}}",
    ]
    answer = client.post("/items:import", content=b"\n".join(lines), headers=JSONL)
    assert answer.status_code == 200, answer.text
    outcome = answer.json()
    assert {name: outcome[name] for name in ("rows", "created", "updated", "unchanged", "rejected")} == {
        "rows": 11,
        "created": 1,
        "updated": 1,
        "unchanged": 1,
        "rejected": 8,
    }
    assert [(error["line"], error["field"]) for error in outcome["errors"]] == [
        (3, None),
        (5, "item_id"),
        (6, "item_id"),
        (7, None),
        (8, None),
        (10, "colour"),
        (11, None),
        (12, None),
    ]
    assert client.get("/items/a").json()["title"] == "A again"
    assert client.get("/items/a").json()["categories"] == ["x", "y"]
    old = client.get("/items/old").json()
    assert (old["title"], old["categories"], old["hidden"]) == ("Old", ["x"], True)


def test_csv_is_imported_line_by_line(client: TestClient) -> None:
    text = (
        "item_id,title,categories,hidden,metadata\r\n"
        'a,"A, with ""quotes""\nand two lines",x|y,true,"{""n"": 1}"\r\n'
        "b,,,,\r\n"
        "c,C\r\n"
        "d,D,,maybe,\r\n"
        "e,E,,,{\r\n"
        "f,\x00,,,\r\n"
        "g,\udcff,,,\r\n"
    ).encode("utf-8", "surrogateescape")
    answer = client.post("/items:import", content=text, headers={"Content-Type": "text/csv; charset=utf-8"})
    outcome = answer.json()
    assert (outcome["rows"], outcome["created"], outcome["rejected"]) == (7, 2, 5)
    found = [(error["line"], error["field"]) for error in outcome["errors"]]
    assert found == [(5, None), (6, "hidden"), (7, "metadata"), (8, "title"), (9, "title")]
    item = client.get("/items/a").json()
    assert item["title"] == 'A, with "quotes"\nand two lines'
    assert (item["categories"], item["hidden"], item["metadata"]) == (["x", "y"], True, {"n": 1})


def test_users_are_imported(client: TestClient) -> None:
    assert client.post("/users:import", content=b"user_id,metadata\nu1,{}\nu2,\n", headers=CSV).json()["created"] == 2
    body = b'{"user_id": "u1", "metadata": {"a": 1}}\n{"user_id": "u2"}\n'
    outcome = client.post("/users:import", content=body, headers=JSONL).json()
    assert (outcome["created"], outcome["updated"], outcome["unchanged"]) == (0, 1, 1)
    assert client.get("/users/u1").json()["metadata"] == {"a": 1}


def test_imports_that_cannot_be_read_are_refused(client: TestClient) -> None:
    refused: list[tuple[bytes, dict[str, str], int, str]] = [
        (b"a", {"Content-Type": "application/json"}, 415, "header.content-type"),
        (b"a", {}, 415, "header.content-type"),
        (b"title\nA\n", CSV, 422, "body.1"),
        (b"item_id,colour\na,b\n", CSV, 422, "body.1"),
        (b"item_id,item_id\na,b\n", CSV, 422, "body.1"),
        (b"item_id,\xff\na,b\n", CSV, 422, "body.1"),
        (b"", CSV, 422, "body.1"),
        (b"no\nno\n", JSONL, 422, "body.1"),
        (b'{"item_id": "/"}\n', JSONL, 422, "body.1.item_id"),
        (b" " * 300_001, JSONL, 413, "body"),
    ]
    for content, headers, status, field in refused:
        answer = client.post("/items:import", content=content, headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
        assert answer.json()["errors"][0]["field"] == field
    assert client.get("/items").json()["items"] == []


def test_an_empty_import_is_fine(client: TestClient) -> None:
    assert client.post("/items:import", content=b"", headers=JSONL).json()["rows"] == 0
    assert client.post("/items:import", content=b"item_id\n", headers=CSV).json()["rows"] == 0


def test_a_large_import_takes_several_commits(client: TestClient) -> None:
    number = 2 * bulk_import.ROWS_A_COMMIT + 1
    body = "".join(f'{{"item_id": "{n}", "title": "Title {n}"}}\n' for n in range(number))
    assert client.post("/items:import", content=body.encode(), headers=JSONL).json()["created"] == number
    again = client.post("/items:import", content=body.encode(), headers=JSONL).json()
    assert (again["created"], again["updated"], again["unchanged"]) == (0, 0, number)


@pytest.mark.parametrize(("file_format", "headers"), [("jsonl", JSONL), ("csv", CSV)])
def test_what_is_exported_can_be_imported(client: TestClient, file_format: str, headers: dict[str, str]) -> None:
    client.put("/items/a", json={"title": 'A, "B"\n', "categories": ["x", "y/z"], "metadata": {"é": [1, None]}})
    client.put("/items/b", json={"hidden": True})
    client.put("/users/u", json={"metadata": {"a": {"b": 1.5}}})
    before = {what: client.get(f"/{what}").json() for what in ("items", "users")}
    exported = {what: client.get(f"/{what}:export?format={file_format}") for what in ("items", "users")}
    assert exported["items"].headers["content-type"].startswith(headers["Content-Type"])
    for path in ("/items/a", "/items/b", "/users/u"):
        client.delete(path)
    for what, answer in exported.items():
        outcome = client.post(f"/{what}:import", content=answer.content, headers=headers)
        assert outcome.json()["rejected"] == 0, outcome.text
        after = client.get(f"/{what}").json()
        for row in [*before[what][what], *after[what]]:
            del row["created_at"], row["updated_at"]
        assert after == before[what]


def test_an_export_of_nothing_is_empty(client: TestClient) -> None:
    assert client.get("/items:export").content == b""
    rows = list(csv.reader(io.StringIO(client.get("/users:export?format=csv").text)))
    assert rows == [["user_id", "metadata", "created_at", "updated_at"]]
    assert client.get("/users:export?format=xml").status_code == 422


def test_erasing_leaves_no_trace_but_hashes(client: TestClient, engine: Engine) -> None:
    feedback = [{"user_id": user, "item_id": item, "type": "click"} for user in ("anna", "ben") for item in ("i", "j")]
    assert client.post("/feedback", json=feedback).status_code == 201
    client.put("/users/anna", json={"metadata": {"name": "Anna"}})
    assert client.get("/users/anna/recommendations").status_code == 200
    assert client.delete("/users/anna").status_code == 204
    assert client.delete("/items/i").status_code == 204
    assert client.delete("/users/anna").status_code == 204
    assert client.get("/users/anna").status_code == 404
    with engine.connect() as connection:
        assert connection.execute(sa.select(events.c.user_id, events.c.item_id)).all() == [("ben", "j")]
        assert connection.execute(sa.select(users.c.user_id)).scalars().all() == ["ben"]
        assert connection.execute(sa.select(items.c.item_id)).scalars().all() == ["j"]
        assert connection.execute(sa.select(erasures.c.kind).order_by(erasures.c.sequence)).scalars().all() == [
            "user",
            "item",
        ]
        trail = connection.execute(sa.select(audit_log).order_by(audit_log.c.sequence)).mappings().all()
    assert "anna" not in json.dumps([dict(row) for row in trail], default=str)
    assert [row["action"] for row in trail] == ["user.put", "user.erase", "item.erase"]
    shown = client.get("/users/ben/recommendations").json()
    assert "i" not in [item["item_id"] for item in shown["items"]]


def test_the_audit_trail_is_read_in_pages(client: TestClient, engine: Engine) -> None:
    key = create_key(engine, "operator", ["admin"])
    admin = {"Authorization": f"Bearer {key.key}"}
    for name in ("a", "b", "c"):
        client.put(f"/items/{name}", json={}, headers=admin)
    first = client.get("/admin/audit?limit=3", headers=admin).json()
    assert [(e["actor"], e["action"], e["subject"]) for e in first["entries"]] == [
        (key.key_id, "item.put", name) for name in ("c", "b", "a")
    ]
    second = client.get("/admin/audit", params={"limit": 3, "cursor": first["next_cursor"]}, headers=admin).json()
    assert [(e["actor"], e["action"]) for e in second["entries"]] == [("cli", "key.create")]
    assert second["next_cursor"] is None
    assert client.get("/admin/audit", params={"cursor": "WyJhdWRpdCIsIDFd", "limit": 1}, headers=admin).json() == {
        "entries": [],
        "next_cursor": None,
    }


def test_scopes(client: TestClient, engine: Engine) -> None:
    key = create_key(engine, "reader", ["recommend", "feedback"]).key
    headers = {"X-API-Key": key}
    for method, path in [
        ("GET", "/items"),
        ("GET", "/users"),
        ("PUT", "/items/a"),
        ("PUT", "/users/a"),
        ("DELETE", "/items/a"),
        ("DELETE", "/users/a"),
        ("POST", "/items:import"),
        ("POST", "/users:import"),
        ("GET", "/items:export"),
        ("GET", "/users:export"),
        ("GET", "/admin/audit"),
    ]:
        body = {"json": {}} if method == "PUT" else {}
        assert client.request(method, path, headers=headers, **body).status_code == 403, path  # type: ignore[arg-type]
    assert client.get("/items/a", headers=headers).status_code == 404
    assert client.get("/users/a", headers=headers).status_code == 404
