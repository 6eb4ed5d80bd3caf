"""A made-up product: users with tastes, items with categories, a long tail, and habits of what follows what."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ml.titles import CATEGORIES, make_titles

START = datetime(2025, 1, 1, tzinfo=UTC)
DAYS = 240

TYPES = ("view", "like", "purchase")
_TYPE_SHARES = (0.85, 0.1, 0.05)

# Of the next item's causes: it follows the last one, it follows the one before, or it is to the user's taste.
_FOLLOWS_LAST = 0.5
_FOLLOWS_SECOND_LAST = 0.15
_FOLLOWERS = 6  # items that tend to follow an item
_LIKED_CATEGORIES = 3  # of each user
_LIKED_SHARE = 0.85  # of what a user takes by taste
_TAIL = 1.2  # exponent of the popularity by rank
_DRAWS = 12  # before giving up on an item the user has not had yet and taking any
_USERS_AT_ONCE = 20_000
_ROWS_WRITTEN_AT_ONCE = 500_000

_MICROSECOND = 1_000_000
_DAY = 86_400 * _MICROSECOND

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Simulation:
    """Generated events in the order of their times (microseconds since the epoch), and the catalogue."""

    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]
    categories: list[list[str]]
    years: list[int]
    user_index: npt.NDArray[np.int32]
    item_index: npt.NDArray[np.int32]
    type_index: npt.NDArray[np.int8]
    time: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user_index)

    def events(self, start: int = 0, stop: int | None = None) -> pa.Table:
        """Return events as the importers' columns: user_id, item_id, type, occurred_at."""
        rows = slice(start, stop)
        return pa.table(
            {
                "user_id": pa.array(self.user_ids, pa.string()).take(pa.array(self.user_index[rows])),
                "item_id": pa.array(self.item_ids, pa.string()).take(pa.array(self.item_index[rows])),
                "type": pa.array(TYPES, pa.string()).take(pa.array(self.type_index[rows])),
                "occurred_at": pa.array(self.time[rows]).cast(pa.timestamp("us", "UTC")),
            }
        )

    def write(self, folder: Path, format: str = "csv") -> list[Path]:  # noqa: A002
        """Write events.csv or events.parquet, and items.csv beside it; importers read the folder."""
        if format not in ("csv", "parquet"):
            raise ValueError(f"a simulation is written as csv or parquet, not as {format!r}")
        folder.mkdir(parents=True, exist_ok=True)
        for other in ("csv", "parquet"):  # of an earlier simulation
            (folder / f"events.{other}").unlink(missing_ok=True)
        items = pa.table(
            {
                "item_id": pa.array(self.item_ids, pa.string()),
                "title": pa.array(self.titles, pa.string()),
                "categories": pa.array(["|".join(names) for names in self.categories], pa.string()),
                "year": pa.array(self.years, pa.int16()),
            }
        )
        pyarrow.csv.write_csv(items, folder / "items.csv")
        # Under another name until it is whole, so that nobody takes a part for the whole.
        path, unfinished = folder / f"events.{format}", folder / f".events.{os.getpid()}.{format}"
        schema = self.events(0, 0).schema
        writer = (
            pyarrow.csv.CSVWriter(unfinished, schema)
            if format == "csv"
            else pyarrow.parquet.ParquetWriter(unfinished, schema)
        )
        with writer:
            for start in range(0, len(self), _ROWS_WRITTEN_AT_ONCE):
                writer.write_table(self.events(start, start + _ROWS_WRITTEN_AT_ONCE))
        unfinished.replace(path)
        return [path, folder / "items.csv"]


def simulate(
    users: int,
    items: int,
    events: int,
    seed: int = 0,
    *,
    on_progress: Callable[[float], None] = lambda _share: None,
) -> Simulation:
    """Generate a catalogue and what users did with it; the same numbers give the same data.

    Half of the items follow from the one before (each item has a few that tend to follow it), some from the one before
    that, the rest from the user's few liked categories, where items are taken by popularity. No user has an item twice.
    """
    if users < 1 or items < 20 or not 2 * users <= events <= users * items // 2:
        raise ValueError(
            f"{users:,} users, {items:,} items and {events:,} events do not go together: at least 20 items, 2 events a "
            "user, and no more than half of all items for each"
        )
    generator = np.random.default_rng(seed)
    catalogue = _Catalogue(items, generator)
    lengths = _history_lengths(users, items, events, generator)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    item_index = np.empty(events, np.int32)
    time = np.empty(events, np.int64)
    for first in range(0, users, _USERS_AT_ONCE):
        chunk = slice(first, min(first + _USERS_AT_ONCE, users))
        rows = slice(offsets[chunk.start], offsets[chunk.stop])
        item_index[rows] = _histories(lengths[chunk], catalogue, generator)
        time[rows] = _times(lengths[chunk], generator)
        on_progress(chunk.stop / users)
    user_index = np.repeat(np.arange(users, dtype=np.int32), lengths)
    type_index = generator.choice(len(TYPES), events, p=_TYPE_SHARES).astype(np.int8)
    order = np.argsort(time, kind="stable")
    return Simulation(
        user_ids=_numbered("user", users),
        item_ids=_numbered("item", items),
        titles=catalogue.titles,
        categories=catalogue.names,
        years=catalogue.years,
        user_index=user_index[order],
        item_index=item_index[order],
        type_index=type_index[order],
        time=time[order],
    )


def _numbered(word: str, count: int) -> list[str]:
    width = len(str(count))
    return [f"{word}-{number:0{width}d}" for number in range(1, count + 1)]


class _Catalogue:
    """Items with a category, a popularity and followers, laid out so that one number draws an item of a category."""

    def __init__(self, items: int, generator: np.random.Generator) -> None:
        kinds = list(CATEGORIES)
        self.size = items
        shares = 1 / (np.arange(len(kinds)) + 3.0)
        generator.shuffle(shares)
        kind = generator.choice(len(kinds), items, p=shares / shares.sum())
        popularity = (np.arange(items) + 8.0) ** -_TAIL
        generator.shuffle(popularity)
        second = generator.integers(0, len(kinds), items)
        has_second = (generator.random(items) < 0.3) & (second != kind)
        self.names = [
            [kinds[one], kinds[two]] if both else [kinds[one]]
            for one, two, both in zip(kind.tolist(), second.tolist(), has_second.tolist(), strict=True)
        ]
        self.titles = make_titles([names[0] for names in self.names], generator)
        self.years = generator.triangular(1950, 2021, 2025, items).astype(int).tolist()
        # Sorted by category, the running sum of popularity makes each category an interval.
        self.by_kind = np.argsort(kind, kind="stable")
        self.running = np.concatenate([[0.0], np.cumsum(popularity[self.by_kind])])
        bounds = np.searchsorted(kind[self.by_kind], np.arange(len(kinds) + 1))
        self.low, self.high = self.running[bounds[:-1]], self.running[bounds[1:]]
        self.kind_weight = self.high - self.low
        # Followers come from the item's own category, popular ones more often.
        self.followers = self.draw(np.repeat(kind, _FOLLOWERS), generator).reshape(items, _FOLLOWERS)

    def draw(self, kinds: Indices, generator: np.random.Generator) -> Indices:
        """Draw an item of each category by popularity."""
        at = self.low[kinds] + generator.random(len(kinds)) * self.kind_weight[kinds]
        place = np.searchsorted(self.running, at, side="right") - 1
        return np.asarray(self.by_kind[np.clip(place, 0, self.size - 1)], np.int64)


def _history_lengths(users: int, items: int, events: int, generator: np.random.Generator) -> Indices:
    """Share the events out, at least 2 and at most half of all items each, a few users taking many."""
    most = items // 2
    weights = generator.lognormal(0.0, 0.9, users)
    lengths = np.clip((weights / weights.sum() * events).astype(np.int64), 2, most)
    while (missing := events - int(lengths.sum())) != 0:
        open_users = np.flatnonzero(lengths < most if missing > 0 else lengths > 2)
        chosen = generator.choice(open_users, min(abs(missing), len(open_users)), replace=False)
        lengths[chosen] += np.sign(missing)
    return np.asarray(lengths, np.int64)


def _tastes(users: int, catalogue: _Catalogue, generator: np.random.Generator) -> Floats:
    """Return for each user the running probabilities of the categories."""
    base = catalogue.kind_weight / catalogue.kind_weight.sum()
    noise = generator.gumbel(size=(users, len(base))) + np.log(np.maximum(base, 1e-12)) * 0.5
    liked = np.argpartition(-noise, _LIKED_CATEGORIES, axis=1)[:, :_LIKED_CATEGORIES]
    taste = np.tile(base * (1 - _LIKED_SHARE), (users, 1))
    shares = generator.dirichlet(np.full(_LIKED_CATEGORIES, 2.0), users) * _LIKED_SHARE
    np.put_along_axis(taste, liked, np.take_along_axis(taste, liked, 1) + shares, 1)
    taste[:, catalogue.kind_weight == 0] = 0.0  # categories that no item has, in small catalogues
    running = np.cumsum(taste, axis=1)
    return np.asarray(running / running[:, -1:], np.float64)


def _histories(lengths: Indices, catalogue: _Catalogue, generator: np.random.Generator) -> npt.NDArray[np.int32]:
    """Walk all users at once, event by event; return their items one user after another."""
    users = len(lengths)
    tastes = _tastes(users, catalogue, generator)
    # The longest first: the users still walking are always the first rows.
    order = np.argsort(-lengths, kind="stable")
    lengths = lengths[order]
    starts = np.zeros(users, np.int64)
    starts[order] = np.cumsum(np.concatenate([[0], lengths[np.argsort(order)][:-1]]))[order]
    walking_at = np.searchsorted(-lengths, -np.arange(int(lengths[0])), side="left")
    seen = np.full((users, int(lengths[0])), -1, np.int32)
    for step in range(int(lengths[0])):
        walking = int(walking_at[step])
        chosen = np.full(walking, -1, np.int64)
        open_rows = np.arange(walking)
        for draw in range(_DRAWS + 20):
            if draw < _DRAWS:
                drawn = _next_items(open_rows, seen, step, tastes[order[open_rows]], catalogue, generator)
            else:
                drawn = generator.integers(0, catalogue.size, len(open_rows))
            chosen[open_rows] = drawn
            again = (seen[open_rows, :step] == drawn[:, None]).any(axis=1)
            open_rows = open_rows[again]
            if not len(open_rows):
                break
        seen[:walking, step] = chosen
    result = np.empty(int(lengths.sum()), np.int32)
    filled = seen >= 0
    rows, steps = np.nonzero(filled)
    result[starts[order[rows]] + steps] = seen[filled]
    return result


def _next_items(
    rows: Indices,
    seen: npt.NDArray[np.int32],
    step: int,
    tastes: Floats,
    catalogue: _Catalogue,
    generator: np.random.Generator,
) -> Indices:
    size = len(rows)
    kinds = (tastes < generator.random(size)[:, None]).sum(axis=1)
    drawn = catalogue.draw(np.minimum(kinds, tastes.shape[1] - 1), generator)
    cause = generator.random(size)
    # The first followers follow most often.
    follower = np.minimum(generator.geometric(0.4, size) - 1, _FOLLOWERS - 1)
    if step >= 1:
        last = cause < _FOLLOWS_LAST
        drawn[last] = catalogue.followers[seen[rows[last], step - 1], follower[last]]
    if step >= 2:
        second = (cause >= _FOLLOWS_LAST) & (cause < _FOLLOWS_LAST + _FOLLOWS_SECOND_LAST)
        drawn[second] = catalogue.followers[seen[rows[second], step - 2], follower[second]]
    return drawn


def _times(lengths: Indices, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return rising times for each user: sessions of minutes, days apart, from the day the user came."""
    total = int(lengths.sum())
    within = generator.random(total) < 0.75
    gaps = np.where(within, generator.exponential(0.003, total), generator.exponential(4.0, total)) + 1e-5
    firsts = np.cumsum(lengths) - lengths
    gaps[firsts] = 0.0
    since = np.cumsum(gaps)
    since -= np.repeat(since[firsts], lengths)
    came = generator.beta(1.0, 1.3, len(lengths)) * DAYS * 0.9
    # Who has more to do than there is time does it faster.
    pace = np.minimum(1.0, (DAYS - came) / np.maximum(since[firsts + lengths - 1], 1e-9))
    days = np.repeat(came, lengths) + since * np.repeat(pace, lengths)
    start = int(START.timestamp()) * _MICROSECOND
    return np.asarray(start + (days * _DAY).astype(np.int64), np.int64)
