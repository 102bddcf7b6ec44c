"""Documents that lie end to end in the rows of a batch, each a sequence of its own.

The Triton kernels read them where they lie (`rows.rows_of_documents`). Plain PyTorch works on rows of one length, and
beside one long document many short ones would be little but padding there. So documents of similar length share a
*bucket*, a batch of its own, and padding is at most half of what is real in a bucket, but for those that are short
anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .rows import Rows, may_keep, rows_of_documents

__all__ = ["Documents", "lay_out_documents"]

# Documents up to this many tokens share a bucket whatever their lengths: a bucket costs some milliseconds by itself.
SHORT = 64


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the N documents of B rows of T tokens lie, worked out once for all layers. `lay_out_documents` makes one.

    Attributes:
        cu_seqlens: (N + 1,) int64, borders among all B T tokens, row after row; no document crosses a row's end.
        positions: (B, T) int64, each token's place in its document.
        buckets: (documents n, longest L) of each bucket.
        tokens: (M,) int64, M = sum n L: which of the B T tokens is in a slot of the buckets; 0 where none is.
        empty: (M, 1, 1) bool, the slots that hold no token.
        slots: (B T,) int64, the slot of each token.
    """

    cu_seqlens: Tensor
    positions: Tensor
    buckets: tuple[tuple[int, int], ...]
    tokens: Tensor
    empty: Tensor
    slots: Tensor
    _rows: dict[tuple[int, int], Rows] = field(default_factory=dict, repr=False)

    def split(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Tensors (B, heads, T, .) by documents: of each bucket all as (n, heads, L, .), zero after a document ends."""
        sizes = [count * longest for count, longest in self.buckets]
        found = []
        for x in tensors:
            flat = _Moved.apply(x.transpose(1, 2).flatten(0, 1), self.tokens, self.empty, self.slots, None)
            pieces = zip(flat.split(sizes), self.buckets, strict=True)
            found.append([piece.unflatten(0, bucket).transpose(1, 2) for piece, bucket in pieces])
        return list(zip(*found, strict=True))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split` for one tensor: (n, heads, L, .) of each bucket -> (B, heads, T, .)."""
        flat = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
        moved = _Moved.apply(flat, self.slots, None, self.tokens, self.empty)
        return moved.unflatten(0, self.positions.shape).transpose(1, 2)

    def rows(self, window: int, sinks: int) -> Rows:
        """The tables of these documents for the Triton kernels."""
        found = self._rows.get((window, sinks))
        if found is None:
            batch, length = self.positions.shape
            keep = may_keep(self.positions.device)
            with torch.inference_mode(torch.is_inference_mode_enabled() and not keep):
                found = rows_of_documents(self.cu_seqlens, length, window, sinks, batch)
            if keep:
                self._rows[window, sinks] = found
        return found

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Documents":
        """The same on another device; also what moves a module's arguments there looks for this."""
        if self.positions.device == torch.device(device):
            return self
        moved = {
            one.name: getattr(self, one.name).to(device, non_blocking=non_blocking)
            for one in fields(self)
            if isinstance(getattr(self, one.name), Tensor)
        }
        return replace(self, **moved, _rows={})


def lay_out_documents(cu_seqlens: Sequence[int], batch: int, length: int, device: torch.device | str) -> Documents:
    """Sort the documents of `batch` rows of `length` tokens into buckets.

    Args:
        cu_seqlens: 0 = c_0 <= ... <= c_N = batch * length; every row's start is among them.
        batch, length: B and T, both at least 1.
        device: where the result's tensors are.
    """
    borders = torch.tensor(sorted({*cu_seqlens}))
    starts, lengths = borders[:-1], borders.diff()
    lengths, order = lengths.sort(descending=True, stable=True)
    starts = starts[order]
    tokens, buckets, first = [], [], 0
    known = lengths.tolist()
    while first < len(known):
        longest = known[first]
        last = first
        while last < len(known) and (3 * known[last] >= 2 * longest or longest <= SHORT):
            last += 1
        column = torch.arange(longest)
        place = starts[first:last, None] + column
        tokens.append(place.masked_fill(column >= lengths[first:last, None], -1).flatten())
        buckets.append((last - first, longest))
        first = last
    slot = torch.cat(tokens)
    empty = slot < 0
    slots = torch.empty(batch * length, dtype=torch.int64)
    slots[slot[~empty]] = (~empty).nonzero().squeeze(1)
    begins = torch.zeros(batch * length, dtype=torch.int64)
    begins[borders[:-1]] = borders[:-1]
    positions = torch.arange(batch * length) - begins.cummax(0).values
    documents = Documents(
        borders, positions.view(batch, length), tuple(buckets), slot.clamp_min(0), empty[:, None, None], slots
    )
    return documents.to(device, non_blocking=True)


# What `torch.compiler.disable` would set; calling that imports the compiler, and with it triton.
lay_out_documents._torchdynamo_disable = True  # type: ignore[attr-defined]


class _Moved(torch.autograd.Function):
    """x[index], with zeros where `empty`. Its gradient is the same with the inverse index: each token has one slot, so
    nothing has to be summed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, empty: Tensor | None, inverse: Tensor, back_empty: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(index, empty, inverse, back_empty)
        out = x.index_select(0, index)
        return out if empty is None else out.masked_fill_(empty, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        index, empty, inverse, back_empty = ctx.saved_tensors
        return _Moved.apply(gradients[0], inverse, back_empty, index, empty), None, None, None, None
