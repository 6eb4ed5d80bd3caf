"""Downloading public data sets: checked before use, unpacked whole or not at all."""

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import typer

TIMEOUT_SECONDS = 20
BLOCK = 1 << 16
# Far above any data set listed here; stops an archive that unpacks without end.
MAX_UNPACKED_BYTES = 2 << 30


@dataclass(frozen=True)
class DataSet:
    """A data set of the public internet: where it lies, what it must be, and on what terms."""

    name: str
    url: str
    sha1: str
    terms: str


DATA_SETS = {
    "ml-100k": DataSet(
        name="ml-100k",
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        sha1="cd4dcac4241c8a4ad7badc7ca635da8a69dddb83",
        terms=(
            "MovieLens 100K belongs to GroupLens Research (University of Minnesota) and comes under its own usage "
            "licence: free for research, with an acknowledgement (F. M. Harper and J. A. Konstan, 2015, The MovieLens "
            "Datasets: History and Context); no redistribution and no commercial use without their permission, and no "
            "claim of their endorsement. The README in the folder has the full terms."
        ),
    )
}


class FetchError(RuntimeError):
    """A data set could not be downloaded, or was not what it should be."""


def fetch(data_set: DataSet, to: Path) -> Path:
    """Download, check and unpack a data set to `to/<name>`; the folder appears whole or not at all."""
    target = to / data_set.name
    if target.exists():
        raise FetchError(f"{target} is already there; remove it to download the data set again")
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to, prefix=f".{data_set.name}-") as folder:
        archive = Path(folder) / "archive.zip"
        _download(data_set, archive)
        unpacked = Path(folder) / "unpacked"
        _unpack(archive, unpacked)
        # Archives commonly hold one folder with everything in it.
        entries = list(unpacked.iterdir())
        source = entries[0] if len(entries) == 1 and entries[0].is_dir() else unpacked
        source.rename(target)
    return target


def _download(data_set: DataSet, archive: Path) -> None:
    digest = hashlib.sha1(usedforsecurity=False)
    try:
        with urllib.request.urlopen(data_set.url, timeout=TIMEOUT_SECONDS) as response, archive.open("wb") as file:  # noqa: S310
            while block := response.read(BLOCK):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        error.close()
        raise FetchError(f"{data_set.url} answered {error.code} {error.reason}; try again later") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise FetchError(
            f"could not download {data_set.url} ({reason}). This needs internet; without it, download the file "
            "elsewhere, unpack it here and pass the folder: shortlist demo --data FOLDER"
        ) from error
    if digest.hexdigest() != data_set.sha1:
        raise FetchError(
            f"the download has SHA-1 {digest.hexdigest()}, not {data_set.sha1}: it is damaged or another file, "
            "and was thrown away; try again"
        )


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip archive, refusing entries that would leave the folder."""
    try:
        with zipfile.ZipFile(archive) as opened:
            if sum(entry.file_size for entry in opened.infolist()) > MAX_UNPACKED_BYTES:
                raise FetchError(f"the archive unpacks to more than {MAX_UNPACKED_BYTES} bytes; nothing was kept")
            for entry in opened.infolist():
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in entry.filename:
                    raise FetchError(f"the archive holds the unsafe path {entry.filename!r}; nothing was kept")
                target = folder / path
                if entry.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                # Written as a plain file whatever the archive says it is: no link is ever made.
                with opened.open(entry) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
    except zipfile.BadZipFile as error:
        raise FetchError(f"the download is no zip archive: {error}") from error


def fetch_command(name: str, to: Path) -> None:
    """The body of `shortlist fetch`."""
    data_set = DATA_SETS.get(name)
    if data_set is None:
        typer.echo(f"There is no data set {name!r}; there are: {', '.join(DATA_SETS)}.", err=True)
        raise typer.Exit(2)
    typer.echo(data_set.terms, err=True)
    typer.echo(f"Downloading {data_set.url} …", err=True)
    try:
        target = fetch(data_set, to)
    except FetchError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"Unpacked to {target}. Next: shortlist demo --data {target}")
