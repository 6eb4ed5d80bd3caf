"""Every loss against numbers worked out by hand."""

import math

import pytest
import torch
from torch import tensor

from ml.losses import (
    LOSSES,
    MARGIN_LOSSES,
    bce_loss,
    bpr_loss,
    hinge_loss,
    softmax_loss,
    triplet_loss,
    weighted_bpr_loss,
)
from ml.models import MatrixFactorization, MatrixFactorizationConfig

# One example, a positive of 1 and samples 0 and 2; log(1 + e^-1) = 0.313262, log(1 + e) = 1.313262.
POSITIVE = tensor([[1.0]])
NEGATIVE = tensor([[0.0, 2.0]])
ALL = {**LOSSES, **MARGIN_LOSSES}


def test_bpr() -> None:
    assert bpr_loss(POSITIVE, NEGATIVE).item() == pytest.approx((0.313262 + 1.313262) / 2, abs=1e-6)


def test_equal_scores_give_bpr_the_loss_of_chance() -> None:
    assert bpr_loss(tensor([[3.0]]), tensor([[3.0]])).item() == pytest.approx(math.log(2))


def test_weighted_bpr_weighs_by_the_softmax_of_the_samples() -> None:
    # softmax(0, 2) = 0.119203, 0.880797
    expected = 0.119203 * 0.313262 + 0.880797 * 1.313262
    assert weighted_bpr_loss(POSITIVE, NEGATIVE).item() == pytest.approx(expected, abs=1e-5)


def test_no_gradient_passes_through_the_weights() -> None:
    negative = NEGATIVE.clone().requires_grad_()
    weighted_bpr_loss(POSITIVE, negative).backward()
    # share * sigmoid(negative - positive): sigmoid(-1) = 0.268941, sigmoid(1) = 0.731059
    assert negative.grad is not None
    assert torch.allclose(negative.grad, tensor([[0.119203 * 0.268941, 0.880797 * 0.731059]]), atol=1e-6)


def test_hinge() -> None:
    # max(1 - 1 + 0, 0) = 0 and max(1 - 1 + 2, 0) = 2; with margin 2: 1 and 3
    assert hinge_loss(POSITIVE, NEGATIVE).item() == pytest.approx(1.0)
    assert hinge_loss(POSITIVE, NEGATIVE, margin=2.0).item() == pytest.approx(2.0)


def test_softmax() -> None:
    # log(e^1 + e^0 + e^2) - 1 = log(11.107338) - 1
    assert softmax_loss(POSITIVE, NEGATIVE).item() == pytest.approx(math.log(11.107338) - 1, abs=1e-6)


def test_bce() -> None:
    # label 1 at 1: 0.313262; labels 0 at 0 and 2: log 2 and log(1 + e^2) = 2.126928
    assert bce_loss(POSITIVE, NEGATIVE).item() == pytest.approx((0.313262 + 0.693147 + 2.126928) / 3, abs=1e-6)


def test_triplet_compares_squared_distances_of_vectors() -> None:
    model = MatrixFactorization(1, 2, MatrixFactorizationConfig(factors=2, similarity="distance"))
    with torch.no_grad():
        model.user_factors.weight.copy_(tensor([[1.0, 0.0]]))
        model.item_factors.weight.copy_(tensor([[1.0, 2.0], [0.0, 0.0]]))
    scores = model(tensor([0]), torch.empty(1, 0), tensor([[0, 1]]))
    assert torch.allclose(scores, tensor([[-4.0, -1.0]]))
    # 4 is farther than 1 by 3, and the margin is a half more
    assert triplet_loss(scores[:, :1], scores[:, 1:], margin=0.5).item() == pytest.approx(3.5)


@pytest.mark.parametrize("name", ALL)
def test_invalid_samples_do_not_count(name: str) -> None:
    alone = ALL[name](POSITIVE, NEGATIVE[:, :1])
    masked = ALL[name](POSITIVE, NEGATIVE, tensor([[True, False]]))
    assert masked.item() == pytest.approx(alone.item(), abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_an_example_without_any_valid_sample_stays_finite(name: str) -> None:
    positive, negative = POSITIVE.clone().requires_grad_(), NEGATIVE.clone().requires_grad_()
    loss = ALL[name](positive, negative, tensor([[False, False]]))
    loss.backward()
    # Pointwise, the observed item still counts; compared with nothing, there is no loss.
    assert loss.item() == pytest.approx(0.313262 if name == "bce" else 0.0, abs=1e-6)
    assert positive.grad is not None
    assert negative.grad is not None
    assert positive.grad.isfinite().all()
    assert (negative.grad == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_extreme_scores_do_not_overflow(name: str) -> None:
    positive = tensor([[-1e4], [1e4]], requires_grad=True)
    loss = ALL[name](positive, tensor([[1e4], [-1e4]]))
    loss.backward()
    assert loss.isfinite()
    assert positive.grad is not None
    assert positive.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_weights_give_the_weighted_mean_of_examples(name: str) -> None:
    positive, negative = tensor([[1.0], [0.5]]), tensor([[0.0, 2.0], [1.0, 1.0]])
    first, second = (ALL[name](positive[i : i + 1], negative[i : i + 1]).item() for i in (0, 1))
    both = ALL[name](positive, negative, weight=tensor([[3.0], [1.0]]))
    assert both.item() == pytest.approx((3 * first + second) / 4, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_several_targets_share_their_samples(name: str) -> None:
    positive, negative = torch.randn(4, 3), torch.randn(4, 5)
    valid = torch.rand(4, 5) > 0.3
    together = ALL[name](positive.unsqueeze(2), negative.unsqueeze(1), valid.unsqueeze(1))
    apart = torch.stack([ALL[name](positive[:, i : i + 1], negative, valid) for i in range(3)])
    assert together.item() == pytest.approx(apart.mean().item(), abs=1e-6)
