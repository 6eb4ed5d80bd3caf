"""What every model is: scores for users, their latest items, and items to rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ml.models.linear_at_rest import linear_at_rest


class FewEncoder(Protocol):
    """Encodes a few users (batch,), -1 for one that nobody has seen, and their windows (batch, window_length).

    Gives numbers (batch, d); those of a user do not depend, to the last bit, on the company.
    """

    def __call__(self, users: npt.NDArray[np.int64], windows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class InnerProducts:
    """Items as vectors (n, d) and biases (n,): the score is encoded . vector + bias, or -|encoded - vector|^2."""

    vectors: Tensor
    biases: Tensor | None
    is_distance: bool = False

    def as_products(self) -> InnerProducts:
        """The same without gradients, with biases -|vector|^2 where the scores are distances; see `query`."""
        vectors = self.vectors.detach()
        biases = -vectors.square().sum(1) if self.is_distance else self.biases
        return InnerProducts(vectors, None if biases is None else biases.detach().contiguous(), self.is_distance)

    def query(self, encoded: Tensor) -> tuple[Tensor, float]:
        """What to multiply vectors with for one encoded user (d,), and a number to add to all products and biases.

        -|e - v|^2 = 2 e . v - |v|^2 - |e|^2.
        """
        if not self.is_distance:
            return encoded, 0.0
        return 2 * encoded, -float(encoded.double().square().sum())


class RankingModel(nn.Module):
    """A model that scores items for users; higher ranks first, and scores are raw (no sigmoid).

    Shapes, everywhere: `users` (batch,) user indices; `windows` (batch, window_length) the latest items, oldest first,
    short ones padded in front with `num_items`; `items` (batch, n), or (n,) for the same items for the whole batch.
    Models whose `window_length` is 0 ignore `windows`.
    """

    # A model that folds in ranks a user it has never seen (user index -1) from their history alone.
    folds_in: ClassVar[bool] = False
    # One that fits strangers folds in through ml.fold_in, which needs its `counts` and `linear_scores`.
    fits_strangers: ClassVar[bool] = False
    counts: Tensor
    # Parameters with one row a user and one row an item, for warm starts on more users and items.
    user_tables: ClassVar[tuple[str, ...]] = ()
    item_tables: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_users: int, num_items: int, config: Any, *, window_length: int = 0) -> None:
        super().__init__()
        if num_users < 1 or num_items < 1:
            raise ValueError(f"a model needs at least one user and one item, not {num_users} and {num_items}")
        self.num_users = num_users
        self.num_items = num_items
        self.config = config
        self.window_length = window_length

    def count(self, items: Tensor) -> None:
        """Take note of how often each item was chosen, from the items of all interactions, (n,)."""

    def linear_scores(self, encoded: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Slopes (n, d) and offsets (n,): around `encoded` (d,), slopes @ x + offsets ranks as the scores do."""
        raise ValueError(f"{type(self).__name__} knows strangers otherwise: encode them from their window")

    def forward(self, users: Tensor, windows: Tensor, items: Tensor) -> Tensor:
        """Score items for users: (batch, n) raw scores."""
        return self.score(self.encode(users, windows), items)

    def encode(self, users: Tensor, windows: Tensor) -> Tensor:
        """What the model knows of each user, (batch, d), to score any items with."""
        raise NotImplementedError

    def score(self, encoded: Tensor, items: Tensor) -> Tensor:
        """Score items for encoded users: (batch, n)."""
        raise NotImplementedError

    def score_catalogue(self, users: Tensor, windows: Tensor) -> Tensor:
        """Score every item: (batch, num_items) raw scores."""
        return self.score_all(self.encode(users, windows))

    def score_all(self, encoded: Tensor) -> Tensor:
        """Score every item for encoded users: (batch, num_items) raw scores."""
        products = self.inner_products()
        if products is None:
            return self.score(encoded, torch.arange(self.num_items, device=encoded.device))
        if products.is_distance:
            return negative_distances(encoded, products.vectors)
        return linear_at_rest(encoded, products.vectors, products.biases)

    def few_encoder(self) -> FewEncoder | None:
        """Something faster than `encode` for a few users at a time, once the weights rest; None if there is nothing."""
        return None

    def inner_products(self) -> InnerProducts | None:
        """The items as vectors, if the scores are inner products or distances of those with what `encode` gives."""
        return None

    def item_vectors(self, items: Tensor) -> Tensor:  # noqa: ARG002
        """Vectors (n, d) of `items` (n,) whose cosine says how alike items are."""
        raise ValueError(f"{type(self).__name__} does not know which items are alike: use another model")

    def vectors(self, users: Tensor, windows: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """What the scores compare: user vectors (batch, d) and item vectors (batch, n, d), or (n, d) if shared."""
        raise ValueError(
            f"{type(self).__name__} scores pairs with a network and has no user and item vectors: the triplet loss "
            "needs caser or matrix_factorization"
        )


class Dropout(nn.Dropout):
    """Dropout whose chances are, on a CPU, multiples of 1 / 256: eight masks from one random word.

    What is kept is scaled by the chance that it really had, so the mean is that of the input.
    """

    def forward(self, values: Tensor) -> Tensor:
        threshold = min(255, round(256 * self.p))
        if values.device.type != "cpu" or not self.training or not threshold:
            return super().forward(values)
        words = torch.empty(-(-values.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = (words.view(torch.uint8)[: values.numel()] >= threshold).view(values.shape)
        return values * kept.to(values.dtype).mul_(256 / (256 - threshold))


def embedding(rows: int, width: int, scale: float, *, padded: bool = False) -> nn.Embedding:
    """A table with small normal rows whose gradient holds only the rows that were read; a last row of zeros if padded.

    Who reads the padding row must let no gradient through to it. (The table's own `padding_idx` would pick the other
    rows out, whose number makes a GPU wait for the host.)
    """
    table = nn.Embedding(rows + padded, width, sparse=True)
    with torch.no_grad():
        table.weight.normal_(std=scale)
        if padded:
            table.weight[rows].zero_()
    return table


def pair_scores(user_vectors: Tensor, item_vectors: Tensor) -> Tensor:
    """Inner products of (batch, d) with (n, d) or (batch, n, d): (batch, n)."""
    if item_vectors.dim() == 2:
        return linear_at_rest(user_vectors, item_vectors)
    return torch.bmm(item_vectors, user_vectors.unsqueeze(2)).flatten(1)


def negative_distances(user_vectors: Tensor, item_vectors: Tensor) -> Tensor:
    """Minus the squared distances of (batch, d) to (n, d) or (batch, n, d): (batch, n)."""
    squares = user_vectors.square().sum(1, keepdim=True) + item_vectors.square().sum(-1)
    return 2 * pair_scores(user_vectors, item_vectors) - squares
