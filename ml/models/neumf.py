"""NeuMF: a generalised matrix factorisation and a multi-layer perceptron, fused."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ml.models.linear_at_rest import linear_at_rest, packed
from ml.models.ranking_model import Dropout, RankingModel, embedding, pair_scores
from ml.models.tower import BLOCK_NUMBERS, Tower

# Numbers of the first layer held at once while the tower ranks the catalogue: enough rows for a product at full speed,
# few enough to stay in a cache; and scores at once where they are to fill a GPU.
CPU_BLOCK_NUMBERS = 5 << 17
GPU_BLOCK = 1 << 22


@dataclass(frozen=True)
class NeuMFConfig:
    """Sizes of NeuMF: `factors` of the factorisation, `tower_factors` of each embedding under the tower of `hidden`.

    Without `weigh_factors` the weights over the factorisation stay as they start, at one. The factors can take them up,
    so no score is lost; but where such weights grow, L2 on the factors holds their products back less.
    """

    factors: int = 64
    tower_factors: int = 16
    hidden: tuple[int, ...] = (32, 16)
    dropout: float = 0.0
    embedding_dropout: float = 0.5
    item_bias: bool = True
    initial_scale: float = 0.01
    weigh_factors: bool = True


class NeuMF(RankingModel):
    """The score is h . [p_u * q_i, tower([u_u, v_i])] + b_i.

    Source: He et al. 2017, with a raw score in place of the sigmoid of equation 12, as pairwise losses need. The
    weights h over the factorisation start at one, so that it starts as plain matrix factorisation.
    """

    folds_in: ClassVar[bool] = True
    fits_strangers: ClassVar[bool] = True
    user_tables: ClassVar[tuple[str, ...]] = ("user_factors.weight", "user_tower.weight")
    item_tables: ClassVar[tuple[str, ...]] = ("item_factors.weight", "item_tower.weight", "item_bias.weight")

    def __init__(self, num_users: int, num_items: int, config: NeuMFConfig) -> None:
        super().__init__(num_users, num_items, config)
        if not config.hidden:
            raise ValueError("NeuMF needs at least one hidden width, for example hidden=64,32")
        scale, tower = config.initial_scale, config.tower_factors
        self.user_factors = embedding(num_users, config.factors, scale)
        self.item_factors = embedding(num_items, config.factors, scale)
        self.user_tower = embedding(num_users, tower, scale)
        self.item_tower = embedding(num_items, tower, scale)
        self.item_bias = embedding(num_items, 1, 0.0) if config.item_bias else None
        self.register_buffer("counts", torch.zeros(num_items))
        # The first layer, W [u, v] + b, is kept as its two halves: an item's half serves every user.
        self.user_layer = nn.Linear(tower, config.hidden[0])
        self.item_layer = nn.Linear(tower, config.hidden[0], bias=False)
        self.deeper_layers = nn.ModuleList(nn.Linear(inner, outer) for inner, outer in pairwise(config.hidden))
        self.dropout = Dropout(config.dropout)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.factor_weights = nn.Parameter(torch.ones(config.factors), requires_grad=config.weigh_factors)
        self.tower_weights = nn.Parameter(torch.empty(config.hidden[-1]))
        for layer in (self.user_layer, self.item_layer, *self.deeper_layers):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.tower_weights, std=config.hidden[-1] ** -0.5)
        nn.init.zeros_(self.user_layer.bias)
        self._item_share: Tensor | None = None

    def count(self, items: Tensor) -> None:
        self.counts.copy_(torch.bincount(items, minlength=self.num_items))

    def encode(self, users: Tensor, windows: Tensor) -> Tensor:  # noqa: ARG002
        """The user's weighted factors beside their share of the tower's first layer."""
        factors = self.embedding_dropout(self.user_factors(users)) * self.factor_weights
        tower = self.embedding_dropout(self.user_tower(users))
        return torch.cat((factors, self.user_layer(tower)), 1)

    def score(self, encoded: Tensor, items: Tensor) -> Tensor:
        if items.dim() == 1 and not (self.training or torch.is_grad_enabled()):
            return self._score_at_rest(encoded, items)
        width = len(self.factor_weights)
        factors, user_share = encoded[:, :width], encoded[:, width:]
        scores = pair_scores(factors, self.item_factors(items))
        # Computed ahead where weights are at rest and scores few: the same numbers, but for their last bits.
        ahead = None if self.training or torch.is_grad_enabled() else self._item_share
        item_share = self.item_layer(self.item_tower(items)) if ahead is None else functional.embedding(items, ahead)
        scores = scores + self._tower(user_share, item_share)
        return scores if self.item_bias is None else scores + self.item_bias(items).squeeze(-1)

    def _tower(self, user_share: Tensor, item_share: Tensor) -> Tensor:
        """The tower's part of the score, (batch, n), from the two shares of the first layer's sums."""
        number = user_share.shape[0] * item_share.shape[-2] * item_share.shape[-1]
        is_single = item_share.dtype == torch.float32 and item_share.device.type == "cpu"
        if torch.is_grad_enabled() and is_single and not self.dropout.p and number > BLOCK_NUMBERS:
            layers = (part for layer in self.deeper_layers for part in (layer.weight, layer.bias))
            scores: Tensor = Tower.apply(user_share, item_share, self.tower_weights, *layers)  # type: ignore[no-untyped-call]
            return scores
        # In half precision the layers are half as large; what the user brings would make them whole again.
        sums = user_share.unsqueeze(1).to(item_share.dtype) + item_share
        hidden: Tensor = self.dropout(functional.relu(sums))
        for layer in self.deeper_layers:
            hidden = self.dropout(functional.relu(layer(hidden)))
        return hidden @ self.tower_weights

    def linear_scores(self, encoded: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """The tower follows its tangent: the share of each hidden unit that is not at rest, back through the layers."""
        user_share, factors = encoded[len(self.factor_weights) :], self.item_factors(items)
        hidden = [functional.relu(user_share + self.item_layer(self.item_tower(items)))]
        for layer in self.deeper_layers:
            hidden.append(functional.relu(layer(hidden[-1])))
        offsets = hidden[-1] @ self.tower_weights
        tower = (hidden[-1] > 0) * self.tower_weights
        for layer, below in zip(reversed(self.deeper_layers), reversed(hidden[:-1]), strict=True):
            tower = (tower @ layer.get_parameter("weight")) * (below > 0)
        offsets = offsets - tower @ user_share
        if self.item_bias is not None:
            offsets = offsets + self.item_bias(items).squeeze(1)
        return torch.cat((factors, tower), 1), offsets

    def item_vectors(self, items: Tensor) -> Tensor:
        """An item's weighted factors beside its tower embedding."""
        return torch.cat((self.item_factors(items) * self.factor_weights, self.item_tower(items)), 1)

    def item_share(self) -> Tensor:
        """The items' share of the tower's first layer, (num_items, hidden[0]): alike for every user.

        Computed once, until weights may change; only within inference mode or without gradients.
        """
        if self._item_share is None or self._item_share.device != self.item_tower.weight.device:
            self._item_share = self.item_layer(self.item_tower.weight)
        return self._item_share

    def score_all(self, encoded: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return super().score_all(encoded)
        return self._score_at_rest(encoded, slice(None))

    def _score_at_rest(self, encoded: Tensor, items: Tensor | slice) -> Tensor:
        """Score the same items for everybody, block by block."""
        item_shares, width = self.item_share()[items], len(self.factor_weights)
        factors, user_share = encoded[:, :width], encoded[:, width:]
        biases = None if self.item_bias is None else self.item_bias.weight[items, 0]
        scores = linear_at_rest(factors, self.item_factors.weight[items], biases)
        widths = self.config.hidden
        block = max(1, CPU_BLOCK_NUMBERS // widths[0] if scores.device.type == "cpu" else GPU_BLOCK)
        number = len(item_shares)
        wide = max(1, min(number, block))
        step = max(1, block // wide)
        memory = scores.new_empty(step * wide * widths[0])
        layers: list[tuple[Tensor, Tensor]] = [
            (layer.get_parameter("weight"), layer.get_parameter("bias")) for layer in self.deeper_layers
        ]
        if len(encoded) * number > 4 * step * wide:  # packing takes as long as it saves in a few blocks
            layers = [(packed(weight, step * wide), bias) for weight, bias in layers]
        for first in range(0, number, wide):
            item_share = item_shares[first : first + wide]
            for row in range(0, len(encoded), step):
                rows = slice(row, row + step)
                scores[rows, first : first + wide] += self._resting_tower(user_share[rows], item_share, layers, memory)
        return scores

    def _resting_tower(
        self, user_share: Tensor, item_share: Tensor, layers: list[tuple[Tensor, Tensor]], memory: Tensor
    ) -> Tensor:
        """The same as `_tower` for weights at rest; the first layer in memory that is used again."""
        batch, number, width = len(user_share), *item_share.shape
        sums = memory[: batch * number * width].view(batch, number, width)
        hidden = torch.add(user_share.unsqueeze(1), item_share, out=sums).relu_().view(-1, width)
        for weight, bias in layers:
            hidden = linear_at_rest(hidden, weight, bias, relu=True)
        return (hidden @ self.tower_weights).view(batch, number)

    # Also reached by eval().
    def train(self, mode: bool = True) -> NeuMF:
        self._item_share = None
        super().train(mode)
        return self
