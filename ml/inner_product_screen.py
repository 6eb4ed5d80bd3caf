"""Inner products with a table of items in 8 bits, with a bound on how far they are from the exact ones."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

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
_ROWS = 256 * GROUP
# Rows whose products are still in a core's cache when the highest of each group is looked for.
_PASSED = 512 * GROUP
# Rows whose products for several users stay in a core's cache.
_SHARED_ROWS = 32 * GROUP

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
        self._scales = np.zeros(groups, np.float32)
        # The length of the longest item of each group, and of the most that rounding took from one.
        self._limits = np.zeros((3, groups), np.float32)
        for first in range(0, count, _ROWS):
            vectors = products.vectors[order[first : first + _ROWS]]
            rows = torch.zeros(-(-len(vectors) // GROUP) * GROUP, width)
            rows[: len(vectors)] = vectors
            self._round(rows.view(-1, GROUP, width), first // GROUP)
        # One more row for the highest bias: with a user's weights, all that is added to a group's highest product.
        self._limits[2] = self._biases.max(1)
        self._largest_bias = float(np.where(np.isfinite(self._biases), np.abs(self._biases), 0).max())
        self._memory = threading.local()

    def _round(self, rows: Tensor, first: int) -> None:
        """Fill in the groups from `first` on, (groups, GROUP, width)."""
        own = slice(first, first + len(rows))
        scales = (rows.abs().amax((1, 2), keepdim=True) / _LEVELS).clamp(min=1e-30)
        rounded = (rows / scales).round_()
        self._table[first * GROUP : (first + len(rows)) * GROUP, : self._width] = rounded.flatten(0, 1)
        self._scales[own] = scales.flatten().numpy()
        self._limits[1, own] = (rows - rounded * scales).norm(dim=2).amax(1).numpy()
        self._limits[0, own] = rows.norm(dim=2).amax(1).numpy()

    def __call__(self, encoded: Tensor) -> ScreenedProducts | None:
        user = self._rounded(encoded)
        if user is None:
            return None
        column, memory = torch.from_numpy(user.numbers), self._buffers()
        for rows, products, of_groups, highest in memory.blocks:
            torch._int_mm(rows, column, out=products)
            torch.amax(of_groups, 1, out=highest)
        return self._screened(user, memory.highest, lambda groups: memory.products[groups])

    def together(self, encoded: Sequence[Tensor]) -> list[ScreenedProducts | None]:
        """The same for several users, in one pass over the table; products are taken again where they are asked for."""
        users = [self._rounded(one) for one in encoded]
        numbers = np.zeros((len(users), self._table.shape[1]), np.int8)
        for row, user in enumerate(users):
            numbers[row] = 0 if user is None else user.numbers[:, 0]
        rows, memory = torch.from_numpy(numbers), torch.empty(len(users) * _SHARED_ROWS, dtype=torch.int32)
        parts = []
        for part in torch.split(self._table, _SHARED_ROWS):
            products = memory[: len(users) * len(part)].view(len(users), -1)
            torch._int_mm(rows, part.T, out=products)
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
        # Few steps, here and below: beside a pass over a large table nothing stays in the processor's cache.
        query, offset = self._products.query(encoded[0])
        exact = query.numpy()
        length = math.sqrt(float(exact @ exact))
        if not math.isfinite(length):
            return None
        scale = max(float(exact.max()), -float(exact.min()), _LEVELS * 1e-30) / _LEVELS
        # Made as a column: the product takes a row seen as one for something else.
        numbers = np.zeros((self._table.shape[1], 1), np.int8)
        rounded = np.rint(exact / np.float32(scale))
        numbers[: self._width, 0] = rounded
        lost = exact - rounded * np.float32(scale)
        error = math.sqrt(float(lost @ lost))
        # The room is for what arithmetic in float32 may be off, here and in the exact scores.
        room = _ROUNDING * (self._width + 16)
        weights = np.array([error + 2 * room * length, (length + error) * (1 + room), 1], np.float32)
        return _Rounded(numbers, scale, weights, room * (self._largest_bias + 2 * abs(offset)) + offset)

    def _screened(self, user: _Rounded, highest: Wholes, products: Callable[[Indices], Wholes]) -> ScreenedProducts:
        scores = user.weights @ self._limits
        scores += np.float32(user.added)
        scales = self._scales * np.float32(user.scale)
        scores += np.multiply(highest, scales, dtype=np.float32)
        return ScreenedProducts(scores, products, scales, user, self._limits, self._biases, self._items)

    def _buffers(self) -> _Memory:
        """Memory for the products and the highest of each group, kept by each thread: fresh pages take as long."""
        memory: _Memory | None = getattr(self._memory, "kept", None)
        if memory is None:
            products = torch.empty(len(self._table), 1, dtype=torch.int32)
            highest = torch.empty(len(self._scales), dtype=torch.int32)
            of_groups = products.view(-1, GROUP)
            parts = (torch.split(self._table, _PASSED), torch.split(products, _PASSED))
            by_group = (torch.split(part, _PASSED // GROUP) for part in (of_groups, highest))
            memory = _Memory(of_groups.numpy(), highest.numpy(), list(zip(*parts, *by_group, strict=True)))
            self._memory.kept = memory
        return memory


class _Memory(NamedTuple):
    """Of one thread: the last products, (groups, GROUP), the highest of each group, and views of both by block."""

    products: Wholes
    highest: Wholes
    blocks: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # rows of the table, products as column, by group, highest


@dataclass(frozen=True)
class _Rounded:
    """One user in 8 bits: whole numbers and their scale; `weights` of a group's limits bound what rounding moves."""

    numbers: npt.NDArray[np.int8]
    scale: float
    weights: Floats
    added: float


@dataclass(frozen=True)
class ScreenedProducts:
    """One user's rounded products, (groups, GROUP), valid until the thread's next call of the screen."""

    crowding: ClassVar[int] = 4
    highest: Floats | Bounds
    products: Callable[[Indices], Wholes]
    scales: Floats
    user: _Rounded
    limits: Floats
    biases: Floats
    numbers: Wholes

    def scores(self, groups: Indices) -> Floats:
        scores = np.multiply(self.products(groups), self.scales[groups, None], dtype=np.float32)
        scores += self.biases[groups]
        bounds = self.user.weights[:2] @ self.limits[:2, groups]
        bounds += np.float32(self.user.added)
        scores += bounds[:, None]
        return scores

    def items(self, groups: Indices) -> Indices:
        return self.numbers[groups].astype(np.int64)
