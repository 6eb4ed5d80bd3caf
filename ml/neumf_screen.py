"""NeuMF's scores in 8-bit arithmetic, with a bound on how far they are from the exact ones."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ml.models.neumf import NeuMF
from ml.screening import GROUP, Bounds, Floats, Indices

# Items handled at once: what the tower makes of them stays in a core's cache.
BLOCK = 32 * GROUP
_LEVELS = 127
_FINE = 254  # a user's factors have a second digit of this many steps
_ROUNDING = 2.0**-23

Doubles = npt.NDArray[np.float64]


class NeuMFScreen:
    """Both item tables in 8 bits, one step for each of their columns, in blocks that hold a column in one piece.

    With S the items' share of the tower's first layer and u the user's, relu(S + u) = max(S, -u) + u: so a block goes
    through one maximum of bytes, one product of bytes, and the deeper layers in float32, each with one maximum, while
    all that is added moves into the next layer's constant. Rounding S and u to steps of c changes no value by more than
    c / 2; how much of that can reach the score follows from the weights (`_reach`).
    """

    def __init__(self, model: NeuMF) -> None:
        deeper = list(model.deeper_layers)
        weights = [*(layer.get_parameter("weight") for layer in deeper), model.tower_weights[None]]
        self._weights = [weight.detach().double().numpy() for weight in weights]
        biases = [layer.get_parameter("bias").detach().double().numpy() for layer in deeper]
        self._constants = [*biases, np.zeros(1)]
        self._share, self._factors = _Columns(model.item_share()), _Columns(model.item_factors.weight)
        self._biases = torch.full((len(self._share.blocks) * BLOCK,), float("-inf"))
        self._biases[: model.num_items] = 0.0 if model.item_bias is None else model.item_bias.weight[:, 0]
        self._largest_bias = float(self._biases[: model.num_items].abs().max())
        first = self._weights[0] * self._share.steps
        self._scales = np.maximum(np.abs(first).max(1) / _LEVELS, 1e-30)
        rounded = np.rint(first / self._scales[:, None])
        self._first = torch.from_numpy(rounded.astype(np.int8))
        self._lost = first - rounded * self._scales[:, None]
        self._reach_of_sums = _reach(self._weights[1:])
        self._tower_error = float(_reach(self._weights) @ self._share.steps) / 2
        # The sums of the first layer come as whole numbers, so the next one's weights take in their scales.
        self._later = (
            [self._weights[1] * self._scales, *self._weights[2:]] if len(weights) > 1 else [self._scales[None]]
        )
        self._memory = threading.local()

    def __call__(self, encoded: Tensor) -> ScreenedScores | None:
        numbers = encoded[0].numpy().astype(np.float64)
        if not np.isfinite(numbers).all():
            return None
        width = self._factors.width
        factors, user = numbers[:width] * self._factors.steps, numbers[width:]
        # Where -u lies above or below all of S, relu gives nothing or all of the sum: the constant is then exact.
        wanted = -user / self._share.steps
        lowest = np.clip(np.rint(wanted), -_LEVELS, _LEVELS)
        added = np.where(wanted > _LEVELS, -lowest * self._share.steps, user)
        constants = [self._lost @ lowest + self._weights[0] @ added + self._constants[0]]
        for weight, constant in zip(self._weights[1:], self._constants[1:], strict=True):
            constants.append(weight @ constants[-1] + constant)
        error = self._tower_error + float(self._reach_of_sums @ self._weight_errors(lowest))
        scale = max(float(np.abs(factors).max()) / _LEVELS, 1e-30)
        error += self._factors.error(factors) + scale / (2 * _FINE) * self._factors.longest
        error += self._arithmetic_error(factors, lowest, added)
        scores, highest = self._score(factors / scale, scale, lowest, constants)
        bound = float(constants[-1][0]) + error
        return ScreenedScores(highest.astype(np.float64) + bound, scores.reshape(-1, GROUP), bound)

    def _weight_errors(self, lowest: Doubles) -> Doubles:
        """How far rounding the first layer's weights can move its sums: what is lost times max(S, -u) - (-u)."""
        columns = np.abs(self._lost) @ np.maximum(self._share.highest - lowest, 0)
        lengths = np.linalg.norm(self._lost, axis=1) * (self._share.norm + np.linalg.norm(np.maximum(-lowest, 0)))
        errors: Doubles = np.minimum(columns, lengths)
        return errors

    def _arithmetic_error(self, factors: Doubles, lowest: Doubles, added: Doubles) -> float:
        """What float32 may be off, here and in the exact scores: a share of all that is added up."""
        size = self._share.steps * _LEVELS + np.abs(added) + np.abs(lowest) * self._share.steps
        for weight, constant in zip(self._weights, self._constants, strict=True):
            size = np.abs(weight) @ size + np.abs(constant)
        terms = sum(weight.shape[1] for weight in self._weights) + self._factors.width + 16
        return float(_ROUNDING * terms * (2 * size[0] + 2 * _LEVELS * np.abs(factors).sum() + self._largest_bias))

    def _score(
        self, factors: Doubles, scale: float, lowest: Doubles, constants: Sequence[Doubles]
    ) -> tuple[Floats, Floats]:
        coarse = np.rint(factors)
        digits = torch.from_numpy(np.stack((coarse, np.rint((factors - coarse) * _FINE))).astype(np.int8))
        start = torch.from_numpy(lowest.astype(np.int8)[:, None])
        sums = [constants[0] / self._scales, *constants[1:-1]]
        floors = [torch.from_numpy((-constant).astype(np.float32)[:, None]) for constant in sums]
        # The factorisation's two digits are two more values beside those of the last hidden layer.
        last = np.concatenate((self._later[-1], [[scale, scale / _FINE]]), 1)
        weights = [torch.from_numpy(weight.astype(np.float32)) for weight in (*self._later[:-1], last)]
        memory = self._buffers()
        for block, (share, item_factors) in enumerate(zip(self._share.blocks, self._factors.blocks, strict=True)):
            torch.maximum(share, start, out=memory.active)
            torch._int_mm(self._first, memory.active, out=memory.sums)
            memory.hidden[0].copy_(memory.sums)
            torch._int_mm(digits, item_factors, out=memory.digits)
            memory.last[-2:].copy_(memory.digits)
            if len(self._weights) > 1:
                torch.maximum(memory.hidden[0], floors[0], out=memory.hidden[0])
            for layer, weight in enumerate(weights[:-1]):
                after = memory.hidden[layer + 1]
                torch.mm(weight, memory.hidden[layer], out=after)
                torch.maximum(after, floors[layer + 1], out=after)
            own = memory.scores[block : block + 1]
            torch.mm(weights[-1], memory.last, out=own)
            own.add_(self._biases[block * BLOCK : (block + 1) * BLOCK])
            torch.amax(own.view(-1, GROUP), 1, out=memory.highest[block])
        return memory.scores.numpy(), memory.highest.view(-1).numpy()

    def _buffers(self) -> threading.local:
        """Memory of a thread: fresh pages for every ranking would take as long as the scores."""
        memory = self._memory
        if not hasattr(memory, "scores"):
            blocks = len(self._share.blocks)
            memory.scores = torch.empty(blocks, BLOCK)
            memory.highest = torch.empty(blocks, BLOCK // GROUP)
            memory.active = torch.empty(self._share.width, BLOCK, dtype=torch.int8)
            memory.sums = torch.empty(len(self._first), BLOCK, dtype=torch.int32)
            memory.digits = torch.empty(2, BLOCK, dtype=torch.int32)
            rows = [len(self._first), *(len(weight) for weight in self._later[:-1])]
            memory.last = torch.empty(rows[-1] + 2, BLOCK)
            memory.hidden = [*(torch.empty(count, BLOCK) for count in rows[:-1]), memory.last[:-2]]
        return memory


class _Columns:
    """A table (n, width) in 8 bits: blocks of (width, BLOCK), the last filled up with zeros."""

    def __init__(self, table: Tensor) -> None:
        count, self.width = table.shape
        steps = (table.abs().amax(0).double() / _LEVELS).clamp(min=1e-30)
        self.blocks = torch.zeros(-(-count // BLOCK), self.width, BLOCK, dtype=torch.int8)
        self.steps: Doubles = steps.numpy()
        self.highest: Doubles = (table.amax(0).double() / steps).round().numpy()
        self.norm = self.longest = self._farthest = 0.0
        for block, rows in enumerate(torch.split(table, BLOCK)):
            rounded = (rows.double() / steps).round_()
            self.blocks[block, :, : len(rows)] = rounded.T
            self.norm = max(self.norm, float(rounded.clamp(min=0).norm(dim=1).max()))
            self.longest = max(self.longest, float(rounded.abs().sum(1).max()))
            self._farthest = max(self._farthest, float((rows.double() / steps - rounded).norm(dim=1).max()))

    def error(self, vector: Doubles) -> float:
        """How far an inner product with a rounded row may be from that with the row, both in steps."""
        return min(float(np.abs(vector).sum()) / 2, float(np.linalg.norm(vector)) * self._farthest)


@dataclass(frozen=True)
class ScreenedScores:
    """One user's scores, (groups, GROUP), off by less than a bound; valid until the thread's next call."""

    crowding: ClassVar[int] = 1
    highest: Bounds
    approximate: Floats
    bound: float

    def scores(self, groups: Indices) -> Bounds:
        return self.approximate[groups].astype(np.float64) + self.bound

    def items(self, groups: Indices) -> Indices:
        items = groups[:, None] * GROUP + np.arange(GROUP)
        return np.where(self.approximate[groups] > -np.inf, items, -1)


def _reach(weights: Sequence[Doubles]) -> Doubles:
    """How much the score can change, at most, for each unit by which an input of the first of these layers changes.

    A relu passes a change on whole, in part or not at all, so a path counts or does not: what paths with a positive
    product of weights add up to bounds the change in one direction, those with a negative one bound it in the other.
    """
    up, down = np.ones(1), np.zeros(1)
    for weight in reversed(weights):
        positive, negative = np.maximum(weight, 0).T, np.maximum(-weight, 0).T
        up, down = positive @ up + negative @ down, negative @ up + positive @ down
    return np.maximum(up, down)
