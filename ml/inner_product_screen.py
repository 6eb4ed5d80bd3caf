"""Inner products with a table of items in 8 bits, with a bound on how far they are from the exact ones."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ml.models import InnerProducts
from ml.screening import GROUP, Bounds, Indices

# Narrower tables take longer, for they miss the processor's wide instructions.
NARROWEST = 64
_LEVELS = 127
_ROUNDING = 2.0**-23
_ROWS = 512 * GROUP


class InnerProductScreen:
    """A table of items in 8 bits with one scale for each group of items; a user is rounded to 8 bits as well.

    The product of whole numbers is exact, so a score is off by no more than what rounding took from both vectors: by
    Cauchy and Schwarz, at most |user's error| * |item| + |rounded user| * |item's error|. Items lie in the order of
    their biases, so that those of a group hardly differ, and the highest product of a group bounds its scores.
    """

    def __init__(self, products: InnerProducts) -> None:
        count, width = products.vectors.shape
        groups = -(-count // GROUP)
        self._products, self._width = products, width
        self._table = torch.zeros(groups * GROUP, max(NARROWEST, -(-width // 16) * 16), dtype=torch.int8)
        self._items = np.full((groups, GROUP), -1, np.int32)
        self._biases = np.full((groups, GROUP), -np.inf, np.float32)
        keys = products.vectors.norm(dim=1) if products.biases is None else products.biases
        order = torch.argsort(keys)
        self._items.reshape(-1)[:count] = order.numpy()
        self._biases.reshape(-1)[:count] = 0 if products.biases is None else products.biases[order].numpy()
        self._scales, self._errors, self._norms = (np.zeros(groups) for _ in range(3))
        for first in range(0, count, _ROWS):
            vectors = products.vectors[order[first : first + _ROWS]]
            rows = torch.zeros(-(-len(vectors) // GROUP) * GROUP, width)
            rows[: len(vectors)] = vectors
            self._round(rows.view(-1, GROUP, width), first // GROUP)
        self._highest_bias = self._biases.max(1).astype(np.float64)
        sizes = np.where(np.isfinite(self._biases), np.abs(self._biases), 0).max(1)
        self._largest_bias = sizes.astype(np.float64)
        self._memory = threading.local()

    def _round(self, rows: Tensor, first: int) -> None:
        """Fill in the groups from `first` on, (groups, GROUP, width)."""
        own = slice(first, first + len(rows))
        scales = (rows.abs().amax((1, 2), keepdim=True) / _LEVELS).clamp(min=1e-30)
        rounded = (rows / scales).round_()
        self._table[first * GROUP : (first + len(rows)) * GROUP, : self._width] = rounded.flatten(0, 1)
        self._scales[own] = scales.flatten().numpy()
        self._errors[own] = (rows - rounded * scales).norm(dim=2).amax(1).numpy()
        self._norms[own] = rows.norm(dim=2).amax(1).numpy()

    def __call__(self, encoded: Tensor) -> ScreenedProducts | None:
        query, offset = self._products.query(encoded[0])
        exact = query.numpy().astype(np.float64)
        length = float(np.linalg.norm(exact))
        if not np.isfinite(length):
            return None
        scale = max(float(np.abs(exact).max()) / _LEVELS, 1e-30)
        rounded = np.rint(exact / scale)
        column = np.zeros((self._table.shape[1], 1), np.int8)
        column[: self._width, 0] = rounded
        products, highest = self._buffers()
        torch._int_mm(self._table, torch.from_numpy(column), out=products)
        torch.amax(products.view(-1, GROUP), 1, out=highest)
        kept = rounded * scale
        # The first two terms are what rounding to 8 bits took; the last is what arithmetic in float32 may be off.
        bounds = (
            float(np.linalg.norm(exact - kept)) * self._norms
            + float(np.linalg.norm(kept)) * self._errors
            + _ROUNDING * (self._width + 8) * (2 * length * self._norms + self._largest_bias + abs(offset))
        )
        scales = self._scales * scale
        return ScreenedProducts(
            highest=highest.numpy() * scales + self._highest_bias + (bounds + offset),
            products=products.numpy().reshape(-1, GROUP),
            scales=scales[:, None],
            biases=self._biases,
            bounds=(bounds + offset)[:, None],
            numbers=self._items,
        )

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Memory for the products and the highest of each group, kept by each thread: fresh pages take as long."""
        memory = self._memory
        if not hasattr(memory, "products"):
            memory.products = torch.empty(len(self._table), 1, dtype=torch.int32)
            memory.highest = torch.empty(len(self._scales), dtype=torch.int32)
        return memory.products, memory.highest


@dataclass(frozen=True)
class ScreenedProducts:
    """One user's rounded products, (groups, GROUP), valid until the thread's next call of the screen."""

    highest: Bounds
    products: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    scales: Bounds
    biases: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    bounds: Bounds
    numbers: np.ndarray[tuple[int, int], np.dtype[np.int32]]

    def scores(self, groups: Indices) -> Bounds:
        return self.products[groups] * self.scales[groups] + self.biases[groups] + self.bounds[groups]

    def items(self, groups: Indices) -> Indices:
        return self.numbers[groups].astype(np.int64)
