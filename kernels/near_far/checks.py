"""Every check of the public functions: an error that names the value, the limit and the way out."""

import torch
from torch import Tensor

from ..backends import BACKENDS
from .documents import Documents
from .mixers import Mixer

__all__ = ["MIXES", "check_documents", "check_inputs", "check_softmax", "softmax_obstacle"]

MIXES = ("normalizer", "gate", "peak")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Mixer | None,
    mix_logit: Tensor | None,
    window: int,
    sinks: int,
    mix: str,
    mask: Tensor | None,
    backend: str,
    function: str = "near_far_attention",
) -> None:
    """Every check of a call; `function` is named in the message."""
    # Imported here because `linearize` is above the kernels: only its exception is shared.
    from linearize.errors import LinearizeError

    def need(fits: bool, message: str) -> None:
        if not fits:
            raise LinearizeError(f"{function}: {message}")

    for name, x in (("q", q), ("k", k), ("v", v)):
        need(x.ndim == 4, f"{name} has shape {tuple(x.shape)}; it needs 4 dimensions (batch, heads, tokens, size)")
        need(x.is_floating_point(), f"{name} is {x.dtype}; convert it to a float dtype")
        need(x.dtype in DTYPES, f"{name} is {x.dtype}; convert it to float32, bfloat16, float16 or float64")
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
    others: dict[str, Tensor | None] = {"mask": mask, "mix_logit": mix_logit}
    if mixer is not None:
        obstacle = mixer.obstacle(q.shape[1], k.shape[1], q.shape[3])
        need(obstacle is None, f"mixer {type(mixer).__name__} {obstacle}")
        others["the mixer"] = next(mixer.parameters(), None)
    for name, other in others.items():
        need(
            other is None or other.device == q.device,
            f"{name} is on {None if other is None else other.device} but q is on {q.device}; move them to one device",
        )
    need(
        mask is None or mask.shape == (q.shape[0], q.shape[2]),
        f"mask has shape {None if mask is None else tuple(mask.shape)}; it needs {(q.shape[0], q.shape[2])}",
    )


def check_softmax(q: Tensor, soft_cap: float | None, sink_logit: Tensor | None, function: str) -> None:
    """Every check of the two, for queries (B, H, T, D)."""
    from linearize.errors import LinearizeError

    if soft_cap is not None and not soft_cap > 0:
        raise LinearizeError(f"{function}: soft_cap {soft_cap} is not above 0; use None for no cap")
    if sink_logit is not None and (sink_logit.shape != q.shape[1:2] or sink_logit.device != q.device):
        raise LinearizeError(
            f"{function}: sink_logit has shape {tuple(sink_logit.shape)} on {sink_logit.device}; it needs "
            f"({q.shape[1]},), one a query head, on {q.device}"
        )


def softmax_obstacle(soft_cap: float | None, sink_logit: Tensor | None) -> str | None:
    """What keeps the Triton kernels from such a softmax, in words; None where nothing does."""
    if soft_cap is not None:
        return "they know no soft cap of logits"
    return None if sink_logit is None else "they know no learned sinks"


def check_documents(cu_seqlens: Tensor | Documents | None, q: Tensor, mask: Tensor | None) -> None:
    """Every check of `cu_seqlens`; looks at the values of a tensor."""
    from linearize.errors import LinearizeError

    if cu_seqlens is None:
        return
    if mask is not None:
        raise LinearizeError("near_far_attention: mask and cu_seqlens are both given; give the one that applies")
    if isinstance(cu_seqlens, Documents):
        if cu_seqlens.positions.shape != q.shape[::2]:
            raise LinearizeError(
                f"near_far_attention: the documents are those of {tuple(cu_seqlens.positions.shape)} tokens and q has "
                f"{tuple(q.shape[::2])}; lay them out for these rows"
            )
        if cu_seqlens.positions.device != q.device:
            raise LinearizeError(
                f"near_far_attention: the documents are on {cu_seqlens.positions.device} but q is on {q.device}; move "
                "them there"
            )
        return
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
