"""Memory that is read at random: large pages, where the system has them, spare it most look-ups of addresses."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

# Below this many bytes ordinary pages do as well.
_WORTH_IT = 1 << 22


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of zeros, on a CPU in large pages where Linux offers them to those who ask."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _WORTH_IT or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def spread(tensor: Tensor) -> Tensor:
    """The same numbers in such memory."""
    return zeros(*tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
