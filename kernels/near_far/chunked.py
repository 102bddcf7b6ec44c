"""Near-and-far attention in chunks: plain PyTorch, any device, differentiable, linear in time and memory.

Rows hold their real tokens first (`pack.py` sees to that), and start on a chunk border, so no tensor here knows
about padding: a key after a row's last real token is in no real query's past.

Shape legend: B batch, H query heads, K key-value heads, G = H / K, T tokens (a multiple of W), N = T / W chunks,
D head dimension of q and k, V of v, F features, S sinks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixers import Mixer, State, accumulation_dtype

__all__ = ["far_chunked", "mix_near_far", "near_chunked", "near_far_chunked", "pad_to_chunks", "positions"]


def near_far_chunked(
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
    mask: Tensor | None = None,
) -> Tensor:
    """The same as `near_far_reference` in O(T (W + S + F V)) time and O(T (W + F V / W)) memory."""
    from .pack import pack_rows, unpack_rows

    length = q.shape[2]
    q_rows, k_rows, v_rows = pack_rows(mask, q, k, v)
    sink_k, sink_v = k_rows[:, :, :sinks], v_rows[:, :, :sinks]
    q_rows, k_rows, v_rows = (pad_to_chunks(x, window) for x in (q_rows, k_rows, v_rows))
    out, lse = near_chunked(q_rows, k_rows, v_rows, sink_k, sink_v, window=window, scale=scale)
    if mixer is not None:
        far, log_mass, _ = far_chunked(q_rows, k_rows, v_rows, mixer, window=window, sinks=sinks)
        if mix_logit is not None and mix_logit.ndim == 3:
            (mix_rows,) = pack_rows(mask, mix_logit[..., None])
            mix_logit = pad_to_chunks(mix_rows, window).squeeze(-1)
        out = mix_near_far(out, lse, far, log_mass, mix_logit, mix)
    return unpack_rows(mask, out[:, :, :length]).to(q.dtype)


def near_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    start: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the sinks, the chunk before and the own chunk (causal).

    q: (B, H, T, D), k: (B, K, T, D), v: (B, K, T, V), sink_k: (B, K, S, D), sink_v: (B, K, S, V).
    start: position of the first token, a multiple of W; one a batch (int) or one a row (B,). Queries of the first
    chunk are right only where it is 0: the chunk before it is not among the keys.
    Returns o_near (B, H, T, V) and log Z_near (B, H, T), in the accumulation dtype.
    """
    dtype = accumulation_dtype(q)
    batch, heads, length, head_dim = q.shape
    kv_heads, sinks = k.shape[1], sink_k.shape[2]
    group, chunks = heads // kv_heads, length // window
    scale = head_dim**-0.5 if scale is None else scale

    queries = _fold_group(q.to(dtype) * scale, kv_heads, window)  # (B, K, N, G W, D)
    keys, values = (_with_chunk_before(x.to(dtype), window) for x in (k, v))  # (B, K, N, 2 W, .)
    logits = (queries @ keys.transpose(-1, -2)).unflatten(3, (group, window))  # (B, K, N, G, W, 2 W)
    row, column = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    hidden = (column > row + window).expand(chunks, 1, window, 2 * window).clone()
    hidden[:1, :, :, :window] = True  # the first chunk has no chunk before it
    logits = logits.masked_fill(hidden, -torch.inf)

    if sinks:
        sink_logits = queries.flatten(2, 3) @ sink_k.to(dtype).transpose(-1, -2)
        sink_logits = sink_logits.view(batch, kv_heads, chunks, group, window, sinks)
        # A sink inside the window is there already: count it only once it has left.
        window_start = positions(start, length, q.device)[:, ::window] - window
        inside = torch.arange(sinks, device=q.device) >= window_start[:, None, :, None, None, None]
        logits = torch.cat([sink_logits.masked_fill(inside, -torch.inf), logits], dim=-1)

    weights, total, lse = exponentials(logits.flatten(3, 4))
    out = weights[..., sinks:] @ values
    if sinks:
        out = out + (weights[..., :sinks].flatten(2, 3) @ sink_v.to(dtype)).unflatten(2, (chunks, group * window))
    return _unfold_group(out / total, heads, window), _unfold_group(lse, heads, window).squeeze(-1)


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - m) with m the largest of a row, their sum l, and log Z = m + log l: (..., n), (..., 1), (..., 1).

    Softmax is the first by the second. exp(logits - log Z) is not: at logits of 1e4 the rounding of log Z in float32
    would be an error of 5e-4 in every weight.
    """
    top = logits.detach().amax(-1, keepdim=True)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights, total, top + total.log()


def far_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Mixer,
    *,
    window: int,
    sinks: int = 0,
    start: int | Tensor = 0,
    state: State | None = None,
) -> tuple[Tensor, Tensor, State]:
    """The far term of every query, read from the state of all chunks before the chunk before its own.

    Shapes and `start` as in `near_chunked`; `state` holds every token before `start` that is no sink.
    Returns o_far (B, H, T, V), log n (B, H, T), and the N + 1 states before each chunk and after the last
    (s: (B, K, N + 1, F, V), z: (B, K, N + 1, F)).
    """
    dtype = accumulation_dtype(q)
    phi_k = mixer.key_features(k)
    kept = positions(start, min(sinks, k.shape[2]), q.device) >= sinks
    kept = kept.to(dtype)[:, None, :, None]
    phi_k = torch.cat([phi_k[:, :, : kept.shape[2]] * kept, phi_k[:, :, kept.shape[2] :]], dim=2)

    before = mixer.empty_state(k, v) if state is None else state
    states = mixer.scan(before, phi_k.unflatten(2, (-1, window)), v.to(dtype).unflatten(2, (-1, window)))
    # Chunk c reads what was known before chunk c - 1. The first chunk, whose chunk before is not here, reads the
    # oldest state there is: empty for a row that starts at 0, of no consequence for one that does not.
    read = State(*(torch.cat([x[:, :, :1], x[:, :, :-2]], dim=2) for x in states))
    phi_q = _fold_group(mixer.query_features(q), k.shape[1], window)
    value, log_mass = mixer.read(read, phi_q)
    heads = q.shape[1]
    return _unfold_group(value, heads, window), _unfold_group(log_mass[..., None], heads, window).squeeze(-1), states


def mix_near_far(
    near: Tensor, lse: Tensor, far: Tensor, log_mass: Tensor, mix_logit: Tensor | None, mix: str
) -> Tensor:
    """(1 - r) near + r far, with the far share r of the module `reference`. Stable at any logit scale: the share is
    a sigmoid of a difference of logarithms, and a far mass of zero (log n = -inf) is a share of zero.

    near, far: (B, H, T, V); lse, log_mass: (B, H, T); mix_logit: (H,), (B, H, T) or None for zeros.
    """
    share = far_log_odds(lse, log_mass, mix_logit, mix).sigmoid()
    return near + share[..., None] * (far - near)


def far_log_odds(lse: Tensor, log_mass: Tensor, mix_logit: Tensor | None, mix: str) -> Tensor:
    """log (r / (1 - r)) of the far share r: (B, H, T), -inf where there is no far mass. Arguments as in
    `mix_near_far`."""
    if mix_logit is None:
        mix_logit = lse.new_zeros(1)
    logit = (mix_logit[:, None] if mix_logit.ndim == 1 else mix_logit).to(lse.dtype)
    if mix == "normalizer":
        return logit + log_mass - lse
    return torch.where(log_mass > -torch.inf, logit, -torch.inf)


def positions(start: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Positions start .. start + count - 1: (1, count) for one start (int), (B, count) for one a row (B,)."""
    first = start[:, None] if isinstance(start, Tensor) else start
    return first + torch.arange(count, device=device)[None]


def pad_to_chunks(x: Tensor, window: int) -> Tensor:
    """x (B, heads, T, .) with zeros after its last token, to a multiple of W tokens."""
    missing = -x.shape[2] % window
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _with_chunk_before(x: Tensor, window: int) -> Tensor:
    """(B, K, T, .) -> (B, K, N, 2 W, .): each chunk behind the one before it, zeros before the first."""
    chunks = x.unflatten(2, (-1, window))
    before = torch.cat([torch.zeros_like(chunks[:, :, :1]), chunks[:, :, :-1]], dim=2)
    return torch.cat([before, chunks], dim=3)


def _fold_group(x: Tensor, kv_heads: int, window: int) -> Tensor:
    """(B, H, T, .) -> (B, K, N, G W, .): the queries of a group beside each other, so that they share the keys."""
    x = x.unflatten(1, (kv_heads, -1)).unflatten(3, (-1, window))
    return x.transpose(2, 3).flatten(3, 4)


def _unfold_group(x: Tensor, heads: int, window: int) -> Tensor:
    """The inverse of `_fold_group`: (B, K, N, G W, .) -> (B, H, T, .)."""
    x = x.unflatten(3, (-1, window)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)
