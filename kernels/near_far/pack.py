"""Rows with their real tokens first.

Chunk borders, sinks and positions count a row's real tokens. Moving those to the front of the row once, before the
attention, makes left padding, right padding and holes all the same, and leaves the attention itself without masks.
"""

import torch
from torch import Tensor

__all__ = ["join_documents", "pack_index", "pack_rows", "split_documents", "unpack_rows"]


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


def split_documents(cu_seqlens: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Documents that lie end to end, (1, heads, T, .), as rows (N, heads, longest, .) padded on the right; their mask
    (N, longest) comes last. Document i goes from cu_seqlens[i] to cu_seqlens[i + 1]."""
    borders = cu_seqlens.long()
    lengths = borders.diff()
    column = torch.arange(max(int(lengths.max()), 1), device=borders.device)
    mask = column < lengths[:, None]
    index = (borders[:-1, None] + column).clamp_max(max(tensors[0].shape[2] - 1, 0))
    return *(x[0][:, index].transpose(0, 1) for x in tensors), mask


def join_documents(mask: Tensor, x: Tensor) -> Tensor:
    """The inverse of `split_documents` for one tensor: (N, heads, longest, .) -> (1, heads, T, .)."""
    return x.transpose(1, 2)[mask].transpose(0, 1)[None]
