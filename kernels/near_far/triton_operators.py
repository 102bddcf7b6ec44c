"""Near-and-far attention in Triton, as differentiable operators and as a tier of `near_far_attention`.

`linearize::near_far` and `linearize::near_far_backward` are custom operators with fake kernels, so torch.compile and
torch.export see one node each and look no further.
"""

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .documents import Documents
from .mixers import Mixer, State, accumulation_dtype
from .pack import pack_rows, unpack_rows
from .rows import (
    Rows,
    is_contiguous_mask,
    may_keep,
    real_tokens,
    rows_of_batch,
    rows_of_documents,
    rows_of_lengths,
    rows_of_mask,
)
from .triton_arguments import last_contiguous
from .triton_near_far import (
    Problem,
    empty_outputs,
    far_states,
    features_kind,
    features_of,
    near_far_backward,
    near_far_forward,
)

__all__ = ["far_triton", "near_far_operator", "near_far_rows", "near_far_triton"]


def near_far_triton(
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
    cu_seqlens: Tensor | Documents | None = None,
) -> Tensor:
    """The same as `near_far_reference` in Triton kernels: time and memory linear in T, backward included.

    Rows whose real tokens stand together (left and right padding, documents by `cu_seqlens`) are read where they lie;
    where a mask has holes, and under torch.compile, where nobody can look, the real tokens are moved together first.
    """
    batch, _, length, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    mix_logit = _log_odds(q, mixer, mix_logit)
    holes = False
    if isinstance(cu_seqlens, Documents):
        rows = cu_seqlens.rows(window, sinks)
    elif cu_seqlens is not None:
        rows = rows_of_documents(cu_seqlens, length, window, sinks)
    elif mask is not None:
        holes, rows = _rows_behind(mask, window, sinks)
        if holes:
            q, k, v = pack_rows(mask, q, k, v)
            if mix_logit is not None:
                mix_logit = pack_rows(mask, mix_logit[..., None])[0].squeeze(-1)
        if features_kind(mixer, q) == "given":  # features of a padding token that is NaN would have NaN gradients
            real = real_tokens(rows, batch, length, window)[:, None, :, None]
            q, k = (torch.where(real, x, 0) for x in (q, k))
    else:
        rows = rows_of_batch(batch, length, window, sinks, q.device)
    out, _ = _apply(q, k, v, mixer, mix_logit, rows, window, sinks, mix, scale)
    return unpack_rows(mask, out) if holes else out


def _rows_behind(mask: Tensor, window: int, sinks: int) -> tuple[bool, Rows]:
    """(whether the real tokens have to be moved together first, the table). All layers of a model hand over the same
    mask: what the last one needed a look at the data for is kept for it."""
    known = _last_mask.get("rows")
    shareable = may_keep(mask.device) and not mask.is_inference()
    if shareable and known is not None and known[0]() is mask and known[1:4] == (mask._version, window, sinks):
        return known[4]
    holes = not may_keep(mask.device) or not bool(is_contiguous_mask(mask))
    columns = mask
    if holes:
        columns = torch.arange(mask.shape[1], device=mask.device) < mask.bool().sum(-1)[:, None]
    with torch.inference_mode(False) if shareable else nullcontext():  # a later call may save it for its backward pass
        found = holes, rows_of_mask(columns, window, sinks)
    if shareable and type(mask) is Tensor:
        _last_mask["rows"] = weakref.ref(mask), mask._version, window, sinks, found
    return found


_last_mask: dict[str, Any] = {}


def far_triton(q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, *, window: int, sinks: int = 0) -> tuple[Tensor, Tensor]:
    """The far term of every query, as `far_chunked` gives it: value (B, H, T, V) and log n (B, H, T), differentiable.

    The value is 0 and log n is -inf where a query has no far side. Rows hold their real tokens first.
    """
    rows = rows_of_batch(q.shape[0], q.shape[2], window, sinks, q.device)
    out, stats = _apply(q, k, v, mixer, None, rows, window, sinks, "far", 1.0)
    return out.to(accumulation_dtype(q)), stats[0]


def near_far_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    mixer: Mixer | None,
    mix_logit: Tensor | None,
    *,
    window: int,
    mix: str,
    scale: float | None,
    start: int | Tensor,
    state: State | None,
    keep: int | Tensor,
    total: Tensor,
    only_state: bool = False,
) -> tuple[Tensor, State | None, State | None]:
    """`near_far_rows` of `chunked`, without gradient: the outputs of all tokens, and the states before chunk `keep` and
    a chunk earlier.

    Arguments as there; total (B,): the tokens of each row. only_state computes nothing else, and returns q for outputs.
    """
    batch, _, length, _ = q.shape
    sinks = sink_k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    like = torch.zeros_like(total, dtype=torch.int32)
    first_chunk, kept = ((x if isinstance(x, Tensor) else like + x).int() for x in (start // window, keep))
    rows = rows_of_lengths(
        torch.arange(batch, dtype=torch.int32, device=q.device), like, total.int(), window=window, sinks=sinks,
        count=batch * (length // window), padded=True, start=first_chunk, keep=kept,
    )  # fmt: skip
    kind, query_features, key_features = features_of(mixer, q, k)
    mix_logit = _log_odds(q, mixer, mix_logit)
    problem = Problem(window, sinks, mix, kind, scale)
    initial = None if state is None else (state.s.contiguous(), state.z.contiguous())
    if only_state:
        out, states = q, far_states(q, k, v, query_features, key_features, rows, problem, initial)
    else:
        out, _, states = near_far_forward(
            q, k, v, sink_k, sink_v, mix_logit, query_features, key_features, rows, problem, initial
        )
    if states is None:
        return out, None, None
    s, z = states.kept, states.kept_norms
    return out, State(s[0], z[0]), State(s[1], z[1])


def _log_odds(q: Tensor, mixer: Mixer | None, mix_logit: Tensor | None) -> Tensor | None:
    """mix_logit, (H,) or (B, H, T), as the kernels take it: (B, H, T) in the accumulation dtype; None for zeros."""
    if mixer is None or mix_logit is None:
        return None
    wide = mix_logit.to(accumulation_dtype(q))
    return wide[None, :, None].expand(q.shape[:3]) if wide.ndim == 1 else wide


def _apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Mixer | None,
    mix_logit: Tensor | None,
    rows: Rows,
    window: int,
    sinks: int,
    mix: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    kind, query_features, key_features = features_of(mixer, q, k)
    return near_far_operator(
        q, k, v, mix_logit, query_features, key_features, rows.chunks, rows.sequences, rows.count, rows.padded, window,
        sinks, mix, kind, scale,
    )  # fmt: skip


# Optional outputs are empty tensors: an operator's schema has no None among its results.


@torch.library.custom_op("linearize::near_far", mutates_args=())
def near_far_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix: Tensor | None,
    query_features: Tensor | None,
    key_features: Tensor | None,
    chunks: Tensor,
    sequences: Tensor,
    count: int,
    padded: bool,
    window: int,
    sinks: int,
    mix_kind: str,
    features: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, stats) of `near_far_forward` for rows from their first token on, differentiable."""
    rows, problem = Rows(chunks, sequences, count, padded), Problem(window, sinks, mix_kind, features, scale)
    out, stats, _ = near_far_forward(q, k, v, k, v, mix, query_features, key_features, rows, problem)
    return out, stats


@near_far_operator.register_fake
def _(q, k, v, mix, query_features, key_features, chunks, sequences, count, padded, *rest):
    return empty_outputs(q, v.shape[-1], padded)


@torch.library.custom_op("linearize::near_far_backward", mutates_args=())
def _backward_operator(
    dout: Tensor,
    dtop: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix: Tensor | None,
    query_features: Tensor | None,
    key_features: Tensor | None,
    out: Tensor,
    stats: Tensor,
    chunks: Tensor,
    sequences: Tensor,
    count: int,
    padded: bool,
    window: int,
    sinks: int,
    mix_kind: str,
    features: str,
    scale: float,
    need_weights: bool,
    need_inputs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, problem = Rows(chunks, sequences, count, padded), Problem(window, sinks, mix_kind, features, scale)
    gradients = near_far_backward(
        dout, dtop, q, k, v, mix, query_features, key_features, out, stats, rows, problem, need_weights, need_inputs
    )
    return tuple(q.new_empty(0) if x is None else x for x in gradients)  # type: ignore[return-value]


@_backward_operator.register_fake
def _(
    dout, dtop, q, k, v, mix, query_features, key_features, out, stats, chunks, sequences, count, padded, window, sinks,
    mix_kind, features, scale, need_weights, need_inputs,
):  # fmt: skip
    nothing = q.new_empty(0)
    dmix = nothing if mix is None else torch.empty_like(stats[0])
    wide = accumulation_dtype(q)
    dq_features, dk_features = nothing, nothing
    if features == "given":
        dq_features, dk_features = (x.new_empty(x.shape) for x in (query_features, key_features))
    elif features == "hedgehog" and need_weights:
        dq_features, dk_features = (x.new_empty(x.shape, dtype=wide) for x in (query_features, key_features))
    inputs = (torch.empty_like(x) if need_inputs else nothing for x in (q, k, v))
    return *inputs, dmix, dq_features, dk_features


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mix, query_features, key_features, chunks, sequences, *rest = inputs
    out, stats = output
    ctx.save_for_backward(q, k, v, mix, query_features, key_features, out, stats, chunks, sequences)
    ctx.rest = rest


def _differentiate(ctx: Any, dout: Tensor | None, dstats: Tensor | None) -> tuple:
    q, k, v, mix, query_features, key_features, out, stats, chunks, sequences = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dtop = None
    if ctx.rest[4] == "far":
        dtop = torch.zeros_like(stats[0]) if dstats is None else dstats[0].contiguous()
    needs = any(ctx.needs_input_grad[4:6]), any(ctx.needs_input_grad[:3])
    gradients = _backward_operator(
        dout, dtop, q, k, v, mix, query_features, key_features, out, stats, chunks, sequences, *ctx.rest, *needs
    )
    inputs = (q, k, v, mix, query_features, key_features)
    gradients = [
        g.to(x.dtype) if x is not None and needed else None
        for g, x, needed in zip(gradients, inputs, ctx.needs_input_grad)
    ]
    return (*gradients, None, None, *(None for _ in ctx.rest))


near_far_operator.register_autograd(_differentiate, setup_context=_setup_context)
