"""Negative sampling on the training device; what a step costs does not depend on the number of items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ml.distributed import ALONE, Processes

# Times a draw is repeated for the samples that hit a seen item; what still collides is marked invalid.
ROUNDS = 4
# Up to this many bytes, who has seen what is one bit a pair; past it, a binary search over the pairs.
BITMAP_BYTES = 1 << 29


class SeenItems:
    """Tells which items a user has interacted with, for many pairs at once."""

    def __init__(self, users: Tensor, items: Tensor, num_users: int, num_items: int) -> None:
        self.num_items = num_items
        self._bits: Tensor | None = None
        self._pairs = torch.empty(0, dtype=torch.int64)
        width = (num_items + 7) // 8
        pairs = torch.unique(users.long() * num_items + items)
        if num_users * width <= BITMAP_BYTES:
            rows, columns = pairs // num_items, pairs % num_items
            # Distinct pairs add distinct bits, so a sum within a byte is their union.
            bits = torch.zeros(num_users * width, dtype=torch.uint8, device=users.device)
            values = torch.ones_like(rows, dtype=torch.uint8) << (columns % 8).to(torch.uint8)
            self._bits = bits.index_add_(0, rows * width + columns // 8, values).view(num_users, width)
        else:
            self._pairs = pairs

    def contains(self, users: Tensor, items: Tensor) -> Tensor:
        """Whether each of `users` (batch,) has seen each of `items` (batch, n), or (n,) for all: (batch, n)."""
        if self._bits is not None:
            column, bit = items >> 3, (items & 7).to(torch.uint8)
            if items.dim() == 1:
                return (self._bits.index_select(0, users).index_select(1, column) >> bit) & 1 != 0
            return (self._bits[users.unsqueeze(1), column] >> bit) & 1 != 0
        wanted = users.unsqueeze(1) * self.num_items + items
        found = torch.searchsorted(self._pairs, wanted).clamp_(max=len(self._pairs) - 1)
        return self._pairs[found] == wanted


@dataclass(frozen=True)
class Negatives:
    """Sampled items, (batch, n) or (n,) when the whole batch shares them, and which of them are unseen, (batch, n)."""

    items: Tensor
    valid: Tensor


class NegativeSampler:
    """Draws items that a user has not interacted with, uniformly or in proportion to count ** popularity_power."""

    def __init__(
        self,
        users: Tensor,
        items: Tensor,
        num_users: int,
        num_items: int,
        *,
        distribution: Literal["uniform", "popularity"] = "uniform",
        popularity_power: float = 0.75,
        processes: Processes = ALONE,
    ) -> None:
        self.num_items = num_items
        self.seen = SeenItems(users, items, num_users, num_items)
        self._cumulative: Tensor | None = None
        if distribution == "popularity":
            # On the CPU, since sums on a GPU may differ from run to run; doubles, so that rare items stay reachable.
            counts = processes.sum_tensor(torch.bincount(items.cpu(), minlength=num_items)).double() ** popularity_power
            self._cumulative = (counts.cumsum(0) / counts.sum()).to(items.device)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw items regardless of who has seen them."""
        if self._cumulative is None:
            return torch.randint(self.num_items, shape, generator=generator, device=generator.device)
        chances = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
        return torch.searchsorted(self._cumulative, chances, right=True).clamp_(max=self.num_items - 1)

    def sample(self, users: Tensor, number: int, generator: torch.Generator) -> Negatives:
        """Draw `number` unseen items for each user; what is seen after a few draws is marked invalid."""
        items = self.draw((len(users), number), generator)
        seen = self.seen.contains(users, items)
        for _ in range(ROUNDS):
            # A whole redraw keeps shapes fixed; most of it is thrown away, and it costs what the batch costs.
            items = torch.where(seen, self.draw((len(users), number), generator), items)
            seen = self.seen.contains(users, items)
        return Negatives(items, ~seen)

    def sample_shared(self, users: Tensor, number: int, generator: torch.Generator) -> Negatives:
        """Draw `number` items once for the whole batch; each user's seen ones are marked invalid for that user."""
        items = self.draw((number,), generator)
        return Negatives(items, ~self.seen.contains(users, items))


def choose_hard(scores: Tensor, negatives: Negatives, number: int, below: Tensor | None = None) -> Tensor:
    """Positions (batch, number) of the highest-scored valid samples of a pool, where `scores` is (batch, pool).

    With `below` (batch, 1), the observed items' scores, samples that score under it come first (semi-hard: wrong by
    less than a mistake; Schroff et al. 2015), the rest only where there are too few, easiest last.
    """
    lowest = torch.finfo(scores.dtype).min
    ranked = scores
    if below is not None:
        # Among those above the observed item the nearest is the next best: mirror them to below all others.
        span = scores.amax() - scores.amin() + 1
        ranked = torch.where(scores < below, scores, scores.amin() - span - (scores - below))
    ranked = ranked.masked_fill(~negatives.valid, lowest)
    return ranked.topk(min(number, scores.shape[1]), dim=1).indices
