"""MovieLens in its own layouts: 100K (u.data), 1M (ratings.dat), and the CSV files of 20M, 25M, 32M and latest."""

import csv
from collections.abc import Iterator
from pathlib import Path

from ml.importers.catalogue import CatalogueItem, SourceUser, movie
from ml.importers.events import RawRows, Reading
from ml.importers.source import Source
from ml.importers.text import checked_lines, delimited_rows, read_blocks

RATING_FILES = ("u.data", "ratings.dat", "ratings.csv")
_COLUMNS = {"user": 0, "item": 1, "value": 2, "time": 3}
# The order of the flags in u.item, should u.genre be missing.
_GENRES = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]


class MovieLens(Source):
    """Ratings as events of type `rating`; titles, genres and years of the films."""

    format = "movielens"

    def __init__(self, path: Path, ratings: Path, reading: Reading) -> None:
        super().__init__(path, [ratings], reading)
        self.ratings = ratings
        self.folder = ratings.parent
        self._delimiter = {".data": "\t", ".dat": "::", ".csv": ","}[ratings.suffix]
        if ratings.suffix == ".csv":
            with ratings.open(encoding="utf-8-sig", errors="replace") as opened:
                header = opened.readline(1000).strip().replace('"', "").split(",")
            if header != ["userId", "movieId", "rating", "timestamp"]:
                raise ValueError(
                    f"{ratings} begins with {','.join(header)[:80]!r} instead of userId,movieId,rating,timestamp; "
                    "for other columns say --format csv"
                )

    def raw_rows(self) -> Iterator[RawRows]:
        """Yield the ratings."""
        header = self.ratings.suffix == ".csv"
        for block in read_blocks(self.ratings, skip_lines=int(header), quoted=header):
            yield delimited_rows(block, self._delimiter, 4, _COLUMNS, header)

    def catalogue(self) -> Iterator[CatalogueItem]:
        """Yield the films, from u.item, movies.dat or movies.csv."""
        self.catalogue_rejects.clear()
        if (self.folder / "u.item").is_file():
            yield from self._rows_of_100k()
        elif (self.folder / "movies.dat").is_file():
            for line, text in self._lines("movies.dat"):
                fields = text.split("::")
                if len(fields) == 3:
                    yield movie(fields[0], fields[1], fields[2].split("|"))
                else:
                    self._bad_item(line, "movies.dat: the row is not `id::title::genres`", text)
        elif (self.folder / "movies.csv").is_file():
            with (self.folder / "movies.csv").open(encoding="utf-8-sig", errors="replace", newline="") as opened:
                reader = csv.reader(opened)
                next(reader, None)
                for row in reader:
                    if len(row) == 3:
                        yield movie(row[0], row[1], row[2].split("|"))
                    else:
                        self._bad_item(reader.line_num, "movies.csv: the row is not id, title, genres", ",".join(row))

    def _lines(self, name: str) -> Iterator[tuple[int, str]]:
        return checked_lines(self.folder / name, "latin-1", lambda _line, _raw: None)

    def _rows_of_100k(self) -> Iterator[CatalogueItem]:
        genres = _GENRES
        if (self.folder / "u.genre").is_file():
            genres = [text.split("|")[0] for _, text in self._lines("u.genre")]
        for line, text in self._lines("u.item"):
            fields = text.split("|")
            flags = fields[5:]
            if len(fields) > 5 and len(flags) == len(genres):
                chosen = [genre for genre, flag in zip(genres, flags, strict=True) if flag == "1"]
                yield movie(fields[0], fields[1], chosen)
            else:
                self._bad_item(line, f"u.item: the row has {len(fields)} columns, not {5 + len(genres)}", text)

    def users(self) -> Iterator[SourceUser]:
        """Yield what u.user or users.dat says of users, without their postal codes."""
        if (self.folder / "u.user").is_file():
            for _, text in self._lines("u.user"):
                fields = text.split("|")
                if len(fields) == 5:
                    yield _user(fields[0], fields[1], fields[2], fields[3])
        elif (self.folder / "users.dat").is_file():
            for _, text in self._lines("users.dat"):
                fields = text.split("::")
                if len(fields) == 5:
                    yield _user(fields[0], fields[2], fields[1], fields[3])


def _user(user_id: str, age: str, gender: str, occupation: str) -> SourceUser:
    return SourceUser(user_id, {"age": int(age) if age.isdigit() else age, "gender": gender, "occupation": occupation})
