"""Rows whose positions have gaps, so that short rows teach what a long context asks for.

A feature map reads queries and keys after the rotary embedding. One that has seen positions up to T only meets angles
beyond T that it knows nothing about: far errors there are several times those within T. With gaps, the tokens of a row
stand as far from each other as those of a much longer text; the original, which knows its own rotary embedding over
its whole context, is the teacher there as anywhere. The cost of a row stays what it was.

Source of the idea: Zhu et al. 2023, positional skip-wise training (arXiv 2309.10400), there to widen the context of
softmax models.
"""

import hashlib
import random
from typing import Any

import torch
from torch import Tensor

from linearize.distill import processes
from linearize.distill.data import Batch
from linearize.errors import LinearizeError

__all__ = ["position_limit", "spread_positions"]

SPREAD = 4  # positions a token of a row, where nothing is said
PLAIN = 0.2  # share of the rows that stay as they are
PIECES = 4  # a row's tokens without a gap between them


def position_limit(config: Any, seq_len: int, positions: int | None, stage: str) -> int:
    """Below which positions the gaps stay: `positions`, or if None SPREAD for each of a row's `seq_len` tokens, and no
    more than a model of this transformers config knows. Under flash attention, which takes a gap in a row alone for
    another document, None is 0: no gaps.

    Raises:
        LinearizeError: `positions` is more than the model knows, leaves no room for a gap, or meets flash attention;
            names `stage`.
    """
    known = getattr(config, "max_position_embeddings", None)
    attention = str(getattr(config, "_attn_implementation", None))
    if "flash" in attention:
        if positions:
            raise LinearizeError(
                f"{stage}.positions: {positions}, and {attention} takes a gap for another document; load the model "
                "with attn_implementation='sdpa', or set it to 0"
            )
        return 0
    if positions is None:
        return min(SPREAD * seq_len, known or SPREAD * seq_len)
    if known is not None and positions > known:
        raise LinearizeError(
            f"{stage}.positions: {positions}, and the model knows {known}; use at most that, or leave it out"
        )
    if 0 < positions <= seq_len:
        raise LinearizeError(
            f"{stage}.positions: {positions} leave no room for gaps in rows of {seq_len} tokens; use more, or 0 for "
            "none"
        )
    return positions


def spread_positions(batch: Batch, limit: int) -> list[tuple[Batch, float]]:
    """`batch` with gaps in its rows' positions, which stay below `limit`.

    A row is cut into pieces at random places. The first begins at 0, so sinks stay what they are; the last is moved by
    a random distance, on a scale of `limit` or half of it, the others by less, in order. What is random depends on the
    row's tokens alone: it is the same in another batch, another process and a run that goes on. A row of several
    documents stays as it is: there a jump in the positions means another document.

    Returns:
        Parts, each with its share of the rows: `batch` itself, or rows with `position_ids` (B, T) and an
        `attention_mask`, which says that each is one text, and apart from them the rows of several documents. In every
        process of a run there are as many, as sharded weights ask for.
    """
    rows = len(batch["input_ids"])
    if limit <= 0:
        return [(batch, 1.0)]
    parts = _parts(batch, limit)
    # A single row is one part everywhere; more may be two in another process.
    if rows > 1 and len(parts) < processes.greatest(len(parts), batch["input_ids"].device):
        parts = [_rows(parts[0], slice(0, 1)), _rows(parts[0], slice(1, None))]
    return [(part, len(part["input_ids"]) / rows) for part in parts]


def _parts(batch: Batch, limit: int) -> list[Batch]:
    """Rows of one document, with gaps, and the others, as far as there are both."""
    if "position_ids" not in batch:
        return [_with_gaps(batch, limit)]
    alone = (batch["position_ids"].diff(dim=1) == 1).all(1)
    if not alone.any():
        return [batch]
    single = _rows(batch, alone)
    del single["position_ids"]
    spread = _with_gaps(single, limit)
    return [batch] if spread is single else [spread, _rows(batch, ~alone)]


def _rows(batch: Batch, which: Tensor | slice) -> Batch:
    return {name: x[which] for name, x in batch.items()}


def _with_gaps(batch: Batch, limit: int) -> Batch:
    """`batch`, whose rows are one document each, with positions; itself where no row gets a gap."""
    tokens = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(tokens))
    positions = torch.zeros_like(tokens)
    gaps = False
    for row, real, places in zip(tokens, mask.bool(), positions):
        found = _positions(row[real].tolist(), limit)
        gaps = gaps or int(found[-1]) >= len(found)
        places[real] = found.to(places.device)
    return batch | {"position_ids": positions, "attention_mask": mask} if gaps else batch


def _positions(tokens: list[int], limit: int) -> Tensor:
    """Of one text, (T,) int64, rising from 0."""
    length = len(tokens)
    positions = torch.arange(length)
    draw = random.Random(hashlib.sha256(f"positions {tokens}".encode()).digest())
    if length >= limit or length < PIECES or draw.random() < PLAIN:
        return positions
    room = (limit if draw.random() < 0.5 else max(limit // 2, length)) - length
    last = draw.randint(0, room)
    shifts = sorted(draw.randint(0, last) for _ in range(PIECES - 2))
    cuts = sorted(draw.sample(range(1, length), PIECES - 1))
    before = 0
    for cut, shift in zip(cuts, [*shifts, last]):
        positions[cut:] += shift - before
        before = shift
    return positions
