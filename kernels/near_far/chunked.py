"""Near-and-far attention in chunks: plain PyTorch, any device, differentiable, linear in time and memory.

Rows hold their real tokens first (`pack.py` sees to that), and start on a chunk border, so no tensor here knows
about padding: a key after a row's last real token is in no real query's past.

On a CPU the chunks are worked through in *blocks* that fit the processor's cache: what is computed between input and
output is then made, read and forgotten there, instead of passing through memory that the system has to map first.
Elsewhere, and while torch.compile traces, there is one block.

Shape legend: B batch, H query heads, K key-value heads, G = H / K, T tokens (a multiple of W), W tokens a chunk,
N chunks of a block, or all T / W, L = S + 2 W keys that a query may see exactly, D head dimension of q and k, V of v,
F features, S sinks. *Folded* is (B, K, N, G W, .): the queries of a group beside each other, as they share the keys.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixers import Mixer, State, accumulation_dtype

__all__ = [
    "capped",
    "far_chunked",
    "mix_near_far",
    "near_chunked",
    "near_far_chunked",
    "near_far_rows",
    "pad_to_chunks",
    "positions",
    "softmax_lse",
]

# Bytes of a block's logits for each thread. With what else a block makes this is about a core's second-level cache.
BLOCK_BYTES = 2**20


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
    soft_cap: float | None = None,
    sink_logit: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The same as `near_far_reference` in O(T (W + S + F V)) time and O(T (W + F V / W)) memory; without gradients a
    CPU needs O(1) besides inputs and output."""
    from .pack import pack_rows, unpack_rows

    length = q.shape[2]
    if mask is not None:
        # A padding token's weight is 0, but 0 times NaN is NaN.
        padding = ~mask.bool()[:, None, :, None]
        q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))
    q_rows, k_rows, v_rows = pack_rows(mask, q, k, v)
    sink_k, sink_v = k_rows[:, :, :sinks], v_rows[:, :, :sinks]
    q_rows, k_rows, v_rows = (pad_to_chunks(x, window) for x in (q_rows, k_rows, v_rows))
    if mix_logit is not None and mix_logit.ndim == 3:
        (mix_rows,) = pack_rows(mask, mix_logit[..., None])
        mix_logit = pad_to_chunks(mix_rows, window).squeeze(-1)
    rows = (q_rows, k_rows, v_rows, sink_k, sink_v)
    own: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sink_logit": sink_logit}
    out, *_ = near_far_rows(*rows, mixer, mix_logit, window=window, mix=mix, **own)
    return unpack_rows(mask, out[:, :, :length])


def near_far_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    mixer: Mixer | None = None,
    mix_logit: Tensor | None = None,
    *,
    window: int,
    mix: str = "normalizer",
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logit: Tensor | None = None,
    start: int | Tensor = 0,
    state: State | None = None,
    keep: int | Tensor | None = None,
) -> tuple[Tensor, State | None, State | None]:
    """`near_chunked`, `far_chunked` and `mix_near_far` in one pass, so that near and far are never whole tensors.

    Arguments as there; `keep` is the chunk, counted from `start` and below N, before which the state is wanted
    afterwards: one a batch (int), one a row (B,), or None for no state.
    Returns o (B, H, T, V) in q's dtype, that state and the one a chunk earlier, without gradient; None without `keep`
    or a mixer. The earlier one is of no meaning where `keep` is 0.
    """
    kv_heads, sinks = k.shape[1], sink_k.shape[2]
    near = _Near(sink_k, sink_v, window, scale, start, mix == "peak", soft_cap, sink_logit)
    logits: Tensor | None = None
    if mixer is not None and mix_logit is not None:
        logits = (mix_logit[:, None] if mix_logit.ndim == 1 else mix_logit).expand(q.shape[:3])[..., None]
    kept: State | None = None
    older: State | None = None

    def blocks() -> Iterator[tuple[Tensor]]:
        nonlocal kept, older
        before = mixer.empty_state(k, v) if mixer is not None and state is None else state
        for first, q_block, k_block, v_block, logit in _blocks(window, sinks, q, k, v, logits):
            out, lse = near(q_block, k_block, v_block, first)
            if mixer is not None and before is not None:
                # Chunk c reads what was known before chunk c - 1. So what the block adds to the state are the chunks
                # that stand one to the left of its own.
                phi_k = _kept_features(mixer, k_block[:, :, :-window], window, sinks, start, first - 1)
                states = mixer.scan(before, phi_k, _chunks(v_block[:, :, :-window], window, 2))
                before = State(states.s[:, :, -1], states.z[:, :, -1])
                phi_q = _fold_group(mixer.query_features(q_block), kv_heads, window)
                far, log_mass = mixer.read(State(states.s[:, :, :-1], states.z[:, :, :-1]), phi_q)
                folded = None if logit is None else _fold_group(logit, kv_heads, window).squeeze(-1)
                out = mix_near_far(out, lse, far, log_mass, folded, mix)
                if keep is not None:
                    kept = _kept_state(kept, states, keep - first + 1)
                    older = _kept_state(older, states, keep - first)
            yield (out,)

    (out,) = _unfolded(blocks(), q, window, q.dtype)
    return out, kept, older


def near_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logit: Tensor | None = None,
    start: int | Tensor = 0,
    from_peak: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the sinks, the chunk before and the own chunk (causal).

    q: (B, H, T, D), k: (B, K, T, D), v: (B, K, T, V), sink_k: (B, K, S, D), sink_v: (B, K, S, V).
    start: position of the first token, a multiple of W; one a batch (int) or one a row (B,). Queries of the first
    chunk are right only where it is 0: the chunk before it is not among the keys.
    from_peak: give log Z_near less the largest near logit instead, which mix "peak" asks for.
    soft_cap, sink_logit: as in `near_far_attention`.
    Returns o_near (B, H, T, V) and log Z_near (B, H, T), in the accumulation dtype.
    """
    near = _Near(sink_k, sink_v, window, scale, start, from_peak, soft_cap, sink_logit)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for first, q_block, k_block, v_block in _blocks(window, sink_k.shape[2], q, k, v):
            out, lse = near(q_block, k_block, v_block, first)
            yield out, lse[..., None]

    out, lse = _unfolded(blocks(), q, window, accumulation_dtype(q))
    return out, lse.squeeze(-1)


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
    phi_k = _kept_features(mixer, k, window, sinks, start)
    states = mixer.scan(mixer.empty_state(k, v) if state is None else state, phi_k, _chunks(v, window, 2))
    # The first chunk, whose chunk before is not here, reads the oldest state there is: empty for a row that starts at
    # 0, of no consequence for one that does not.
    s, z = (torch.cat([x[:, :, :1], x[:, :, :-2]], dim=2) for x in states)
    chunks = _block_chunks(q, window, sinks)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        q_pieces = _pieces(q, None if chunks is None else chunks * window)
        for q_piece, s_piece, z_piece in zip(q_pieces, _pieces(s, chunks), _pieces(z, chunks), strict=True):
            phi_q = _fold_group(mixer.query_features(q_piece), k.shape[1], window)
            far, log_mass = mixer.read(State(s_piece, z_piece), phi_q)
            yield far, log_mass[..., None]

    far, log_mass = _unfolded(blocks(), q, window, accumulation_dtype(q))
    return far, log_mass.squeeze(-1), states


def mix_near_far(
    near: Tensor, lse: Tensor, far: Tensor, log_mass: Tensor, mix_logit: Tensor | None, mix: str
) -> Tensor:
    """(1 - r) near + r far, with the far share r of the module `reference`. Stable at any logit scale: the share is
    a sigmoid of a difference of logarithms, and a far mass of zero (log n = -inf) is a share of zero.

    near, far: (B, H, T, V); lse, log_mass: (B, H, T); mix_logit: (H,), (B, H, T) or None for zeros. lse is log Z_near,
    under "peak" less the largest near logit.
    """
    share = far_log_odds(lse, log_mass, mix_logit, mix).sigmoid()
    return torch.lerp(near, far, share[..., None])


def far_log_odds(lse: Tensor, log_mass: Tensor, mix_logit: Tensor | None, mix: str) -> Tensor:
    """log (r / (1 - r)) of the far share r: (B, H, T), -inf where there is no far mass. Arguments as in
    `mix_near_far`."""
    if mix_logit is None:
        mix_logit = lse.new_zeros(1)
    logit = (mix_logit[:, None] if mix_logit.ndim == 1 else mix_logit).to(lse.dtype)
    if mix != "gate":
        return logit + log_mass - lse
    return torch.where(log_mass > -torch.inf, logit, -torch.inf)


def capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """soft_cap tanh(logits / soft_cap), which no logit exceeds; the logits themselves for None."""
    return logits if soft_cap is None else (logits / soft_cap).tanh() * soft_cap


def softmax_lse(logits: Tensor, from_peak: bool = False, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax of the last dimension, and log Z = log sum exp of it: (..., n) -> (..., n), (...).

    sink: (..., 1), one more logit, which counts in Z and whose weight is left out.

    The largest weight of a row is 1 / sum exp(logits - m), with m its largest logit: log Z = m - log of that weight.
    Weights recovered as exp(logits - log Z) would not do: at logits of 1e4 the rounding of log Z in float32 is an
    error of 5e-4 in every one. from_peak: log Z - m instead of log Z.
    """
    if sink is not None:
        column = sink.to(logits.dtype).expand(*logits.shape[:-1], 1)
        weights, lse = softmax_lse(torch.cat([logits, column], dim=-1), from_peak)
        return weights[..., :-1], lse
    if from_peak:
        weights = logits.softmax(-1)
        return weights, -weights.amax(-1).log()
    return _SoftmaxLse.apply(logits)


class _SoftmaxLse(torch.autograd.Function):
    """As one function for its backward: dx = w (dw + dlse - sum dw w), one pass for what autograd does in five."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights = logits.softmax(-1)
        ctx.save_for_backward(weights)
        return weights, logits.amax(-1) - weights.amax(-1).log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        product = grad * weights
        return torch.addcmul(product, weights, (grad_lse - product.sum(-1))[..., None])


def positions(start: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Positions start .. start + count - 1: (1, count) for one start (int), (B, count) for one a row (B,)."""
    first = start[:, None] if isinstance(start, Tensor) else start
    return first + torch.arange(count, device=device)[None]


def pad_to_chunks(x: Tensor, window: int) -> Tensor:
    """x (B, heads, T, .) with zeros after its last token, to a multiple of W tokens: the next one, or, while
    torch.compile traces, the next one above T."""
    length = x.shape[2]
    # Of whole chunks a trace would want a graph of their own: nothing to pad, and results that need no cutting.
    chunks = length // window + 1 if torch.compiler.is_compiling() else -(-length // window)
    return F.pad(x, (0, 0, 0, chunks * window - length)) if chunks * window != length else x


class _Near:
    """The near term of one block after another. `start` as in `near_chunked`."""

    def __init__(
        self,
        sink_k: Tensor,
        sink_v: Tensor,
        window: int,
        scale: float | None,
        start: int | Tensor = 0,
        from_peak: bool = False,
        soft_cap: float | None = None,
        sink_logit: Tensor | None = None,
    ) -> None:
        self.sink_k, self.sink_v = sink_k, sink_v
        self.window, self.scale, self.start, self.from_peak = window, scale, start, from_peak
        self.soft_cap = soft_cap
        self.sink: Tensor | None = None
        if sink_logit is not None:  # folded, as the logits are
            self.sink = sink_logit.unflatten(0, (sink_k.shape[1], -1)).repeat_interleave(window, 1)[:, None, :, None]
        self.settled: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The block of N chunks whose first is chunk `first` of those after `start`.

        q: (B, H, N W, D); k, v: (B, K, (N + 1) W, .), from the chunk before on, which is not read where first = 0.
        Returns o_near (B, K, N, G W, V) and log Z_near (B, K, N, G W), from the peak if so made.
        """
        dtype, window = accumulation_dtype(q), self.window
        chunks = q.shape[2] // window
        queries = _fold_group(q, k.shape[1], window).to(dtype)
        queries = queries * (q.shape[3] ** -0.5 if self.scale is None else self.scale)
        keys, values = (
            torch.cat(
                [
                    sink[:, :, None].expand(-1, -1, chunks, -1, -1),
                    _chunks(x[:, :, :-window], window, 2),
                    _chunks(x[:, :, window:], window, 2),
                ],
                dim=3,
            ).to(dtype)
            for sink, x in ((self.sink_k, k), (self.sink_v, v))
        )  # (B, K, N, L, .)
        logits = capped(queries @ keys.transpose(-1, -2), self.soft_cap)  # (B, K, N, G W, L)
        # Adding -inf takes a fraction of the time of masked_fill_.
        _chunks(logits, window, 3).add_(self._mask(first, chunks, logits))
        weights, lse = softmax_lse(logits, self.from_peak, self.sink)
        return weights @ values, lse

    def _mask(self, first: int, chunks: int, like: Tensor) -> Tensor:
        """0 for keys that a query sees, -inf for others: (1 or B, 1, N, 1, W, L), with 1 for N where all are alike."""
        window, sinks = self.window, self.sink_k.shape[2]
        alike = first > 0 and (first - 1) * window >= sinks
        if alike and self.settled is not None:
            return self.settled
        row, slot = (torch.arange(n, device=like.device) for n in (window, 2 * window))
        chunk = first + torch.arange(1 if alike else chunks, device=like.device)[:, None, None]
        hidden = (slot > row[:, None] + window) | ((chunk == 0) & (slot < window))  # (N, W, 2 W)
        # A sink inside the window is there already: count it only once it has left.
        window_start = positions(self.start, 1, like.device)[..., None, None] + (chunk - 1) * window
        inside = torch.arange(sinks, device=like.device) >= window_start  # (1 or B, N, 1, S)
        inside = inside.expand(-1, -1, window, -1)
        hidden = torch.cat([inside, hidden.expand(len(inside), -1, -1, -1)], dim=-1)
        mask = torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)[:, None, :, None]
        if alike:
            self.settled = mask
        return mask


def _kept_features(mixer: Mixer, k: Tensor, window: int, sinks: int, start: int | Tensor = 0, first: int = 0) -> Tensor:
    """phi_k (B, K, N, W, F) of N chunks of keys (B, K, N W, D) whose first is chunk `first` of those after `start`:
    zero for sinks, which are in no state, and for chunk -1, which is none."""
    phi_k = mixer.key_features(k)
    if first * window < sinks:
        row = first * window + torch.arange(k.shape[2], device=k.device)
        kept = (row >= 0) & (positions(start, 1, k.device) + row >= sinks)
        phi_k = phi_k * kept.to(phi_k.dtype)[:, None, :, None]
    return _chunks(phi_k, window, 2)


def _kept_state(kept: State | None, states: State, index: int | Tensor) -> State | None:
    """The state at `index` (an int, or one a row) of those stacked in dimension 2, or `kept` where it is not there."""
    count = states.z.shape[2]
    if isinstance(index, int):
        return states.map(lambda x: x[:, :, index].detach().clone()) if 0 <= index < count else kept
    row = torch.arange(len(index), device=index.device)
    found = states.map(lambda x: x.detach()[row, :, index.clamp(0, count - 1)])
    if kept is None:
        return found
    here = ((index >= 0) & (index < count))[:, None, None]
    return State(torch.where(here[..., None], found.s, kept.s), torch.where(here, found.z, kept.z))


def _block_chunks(q: Tensor, window: int, sinks: int) -> int | None:
    """How many chunks make a block; None where one block is best."""
    if torch.compiler.is_compiling() or q.device.type != "cpu":
        return None
    chunk_bytes = q.shape[0] * q.shape[1] * window * (sinks + 2 * window) * accumulation_dtype(q).itemsize
    return max(1, BLOCK_BYTES * torch.get_num_threads() // chunk_bytes)


def _blocks(
    window: int, sinks: int, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None
) -> Iterator[tuple[Any, ...]]:
    """(first chunk, q, k, v, *others) of one block after another; k and v begin with the chunk before it (zeros before
    the first). All are (B, heads, T, .); None stays None."""
    chunks = _block_chunks(q, window, sinks)
    tokens = None if chunks is None else chunks * window
    k_before, v_before = (x.new_zeros(*x.shape[:2], window, x.shape[3]) for x in (k, v))
    first = 0
    q_pieces = _pieces(q, tokens)
    rest = zip(*([None] * len(q_pieces) if x is None else _pieces(x, tokens) for x in (k, v, *others)), strict=True)
    for q_piece, (k_piece, v_piece, *pieces) in zip(q_pieces, rest, strict=True):
        yield first, q_piece, torch.cat([k_before, k_piece], 2), torch.cat([v_before, v_piece], 2), *pieces
        k_before, v_before = k_piece[:, :, -window:], v_piece[:, :, -window:]
        first += q_piece.shape[2] // window


def _pieces(x: Tensor, count: int | None) -> tuple[Tensor, ...]:
    """x in pieces of `count` along dimension 2, None for one piece. By `split`, whose gradient is one concatenation;
    that of a slice would be a tensor of zeros for each piece."""
    return (x,) if count is None else x.split(count, dim=2)


def _unfolded(blocks: Iterable[tuple[Tensor, ...]], q: Tensor, window: int, dtype: torch.dtype) -> list[Tensor]:
    """The folded results of all blocks as whole tensors (B, H, T, .) in the order of q."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        columns = [column[0] if len(column) == 1 else torch.cat(column, dim=2) for column in zip(*blocks, strict=True)]
        return [_unfold_group(x, window).to(dtype) for x in columns]
    wholes: list[Tensor] = []
    first = 0
    for block in blocks:
        views = [_chunks(x, window, 3).transpose(2, 3) for x in block]  # (B, K, G, N, W, .)
        if not wholes:
            chunks = q.shape[2] // window
            wholes = [x.new_empty(*x.shape[:3], chunks, *x.shape[4:], dtype=dtype) for x in views]
        for whole, view in zip(wholes, views, strict=True):
            whole[:, :, :, first : first + view.shape[3]] = view
        first += views[0].shape[3]
    return [x.flatten(3, 4).flatten(1, 2) for x in wholes]


def _chunks(x: Tensor, window: int, dim: int) -> Tensor:
    """N W tokens in dimension `dim` as (N, W). With N by name: inferred sizes are sums that a trace cannot simplify."""
    return x.unflatten(dim, (x.shape[dim] // window, window))


def _fold_group(x: Tensor, kv_heads: int, window: int) -> Tensor:
    """(B, H, T, .) -> folded (B, K, N, G W, .)."""
    x = _chunks(x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)), window, 3)
    return x.transpose(2, 3).flatten(3, 4)


def _unfold_group(x: Tensor, window: int) -> Tensor:
    """The inverse of `_fold_group`: (B, K, N, G W, .) -> (B, H, T, .)."""
    return _chunks(x, window, 3).transpose(2, 3).flatten(3, 4).flatten(1, 2)
