"""Near-and-far attention by its formula: explicit T x T weights, no chunks, no state. The truth for every other form.

For a query at position t of its row, in chunk c = t // W, the keys at positions i <= t are split:

    near:  i < S  or  i >= (c - 1) W            far:  the rest, S <= i < (c - 1) W
    e_i = exp(scale q.k_i),  f_i = phi_q.phi_k_i    (with a soft cap c, e_i = exp(c tanh(scale q.k_i / c)))
    o_near = sum_near e_i v_i / Z_near          Z_near = sum_near e_i    (and exp(s) with a learned sink s)
    o_far  = sum_far f_i v_i / n                n = sum_far f_i
    r = sigmoid(mix_logit + log n - log Z_near)     (mix "normalizer")
    r = sigmoid(mix_logit + log n - log Z_near + max_near scale q.k_i)              (mix "peak")
    r = sigmoid(mix_logit), 0 where n = 0           (mix "gate")
    o = (1 - r) o_near + r o_far

With mix "normalizer" that is one softmax denominator: o = (sum_near e v + exp(mix_logit) sum_far f v) /
(Z_near + exp(mix_logit) n). Under "peak" near weights count from the largest, exp(scale q.k_i - max), so the far mass
is compared with a number between 1 and that of the near keys, whatever the size of the logits; a learned sink is one of
them. Positions count a row's real tokens, so padding is in no set. For mixers that keep every token in their state see
`mixers.recurrent`.

Source: linear attention, Katharopoulos et al. 2020 (arXiv 2006.16236); shared denominator of window and linear
attention, and "peak", LoLCATs (arXiv 2410.10254), equation 6; sinks, StreamingLLM (arXiv 2309.17453).
"""

from typing import Any

import torch
from torch import Tensor

from .mixers import Mixer, Recurrent, accumulation_dtype

__all__ = ["near_far_reference"]


def near_far_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Mixer | None = None,
    mix_logit: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    mix: str = "normalizer",
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logit: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The formula above. Arguments, shapes and result as in `near_far_attention`; time and memory O(T^2)."""
    if isinstance(mixer, Recurrent):
        from .recurrent import recurrent_attention

        own: dict[str, Any] = {"window": window, "sinks": sinks, "mix": mix, "scale": scale, "mask": mask}
        own |= {"soft_cap": soft_cap, "sink_logit": sink_logit}
        return recurrent_attention(q, k, v, mixer, mix_logit, **own, cu_seqlens=None, backend="reference")
    dtype = accumulation_dtype(q)
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask.bool()

    # A NaN in a token that nobody sees would still be one, times zero.
    q, k, v = (x.masked_fill(~real[:, None, :, None], 0) for x in (q, k, v))

    position = real.long().cumsum(-1) - 1
    query, key = position[:, None, :, None], position[:, None, None, :]
    seen = (key <= query) & real[:, None, None, :]
    near = seen & ((key < sinks) | (key >= (query // window - 1) * window))
    far = seen & ~near

    logits = q.to(dtype) @ k.to(dtype).repeat_interleave(group, 1).transpose(-1, -2) * scale
    if soft_cap is not None:
        logits = soft_cap * (logits / soft_cap).tanh()
    # A padded query sees nothing; give it its own key, so that no row is empty. Its output is zeroed below.
    near = near | (torch.eye(q.shape[2], dtype=torch.bool, device=q.device) & ~real[:, None, :, None])
    logits = logits.masked_fill(~near, -torch.inf)
    values = v.to(dtype).repeat_interleave(group, 1)
    if sink_logit is not None:  # one more near key, with a value of 0
        sink = sink_logit.to(dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    out = logits.softmax(-1)[..., : q.shape[2]] @ values

    if mixer is not None:
        weights = mixer.query_features(q) @ mixer.key_features(k).repeat_interleave(group, 1).transpose(-1, -2)
        weights = weights * far
        mass = weights.sum(-1, keepdim=True)
        # Below the smallest normal number a far mass counts as none: see Mixer.read.
        some = mass > torch.finfo(dtype).tiny
        safe = torch.where(some, mass, 1.0)
        share = torch.zeros_like(mass)
        if mix_logit is not None:
            share = share + (mix_logit[:, None] if mix_logit.ndim == 1 else mix_logit).to(dtype)[..., None]
        if mix != "gate":
            share = share + safe.log() - logits.logsumexp(-1, keepdim=True)
        if mix == "peak":
            share = share + logits.amax(-1, keepdim=True)
        share = torch.where(some, share.sigmoid(), 0.0)
        out = out + share * (weights @ values / safe - out)
    return (out * real[:, None, :, None]).to(q.dtype)
