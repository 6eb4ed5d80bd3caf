"""Exact top lists from approximate scores: a cheap pass bounds every score, and what may belong is scored exactly.

A screen says of each group of items how high their exact scores can be at most. The exact scores of some promising
items put a floor under the k-th best; an item that cannot reach the floor cannot belong to the list, and all others are
scored exactly. So the list is the exact one, always.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]
AnyIndices: TypeAlias = npt.NDArray[Any] | Sequence[int]
Floats = npt.NDArray[np.float32]
Bounds = npt.NDArray[np.float64]

# Items that share a bound, and the highest score among which is found first.
GROUP = 256
# Past this share of the catalogue, scoring exactly what a bound leaves costs more than scoring all.
MOST_CANDIDATES = 0.2
# Promising items beyond those asked for: the better they are, the higher the floor.
SPARE = 32

_NEVER = np.float32("-inf")


class ScoresNotNumbers(ValueError):  # noqa: N818
    """A model whose training went astray: nothing can be ranked by its scores."""

    def __init__(self) -> None:
        super().__init__("the model's scores are not numbers: train it again with a lower learning rate")


class Screened(Protocol):
    """One user's approximate scores."""

    @property
    def crowding(self) -> int:
        """About how many of the best items share a group."""

    @property
    def highest(self) -> Floats | Bounds:
        """What the exact score of no item in a group exceeds, (groups,)."""

    def scores(self, groups: Indices) -> Floats | Bounds:
        """What the exact scores in some groups do not exceed, (groups, GROUP)."""

    def items(self, groups: Indices) -> Indices:
        """The items of some groups, (groups, GROUP); negative where there is none."""


def screened_top(
    screen: Callable[[Tensor], Screened | None],
    encoded: Tensor,
    rescore: Callable[[Indices], Floats],
    shown: Callable[[Indices], Indices],
    k: int,
    pool: int,
) -> tuple[Indices, Floats] | None:
    """Find the k best items of one user, best first, the lower index first where scores tie, and their exact scores.

    `screen` bounds the scores of all items for one encoded user, (1, width), or gives None if they cannot be bounded.
    `rescore` scores items exactly and `shown` keeps those that may be shown; `pool` items are expected to hold k of
    those. None if they do not, or if so many items may belong that scoring everything is faster.
    """
    # Few steps: beside a pass over a large table nothing stays in the processor's cache.
    found = screen(encoded)
    if found is None:
        return None
    highest = found.highest
    count = min(-(-pool // found.crowding), len(highest))
    least = np.partition(highest, len(highest) - count)[len(highest) - count]
    groups = np.flatnonzero(highest >= least)
    bounds, items = found.scores(groups).reshape(-1), found.items(groups).reshape(-1)
    promising = items
    if pool < len(bounds):
        promising = items[bounds >= np.partition(bounds, len(bounds) - pool)[len(bounds) - pool]]
    promising = promising[promising >= 0]
    exact = rescore(shown(promising))
    if len(exact) < k:
        return None
    floor = float(np.partition(exact, len(exact) - k)[len(exact) - k])
    if floor < least:  # others may belong as well
        groups = np.flatnonzero(highest >= floor)
        bounds, items = found.scores(groups).reshape(-1), found.items(groups).reshape(-1)
    candidates = items[bounds >= floor]
    if len(candidates) > max(MOST_CANDIDATES * GROUP * len(highest), 4 * pool):
        return None
    candidates = shown(candidates)
    exact = rescore(candidates)
    best, values = best_of(exact, k, candidates)
    return candidates[best], values


def best_of(scores: Floats, k: int, items: Indices | None = None) -> tuple[Indices, Floats]:
    """Find the places of the k highest scores, highest first; where they tie, the lower of `items` or places first.

    Scores of minus infinity are never chosen. Raises ScoresNotNumbers.
    """
    count = len(scores)
    if not count:
        return np.zeros(0, np.int64), scores
    if np.isnan(scores.max()):
        raise ScoresNotNumbers
    floor = np.partition(scores, count - k)[count - k] if k < count else _NEVER
    found = np.flatnonzero(scores >= floor)
    values = scores[found]
    if floor == _NEVER:
        found, values = found[values > _NEVER], values[values > _NEVER]
    order = np.lexsort((found if items is None else items[found], -values))[:k]
    return found[order], values[order]


def best_of_each(scores: Floats, k: int) -> tuple[Indices, Floats]:
    """Find the k highest of each row of scores (batch, n) as `best_of` does: items and their scores, (batch, k).

    Items are -1 and scores minus infinity where fewer than k are above minus infinity. Raises ScoresNotNumbers.
    """
    batch, count = scores.shape
    if not count:
        return np.full((batch, k), -1, np.int64), np.full((batch, k), _NEVER)
    last = max(count - k, 0)
    highest = np.partition(scores, last, axis=1)[:, last:]
    if np.isnan(highest).any():  # the highest of all to partition
        raise ScoresNotNumbers
    floors = highest[:, :1]
    flat = scores.reshape(-1)
    found = np.flatnonzero(scores >= floors)
    own = flat[found]
    lowest = floors.min()
    if len(found) == batch * k and lowest > _NEVER:  # no tie at any end, as mostly
        order = np.argsort(-own.reshape(batch, k), axis=1, kind="stable")
        rows = np.arange(batch)[:, None]
        found = found.reshape(batch, k)[rows, order]
        return found - rows * count, flat[found]
    items, values = np.full((batch, k), -1, np.int64), np.full((batch, k), _NEVER)
    if lowest == _NEVER:
        found, own = found[own > _NEVER], own[own > _NEVER]
    rows = found // count
    found = found[np.lexsort((found, -own, rows))]  # the rows stay where they are
    places = np.arange(len(found)) - np.searchsorted(rows, np.arange(batch))[rows]
    inside = places < k  # but for ties at the end of a list
    found, rows, places = found[inside], rows[inside], places[inside]
    items[rows, places], values[rows, places] = found - rows * count, flat[found]
    return items, values


@functools.cache
def whole_products_are_exact() -> bool:
    """Whether this processor multiplies bytes into whole numbers without losing any: some cut off large sums."""
    try:
        rows = torch.full((GROUP, 2 * GROUP), 127, dtype=torch.int8)
        column = torch.full((2 * GROUP, 2), 127, dtype=torch.int8)
        column[:, 1] = -127
        found = torch._int_mm(rows, column).tolist()
    except RuntimeError:  # not built for this processor
        return False
    largest = 2 * GROUP * 127 * 127
    return bool(found == [[largest, -largest]] * GROUP)
