"""Softmax attention of few tokens on a CPU, with grouped queries as rows of one head.

For one token that it has a mask for, transformers lets the G query heads of a key head be G rows of one product; for
several it copies keys and values G times first. Here several tokens are G T rows. bfloat16, 9 heads over 3, 8192 keys
of size 64, two cores of an AMD EPYC: one token .8 ms (as transformers does it without a mask, 4.4), five 1.5 ms (9.8).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.convert import base_model

__all__ = ["packed_attention"]

NAME = "linearize_packed_sdpa"
# Rows of a pass that is still worth it: a prompt's is quadratic, and causal without a mask.
MOST_TOKENS = 64
# What it does not do; transformers' own has errors for some of it.
OTHERS = ("softcap", "position_bias", "s_aux", "cache")


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Inside, softmax layers of a model on a CPU whose attention is `sdpa` attend to few tokens in this way."""
    config = base_model(model).config
    before = config._attn_implementation
    if before != "sdpa" or model.device.type != "cpu":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _packed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' own: query (B, H, T, D), key and value (B, K, N, .) -> (B, T, H, V), None."""
    (batch, heads, tokens, size), kv_heads = query.shape, key.shape[1]
    group = heads // kv_heads
    if (
        group == 1
        or tokens > MOST_TOKENS
        or (tokens > 1 if attention_mask is None else attention_mask.shape[1] != 1)
        or options.get("dropout")
        or any(options.get(name) is not None for name in OTHERS)
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, group, 1)
    rows = query.reshape(batch, kv_heads, group * tokens, size)
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=mask, scale=options.get("scaling")
    )
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _packed)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
