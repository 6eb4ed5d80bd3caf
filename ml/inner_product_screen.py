"""Inner products with a table of items in 8 bits, with a bound on how far they are from the exact ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ml.models import InnerProducts
from ml.screening import GROUP, Bounds, Floats, Indices

# Narrower tables take longer, for they miss the processor's wide instructions.
NARROWEST = 64
_LEVELS = 127
_ROUNDING = 2.0**-23
_ROWS = 512 * GROUP
# Rows whose products for several users stay in a core's cache.
_SHARED_ROWS = 64 * GROUP

Wholes = npt.NDArray[np.int32]


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
        user = self._rounded(encoded)
        if user is None:
            return None
        products, highest = self._buffers()
        torch._int_mm(self._table, torch.from_numpy(user.numbers), out=products)
        torch.amax(products.view(-1, GROUP), 1, out=highest)
        whole = products.numpy().reshape(-1, GROUP)
        return self._screened(user, highest.numpy(), lambda groups: whole[groups])

    def together(self, encoded: Sequence[Tensor]) -> list[ScreenedProducts | None]:
        """The same for several users, in one pass over the table; products are taken again where they are asked for."""
        users = [self._rounded(one) for one in encoded]
        numbers = np.zeros((len(users), self._table.shape[1]), np.int8)
        for row, user in enumerate(users):
            numbers[row] = 0 if user is None else user.numbers[:, 0]
        rows, parts = torch.from_numpy(numbers), []
        for first in range(0, len(self._table), _SHARED_ROWS):
            products = torch._int_mm(rows, self._table[first : first + _SHARED_ROWS].T)
            parts.append(products.view(len(users), -1, GROUP).amax(2))
        highest = torch.cat(parts, 1).numpy()
        table = self._table.view(-1, GROUP, self._table.shape[1])

        def products_of(user: _Rounded) -> Callable[[Indices], Wholes]:
            column = torch.from_numpy(user.numbers)
            return lambda groups: torch._int_mm(table[groups].flatten(0, 1), column).view(-1, GROUP).numpy()

        return [
            None if user is None else self._screened(user, own, products_of(user))
            for user, own in zip(users, highest, strict=True)
        ]

    def _rounded(self, encoded: Tensor) -> _Rounded | None:
        """One encoded user, (1, d), in 8 bits; None if it is not made of numbers."""
        query, offset = self._products.query(encoded[0])
        exact = query.numpy().astype(np.float64)
        length = float(np.linalg.norm(exact))
        if not np.isfinite(length):
            return None
        scale = max(float(np.abs(exact).max()) / _LEVELS, 1e-30)
        rounded = np.rint(exact / scale)
        # Made as a column: the product takes a row seen as one for something else.
        numbers = np.zeros((self._table.shape[1], 1), np.int8)
        numbers[: self._width, 0] = rounded
        kept = rounded * scale
        # The first two terms are what rounding to 8 bits took; the last is what arithmetic in float32 may be off.
        bounds = (
            float(np.linalg.norm(exact - kept)) * self._norms
            + float(np.linalg.norm(kept)) * self._errors
            + _ROUNDING * (self._width + 8) * (2 * length * self._norms + self._largest_bias + abs(offset))
        )
        return _Rounded(numbers, scale, bounds + offset)

    def _screened(
        self, user: _Rounded, highest: npt.NDArray[np.int32], products: Callable[[Indices], Wholes]
    ) -> ScreenedProducts:
        scales = self._scales * user.scale
        return ScreenedProducts(
            highest=highest * scales + self._highest_bias + user.bounds,
            products=products,
            scales=scales[:, None],
            biases=self._biases,
            bounds=user.bounds[:, None],
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
class _Rounded:
    """One user in 8 bits: whole numbers, their scale, and how far the scores of each group may be off."""

    numbers: npt.NDArray[np.int8]
    scale: float
    bounds: Bounds


@dataclass(frozen=True)
class ScreenedProducts:
    """One user's rounded products, (groups, GROUP), valid until the thread's next call of the screen."""

    highest: Bounds
    products: Callable[[Indices], Wholes]
    scales: Bounds
    biases: Floats
    bounds: Bounds
    numbers: Wholes

    def scores(self, groups: Indices) -> Bounds:
        return self.products(groups) * self.scales[groups] + self.biases[groups] + self.bounds[groups]

    def items(self, groups: Indices) -> Indices:
        return self.numbers[groups].astype(np.int64)
