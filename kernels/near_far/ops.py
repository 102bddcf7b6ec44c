"""The public functions of near-and-far attention: every check, and the choice of a backend."""

from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS, choose_backend
from .checks import check_documents, check_inputs, check_softmax, softmax_obstacle
from .chunked import far_chunked, near_far_chunked, pad_to_chunks
from .documents import Documents, lay_out_documents
from .mixers import Mixer, Recurrent, full_precision, state_obstacle
from .reference import near_far_reference

__all__ = ["BACKENDS", "far_read", "near_far_attention"]


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
    soft_cap: float | None = None,
    sink_logit: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | Documents | None = None,
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
        mix: "normalizer" (one softmax denominator), "peak" (the same, near weights measured from the largest) or
            "gate" (r = sigmoid(mix_logit)).
        scale: factor on q.k; None is D^(-1/2).
        soft_cap: c > 0 makes near logits c tanh(scale q.k / c); None leaves them. Not in "triton".
        sink_logit: (H,), a learned sink: one more near logit a head, which has no value; None is none. Not in "triton".
        mask: (B, T), true (or 1) for real tokens; None is all real. Padding may stand anywhere; outputs there are 0.
        cu_seqlens: (N + 1,) integers 0 = c_0 <= ... <= c_N = T: N documents end to end in one row (B = 1), each a
            sequence of its own; or `Documents`, in any number of rows. Not together with `mask`.
        backend: "reference" (the formula, T x T), "torch" (chunks), "triton" (a GPU; D and V up to 256, F up to 512),
            or "auto": "triton" on a GPU that can, "torch" elsewhere.

    Returns:
        (B, H, T, V) in q's dtype. Sums, exponentials and the state are float32 (float64 for float64 inputs). An empty
        batch gives an empty result. A NaN or infinity in a token reaches outputs of its own sequence from the start of
        the token's chunk on, and no others; in a padding token it reaches none. From the state of a `Recurrent` mixer
        it also reaches the documents after it in its row, as 0 times NaN is NaN.

    Raises:
        LinearizeError: a shape, dtype or option that does not fit, or a backend that cannot run here, with its value.
    """
    options: dict[str, Any] = {"window": window, "sinks": sinks, "mix": mix, "scale": scale}
    softmax: dict[str, Any] = {"soft_cap": soft_cap, "sink_logit": sink_logit}
    if isinstance(mixer, Recurrent):
        from .recurrent import recurrent_attention

        given: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "backend": backend}
        return recurrent_attention(q, k, v, mixer, mix_logit, **options, **softmax, **given)
    if not torch.compiler.is_compiling():  # messages would need values of what is a symbol there
        check_inputs(q, k, v, mixer, mix_logit, window, sinks, mix, mask, backend)
        check_softmax(q, soft_cap, sink_logit, "near_far_attention")
        check_documents(cu_seqlens, q, mask)
    if not q.shape[0]:
        return q[..., :1].expand(*q.shape[:3], v.shape[-1]).clone()
    obstacle = state_obstacle(mixer, mix) or softmax_obstacle(soft_cap, sink_logit)
    chosen = choose_backend(backend, q, v, 0 if mixer is None else mixer.num_features, obstacle)
    with full_precision(q):
        return _attend(chosen, q, k, v, mixer, mix_logit, mask, cu_seqlens, options, softmax)


def _attend(
    chosen: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Mixer | None,
    mix_logit: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | Documents | None,
    options: dict[str, Any],
    softmax: dict[str, Any],
) -> Tensor:
    """By the chosen backend."""
    if chosen == "triton":
        from .triton_operators import near_far_triton

        return near_far_triton(q, k, v, mixer, mix_logit, **options, mask=mask, cu_seqlens=cu_seqlens)
    if mask is not None and not torch.compiler.is_compiling() and bool(mask.all()):
        mask = None
    form = near_far_reference if chosen == "reference" else near_far_chunked
    options = options | softmax
    if cu_seqlens is None:
        return form(q, k, v, mixer, mix_logit, **options, mask=mask)
    documents = cu_seqlens
    if not isinstance(documents, Documents):
        documents = lay_out_documents(documents.tolist(), q.shape[0], q.shape[2], q.device)
    parts = documents.split(q, k, v)
    logits: list[Tensor | None] = [mix_logit] * len(parts)
    if mix_logit is not None and mix_logit.ndim == 3:
        logits = [x.squeeze(-1) for (x,) in documents.split(mix_logit[..., None])]
    outs = [form(q, k, v, mixer, logit, **options) for (q, k, v), logit in zip(parts, logits, strict=True)]
    return documents.join(outs)


def far_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Mixer,
    *,
    window: int,
    sinks: int = 0,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The far side alone: o_far = phi_q S / n and log n of every query, differentiable.

    Args:
        q, k, v: as in `near_far_attention`; T is a multiple of W, and rows hold their real tokens first.
        mixer, window, sinks: as there.
        documents: of these rows, each a sequence of its own; then T is any.
        backend: "torch", "triton" or "auto".

    Returns:
        (B, H, T, V) and (B, H, T), float32 (float64 for float64 inputs). log n is -inf where a query has no far side;
        the value there is finite.

    Raises:
        LinearizeError: as `near_far_attention`; or T that is no multiple of W.
    """
    check_inputs(q, k, v, mixer, None, window, sinks, "normalizer", None, backend)
    if isinstance(mixer, Recurrent):
        from linearize.errors import LinearizeError

        raise LinearizeError(
            f"far_read: {type(mixer).__name__} has near tokens in its state as well, so there is no far side to read; "
            "attention transfer is for mixers that hold the far side alone, such as hedgehog"
        )
    if documents is not None:
        check_documents(documents, q, None)
        fars, masses = [], []
        for rows in documents.split(q, k, v):
            q, k, v = (pad_to_chunks(x, window) for x in rows)
            far, log_mass = far_read(q, k, v, mixer, window=window, sinks=sinks, backend=backend)
            length = rows[0].shape[2]
            fars.append(far[:, :, :length])
            masses.append(log_mass[:, :, :length, None])
        return documents.join(fars), documents.join(masses).squeeze(-1)
    if q.shape[2] % window:
        from linearize.errors import LinearizeError

        raise LinearizeError(f"far_read: {q.shape[2]} tokens are no multiple of window {window}; pad them to one")
    if backend == "reference":
        from linearize.errors import LinearizeError

        raise LinearizeError("far_read: backend 'reference' has no far side of its own; use 'torch'")
    chosen = choose_backend(backend, q, v, mixer.num_features, state_obstacle(mixer))
    with full_precision(q):
        if chosen == "triton":
            from .triton_operators import far_triton

            return far_triton(q, k, v, mixer, window=window, sinks=sinks)
        return far_chunked(q, k, v, mixer, window=window, sinks=sinks)[:2]
