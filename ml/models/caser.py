"""Caser: convolutions over a user's latest items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ml.models.ranking_model import RankingModel, embedding, negative_distances, pair_scores


@dataclass(frozen=True)
class CaserConfig:
    """Sizes of Caser; `similarity` "distance" ranks by nearness, which is what the triplet loss trains.

    `unknown_user_share` of the training examples hide their user, which trains the row that stands for anybody.
    """

    factors: int = 64
    window_length: int = 5
    horizontal_filters: int = 16
    vertical_filters: int = 4
    dropout: float = 0.3
    item_bias: bool = True
    initial_scale: float = 0.01
    unknown_user_share: float = 0.1
    similarity: Literal["dot", "distance"] = "dot"


class Caser(RankingModel):
    """The score is v_i . [z, p_u] + b_i, where z comes from convolutions over the window.

    Source: Tang and Wang 2018. Row `num_users` of the user table stands for a user nobody has seen; item row
    `num_items` pads short windows, stays zero and is never scored.
    """

    folds_in: ClassVar[bool] = True
    user_tables: ClassVar[tuple[str, ...]] = ("user_factors.weight",)
    item_tables: ClassVar[tuple[str, ...]] = ("window_factors.weight", "item_factors.weight", "item_bias.weight")

    def __init__(self, num_users: int, num_items: int, config: CaserConfig) -> None:
        if config.window_length < 1:
            raise ValueError(
                f"Caser looks at latest items: window_length must be 1 or more, not {config.window_length}"
            )
        super().__init__(num_users, num_items, config, window_length=config.window_length)
        width, length, scale = config.factors, config.window_length, config.initial_scale
        self.user_factors = embedding(num_users + 1, width, scale)
        self.window_factors = embedding(num_items, width, scale, padded=True)
        self.item_factors = embedding(num_items, 2 * width, scale)
        has_bias = config.item_bias and config.similarity == "dot"
        self.item_bias = embedding(num_items, 1, 0.0) if has_bias else None
        # A horizontal filter of height h sees h neighbouring items whole: a linear layer over h * width numbers.
        self.horizontal = nn.ModuleList(
            nn.Linear(height * width, config.horizontal_filters) for height in range(1, length + 1)
        )
        # A vertical filter weighs the window's positions, alike for every number of an embedding.
        self.vertical = nn.Linear(length, config.vertical_filters)
        self.fused = nn.Linear(length * config.horizontal_filters + config.vertical_filters * width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.compare = pair_scores if config.similarity == "dot" else negative_distances

    def encode(self, users: Tensor, windows: Tensor) -> Tensor:
        users = torch.where(users < 0, self.num_users, users)
        return torch.cat((self._convolve(windows), self.user_factors(users)), 1)

    def score(self, encoded: Tensor, items: Tensor) -> Tensor:
        scores = self.compare(encoded, self.item_factors(items))
        return scores if self.item_bias is None else scores + self.item_bias(items).squeeze(-1)

    def vectors(self, users: Tensor, windows: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(users, windows), self.item_factors(items)

    def _convolve(self, windows: Tensor) -> Tensor:
        """The sequence vector z, (batch, factors)."""
        width = self.config.factors
        images = self.window_factors(windows)  # (batch, length, width)
        flat = images.flatten(1)
        features = []
        for height, layer in enumerate(self.horizontal, start=1):
            slices = flat.unfold(1, height * width, width)  # (batch, length - height + 1, height * width)
            features.append(functional.relu(layer(slices)).amax(1))
        features.append(self.vertical(images.transpose(1, 2)).flatten(1))
        return functional.relu(self.fused(self.dropout(torch.cat(features, 1))))
