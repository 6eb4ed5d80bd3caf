"""Candidates from an approximate index: near the exact list, or the exact path serves."""

from collections import Counter

import numpy as np
import pytest
import torch

from ml.ids import IdMap
from ml.models import build_model
from ml.recommender import Recommender
from ml.retrieval import Retrieval, measured_retrieval, probes_worth

ITEMS, USERS = 20_000, 40


def clustered(config: dict[str, object]) -> Recommender:
    """Items in groups of the like, as training leaves them, some groups longer than others; users near some of them."""
    model = build_model("matrix_factorization", USERS, ITEMS, {"factors": 16, **config}).eval()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, 16, generator=generator) * (torch.rand(200, 1, generator=generator) + 0.3)
    belongs = torch.randint(0, 200, (ITEMS,), generator=generator)
    for name, weight in model.state_dict().items():
        if name == "item_factors.weight":
            weight.copy_(centres[belongs] + 0.3 * torch.randn(ITEMS, 16, generator=generator))
        elif name == "user_factors.weight":
            weight.copy_(centres[:USERS] + 0.5 * torch.randn(USERS, 16, generator=generator))
        else:
            weight.normal_(std=0.3, generator=generator)
    names = (IdMap.from_ids([f"{letter}{n:06}" for n in range(size)]) for letter, size in (("u", USERS), ("i", ITEMS)))
    return Recommender(model, *names)


@pytest.mark.parametrize("config", [{}, {"item_bias": False}, {"similarity": "distance"}])
def test_retrieval_finds_the_exact_list_and_says_how_much_of_it(config: dict[str, object]) -> None:
    recommender = clustered(config)
    products = recommender.model.inner_products()
    assert products is not None
    encoded = recommender.encode(range(USERS), [[]] * USERS)
    with torch.inference_mode():
        measured = measured_retrieval(Retrieval(products.as_products()), encoded)
    assert measured.users == USERS
    assert measured.recall >= 0.99
    excluded = [list(range(user, user + 300)) for user in range(USERS)]
    expected, scores = recommender.top(encoded, excluded, 100)
    ways = Counter[str]()
    recommender.prepare(probes=measured.probes, on_ranked=lambda way: ways.update([way]))
    assert recommender.retrieves
    found, values = recommender.top(encoded, excluded, 100)
    assert ways == {"retrieved": USERS}
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(expected, found, strict=True)])
    assert recall >= 0.99
    same = found == expected
    np.testing.assert_allclose(values[same], scores[same], rtol=1e-5, atol=1e-5)
    assert not any(np.isin(row, out).any() for row, out in zip(found, excluded, strict=True))


def test_filters_that_starve_the_index_leave_the_ranking_to_the_exact_path() -> None:
    recommender = clustered({})
    encoded = recommender.encode([3], [[]])
    ways = list[str]()
    exact = clustered({})
    recommender.prepare(probes=8, on_ranked=ways.append)
    half = np.arange(ITEMS) % 2 == 0
    found = recommender.top(encoded, [[]], 10, half)[0]
    assert found.tolist() == exact.top(encoded, [[]], 10, half)[0].tolist()
    few = np.arange(ITEMS) % 1000 == 7
    found = recommender.top(encoded, [[7]], 30, few)[0]
    assert found.tolist() == exact.top(encoded, [[7]], 30, few)[0].tolist()
    assert (found[0] >= 0).sum() == 19
    # Most of what is near this user is not allowed: too few of the candidates are left.
    nearest = exact.top(encoded, [[]], ITEMS // 2)[0][0]
    far = np.ones(ITEMS, np.bool_)
    far[nearest] = False
    found = recommender.top(encoded, [[]], 50, far)[0]
    assert found.tolist() == exact.top(encoded, [[]], 50, far)[0].tolist()
    assert ways == ["retrieved", "starved", "starved"]


def test_an_index_that_falls_short_is_not_used() -> None:
    assert probes_worth({"recall": 0.991, "users": 500, "probes": 16, "lists": 2048}) == 16
    assert probes_worth({"recall": 0.98, "users": 500, "probes": 256, "lists": 2048}) is None
    assert probes_worth(None) is None
    # Directions drawn at random are the worst there is: nothing is near anything.
    model = build_model("matrix_factorization", 20, 5_000, {"factors": 64, "item_bias": False})
    with torch.inference_mode():
        for weight in model.parameters():
            weight.normal_()
        products = model.inner_products()
        assert products is not None
        measured = measured_retrieval(Retrieval(products), model.encode(torch.arange(20), torch.empty(20, 0)))
    assert measured.recall < 0.9
    assert probes_worth({"recall": measured.recall, "probes": measured.probes}) is None
