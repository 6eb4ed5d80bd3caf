"""Linear layers whose weights are at rest, as fast as the processor allows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# For fewer rows, putting the weights in oneDNN's order takes longer than its products save.
_FEWEST_ROWS = 64
_has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed(weight: Tensor, rows: int) -> Tensor:
    """A weight in the order in which `linear_at_rest` reads it, for many products of about so many rows."""
    if not _is_fast(weight) or rows < _FEWEST_ROWS:
        return weight
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return found


def linear_at_rest(values: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """values (…, inner) @ weight (outer, inner).T + bias (outer,), through a relu if wanted.

    Where no gradient is wanted and rows are many, a CPU multiplies with oneDNN: it uses AVX-512 on every processor that
    has it, MKL, with which torch multiplies in float32, on Intel's alone.
    """
    if weight.is_mkldnn or (_is_fast(values) and len(values) >= _FEWEST_ROWS):
        # It takes the bias to be in one piece.
        bias = None if bias is None else bias.contiguous()
        found: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "relu" if relu else "none", [], "")
        return found
    found = functional.linear(values, weight, bias)
    return found.relu_() if relu else found


def _is_fast(values: Tensor) -> bool:
    is_float = values.device.type == "cpu" and values.dtype == torch.float32
    return _has_onednn and is_float and not torch.is_grad_enabled()
