"""Adam whose step costs what the batch costs: of a table, only the rows in the batch are read and updated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class RowAdam(torch.optim.Optimizer):
    """Adam over dense parameters, and over the touched rows alone of parameters whose gradient is sparse.

    `l2` adds l2 * parameter to the gradient, the derivative of l2 / 2 * |parameter|^2: for tables over the rows in the
    batch, each counted once however often it was read.
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
    ) -> None:
        if not learning_rate > 0 or l2 < 0:
            raise ValueError(f"the learning rate must be positive and l2 not negative, not {learning_rate} and {l2}")
        super().__init__(parameters, {"lr": learning_rate, "betas": betas, "epsilon": epsilon, "l2": l2})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "this optimiser takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["square"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] += 1
        (beta1, beta2), l2 = group["betas"], group["l2"]
        mean, square = state["mean"], state["square"]
        rows: Tensor | None = None
        values, new_mean, new_square = gradient, mean, square
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, values = gradient._indices()[0], gradient._values()
            new_mean, new_square = mean.index_select(0, rows), square.index_select(0, rows)
        if l2:
            values = values + l2 * (parameter if rows is None else parameter.index_select(0, rows))
        new_mean.mul_(beta1).add_(values, alpha=1 - beta1)
        new_square.mul_(beta2).addcmul_(values, values, value=1 - beta2)
        correction = (1 - beta2 ** state["step"]) ** 0.5
        size = group["lr"] / (1 - beta1 ** state["step"])
        update = new_mean / (new_square.sqrt().div_(correction).add_(group["epsilon"]))
        if rows is None:
            parameter.add_(update, alpha=-size)
        else:
            parameter.index_add_(0, rows, update, alpha=-size)
            mean.index_copy_(0, rows, new_mean)
            square.index_copy_(0, rows, new_square)
