"""Stores: where snapshots and versions live, a folder or an S3-compatible bucket.

A file is there whole or not at all: a reader never sees one half-written, and neither does anybody after a crash.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

_SEGMENT = re.compile(r"[A-Za-z0-9_=+@][A-Za-z0-9._=+@-]*")
_TEMPORARY = ".temporary-"
_PATIENCE = timedelta(seconds=30)  # obstore would go on for minutes, while a caller waits


class StoreUnavailable(OSError):  # noqa: N818
    """A bucket that does not answer, or refuses what it is asked; its text is one line."""


class Store(Protocol):
    """Named files. A name is a relative path such as `parts/0a1b.parquet`; KeyError where there is no such file."""

    def put(self, name: str, data: bytes | Path) -> None:
        """Write a file whole, replacing the one of this name; from bytes, or as a copy of a local file."""

    def put_if_absent(self, name: str, data: bytes | Path) -> bool:
        """Write a file unless the name is taken; tell whether this call wrote it."""

    def get(self, name: str) -> bytes:
        """Read a file."""

    def local_path(self, name: str, cache_dir: Path) -> Path:
        """Return a path of the file on this machine, to map into memory; a bucket's file is fetched to cache_dir."""

    def list(self, prefix: str = "") -> list[str]:
        """List the names under a folder, sorted; the empty prefix means all."""

    def exists(self, name: str) -> bool:
        """Tell whether there is a file of this name."""

    def modified(self, name: str) -> float:
        """Return when the file was written, in seconds since the epoch."""

    def delete(self, name: str) -> None:
        """Remove a file; removing one that is not there is no error."""

    def remove_leftovers(self, older_than_seconds: float) -> None:
        """Remove what writers that died left unfinished."""


def check_name(name: str) -> str:
    """Return the name if it is a safe relative path; ValueError if it could leave the store or be misread."""
    if not name or len(name) > 512 or not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise ValueError(
            f"{name[:80]!r} cannot name a file in a store: use letters, digits and . _ = + @ - between slashes, "
            "none starting with a dot"
        )
    return name


def open_store(url: str | Path) -> Store:
    """Open the store at a folder's path, or at a URL such as s3://bucket/prefix."""
    text = str(url)
    if text.startswith("file://"):
        return FolderStore(Path(text.removeprefix("file://")))
    if "://" in text:
        return ObjectStore(text)
    return FolderStore(Path(text))


class FolderStore:
    """A store in a folder: temporary file, fsync, rename, fsync of the folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def _file(self, name: str) -> Path:
        return self.path / check_name(name)

    @contextlib.contextmanager
    def _temporary(self, target: Path, data: bytes | Path) -> Iterator[Path]:
        _make_folder(target.parent)
        temporary = target.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            with temporary.open("xb") as sink:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        while chunk := source.read(1 << 22):
                            sink.write(chunk)
                else:
                    sink.write(data)
                sink.flush()
                os.fsync(sink.fileno())
            yield temporary
        except OSError as error:
            if error.filename is None:  # as on a full disk
                error.filename = str(target)
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def put(self, name: str, data: bytes | Path) -> None:
        """Write a file whole, replacing the one of this name."""
        target = self._file(name)
        with self._temporary(target, data) as temporary:
            temporary.replace(target)
            _sync_folder(target.parent)

    def put_if_absent(self, name: str, data: bytes | Path) -> bool:
        """Write a file unless the name is taken; of several writers at once exactly one gets True."""
        target = self._file(name)
        if target.exists():
            return False
        with self._temporary(target, data) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            _sync_folder(target.parent)
        return True

    def get(self, name: str) -> bytes:
        """Read a file."""
        try:
            return self._file(name).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise KeyError(name) from None

    def local_path(self, name: str, cache_dir: Path) -> Path:  # noqa: ARG002
        """Return the file's own path."""
        if not self.exists(name):
            raise KeyError(name)
        return self._file(name)

    def list(self, prefix: str = "") -> list[str]:
        """List the names under a folder, sorted."""
        root = self._file(prefix.rstrip("/")) if prefix.rstrip("/") else self.path
        names = []
        for folder, _, files in os.walk(root):
            relative = Path(folder).relative_to(self.path)
            names += [(relative / file).as_posix() for file in files if not file.startswith(".")]
        return sorted(names)

    def exists(self, name: str) -> bool:
        """Tell whether there is a file of this name."""
        return self._file(name).is_file()

    def modified(self, name: str) -> float:
        """Return when the file was written, in seconds since the epoch."""
        try:
            return self._file(name).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            raise KeyError(name) from None

    def delete(self, name: str) -> None:
        """Remove a file; removing one that is not there is no error."""
        target = self._file(name)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.unlink()
            _sync_folder(target.parent)

    def remove_leftovers(self, older_than_seconds: float) -> None:
        """Remove temporary files of writers that died."""
        for leftover in self.path.rglob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if leftover.stat().st_mtime <= time.time() - older_than_seconds:
                    leftover.unlink()


class ObjectStore:
    """A store in a bucket, reached through obstore, which reads credentials and endpoint (AWS_…) by itself."""

    def __init__(self, url: str) -> None:
        try:
            import obstore
            import obstore.exceptions
            import obstore.store
        except ImportError:
            raise ValueError(f"{url} needs the package obstore: pip install 'shortlist[s3]'") from None
        self.url = url
        self._obstore = obstore
        self._absent = (obstore.exceptions.NotFoundError, FileNotFoundError)
        self._failure = (obstore.exceptions.BaseError, FileNotFoundError)
        try:
            self._store: Any = obstore.store.from_url(url, retry_config={"retry_timeout": _PATIENCE})
        except obstore.exceptions.BaseError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{url} is no store: give a folder or s3://bucket/prefix ({reason})") from None

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn what keeps a bucket from answering into StoreUnavailable; a missing bucket is one such thing."""
        try:
            yield
        except self._failure as error:
            reason = str(error).partition("\n")[0]
            raise StoreUnavailable(f"the store {self.url} did not do what was asked: {reason}") from error

    def put(self, name: str, data: bytes | Path) -> None:
        """Write a file whole, replacing the one of this name."""
        with self._reaching():
            self._obstore.put(self._store, check_name(name), data)

    def put_if_absent(self, name: str, data: bytes | Path) -> bool:
        """Write a file unless the name is taken; of several writers at once exactly one gets True."""
        with self._reaching():
            try:
                self._obstore.put(self._store, check_name(name), data, mode="create")
            except (self._obstore.exceptions.AlreadyExistsError, self._obstore.exceptions.PreconditionError):
                return False
        return True

    def _head(self, name: str) -> Any:
        with self._reaching():
            try:
                return self._obstore.head(self._store, check_name(name))
            except self._absent:
                raise KeyError(name) from None

    def get(self, name: str) -> bytes:
        """Read a file."""
        with self._reaching():
            try:
                return bytes(self._obstore.get(self._store, check_name(name)).bytes())
            except self._absent:
                raise KeyError(name) from None

    def local_path(self, name: str, cache_dir: Path) -> Path:
        """Fetch the file to cache_dir unless the same one is there, and return its path."""
        head = self._head(name)
        stamp = head["last_modified"].timestamp()
        cached = cache_dir / check_name(name)
        if cached.is_file() and cached.stat().st_size == head["size"] and abs(cached.stat().st_mtime - stamp) < 0.01:
            return cached
        _make_folder(cached.parent)
        temporary = cached.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            with temporary.open("xb") as sink, self._reaching():
                try:
                    for chunk in self._obstore.get(self._store, name):
                        sink.write(chunk)
                except self._absent:
                    raise KeyError(name) from None
            os.utime(temporary, (stamp, stamp))
            temporary.replace(cached)
        finally:
            temporary.unlink(missing_ok=True)
        return cached

    def list(self, prefix: str = "") -> list[str]:
        """List the names under a folder, sorted."""
        folder = check_name(prefix.rstrip("/")) if prefix.rstrip("/") else None
        with self._reaching():
            return sorted(meta["path"] for batch in self._obstore.list(self._store, folder) for meta in batch)

    def exists(self, name: str) -> bool:
        """Tell whether there is a file of this name."""
        try:
            self._head(name)
        except KeyError:
            return False
        return True

    def modified(self, name: str) -> float:
        """Return when the file was written, in seconds since the epoch."""
        return float(self._head(name)["last_modified"].timestamp())

    def delete(self, name: str) -> None:
        """Remove a file; removing one that is not there is no error."""
        with self._reaching(), contextlib.suppress(*self._absent):
            self._obstore.delete(self._store, check_name(name))

    def remove_leftovers(self, older_than_seconds: float) -> None:
        """Do nothing: a bucket shows no unfinished upload, and its lifecycle rules remove them."""


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents so that a crash does not lose them."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
