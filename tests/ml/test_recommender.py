from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from ml.ids import IdMap
from ml.interactions import Interactions
from ml.models import MODELS, PopularityConfig, RankingModel, build_model
from ml.recommender import Recommender, best, windows_from_histories, windows_from_interactions


class Fixed(RankingModel):
    """Scores that a test gives, one row a user."""

    def __init__(self, scores: list[list[float]]) -> None:
        super().__init__(len(scores), len(scores[0]), PopularityConfig())
        self.register_buffer("table", torch.tensor(scores))

    def encode(self, users: Tensor, windows: Tensor) -> Tensor:
        return self.table[users]

    def score(self, encoded: Tensor, items: Tensor) -> Tensor:
        return encoded[:, items]


def ids(count: int, letter: str) -> IdMap:
    return IdMap.from_ids([f"{letter}{number:06}" for number in range(count)])


def fixed(scores: list[list[float]]) -> Recommender:
    return Recommender(Fixed(scores), ids(len(scores), "u"), ids(len(scores[0]), "i"))


def test_top_k_is_sorted_and_ties_go_to_the_lower_index() -> None:
    recommender = fixed([[1.0, 3.0, 2.0, 3.0, 3.0, 0.0]])
    items, scores = recommender.top_k([0], [[]], [[]], 4)
    assert items.tolist() == [[1, 3, 4, 2]]
    assert scores.tolist() == [[3.0, 3.0, 3.0, 2.0]]
    assert recommender.top_k([0], [[]], [[]], 2)[0].tolist() == [[1, 3]]


def test_ties_agree_with_a_stable_sort() -> None:
    generator = np.random.default_rng(0)
    for k in (1, 3, 50, 200, 300):
        table = generator.integers(0, 6, (8, 200)).astype(np.float32)
        items, _ = fixed(table.tolist()).top_k(range(8), [[]] * 8, [[]] * 8, k)
        expected = np.argsort(-table, axis=1, kind="stable")[:, :k]
        assert np.array_equal(items[:, : min(k, 200)], expected)
        assert (items[:, 200:] == -1).all()


def test_excluded_and_not_allowed_items_never_return() -> None:
    recommender = fixed([[5.0, 4.0, 3.0, 2.0], [5.0, 4.0, 3.0, 2.0]])
    allowed = np.array([True, True, True, False])
    items, scores = recommender.top_k([0, 1], [[], []], [[0], [1, 2, -1]], 3, allowed)
    assert items.tolist() == [[1, 2, -1], [0, -1, -1]]
    assert scores[0].tolist() == [4.0, 3.0, -np.inf]
    everything = recommender.top_k([0], [[]], [[0, 1, 2, 3]], 2)
    assert everything[0].tolist() == [[-1, -1]]


def test_an_exclusion_does_not_outlive_its_call() -> None:
    recommender = Recommender(build_model("popularity", 2, 4), ids(2, "u"), ids(4, "i"))
    recommender.model.count(torch.tensor([0, 0, 0, 1, 1, 2]))
    assert recommender.top_k([0], [[]], [[0]], 2)[0].tolist() == [[1, 2]]
    assert recommender.top_k([0, 1], [[], []], [[0], []], 2)[0].tolist() == [[1, 2], [0, 1]]
    assert recommender.top_k([0], [[]], [[]], 2)[0].tolist() == [[0, 1]]


def test_an_unknown_user_needs_a_model_that_folds_in() -> None:
    for name in MODELS:
        folding = Recommender(build_model(name, 3, 5), ids(3, "u"), ids(5, "i"))
        assert folding.folds_in
        assert folding.top_k([-1, 0], [[1, 2], []], [[1, 2], []], 3)[0].shape == (2, 3)
    with pytest.raises(ValueError, match="not trained on"):
        fixed([[1.0, 2.0]]).top_k([-1], [[1, 0]], [[]], 1)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not numbers"):
        fixed([[1.0, float("nan"), 2.0]]).top_k([0], [[]], [[]], 1)
    with pytest.raises(ValueError, match="at least 1"):
        fixed([[1.0, 2.0]]).top_k([0], [[]], [[]], 0)
    with pytest.raises(ValueError, match="id maps"):
        Recommender(Fixed([[1.0, 2.0]]), ids(2, "u"), ids(2, "i"))


def test_windows_hold_the_latest_items_padded_in_front() -> None:
    windows = windows_from_histories([[1, 2, 3, 4], [5], [], [6, -1, 7], np.array([-1, -1])], 3, 9)
    assert windows.tolist() == [[2, 3, 4], [9, 9, 5], [9, 9, 9], [9, 6, 7], [9, 9, 9]]
    assert windows_from_histories([[1], [2]], 0, 9).shape == (2, 0)


def test_windows_from_interactions_are_the_same() -> None:
    generator = np.random.default_rng(1)
    data = Interactions.from_arrays(
        [f"u{n:02}" for n in generator.integers(0, 20, 120)], [f"i{n:02}" for n in generator.integers(0, 30, 120)]
    )
    users = np.arange(data.num_users)
    histories = [data.history(user) for user in users]
    for length in (0, 1, 5, 50):
        expected = windows_from_histories(histories, length, data.num_items)
        assert np.array_equal(windows_from_interactions(data, users, length), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_ranks_as_its_users_do_alone_in_any_thread(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 20, 60)
    recommender = Recommender(model, ids(20, "u"), ids(60, "i"))
    generator = np.random.default_rng(2)
    histories = [generator.integers(0, 60, generator.integers(0, 9)) for _ in range(20)]
    together, scores = recommender.top_k(range(20), histories, histories, 10)
    assert ((together >= 0) & (together < 60)).all()

    def alone(user: int) -> tuple[np.ndarray, np.ndarray]:
        return recommender.top_k([user], [histories[user]], [histories[user]], 10)

    with ThreadPoolExecutor(4) as threads:
        for user, (items, own) in enumerate(threads.map(alone, list(range(20)) * 5)):
            np.testing.assert_allclose(own[0], scores[user % 20], rtol=1e-4, atol=1e-6)
            assert not set(items[0]) & set(histories[user % 20])


@pytest.mark.parametrize("name", MODELS)
def test_what_encode_knows_scores_and_ranks(name: str) -> None:
    torch.manual_seed(0)
    recommender = Recommender(build_model(name, 4, 9), ids(4, "u"), ids(9, "i"))
    histories = [[1, 2], [], [8, -1, 3], [5]]
    encoded = recommender.encode(range(4), histories)
    items, scores = recommender.top(encoded, [[0], [], [1, 2], []], 4)
    expected = recommender.top_k(range(4), histories, [[0], [], [1, 2], []], 4)
    assert np.array_equal(items, expected[0])
    assert np.array_equal(scores, expected[1])
    np.testing.assert_allclose(recommender.score_items(encoded, items), scores, rtol=1e-5, atol=1e-7)
    assert recommender.score_items(encoded[:1], [[-1, 2]])[0, 0] == -np.inf


def test_item_vectors_say_which_items_are_alike() -> None:
    for name in ("caser", "neumf", "matrix_factorization"):
        recommender = Recommender(build_model(name, 3, 6), ids(3, "u"), ids(6, "i"))
        for table, weight in recommender.model.state_dict().items():
            if table in recommender.model.item_tables:
                weight[4] = 2 * weight[1]
        first, second, other = recommender.item_vectors([1, 4, 2])
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert cosine == pytest.approx(1)
        assert first @ other < 0.99 * np.linalg.norm(first) * np.linalg.norm(other)
    with pytest.raises(ValueError, match="alike"):
        Recommender(build_model("popularity", 2, 4), ids(2, "u"), ids(4, "i")).item_vectors([1])


def test_best_of_nothing_and_of_one() -> None:
    values, indices = best(torch.zeros(3, 0), 5)
    assert values.shape == indices.shape == (3, 0)
    assert best(torch.tensor([[2.0]]), 5)[1].tolist() == [[0]]
