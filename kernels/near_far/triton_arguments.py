"""What the launchers of all Triton kernels share: types, sizes of tiles, precision, tensors with their strides."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import Target

__all__ = ["TL_TYPES", "far_dtype", "last_contiguous", "precision_of", "strided", "tile"]

TL_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def far_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands of far products: bfloat16 for float16, whose range sums of many tokens would leave."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def last_contiguous(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def precision_of(dtype: torch.dtype, target: Target) -> str:
    """How products of inputs of this dtype are taken: float32 as exactly as tensor cores can, where they can at all."""
    return "tf32x3" if dtype == torch.float32 and target.backend == "cuda" else "ieee"


def strided(**named: Tensor | None) -> dict[str, Any]:
    """Each tensor (B, heads, T, ...) with the strides of its first three dimensions, by the kernels' names."""
    arguments: dict[str, Any] = {}
    for name, x in named.items():
        strides = (0, 0, 0) if x is None else x.stride()[:3]
        arguments[name] = x
        arguments |= dict(zip((f"{name}_row", f"{name}_head", f"{name}_token"), strides))
    return arguments


def tile(size: int) -> int:
    """The power of two at or above `size`, at least 16: the least that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))
