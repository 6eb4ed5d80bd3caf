"""Adam whose step costs what the batch costs: of a table, only the rows in the batch are read and updated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ml import memory

# Of tables' rows and their moments, held at once by an update on a CPU: what stays in a core's cache.
BLOCK_BYTES = 1 << 20
# The size of a step and the correction of the second moment's root for its start at zero.
Scale: TypeAlias = tuple[Tensor, Tensor]
Indices: TypeAlias = npt.NDArray[np.int64]


class RowAdam(torch.optim.Optimizer):
    """Adam over dense parameters, and over the touched rows alone of parameters whose gradient is sparse.

    `l2` adds l2 * parameter to the gradient, the derivative of l2 / 2 * |parameter|^2: for tables over the rows in the
    batch, each counted once however often it was read. With `fixed_shapes` (by default on a GPU) no shape and no step
    depends on a value in a tensor, so a CUDA graph can hold the step; the weights come out the same but for rounding.

    From its first step on, a table lies beside its moments, row by row, in memory of the optimiser's, and so do tables
    that are read at the same rows: one place to read and write for each row instead of three a table. `release` gives
    tables memory of their own again.
    Source: Kingma and Ba 2015, algorithm 1; a row's moments stand still while it is not in a batch, and the bias
    correction counts all steps, as in torch.optim.SparseAdam.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        l2: float = 0.0,
        fixed_shapes: bool | None = None,
    ) -> None:
        if not learning_rate > 0 or l2 < 0:
            raise ValueError(f"the learning rate must be positive and l2 not negative, not {learning_rate} and {l2}")
        super().__init__(parameters, {"lr": learning_rate, "betas": betas, "epsilon": epsilon, "l2": l2})
        self._layouts: dict[nn.Parameter, _Layout] = {}
        for group in self.param_groups:
            device = group["params"][0].device
            group["fixed_shapes"] = device.type == "cuda" if fixed_shapes is None else fixed_shapes
            # Tensors on the device, so that a recorded step sees them change.
            group["lr"] = torch.tensor(learning_rate, dtype=torch.float64, device=device)
            group["step"] = torch.zeros((), dtype=torch.float64, device=device)

    def set_learning_rate(self, rate: float) -> None:
        """Learn at this rate from the next step on."""
        for group in self.param_groups:
            group["lr"].fill_(rate)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "this optimiser takes no closure"
        for group in self.param_groups:
            step, (beta1, beta2) = group["step"].add_(1), group["betas"]
            # Tensors, as a graph needs numbers that stay on the device.
            scale = (group["lr"] / (1 - beta1**step)).float(), (1 - beta2**step).sqrt().float()
            dense: list[nn.Parameter] = []
            tables: list[nn.Parameter] = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (tables if parameter.grad.is_sparse else dense).append(parameter)
            if dense:
                self._update_dense(dense, group, scale)
            if group["fixed_shapes"]:
                for parameter in tables:
                    self._update_in_fixed_shapes(parameter, group, scale)
                continue
            while tables:
                # Tables of users, or of items, are mostly read at the same rows.
                together = [each for each in tables if _same_rows(each, tables[0])]
                tables = [each for each in tables if not any(each is other for other in together)]
                self._update_rows(together, group)

    def _update_dense(self, parameters: list[nn.Parameter], group: dict[str, Any], scale: Scale) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        gradients = [_gradient(parameter).contiguous() for parameter in parameters]
        means, squares = ([self.state[each][name] for each in parameters] for name in ("mean", "square"))
        if not group["fixed_shapes"]:
            _fused_adam(parameters, gradients, means, squares, group)
            return
        for parameter, gradient, mean, square in zip(parameters, gradients, means, squares, strict=True):
            _adam(parameter, mean, square, gradient, group, scale)

    def _update_in_fixed_shapes(self, parameter: nn.Parameter, group: dict[str, Any], scale: Scale) -> None:
        """Turn a gradient of rows, which may repeat, into new rows, by no more than tensors of known lengths."""
        if parameter not in self._layouts:
            self._lay_out([parameter])
        table = self._layouts[parameter].memory
        rows, sums = fixed_row_sums(_gradient(parameter))
        block = table.index_select(0, rows)
        values, mean, square = torch.split(block, sums.shape[1], 1)
        _adam(values, mean, square, sums, group, scale)
        table.index_copy_(0, rows, block)

    def _update_rows(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Turn the gradients of tables that are read at the same rows, which may repeat, into new rows."""
        if not any(parameter in self._layouts for parameter in parameters):
            self._lay_out(parameters)
        layout = self._layouts.get(parameters[0])
        if layout is None or [*map(id, layout.parameters)] != [*map(id, parameters)]:
            if len(parameters) > 1:  # not the company they were laid out in
                for parameter in parameters:
                    self._update_rows([parameter], group)
                return
            if layout is None:
                self._lay_out(parameters)
                layout = self._layouts[parameters[0]]
        gradients = [_gradient(parameter) for parameter in parameters]
        rows, order, starts = _row_order(gradients[0]._indices()[0].numpy())
        if not len(rows):
            return
        values = [gradient._values() for gradient in gradients]
        own, mean, square = layout.columns(parameters)
        # Few enough at once to stay in the cache from the reading to the writing.
        step = max(1, BLOCK_BYTES // (3 * own.shape[1] * own.element_size()))
        for first in range(0, len(rows), step):
            last = min(first + step, len(rows))
            part, begin = rows[first:last], starts[first]
            places, offsets = order[begin : starts[last]], torch.from_numpy(starts[first:last] - begin)
            sums = [functional.embedding_bag(places, each, offsets, mode="sum") for each in values]
            chosen = torch.from_numpy(part)
            blocks = [columns.index_select(0, chosen) for columns in (own, mean, square)]
            _fused_adam(blocks[:1], [sums[0] if len(sums) == 1 else torch.cat(sums, 1)], blocks[1:2], blocks[2:], group)
            for columns, block in zip((own, mean, square), blocks, strict=True):
                # What index_copy_ does on a CPU row by row, in half the time.
                columns.numpy()[part] = block.numpy()

    def _lay_out(self, parameters: list[nn.Parameter]) -> None:
        """Put tables and their moments side by side; the last row belongs to nothing."""
        (rows,) = {parameter.shape[0] for parameter in parameters}
        layout = _Layout(parameters, rows)
        for parameter in parameters:
            views = [part[:rows] for part in layout.columns([parameter])]
            state = self.state[parameter]
            for name, view in zip(("mean", "square"), views[1:], strict=True):
                if name in state:
                    view.copy_(state[name])
                state[name] = view
            views[0].copy_(parameter)
            parameter.data = views[0]
            self._layouts[parameter] = layout

    def release(self) -> None:
        """Give tables memory of their own again and forget the moments; the training is over."""
        self._part()
        self.state.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name in ("lr", "step"):
                group[name] = group[name].to(group["params"][0].device)
        self._part()  # what was loaded lies apart; the next step lays it out

    def _part(self) -> None:
        for parameter in self._layouts:
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
        self._layouts.clear()


class _Layout:
    """Tables of as many rows side by side, then their means, then their squares: (rows + 1, 3 * width)."""

    def __init__(self, parameters: list[nn.Parameter], rows: int) -> None:
        self.parameters = parameters
        self._widths = [parameter.shape[1] for parameter in parameters]
        self._width = sum(self._widths)
        like = parameters[0]
        self.memory = memory.zeros(rows + 1, 3 * self._width, dtype=like.dtype, device=like.device)

    def columns(self, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the weights, means and squares of one of the tables, or of all of them."""
        place = 0 if len(parameters) > 1 else [*map(id, self.parameters)].index(id(parameters[0]))
        first = sum(self._widths[:place])
        width = self._width if len(parameters) > 1 else self._widths[place]
        own, mean, square = (self.memory.narrow(1, part * self._width + first, width) for part in range(3))
        return own, mean, square


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _same_rows(one: nn.Parameter, other: nn.Parameter) -> bool:
    """Whether the gradients of two tables of one size are of the same rows in the same order."""
    if one is other:
        return True
    return one.shape[0] == other.shape[0] and torch.equal(_gradient(one)._indices(), _gradient(other)._indices())


def _row_order(rows: Indices) -> tuple[Indices, Tensor, Indices]:
    """Each of some rows once, ascending; the places where they stand, row by row; where each one's places begin.

    The last beginning is the end. Sorting row and place as one number takes a fifth of the time of a stable sort.
    """
    bits = len(rows).bit_length()
    keys = rows << bits | np.arange(len(rows))
    keys.sort()
    ordered = keys >> bits
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    return ordered[first], torch.from_numpy(keys & (1 << bits) - 1), np.append(first, len(rows))


def fixed_row_sums(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Each row that a sparse gradient touches, and the sum of its values, in tensors whose length no value sets.

    There are as many places as the gradient has rows, or the table if it has fewer; those left over name the row past
    the table's last one, and hold zeros.
    """
    rows, values = gradient._indices()[0], gradient._values()
    length = min(len(rows), gradient.shape[0])
    ordered, order = rows.sort(stable=True)
    segment = functional.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
    places = torch.empty_like(rows).scatter_(0, order, segment)
    touched = rows.new_full((length,), gradient.shape[0]).scatter_(0, segment, ordered)
    return touched, values.new_zeros(length, values.shape[1]).index_add_(0, places, values)


def _fused_adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    group: dict[str, Any],
) -> None:
    """`_adam` in one pass over contiguous tensors on a CPU, as torch.optim.Adam(fused=True) does it."""
    torch._fused_adam_(
        list(parameters),
        list(gradients),
        list(means),
        list(squares),
        [],
        [group["step"].float()] * len(parameters),
        lr=float(group["lr"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["l2"],
        eps=group["epsilon"],
        amsgrad=False,
        maximize=False,
    )


def _adam(
    values: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    group: dict[str, Any],
    scale: Scale,
) -> None:
    (beta1, beta2), l2, (size, correction) = group["betas"], group["l2"], scale
    if l2:
        gradient = gradient + l2 * values
    mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = square.sqrt().div_(correction).add_(group["epsilon"])
    values.sub_(mean.div(root).mul_(size))
