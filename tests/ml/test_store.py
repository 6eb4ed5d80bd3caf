import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from ml.store import FolderStore, ObjectStore, Store, StoreUnavailable, open_store


@pytest.fixture(scope="module")
def bucket():
    names = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    names["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in names.items():
            environment.setenv(name, value)
        boto3.client("s3", endpoint_url=names["AWS_ENDPOINT_URL"]).create_bucket(Bucket="shortlist")
        yield "s3://shortlist"
    server.stop()


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(tmp_path / "store")
    return open_store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def test_what_was_put_is_read_listed_and_deleted(store: Store, tmp_path: Path) -> None:
    assert store.list() == []
    store.put("parts/b.parquet", b"second")
    source = tmp_path / "source"
    source.write_bytes(b"first")
    store.put("parts/a.parquet", source)
    store.put("top.json", b"{}")
    assert store.list() == ["parts/a.parquet", "parts/b.parquet", "top.json"]
    assert store.list("parts/") == store.list("parts") == ["parts/a.parquet", "parts/b.parquet"]
    assert store.list("absent") == []
    assert store.get("parts/a.parquet") == b"first"
    assert abs(store.modified("top.json") - time.time()) < 60
    store.put("top.json", b"replaced")
    assert store.get("top.json") == b"replaced"
    store.delete("top.json")
    store.delete("top.json")
    assert not store.exists("top.json")
    assert store.exists("parts/b.parquet")
    assert store.list("top.json") == []


def test_what_is_not_there_is_a_key_error(store: Store, tmp_path: Path) -> None:
    for read in (store.get, store.modified, lambda name: store.local_path(name, tmp_path)):
        with pytest.raises(KeyError, match="absent"):
            read("parts/absent")
    assert not store.exists("parts/absent")


def test_a_bucket_that_is_not_there_is_an_error_of_one_line(bucket: str) -> None:
    store = open_store(f"{bucket}-missing/prefix")
    for use in (lambda: store.list("versions"), lambda: store.put("a", b""), lambda: store.put_if_absent("a", b"")):
        with pytest.raises(StoreUnavailable, match="404"):
            use()


def test_a_taken_name_is_not_written_again(store: Store, tmp_path: Path) -> None:
    assert store.put_if_absent("versions/one", b"first")
    assert not store.put_if_absent("versions/one", b"second")
    (tmp_path / "file").write_bytes(b"third")
    assert not store.put_if_absent("versions/one", tmp_path / "file")
    assert store.put_if_absent("versions/two", tmp_path / "file")
    assert (store.get("versions/one"), store.get("versions/two")) == (b"first", b"third")


def test_of_writers_at_once_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: store.put_if_absent("race", b"%d" % number), range(8)))
    assert won.count(True) == 1
    assert store.get("race") == b"%d" % won.index(True)


def test_a_local_path_holds_the_newest_bytes(store: Store, tmp_path: Path) -> None:
    store.put("versions/v/model", b"first")
    path = store.local_path("versions/v/model", tmp_path / "cache")
    assert path.read_bytes() == b"first"
    assert store.local_path("versions/v/model", tmp_path / "cache") == path
    store.put("versions/v/model", b"second one")
    assert store.local_path("versions/v/model", tmp_path / "cache").read_bytes() == b"second one"


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../out", "a/../../out", "a//b", "a/", ".hidden", "a\\b", "ü", "a\n"]
)
def test_names_cannot_leave_the_store(store: Store, name: str, tmp_path: Path) -> None:
    for call in (store.get, store.exists, store.delete, lambda name: store.put(name, b"")):
        with pytest.raises(ValueError, match="cannot name a file"):
            call(name)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("manifest.json", b"old")
    with pytest.raises(FileNotFoundError):
        store.put("manifest.json", tmp_path / "absent")
    assert store.get("manifest.json") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_leftovers_of_dead_writers_are_never_listed_and_go_with_age(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("parts/whole", b"whole")
    leftover = tmp_path / "parts" / ".temporary-0123"
    leftover.write_bytes(b"ha")
    assert store.list() == ["parts/whole"]
    store.remove_leftovers(3600)
    assert leftover.exists()
    os.utime(leftover, (time.time() - 7200, time.time() - 7200))
    store.remove_leftovers(3600)
    assert not leftover.exists()
    assert store.get("parts/whole") == b"whole"


def test_the_url_chooses_the_store(tmp_path: Path, bucket: str) -> None:
    assert isinstance(open_store(tmp_path), FolderStore)
    assert isinstance(open_store(f"file://{tmp_path}"), FolderStore)
    assert isinstance(open_store(f"{bucket}/prefix"), ObjectStore)
    with pytest.raises(ValueError, match="is no store"):
        open_store("nonsense://bucket")
