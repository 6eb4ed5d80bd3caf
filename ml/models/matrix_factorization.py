"""Plain matrix factorisation: the honest baseline for every deeper model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ml.models.ranking_model import InnerProducts, RankingModel, embedding, negative_distances, pair_scores


@dataclass(frozen=True)
class MatrixFactorizationConfig:
    """Sizes of a factorisation; `similarity` "distance" ranks by nearness, which is what the triplet loss trains."""

    factors: int = 64
    item_bias: bool = True
    initial_scale: float = 0.01
    similarity: Literal["dot", "distance"] = "dot"


class MatrixFactorization(RankingModel):
    """The score is p_u . q_i + b_i, or minus the squared distance of p_u and q_i.

    Source: Koren, Bell and Volinsky 2009, without the global and user terms, which don't change a user's ranking;
    with distances, Hsieh et al. 2017 (collaborative metric learning).
    """

    folds_in: ClassVar[bool] = True
    fits_strangers: ClassVar[bool] = True
    user_tables: ClassVar[tuple[str, ...]] = ("user_factors.weight",)
    item_tables: ClassVar[tuple[str, ...]] = ("item_factors.weight", "item_bias.weight")

    def __init__(self, num_users: int, num_items: int, config: MatrixFactorizationConfig) -> None:
        super().__init__(num_users, num_items, config)
        self.user_factors = embedding(num_users, config.factors, config.initial_scale)
        self.item_factors = embedding(num_items, config.factors, config.initial_scale)
        has_bias = config.item_bias and config.similarity == "dot"
        self.item_bias = embedding(num_items, 1, 0.0) if has_bias else None
        self.register_buffer("counts", torch.zeros(num_items))
        self.compare = pair_scores if config.similarity == "dot" else negative_distances

    def count(self, items: Tensor) -> None:
        self.counts.copy_(torch.bincount(items, minlength=self.num_items))

    def encode(self, users: Tensor, windows: Tensor) -> Tensor:  # noqa: ARG002
        encoded: Tensor = self.user_factors(users)
        return encoded

    def score(self, encoded: Tensor, items: Tensor) -> Tensor:
        scores = self.compare(encoded, self.item_factors(items))
        return scores if self.item_bias is None else scores + self.item_bias(items).squeeze(-1)

    def vectors(self, users: Tensor, windows: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(users, windows), self.item_factors(items)

    def item_vectors(self, items: Tensor) -> Tensor:
        vectors: Tensor = self.item_factors(items)
        return vectors

    def inner_products(self) -> InnerProducts:
        biases = None if self.item_bias is None else self.item_bias.weight[:, 0]
        return InnerProducts(self.item_factors.weight, biases, self.config.similarity == "distance")

    def linear_scores(self, encoded: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        vectors = self.item_factors(items)
        if self.compare is negative_distances:  # less the user's own square, which is the same for every item
            return 2 * vectors, -vectors.square().sum(1)
        return vectors, vectors.new_zeros(len(items)) if self.item_bias is None else self.item_bias(items).squeeze(1)
