"""What decoding remembers of a row, in a constant number of bytes, and the step that reads and extends it.

    near_k, near_v: (B, K, 2 W, .)   the tokens at positions start .. start + 2 W - 1; start is a multiple of W
    sink_k, sink_v: (B, K, S, .)     the first S tokens
    state                            every token before start that is no sink
    lengths                          real tokens seen, a row each

A token at position t goes to slot t - start. When both chunks are full and one more token comes, the older chunk is
folded into the state, the newer one moves to the front and start grows by W: the state is read at every token and
written once in W. The chunk of the newest token then sees exactly the slots before its own, the sinks before start,
and the state: the definition in `reference`, with no mask.

Shape legend as in `chunked`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked import exponentials, far_chunked, mix_near_far, near_chunked, pad_to_chunks, positions
from .mixers import Mixer, State, accumulation_dtype
from .pack import pack_rows, unpack_rows

__all__ = ["Memory", "near_far_step"]


@dataclass
class Memory:
    """See the module. `uniform` is the length of every row while all are equal, else None: rows of one length need
    no index tensors, and their bookkeeping stays on the host."""

    near_k: Tensor
    near_v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    state: State | None
    lengths: Tensor
    uniform: int | None

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, mixer: Mixer | None, *, window: int, sinks: int) -> "Memory":
        """A memory of nothing, for keys (B, K, ., D) and values (B, K, ., V) like these."""

        def zeros(x: Tensor, tokens: int) -> Tensor:
            return x.new_zeros(x.shape[0], x.shape[1], tokens, x.shape[3])

        return cls(
            near_k=zeros(k, 2 * window),
            near_v=zeros(v, 2 * window),
            sink_k=zeros(k, sinks),
            sink_v=zeros(v, sinks),
            state=None if mixer is None else mixer.empty_state(k, v),
            lengths=torch.zeros(k.shape[0], dtype=torch.long, device=k.device),
            uniform=0,
        )

    def map(self, fn) -> "Memory":
        """A memory whose every tensor is `fn` of this one's: reordering rows, moving to a device."""
        state = None if self.state is None else State(*(fn(x) for x in self.state))
        near_k, near_v, sink_k, sink_v = (fn(x) for x in (self.near_k, self.near_v, self.sink_k, self.sink_v))
        return Memory(near_k, near_v, sink_k, sink_v, state, fn(self.lengths), self.uniform)

    def nbytes(self) -> tuple[int, int]:
        """(bytes of the near window and the sinks, bytes of the state)."""
        near = sum(x.nbytes for x in (self.near_k, self.near_v, self.sink_k, self.sink_v))
        return near, 0 if self.state is None else sum(x.nbytes for x in self.state)


def near_far_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    mixer: Mixer | None = None,
    mix_logit: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    mix: str = "normalizer",
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Memory]:
    """Attention of T >= 1 new tokens that follow those in `memory`, and the memory after them.

    The same numbers that the full form gives at these positions. Shapes of q, k, v, mask as in `near_far_attention`.
    The returned memory may share storage with the given one, which must not be used again. No gradient flows into
    earlier calls.
    """
    if q.shape[2] == 1 and mask is None and not torch.is_grad_enabled():
        return _one_token(q, k, v, memory, mixer, mix_logit, window=window, sinks=sinks, mix=mix, scale=scale)
    return _many_tokens(q, k, v, memory, mixer, mix_logit, window=window, sinks=sinks, mix=mix, scale=scale, mask=mask)


def _many_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    mixer: Mixer | None,
    mix_logit: Tensor | None,
    *,
    window: int,
    sinks: int,
    mix: str,
    scale: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Memory]:
    """Old chunks and new tokens side by side in one chunked pass that starts at the row's `start`."""
    new = q.shape[2]
    counts = torch.full_like(memory.lengths, new) if mask is None else mask.sum(-1)
    uniform = memory.uniform if mask is None else None
    start: int | Tensor = _start(memory.lengths if uniform is None else uniform, window)
    filled = (memory.lengths if uniform is None else uniform) - start
    longest = int((filled + counts).max()) if isinstance(filled, Tensor) else filled + new
    longest = max(longest, 2 * window)

    q_new, k_new, v_new = pack_rows(mask, q, k, v)
    lengths = memory.lengths + counts
    sink_k = _write_sinks(memory.sink_k, k_new, memory.lengths, counts, uniform)
    sink_v = _write_sinks(memory.sink_v, v_new, memory.lengths, counts, uniform)
    q_rows, k_rows, v_rows = (
        pad_to_chunks(_append(old, x, filled, longest), window)
        for old, x in ((None, q_new), (memory.near_k, k_new), (memory.near_v, v_new))
    )
    out, lse = near_chunked(q_rows, k_rows, v_rows, sink_k, sink_v, window=window, scale=scale, start=start)
    states = None
    if mixer is not None:
        far, log_mass, states = far_chunked(
            q_rows, k_rows, v_rows, mixer, window=window, sinks=sinks, start=start, state=memory.state
        )
        if mix_logit is not None and mix_logit.ndim == 3:
            (mix_rows,) = pack_rows(mask, mix_logit[..., None])
            mix_logit = pad_to_chunks(_append(None, mix_rows, filled, longest), window).squeeze(-1)
        out = mix_near_far(out, lse, far, log_mass, mix_logit, mix)
    out = unpack_rows(mask, _rows(out, filled, new)).to(q.dtype)

    # What is remembered next: the two chunks that end with the newest token, and the state before them.
    end = lengths if uniform is None else uniform + new
    skipped = _start(end, window) - start
    state = None
    if states is not None:
        state = State(*(_chunk(x.detach(), skipped, window) for x in states))
    near_k, near_v = (_rows(x.detach(), skipped, 2 * window) for x in (k_rows, v_rows))
    next_uniform = None if uniform is None else uniform + new
    near_k, near_v = near_k.contiguous(), near_v.contiguous()
    return out, Memory(near_k, near_v, sink_k.detach(), sink_v.detach(), state, lengths, next_uniform)


def _one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    mixer: Mixer | None,
    mix_logit: Tensor | None,
    *,
    window: int,
    sinks: int,
    mix: str,
    scale: float | None,
) -> tuple[Tensor, Memory]:
    """The decode step, in place: no concatenation, no copy of the window, key heads never repeated."""
    uniform = memory.uniform
    position = memory.lengths if uniform is None else uniform
    start = _start(position, window)
    full = position - start == 2 * window
    if full if uniform is not None else bool(full.any()):
        _fold(memory, mixer, full, start, window=window, sinks=sinks)
        start = start + full * window
    slot = position - start

    if uniform is not None:
        memory.near_k[:, :, slot] = k[:, :, 0]
        memory.near_v[:, :, slot] = v[:, :, 0]
        if uniform < sinks:
            memory.sink_k[:, :, uniform] = k[:, :, 0]
            memory.sink_v[:, :, uniform] = v[:, :, 0]
        memory.uniform = uniform + 1
    else:
        row = torch.arange(k.shape[0], device=k.device)
        memory.near_k[row, :, slot] = k[:, :, 0]
        memory.near_v[row, :, slot] = v[:, :, 0]
        one = torch.ones_like(memory.lengths)
        memory.sink_k = _write_sinks(memory.sink_k, k, memory.lengths, one, None)
        memory.sink_v = _write_sinks(memory.sink_v, v, memory.lengths, one, None)
    memory.lengths = memory.lengths + 1

    dtype = accumulation_dtype(q)
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = q.to(dtype).view(q.shape[0], kv_heads, heads // kv_heads, -1) * scale  # (B, K, G, D)
    near_k, near_v, sink_k, sink_v = memory.near_k, memory.near_v, memory.sink_k, memory.sink_v
    if uniform is not None:
        near_k, near_v = near_k[:, :, : slot + 1], near_v[:, :, : slot + 1]
        sink_k, sink_v = sink_k[:, :, :start], sink_v[:, :, :start]
    near_logits = queries @ near_k.to(dtype).transpose(-1, -2)
    sink_logits = queries @ sink_k.to(dtype).transpose(-1, -2)
    if uniform is None:
        after = torch.arange(2 * window, device=q.device) > slot[:, None]
        near_logits = near_logits.masked_fill(after[:, None, None], -torch.inf)
        inside = torch.arange(sinks, device=q.device) >= start[:, None]
        sink_logits = sink_logits.masked_fill(inside[:, None, None], -torch.inf)
    logits = torch.cat([sink_logits, near_logits], dim=-1)
    weights, total, lse = exponentials(logits)
    shown = sink_logits.shape[-1]
    out = weights[..., shown:] @ near_v.to(dtype)
    if shown:
        out = out + weights[..., :shown] @ sink_v.to(dtype)
    out, lse = (out / total).flatten(1, 2)[:, :, None], lse.flatten(1, 2)
    if mixer is not None and (uniform is None or start > 0):
        assert memory.state is not None, "a memory made for a mixer has a state"
        phi_q = mixer.query_features(q).view(q.shape[0], kv_heads, heads // kv_heads, -1)
        far, log_mass = mixer.read(memory.state, phi_q)
        far, log_mass = far.flatten(1, 2)[:, :, None], log_mass.flatten(1, 2)[:, :, None]
        out = mix_near_far(out, lse, far, log_mass, mix_logit, mix)
    return out.to(q.dtype), memory


def _fold(memory: Memory, mixer: Mixer | None, full: bool | Tensor, start: int | Tensor, *, window: int, sinks: int):
    """Older chunk into the state, newer chunk to the front, in the rows where both are full."""
    keep = None if isinstance(full, bool) else full[:, None, None, None]
    if mixer is not None:
        assert memory.state is not None, "a memory made for a mixer has a state"
        phi_k = mixer.key_features(memory.near_k[:, :, :window])
        kept = positions(start, window, phi_k.device) >= sinks
        phi_k = phi_k * kept[:, None, :, None]
        after = mixer.update(memory.state, phi_k, memory.near_v[:, :, :window])
        if keep is not None:
            after = State(
                torch.where(keep, after.s, memory.state.s), torch.where(keep[..., 0], after.z, memory.state.z)
            )
        memory.state = after
    for near in (memory.near_k, memory.near_v):
        newer = near[:, :, window:]
        near[:, :, :window] = newer if keep is None else torch.where(keep, newer, near[:, :, :window])


def _start(length, window: int):
    """Position of the oldest token that the near window still holds after `length` tokens (int or tensor)."""
    if isinstance(length, Tensor):
        return ((length - 1).div(window, rounding_mode="floor") - 1).clamp_min(0) * window
    return max((length - 1) // window - 1, 0) * window


def _append(old: Tensor | None, new: Tensor, filled: int | Tensor, length: int) -> Tensor:
    """(B, heads, length, .): `filled` tokens of `old` (None: zeros), then `new`, then anything."""
    batch, heads, tokens, size = new.shape
    rows = new.new_zeros(batch, heads, length + (0 if isinstance(filled, int) else tokens), size)
    if old is not None:
        rows[:, :, : old.shape[2]] = old
    if isinstance(filled, int):
        rows[:, :, filled : filled + tokens] = new
        return rows
    slots = filled[:, None] + torch.arange(tokens, device=new.device)
    rows = rows.scatter(2, slots[:, None, :, None].expand(-1, heads, -1, size), new)
    return rows[:, :, :length]


def _rows(x: Tensor, first: int | Tensor, count: int) -> Tensor:
    """(B, heads, count, .): from row b of x (B, heads, T, .), `count` tokens from `first` (int or (B,)) on."""
    if isinstance(first, int):
        return x[:, :, first : first + count]
    slots = (first[:, None] + torch.arange(count, device=x.device)).clamp_max(x.shape[2] - 1)
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _chunk(x: Tensor, skipped: int | Tensor, window: int) -> Tensor:
    """The state before the chunk that starts `skipped` tokens on, out of the stack x (B, K, N + 1, ...)."""
    if isinstance(skipped, int):
        return x[:, :, skipped // window].clone()
    return x[torch.arange(x.shape[0], device=x.device), :, skipped // window]


def _write_sinks(sinks: Tensor, new: Tensor, lengths: Tensor, counts: Tensor, uniform: int | None) -> Tensor:
    """`sinks` (B, K, S, .) with those of the `counts` new tokens that are among a row's first S."""
    size = sinks.shape[2]
    if uniform is not None:
        if uniform >= size:
            return sinks
        written = sinks.clone()
        last = min(size, uniform + new.shape[2])
        written[:, :, uniform:last] = new[:, :, : last - uniform]
        return written
    if not size or not bool((lengths < size).any()):
        return sinks
    slot = torch.arange(size, device=new.device) - lengths[:, None]  # which new token belongs in each sink
    chosen = (slot >= 0) & (slot < counts[:, None])
    index = slot.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return torch.where(chosen[:, None, :, None], new.gather(2, index), sinks)
