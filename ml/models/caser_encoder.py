"""Caser for one user at a time: the same numbers from few, small steps."""

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

    A step of PyTorch takes microseconds before it computes anything, and one user is little to compute. So the
    horizontal filters become one matrix over the whole window, and what is added to both is added once.
    """

    def __init__(self, model: Caser) -> None:
        length, width, filters = model.window_length, model.config.factors, model.config.horizontal_filters
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
        self._sums = (len(rows), filters)
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

    def __call__(self, user: int, window: npt.NDArray[np.int64]) -> Floats:
        """Encode a user, -1 if nobody has seen them, and their window, (window_length,)."""
        image = self._items[window]
        sums = self._horizontal @ image.ravel()
        sums += self._horizontal_bias
        highest = np.maximum.reduceat(sums.reshape(self._sums), self._first_places, axis=0).ravel()
        vertical = self._vertical @ image
        sequence = self._fused @ np.maximum(highest, 0, out=highest)
        sequence += self._fused_vertical @ vertical[: self._vertical_filters].ravel()
        sequence += self._fused_bias
        np.maximum(sequence, 0, out=sequence)
        if self._projection is None:
            return np.concatenate((sequence, self._users[user]))
        encoded: Floats = self._projection @ sequence
        encoded += self._projection_bias
        encoded += vertical[-1]
        encoded += self._users[user]
        return encoded


def _numbers(weight: Tensor) -> Floats:
    numbers: Floats = weight.detach().numpy()
    return numbers
