"""Low precision finds what may belong to the list, and the list is the exact one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ml.ids import IdMap
from ml.inner_product_screen import InnerProductScreen
from ml.models import RankingModel, build_model
from ml.neumf_screen import NeuMFScreen
from ml.recommender import Recommender
from ml.screening import GROUP, ScoresNotNumbers, best_of, best_of_each

MODELS = {
    "caser": ("caser", {"factors": 16}),
    "caser, paper": ("caser", {"factors": 40, "shared_items": False, "item_bias": False}),
    "factorisation": ("matrix_factorization", {"factors": 64}),
    "distances": ("matrix_factorization", {"factors": 12, "similarity": "distance"}),
    "neumf": ("neumf", {"factors": 32, "tower_factors": 32, "hidden": (32, 16, 8)}),
    "neumf, one layer": ("neumf", {"factors": 5, "tower_factors": 3, "hidden": (7,), "item_bias": False}),
}


def drawn(name: str, users: int, items: int, seed: int = 0, scale: float = 0.3) -> RankingModel:
    """A model with random weights of which some columns and rows are far larger than others, as in trained ones."""
    kind, config = MODELS[name]
    model = build_model(kind, users, items, config)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.state_dict().values():
        weight.normal_(std=scale, generator=generator)
        if weight.dim() == 2:
            weight *= torch.rand(weight.shape[0], 1, generator=generator) + 0.2
            weight *= torch.rand(weight.shape[1], generator=generator) + 0.2
    return model.eval()


def recommender(model: RankingModel) -> Recommender:
    users, items = model.num_users, model.num_items
    return Recommender(
        model, IdMap.from_ids([f"u{n:07}" for n in range(users)]), IdMap.from_ids([f"i{n:07}" for n in range(items)])
    )


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "users"), [("caser", 200), ("factorisation", 40), ("distances", 40), ("neumf", 40)])
def test_the_list_of_a_large_catalogue_is_the_exact_one(name: str, users: int) -> None:
    items, k = 100_000, 100
    model = drawn(name, users, items)
    plain, fast = recommender(model), recommender(model)
    fast.prepare()
    generator = np.random.default_rng(0)
    histories = list(generator.integers(0, items, (users, 8)))
    with one_thread():
        encoded = plain.encode(range(users), histories)
        expected, scores = plain.top(encoded, histories, k)
        found, values = fast.top(encoded, histories, k)
    np.testing.assert_allclose(values, scores, rtol=1e-4, atol=1e-5)
    moved = found != expected
    assert moved.mean() < 0.01  # only among neighbours whose scores differ by less than arithmetic does
    np.testing.assert_allclose(plain.score_items(encoded, found)[moved], scores[moved], rtol=1e-4, atol=1e-5)
    assert all(len(set(row)) == k for row in found.tolist())


@pytest.mark.parametrize("name", ["caser", "distances"])
def test_users_that_share_a_pass_get_the_bounds_they_get_alone(name: str) -> None:
    model = drawn(name, 5, 70 * GROUP + 3)
    with torch.inference_mode():
        products = model.inner_products()
        assert products is not None
        screen = InnerProductScreen(products.as_products())
        encoded = model.encode(torch.arange(5), torch.full((5, model.window_length), 3)).clone()
        encoded[3] = float("inf")
        shared = screen.together(list(encoded.split(1)))
        assert shared[3] is None
        groups = np.array([0, 5, 70])
        for row in (0, 1, 2, 4):
            alone, own = screen(encoded[row : row + 1]), shared[row]
            assert alone is not None
            assert own is not None
            assert np.array_equal(own.highest, alone.highest)
            assert np.array_equal(own.scores(groups), alone.scores(groups))
            assert np.array_equal(own.items(groups), alone.items(groups))


def exact_scores(model: RankingModel, encoded: Tensor) -> np.ndarray:
    with torch.inference_mode():
        precise = copy.deepcopy(model).double().eval()
        scores: np.ndarray = precise.score(encoded.double(), torch.arange(model.num_items))[0].numpy()
        return scores


@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([1e-4, 0.05, 0.5, 3.0]), items=st.integers(1, 600))
@settings(max_examples=10, deadline=None)
def test_no_score_exceeds_its_bound(name: str, seed: int, scale: float, items: int) -> None:
    model = drawn(name, 3, items, seed, scale)
    with torch.inference_mode():
        products = model.inner_products()
        screen = NeuMFScreen(model) if products is None else InnerProductScreen(products.as_products())  # type: ignore[arg-type]
        encoded = model.encode(torch.tensor([1]), torch.full((1, model.window_length), items - 1))
        found = screen(encoded)
    assert found is not None
    groups = np.arange(len(found.highest))
    numbers, bounds = found.items(groups), found.scores(groups)
    assert sorted(numbers[numbers >= 0]) == list(range(items))
    exact = exact_scores(model, encoded)
    assert (bounds[numbers >= 0] >= exact[numbers[numbers >= 0]]).all()
    assert (found.highest >= np.where(numbers >= 0, exact[numbers], -np.inf).max(1)).all()
    # And it says something: no bound is further from its score than the scores are from one another.
    if items > 500:
        assert (bounds[numbers >= 0] - exact[numbers[numbers >= 0]]).max() < 3 * (exact.max() - exact.min())


@st.composite
def questions(draw: st.DrawFn) -> tuple[int, int, list[int], float, int]:
    items = draw(st.integers(1, 3 * GROUP))
    excluded = draw(st.lists(st.integers(-1, items - 1), max_size=30))
    return (
        items,
        draw(st.integers(1, items + 3)),
        excluded,
        draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])),
        draw(st.integers(0, 2**20)),
    )


@pytest.mark.parametrize("name", MODELS)
@given(question=questions())
@settings(max_examples=12, deadline=None)
def test_exclusions_masks_and_ties_are_kept_to(name: str, question: tuple[int, int, list[int], float, int]) -> None:
    items, k, excluded, share, seed = question
    generator = torch.Generator().manual_seed(seed)
    model = drawn(name, 3, items)
    for weight in model.state_dict().values():  # whole numbers: sums are exact, and many scores are equal
        weight.copy_(torch.randint(-1, 2, weight.shape, generator=generator))
    fast = recommender(model)
    fast.prepare(screened_from=1)
    allowed = None if share == 1 else np.random.default_rng(seed).random(items) < share
    width = fast.encode([0], [[]]).shape[1]
    encoded = torch.randint(-2, 3, (1, width), generator=generator).float()
    scores = exact_scores(model, encoded)
    shown = np.ones(items, np.bool_) if allowed is None else allowed.copy()
    shown[[index for index in excluded if index >= 0]] = False
    order = np.lexsort((np.arange(items), -scores))
    expected = order[shown[order]][:k].tolist()
    found, values = fast.top(encoded, [excluded], k, allowed)
    assert found[0].tolist() == expected + [-1] * (k - len(expected))
    assert values[0, : len(expected)].tolist() == scores[expected].tolist()
    assert (values[0, len(expected) :] == -np.inf).all()


@pytest.mark.parametrize("name", MODELS)
def test_users_ranked_together_get_what_they_get_alone(name: str) -> None:
    plain, fast = recommender(drawn(name, 5, 300)), recommender(drawn(name, 5, 300))
    fast.prepare()
    users, histories, excluded = [3, 0, 4], [[1, 2], [], [5] * 40], [[7, -1], [], [*range(290)]]
    allowed = np.arange(300) != 8
    encoded = fast.encode(users, histories)
    together = fast.top(encoded, excluded, 20, allowed)
    for row in range(3):
        alone = fast.top(encoded[row : row + 1], excluded[row : row + 1], 20, allowed)
        for part, own in zip(together, alone, strict=True):
            assert np.array_equal(part[row], own[0])
    items, scores = plain.top(plain.encode(users, histories), excluded, 20, allowed)
    assert np.array_equal(together[0], items)
    np.testing.assert_allclose(together[1], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("screened_from", [1, 301])
def test_scores_that_are_no_numbers_are_refused(screened_from: int) -> None:
    for name in ("caser", "neumf"):
        fast = recommender(drawn(name, 2, 300))
        fast.prepare(screened_from=screened_from)
        encoded = fast.encode([0], [[1]]).clone()
        encoded[0, 0] = float("nan")
        with pytest.raises(ScoresNotNumbers, match="lower learning rate"):
            fast.top(encoded, [[]], 5)


def test_the_best_of_a_row() -> None:
    scores = np.array([1, 3, -np.inf, 3, 0, 3], np.float32)
    assert best_of(scores, 2)[0].tolist() == [1, 3]
    assert best_of(scores, 9)[0].tolist() == [1, 3, 5, 0, 4]
    assert best_of(scores, 2, np.array([9, 8, 7, 6, 5, 4]))[0].tolist() == [5, 3]
    assert best_of(scores[:0], 2)[0].tolist() == []


def test_the_best_of_each_row() -> None:
    scores = np.array([[1, 3, -np.inf, 3, 0, 3], [0, -np.inf, -np.inf, 5, -np.inf, 0]], np.float32)
    items, values = best_of_each(scores, 2)
    assert items.tolist() == [[1, 3], [3, 0]]
    assert values.tolist() == [[3, 3], [5, 0]]
    items, values = best_of_each(scores, 7)
    assert items.tolist() == [[1, 3, 5, 0, 4, -1, -1], [3, 0, 5, -1, -1, -1, -1]]
    assert values[1].tolist() == [5, 0, 0] + [-np.inf] * 4
    assert best_of_each(scores[:, :0], 2)[0].tolist() == [[-1, -1]] * 2
    # One list with a tie at its end beside one that is short.
    scores[0] = [1, 3, 3, 3, 0, 3]
    assert best_of_each(scores, 3)[0].tolist() == [[1, 2, 3], [3, 0, 5]]
    scores[1, 5] = -np.inf
    assert best_of_each(scores, 3)[0].tolist() == [[1, 2, 3], [3, 0, -1]]
