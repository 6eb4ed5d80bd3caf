import pytest
import torch
from torch import tensor

from ml import sampling
from ml.sampling import Negatives, NegativeSampler, SeenItems, choose_hard

USERS = tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2])
ITEMS = tensor([0, 8, 8, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8])
NUM_USERS, NUM_ITEMS = 4, 9  # user 2 has seen everything, user 3 nothing


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["bitmap", "search"])
def seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SeenItems:
    if request.param == "search":
        monkeypatch.setattr(sampling, "BITMAP_BYTES", 0)
    return SeenItems(USERS, ITEMS, NUM_USERS, NUM_ITEMS)


def test_seen_items_are_known_for_every_pair(seen: SeenItems) -> None:
    pairs = set(zip(USERS.tolist(), ITEMS.tolist(), strict=True))
    expected = tensor([[(user, item) in pairs for item in range(NUM_ITEMS)] for user in range(NUM_USERS)])
    every_item = torch.arange(NUM_ITEMS)
    drawn = tensor([8, 0, 0, 5])
    assert torch.equal(seen.contains(tensor([3, 0, 0]), drawn), expected[tensor([3, 0, 0])][:, drawn])
    assert torch.equal(seen.contains(torch.arange(NUM_USERS), every_item), expected)
    assert torch.equal(seen.contains(torch.arange(NUM_USERS), every_item.expand(NUM_USERS, -1)), expected)


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_seen_item_is_never_a_negative(distribution: str, is_shared: bool) -> None:
    sampler = NegativeSampler(USERS, ITEMS, NUM_USERS, NUM_ITEMS, distribution=distribution)  # type: ignore[arg-type]
    users = tensor([0, 1, 2, 3])
    draws = generator()
    pairs = set(zip(USERS.tolist(), ITEMS.tolist(), strict=True))
    for _ in range(50):
        negatives = (sampler.sample_shared if is_shared else sampler.sample)(users, 20, draws)
        items = negatives.items.expand(4, -1)
        for row, user in enumerate(users.tolist()):
            kept = items[row][negatives.valid[row]].tolist()
            assert not any((user, item) in pairs for item in kept)
        assert not negatives.valid[2].any()
        assert negatives.valid[3].all()


def test_a_shared_draw_as_large_as_the_catalogue_is_the_catalogue() -> None:
    sampler = NegativeSampler(USERS, ITEMS, NUM_USERS, NUM_ITEMS)
    for number in (NUM_ITEMS, 10 * NUM_ITEMS):
        negatives = sampler.sample_shared(tensor([0, 1]), number, generator())
        assert negatives.items.tolist() == list(range(NUM_ITEMS))
        assert torch.equal(negatives.valid, ~sampler.seen.contains(tensor([0, 1]), negatives.items))
    assert len(sampler.sample_shared(tensor([0]), NUM_ITEMS - 1, generator()).items) == NUM_ITEMS - 1


def test_uniform_samples_reach_every_unseen_item_alike() -> None:
    sampler = NegativeSampler(USERS, ITEMS, NUM_USERS, NUM_ITEMS)
    negatives = sampler.sample(tensor([1]), 80_000, generator())
    counts = torch.bincount(negatives.items[negatives.valid], minlength=NUM_ITEMS)
    assert counts[3] == 0
    rest = counts[counts > 0]
    assert len(rest) == NUM_ITEMS - 1
    assert (rest.float() / rest.sum() - 1 / 8).abs().max() < 0.01


def test_popular_items_are_drawn_in_proportion_to_a_power_of_their_count() -> None:
    items = tensor([0] * 16 + [1] * 4 + [2])
    sampler = NegativeSampler(torch.zeros_like(items), items, 2, 4, distribution="popularity", popularity_power=0.5)
    shares = torch.bincount(sampler.draw((70_000,), generator()), minlength=4) / 70_000
    assert torch.allclose(shares, tensor([4 / 7, 2 / 7, 1 / 7, 0.0]), atol=0.01)


def test_samples_repeat_with_the_seed() -> None:
    sampler = NegativeSampler(USERS, ITEMS, NUM_USERS, NUM_ITEMS)
    first = sampler.sample(USERS, 30, generator(5))
    assert torch.equal(first.items, sampler.sample(USERS, 30, generator(5)).items)
    assert not torch.equal(first.items, sampler.sample(USERS, 30, generator(6)).items)


def test_hard_negatives_score_highest_among_the_valid() -> None:
    pool = Negatives(torch.arange(5), tensor([[True, True, False, True, True]]))
    scores = tensor([[0.1, 0.9, 5.0, 0.4, 0.8]])
    assert choose_hard(scores, pool, 2).tolist() == [[1, 4]]


def test_semi_hard_negatives_score_just_below_the_observed_item() -> None:
    pool = Negatives(torch.arange(5), tensor([[True, True, False, True, True]]))
    scores = tensor([[0.1, 0.9, 0.45, 0.4, 0.8]])
    assert choose_hard(scores, pool, 2, below=tensor([[0.5]])).tolist() == [[3, 0]]
    # With too few below it, the nearest above it follows.
    assert choose_hard(scores, pool, 3, below=tensor([[0.5]])).tolist() == [[3, 0, 4]]
