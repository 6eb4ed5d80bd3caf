"""Strangers: vectors fitted to a few events against frozen items."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ml import fold_in
from ml.fold_in import FoldIn, chosen_strength
from ml.ids import IdMap
from ml.interactions import Interactions
from ml.models import MatrixFactorization, MatrixFactorizationConfig, NeuMF, NeuMFConfig, RankingModel, build_model
from ml.recipes import apply_overrides, recipe_named
from ml.recommender import Recommender
from ml.train import train

MODELS = ("neumf", "matrix_factorization")


def random_model(name: str, users: int = 40, items: int = 60) -> RankingModel:
    torch.manual_seed(3)
    model = build_model(name, users, items).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.count(torch.randint(items, (500,)))
    return model


def recommender_of(model: RankingModel) -> Recommender:
    users, items = (
        IdMap.from_ids([f"{letter}{number:05}" for number in range(size)])
        for letter, size in (("u", model.num_users), ("i", model.num_items))
    )
    return Recommender(model, users, items)


def test_the_fit_is_the_maximum_worked_out_by_hand() -> None:
    """One factor, two users at -1 and 1, two items at -1 and 1, each chosen as often: centre 0, width 1.

    After item 1 once, the fit x solves 1 - tanh(x) = 3 x: the derivative of x - log(e^x + e^-x) - 3 / 2 x^2.
    """
    model = MatrixFactorization(2, 2, MatrixFactorizationConfig(factors=1, item_bias=False)).eval()
    model.load_state_dict(
        {
            "user_factors.weight": torch.tensor([[-1.0], [1.0]]),
            "item_factors.weight": torch.tensor([[-1.0], [1.0]]),
            "counts": torch.tensor([5.0, 5.0]),
        }
    )
    fitting = FoldIn(model)
    assert fold_in.PRIOR_STRENGTH == 3
    once = float(fitting.encode(torch.tensor([[2, 2, 1]])))
    assert 1 - np.tanh(once) == pytest.approx(3 * once, abs=1e-6)
    # The older of two events weighs half as much as the newer one, and both together 2 ** .8.
    assert (fold_in.RECENCY, fold_in.EVIDENCE) == (1, 0.8)
    both = float(fitting.encode(torch.tensor([[2, 0, 1]])))
    newer, older = 2**0.8 * 2 / 3, 2**0.8 / 3
    assert (newer - older) - (newer + older) * np.tanh(both) == pytest.approx(3 * both, abs=1e-6)
    assert float(fitting.encode(torch.tensor([[2, 2, 2]]))) == pytest.approx(0, abs=1e-6)


def test_the_centre_is_where_the_crowd_chooses() -> None:
    model = MatrixFactorization(2, 2, MatrixFactorizationConfig(factors=1, item_bias=False)).eval()
    table = torch.tensor([[-1.0], [1.0]])
    model.load_state_dict(
        {"user_factors.weight": table, "item_factors.weight": table, "counts": torch.tensor([3.0, 9.0])}
    )
    centre = float(FoldIn(model).encode(torch.tensor([[2]])))
    # The derivative of 3/4 log p(1) + 1/4 log p(0) - strength / 2 x^2, where p(1) = e^x / (e^x + e^-x).
    assert 0.5 - np.tanh(centre) == pytest.approx(fold_in.CENTRE_STRENGTH * centre, abs=1e-6)


@pytest.mark.parametrize("hidden", [(5,), (6, 4), (6, 4, 3)])
def test_neumf_follows_its_tangent(hidden: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    model = NeuMF(4, 9, NeuMFConfig(factors=3, tower_factors=2, hidden=hidden, initial_scale=1.0)).eval()
    items = torch.tensor([0, 3, 8])
    encoded = model.encode(torch.tensor([1]), torch.empty(1, 0, dtype=torch.int64))[0].detach()

    def scores(at: Tensor) -> Tensor:
        return model.score(at.unsqueeze(0), items)[0]

    slopes, offsets = model.linear_scores(encoded, items)
    torch.testing.assert_close(slopes @ encoded + offsets, scores(encoded))
    torch.testing.assert_close(slopes, torch.autograd.functional.jacobian(scores, encoded))


@pytest.mark.parametrize("similarity", ["dot", "distance"])
def test_a_factorisation_is_linear_but_for_what_all_items_share(similarity: str) -> None:
    model = build_model("matrix_factorization", 4, 9, {"factors": 3, "similarity": similarity, "initial_scale": 1.0})
    items, encoded = torch.arange(9), torch.randn(1, 3)
    slopes, offsets = model.linear_scores(torch.zeros(3), items)
    difference = model.score(encoded, items)[0] - slopes @ encoded[0] - offsets
    torch.testing.assert_close(difference, difference[:1].expand(9))


@pytest.mark.parametrize("name", MODELS)
def test_a_stranger_alone_in_a_batch_and_among_known_users(name: str) -> None:
    recommender = recommender_of(random_model(name))
    histories: list[list[int]] = [[1, 2, 3], [], [5, -1, 7], list(range(50)), *([n] for n in range(14))]
    together = recommender.encode([-1] * len(histories), histories)
    for row, history in enumerate(histories[:5]):
        torch.testing.assert_close(recommender.encode([-1], [history])[0], together[row], rtol=1e-4, atol=1e-5)
    mixed = recommender.encode([-1, 4, -1], histories[:3])
    torch.testing.assert_close(mixed[[0, 2]], together[[0, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], recommender.encode([4], [[]])[0])
    assert torch.equal(recommender_of(random_model(name)).encode([-1], [[4, 5]]), recommender.encode([-1], [[4, 5]]))


@pytest.mark.parametrize("name", MODELS)
def test_what_came_after_the_training_moves_a_user_by_what_it_says_of_a_stranger(name: str) -> None:
    recommender = recommender_of(random_model(name))
    histories = [[1, 2, 3, 4], [5, -1, 6], [7, 8], [9]]
    known = recommender.encode([3, 4, 5, -1], histories)
    moved = recommender.encode([3, 4, 5, -1], histories, fresh=[2, 1, 0, 1])
    news = recommender.encode([-1] * 3, [[3, 4], [6], []])
    expected = known[:2] + fold_in.NEWS_WEIGHT * (news[:2] - news[2])
    torch.testing.assert_close(moved[:2], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(moved[2:], known[2:])
    caser = recommender_of(random_model("caser"))
    assert torch.equal(caser.encode([3], [[1, 2]], [1]), caser.encode([3], [[1, 2]]))


@pytest.mark.parametrize("name", MODELS)
def test_only_the_latest_events_count(name: str) -> None:
    recommender = recommender_of(random_model(name))
    latest = [number % 60 for number in range(fold_in.MAX_EVENTS)]
    assert torch.equal(recommender.encode([-1], [latest]), recommender.encode([-1], [[7] * 100_000 + latest]))


@pytest.mark.parametrize("scale", [0.3, 0.7, 1.0])
def test_the_centre_is_nearer_to_what_the_crowd_chose_than_the_mean_user(scale: float) -> None:
    torch.manual_seed(0)
    model = MatrixFactorization(300, 500, MatrixFactorizationConfig(factors=32, initial_scale=scale)).eval()
    model.counts.copy_(1000 / torch.arange(1, 501))
    with torch.no_grad():
        centre = FoldIn(model).encode(torch.full((1, 1), 500))
        mean = model.encode(torch.arange(300), torch.zeros(300, 0, dtype=torch.int64)).mean(0, keepdim=True)
        at_centre, at_mean = (
            float((model.score_all(vector)[0].log_softmax(0) * model.counts).sum() / model.counts.sum())
            for vector in (centre, mean)
        )
    assert at_centre > at_mean


def test_the_fit_arrives_from_far_away_whoever_else_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vectors are long and a history is of one kind, whole steps of Newton's end up going to and fro."""
    torch.manual_seed(0)
    model = MatrixFactorization(500, 1000, MatrixFactorizationConfig(factors=32, initial_scale=1.0)).eval()
    model.counts.copy_(torch.randint(1, 50, (1000,)))
    vectors = model.item_factors.weight[:1000].detach()
    alike = (vectors @ vectors[:12].T).topk(100, 0).indices.T
    windows = torch.cat((torch.full((1, 100), 7), alike, torch.randint(0, 1000, (3, 100))))
    fitted = FoldIn(model).encode(windows)
    alone = torch.cat([FoldIn(model).encode(window.unsqueeze(0)) for window in windows])
    monkeypatch.setattr(fold_in, "MOST_STEPS", 200)
    monkeypatch.setattr(fold_in, "SMALL_STEP", 1e-6)
    settled = FoldIn(model).encode(windows)
    with torch.no_grad():
        scores, scores_alone, wanted = (model.score_all(encoded) for encoded in (fitted, alone, settled))
    assert float(wanted[0].softmax(0)[7]) > 0.5
    torch.testing.assert_close(scores, wanted, rtol=0, atol=0.02)
    torch.testing.assert_close(scores_alone, scores, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_a_part_of_a_large_catalogue_stands_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(name, items=600)
    whole = FoldIn(model)
    monkeypatch.setattr(fold_in, "MAX_ITEMS", 300)
    part = FoldIn(model)
    windows = torch.tensor([[3, 599], [5, 6]])
    cosine = torch.nn.functional.cosine_similarity(whole.encode(windows), part.encode(windows))
    assert bool((cosine > 0.7).all())


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_nothing_trained_are_no_part_of_the_crowd(name: str) -> None:
    model = random_model(name)
    trained = np.arange(40) < 25
    windows = torch.tensor([[60, 3], [5, 6]])
    before = FoldIn(model, trained).encode(windows)
    with torch.no_grad():
        for table in model.user_tables:
            model.get_parameter(table)[25:] = 100.0
    torch.testing.assert_close(FoldIn(model, trained).encode(windows), before)
    assert not torch.allclose(FoldIn(model).encode(windows), before)


@pytest.mark.parametrize(("tells", "wanted"), [(True, 0.25), (False, 4.0)])
def test_the_strength_is_chosen_by_what_users_did_next(*, tells: bool, wanted: float) -> None:
    """Half of the items lie on either side; who begins on one goes on there, or anywhere."""
    random = np.random.default_rng(0)
    sides = random.integers(2, size=(200, 1)) if tells else random.integers(2, size=(200, 5))
    items = (2 * random.integers(20, size=(200, 5)) + sides).ravel()
    model = MatrixFactorization(200, 40, MatrixFactorizationConfig(factors=1, item_bias=False)).eval()
    model.load_state_dict(
        {
            "user_factors.weight": torch.tensor([[-1.0], [1.0]] * 100),
            "item_factors.weight": torch.tensor([[-1.0], [1.0]] * 20),
            "counts": torch.ones(40),
        }
    )
    data = Interactions.from_arrays(
        [f"u{number // 5:03}" for number in range(1000)], [f"i{item:02}" for item in items], np.arange(1000)
    )
    assert data.num_items == 40
    assert chosen_strength(model, data, seed=0) == wanted


def test_without_a_second_event_the_strength_is_the_usual_one() -> None:
    data = Interactions.from_arrays([f"u{user}" for user in range(40)], ["i0"] * 40)
    model = MatrixFactorization(40, 1, MatrixFactorizationConfig(factors=2)).eval()
    assert chosen_strength(model, data, seed=0) == fold_in.PRIOR_STRENGTH


@pytest.mark.parametrize("name", MODELS)
def test_two_groups_of_users(name: str) -> None:
    """Even users take even items, odd ones odd items: a stranger is known by two events."""
    rows = [(user, item) for user in range(40) for item in range(user % 2, 40, 2) if (user * 7 + item) % 3]
    data = Interactions.from_arrays([f"u{user:02}" for user, _ in rows], [f"i{item:02}" for _, item in rows])
    recipe = apply_overrides(recipe_named(name), {"epochs": "15", "learning_rate": "0.03", "recency": "0"})
    recommender = Recommender(train(recipe, data).model, data.users, data.items)
    for history in ([2, 8], [3, 9]):
        items, _ = recommender.top_k([-1], [history], [history], 10)
        assert sum(int(item) % 2 == history[0] % 2 for item in items[0]) >= 9
