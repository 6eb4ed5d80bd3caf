import pytest
import torch
from torch import nn, tensor

from ml import memory
from ml import optimizer as optimizer_module
from ml.optimizer import RowAdam, fixed_row_sums


def test_a_dense_step_is_adam() -> None:
    ours, theirs = (nn.Parameter(tensor([1.0, -2.0, 3.0])) for _ in range(2))
    mine, reference = RowAdam([ours], 0.1, l2=0.01), torch.optim.Adam([theirs], 0.1, weight_decay=0.01)
    for _ in range(5):
        for parameter, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            parameter.pow(3).sum().backward()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_table_step_is_adam_on_the_rows_read_and_leaves_the_others_alone() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    dense = nn.Parameter(before[[1, 3]].clone())
    mine, reference = RowAdam(table.parameters(), 0.1), torch.optim.Adam([dense], 0.1)
    for _ in range(3):
        mine.zero_grad()
        table(tensor([1, 3, 1])).square().sum().backward()
        mine.step()
        reference.zero_grad()
        (2 * dense[0].square().sum() + dense[1].square().sum()).backward()
        reference.step()
    assert torch.allclose(table.weight[[1, 3]], dense, atol=1e-6)
    assert torch.equal(table.weight[[0, 2]], before[[0, 2]])


def test_l2_touches_only_the_rows_in_the_batch_and_each_once() -> None:
    table = nn.Embedding(3, 1, sparse=True)
    with torch.no_grad():
        table.weight.fill_(2.0)
    optimizer = RowAdam(table.parameters(), 0.1, l2=0.5)
    (0 * table(tensor([1, 1]))).sum().backward()
    optimizer.step()
    # The gradient is 0 + 0.5 * 2 = 1, so the first moment is 0.1 and the second 0.001, and the step the whole rate.
    assert table.weight.flatten().tolist() == pytest.approx([2.0, 1.9, 2.0])
    assert optimizer.state[table.weight]["mean"].flatten().tolist() == pytest.approx([0.0, 0.1, 0.0])
    assert optimizer.state[table.weight]["square"].flatten().tolist() == pytest.approx([0.0, 0.001, 0.0])


@pytest.mark.parametrize(("rate", "l2"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (0.1, -1.0)])
def test_impossible_settings_are_refused(rate: float, l2: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        RowAdam([nn.Parameter(torch.ones(1))], rate, l2=l2)


@pytest.mark.parametrize("rows", [[3], [2, 2, 2], [5, 0, 3, 0, 5, 5, 1]])
def test_fixed_shapes_hold_each_rows_sum_and_zeros(rows: list[int]) -> None:
    values = torch.arange(2.0 * len(rows)).view(-1, 2)
    gradient = torch.sparse_coo_tensor(tensor([rows]), values, (6, 2), check_invariants=True)
    touched, sums = fixed_row_sums(gradient)
    once = sorted(set(rows))
    assert touched.tolist() == once + [6] * (min(len(rows), 6) - len(once))
    assert torch.equal(sums[: len(once)], gradient.to_dense()[once])
    assert not sums[len(once) :].any()


def test_tables_read_at_the_same_rows_learn_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_module, "BLOCK_BYTES", 100)  # several blocks, the last one short
    torch.manual_seed(0)
    tables = [nn.Embedding(9, width, sparse=True) for width in (3, 1, 3)]
    alone = [nn.Embedding.from_pretrained(each.weight.detach().clone(), freeze=False, sparse=True) for each in tables]
    together = RowAdam([each.weight for each in tables], 0.1)
    separate = [RowAdam(each.parameters(), 0.1) for each in alone]
    for rows, other in ((tensor([7, 0, 7, 3]), tensor([2, 2, 2, 1])), (tensor([8, 1, 0, 0]), tensor([8, 1, 0, 0]))):
        for group in (tables, alone):
            for table, own in zip(group, (rows, rows, other), strict=True):
                table.weight.grad = None
                table(own).pow(3).sum().backward()
        together.step()
        for each in separate:
            each.step()
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(tables, alone, strict=True))


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_fixed_shapes_learn_the_same(l2: float) -> None:
    torch.manual_seed(0)
    weights = torch.randn(50, 3)
    tables = [nn.Embedding.from_pretrained(weights.clone(), freeze=False, sparse=True) for _ in range(2)]
    optimizers = [
        RowAdam(each.parameters(), 0.1, l2=l2, fixed_shapes=is_fixed)
        for each, is_fixed in zip(tables, (False, True), strict=True)
    ]
    for _ in range(5):
        rows = torch.randint(40, (30,))
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.zero_grad()
            table(rows).pow(3).sum().backward()
            optimizer.step()
    assert torch.allclose(tables[0].weight, tables[1].weight, atol=1e-6)
    assert torch.equal(tables[0].weight[40:], weights[40:])


def test_a_table_lies_beside_its_moments_until_it_is_released() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = RowAdam(table.parameters(), 0.1)
    table(tensor([1])).sum().backward()
    optimizer.step()
    mean = optimizer.state[table.weight]["mean"]
    assert mean.data_ptr() - table.weight.data_ptr() == table.weight[0].nbytes
    learnt = table.weight.detach().clone()
    optimizer.release()
    assert table.weight.is_contiguous()
    assert table.weight.untyped_storage().nbytes() == learnt.nbytes
    assert torch.equal(table.weight, learnt)


def test_large_pages_hold_what_ordinary_ones_do() -> None:
    large = memory.zeros(1 << 10, 1 << 11, dtype=torch.int32)
    assert large.shape == (1 << 10, 1 << 11)
    assert large.dtype == torch.int32
    assert not large.any()
    large[3, 5] = 7
    assert int(large.sum()) == 7
    assert torch.equal(memory.spread(large), large)
