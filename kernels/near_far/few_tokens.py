"""The decode step in PyTorch: one new token of every row, or some of one chunk, in place, in few and large operations.

At one token a step's time is that of its calls as much as of its bytes, so window and sinks are one list of keys and
one softmax, and on a CPU one call does both products of it: PyTorch's own flash attention, which returns log Z beside
the output. No key head is repeated, nothing is concatenated. Tokens of one chunk read the same state and keys, so
several, such as drafts to be verified, are more rows of the same matrix.

Shape legend as in `chunked`.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .chunked import capped, mix_near_far, softmax_lse
from .mixers import Mixer, State, accumulation_dtype

if TYPE_CHECKING:
    from .memory import Memory

__all__ = ["few_tokens", "fold", "pending_state", "wide"]

# Returns (output, log Z); what scaled_dot_product_attention calls on a CPU, which keeps log Z to itself.
_flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def few_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: "Memory",
    mixer: Mixer | None,
    mix_logit: Tensor | None,
    *,
    window: int,
    sinks: int,
    mix: str,
    scale: float | None,
    mask: Tensor | None = None,
    soft_cap: float | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """Attention (B, H, T, V) of new tokens, which `memory` remembers in place. Arguments as in `near_far_step`.

    T is 1, or more where all rows have one length and the tokens lie in one chunk. Only a static memory takes a mask.
    """
    new = None if mask is None else mask[:, 0].bool()
    if memory.static:
        memory.uniform = None
        _advance(memory, mixer, window, new)
    else:
        fold(memory, mixer, window=window, sinks=sinks)
    position: int | Tensor = memory.lengths.clone() if memory.uniform is None else memory.uniform
    _remember(memory, k, v, position, new)
    (batch, heads, tokens, _), kv_heads = q.shape, k.shape[1]
    memory.lengths.add_(tokens if new is None else new)
    if memory.uniform is not None:
        memory.uniform += tokens

    group = heads // kv_heads
    dtype = accumulation_dtype(q)
    if isinstance(position, Tensor):
        hidden, far = _hidden(position[:, None], window, sinks, dtype)[:, None, None], True
    else:
        # torch.compile would trace through the cache of answers all the same, and warn of it; tensors without numbers
        # (FakeTensorMode) must not stay in it.
        plain = type(memory.keys) is Tensor and not torch.compiler.is_compiling()
        alike = _hidden_alike if plain else _hidden_alike.__wrapped__
        hidden, far = alike(position, tokens, window, sinks, dtype, q.device), position >= 2 * window
        if tokens > 1:
            hidden = hidden.repeat(1, 1, group, 1)  # the tokens of each of G heads after one another
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = batch, kv_heads, group * tokens, -1  # a group and its tokens are rows of one matrix
    queries = q.reshape(rows)
    sink = None if sink_logit is None else sink_logit.view(kv_heads, group, 1).repeat_interleave(tokens, dim=1)
    out, lse = _attend(queries, memory.keys, memory.values, hidden, scale, mix == "peak", soft_cap, sink)
    out, lse = out.reshape(batch, heads, tokens, -1), lse.reshape(batch, heads, tokens)
    if mixer is not None and far:
        state = wide(memory.state)
        assert state is not None, "a memory made for a mixer has a state"
        phi_q = mixer.query_features(q).reshape(rows)
        value, log_mass = mixer.read(state, phi_q)
        value, log_mass = value.reshape(batch, heads, tokens, -1), log_mass.reshape(batch, heads, tokens)
        out = mix_near_far(out, lse, value, log_mass, mix_logit, mix)
    if new is not None:
        out = torch.where(new[:, None, None, None], out, 0)
    return out.to(q.dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    scale: float,
    from_peak: bool,
    soft_cap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q.k + hidden) v and its log Z, less the largest logit where `from_peak`.

    q: (B, K, R, D), k: (B, K, N, D), v: (B, K, N, V); hidden: 0 or -inf, (1 or B, 1, 1 or R, N); sink: (K, R, 1) or
    None -> (B, K, R, V), (B, K, R).
    """
    plain = soft_cap is None and sink is None and not from_peak
    dtype = hidden.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)  # in half precision it would round the weights as well
    if q.device.type == "cpu" and _flash is not None and plain and k.shape[-1] == v.shape[-1]:
        # It reads past the end of rows whose last dimension is not contiguous.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return _flash(q, k, v, attn_mask=hidden, scale=scale)
    logits = capped((q * scale) @ k.transpose(-1, -2), soft_cap)
    weights, lse = softmax_lse(logits + hidden, from_peak, sink)
    return weights @ v, lse


@lru_cache(maxsize=8)  # all layers of a model ask for the same one
def _hidden_alike(
    position: int, tokens: int, window: int, sinks: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`_hidden` of T tokens from one position on, the same in all rows: (1, 1, T, S + 2 W)."""
    positions = torch.arange(position, position + tokens, device=device)[:, None]
    return _hidden(positions, window, sinks, dtype)[None, None]


def _hidden(position: Tensor, window: int, sinks: int, dtype: torch.dtype) -> Tensor:
    """What a query at `position` (B, 1), whose own token is remembered, does not see: -inf there, else 0.

    (B, S + 2 W): the sinks, of which it sees those before `start`, as the others are in the window; then the ring's
    slots, of which it sees its own half up to its own slot and, from the second chunk on, the other half.
    """
    chunk, offset = position // window, position % window
    sink = torch.arange(sinks, device=position.device)
    slot = torch.arange(2 * window, device=position.device)
    seen = torch.cat(
        [
            sink < (chunk - 1) * window,
            torch.where(slot // window == chunk % 2, slot % window <= offset, chunk > 0),
        ],
        dim=1,
    )
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _remember(memory: "Memory", k: Tensor, v: Tensor, position: int | Tensor, new: Tensor | None = None) -> None:
    """New tokens of every row, or one of the rows `new` (B,), into their slots of the ring, and among the sinks those
    that belong there. position: of the first; several have consecutive slots."""
    sinks = memory.sinks
    for x, held in ((k, memory.keys), (v, memory.values)):
        ring = held.shape[2] - sinks
        if not isinstance(position, Tensor):
            begin = sinks + position % ring
            held[:, :, begin : begin + x.shape[2]] = x
            if position < sinks:
                held[:, :, position : min(position + x.shape[2], sinks)] = x[:, :, : sinks - position]
            continue
        row = torch.arange(x.shape[0], device=x.device)
        slot = sinks + position % ring
        token = x[:, :, 0] if new is None else torch.where(new[:, None, None], x[:, :, 0], held[row, :, slot])
        held[row, :, slot] = token
        if sinks:  # a token that is no sink is written once more into its slot
            sink = position < sinks if new is None else (position < sinks) & new
            held[row, :, torch.where(sink, position, slot)] = token


def fold(memory: "Memory", mixer: Mixer | None, *, window: int, sinks: int) -> None:
    """In the rows whose next token begins a chunk c >= 2: chunk c - 2, which it will overwrite, into the state; it and
    the state before it are kept to go back by."""
    undo = memory.undo
    if mixer is None and undo is None:
        return
    position: int | Tensor = memory.lengths if memory.uniform is None else memory.uniform
    if not isinstance(position, Tensor) and (position % window or position < 2 * window):
        return
    half = torch.arange(window, device=memory.keys.device)
    if isinstance(position, Tensor):
        due = (position % window == 0) & (position >= 2 * window)
        if mixer is not None and not bool(due.any()):  # a copy of one chunk is not worth waiting for the device
            return
        slots = (position // window % 2 * window)[:, None] + half
        first = position[:, None] - 2 * window
        k, v = (
            x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
            for x in (memory.near_k, memory.near_v)
        )
        kept = (first + half >= sinks) & due[:, None]
        changed = due[:, None, None, None]
    else:
        slot = position // window % 2 * window
        k, v = memory.near_k[:, :, slot : slot + window], memory.near_v[:, :, slot : slot + window]
        kept = (position - 2 * window + half >= sinks)[None]
        changed = None
    if undo is not None:
        _put(undo.keys, k, changed)
        _put(undo.values, v, changed)
    if mixer is None:
        return
    before = wide(memory.state)
    assert before is not None, "a memory made for a mixer has a state"
    assert memory.state is not None
    after = mixer.update(before, mixer.key_features(k) * kept[:, None, :, None], v)
    for index, (held, new) in enumerate(zip(memory.state, after, strict=True)):
        rows = changed if changed is None or not index else changed[..., 0]
        if undo is not None and undo.state is not None:
            _put(undo.state[index], held, rows)
        _put(held, new, rows)


def _put(held: Tensor, new: Tensor, rows: Tensor | None) -> None:
    """`new` into `held`, in all rows or where `rows` says so."""
    held.copy_(new if rows is None else torch.where(rows, new, held))


def _advance(memory: "Memory", mixer: Mixer | None, window: int, new: Tensor | None) -> None:
    """The state of a static memory before the next token of every row, or of the rows `new` (B,), without a branch.

    `pending` holds the tokens of chunk c - 1 that stand as far into it as the row's newest into chunk c. When the next
    one begins a chunk it is whole, and goes into the state. Then the token a window before the next one goes in.
    """
    if mixer is None or memory.state is None or memory.pending is None:
        return
    position, pending = memory.lengths, memory.pending
    begins = position % window == 0
    if new is not None:
        begins = begins & new
    for held, whole in zip(memory.state, pending, strict=True):
        mark = begins.view(-1, *[1] * (held.ndim - 1))
        held.copy_(torch.where(mark, held + whole, held))
        whole.masked_fill_(mark, 0)
    leaving = position - window
    row = torch.arange(position.shape[0], device=position.device)
    slot = leaving % (2 * window)
    k, v = (x[row, :, slot][:, :, None] for x in (memory.near_k, memory.near_v))
    joins = leaving >= memory.sinks
    if new is not None:
        joins = joins & new
    after = mixer.update(pending, mixer.key_features(k) * joins[:, None, None, None], v)
    for held, more in zip(pending, after, strict=True):
        held.copy_(more)


def pending_state(memory: "Memory", mixer: Mixer, window: int) -> State:
    """What `pending` of a static memory has to be after any tokens: the tokens of chunk c - 1, sinks apart, that stand
    no further into it than the newest into chunk c."""
    newest = memory.lengths - 1
    half = torch.arange(window, device=newest.device)
    first = (newest.div(window, rounding_mode="floor") - 1) * window  # of chunk c - 1
    slots = (first % (2 * window))[:, None] + half
    k, v = (
        x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        for x in (memory.near_k, memory.near_v)
    )
    token = first[:, None] + half
    kept = (token >= memory.sinks) & (token >= 0) & (token <= (newest - window)[:, None])
    return mixer.update(
        mixer.empty_state(memory.near_k, memory.near_v), mixer.key_features(k) * kept[:, None, :, None], v
    )


def wide(state: State | None) -> State | None:
    """The state in the dtype it is added up and read in, which is its normaliser's."""
    return None if state is None else State(state.s.to(state.z.dtype), state.z)
