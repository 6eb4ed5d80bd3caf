"""What every model must do, and what each says it computes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.nn import functional

from ml.models import (
    MODELS,
    Caser,
    CaserConfig,
    MatrixFactorization,
    MatrixFactorizationConfig,
    NeuMF,
    NeuMFConfig,
    Popularity,
    PopularityConfig,
    RankingModel,
    build_model,
    grown_from,
)
from ml.models.ranking_model import Dropout

NUM_USERS, NUM_ITEMS = 5, 40
SMALL: dict[str, dict[str, object]] = {
    "neumf": {"factors": 4, "tower_factors": 3, "hidden": (6, 5)},
    "caser": {"factors": 4, "window_length": 3, "horizontal_filters": 2, "vertical_filters": 2},
    "matrix_factorization": {"factors": 4},
    "popularity": {},
}


def small(name: str, seed: int = 0, users: int = NUM_USERS, items: int = NUM_ITEMS) -> RankingModel:
    torch.manual_seed(seed)
    model = build_model(name, users, items, SMALL[name])
    if isinstance(model, Popularity):
        model.count(torch.randint(items, (500,)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # away from the tiny start, where a wrong score hides
    return model.eval()


def inputs(model: RankingModel, batch: int = NUM_USERS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    windows = torch.randint(NUM_ITEMS, (batch, model.window_length))
    windows[:, :1] = NUM_ITEMS
    return torch.arange(batch) % NUM_USERS, windows


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_scores_have_one_column_an_item(self, name: str) -> None:
        model = small(name)
        users, windows = inputs(model)
        assert model(users, windows, torch.zeros(NUM_USERS, 7, dtype=torch.int64)).shape == (NUM_USERS, 7)
        assert model(users, windows, torch.arange(7)).shape == (NUM_USERS, 7)

    def test_a_batch_of_one_scores_as_in_company(self, name: str) -> None:
        model = small(name)
        users, windows = inputs(model)
        items = torch.randint(NUM_ITEMS, (NUM_USERS, 7))
        together = model(users, windows, items)
        alone = torch.cat([model(users[i : i + 1], windows[i : i + 1], items[i : i + 1]) for i in range(NUM_USERS)])
        assert torch.allclose(together, alone, atol=1e-5)

    def test_shared_items_score_as_given_to_each(self, name: str) -> None:
        model = small(name)
        users, windows = inputs(model)
        items = tensor([3, 1, 3, 39])
        assert torch.allclose(
            model(users, windows, items), model(users, windows, items.expand(NUM_USERS, 4)), atol=1e-5
        )

    @pytest.mark.parametrize("batch", [1, NUM_USERS, 300])
    def test_the_catalogue_scores_as_its_items_do(self, name: str, batch: int) -> None:
        model = small(name)
        users, windows = inputs(model, batch)
        with torch.no_grad():
            catalogue = model.score_catalogue(users, windows)
        assert catalogue.shape == (batch, NUM_ITEMS)  # nothing for padding
        assert torch.allclose(catalogue, model(users, windows, torch.arange(NUM_ITEMS)), atol=1e-4)

    def test_catalogue_scores_follow_the_weights(self, name: str) -> None:
        model, other = small(name), small(name, seed=9)
        users, windows = inputs(model)
        with torch.no_grad():
            model.score_catalogue(users, windows)
            model.train()
            model.load_state_dict(other.state_dict())
            model.eval()
            assert torch.equal(model.score_catalogue(users, windows), other.score_catalogue(users, windows))

    def test_weights_start_small_and_finite(self, name: str) -> None:
        model = build_model(name, NUM_USERS, NUM_ITEMS).eval()
        scores = model(*inputs(model), torch.arange(NUM_ITEMS))
        assert scores.isfinite().all()
        assert scores.abs().max() < 0.5

    def test_one_user_and_one_item_are_enough(self, name: str) -> None:
        model = build_model(name, 1, 1, SMALL[name]).eval()
        windows = torch.full((1, model.window_length), 1)
        assert model(tensor([0]), windows, tensor([[0]])).isfinite().all()

    def test_no_users_or_items_are_refused(self, name: str) -> None:
        for users, items in ((0, 3), (3, 0)):
            with pytest.raises(ValueError, match="at least one user and one item"):
                build_model(name, users, items)

    def test_an_unknown_setting_lists_the_known(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} has no wings; it has"):
            build_model(name, 1, 1, {"wings": 2})

    def test_a_warm_start_keeps_what_each_user_and_item_had(self, name: str) -> None:
        old = small(name)
        fresh = build_model(name, NUM_USERS + 1, NUM_ITEMS + 1, SMALL[name]).eval()
        # The new user and item sort first, so every old one moved up by a row.
        grown = grown_from(old, fresh, np.arange(-1, NUM_USERS), np.arange(-1, NUM_ITEMS))
        users, windows = inputs(old)
        moved = torch.where(windows == NUM_ITEMS, NUM_ITEMS + 1, windows + 1)
        with torch.no_grad():
            after = grown.score_catalogue(users + 1, moved)
            expected = old.score_catalogue(users, windows)
        if name != "popularity":  # whose counts are taken anew
            assert torch.allclose(after[:, 1:], expected, atol=1e-5)
        assert after.isfinite().all()


def test_neumf_is_the_fused_formula() -> None:
    model = small("neumf")
    assert isinstance(model, NeuMF)
    user, item = 2, 11
    weights = model.state_dict()
    product = weights["user_factors.weight"][user] * weights["item_factors.weight"][item]
    first = torch.cat((weights["user_layer.weight"], weights["item_layer.weight"]), 1)
    joined = torch.cat((weights["user_tower.weight"][user], weights["item_tower.weight"][item]))
    hidden = functional.relu(first @ joined + weights["user_layer.bias"])
    hidden = functional.relu(weights["deeper_layers.0.weight"] @ hidden + weights["deeper_layers.0.bias"])
    fused = torch.cat((weights["factor_weights"], weights["tower_weights"])) @ torch.cat((product, hidden))
    score = model(tensor([user]), torch.empty(1, 0), tensor([[item]]))
    assert score.item() == pytest.approx((fused + weights["item_bias.weight"][item, 0]).item(), abs=1e-4)


@given(
    users=st.integers(1, 70),
    items=st.integers(1, 90),
    hidden=st.sampled_from([(64,), (130, 7), (64, 32, 16)]),
    is_shared=st.booleans(),
)
@example(users=70, items=90, hidden=(130, 7), is_shared=True)
@example(users=70, items=90, hidden=(64, 32, 16), is_shared=False)
@example(users=1, items=90, hidden=(4000,), is_shared=True)
@settings(deadline=None, max_examples=20)
def test_neumf_learns_the_same_however_large_the_batch(
    users: int, items: int, hidden: tuple[int, ...], is_shared: bool
) -> None:
    """Large batches go through the tower block by block; in double precision, nothing does."""
    torch.manual_seed(0)
    model = NeuMF(70, 90, NeuMFConfig(4, 3, hidden, embedding_dropout=0.0, initial_scale=1.0))
    asked = torch.arange(items) if is_shared else torch.randint(90, (users, items))
    wanted = torch.randn(users, items)
    found = []
    for each in (model, copy.deepcopy(model).double()):
        scores = each(torch.arange(users), torch.empty(users, 0), asked)
        (scores * wanted).sum().backward()
        gradients = {name: value.grad.to_dense() for name, value in each.named_parameters() if value.grad is not None}
        found.append({"scores": scores.detach()} | gradients)
    for name, expected in found[1].items():
        torch.testing.assert_close(
            found[0][name].double(), expected, rtol=1e-4, atol=1e-4 * (1 + expected.abs().max().item())
        )


@pytest.mark.parametrize("items", [9, 90])
def test_neumf_shows_a_weight_that_is_no_number_however_large_the_batch(items: int) -> None:
    model = NeuMF(70, 90, NeuMFConfig(4, 3, (64, 32), embedding_dropout=0.0))
    with torch.no_grad():
        model.deeper_layers[0].get_parameter("weight")[0, 0] = torch.nan
    assert model(torch.arange(70), torch.empty(70, 0), torch.arange(items)).isnan().all()


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("horizontal_length", [2, 4, 9])
def test_caser_is_the_convolutions_of_the_paper(is_shared: bool, horizontal_length: int) -> None:
    torch.manual_seed(0)
    config = CaserConfig(4, 4, horizontal_length, is_shared, 2, 2, initial_scale=1.0)
    model = Caser(NUM_USERS, NUM_ITEMS, config).eval()
    user, item, window = 3, 7, tensor([[9, 5, 0, 22]])
    weights = model.state_dict()
    image = weights["window_factors.weight"][window].unsqueeze(1)  # (1, 1, length, factors)
    features = []
    for height in range(1, min(horizontal_length, 4) + 1):
        kernel = weights[f"horizontal.{height - 1}.weight"].view(-1, 1, height, config.factors)
        latest = image[:, :, -horizontal_length:]
        bands = functional.relu(functional.conv2d(latest, kernel, weights[f"horizontal.{height - 1}.bias"]))
        features.append(functional.max_pool1d(bands.squeeze(3), bands.shape[2]).flatten(1))
    columns = functional.conv2d(image, weights["vertical.weight"].view(-1, 1, config.window_length, 1))
    columns = columns + weights["vertical.bias"].view(1, -1, 1, 1)
    # A filter's numbers lie apart here and together in the model: only the order into the next layer differs.
    features.append(columns.squeeze(2).transpose(1, 2).flatten(1))
    z = functional.relu(weights["fused.weight"] @ torch.cat(features, 1)[0] + weights["fused.bias"])
    own = weights["user_factors.weight"][user]
    if is_shared:
        straight = weights["straight.weight"][0] @ weights["window_factors.weight"][window[0]]
        projected = weights["projection.weight"] @ z + weights["projection.bias"]
        expected = weights["window_factors.weight"][item] @ (projected + straight + own)
    else:
        expected = weights["item_factors.weight"][item] @ torch.cat((z, own))
    expected = expected + weights["item_bias.weight"][item, 0]
    assert model(tensor([user]), window, tensor([[item]])).item() == pytest.approx(expected.item(), abs=1e-3)


def test_caser_starts_with_every_filter_and_unit_at_work() -> None:
    torch.manual_seed(0)
    model = Caser(2, 500, CaserConfig())
    at_work: dict[str, Tensor] = {}
    for name, layer in [*((f"filters {h}", layer) for h, layer in enumerate(model.horizontal)), ("fused", model.fused)]:
        bias = layer.get_parameter("bias")
        bias.register_hook(lambda gradient, name=name: at_work.__setitem__(name, gradient != 0))
    model(
        torch.zeros(400, dtype=torch.int64), torch.randint(500, (400, 20)), torch.randint(500, (400, 1))
    ).sum().backward()
    assert len(at_work) == 6
    assert all(bool(working.all()) for working in at_work.values())


def test_caser_starts_with_the_latest_items_ahead() -> None:
    assert Caser(1, 1, CaserConfig(window_length=7, horizontal_length=5)).state_dict()["straight.weight"].tolist() == [
        pytest.approx([0.02, 0.02, 0.2, 0.2, 0.2, 0.2, 0.2])
    ]


def test_a_caser_of_old_sees_its_whole_window() -> None:
    model = build_model("caser", 3, 9, {"window_length": 8})
    assert isinstance(model, Caser)
    assert (model.horizontal_length, len(model.horizontal)) == (8, 8)
    assert build_model("caser", 3, 9, {}).config == CaserConfig()


@pytest.mark.parametrize(("length", "horizontal_length"), [(1, 1), (2, 2), (7, 7), (7, 3)])
def test_caser_sums_its_filters_alike_in_training_and_ranking(length: int, horizontal_length: int) -> None:
    model = Caser(3, 9, CaserConfig(4, length, horizontal_length, horizontal_filters=3)).eval()
    users, windows = tensor([0, 2, 1]), torch.randint(10, (3, length))
    trained = model.encode(users, windows)
    with torch.no_grad():
        assert torch.allclose(model.encode(users, windows), trained.detach(), atol=1e-7)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(share: float) -> None:
    torch.manual_seed(0)
    dropout, values = Dropout(share), torch.ones(1001, 77, requires_grad=True)
    dropped = dropout(values)
    dropped.sum().backward()
    assert float((dropped == 0).float().mean()) == pytest.approx(share, abs=0.005)
    assert float(dropped.detach().mean()) == pytest.approx(1, abs=0.1)
    assert values.grad is not None
    assert torch.equal(values.grad, dropped.detach())
    assert torch.equal(dropout.eval()(values), values)


def test_caser_ranks_an_unknown_user_from_the_window() -> None:
    model = small("caser")
    windows = tensor([[1, 2, 3], [4, 5, 6]])
    unknown = model.score_catalogue(tensor([-1, -1]), windows)
    assert torch.equal(unknown, model.score_catalogue(tensor([NUM_USERS, NUM_USERS]), windows))
    assert not torch.allclose(unknown[0], unknown[1])


def test_padding_stays_zero_and_has_no_gradient() -> None:
    model = small("caser").train()
    model(tensor([0]), tensor([[NUM_ITEMS, NUM_ITEMS, 3]]), tensor([[1]])).sum().backward()
    assert isinstance(model, Caser)
    assert (model.window_factors.weight[NUM_ITEMS] == 0).all()
    gradient = model.window_factors.weight.grad
    assert gradient is not None
    assert (gradient.to_dense()[NUM_ITEMS] == 0).all()


def test_distance_ranks_by_nearness() -> None:
    for model in (
        MatrixFactorization(3, 6, MatrixFactorizationConfig(factors=2, similarity="distance", initial_scale=1.0)),
        Caser(3, 6, CaserConfig(factors=2, window_length=2, similarity="distance", initial_scale=1.0)).eval(),
    ):
        users, windows, items = tensor([0, 2]), torch.ones(2, model.window_length, dtype=torch.int64), torch.arange(6)
        anchors, points = model.vectors(users, windows, items)
        expected = -(torch.cdist(anchors, points) ** 2)
        assert torch.allclose(model(users, windows, items), expected, atol=1e-4)


def test_vectors_give_the_scores_that_have_no_bias() -> None:
    model = MatrixFactorization(3, 6, MatrixFactorizationConfig(factors=2, item_bias=False, initial_scale=1.0))
    users, items = tensor([0, 2]), tensor([[0, 1, 5], [2, 2, 3]])
    anchors, points = model.vectors(users, torch.empty(2, 0), items)
    assert torch.allclose(torch.einsum("bd,bnd->bn", anchors, points), model(users, torch.empty(2, 0), items))


def test_neumf_has_no_vectors_to_compare() -> None:
    with pytest.raises(ValueError, match="needs caser or matrix_factorization"):
        small("neumf").vectors(tensor([0]), torch.empty(1, 0), tensor([[0]]))


def test_popularity_counts() -> None:
    model = Popularity(2, 4, PopularityConfig())
    model.count(tensor([1, 1, 3]))
    assert model.score_catalogue(tensor([0, -1]), torch.empty(2, 0)).tolist() == [[0, 2, 0, 1]] * 2


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one hidden width"):
        NeuMF(1, 1, NeuMFConfig(hidden=()))
    with pytest.raises(ValueError, match="window_length must be 1 or more"):
        Caser(1, 1, CaserConfig(window_length=0))
    with pytest.raises(ValueError, match="horizontal_length must be 1 or more"):
        Caser(1, 1, CaserConfig(horizontal_length=0))
    with pytest.raises(ValueError, match="unknown model 'neural'"):
        build_model("neural", 1, 1)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("horizontal_length", [3, 4])
def test_caser_encodes_a_few_users_as_it_does_a_batch(shared: bool, horizontal_length: int) -> None:
    sizes = {"factors": 6, "window_length": 4, "horizontal_length": horizontal_length}
    model = build_model("caser", 4, 30, {**sizes, "shared_items": shared}).eval()
    for weight in model.state_dict().values():
        weight.normal_()
    windows = torch.randint(0, 31, (5, 4))
    users = tensor([0, 3, 2, -1, 4])
    few = model.few_encoder()
    assert few is not None
    with torch.no_grad():
        expected = model.encode(users, windows)
    together = few(users.numpy(), windows.numpy())
    np.testing.assert_allclose(together, expected.numpy(), rtol=1e-4, atol=1e-4)
    for row in range(len(users)):
        assert np.array_equal(few(users.numpy()[row : row + 1], windows.numpy()[row : row + 1])[0], together[row])
