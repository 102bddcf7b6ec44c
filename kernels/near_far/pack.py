"""Rows with their real tokens first.

Chunk borders, sinks and positions count a row's real tokens. Moving those to the front of the row once, before the
attention, makes left padding, right padding and holes all the same, and leaves the attention itself without masks.
"""

import torch
from torch import Tensor

__all__ = ["pack_index", "pack_rows", "unpack_rows"]


def pack_index(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) long: the columns of each row, real ones first, order kept."""
    return (~mask.bool()).long().argsort(dim=-1, stable=True)


def pack_rows(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each (B, heads, T, .) with the real tokens of a row moved to its front. `mask` (B, T); None leaves all as is."""
    if mask is None:
        return tensors
    index = pack_index(mask)[:, None, :, None]
    return tuple(x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in tensors)


def unpack_rows(mask: Tensor | None, x: Tensor) -> Tensor:
    """The inverse of `pack_rows`: (B, heads, T, .) in the caller's order, zeros where a token is padding."""
    if mask is None:
        return x
    index = pack_index(mask)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return torch.zeros_like(x).scatter(2, index, x) * mask[:, None, :, None].to(x.dtype)
