import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.full_ranking import counts_of_ranked, first_items, ranks_of, take_out
from ml.metrics import ABSENT
from ml.screening import ScoresNotNumbers


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1, 7, 40, 170, 333, 512]),
    k=st.integers(1, 12),
    levels=st.sampled_from([1, 3, 50, 1_000_000]),
    ranked=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    targets=st.sampled_from([1, 3]),
)
def test_agrees_with_sorting_each_row(seed: int, size: int, k: int, levels: int, ranked: float, targets: int) -> None:
    generator = np.random.default_rng(seed)
    table = np.floor(generator.random((6, size)) * levels).astype(np.float32)
    out_rows, out_items = np.nonzero(generator.random(table.shape) >= ranked)
    scores = torch.from_numpy(table)
    take_out(scores, out_rows, out_items)
    left = [[i for i in np.argsort(-row, kind="stable").tolist() if row[i] > -np.inf] for row in table]
    assert counts_of_ranked(scores).tolist() == [len(own) for own in left]
    rows, items = np.repeat(np.arange(6), targets), generator.integers(0, size, 6 * targets)
    expected = [left[r].index(i) if i in left[r] else ABSENT for r, i in zip(rows, items, strict=True)]
    assert ranks_of(scores, rows, items).tolist() == expected
    assert [[i for i in own if i >= 0] for own in first_items(scores, k).tolist()] == [own[:k] for own in left]


@pytest.mark.parametrize(("size", "k"), [(8, 2), (1000, 2), (1000, 20)])
def test_scores_that_are_no_numbers_have_no_first(size: int, k: int) -> None:
    torch.manual_seed(0)
    # Where numpy's partition leaves them differs from processor to processor.
    for place in (0, 3, size // 2, size - 2):
        scores = torch.rand(5, size)
        scores[3, place] = torch.nan
        with pytest.raises(ScoresNotNumbers):
            first_items(scores, k)
