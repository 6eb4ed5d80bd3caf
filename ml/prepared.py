"""A model whose weights are final, prepared to rank for a few users at a time."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ml.gathering import Gathering
from ml.inner_product_screen import InnerProductScreen
from ml.models import FewEncoder, InnerProducts, NeuMF, RankingModel
from ml.neumf_screen import NeuMFScreen
from ml.retrieval import Retrieval, candidate_count
from ml.screening import (
    SPARE,
    AnyIndices,
    Floats,
    Indices,
    Screened,
    best_of,
    best_of_each,
    screened_top,
    whole_products_are_exact,
)

# Catalogues from which on a screen finds the best items sooner than scores of all do; see docs/performance.md.
PRODUCTS_SCREENED_FROM = 50_000
NEUMF_SCREENED_FROM = 20_000
# Where fewer items than this share may be shown, those alone are scored.
FEW_ALLOWED = 1 / 64
# Where filters leave less than this share, an index would have to give too many candidates.
MOST_FILTERED = 0.25

# A pass over the table for several users takes less time than one for each from the fewest on, and a third for 16; of
# NeuMF, whose time goes into arithmetic and not into reading, a pass for several would take as long as one for each.
FEWEST_TOGETHER = 4
MOST_TOGETHER = 32

# How a ranking found its items.
Way = Literal["scored", "screened", "retrieved", "starved"]
WAYS: tuple[Way, ...] = get_args(Way)

_NEVER = np.float32("-inf")


class Prepared:
    """Ranks on a processor, exactly, each time in the fastest of its ways; safe to call from several threads at once.

    `screened_from` is the number of items from which on a screen is built. With `probes`, candidates for models whose
    scores are inner products come from an index: then, and only then, a list may lack items of the exact one.
    `on_ranked` hears of each ranking how its items were found: "scored" (every item that may be shown), "screened",
    "retrieved" (from the index), or "starved" (screened or scored, for the index gave too few that may be shown).
    """

    def __init__(
        self,
        model: RankingModel,
        *,
        screened_from: int | None = None,
        probes: int | None = None,
        on_ranked: Callable[[Way], None] = lambda way: None,  # noqa: ARG005
    ) -> None:
        self._model = model
        self._on_ranked = on_ranked
        self._screen: Callable[[Tensor], Screened | None] | None = None
        self._retrieval: Retrieval | None = None
        self._products: InnerProducts | None = None
        with torch.inference_mode():
            self._encoder: FewEncoder | None = model.few_encoder()
            products = model.inner_products()
            if products is not None:
                products = self._products = products.as_products()
                self._vectors: Floats = products.vectors.numpy()
                self._biases: Floats | None = None if products.biases is None else products.biases.numpy()
                if model.num_items >= (screened_from or PRODUCTS_SCREENED_FROM) and whole_products_are_exact():
                    screen = InnerProductScreen(products)
                    self._screen = Gathering(screen, screen.together, fewest=FEWEST_TOGETHER, most=MOST_TOGETHER)
                if probes is not None:
                    self._retrieval = Retrieval(products, probes)
            elif isinstance(model, NeuMF):
                model.item_share()
                if model.num_items >= (screened_from or NEUMF_SCREENED_FROM) and whole_products_are_exact():
                    self._screen = NeuMFScreen(model)

    @property
    def is_exhaustive(self) -> bool:
        """Whether every ranking scores all items: then a batch is ranked faster as a whole."""
        return self._screen is None and self._retrieval is None

    @property
    def retrieves(self) -> bool:
        """Whether an index gives the candidates."""
        return self._retrieval is not None

    def encode(self, users: Indices, windows: Indices) -> Tensor | None:
        """What the model knows of users (batch,) with these windows, (batch, width); None if itself it is as fast."""
        if self._encoder is None or len(users) > MOST_TOGETHER:
            return None
        return torch.from_numpy(self._encoder(users, windows))

    def top(
        self, encoded: Tensor, excluded: Indices, k: int, allowed: npt.NDArray[np.bool_] | None
    ) -> tuple[Indices, Floats]:
        """The k best items of one encoded user, (1, width), and their scores; fewer where fewer remain."""
        if self.is_exhaustive:
            items, values = self.top_of_all(encoded, [excluded], k, allowed)
            return items[0][items[0] >= 0], values[0][items[0] >= 0]
        excluded = np.sort(excluded)
        rescore = self._exactly(encoded)

        def shown(items: Indices) -> Indices:
            if allowed is not None:
                items = items[allowed[items]]
            if len(excluded):
                items = items[excluded[np.minimum(np.searchsorted(excluded, items), len(excluded) - 1)] != items]
            return items

        share = 1.0 if allowed is None else np.count_nonzero(allowed) / len(allowed)
        starved = False
        if self._retrieval is not None:
            items = np.zeros(0, np.int64)
            if share >= MOST_FILTERED:
                items = shown(self._retrieval.candidates(encoded, int(candidate_count(k + len(excluded)) / share)))
            if len(items) >= k:
                best, values = best_of(rescore(items), k, items)
                self._on_ranked("retrieved")
                return items[best], values
            starved = True
        if allowed is not None and share < FEW_ALLOWED:
            few = shown(np.flatnonzero(allowed))
            best, values = best_of(rescore(few), k)
            self._on_ranked("starved" if starved else "scored")
            return few[best], values
        found = None
        if self._screen is not None:
            pool = int((k + len(excluded)) / share) + SPARE
            found = screened_top(self._screen, encoded, rescore, shown, k, pool)
        self._on_ranked("starved" if starved else "scored" if found is None else "screened")
        if found is not None:
            return found
        scores = self._scores(encoded)
        if allowed is not None:
            scores[:, ~allowed] = _NEVER
        scores[0, excluded] = _NEVER
        return best_of(scores[0], k)

    def top_of_all(
        self, encoded: Tensor, excluded: Sequence[AnyIndices], k: int, allowed: npt.NDArray[np.bool_] | None
    ) -> tuple[Indices, Floats]:
        """The k best items of encoded users, (batch, width), from the scores of all: (batch, k), and their scores.

        As `best_of_each` gives them. Negative items are passed over. What a user gets does not depend, to the last bit,
        on the company.
        """
        scores = self._scores(encoded)
        if allowed is not None and not allowed.all():
            scores[:, ~allowed] = _NEVER
        items = np.concatenate(excluded, dtype=np.int64, casting="unsafe")
        rows = np.repeat(np.arange(len(scores)), [len(own) for own in excluded])
        if len(items) and items.min() < 0:
            rows, items = rows[items >= 0], items[items >= 0]
        scores[rows, items] = _NEVER
        for _ in excluded:
            self._on_ranked("scored")
        return best_of_each(scores, k)

    def _exactly(self, encoded: Tensor) -> Callable[[Indices], Floats]:
        """What scores some items for one user."""
        if self._products is None:

            def by_model(items: Indices) -> Floats:
                scores: Floats = self._model.score(encoded, torch.from_numpy(items)[None])[0].float().numpy()
                return scores

            return by_model
        # After a pass over a large table nothing is left in the processor's cache: few steps count.
        vectors, biases = self._vectors, self._biases
        query, offset = self._products.query(encoded[0])
        numbers = query.numpy()

        def by_product(items: Indices) -> Floats:
            scores: Floats = vectors[items] @ numbers
            if biases is not None:
                scores += biases[items]
            return scores + np.float32(offset) if offset else scores

        return by_product

    def _scores(self, encoded: Tensor) -> Floats:
        """Scores of all items for each user, (batch, num_items), for the caller to change."""
        scores = np.empty((len(encoded), self._model.num_items), np.float32)
        if self._products is None:
            with torch.inference_mode():
                for row, own in enumerate(scores):
                    own[:] = self._model.score_all(encoded[row : row + 1])[0].float().numpy()
            return scores
        # One product for all would take hardly less time, and round otherwise in other company.
        if self._products.is_distance:
            for user, own in zip(encoded, scores, strict=True):
                query, offset = self._products.query(user)
                np.dot(self._vectors, query.numpy(), out=own)
                own += np.float32(offset)
        else:
            for numbers, own in zip(encoded.numpy(), scores, strict=True):
                np.dot(self._vectors, numbers, out=own)
        if self._biases is not None:
            scores += self._biases
        return scores
