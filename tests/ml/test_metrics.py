import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, P, Qrel, R, ScoredDoc, Success, nDCG

from ml.metrics import ABSENT, Ranks, confidence_intervals, mean_and_std, per_user


def ranks(by_user: list[list[int]], candidates: list[int]) -> Ranks:
    user = np.repeat(np.arange(len(by_user)), [len(row) for row in by_user])
    return Ranks(user, np.array([rank for row in by_user for rank in row], np.int64), np.array(candidates))


def test_numbers_worked_out_by_hand() -> None:
    found = per_user(ranks([[0], [2], [9], [1, 4]], [11, 11, 10, 6]), [3])
    assert found["hit_rate@3"].tolist() == [1, 1, 0, 1]
    assert found["recall@3"].tolist() == [1, 1, 0, 0.5]
    assert found["precision@3"] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    # log2(2) = 1, log2(4) = 2; two positives have an ideal of 1 + 1 / log2(3).
    assert found["ndcg@3"] == pytest.approx([1, 0.5, 0, (1 / np.log2(3)) / (1 + 1 / np.log2(3))])
    assert found["mrr"] == pytest.approx([1, 1 / 3, 0.1, 0.5])
    assert found["mrr@3"] == pytest.approx([1, 1 / 3, 0, 0.5])
    assert found["map"] == pytest.approx([1, 1 / 3, 0.1, (1 / 2 + 2 / 5) / 2])
    # With one positive: candidates below over candidates - 1. With two among four negatives: 8 pairs, 1 + 3 wrong.
    assert found["auc"] == pytest.approx([1, 0.8, 0, 1 - 4 / 8])


def test_a_positive_that_cannot_be_ranked_gains_nothing() -> None:
    found = per_user(ranks([[ABSENT], [0, ABSENT]], [10, 10]), [5])
    assert found["hit_rate@5"].tolist() == [0, 1]
    assert found["recall@5"].tolist() == [0, 0.5]
    assert found["auc"].tolist() == [0, 0.5]
    assert found["mrr"].tolist() == [0, 1]


def test_the_only_candidate_is_ranked_perfectly() -> None:
    found = per_user(ranks([[0]], [1]), [10])
    assert found["auc"].tolist() == [1]
    assert all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize("seed", range(4))
def test_ir_measures_agrees(seed: int) -> None:
    generator = np.random.default_rng(seed)
    users, items = 25, 60
    by_user = [sorted(generator.choice(items, generator.integers(1, 12), replace=False).tolist()) for _ in range(users)]
    cutoffs = [1, 5, 10, 50]
    found = per_user(ranks(by_user, [items] * users), cutoffs)
    qrels = [Qrel(f"{user:02}", str(rank), 1) for user, row in enumerate(by_user) for rank in row]
    run = [ScoredDoc(f"{user:02}", str(rank), float(items - rank)) for user in range(users) for rank in range(items)]
    oracle = {"mrr": RR, "map": AP}
    for k in cutoffs:
        oracle |= {
            f"hit_rate@{k}": Success @ k,
            f"recall@{k}": R @ k,
            f"precision@{k}": P @ k,
            f"ndcg@{k}": nDCG @ k,
            f"mrr@{k}": RR @ k,
        }
    expected = {name: np.full(users, np.nan) for name in oracle}
    names = {str(measure): name for name, measure in oracle.items()}
    for metric in ir_measures.iter_calc(list(oracle.values()), qrels, run):
        expected[names[str(metric.measure)]][int(metric.query_id)] = metric.value
    for name in oracle:
        assert found[name] == pytest.approx(expected[name]), name


def test_auc_counts_pairs() -> None:
    generator = np.random.default_rng(5)
    scores, positives = generator.random(40), generator.choice(40, 6, replace=False)
    order = np.argsort(-scores)
    place = {item: rank for rank, item in enumerate(order.tolist())}
    negatives = np.setdiff1d(np.arange(40), positives)
    pairs = np.mean([scores[positive] > scores[negative] for positive in positives for negative in negatives])
    found = per_user(ranks([[place[item] for item in positives]], [40]), [10])
    assert found["auc"] == pytest.approx([pairs])


def test_intervals_hold_the_mean_and_shrink_with_users() -> None:
    values = np.random.default_rng(0).random(4000)
    few = confidence_intervals({"m": values[:100]})["m"]
    many = confidence_intervals({"m": values})["m"]
    assert many[0] < values.mean() < many[1]
    # The normal approximation of a mean of uniform numbers: 1.96 * sqrt(1 / 12 / n) to either side.
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * np.sqrt(1 / 12 / 4000), rel=0.1)
    assert few[1] - few[0] > 4 * (many[1] - many[0])
    assert confidence_intervals({"m": values[:100]})["m"] == few
    with pytest.raises(ValueError, match="at least one user"):
        confidence_intervals({"m": np.zeros(0)})


def test_mean_and_std() -> None:
    assert mean_and_std([{"a": 1.0}, {"a": 3.0}]) == {"a": {"mean": 2.0, "std": pytest.approx(np.sqrt(2))}}
    assert mean_and_std([{"a": 1.0}]) == {"a": {"mean": 1.0, "std": 0.0}}
