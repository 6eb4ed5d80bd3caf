"""Negative sampling on the training device; what a step costs does not depend on the number of items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ml import memory
from ml.distributed import ALONE, Processes

# Times a draw is repeated for the samples that hit a seen item; what still collides is marked invalid.
ROUNDS = 4
# Up to this many bytes, who has seen what is one bit a pair; past it, a binary search in each user's items.
BITMAP_BYTES = 1 << 29
# Rows of bits are read whole, so longer ones would make a step's cost grow with the catalogue.
BITMAP_ROW_BYTES = 1 << 13


class SeenItems:
    """Tells which items a user has interacted with, for many pairs at once."""

    def __init__(self, users: Tensor, items: Tensor, num_users: int, num_items: int) -> None:
        self._bits: Tensor | None = None
        width = (num_items + 7) // 8
        pairs = torch.unique(users.long() * num_items + items)
        rows, columns = pairs // num_items, pairs % num_items
        if num_users * width <= BITMAP_BYTES and width <= BITMAP_ROW_BYTES:
            # Distinct pairs add distinct bits, so a sum within a byte is their union.
            bits = torch.zeros(num_users * width, dtype=torch.uint8, device=users.device)
            values = torch.ones_like(rows, dtype=torch.uint8) << (columns % 8).to(torch.uint8)
            self._bits = bits.index_add_(0, rows * width + columns // 8, values).view(num_users, width)
        else:
            counts = torch.bincount(rows, minlength=num_users)
            self._offsets = memory.spread(functional.pad(counts.cumsum(0), (1, 0)))
            self._items = memory.spread(columns.int())
            # The steps of the binary search: every power of two that the longest history holds.
            self._steps = [1 << bit for bit in reversed(range(int(counts.max()).bit_length()))]

    def contains(self, users: Tensor, items: Tensor) -> Tensor:
        """Whether each of `users` (batch,) has seen each of `items` (batch, n), or (n,) for all: (batch, n)."""
        if self._bits is not None:
            column, bit = items >> 3, (items & 7).to(torch.uint8)
            if items.dim() == 1:
                return (self._bits.index_select(0, users).index_select(1, column) >> bit) & 1 != 0
            return (self._bits[users.unsqueeze(1), column] >> bit) & 1 != 0
        if items.dim() == 1 and users.device.type == "cpu":
            return self._among(users, items)
        start, end = self._offsets[users].unsqueeze(1), self._offsets[users + 1].unsqueeze(1)
        last = len(self._items) - 1
        # How many of the user's items are lower, found from the highest bit down.
        place = start.expand(len(users), items.shape[-1])
        for step in self._steps:
            further = place + step
            is_lower = (further <= end) & (self._items[(further - 1).clamp_(max=last)] < items)
            place = torch.where(is_lower, further, place)
        return (place < end) & (self._items[place.clamp(max=last)] == items)

    def _among(self, users: Tensor, items: Tensor) -> Tensor:
        """The same for items that all share, from the users' histories: far fewer than there are pairs."""
        start = self._offsets[users]
        lengths = self._offsets[users + 1] - start
        rows = torch.repeat_interleave(lengths)
        seen = self._items[torch.arange(len(rows)) + (start - lengths.cumsum(0) + lengths)[rows]].long()
        ordered = items.sort()[0]
        places = torch.searchsorted(ordered, seen).clamp_(max=len(items) - 1)
        hits = torch.nonzero(ordered[places] == seen).flatten()
        found = torch.zeros(len(users), len(items), dtype=torch.bool)
        found[rows[hits], places[hits]] = True
        # An item that was drawn twice has its mark where it comes first.
        return found.index_select(1, torch.searchsorted(ordered, items))


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
            redrawn = self.draw((len(users), number), generator)
            if items.device.type == "cpu" and not bool(seen.any()):  # on a GPU nobody waits to find out
                continue
            items = torch.where(seen, redrawn, items)
            seen = self.seen.contains(users, items)
        return Negatives(items, ~seen)

    def sample_shared(self, users: Tensor, number: int, generator: torch.Generator) -> Negatives:
        """Draw `number` items once for the whole batch; each user's seen ones are marked invalid for that user.

        As many as the catalogue holds, or more, are the catalogue, each item once, unless popular ones come more often.
        """
        if number >= self.num_items and self._cumulative is None:
            items = torch.arange(self.num_items, device=generator.device)
        else:
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
