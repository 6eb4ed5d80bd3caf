"""Caser: convolutions over a user's latest items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ml.models.caser_encoder import CaserEncoder
from ml.models.linear_at_rest import linear_at_rest
from ml.models.ranking_model import Dropout, InnerProducts, RankingModel, embedding, negative_distances, pair_scores

# Up to this `horizontal_length` the filters train laid out in one product: 16 MiB of weights at 16 filters of width 64.
LAID_OUT_LENGTH = 20
# The share of what the straight filter weighs a recent item at first that an older one has.
_OLDER_SHARE = 0.1


@dataclass(frozen=True)
class CaserConfig:
    """Sizes of Caser; `similarity` "distance" ranks by nearness, which is what the triplet loss trains.

    Horizontal filters see the latest `horizontal_length` items of the window, vertical ones the whole of it.
    With `shared_items` an item is the same vector in the window and as a target. `unknown_user_share`
    of the training examples hide their user, which trains the row that stands for anybody.
    """

    factors: int = 64
    window_length: int = 20
    horizontal_length: int = 5
    shared_items: bool = True
    horizontal_filters: int = 16
    vertical_filters: int = 4
    dropout: float = 0.3
    embedding_dropout: float = 0.3
    item_bias: bool = True
    initial_scale: float = 0.01
    unknown_user_share: float = 0.1
    similarity: Literal["dot", "distance"] = "dot"


class Caser(RankingModel):
    """The score is v_i . [z, p_u] + b_i, where z comes from convolutions over the window.

    With shared items it is q_i . (W z + s + p_u) + b_i, where q are the window's own embeddings and s is one more
    vertical filter over the window that goes straight to the score: what was taken draws what is near at once.
    Source: Tang and Wang 2018 for both the filters and the score; sharing as in Kang and McAuley 2018 (SASRec).

    Row `num_users` of the user table stands for a user nobody has seen; item row `num_items` pads short windows, stays
    zero and is never scored.
    """

    folds_in: ClassVar[bool] = True
    user_tables: ClassVar[tuple[str, ...]] = ("user_factors.weight",)
    item_tables: ClassVar[tuple[str, ...]] = ("window_factors.weight", "item_factors.weight", "item_bias.weight")

    def __init__(self, num_users: int, num_items: int, config: CaserConfig) -> None:
        if config.window_length < 1:
            raise ValueError(
                f"Caser looks at latest items: window_length must be 1 or more, not {config.window_length}"
            )
        if config.horizontal_length < 1:
            raise ValueError(f"horizontal_length must be 1 or more, not {config.horizontal_length}")
        super().__init__(num_users, num_items, config, window_length=config.window_length)
        width, length, scale = config.factors, config.window_length, config.initial_scale
        self.horizontal_length = recent = min(config.horizontal_length, length)
        self.user_factors = embedding(num_users + 1, width, scale)
        self.window_factors = embedding(num_items, width, scale, padded=True)
        self.item_factors = None if config.shared_items else embedding(num_items, 2 * width, scale)
        has_bias = config.item_bias and config.similarity == "dot"
        self.item_bias = embedding(num_items, 1, 0.0) if has_bias else None
        # A horizontal filter of height h sees h neighbouring items whole: a linear layer over h * width numbers.
        self.horizontal = nn.ModuleList(
            _linear(height * width, config.horizontal_filters) for height in range(1, recent + 1)
        )
        # A vertical filter weighs the window's positions, alike for every number of an embedding.
        self.vertical = _linear(length, config.vertical_filters)
        self.fused = _linear(recent * config.horizontal_filters + config.vertical_filters * width, width)
        self.projection = _linear(width, width) if config.shared_items else None
        self.straight = nn.Linear(length, 1, bias=False) if config.shared_items else None
        if self.straight is not None:
            nn.init.constant_(self.straight.weight, 1 / recent)
            with torch.no_grad():
                self.straight.weight[:, : length - recent] *= _OLDER_SHARE
        self.dropout = Dropout(config.dropout)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.compare = pair_scores if config.similarity == "dot" else negative_distances

    def encode(self, users: Tensor, windows: Tensor) -> Tensor:
        user_factors = self.embedding_dropout(self.user_factors(torch.where(users < 0, self.num_users, users)))
        images = self.window_factors(windows)  # (batch, length, width)
        if torch.is_grad_enabled():  # padding must stay zero, so it takes no gradient
            images = images * (windows != self.num_items).unsqueeze(2)
        images = self.embedding_dropout(images)
        turned = images.transpose(1, 2).contiguous()
        sequence = self._convolve(images, turned)
        if self.projection is None or self.straight is None:
            return torch.cat((sequence, user_factors), 1)
        straight = _through(self.straight, turned).squeeze(2)
        shared: Tensor = _through(self.projection, self.dropout(sequence)) + straight + user_factors
        return shared

    def score(self, encoded: Tensor, items: Tensor) -> Tensor:
        scores = self.compare(encoded, self._targets(items))
        return scores if self.item_bias is None else scores + self.item_bias(items).squeeze(-1)

    def vectors(self, users: Tensor, windows: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(users, windows), self._targets(items)

    def item_vectors(self, items: Tensor) -> Tensor:
        return self._targets(items)

    def few_encoder(self) -> CaserEncoder:
        return CaserEncoder(self)

    def inner_products(self) -> InnerProducts:
        table = self.window_factors if self.item_factors is None else self.item_factors
        biases = None if self.item_bias is None else self.item_bias.weight[:, 0]
        return InnerProducts(table.weight[: self.num_items], biases, self.config.similarity == "distance")

    def _targets(self, items: Tensor) -> Tensor:
        table = self.window_factors if self.item_factors is None else self.item_factors
        vectors: Tensor = table(items)
        return vectors

    def _convolve(self, images: Tensor, turned: Tensor) -> Tensor:
        """The sequence vector z, (batch, width), of the windows' embeddings; `turned` are (batch, width, length)."""
        latest = images[:, -self.horizontal_length :]
        # Laid out, filters train faster; their weights grow with the fourth power of the length, and for a few windows
        # laying them out costs more than it saves.
        is_product = torch.is_grad_enabled() and self.horizontal_length <= LAID_OUT_LENGTH
        sums = self._filtered_in_one_product(latest) if is_product else self._filtered(latest)
        features = [
            functional.relu(values.amax(1) + layer.get_parameter("bias"))
            for layer, values in zip(self.horizontal, sums, strict=True)
        ]
        features.append(_through(self.vertical, turned).flatten(1))
        return _through(self.fused, self.dropout(torch.cat(features, 1)), relu=True)

    def _filtered(self, images: Tensor) -> list[Tensor]:
        """The filters' sums at every place, for each height (batch, length - height + 1, filters)."""
        flat, width = images.flatten(1), images.shape[2]
        return [
            linear_at_rest(flat.unfold(1, height * width, width), layer.get_parameter("weight"))
            for height, layer in enumerate(self.horizontal, start=1)
        ]

    def _filtered_in_one_product(self, images: Tensor) -> tuple[Tensor, ...]:
        """The same, with each filter's weights at every place it can take side by side."""
        flat, length, width = images.flatten(1), images.shape[1], images.shape[2]
        placed = [
            functional.pad(layer.get_parameter("weight"), (place * width, (length - height - place) * width))
            for height, layer in enumerate(self.horizontal, start=1)
            for place in range(length - height + 1)
        ]
        sums = (flat @ torch.cat(placed).T).view(len(flat), len(placed), self.config.horizontal_filters)
        return torch.split_with_sizes(sums, list(range(length, 0, -1)), 1)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer without bias at first.

    Embeddings start so small that a random bias would decide alone which filters and units are at rest, for every
    window alike; those learn nothing until the embeddings have outgrown it.
    """
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.bias)
    return layer


def _through(layer: nn.Linear, values: Tensor, *, relu: bool = False) -> Tensor:
    return linear_at_rest(values, layer.weight, layer.bias, relu=relu)
