"""Perplexity of several models on the same tokens at the same positions.

The text is cut into sequences of `seq_len` tokens that do not overlap; each is read on its own, and all but its first
token are scored. The negative log-likelihood (NLL, nats) is float32 whatever the model's dtype.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from linearize.benchmarks.inference import (
    POSITIONS_AT_ONCE,
    TOKENS_AT_ONCE,
    device_of,
    hidden_states,
    inference,
    output_head,
)
from linearize.benchmarks.resampling import mean_interval
from linearize.errors import LinearizeError

__all__ = [
    "by_position",
    "cut_sequences",
    "perplexity",
    "perplexity_by_context",
    "position_edges",
    "summarise_perplexity",
    "token_nll",
]


def cut_sequences(tokens: Tensor, seq_len: int, limit: int | None = None) -> Tensor:
    """Cut a text into sequences that do not overlap; what is left over at the end is dropped.

    Args:
        tokens: LongTensor (n,).
        seq_len: tokens per sequence, >= 2.
        limit: use at most this many tokens; None uses all.

    Returns:
        LongTensor (sequences, seq_len).

    Raises:
        LinearizeError: not even one sequence.
    """
    if tokens.dim() != 1:
        raise LinearizeError(f"tokens: shape {tuple(tokens.shape)} is not one text; pass a tensor of one dimension")
    if seq_len < 2:
        raise LinearizeError(f"seq_len: {seq_len} leaves no token to score; use 2 or more")
    n = len(tokens) if limit is None else min(len(tokens), limit)
    if n < seq_len:
        raise LinearizeError(
            f"tokens: {n} held-out tokens do not fill one sequence of {seq_len}; give more text or a smaller seq_len"
        )
    return tokens[: n - n % seq_len].reshape(-1, seq_len)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL of each target in nats, computed in float32, a few positions at a time.

    Args:
        logits: (B, T, vocabulary), any floating dtype.
        targets: LongTensor (B, T).

    Returns:
        float32 (B, T), on the device of `logits`.
    """
    pieces = [
        torch.logsumexp(piece.float(), -1) - piece.gather(-1, target[..., None])[..., 0].float()
        for piece, target in zip(logits.split(POSITIONS_AT_ONCE, 1), targets.split(POSITIONS_AT_ONCE, 1))
    ]
    return torch.cat(pieces, 1)


def perplexity(model: nn.Module, tokens: Tensor, seq_len: int, batch_size: int | None = None) -> Tensor:
    """NLL of every scored token of a text; `summarise_perplexity` makes perplexities of it.

    Args:
        model: a causal language model of transformers.
        tokens: LongTensor (n,), held-out text.
        seq_len: tokens per sequence, >= 2.
        batch_size: sequences per forward pass; by default `TOKENS_AT_ONCE` tokens of them.

    Returns:
        float32 (sequences, seq_len - 1) on the CPU; column p - 1 belongs to the token with p tokens before it.

    Raises:
        LinearizeError: the text does not fill one sequence.
    """
    sequences = cut_sequences(tokens, seq_len)
    head, rows = output_head(model), []
    with inference(model):
        for batch in sequences.split(batch_size or max(1, TOKENS_AT_ONCE // seq_len)):
            batch = batch.to(device_of(model))
            hidden, targets = hidden_states(model, batch)[:, :-1], batch[:, 1:]
            pieces = zip(hidden.split(POSITIONS_AT_ONCE, 1), targets.split(POSITIONS_AT_ONCE, 1))
            rows.append(torch.cat([token_nll(head(piece), target) for piece, target in pieces], 1).cpu())
    return torch.cat(rows)


def perplexity_by_context(model: nn.Module, tokens: Tensor, contexts: Sequence[int]) -> dict[int, Tensor]:
    """`perplexity` of one text cut at several lengths.

    A sequence that begins where a longer one does is its beginning, and a causal model predicts it the same. It is
    read from the longer one's result, unless the model's rotary embedding looks at the length. At 1k, 2k and 4k this
    halves the work.

    Args:
        model: a causal language model of transformers.
        tokens: LongTensor (n,), at least the longest context.
        contexts: tokens per sequence, each >= 2.

    Returns:
        context -> float32 (sequences, context - 1).
    """
    rotary = str(getattr(cast(Any, model).config.get_text_config(), "rope_parameters", None))
    fixed = not any(kind in rotary for kind in ("dynamic", "longrope"))
    known: dict[int, Tensor] = {}  # first token of a sequence -> NLLs of the longest one read there
    found = {}
    for context in sorted(contexts, reverse=True):
        starts = range(0, len(tokens) - context + 1, context)
        new = [start for start in starts if start not in known or not fixed]
        if new:
            text = torch.cat([tokens[start : start + context] for start in new])
            known |= dict(zip(new, perplexity(model, text, context)))
        found[context] = torch.stack([known[start][: context - 1] for start in starts])
    return {context: found[context] for context in contexts}


def position_edges(seq_len: int) -> list[int]:
    """Borders of the position bins: 1, 32, 64, 128, ... and at last `seq_len`. A bin is [edge, next edge)."""
    edges = [1]
    edge = 32
    while edge < seq_len:
        edges.append(edge)
        edge *= 2
    return [*edges, seq_len]


def by_position(values: Tensor, describe: Callable[[Tensor], dict[str, Any]]) -> dict[str, Any]:
    """`describe` of all of a row's values (sequences, positions 1 .. n), and of those in each position bin."""
    return {
        **describe(values),
        "by_position": [
            {"start": start, "end": end, **describe(values[:, start - 1 : end - 1])}
            for start, end in pairwise(position_edges(values.shape[1] + 1))
        ],
    }


def summarise_perplexity(
    nll: Mapping[str, Tensor], comparisons: list[tuple[str, str]], seed: int = 0
) -> dict[str, Any]:
    """Perplexity of each row, by position too, and paired differences between rows.

    Args:
        nll: row name -> float32 (sequences, seq_len - 1), as `perplexity` returns it, the same text for all rows.
        comparisons: pairs (row, against) whose NLL is compared, sequence by sequence.
        seed: of the bootstrap over sequences.

    Returns:
        The `"perplexity"` part of evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    shapes = {tuple(values.shape) for values in nll.values()}
    assert len(shapes) == 1, f"rows were measured on different texts: {shapes}"
    n_sequences, scored = shapes.pop()
    return {
        "seq_len": scored + 1,
        "n_sequences": n_sequences,
        "n_tokens": n_sequences * scored,
        "rows": {name: by_position(values, lambda part: _describe(part, seed)) for name, values in nll.items()},
        "comparisons": [
            {"row": row, "against": against, **_difference(nll[row], nll[against], seed)}
            for row, against in comparisons
        ],
    }


def _describe(values: Tensor, seed: int) -> dict[str, Any]:
    """Mean NLL and perplexity of (sequences, positions), with intervals over sequences. None where not finite."""
    broken = int((~values.isfinite()).sum())
    if broken:
        return {"n_not_finite": broken, "nll": None, "nll_ci95": None, "ppl": None, "ppl_ci95": None}
    means = values.double().mean(1)
    mean, ends = float(means.mean()), mean_interval(means, seed)
    return {
        "n_not_finite": 0,
        "nll": mean,
        "nll_ci95": ends,
        "ppl": math.exp(mean),
        "ppl_ci95": ends and [math.exp(end) for end in ends],
    }


def _difference(values: Tensor, against: Tensor, seed: int) -> dict[str, Any]:
    """Mean of NLL(row) - NLL(against), resampling the sequences of both together. Below 0: the row is better."""
    difference = (values.double() - against.double()).mean(1)
    if not difference.isfinite().all():
        return {"nll_difference": None, "ci95": None}
    return {"nll_difference": float(difference.mean()), "ci95": mean_interval(difference, seed)}
