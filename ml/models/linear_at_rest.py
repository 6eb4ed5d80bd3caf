"""Linear layers whose weights are at rest, as fast as the processor allows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# For fewer rows, putting the weights in oneDNN's order takes longer than its products save; for fewer multiplications,
# calling it does.
_FEWEST_ROWS = 64
_FEWEST_MULTIPLICATIONS = 1 << 21
_has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed(weight: Tensor, rows: int) -> Tensor:
    """A weight in the order in which `linear_at_rest` reads it, for many products of about so many rows."""
    if not _pays(weight, weight, rows):
        return weight
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return found


def linear_at_rest(values: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """values (…, inner) @ weight (outer, inner).T + bias (outer,), through a relu if wanted.

    Where no gradient is wanted and rows are many, a CPU multiplies with oneDNN: it uses AVX-512 on every processor that
    has it, MKL, with which torch multiplies in float32, on Intel's alone.
    """
    if weight.is_mkldnn or _pays(values, weight, values.numel() // max(values.shape[-1], 1)):
        # It takes the bias to be in one piece. Weights that lie between others, as tables beside their moments do
        # in training, it would multiply hundreds of times as slowly.
        weight = weight if weight.is_mkldnn else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        found: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "relu" if relu else "none", [], "")
        return found
    found = functional.linear(values, weight, bias)
    return found.relu_() if relu else found


def _pays(values: Tensor, weight: Tensor, rows: int) -> bool:
    is_float = values.device.type == "cpu" and values.dtype == torch.float32
    is_large = rows >= _FEWEST_ROWS and rows * weight.numel() >= _FEWEST_MULTIPLICATIONS
    return _has_onednn and is_float and is_large and not torch.is_grad_enabled()
