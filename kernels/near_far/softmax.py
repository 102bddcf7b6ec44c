"""Plain softmax attention with its log-sum-exp, without a T x T tensor: what a teacher's attention is measured by."""

import torch
from torch import Tensor

from .chunked import softmax_lse
from .mixers import accumulation_dtype

__all__ = ["softmax_attention"]


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention, a block of queries at a time: O(T^2) time, O(block * T) memory.

    q: (B, H, T, D), k: (B, K, T, D), v: (B, K, T, V); rows hold their real tokens first (`pack.pack_rows`).
    Returns o (B, H, T, V) and log Z (B, H, T), in the accumulation dtype. Source: log-sum-exp form of flash attention
    (arXiv 2205.14135), by whole rows instead of online.
    """
    dtype = accumulation_dtype(q)
    length, head_dim = q.shape[2:]
    kv_heads = k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    queries = (q.to(dtype) * scale).unflatten(1, (kv_heads, -1))
    k, v = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    for first in range(0, length, block):
        last = min(first + block, length)
        part = queries[:, :, :, first:last].flatten(2, 3)
        logits = (part @ k[:, :, :last].transpose(-1, -2)).unflatten(2, (-1, last - first))
        logits[..., first:] += torch.full((last - first, last - first), -torch.inf, device=q.device).triu(1)
        weights, lse = softmax_lse(logits)
        outs.append((weights.flatten(2, 3) @ v[:, :, :last]).unflatten(2, (-1, last - first)))
        lses.append(lse)
    return torch.cat(outs, 3).flatten(1, 2), torch.cat(lses, 3).flatten(1, 2)
