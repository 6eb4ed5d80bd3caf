from dataclasses import replace

import numpy as np
import pytest

from ml.interactions import Interactions
from ml.split import (
    SPLITS,
    Split,
    check_no_leak,
    leave_one_out,
    predefined,
    random_split,
    seeds,
    split_by_name,
    temporal,
)


def interactions(rows: list[tuple[str, str, int]]) -> Interactions:
    users, items, times = zip(*rows, strict=True)
    return Interactions.from_arrays(list(users), list(items), list(times))


def rows(part: Interactions) -> list[tuple[str, str, int]]:
    return [
        (part.users.id(int(user)), part.items.id(int(item)), int(time))
        for user, item, time in zip(part.user_index, part.item_index, part.time, strict=True)
    ]


def generated(seed: int = 0, size: int = 400) -> Interactions:
    generator = np.random.default_rng(seed)
    return Interactions.from_arrays(
        [f"u{n:02}" for n in generator.integers(0, 30, size)],
        [f"{n:03}" for n in generator.integers(1, 80, size)],
        generator.integers(0, 50, size),
    )


def test_leave_one_out_by_time_then_input_order() -> None:
    data = interactions(
        [("a", "1", 30), ("a", "2", 10), ("a", "3", 30), ("a", "4", 20), ("b", "1", 5), ("b", "2", 6), ("c", "3", 7)]
    )
    split = leave_one_out(data)
    assert rows(split.test) == [("a", "3", 30)]
    assert rows(split.validation) == [("a", "1", 30)]
    assert rows(split.train) == [("a", "2", 10), ("a", "4", 20), ("b", "1", 5), ("b", "2", 6), ("c", "3", 7)]
    assert rows(split.history_for_test()) == rows(data)[:3] + rows(split.train)[2:]


def test_leave_one_out_after_a_moment_holds_out_only_what_is_newer() -> None:
    data = interactions(
        [("a", "1", 10), ("a", "2", 20), ("a", "3", 30), ("b", "1", 1), ("b", "2", 2), ("b", "3", 3), ("b", "4", 15)]
    )
    split = leave_one_out(data, after=15)
    assert rows(split.test) == [("a", "3", 30)]
    assert rows(split.validation) == [("a", "2", 20)]
    assert len(split.train) == 5
    check_no_leak(split, data)


def test_temporal_cuts_at_two_moments_and_keeps_ties_together() -> None:
    data = interactions([(f"u{n % 3}", f"i{n}", n // 2) for n in range(20)])
    split = temporal(data, validation_share=0.25, test_share=0.25)
    assert sorted({time for *_, time in rows(split.train)}) == [0, 1, 2, 3, 4]
    assert sorted({time for *_, time in rows(split.validation)}) == [5, 6]
    assert sorted({time for *_, time in rows(split.test)}) == [7, 8, 9]
    with pytest.raises(ValueError, match="no times"):
        split_by_name("temporal", data, has_times=False)
    with pytest.raises(ValueError, match="different times"):
        temporal(interactions([("a", str(n), 7) for n in range(9)]))


def test_random_split_is_seeded_within_each_user() -> None:
    data = generated()
    split = random_split(data, seed=3, validation_share=0.1, test_share=0.2)
    counts = np.diff(data.offsets)
    assert np.array_equal(np.diff(split.test.offsets), np.where(counts < 3, 0, np.maximum(1, np.rint(counts * 0.2))))
    assert rows(split.test) == rows(random_split(data, seed=3, validation_share=0.1, test_share=0.2).test)
    assert rows(split.test) != rows(random_split(data, seed=4, validation_share=0.1, test_share=0.2).test)


def test_predefined_takes_the_labels() -> None:
    data = interactions([("a", "1", 1), ("a", "2", 2), ("a", "3", 3)])
    split = predefined(data, np.array([0, 2, 1]))
    assert rows(split.test) == [("a", "2", 2)]
    assert rows(split.validation) == [("a", "3", 3)]
    with pytest.raises(ValueError, match="labels"):
        predefined(data, np.array([0, 1]))
    with pytest.raises(ValueError, match="no split of its own"):
        predefined(data, None)


def test_seeds_takes_the_first_of_the_latest_and_few_candidates() -> None:
    data = interactions([("7", "10", 5), ("7", "2", 9), ("7", "1", 9), ("8", "3", 4)])
    split = seeds(data)
    assert rows(split.test) == [("7", "2", 9), ("8", "3", 4)]
    assert len(split.validation) == 0
    assert split.candidates is not None
    assert {data.items.id(int(i)) for i in np.flatnonzero(split.candidates)} == {"1", "2"}
    with pytest.raises(ValueError, match="numbers"):
        seeds(interactions([("a", "x", 1)]))


@pytest.mark.parametrize("name", SPLITS)
def test_parts_make_up_the_whole(name: str) -> None:
    data = generated()
    labels = np.random.default_rng(1).integers(0, 3, len(data))
    split = split_by_name(name, data, labels, 0)
    assert split.name == name
    assert sorted(rows(split.train) + rows(split.validation) + rows(split.test)) == sorted(rows(data))


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_leak_is_found(name: str, seed: int) -> None:
    data = generated(seed)
    labels = np.random.default_rng(seed).integers(0, 3, len(data))
    split = split_by_name(name, data, labels, seed)
    row = np.random.default_rng(seed).integers(0, len(split.test))
    leaked = split.test.select(np.array([row]))
    with pytest.raises(AssertionError, match="leak"):
        check_no_leak(replace(split, train=split.train.merge(leaked)), data)
    # A leak that keeps the number of rows, too.
    exchanged = split.train.select(np.arange(1, len(split.train))).merge(leaked)
    with pytest.raises(AssertionError, match="leak"):
        check_no_leak(replace(split, train=exchanged), data)


def test_training_on_what_came_later_is_found() -> None:
    data = interactions([("a", "1", 1), ("a", "2", 2), ("a", "3", 3), ("a", "4", 4)])
    parts = [data.select(np.array(chosen)) for chosen in ([0, 3], [1], [2])]
    with pytest.raises(AssertionError, match="came after"):
        check_no_leak(Split("leave-one-out", *parts), data)


def test_defaults_and_clear_errors() -> None:
    data = generated()
    assert split_by_name(None, data, None, 0).name == "leave-one-out"
    assert split_by_name(None, data, np.zeros(len(data)), 0).name == "predefined"
    with pytest.raises(ValueError, match="the splits are leave-one-out"):
        split_by_name("newest", data, None, 0)
    with pytest.raises(ValueError, match="no interaction"):
        split_by_name(None, Interactions.from_arrays([], []), None, 0)


@pytest.mark.parametrize("item", ["i", "9" * 30])
def test_seeds_needs_numbers_for_items(item: str) -> None:
    with pytest.raises(ValueError, match="numbers"):
        seeds(Interactions.from_arrays(["u", "u"], ["1", item]))
