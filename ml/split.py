"""Splits: which interactions train, which choose, and which are kept for the final figure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ml.interactions import Interactions

TRAIN, VALIDATION, TEST = 0, 1, 2
# A user with fewer stays whole in training.
SMALLEST_HISTORY = 3

Labels = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of one data set, over the same id maps; `candidates` limits the items that are ranked."""

    name: str
    train: Interactions
    validation: Interactions
    test: Interactions
    candidates: npt.NDArray[np.bool_] | None = None

    def history_for_test(self) -> Interactions:
        """What the user had done when the test is ranked: training and validation."""
        return self.train.merge(self.validation) if len(self.validation) else self.train


def leave_one_out(interactions: Interactions, after: int | None = None) -> Split:
    """Hold out each user's last interaction for test and the one before for validation.

    Users with fewer than three stay whole in training. With `after`, what would be held out but is not later than
    that time (microseconds) stays in training: a model trained up to then has seen it.
    """
    counts = np.diff(interactions.offsets)
    ends = interactions.offsets[1:][counts >= SMALLEST_HISTORY]
    labels = np.zeros(len(interactions), np.int8)
    labels[ends - 1] = TEST
    labels[ends - 2] = VALIDATION
    if after is not None:
        labels[interactions.time <= after] = TRAIN
    return _by_labels("leave-one-out", interactions, labels)


def temporal(interactions: Interactions, validation_share: float = 0.1, test_share: float = 0.1) -> Split:
    """Hold out the newest interactions of all for test and those before for validation, at two moments in time.

    Interactions of the same moment stay together. ValueError where all are of one moment.
    """
    if not (0 <= validation_share < 1 and 0 < test_share < 1 and validation_share + test_share < 1):
        raise ValueError("the shares of validation and test must lie between 0 and 1, and below 1 together")
    times = np.sort(interactions.time)
    if len(times) < SMALLEST_HISTORY or times[0] == times[-1]:
        raise ValueError("a temporal split needs interactions at different times: use --split leave-one-out")
    size = len(times)
    test_from = times[min(size - 1, round(size * (1 - test_share)))]
    validation_from = times[min(size - 1, round(size * (1 - test_share - validation_share)))]
    labels = np.zeros(size, np.int8)
    labels[interactions.time >= validation_from] = VALIDATION
    labels[interactions.time >= test_from] = TEST
    return _by_labels("temporal", interactions, labels)


def random_split(
    interactions: Interactions, seed: int = 0, validation_share: float = 0.1, test_share: float = 0.1
) -> Split:
    """Hold out a random share of each user's interactions, at least one each; fewer than three stay in training."""
    counts = np.diff(interactions.offsets)
    shuffled = np.lexsort((np.random.default_rng(seed).random(len(interactions)), interactions.user_index))
    place = np.arange(len(interactions)) - np.repeat(interactions.offsets[:-1], counts)
    num_test = np.repeat(np.where(counts >= SMALLEST_HISTORY, np.maximum(1, np.rint(counts * test_share)), 0), counts)
    num_validation = np.repeat(
        np.where(counts >= SMALLEST_HISTORY, np.maximum(1, np.rint(counts * validation_share)), 0), counts
    )
    labels = np.zeros(len(interactions), np.int8)
    labels[shuffled[place < num_test + num_validation]] = VALIDATION
    labels[shuffled[place < num_test]] = TEST
    return _by_labels("random", interactions, labels)


def predefined(interactions: Interactions, labels: npt.NDArray[Any] | None) -> Split:
    """Take the split that the source brings: one label a row, 0 train, 1 validation, 2 test."""
    if labels is None:
        raise ValueError("the data brings no split of its own: use --split leave-one-out, or a predefined source")
    if len(labels) != len(interactions):
        raise ValueError(f"{len(labels)} labels for {len(interactions)} interactions")
    return _by_labels("predefined", interactions, np.asarray(labels, np.int8))


def seeds(interactions: Interactions) -> Split:
    """Split as the original tutorials do: the latest interaction out, the first of those that tie; no validation.

    Their evaluation ranks only items numbered up to the number of users; test items beyond can never be found.
    """
    counts = np.diff(interactions.offsets)
    users = np.flatnonzero(counts)
    newest = interactions.time[interactions.offsets[users + 1] - 1]
    latest = np.flatnonzero(interactions.time == np.repeat(newest, counts[users]))
    _, first = np.unique(interactions.user_index[latest], return_index=True)
    labels = np.zeros(len(interactions), np.int8)
    labels[latest[first]] = TEST
    try:
        numbers = np.array([int(text) for text in interactions.items.array.to_pylist()], np.int64)
    except (ValueError, OverflowError):
        raise ValueError("the seeds' protocol needs item ids that are numbers, as in MovieLens 100K") from None
    return _by_labels("seeds", interactions, labels, numbers <= interactions.num_users)


SPLITS: dict[str, Callable[[Interactions, npt.NDArray[Any] | None, int], Split]] = {
    "leave-one-out": lambda data, _labels, _seed: leave_one_out(data),
    "temporal": lambda data, _labels, _seed: temporal(data),
    "random": lambda data, _labels, seed: random_split(data, seed),
    "predefined": lambda data, labels, _seed: predefined(data, labels),
    "seeds": lambda data, _labels, _seed: seeds(data),
}


def split_by_name(
    name: str | None,
    interactions: Interactions,
    labels: npt.NDArray[Any] | None = None,
    seed: int = 0,
    *,
    has_times: bool = True,
) -> Split:
    """Split as named, by default as the source says or else leave-one-out; checked for leaks and for content.

    Without times, each user's interactions have an order but there is no common moment to cut at.
    """
    if name is None:
        name = "leave-one-out" if labels is None else "predefined"
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}; the splits are {', '.join(SPLITS)}")
    if not len(interactions):
        raise ValueError("the data holds no interaction: check its format and what counts as one")
    if name == "temporal" and not has_times:
        raise ValueError("the data has an order but no times, so no common moment to cut at: use --split leave-one-out")
    split = SPLITS[name](interactions, labels, seed)
    check_no_leak(split, interactions)
    return split


def check_no_leak(split: Split, whole: Interactions) -> None:
    """Prove that no held-out row is in training: AssertionError if the parts are not exactly the whole.

    Where the split is one in time, also that nobody's training reaches past what is held out for them.
    """
    parts = (split.train, split.validation, split.test)
    rows = sum(len(part) for part in parts)
    if rows != len(whole) or sum(map(_fingerprint, parts)) % 2**64 != _fingerprint(whole):
        raise AssertionError(
            f"leak: the parts of the {split.name} split hold {rows} rows that are not the {len(whole)}"
        )
    if split.name in ("leave-one-out", "temporal", "seeds"):
        for earlier, later in ((parts[0], parts[1]), (parts[0], parts[2]), (parts[1], parts[2])):
            present = np.diff(earlier.offsets) > 0
            newest = np.full(whole.num_users, np.iinfo(np.int64).min)
            newest[present] = earlier.time[earlier.offsets[1:][present] - 1]
            if (newest[later.user_index] > later.time).any():
                raise AssertionError(f"leak: the {split.name} split trains on what came after what it holds out")


def _fingerprint(interactions: Interactions) -> int:
    """Sum a hash of every row: equal for the same rows in any order (modulo 2**64)."""
    mixed = interactions.time.astype(np.uint64)
    for column in (interactions.user_index, interactions.item_index):
        # The finaliser of splitmix64, so that neighbouring numbers land far apart.
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64) + np.uint64(1)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
    return int(mixed.sum(dtype=np.uint64))


def _by_labels(
    name: str, interactions: Interactions, labels: Labels, candidates: npt.NDArray[np.bool_] | None = None
) -> Split:
    train, validation, test = (interactions.select(labels == label) for label in (TRAIN, VALIDATION, TEST))
    return Split(name, train, validation, test, candidates)
