"""What decoding remembers of a row, in a constant number of bytes, and the step that reads and extends it.

    keys, values: (B, K, S + 2 W, .)
        sink_k, sink_v   the first S: the row's first S tokens
        near_k, near_v   the other 2 W, a ring: the token at position t lies in slot t mod 2 W
    state                every token before start that is no sink
    lengths              real tokens seen, a row each

start is where the chunk before the newest token's chunk begins. Even chunks fill the ring's first half and odd ones
its second, so nothing ever moves: when the next token begins chunk c >= 2, chunk c - 2, which lies in the half that
it will overwrite, is folded into the state, and start grows by W. The state is read at every token and written once
in W. A query in chunk c sees the whole other half (if c >= 1), its own half up to its own slot, the sinks before
start, and the state: the definition in `reference`. What else lies in its own half is chunk c - 2, which is not seen.
What the begin of chunk c puts out, chunk c - 2 and the state before it, is kept aside: see `rollback`.

A memory for graphs (`static`) holds the same at addresses that never change, and its step has no branch on data: while
chunk c comes, the tokens of chunk c - 1 go into `pending` one by one, and `pending` goes into the state when it is
over. Such a memory keeps nothing aside.

Shape legend as in `chunked`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import choose_backend, log_once
from .checks import check_inputs, check_softmax, softmax_obstacle
from .chunked import near_far_rows, pad_to_chunks
from .few_tokens import few_tokens, pending_state, wide
from .mixers import Hedgehog, Mixer, Recurrent, State, full_precision, near_part, state_obstacle
from .pack import pack_rows, unpack_rows
from .rollback import Undo

__all__ = ["Memory", "near_far_step"]


@dataclass
class Memory:
    """See the module. `uniform` is the length of every row while all are known to be equal, else None: rows of one
    length need no index tensors, and their bookkeeping stays on the host. `undo` is what tokens can be taken back by,
    None where they cannot; `pending` the tokens of chunk c - 1 that are on their way into the state of a `static`
    memory.

    Decoding without gradients, a token or a few at a time, changes the tensors in place, so that their addresses stay
    what they were.
    """

    keys: Tensor
    values: Tensor
    sinks: int
    state: State | None
    lengths: Tensor
    uniform: int | None
    undo: Undo | None = None
    pending: State | None = None
    static: bool = False

    @property
    def near_k(self) -> Tensor:
        """(B, K, 2 W, D), a view."""
        return self.keys[:, :, self.sinks :]

    @property
    def near_v(self) -> Tensor:
        """(B, K, 2 W, V), a view."""
        return self.values[:, :, self.sinks :]

    @property
    def sink_k(self) -> Tensor:
        """(B, K, S, D), a view."""
        return self.keys[:, :, : self.sinks]

    @property
    def sink_v(self) -> Tensor:
        """(B, K, S, V), a view."""
        return self.values[:, :, : self.sinks]

    @classmethod
    def empty(
        cls,
        k: Tensor,
        v: Tensor,
        mixer: Mixer | None,
        *,
        window: int,
        sinks: int,
        state_dtype: torch.dtype | None = None,
        static: bool = False,
    ) -> "Memory":
        """A memory of nothing, for keys (B, K, ., D) and values (B, K, ., V) like these.

        state_dtype: what the sums of phi_k v^T are stored in, such as bfloat16; None is the mixer's own choice,
        float32. They are added up in float32 either way and rounded once a chunk; their normaliser stays float32.
        bfloat16 is for short contexts: with W = 64 it is as exact as the outputs' rounding to 4k tokens, off by 4 %
        at 16k and by half at 64k, where the sums have stopped growing.
        static: for graphs; see the module.
        """

        k, recurrent = near_part(mixer, k), isinstance(mixer, Recurrent)

        def zeros(x: Tensor) -> Tensor:
            return x.new_zeros(x.shape[0], x.shape[1], sinks + 2 * window, x.shape[3])

        state = None if mixer is None else mixer.empty_state(k, v)
        if state is not None and state_dtype is not None:
            state = State(state.s.to(state_dtype), state.z)
        pending = mixer.empty_state(k, v) if mixer is not None and static and not recurrent else None
        return cls(
            keys=zeros(k),
            values=zeros(v),
            sinks=sinks,
            state=state,
            lengths=torch.zeros(k.shape[0], dtype=torch.long, device=k.device),
            uniform=0,
            undo=None if static or recurrent else Undo.empty(k, v, state, window),
            pending=pending,
            static=static,
        )

    def map(self, fn) -> "Memory":
        """A memory whose every tensor is `fn` of this one's: reordering rows, moving to a device."""
        state, pending = (None if x is None else x.map(fn) for x in (self.state, self.pending))
        return Memory(
            keys=fn(self.keys),
            values=fn(self.values),
            sinks=self.sinks,
            state=state,
            lengths=fn(self.lengths),
            uniform=self.uniform,
            undo=None if self.undo is None else self.undo.map(fn),
            pending=pending,
            static=self.static,
        )

    def nbytes(self) -> tuple[int, int]:
        """(bytes of keys and values, bytes of states), with what is kept to go back by or on its way."""
        near, far = (0, 0) if self.undo is None else self.undo.nbytes()
        states = [x for state in (self.state, self.pending) if state is not None for x in state]
        return near + self.keys.nbytes + self.values.nbytes, far + sum(x.nbytes for x in states)


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
    soft_cap: float | None = None,
    sink_logit: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Memory]:
    """Attention of T >= 1 new tokens that follow those in `memory`, and the memory after them.

    The same numbers that the full form gives at these positions. Arguments and shapes as in `near_far_attention`;
    backend: "torch", "triton" or "auto", as there. The returned memory may share storage with the given one, which must
    not be used again. No gradient flows into earlier calls. Without mask and gradients one token is a step of
    `triton_decode` where its kernels run; elsewhere up to W tokens of rows of one length are steps in place.
    """
    if isinstance(mixer, Recurrent):
        from .recurrent import recurrent_step

        near: dict[str, Any] = {"window": window, "sinks": sinks, "mix": mix, "scale": scale}
        near |= {"soft_cap": soft_cap, "sink_logit": sink_logit}
        return recurrent_step(q, k, v, memory, mixer, mix_logit, **near, mask=mask, backend=backend)
    if not _fits(memory, q, k, v, mixer, window, sinks):
        check_inputs(q, k, v, mixer, mix_logit, window, sinks, mix, mask, backend, function="near_far_step")
        _complain(memory)
    check_softmax(q, soft_cap, sink_logit, "near_far_step")
    options: dict[str, Any] = {"window": window, "sinks": sinks, "mix": mix, "scale": scale}
    softmax: dict[str, Any] = {"soft_cap": soft_cap, "sink_logit": sink_logit}
    obstacle = state_obstacle(mixer, mix) or softmax_obstacle(soft_cap, sink_logit)
    chosen = choose_backend(backend, q, v, 0 if mixer is None else mixer.num_features, obstacle)
    with full_precision(q):
        if q.shape[2] == 1 and (mask is None or memory.static) and not torch.is_grad_enabled():
            if chosen == "triton" and not memory.static and _steps_in_triton(mixer):
                from .triton_decode import triton_step

                return triton_step(q, k, v, memory, mixer, mix_logit, **options), memory
            return few_tokens(q, k, v, memory, mixer, mix_logit, **options, **softmax, mask=mask), memory
        if (
            chosen != "triton"
            and not (torch.is_grad_enabled() or memory.static)
            and mask is None
            and memory.uniform is not None
            and 0 < q.shape[2] <= window
        ):
            return _chunk_by_chunk(q, k, v, memory, mixer, mix_logit, **options, **softmax), memory
        options |= softmax | {"mask": mask}
        return _many_tokens(q, k, v, memory, mixer, mix_logit, **options, triton=chosen == "triton")


def _fits(memory: Memory, q: Tensor, k: Tensor, v: Tensor, mixer: Mixer | None, window: int, sinks: int) -> bool:
    """Whether tensors and memory belong together. Asked at every token, so no message is made here."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return False
    (batch, heads, new, size), kv_heads, value_size = q.shape, k.shape[1], v.shape[3]
    fits = (
        q.dtype == k.dtype == v.dtype == memory.keys.dtype == memory.values.dtype
        and q.device == k.device == v.device == memory.keys.device == memory.lengths.device
        and kv_heads > 0
        and heads % kv_heads == 0
        and k.shape == (batch, kv_heads, new, size)
        and v.shape == (batch, kv_heads, new, value_size)
        and memory.sinks == sinks
        and memory.keys.shape == (batch, kv_heads, sinks + 2 * window, size)
        and memory.values.shape == (batch, kv_heads, sinks + 2 * window, value_size)
        and memory.lengths.shape == (batch,)
        and (mixer is None) == (memory.state is None)
    )
    if not fits or mixer is None or memory.state is None:
        return fits
    return memory.state.s.shape == (batch, kv_heads, mixer.num_features, value_size) and (
        mixer.obstacle(heads, kv_heads, size) is None
    )


def _complain(memory: Memory) -> None:
    """The error for what does not fit a memory, being right by itself."""
    from linearize.errors import LinearizeError

    batch, kv_heads, slots, size = memory.keys.shape
    features = "no state" if memory.state is None else f"a state of {memory.state.s.shape[2]} features"
    raise LinearizeError(
        f"near_far_step: the memory holds {batch} rows of {kv_heads} key heads, {memory.keys.dtype} of {size} and "
        f"{memory.values.shape[3]}, for window {(slots - memory.sinks) // 2} and {memory.sinks} sinks, with "
        f"{features}, on {memory.keys.device}; these keys and values, options or mixer are others: start with "
        "Memory.empty for them"
    )


def _steps_in_triton(mixer: Mixer | None) -> bool:
    """Whether `triton_decode` knows the mixer; what it does not know is logged once."""
    if mixer is None or type(mixer) is Hedgehog:
        return True
    log_once(f"near-and-far decoding runs in PyTorch: the Triton step knows no mixer {type(mixer).__name__}")
    return False


def _chunk_by_chunk(
    q: Tensor, k: Tensor, v: Tensor, memory: Memory, mixer: Mixer | None, mix_logit: Tensor | None, **options: Any
) -> Tensor:
    """Up to W tokens of rows of one length, in place: those of the newest chunk, then those of the next."""
    assert memory.uniform is not None
    first = options["window"] - memory.uniform % options["window"]
    outs = []
    for part in (slice(0, first), slice(first, None)):
        if q[:, :, part].shape[2]:
            logit = mix_logit if mix_logit is None or mix_logit.ndim < 3 else mix_logit[:, :, part]
            outs.append(few_tokens(q[:, :, part], k[:, :, part], v[:, :, part], memory, mixer, logit, **options))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


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
    soft_cap: float | None,
    sink_logit: Tensor | None,
    mask: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Memory]:
    """Old chunks and new tokens side by side, in the order of time, in one chunked pass that starts at the row's
    `start`."""
    # The Triton form of a pass that goes on from a state has no gradient; that of a first pass is the full form's.
    gradient = torch.is_grad_enabled()
    first = memory.uniform == 0
    if triton and gradient and not first:
        log_once("a pass with gradients that continues a cache runs in PyTorch")
        triton = False
    if triton:
        from . import triton_operators
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
        for old, x in (
            (None, q_new),
            (_turn(memory.near_k, start, window), k_new),
            (_turn(memory.near_v, start, window), v_new),
        )
    )
    # What is remembered next: the two chunks that end with the newest token, and the state before them.
    end = lengths if uniform is None else uniform + new
    next_start = _start(end, window)
    skipped = next_start - start

    mix_rows = mix_logit
    if mix_logit is not None and mix_logit.ndim == 3:
        (mix_rows,) = pack_rows(mask, mix_logit[..., None])
        mix_rows = pad_to_chunks(_append(None, mix_rows, filled, longest), window).squeeze(-1)
    rows = q_rows, k_rows, v_rows, sink_k, sink_v, mixer, mix_rows
    passed: dict[str, Any] = {"window": window, "mix": mix, "scale": scale, "start": start}
    passed |= {"state": wide(memory.state), "keep": skipped // window}
    if triton:
        total = (filled + counts).expand_as(memory.lengths)
        with torch.no_grad():
            out, state, older = triton_operators.near_far_rows(*rows, **passed, total=total, only_state=gradient)
    else:
        out, state, older = near_far_rows(*rows, **passed, soft_cap=soft_cap, sink_logit=sink_logit)
    if triton and gradient:
        out = triton_operators.near_far_triton(
            q, k, v, mixer, mix_logit, window=window, sinks=sinks, mix=mix, scale=scale, mask=mask
        )
    else:
        out = unpack_rows(mask, _rows(out, filled, new)).to(q.dtype)
    if state is not None:
        state = _stored_as(state, memory.state)
    keys, values = (
        torch.cat([sink.detach(), _turn(_rows(x.detach(), skipped, 2 * window), next_start, window)], dim=2)
        for sink, x in ((sink_k, k_rows), (sink_v, v_rows))
    )
    undo = None
    if memory.undo is not None:
        older = None if older is None else _stored_as(older, memory.state)
        undo = _undo(memory.undo, k_rows.detach(), v_rows.detach(), older, skipped, window)
    next_uniform = None if uniform is None else uniform + new
    after = Memory(keys, values, sinks, state, lengths, next_uniform, undo=undo)
    return out, _settle(memory, after, mixer, window) if memory.static else after


def _stored_as(state: State, like: State | None) -> State:
    assert like is not None, "a memory made for a mixer has a state"
    return State(*(x.to(old.dtype) for x, old in zip(state, like, strict=True)))


def _undo(before: Undo, k: Tensor, v: Tensor, older: State | None, skipped: int | Tensor, window: int) -> Undo:
    """What the begin of the newest chunk puts out, of rows (B, K, ., .) that start where the window did; where the
    window has not moved, it is what was kept before."""
    first = skipped - window
    if isinstance(first, int):
        if first < 0:
            return before
        chunk = slice(first, first + window)
        return Undo(k[:, :, chunk].clone(), v[:, :, chunk].clone(), older, before.spent)
    moved = first >= 0
    keys, values = (
        torch.where(moved[:, None, None, None], _rows(x, first.clamp_min(0), window), old)
        for x, old in ((k, before.keys), (v, before.values))
    )
    state = before.state
    if state is not None and older is not None:
        s = torch.where(moved[:, None, None, None], older.s, state.s)
        state = State(s, torch.where(moved[:, None, None], older.z, state.z))
    return Undo(keys, values, state, before.spent)


@torch.no_grad()
def _settle(memory: Memory, after: Memory, mixer: Mixer | None, window: int) -> Memory:
    """`memory`, made for graphs, with what `after` holds."""
    for old, new in ((memory.keys, after.keys), (memory.values, after.values), (memory.lengths, after.lengths)):
        old.copy_(new)
    if memory.state is not None and after.state is not None:
        for old, new in zip(memory.state, after.state, strict=True):
            old.copy_(new)
    memory.uniform = None
    if memory.pending is not None and mixer is not None:
        for old, new in zip(memory.pending, pending_state(memory, mixer, window), strict=True):
            old.copy_(new)
    return memory


def _turn(x: Tensor, start: int | Tensor, window: int) -> Tensor:
    """The ring x (B, heads, 2 W, .) in the order of time, from slot start mod 2 W on; its own inverse, since `start`
    (int or (B,)) is a multiple of W."""
    if isinstance(start, int):
        return x.roll(window, 2) if start // window % 2 else x
    odd = (start // window % 2 == 1)[:, None, None, None]
    return torch.where(odd, x.roll(window, 2), x)


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
