"""Popularity: what every recommender must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ml.models.ranking_model import RankingModel


@dataclass(frozen=True)
class PopularityConfig:
    """Popularity has nothing to set."""


class Popularity(RankingModel):
    """The score of an item is the number of its interactions, the same for every user."""

    folds_in: ClassVar[bool] = True

    def __init__(self, num_users: int, num_items: int, config: PopularityConfig) -> None:
        super().__init__(num_users, num_items, config)
        self.register_buffer("counts", torch.zeros(num_items))

    def count(self, items: Tensor) -> None:
        self.counts.copy_(torch.bincount(items, minlength=self.num_items))

    def encode(self, users: Tensor, windows: Tensor) -> Tensor:  # noqa: ARG002
        return self.counts.new_empty(len(users), 0)

    def score(self, encoded: Tensor, items: Tensor) -> Tensor:
        return self.counts[items].expand(len(encoded), items.shape[-1])
