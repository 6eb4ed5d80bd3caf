import numpy as np
import pytest
import torch
from torch import Tensor

from ml import evaluate as evaluate_module
from ml.evaluate import Evaluation, evaluate, popularity_of
from ml.interactions import Interactions
from ml.models import PopularityConfig, RankingModel, build_model
from ml.recommender import Recommender
from ml.split import leave_one_out, random_split, seeds


class Table(RankingModel):
    """Scores from a table, (users, items)."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__(*table.shape, PopularityConfig())
        self.register_buffer("table", torch.from_numpy(table.astype(np.float32)))

    def encode(self, users: Tensor, windows: Tensor) -> Tensor:
        return self.table[users]

    def score(self, encoded: Tensor, items: Tensor) -> Tensor:
        return encoded[:, items] if items.dim() == 1 else encoded.gather(1, items)


def generated(seed: int = 0, users: int = 30, items: int = 40, size: int = 500) -> Interactions:
    generator = np.random.default_rng(seed)
    return Interactions.from_arrays(
        [f"{n:03}" for n in [*range(users), *generator.integers(0, users, size)]],
        [f"{n:03}" for n in [*range(users), *(generator.random(size) ** 2 * items).astype(int)]],
    )


def tabled(data: Interactions, seed: int = 0, levels: int | None = None) -> Recommender:
    generator = np.random.default_rng(seed)
    table = generator.random((data.num_users, data.num_items))
    return Recommender(Table(table if levels is None else np.floor(table * levels)), data.users, data.items)


def ranking_by_hand(recommender: Recommender, history: Interactions, user: int, candidates: np.ndarray) -> list[int]:
    """The whole catalogue sorted stably, history and what is no candidate left out."""
    scores = recommender.model.table[user].numpy()
    seen = set(history.history(user).tolist())
    order = np.argsort(-scores, kind="stable").tolist()
    return [item for item in order if item not in seen and candidates[item]]


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("limited", [False, True])
def test_agrees_with_sorting_everything(levels: int | None, limited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "_BATCH_SCORES", 280)  # several batches
    data = generated()
    split = random_split(data, seed=1, test_share=0.3)
    recommender = tabled(data, levels=levels)
    history = split.history_for_test()
    candidates = np.arange(data.num_items) % 5 != 0 if limited else np.ones(data.num_items, bool)
    found = evaluate(recommender, history, split.test, candidates=candidates if limited else None, cutoffs=(5, 10))
    hits, firsts, aucs, shown = [], [], [], set()
    for user in range(data.num_users):
        wanted = set(split.test.history(user).tolist()) - set(history.history(user).tolist())
        if not wanted:
            continue
        ranking = ranking_by_hand(recommender, history, user, candidates)
        shown |= set(ranking[:10])
        places = [ranking.index(item) for item in wanted if item in ranking]
        hits.append(sum(place < 10 for place in places) / len(wanted))
        firsts.append(1 / (1 + min(places)) if places else 0)
        below = [
            sum(other > place and ranking[other] not in wanted for other in range(len(ranking))) for place in places
        ]
        aucs.append(sum(below) / (len(ranking) - len(places)) / len(wanted))
    assert found.metrics["recall@10"] == pytest.approx(np.mean(hits))
    assert found.metrics["mrr"] == pytest.approx(np.mean(firsts))
    assert found.metrics["auc"] == pytest.approx(np.mean(aucs))
    assert found.metrics["coverage@10"] == pytest.approx(len(shown) / candidates.sum())
    assert len(found.users) == len(hits)


def test_what_is_measured_is_what_top_k_serves() -> None:
    data = generated()
    split = leave_one_out(data)
    torch.manual_seed(0)
    for name in ("neumf", "caser", "popularity"):
        recommender = Recommender(build_model(name, data.num_users, data.num_items), data.users, data.items)
        history = split.history_for_test()
        found = evaluate(recommender, history, split.test, cutoffs=(10,))
        histories = [history.history(int(user)) for user in found.users]
        items, _ = recommender.top_k(found.users, histories, histories, 10)
        wanted = [split.test.history(int(user))[0] for user in found.users]
        hits = (items == np.array(wanted)[:, None]).any(axis=1)
        assert np.array_equal(hits, found.by_user["hit_rate@10"] > 0)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("keep_history", [False, True])
@pytest.mark.parametrize("levels", [None, 6])
def test_lists_alone_have_the_same_figures(
    levels: int | None, keep_history: bool, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "_BATCH_SCORES", 1000)  # several batches
    data = generated(users=40, items=120, size=900)
    split = random_split(data, seed=1, test_share=0.3)
    recommender = tabled(data, levels=levels)
    # What is popular scores high, as with trained models: then a look at popular items tells where most targets are.
    recommender.model.table += torch.linspace(3, 0, data.num_items)
    candidates = np.arange(data.num_items) % 5 != 0 if limited else None
    ranked: list[int] = []
    score_all = recommender.score_all

    def counted(encoded: Tensor) -> Tensor:
        ranked.append(len(encoded))
        return score_all(encoded)

    monkeypatch.setattr(recommender, "score_all", counted)

    def found(lists_only: bool) -> Evaluation:
        history = split.history_for_test()
        return evaluate(
            recommender,
            history,
            split.test,
            candidates=candidates,
            cutoffs=(1, 3),
            keep_history=keep_history,
            lists_only=lists_only,
        )

    whole = found(lists_only=False)
    everybody = sum(ranked)
    lists = found(lists_only=True)
    assert sum(ranked) - everybody < everybody
    assert lists.by_user.keys() == {name for name in whole.by_user if "@" in name}
    assert all(np.array_equal(values, whole.by_user[name]) for name, values in lists.by_user.items())
    assert lists.metrics == {name: value for name, value in whole.metrics.items() if name in lists.metrics}
    assert (lists.targets, lists.repeated) == (whole.targets, whole.repeated)


def test_history_is_masked_and_repeats_are_left_out() -> None:
    data = Interactions.from_arrays(["a"] * 4 + ["b"] * 3, ["1", "2", "3", "1", "1", "2", "3"])
    split = leave_one_out(data)
    found = evaluate(popularity_of(split.train), split.history_for_test(), split.test, cutoffs=(1,))
    assert (found.targets, found.repeated, len(found.users)) == (1, 1, 1)
    # For b only item 3 is left, so it comes first.
    assert found.metrics["hit_rate@1"] == 1
    assert found.metrics["auc"] == 1
    kept = evaluate(popularity_of(split.train), split.history_for_test(), split.test, cutoffs=(1,), keep_history=True)
    assert (kept.targets, kept.repeated) == (2, 0)


def test_sampled_negatives() -> None:
    data = generated(items=200, size=900)
    split = leave_one_out(data)
    recommender = tabled(data)
    full = evaluate(recommender, split.history_for_test(), split.test)
    sampled = evaluate(recommender, split.history_for_test(), split.test, negatives=20, seed=1)
    assert sampled.metrics["hit_rate@20"] > full.metrics["hit_rate@20"]
    # A rank among 20 of the 100-odd others estimates the same AUC.
    assert sampled.metrics["auc"] == pytest.approx(full.metrics["auc"], abs=0.05)
    again = evaluate(recommender, split.history_for_test(), split.test, negatives=20, seed=1)
    assert again.metrics == sampled.metrics
    everything = evaluate(recommender, split.history_for_test(), split.test, negatives=5000)
    assert everything.metrics == full.metrics


def test_the_sample_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = generated(items=100)
    split = leave_one_out(data)
    whole = evaluate(tabled(data), split.history_for_test(), split.test, negatives=10)
    monkeypatch.setattr(evaluate_module, "_BATCH_SCORES", 1)
    assert evaluate(tabled(data), split.history_for_test(), split.test, negatives=10).metrics == whole.metrics


def test_the_seeds_protocol_never_finds_items_beyond_its_universe() -> None:
    data = Interactions.from_arrays(["1", "1", "2", "2"], ["1", "3", "1", "2"], [1, 2, 1, 2])
    split = seeds(data)
    found = evaluate(popularity_of(split.train), split.train, split.test, candidates=split.candidates, cutoffs=(50,))
    assert found.by_user["hit_rate@50"].tolist() == [0, 1]
    assert found.by_user["auc"].tolist() == [0, 1]


def test_users_that_were_not_trained_on() -> None:
    data = generated()
    known = np.arange(data.num_users) % 2 == 0
    split = leave_one_out(data)
    found = evaluate(tabled(data), split.train, split.test, known_users=known)
    assert set(found.users % 2) == {0}
    assert found.unknown_users > 0
    for name in ("caser", "neumf"):
        folding = Recommender(build_model(name, data.num_users, data.num_items), data.users, data.items)
        assert set(evaluate(folding, split.train, split.test, known_users=known).users % 2) == {0, 1}


def test_nothing_to_evaluate_is_said_clearly() -> None:
    data = Interactions.from_arrays(["a", "a"], ["1", "2"])
    split = leave_one_out(data)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(popularity_of(split.train), split.train, split.test)
    with pytest.raises(ValueError, match="cutoff"):
        evaluate(popularity_of(data), data.select(np.array([0])), data.select(np.array([1])), cutoffs=(0,))


@pytest.mark.parametrize("lists_only", [False, True])
def test_scores_that_are_no_numbers_are_refused(lists_only: bool) -> None:
    data = generated()
    split = leave_one_out(data)
    table = np.full((data.num_users, data.num_items), np.nan)
    with pytest.raises(ValueError, match="not numbers"):
        evaluate(Recommender(Table(table), data.users, data.items), split.train, split.test, lists_only=lists_only)
