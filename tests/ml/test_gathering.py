"""Calls that wait are done together, each gets its own answer, and a failure reaches those it concerns."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from ml.gathering import Gathering


class Work:
    """Squares numbers; the first call is held until a test lets it go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.begun = threading.Event()
        self.batches: list[list[int]] = []

    def alone(self, number: int) -> int:
        self.begun.set()
        self.let_go.wait(30)
        self.batches.append([number])
        return number * number

    def together(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        if 13 in numbers:
            raise ValueError("thirteen")
        return [number * number for number in numbers]


def after_one_that_is_held(numbers: Sequence[int], *, fewest: int, most: int) -> tuple[list[object], list[list[int]]]:
    work = Work()
    gathering = Gathering(work.alone, work.together, fewest=fewest, most=most, cores=1)

    def ask(number: int) -> object:
        try:
            return gathering(number)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(numbers) + 1) as threads:
        first = threads.submit(ask, 100)
        assert work.begun.wait(30)
        others = [threads.submit(ask, number) for number in numbers]
        pause = threading.Event()
        while gathering.waiting < len(numbers):
            pause.wait(0.001)
        work.let_go.set()
        assert first.result() == 10_000
        answers = [other.result() for other in others]
    assert gathering.waiting == 0
    return answers, work.batches[1:]


def test_calls_that_wait_share_the_work() -> None:
    answers, batches = after_one_that_is_held([2, 3, 4, 5, 6], fewest=3, most=4)
    assert answers == [4, 9, 16, 25, 36]
    assert [len(batch) for batch in batches] == [4, 1]


def test_too_few_to_share_work_one_after_another() -> None:
    answers, batches = after_one_that_is_held([2, 3], fewest=3, most=4)
    assert answers == [4, 9]
    assert [len(batch) for batch in batches] == [1, 1]


def test_a_failure_reaches_all_that_shared_it_and_nobody_else() -> None:
    answers, _ = after_one_that_is_held([13, 13, 13, 13], fewest=2, most=4)
    assert answers == ["thirteen"] * 4


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_every_call_of_many_threads_gets_its_own_answer(cores: int) -> None:
    work = Work()
    work.let_go.set()
    gathering = Gathering(work.alone, work.together, fewest=2, most=3, cores=cores)
    numbers = [number for number in range(300) if number != 13]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(gathering, numbers)) == [number * number for number in numbers]
    assert sorted(number for batch in work.batches for number in batch) == numbers
