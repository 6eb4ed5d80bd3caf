"""Exploration: a set share of the places goes, by chance of a known probability, to items that were hardly ever chosen.

An item that the active version was not trained on has no score. It can come here, where those of the categories that
the user's history is made of come more often, and at the end of a list that the version cannot fill.
"""

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from app.serving.active_models import Active
from app.serving.catalog import Catalog
from app.serving.diversity import CategoryCap
from app.serving.history import History
from app.serving.popularity import Popularity

# So many items at most take part at a time; which ones changes with every turn.
POOL_SIZE = 200
TURN_SECONDS = 10.0
# An item all of whose user's history shares its category is this many times as likely to come as one of none.
AFFINITY_FACTOR = 10.0
# The categories of so many of the newest items of a history count.
AFFINITY_HISTORY = 100


class Affinity:
    """How much of a user's recent history is of a category."""

    def __init__(self, catalog: Catalog, history: History) -> None:
        self._catalog = catalog
        recent = history.latest(AFFINITY_HISTORY)
        counts = Counter[str]()
        for item_id in recent:
            counts.update(set(catalog.categories(item_id)))
        self._share = {category: count / len(recent) for category, count in counts.items()}

    def __call__(self, item_id: str) -> float:
        """The share, from 0 to 1, of the category of the item that the history has most of."""
        return max((self._share.get(category, 0.0) for category in self._catalog.categories(item_id)), default=0.0)


@dataclass(frozen=True, slots=True)
class Draw:
    """An item that chance put into a place (from 0), and how probable that was given the places and items before."""

    place: int
    item_id: str
    propensity: float


def seed_of(list_id: bytes, offset: int) -> int:
    """The seed of one page: the same list at the same place explores the same way."""
    return int.from_bytes(hashlib.blake2b(list_id + offset.to_bytes(8), digest_size=8).digest())


class Explorer:
    """Knows which items to explore, and draws among them."""

    def __init__(self, catalog: Catalog, popularity: Popularity, share: float, below: int) -> None:
        self._catalog = catalog
        self._popularity = popularity
        self._share = share
        self._below = below
        self._lock = threading.Lock()
        self._pool: list[str] = []
        self._pool_key: tuple[str | None, int, int] | None = None

    @property
    def explores(self) -> bool:
        """Whether any place is given to chance."""
        return self._share > 0

    def draw(
        self,
        seed: int,
        k: int,
        ranked: Sequence[str],
        version: Active | None,
        may_come: Callable[[str], bool],
        affinity: Affinity,
        cap: CategoryCap,
    ) -> list[Draw]:
        """Give some of the k places, but never the first, to items of the pool; in order of places.

        `ranked` are the items that come without chance; each draw takes the place of the last of them. On average over
        seeds the set share of the places is drawn. `may_come` tells of an item whether this user may be shown it.
        """
        chance = random.Random(seed)  # noqa: S311 - nobody gains by guessing it
        wanted = int(k * self._share + chance.random())
        if wanted == 0:
            return []
        ranked = ranked[:k]
        listed = set(ranked)
        pool = [item_id for item_id in self._items(version) if item_id not in listed and may_come(item_id)]
        length = min(k, len(ranked) + min(wanted, len(pool)))
        places = sorted(chance.sample(range(1, length), max(min(wanted, len(pool), length - 1), 0)))
        for item_id in ranked[: length - len(places)]:
            cap.add(item_id)
        weights = np.array([1 + (AFFINITY_FACTOR - 1) * affinity(item_id) for item_id in pool])
        draws: list[Draw] = []
        for place in places:
            if cap:
                weights[[cap.is_full_for(item_id) for item_id in pool]] = 0
            sums = np.cumsum(weights)
            if not sums[-1]:
                break  # the caps leave nothing to draw
            point = min(chance.random() * sums[-1], np.nextafter(sums[-1], 0))  # rounding may bring it to the end
            number = int(np.searchsorted(sums, point, side="right"))
            draws.append(Draw(place, pool[number], float(weights[number] / sums[-1])))
            cap.add(pool[number])
            weights[number] = 0
        return draws

    def _items(self, version: Active | None) -> list[str]:
        turn = int(time.time() / TURN_SECONDS)  # the same in every process, so that they explore the same items
        key = (None if version is None else version.version, self._catalog.revision, turn)
        with self._lock:
            if key != self._pool_key:
                chance = random.Random(turn)  # noqa: S311
                unseen = version.candidates.unseen() if version is not None else []
                if len(unseen) > POOL_SIZE // 2:
                    unseen = chance.sample(unseen, POOL_SIZE // 2)
                rare = self._popularity.rarely_chosen(self._below, POOL_SIZE - len(unseen), chance)
                self._pool, self._pool_key = list(dict.fromkeys([*unseen, *rare])), key
            return self._pool
