"""Which format files have, by their names and how they begin."""

from pathlib import Path

from ml.importers.movielens import RATING_FILES

FORMATS = ("movielens", "csv", "jsonl", "parquet", "sequences", "pairs", "predefined")

_ENDINGS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_BESIDE = ("items", "users")  # files of these names hold no events


def detect(path: Path, format: str | None) -> tuple[str, list[Path]]:  # noqa: A002
    """Return the format and the files with events, in order; ValueError says what was found instead."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if format == "predefined":
        if not path.is_dir():
            raise ValueError(f"{path} is a file; `predefined` is a folder with train.txt and test.txt")
        return format, _not_empty([path / "train.txt"])
    if path.is_dir():
        format, files = _in_folder(path, format)  # noqa: A001
    else:
        format, files = format or _of_file(path), [path]  # noqa: A001
        if format == "movielens" and path.name not in RATING_FILES:
            raise ValueError(f"{path} is none of MovieLens' files of ratings: {', '.join(RATING_FILES)}")
    return format, _not_empty(files)


def _not_empty(files: list[Path]) -> list[Path]:
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist")
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
    return files


def _of_file(path: Path) -> str:
    if path.name in ("u.data", "ratings.dat"):
        return "movielens"
    if path.name == "ratings.csv" and _first_line(path).startswith("userId,movieId,"):
        return "movielens"
    if path.suffix in _ENDINGS:
        return _ENDINGS[path.suffix]
    if path.suffix == ".zip":
        raise ValueError(f"{path} is an archive; unpack it and name the folder")
    if path.stem == "pairs":
        return "pairs"
    if path.suffix == ".txt":
        with path.open(encoding="utf-8", errors="replace") as opened:
            words = [len(opened.readline(1 << 20).split()) for _ in range(50)]
        if set(words) <= {0, 2}:
            raise ValueError(f"{path} may be `pairs` or `sequences`; say which with --format")
        return "sequences"
    raise ValueError(f"{path} has no known ending; say what it is with --format: {', '.join(FORMATS)}")


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as opened:
        return opened.readline(1000)


def _in_folder(path: Path, format: str | None) -> tuple[str, list[Path]]:  # noqa: A002
    present = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    names = [file.name for file in present]
    if format in (None, "movielens"):
        for name in RATING_FILES:
            if name in names and (format or _of_file(path / name) == "movielens"):
                return "movielens", [path / name]
    if format is None and {"train.txt", "test.txt"} <= set(names):
        return "predefined", [path / "train.txt"]
    candidates = [file for file in present if file.stem not in _BESIDE]
    for stem, of_text in (("events", None), ("sequences", "sequences"), ("pairs", "pairs")):
        for file in candidates:
            found = of_text if file.suffix == ".txt" else _ENDINGS.get(file.suffix)
            if file.stem == stem and found is not None and format in (None, found):
                return found, [file]
    if format in ("sequences", "pairs"):
        fitting = [file for file in candidates if file.suffix == ".txt" and "readme" not in file.name.lower()]
    else:
        fitting = [file for file in candidates if _ENDINGS.get(file.suffix) in ({format} if format else FORMATS)]
    kinds = {format or _ENDINGS[file.suffix] for file in fitting}
    if kinds == {"parquet"} or (len(fitting) == 1 and kinds):
        return kinds.pop(), fitting
    wanted = f"`{format}`" if format else "a known format"
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "") if names else "nothing"
    raise ValueError(
        f"{path} holds no one file of {wanted}: found {shown}. Name the file itself, or the format with --format: "
        f"{', '.join(FORMATS)}"
    )
