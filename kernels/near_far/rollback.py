"""Taking the newest tokens out of a memory again, exactly.

What the newest tokens changed is little. With n tokens in a row and c the chunk of the newest, the ring holds chunk
c - 1 and the first part of chunk c, and the state every chunk up to c - 2. As long as what is removed lies in chunk c,
only `lengths` changes. Where it reaches into chunk c - 1, chunk c - 2 must be in the ring again and out of the state.
So when chunk c begins, which is once in W tokens, the memory keeps what it is about to give up: chunk c - 2 and the
state before it. From there every length down to the first of chunk c - 1 is a copy away, which is W tokens at least.

Shape legend as in `chunked`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .mixers import State

if TYPE_CHECKING:
    from .memory import Memory

__all__ = ["Undo", "remove_tokens"]


@dataclass
class Undo:
    """What the begin of the newest token's chunk c has put out of a memory.

    keys: (B, K, W, D), values: (B, K, W, V): chunk c - 2; of no meaning where c < 2.
    state: before that chunk; None without a mixer.
    spent: (B,) the chunk c - 1 to which a row was taken back the last time, -1 before the first. Until chunk c begins
        once more there is nothing that would take the row into chunk c - 2.
    """

    keys: Tensor
    values: Tensor
    state: State | None
    spent: Tensor

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, state: State | None, window: int) -> "Undo":
        """For keys (B, K, ., D), values (B, K, ., V) and a state like these."""
        keys, values = (x.new_zeros(*x.shape[:2], window, x.shape[3]) for x in (k, v))
        older = None if state is None else state.map(torch.zeros_like)
        return cls(keys, values, older, torch.full(k.shape[:1], -1, dtype=torch.long, device=k.device))

    def map(self, fn) -> "Undo":
        """Every tensor is `fn` of this one's."""
        state = None if self.state is None else self.state.map(fn)
        return Undo(fn(self.keys), fn(self.values), state, fn(self.spent))

    def nbytes(self) -> tuple[int, int]:
        """(bytes of the chunk, bytes of the state)."""
        return self.keys.nbytes + self.values.nbytes, 0 if self.state is None else sum(x.nbytes for x in self.state)


@torch.no_grad()
def remove_tokens(memory: "Memory", removed: Tensor, window: int) -> None:
    """Make `memory` what it was `removed` tokens ago, in place.

    removed: (B,) integers from 0 to W, the newest real tokens of each row.

    Raises:
        LinearizeError: more than W or more than a row has; a row that was taken back before and has not come far
            enough since; or a memory that keeps nothing to go back to. The memory is then unchanged.
    """
    from linearize.errors import LinearizeError

    undo = memory.undo
    most = int(removed.max()) if removed.numel() else 0
    if not most:
        return
    if undo is None:
        raise LinearizeError(
            f"cache: cannot remove {most} tokens, this one keeps nothing to go back to (static caches and recurrent "
            "mixers do not); copy the cache before the tokens that may be rejected"
        )
    if most > window:
        raise LinearizeError(
            f"cache: cannot remove {most} tokens, a converted layer can go back by its window of {window} at most; "
            "remove fewer, or copy the cache before the tokens that may be rejected"
        )
    before = memory.lengths - removed
    if bool((before < 0).any()):
        raise LinearizeError(
            f"cache: cannot remove {most} tokens, its shortest row has {int(memory.lengths.min())}; remove fewer"
        )
    chunk = (memory.lengths - 1).div(window, rounding_mode="floor")
    earlier = (before - 1).div(window, rounding_mode="floor")
    crosses = earlier < chunk
    restored = crosses & (chunk >= 2)
    if bool((restored & (chunk <= undo.spent)).any()):
        raise LinearizeError(
            f"cache: cannot remove {most} tokens, {window} were kept to go back by and earlier removals have used them "
            "up; copy the cache before the tokens that may be rejected"
        )
    if bool(restored.any()):
        _restore(memory, undo, restored, chunk % 2, window)
    undo.spent.copy_(torch.where(crosses, earlier, undo.spent))
    memory.lengths.copy_(before)
    alike = bool((removed == most).all())
    memory.uniform = memory.uniform - most if memory.uniform is not None and alike else None


def _restore(memory: "Memory", undo: Undo, rows: Tensor, half: Tensor, window: int) -> None:
    """In these rows (B,) bool: the kept chunk into a half (B,) of the ring, and the kept state."""
    slot = torch.arange(2 * window, device=rows.device)
    back = (rows[:, None] & (slot // window == half[:, None]))[:, None, :, None]
    for ring, chunk in ((memory.near_k, undo.keys), (memory.near_v, undo.values)):
        ring.copy_(torch.where(back, chunk.repeat(1, 1, 2, 1), ring))
    if memory.state is not None and undo.state is not None:
        s, z = memory.state
        s.copy_(torch.where(rows[:, None, None, None], undo.state.s, s))
        z.copy_(torch.where(rows[:, None, None], undo.state.z, z))
