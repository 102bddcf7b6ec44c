"""The public functions of near-and-far attention: every check, and the choice of a backend."""

from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS, choose_backend
from .chunked import far_chunked, near_far_chunked
from .mixers import Mixer, state_obstacle
from .pack import join_documents, split_documents
from .reference import near_far_reference

__all__ = ["BACKENDS", "far_read", "near_far_attention"]

MIXES = ("normalizer", "gate")


def near_far_attention(
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
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention, exact over a near window and sinks, compressed over everything older.

    o_t = (1 - r_t) o_near_t + r_t o_far_t; the module `reference` has every term.

    Args:
        q: (B, H, T, D) queries, any float dtype, any strides.
        k: (B, K, T, D) keys; K divides H, and H / K query heads share a key head (never repeated in memory).
        v: (B, K, T, V) values.
        mixer: the far side's feature map and state, or None for window + sinks only.
        mix_logit: log-odds added to the far side: (H,), one a head, or (B, H, T), one a head and query. None is 0.
        window: W >= 1. A query sees its own chunk of W tokens and the one before exactly.
        sinks: S >= 0 first tokens that every query sees exactly.
        mix: "normalizer" (one softmax denominator) or "gate" (r = sigmoid(mix_logit)).
        scale: factor on q.k; None is D^(-1/2).
        mask: (B, T), true (or 1) for real tokens; None is all real. Padding may stand anywhere; outputs there are 0.
        cu_seqlens: (N + 1,) integers 0 = c_0 <= ... <= c_N = T: N documents end to end in one row (B = 1), each a
            sequence of its own. Not together with `mask`.
        backend: "reference" (the formula, T x T), "torch" (chunks), "triton" (a GPU; D and V up to 256, F up to 512),
            or "auto": "triton" on a GPU that can, "torch" elsewhere.

    Returns:
        (B, H, T, V) in q's dtype. Sums, exponentials and the state are float32 (float64 for float64 inputs). An empty
        batch gives an empty result. A NaN or infinity in a token reaches outputs of its own sequence from the start of
        the token's chunk on, and no others; in a padding token it reaches none.

    Raises:
        LinearizeError: a shape, dtype or option that does not fit, or a backend that cannot run here, with its value.
    """
    if not torch.compiler.is_compiling():  # messages would need values of what is a symbol there
        _check(q, k, v, mixer, mix_logit, window, sinks, mix, mask, backend)
        _check_documents(cu_seqlens, q, mask)
    if not q.shape[0]:
        return q[..., :1].expand(*q.shape[:3], v.shape[-1]).clone()
    chosen = choose_backend(backend, q, v, 0 if mixer is None else mixer.num_features, state_obstacle(mixer))
    options: dict[str, Any] = {"window": window, "sinks": sinks, "mix": mix, "scale": scale}
    if chosen == "triton":
        from .triton_operators import near_far_triton

        return near_far_triton(q, k, v, mixer, mix_logit, **options, mask=mask, cu_seqlens=cu_seqlens)
    if mask is not None and not torch.compiler.is_compiling() and bool(mask.all()):
        mask = None
    form = near_far_reference if chosen == "reference" else near_far_chunked
    if cu_seqlens is None:
        return form(q, k, v, mixer, mix_logit, **options, mask=mask)
    if mix_logit is not None and mix_logit.ndim == 3:
        mix_logit = split_documents(cu_seqlens, mix_logit[..., None])[0].squeeze(-1)
    q, k, v, own = split_documents(cu_seqlens, q, k, v)
    return join_documents(own, form(q, k, v, mixer, mix_logit, **options, mask=own))


def far_read(
    q: Tensor, k: Tensor, v: Tensor, mixer: Mixer, *, window: int, sinks: int = 0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The far side alone: o_far = phi_q S / n and log n of every query, differentiable.

    Args:
        q, k, v: as in `near_far_attention`; T is a multiple of W, and rows hold their real tokens first.
        mixer, window, sinks: as there.
        backend: "torch", "triton" or "auto".

    Returns:
        (B, H, T, V) and (B, H, T), float32 (float64 for float64 inputs). log n is -inf where a query has no far side;
        the value there is finite.

    Raises:
        LinearizeError: as `near_far_attention`; or T that is no multiple of W.
    """
    _check(q, k, v, mixer, None, window, sinks, "normalizer", None, backend)
    if q.shape[2] % window:
        from linearize.errors import LinearizeError

        raise LinearizeError(f"far_read: {q.shape[2]} tokens are no multiple of window {window}; pad them to one")
    if backend == "reference":
        from linearize.errors import LinearizeError

        raise LinearizeError("far_read: backend 'reference' has no far side of its own; use 'torch'")
    if choose_backend(backend, q, v, mixer.num_features, state_obstacle(mixer)) == "triton":
        from .triton_operators import far_triton

        return far_triton(q, k, v, mixer, window=window, sinks=sinks)
    return far_chunked(q, k, v, mixer, window=window, sinks=sinks)[:2]


def _check(q, k, v, mixer, mix_logit, window, sinks, mix, mask, backend) -> None:
    # Imported here because `linearize` is above the kernels: only its exception is shared.
    from linearize.errors import LinearizeError

    def need(fits: bool, message: str) -> None:
        if not fits:
            raise LinearizeError(f"near_far_attention: {message}")

    for name, x in (("q", q), ("k", k), ("v", v)):
        need(x.ndim == 4, f"{name} has shape {tuple(x.shape)}; it needs 4 dimensions (batch, heads, tokens, size)")
        need(x.is_floating_point(), f"{name} is {x.dtype}; convert it to a float dtype")
        need(x.dtype == q.dtype, f"{name} is {x.dtype} but q is {q.dtype}; convert them to one dtype")
        need(x.device == q.device, f"{name} is on {x.device} but q is on {q.device}; move them to one device")
        need(x.shape[0] == q.shape[0], f"{name} has batch {x.shape[0]} but q has {q.shape[0]}; make them equal")
        need(x.shape[2] == q.shape[2], f"{name} has {x.shape[2]} tokens but q has {q.shape[2]}; make them equal")
    need(k.shape[1] == v.shape[1], f"k has {k.shape[1]} heads but v has {v.shape[1]}; make them equal")
    need(
        k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
        f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads; k and v need a divisor of {q.shape[1]}",
    )
    need(q.shape[3] == k.shape[3], f"q has head size {q.shape[3]} but k has {k.shape[3]}; make them equal")
    need(q.shape[2] > 0, "0 tokens; give at least 1")
    need(window >= 1, f"window {window} is below 1; use at least 1")
    need(sinks >= 0, f"sinks {sinks} is below 0; use 0 for none")
    need(mix in MIXES, f"mix {mix!r} is unknown; known: {', '.join(MIXES)}")
    need(backend in BACKENDS, f"backend {backend!r} is unknown; known: {', '.join(BACKENDS)}")
    need(
        mix_logit is None or mix_logit.shape in ((q.shape[1],), q.shape[:3]),
        f"mix_logit has shape {None if mix_logit is None else tuple(mix_logit.shape)}; it needs ({q.shape[1]},), one a "
        f"query head, or {tuple(q.shape[:3])}, one a head and query",
    )
    need(
        mask is None or not mask.is_floating_point(),
        f"mask is {None if mask is None else mask.dtype}; give a boolean or integer mask, true for real tokens",
    )
    need(
        mixer is None or isinstance(mixer, Mixer),
        f"mixer is a {type(mixer).__name__}; give a Mixer, such as Hedgehog(heads, kv_heads, head_dim), or None",
    )
    need(
        mask is None or mask.shape == (q.shape[0], q.shape[2]),
        f"mask has shape {None if mask is None else tuple(mask.shape)}; it needs {(q.shape[0], q.shape[2])}",
    )


def _check_documents(cu_seqlens: Tensor | None, q: Tensor, mask: Tensor | None) -> None:
    from linearize.errors import LinearizeError

    if cu_seqlens is None:
        return
    if mask is not None:
        raise LinearizeError("near_far_attention: mask and cu_seqlens are both given; give the one that applies")
    if q.shape[0] != 1:
        raise LinearizeError(
            f"near_far_attention: cu_seqlens goes with batch 1, not {q.shape[0]}; lay the documents end to end"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise LinearizeError(
            f"near_far_attention: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it needs "
            "(N + 1,) integers for N >= 1 documents"
        )
    if cu_seqlens.device != q.device:
        raise LinearizeError(
            f"near_far_attention: cu_seqlens is on {cu_seqlens.device} but q is on {q.device}; move it there"
        )
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != q.shape[2] or borders != sorted(borders):
        raise LinearizeError(
            f"near_far_attention: cu_seqlens runs from {borders[0]} to {borders[-1]}; it must rise from 0 to the "
            f"{q.shape[2]} tokens without falling"
        )
