"""NeuMF's tower in training, block by block: its layers are never held for a whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ml.models.linear_at_rest import linear_at_rest

# Numbers of the first layer held at once: what stays in a core's cache.
BLOCK_NUMBERS = 1 << 18


class Tower(torch.autograd.Function):
    """Scores (batch, n) from the two shares of the first layer's sums, the users' (batch, width) and the items'
    (batch, n, width), or (n, width) where all have the same, and the weights: the last ones (outer,), then the matrix
    and the bias of each deeper layer.

    In float32 on a CPU. Written to fresh memory, the layers of a large batch take several times as long as their
    products; here they are computed a second time, block by block, where their gradients are wanted.
    """

    @staticmethod
    def forward(ctx: Any, user_share: Tensor, item_share: Tensor, last: Tensor, *layers: Tensor) -> Tensor:
        ctx.save_for_backward(user_share, item_share, last, *layers)
        scores = user_share.new_empty(len(user_share), item_share.shape[-2])
        for rows, hidden in _blocks(user_share, item_share, layers):
            torch.mv(hidden[-1], last, out=scores[rows].view(-1))
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        user_share, item_share, last, *layers = ctx.saved_tensors
        of_scores = gradients[0].contiguous()
        of_users, of_items, of_last, *of_layers = (torch.zeros_like(each) for each in ctx.saved_tensors)
        across = [weight.t().contiguous() for weight in layers[::2]]
        for rows, hidden in _blocks(user_share, item_share, layers):
            of_block = of_scores[rows].view(-1)
            of_last.addmv_(hidden[-1].t(), of_block)
            gradient = torch.outer(of_block, last)
            for place in reversed(range(len(across))):
                _through_relu(gradient, hidden[place + 1])
                of_layers[2 * place].addmm_(gradient.t(), hidden[place])
                of_layers[2 * place + 1].add_(gradient.sum(0))
                gradient = linear_at_rest(gradient, across[place])
            gradient = _through_relu(gradient, hidden[0]).view(-1, *item_share.shape[-2:])
            torch.sum(gradient, 1, out=of_users[rows])
            if item_share.dim() == 2:
                of_items.add_(gradient.sum(0))
            else:
                of_items[rows] = gradient
        return of_users, of_items, of_last, *of_layers


def _blocks(user_share: Tensor, item_share: Tensor, layers: tuple[Tensor, ...]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Some rows of the batch at a time, and their layers, (rows * n, width); the next lie in their place."""
    number, width = item_share.shape[-2:]
    step = max(1, BLOCK_NUMBERS // max(1, number * width))
    memory = user_share.new_empty(min(step, len(user_share)), number, width)
    for first in range(0, len(user_share), step):
        rows = slice(first, first + step)
        users = user_share[rows].unsqueeze(1)
        items = item_share if item_share.dim() == 2 else item_share[rows]
        hidden = [torch.add(users, items, out=memory[: len(users)]).relu_().view(-1, width)]
        for weight, bias in zip(layers[::2], layers[1::2], strict=True):
            hidden.append(linear_at_rest(hidden[-1], weight, bias).relu_())  # which keeps NaN, as oneDNN's own does not
        yield rows, hidden


def _through_relu(gradient: Tensor, values: Tensor) -> Tensor:
    """The gradient, in its own memory, where the relu let `values` through, else zero."""
    found: Tensor = torch.ops.aten.threshold_backward(gradient, values, 0, grad_input=gradient)
    return found
