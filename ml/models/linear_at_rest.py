"""Linear layers whose weights are at rest, as fast as the processor allows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# For fewer rows, putting the weights in oneDNN's order takes longer than its products save.
_FEWEST_ROWS = 64
_has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_at_rest(values: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """values (…, inner) @ weight (outer, inner).T + bias (outer,), through a relu if wanted.

    Where no gradient is wanted and rows are many, a CPU multiplies with oneDNN: it uses AVX-512 on every processor that
    has it, MKL, with which torch multiplies in float32, on Intel's alone.
    """
    is_fast = _has_onednn and values.device.type == "cpu" and values.dtype == torch.float32
    if is_fast and len(values) >= _FEWEST_ROWS and not torch.is_grad_enabled():
        # It takes the bias to be in one piece.
        bias = None if bias is None else bias.contiguous()
        found: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "relu" if relu else "none", [], "")
        return found
    found = functional.linear(values, weight, bias)
    return found.relu_() if relu else found
