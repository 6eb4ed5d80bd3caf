"""Adam whose step costs what the batch costs: of a table, only the rows in the batch are read and updated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from ml import memory

# Of a table's rows and moments, held at once by an update on a CPU.
BLOCK_BYTES = 1 << 19
# The size of a step and the correction of the second moment's root for its start at zero.
Scale: TypeAlias = tuple[Tensor, Tensor] | tuple[float, float]


class RowAdam(torch.optim.Optimizer):
    """Adam over dense parameters, and over the touched rows alone of parameters whose gradient is sparse.

    `l2` adds l2 * parameter to the gradient, the derivative of l2 / 2 * |parameter|^2: for tables over the rows in the
    batch, each counted once however often it was read. With `fixed_shapes` (by default on a GPU) no shape and no step
    depends on a value in a tensor, so a CUDA graph can hold the step; the weights come out the same but for rounding.

    From its first step on, a table lies beside its moments, row by row, in memory of the optimiser's: one place to read
    and write for each row instead of three. `release` gives the table memory of its own again.
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
        self._tables: dict[nn.Parameter, Tensor] = {}
        # Of this step: rows as they came, each once, their order, and where each one's begin in it.
        self._grouped: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
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
            size, correction = group["lr"] / (1 - beta1**step), (1 - beta2**step).sqrt()
            # A graph needs numbers that stay on the device; elsewhere plain ones cost less.
            scale = (size.float(), correction.float()) if group["fixed_shapes"] else (float(size), float(correction))
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    self._update_rows(parameter, gradient, group, scale)
                else:
                    state = self.state[parameter]
                    if not state:
                        state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                    _adam(parameter, state["mean"], state["square"], gradient, group, scale)
        self._grouped = None

    def _update_rows(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], scale: Scale) -> None:
        """Turn a gradient of rows, which may repeat, into new rows: the one place where tables change."""
        if parameter not in self._tables:
            self._lay_out(parameter)
        table = self._tables[parameter]
        if group["fixed_shapes"]:
            rows, sums = fixed_row_sums(gradient)
            block = table.index_select(0, rows)
            _adam_on_rows(block, sums, group, scale)
            table.index_copy_(0, rows, block)
            return
        rows, sums = self._row_sums(gradient)
        # Few enough at once to stay in a core's cache from the reading to the writing.
        step = max(1, BLOCK_BYTES // (table.shape[1] * table.element_size()))
        for part, part_sums in zip(torch.split(rows, step), torch.split(sums, step), strict=True):
            block = table.index_select(0, part)
            _adam_on_rows(block, part_sums, group, scale)
            # What index_copy_ does on a CPU row by row, in half the time.
            table.numpy()[part.numpy()] = block.numpy()

    def _row_sums(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Each row that a sparse gradient touches once, (n,), in order, and the sum of its values, (n, width)."""
        rows, values = gradient._indices()[0], gradient._values()
        if self._grouped is None or not torch.equal(self._grouped[0], rows):
            # Tables of users, or of items, are mostly read at the same rows: those are sorted once.
            ordered, order = rows.sort(stable=True)
            touched, counts = torch.unique_consecutive(ordered, return_counts=True)
            self._grouped = rows, touched, order, counts.cumsum(0) - counts
        _, touched, order, starts = self._grouped
        if not len(touched):
            return touched, values
        return touched, functional.embedding_bag(order, values, starts, mode="sum")

    def _lay_out(self, parameter: nn.Parameter) -> None:
        """Put a table and its moments side by side; the last row belongs to nothing."""
        rows, width = parameter.shape
        table = memory.zeros(rows + 1, 3 * width, dtype=parameter.dtype, device=parameter.device)
        views = torch.split(table[:rows], width, 1)
        views[0].copy_(parameter)
        state = self.state[parameter]
        for name, view in zip(("mean", "square"), views[1:], strict=True):
            if name in state:
                view.copy_(state[name])
            state[name] = view
        parameter.data = views[0]
        self._tables[parameter] = table

    def release(self) -> None:
        """Give tables memory of their own again and forget the moments; the training is over."""
        for parameter in self._tables:
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
        self._tables.clear()
        self.state.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name in ("lr", "step"):
                group[name] = group[name].to(group["params"][0].device)
        # What was loaded lies apart; the next step lays it out.
        for parameter in self._tables:
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
        self._tables.clear()


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


def _adam_on_rows(block: Tensor, gradient: Tensor, group: dict[str, Any], scale: Scale) -> None:
    """Update rows that hold values, mean and square side by side."""
    values, mean, square = torch.split(block, gradient.shape[1], 1)
    _adam(values, mean, square, gradient, group, scale)


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
    if isinstance(size, Tensor):
        values.sub_(mean.div(root).mul_(size))
    else:
        values.addcdiv_(mean, root, value=-size)
