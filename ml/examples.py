"""Training examples on the device: windows, targets and weights, cut out of interactions without a loop."""

from __future__ import annotations

import torch
from torch import Tensor

from ml.interactions import Interactions


class Examples:
    """Interactions on the training device: every row is an example, with the rows before it as its window."""

    def __init__(
        self, interactions: Interactions, device: torch.device, recency: float = 0.0, user_balance: float = 0.0
    ) -> None:
        self.num_items = interactions.num_items
        self.users = torch.as_tensor(interactions.user_index, dtype=torch.int64, device=device)
        self.items = torch.as_tensor(interactions.item_index, dtype=torch.int64, device=device)
        self.offsets = torch.as_tensor(interactions.offsets, dtype=torch.int64, device=device)
        weights = interactions.weight
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=device)
        recency = recency if interactions.in_order else 0.0
        if recency or user_balance:
            ends = self.offsets[self.users + 1]
            ages = ends - 1 - torch.arange(len(self.users), device=device)
            counts = ends - self.offsets[self.users]
            shares = (1.0 + ages) ** -recency * counts.float() ** -user_balance
            self.weights = shares if self.weights is None else self.weights * shares
        self._in_time = (self.items, self.weights)
        # Where the targets that begin at a position end, if not with the user's items.
        self._ends: Tensor | None = None

    def __len__(self) -> int:
        return len(self.users)

    def windows(self, positions: Tensor, length: int) -> Tensor:
        """The items before each position, (batch, length), oldest first, padded in front with num_items."""
        if length == 0:
            return positions.new_empty(len(positions), 0)
        rows = positions.unsqueeze(1) + torch.arange(-length, 0, device=positions.device)
        first = self.offsets[self.users[positions]].unsqueeze(1)
        return torch.where(rows >= first, self.items[rows.clamp(min=0)], self.num_items)

    def targets(self, positions: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The items from each position on, (batch, number), and which of them are there."""
        rows = positions.unsqueeze(1) + torch.arange(number, device=positions.device)
        ends = self.offsets[self.users[positions] + 1] if self._ends is None else self._ends[positions]
        is_there = rows < ends.unsqueeze(1)
        # In place of those that are not there stands the first, which is learnt from anyway: no other row may move.
        return self.items[torch.where(is_there, rows, positions.unsqueeze(1))], is_there

    def weight(self, positions: Tensor, number: int) -> Tensor | None:
        """The weights of the targets, (batch, number), or None where all weigh the same."""
        if self.weights is None:
            return None
        rows = positions.unsqueeze(1) + torch.arange(number, device=positions.device)
        return self.weights[rows.clamp(max=len(self.items) - 1)]

    def group(self, number: int, generator: torch.Generator) -> Tensor:
        """Shuffle the items within each user; returns the positions where groups of up to `number` begin."""
        shuffled = torch.randperm(len(self.users), generator=generator, device=self.users.device)
        rows = shuffled[torch.argsort(self.users[shuffled], stable=True)]
        # Always from the order of the data, so that a resumed training shuffles as one that never stopped.
        items, weights = self._in_time
        # Always into the same memory, which a recorded step goes on reading.
        if self.items is items:
            self.items, self.weights = torch.empty_like(items), None if weights is None else torch.empty_like(weights)
        torch.index_select(items, 0, rows, out=self.items)
        if weights is not None:
            torch.index_select(weights, 0, rows, out=self.weights)
        places = torch.arange(len(self.users), device=self.users.device) - self.offsets[self.users]
        return torch.nonzero(places % number == 0).flatten()

    def cut(self, number: int, generator: torch.Generator) -> Tensor:
        """Cut each user's items, in order, into runs of up to `number`; returns the positions where runs begin.

        The first run is as long as chance will have it, so that an item follows other windows in other epochs.
        """
        device = self.users.device
        first = torch.randint(number, (len(self.offsets) - 1,), generator=generator, device=device)
        positions = torch.arange(len(self.users), device=device)
        begins, ends = self.offsets[self.users], self.offsets[self.users + 1]
        places = (positions - begins + first[self.users]) % number
        if self._ends is None:  # a recorded step goes on reading the same memory
            self._ends = torch.empty_like(positions)
        torch.minimum(positions - places + number, ends, out=self._ends)
        return torch.nonzero((places == 0) | (positions == begins)).flatten()
