"""A long context without reading it: a cache that has read some tokens is extended as if it had read many more.

What a decode step costs depends on the shapes and lengths in the cache, not on the numbers that it holds. So where
reading a context would take far longer than the steps after it, a part is read, and the rest is filled in:

softmax layers
    Tokens drawn at random, with replacement, from those that were read: each with its key and its value, the same
    tokens in every layer and head. So every layer and head keeps the mean and the spread of its own keys and values.
    They enter by `update`, the function that a prefill calls.
converted layers
    Sinks and window stay those of the tokens read, and so does the state: all three have the same size at any length.
    What moves is the count of tokens, by a multiple of 2 W, after which the ring of the window lies as before.
"""

import math
from typing import Any

import torch

from linearize.cache import NearFarLayer

__all__ = ["READ", "extend", "fill_period", "tokens_to_read"]

# Tokens that are read before the rest is filled in: enough for means and spreads of keys and values.
READ = 512


def fill_period(cache: Any) -> int:
    """What the number of filled-in tokens has to be a multiple of, for a cache that a model has written to."""
    rings = [layer.memory.near_k.shape[2] for layer in cache.layers if _remembers(layer)]
    return math.lcm(1, *rings)


def tokens_to_read(length: int, period: int) -> int:
    """How many of a context's `length` tokens are read where the rest is filled in: all of a short context, else the
    least number from READ and 2 periods on (by then every state holds tokens) that leaves whole periods."""
    least = max(READ, 2 * period)
    return length if length <= least else least + (length - least) % period


def extend(cache: Any, tokens: int, seed: int = 0) -> None:
    """Make a cache what it would be after `tokens` more tokens, but for the numbers in it; in place.

    Args:
        cache: as a model left it after a prefill without padding, every layer with the same number of tokens.
        tokens: a multiple of `fill_period(cache)`.
        seed: of the tokens drawn.

    Raises:
        ValueError: another number of tokens, or a cache that was written with padding.
    """
    period = fill_period(cache)
    if tokens % period:
        raise ValueError(f"tokens: {tokens} would move the window's ring; give a multiple of {period}")
    drawn: dict[tuple[int, torch.device], torch.Tensor] = {}
    for layer in cache.layers:
        if _remembers(layer):
            memory = layer.memory
            if memory.uniform is None and not memory.static:
                raise ValueError("cache: its rows have lengths of their own; fill one that was written without padding")
            memory.uniform = None if memory.uniform is None else memory.uniform + tokens
            memory.lengths.add_(tokens)
            layer.seen += tokens
            continue
        # A sliding layer holds the last tokens only; a preallocated one more slots than tokens.
        held = min(int(layer.get_seq_length()), layer.keys.shape[2])
        if (held, layer.keys.device) not in drawn:
            generator = torch.Generator().manual_seed(seed)
            index = torch.randint(held, (tokens,), generator=generator)
            drawn[held, layer.keys.device] = index.to(layer.keys.device)
        chosen = drawn[held, layer.keys.device]
        layer.update(layer.keys[:, :, chosen], layer.values[:, :, chosen])


def _remembers(layer: Any) -> bool:
    return isinstance(layer, NearFarLayer) and layer.memory is not None
