"""Where the chunks of every sequence lie: the tables by which the Triton kernels find their tokens.

A sequence is a run of real tokens in consecutive columns of one row of the batch: a row without its padding, or one of
the documents that `cu_seqlens` lays end to end. A kernel's program reads its chunk from `chunks` and needs to know
nothing of padding, packing or batches: neighbouring chunks of a sequence are neighbours in the table, its tokens are
neighbours in memory.

    chunks (P + 1, 8) int32    row, column of the first token, tokens (0: no such chunk), index in the sequence,
                               index counted from the sequence's position 0, sink column, sinks, sequence
    sequences (N, 3) int32     first chunk in the table, number of chunks, the chunk before which a state is kept

P is a bound, so that no table needs a look at the data: chunks that do not exist have 0 tokens, and a last row of
zeros stands behind all. Shape legend: N sequences, W window, S sinks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Rows",
    "is_contiguous_mask",
    "may_keep",
    "real_tokens",
    "rows_of_batch",
    "rows_of_documents",
    "rows_of_lengths",
    "rows_of_mask",
]


@dataclass(frozen=True)
class Rows:
    """See the module. count: P, the number of programs along the chunks; padded: some columns belong to no sequence."""

    chunks: Tensor
    sequences: Tensor
    count: int
    padded: bool


def rows_of_batch(batch: int, length: int, window: int, sinks: int, device: torch.device) -> Rows:
    """`batch` rows of `length` real tokens each. The layers of a model ask for the same one; the last few are kept."""
    sizes = batch, length, window, sinks, device
    # What is traced holds symbols, and what a CUDA graph captures is its own: neither is of use to anyone else, and a
    # graph must not depend on a table that is dropped one day.
    if not may_keep(device):
        return _rows_of_batch(*sizes)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = *sizes, stream
    rows = _kept.pop(key, None)
    if rows is None:
        with torch.inference_mode(False):  # a later call may save the tables for its backward pass
            rows = _rows_of_batch(*sizes)
        if type(rows.chunks) is not Tensor:
            return rows
    _kept[key] = rows
    while len(_kept) > KEPT:
        del _kept[next(iter(_kept))]
    return rows


def may_keep(device: torch.device) -> bool:
    """Whether a table made now may serve a later call: not while torch.compile traces or a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


KEPT = 64
_kept: dict[tuple, Rows] = {}


def _rows_of_batch(batch: int, length: int, window: int, sinks: int, device: torch.device) -> Rows:
    first = torch.zeros(batch, dtype=torch.int32, device=device)
    row = torch.arange(batch, dtype=torch.int32, device=device)
    count = batch * -(-length // window)
    lengths = torch.full_like(first, length)
    return rows_of_lengths(row, first, lengths, window=window, sinks=sinks, count=count, padded=False)


def is_contiguous_mask(mask: Tensor) -> Tensor:
    """Whether the real tokens of every row (B, T) of the mask stand together: one bool on its device."""
    real = mask.bool()
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1]
    return (begins.sum(-1) <= 1).all()


def rows_of_mask(mask: Tensor, window: int, sinks: int) -> Rows:
    """The rows of a (B, T) mask whose real tokens stand together, such as left or right padding leaves them."""
    real = mask.bool()
    batch, length = real.shape
    first = real.int().argmax(-1).int()
    row = torch.arange(batch, dtype=torch.int32, device=mask.device)
    count = batch * -(-length // window)
    lengths = real.sum(-1, dtype=torch.int32)
    return rows_of_lengths(row, first, lengths, window=window, sinks=sinks, count=count, padded=True)


def rows_of_documents(cu_seqlens: Tensor, length: int, window: int, sinks: int, batch: int = 1) -> Rows:
    """The documents end to end in `batch` rows of `length` tokens: document i from cu_seqlens[i] to cu_seqlens[i + 1],
    counted row after row."""
    borders = cu_seqlens.int()
    first, lengths = borders[:-1], borders.diff()
    # An empty document behind the last token is in the last row too.
    row = (first // length).clamp_max(batch - 1)
    # Each document adds at most one chunk that is not full.
    count = batch * length // window + first.shape[0]
    return rows_of_lengths(row, first - row * length, lengths, window=window, sinks=sinks, count=count, padded=False)


def rows_of_lengths(
    row: Tensor,
    first: Tensor,
    lengths: Tensor,
    *,
    window: int,
    sinks: int,
    count: int,
    padded: bool,
    start: Tensor | None = None,
    keep: Tensor | None = None,
) -> Rows:
    """Sequence i: `lengths[i]` tokens in row `row[i]` from column `first[i]` on; all (N,) int32.

    count: at least the number of chunks of all sequences. start: chunks of each sequence that are not here any more
    (their keys are in a state and their sinks in tensors of their own, from column 0 on). keep: see the module.
    """
    chunks_each = (lengths + window - 1) // window
    ends = chunks_each.cumsum(0, dtype=torch.int32)
    begins = ends - chunks_each
    index = torch.arange(count + 1, dtype=torch.int32, device=row.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp_max(row.shape[0] - 1)
    there = index < ends[-1]
    local = torch.where(there, index - begins[sequence], 0)
    from_zero = local if start is None else torch.where(there, local + start[sequence], 0)
    total = lengths if start is None else lengths + start * window
    sink_column = first[sequence] if start is None else torch.zeros_like(local)
    columns = (
        row[sequence],
        first[sequence] + local * window,
        torch.where(there, (lengths[sequence] - local * window).clamp(0, window), 0),
        local,
        from_zero,
        sink_column,
        total[sequence].clamp_max(sinks),
        sequence,
    )
    kept = torch.full_like(begins, -1) if keep is None else keep.to(begins.dtype)
    return Rows(
        torch.stack([x.int() for x in columns], dim=-1).contiguous(),
        torch.stack([begins, chunks_each, kept], dim=-1).int().contiguous(),
        count,
        padded,
    )


def real_tokens(rows: Rows, batch: int, length: int, window: int) -> Tensor:
    """(B, T) bool: the columns that belong to a sequence."""
    row, column, tokens = (x.long() for x in rows.chunks[:-1, :3].unbind(-1))
    offset = torch.arange(window, device=rows.chunks.device)
    inside = offset < tokens[:, None]
    # Columns of tokens that are not there go to a place behind all others.
    at = torch.where(inside, (row * length + column)[:, None] + offset, batch * length)
    real = torch.zeros(batch * length + 1, dtype=torch.bool, device=rows.chunks.device)
    return real.index_fill(0, at.flatten(), True)[:-1].view(batch, length)
