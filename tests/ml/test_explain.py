"""Explanations: what leaving an item of the history out does to a score."""

import numpy as np
import pytest
import torch

from ml.explain import explain
from ml.ids import IdMap
from ml.models import Caser, CaserConfig, build_model
from ml.recommender import Recommender


def recommender_of(name: str) -> Recommender:
    torch.manual_seed(2)
    model = build_model(name, 6, 20).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    users, items = (IdMap.from_ids([f"{letter}{n:02}" for n in range(size)]) for letter, size in (("u", 6), ("i", 20)))
    return Recommender(model, users, items)


def test_a_sum_over_the_window_by_hand() -> None:
    """With convolutions that give nothing, the score is q_i . (sum of the window / length + p_u)."""
    model = Caser(1, 4, CaserConfig(factors=2, window_length=2, horizontal_filters=1, vertical_filters=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.window_factors.weight[:4] = torch.tensor([[2.0, 0.0], [0.0, 4.0], [3.0, 1.0], [1.0, 1.0]])
        assert model.straight is not None
        model.straight.weight.fill_(0.5)
    ids = IdMap.from_ids(["a", "b", "c", "d"])
    found = explain(Recommender(model, IdMap.from_ids(["u"]), ids), 0, [0, 1], [2, 3])
    # q_c . a / 2 = 3, q_c . b / 2 = 2; q_d . a / 2 = 1, q_d . b / 2 = 2.
    assert found.method == "leave_one_out"
    assert [[(one.item, one.effect) for one in of_item] for of_item in found.influences] == [
        [(0, 3.0), (1, 2.0)],
        [(1, 2.0), (0, 1.0)],
    ]


@pytest.mark.parametrize(("name", "method", "user"), [("caser", "leave_one_out", 3), ("neumf", "fold_in", -1)])
def test_an_effect_is_the_difference_that_leaving_out_makes(name: str, method: str, user: int) -> None:
    recommender = recommender_of(name)
    history = [1, 2, 3, 2, 5, -1, 7, 8]
    found = explain(recommender, 3, history, [10, 11, 12], most=20)
    assert found.method == method
    whole = recommender.score_items(recommender.encode([user], [history]), np.array([[10, 11, 12]]))[0]
    for column, influences in enumerate(found.influences):
        assert [one.effect for one in influences] == sorted((one.effect for one in influences), reverse=True)
        for one in influences:
            without = [item for item in history if item != one.item]
            score = recommender.score_items(recommender.encode([user], [without]), np.array([[10 + column]]))[0, 0]
            assert one.effect == pytest.approx(whole[column] - score, abs=1e-4)
            assert one.effect > 0


@pytest.mark.parametrize("name", ["caser", "neumf", "matrix_factorization"])
def test_histories_that_explain_nothing(name: str) -> None:
    recommender = recommender_of(name)
    assert explain(recommender, 1, [], [4, 5]).influences == [[], []]
    assert explain(recommender, 1, [-1, -1], [4]).influences == [[]]
    assert explain(recommender, 1, [2, 3], []).influences == []
    assert len(explain(recommender, 1, list(range(20)) * 5_000, [4]).influences) == 1
    assert explain(recommender_of("popularity"), 1, [2], [4]) == explain(recommender_of("popularity"), -1, [], [4])
