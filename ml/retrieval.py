"""Candidates from an approximate index, where a catalogue is so large that even bounding every score takes long.

The index is faiss', asked by inverted lists: k-means puts each item into a list, and a ranking looks into the lists
nearest to the user. Whether that finds enough of the exact list is measured with a version's own users and items when
it is published; see `measured_retrieval`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ml.models import InnerProducts
from ml.screening import Indices

# The share of the exact first 100 that a retrieval must find, and what is aimed at when lists are chosen.
ENOUGH = 0.99
AIM = 0.995
DEPTH = 100
FEWEST_PROBES = 8
# Looking into more than this share of the lists, a screen of all items is as fast.
MOST_PROBED = 1 / 8
_ROWS = 1 << 17
_SAMPLED_FROM_EACH = 48  # points that k-means sees for each list
_SCORES = 1 << 25  # held at once
_SEED = 1


def is_installed() -> bool:
    """Whether faiss can be imported here."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def candidate_count(k: int) -> int:
    """How many candidates to retrieve for a list of k: the index orders them by rounded numbers."""
    return 4 * k + 32


class Retrieval:
    """An index over a model's items that gives those near a user; the same weights give the same index.

    The nearest by inner product are the nearest by distance once each item has one more number that makes all of them
    equally long, and the user has a zero there; the bias is one more number still, and the user has a one there.
    Source: Bachrach et al. 2014, the Euclidean transformation.
    """

    def __init__(self, products: InnerProducts, probes: int = FEWEST_PROBES) -> None:
        import faiss

        vectors = products.vectors
        count, width = vectors.shape
        self.products = products
        self._longest = 0.0 if products.is_distance else self._longest_square(products)
        width = width if products.is_distance else width + 2
        self.lists = 2 ** max(3, round(math.log2(1.5 * math.sqrt(count))))
        centres = faiss.IndexFlatL2(width)
        index = faiss.IndexIVFScalarQuantizer(
            centres, width, self.lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2
        )
        index.cp.niter, index.cp.seed = 8, _SEED
        index.cp.min_points_per_centroid = 1
        sample = np.random.default_rng(_SEED).choice(count, min(count, self.lists * _SAMPLED_FROM_EACH), replace=False)
        index.train(self._rows(np.sort(sample)))
        for first in range(0, count, _ROWS):
            index.add(self._rows(np.arange(first, min(first + _ROWS, count))))
        self._index = index
        self.probes = probes

    @property
    def probes(self) -> int:
        """The number of lists that are looked into."""
        return int(self._index.nprobe)

    @probes.setter
    def probes(self, probes: int) -> None:
        self._index.nprobe = min(probes, self.lists)

    def candidates(self, encoded: Tensor, count: int) -> Indices:
        """The items near one encoded user, (1, width): at most `count`, those that seem best first."""
        query = encoded.numpy()
        if not self.products.is_distance:
            query = np.concatenate((query, np.array([[1, 0]], np.float32)), 1)
        found: Indices = self._index.search(np.ascontiguousarray(query), count)[1][0]
        return found[found >= 0]

    def _rows(self, items: Indices) -> npt.NDArray[np.float32]:
        vectors: npt.NDArray[np.float32] = self.products.vectors[items].float().cpu().numpy()
        if self.products.is_distance:
            return vectors
        biases = np.zeros(len(items), np.float32)
        if self.products.biases is not None:
            biases = self.products.biases[items].float().cpu().numpy()
        squares = np.square(vectors, dtype=np.float64).sum(1) + np.square(biases, dtype=np.float64)
        missing = np.sqrt(np.maximum(self._longest - squares, 0))
        return np.column_stack((vectors, biases, missing)).astype(np.float32)

    @staticmethod
    def _longest_square(products: InnerProducts) -> float:
        longest = 0.0
        for first in range(0, len(products.vectors), _ROWS):
            squares = products.vectors[first : first + _ROWS].double().square().sum(1)
            if products.biases is not None:
                squares += products.biases[first : first + _ROWS].double().square()
            longest = max(longest, float(squares.max()))
        return longest


@dataclass(frozen=True)
class RetrievalMeasured:
    """What a version's manifest says of retrieval: `recall` at 100 over `users`, looking into `probes` of `lists`."""

    recall: float
    users: int
    probes: int
    lists: int


def measured_retrieval(retrieval: Retrieval, encoded: Tensor) -> RetrievalMeasured:
    """Measure how many lists must be looked into, and the share of the exact first 100 of each user that is found then.

    `encoded` (users, width) are users as the service will meet them. Leaves the index looking into as many.
    """
    exact = _exact(retrieval.products, encoded)
    retrieval.probes = FEWEST_PROBES
    users, recall = encoded.cpu(), 0.0
    while True:
        found = [retrieval.candidates(users[row : row + 1], candidate_count(DEPTH)) for row in range(len(users))]
        recall = float(np.mean([np.isin(best, seen).mean() for best, seen in zip(exact, found, strict=True)]))
        if recall >= AIM or 2 * retrieval.probes > MOST_PROBED * retrieval.lists:
            return RetrievalMeasured(round(recall, 5), len(users), retrieval.probes, retrieval.lists)
        retrieval.probes = 2 * retrieval.probes


def _exact(products: InnerProducts, encoded: Tensor) -> Indices:
    """The first 100 of each user by the exact scores, (users, 100)."""
    depth = min(DEPTH, len(products.vectors))
    parts = []
    for some in torch.split(encoded, max(1, _SCORES // len(products.vectors))):
        scores = (2 if products.is_distance else 1) * (some @ products.vectors.T)
        if products.biases is not None:
            scores += products.biases
        parts.append(torch.topk(scores, depth, dim=1)[1].cpu().numpy())
    return np.concatenate(parts)


def probes_worth(measured: Any) -> int | None:
    """The number of lists to look into by what a manifest says; None if retrieval falls short there."""
    if not isinstance(measured, dict) or not measured.get("recall", 0) >= ENOUGH:
        return None
    return int(measured["probes"])
