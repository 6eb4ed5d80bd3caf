"""Caser for a few users at a time: the same numbers from few, small steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    from ml.models.caser import Caser

Floats = npt.NDArray[np.float32]


class CaserEncoder:
    """What `Caser.encode` computes, in numpy, from weights that rest.

    A step of PyTorch takes microseconds before it computes anything, and a few users are little to compute. So the
    horizontal filters become one matrix over the items that they see, and what is added to both is added once. Each
    user is multiplied by the matrices alone: that takes hardly longer than a product for all, and rounds alike in any
    company.
    """

    def __init__(self, model: Caser) -> None:
        length, width, filters = model.horizontal_length, model.config.factors, model.config.horizontal_filters
        vertical_filters = model.config.vertical_filters
        self._items, self._users = _numbers(model.window_factors.weight), _numbers(model.user_factors.weight)
        # For every height and place, the filters of that height at that place.
        rows, added = [], []
        for height, layer in enumerate(model.horizontal, start=1):
            for place in range(length - height + 1):
                row = np.zeros((filters, length, width), np.float32)
                row[:, place : place + height] = _numbers(layer.get_parameter("weight")).reshape(filters, height, width)
                rows.append(row.reshape(filters, -1))
                added.append(_numbers(layer.get_parameter("bias")))
        self._horizontal, self._horizontal_bias = np.concatenate(rows), np.concatenate(added)
        heights = np.arange(length, 0, -1)
        self._first_places = np.cumsum(heights) - heights
        self._filters, self._length = filters, length
        vertical = _numbers(model.vertical.weight)
        fused = _numbers(model.fused.weight)
        whole = fused[:, length * filters :].reshape(len(fused), width, vertical_filters)
        self._fused = np.ascontiguousarray(fused[:, : length * filters])
        self._fused_vertical = np.ascontiguousarray(whole.transpose(0, 2, 1)).reshape(len(fused), -1)
        self._fused_bias = _numbers(model.fused.bias) + whole.sum(1) @ _numbers(model.vertical.bias)
        self._vertical_filters, self._vertical = vertical_filters, vertical
        self._projection = None
        if model.projection is not None and model.straight is not None:
            self._projection = _numbers(model.projection.weight)
            self._projection_bias = _numbers(model.projection.bias)
            # The filter that goes straight to the score is one more vertical one.
            self._vertical = np.concatenate((vertical, _numbers(model.straight.weight)))

    def __call__(self, users: npt.NDArray[np.int64], windows: npt.NDArray[np.int64]) -> Floats:
        """Encode users (batch,), -1 where nobody has seen them, and their windows (batch, window_length)."""
        count = len(users)
        images = self._items[windows]
        sums = _each(self._horizontal, images[:, -self._length :].reshape(count, -1))
        sums += self._horizontal_bias
        highest = np.maximum.reduceat(sums.reshape(count, -1, self._filters), self._first_places, axis=1)
        vertical = self._vertical @ images
        sequences = _each(self._fused, np.maximum(highest, 0, out=highest).reshape(count, -1))
        sequences += _each(self._fused_vertical, vertical[:, : self._vertical_filters].reshape(count, -1))
        sequences += self._fused_bias
        np.maximum(sequences, 0, out=sequences)
        if self._projection is None:
            return np.concatenate((sequences, self._users[users]), 1)
        encoded = _each(self._projection, sequences)
        encoded += self._projection_bias
        encoded += vertical[:, -1]
        encoded += self._users[users]
        return encoded


def _each(matrix: Floats, vectors: Floats) -> Floats:
    """The product of a matrix (m, n) with each of some vectors (batch, n): (batch, m)."""
    products = np.empty((len(vectors), len(matrix)), np.float32)
    for vector, product in zip(vectors, products, strict=True):
        np.dot(matrix, vector, out=product)
    return products


def _numbers(weight: Tensor) -> Floats:
    numbers: Floats = weight.detach().numpy()
    return numbers
