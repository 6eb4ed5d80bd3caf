import hashlib
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.fetch import DATA_SETS, DataSet, FetchError, fetch


def archive(entries: dict[str, str]) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as opened:
        for name, text in entries.items():
            opened.writestr(name, text)
    return body.getvalue()


BODIES = {
    "/good.zip": archive({"small/README": "terms", "small/u.data": "1\t2\t3\t4\n"}),
    "/flat.zip": archive({"README": "terms", "u.data": "1\t2\t3\t4\n"}),
    "/escape.zip": archive({"small/u.data": "fine", "../../escaped": "not fine"}),
    "/absolute.zip": archive({"/escaped": "not fine"}),
    "/text.zip": b"no archive",
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = BODIES.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def data_set(address: str, path: str, sha1: str | None = None) -> DataSet:
    expected = sha1 or hashlib.sha1(BODIES.get(path, b"")).hexdigest()
    return DataSet(name="small", url=address + path, sha1=expected, terms="none")


@pytest.mark.parametrize("path", ["/good.zip", "/flat.zip"])
def test_a_data_set_is_downloaded_checked_and_unpacked(address: str, path: str, tmp_path: Path) -> None:
    target = fetch(data_set(address, path), tmp_path / "new")

    assert target == tmp_path / "new" / "small"
    assert (target / "u.data").read_text() == "1\t2\t3\t4\n"
    assert list((tmp_path / "new").iterdir()) == [target]


@pytest.mark.parametrize(
    ("path", "sha1", "message"),
    [
        ("/good.zip", "0" * 40, "thrown away"),
        ("/escape.zip", None, "unsafe path '../../escaped'"),
        ("/absolute.zip", None, "unsafe path"),
        ("/text.zip", None, "no zip archive"),
        ("/missing.zip", None, "answered 404"),
    ],
)
def test_a_bad_download_leaves_nothing_behind(
    address: str, path: str, sha1: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FetchError, match=message):
        fetch(data_set(address, path, sha1), tmp_path / "a" / "b")

    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == []


def test_a_folder_that_is_there_is_never_replaced(address: str, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with pytest.raises(FetchError, match="already there"):
        fetch(data_set(address, "/good.zip"), tmp_path)


def test_without_internet_the_command_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A proxy that refuses is what no internet looks like, wherever the tests run.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, ["fetch", "ml-100k", "--to", str(tmp_path)])

    assert result.exit_code == 1
    assert "GroupLens" in result.output
    assert "This needs internet" in result.output
    assert "shortlist demo --data" in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    result = CliRunner().invoke(app, ["fetch", "ml-1b"])

    assert result.exit_code == 2
    assert "ml-100k" in result.output


def test_the_checksum_is_the_published_one() -> None:
    assert DATA_SETS["ml-100k"].sha1 == "cd4dcac4241c8a4ad7badc7ca635da8a69dddb83"
