import pytest
import torch
from torch.nn import functional

from ml.models.linear_at_rest import linear_at_rest, packed


@pytest.mark.parametrize("rows", [0, 3, 9000])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_is_the_linear_layer(rows: int, relu: bool, biased: bool) -> None:
    torch.manual_seed(0)
    values, weight = torch.randn(rows, 5, 24)[:, :, ::2], torch.randn(12, 14, requires_grad=True).T[::2]
    bias = torch.randn(14, requires_grad=True)[::2] if biased else None
    expected = functional.linear(values, weight, bias)
    expected = expected.relu() if relu else expected
    with torch.inference_mode():
        torch.testing.assert_close(linear_at_rest(values, weight, bias, relu=relu), expected.detach())


@pytest.mark.parametrize("rows", [1, 3, 63, 64, 100, 2000])
def test_packed_weights_give_the_same_for_any_number_of_rows(rows: int) -> None:
    torch.manual_seed(0)
    values, weight, bias = torch.randn(rows, 40), torch.randn(33, 40), torch.randn(33)
    with torch.inference_mode():
        found = linear_at_rest(values, packed(weight, 2000), bias, relu=True)
        torch.testing.assert_close(found, functional.linear(values, weight, bias).relu())
        assert packed(weight, 3) is weight


def test_weights_between_others_go_the_same_fast_way() -> None:
    # Another way is hundreds of times as slow, and rounds otherwise.
    torch.manual_seed(0)
    values, table = torch.randn(943, 64), torch.randn(1682, 243)
    with torch.inference_mode():
        assert torch.equal(linear_at_rest(values, table[:, 64:128]), linear_at_rest(values, table[:, 64:128].clone()))


def test_keeps_gradients_where_they_are_wanted() -> None:
    weight = torch.randn(7, 12, requires_grad=True)
    linear_at_rest(torch.randn(100, 12), weight, relu=True).sum().backward()
    assert weight.grad is not None
