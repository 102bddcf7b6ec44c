"""The public function of near-and-far attention: every check, and the choice of a backend."""

from torch import Tensor

from .chunked import near_far_chunked
from .mixers import Mixer
from .reference import near_far_reference

__all__ = ["BACKENDS", "near_far_attention"]

BACKENDS = ("auto", "reference", "torch", "triton")
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
    backend: str = "auto",
) -> Tensor:
    """Causal attention, exact over a near window and sinks, compressed over everything older.

    o_t = (1 - r_t) o_near_t + r_t o_far_t; the module `reference` has every term.

    Args:
        q: (B, H, T, D) queries, any float dtype.
        k: (B, K, T, D) keys; K divides H, and H / K query heads share a key head (never repeated in memory).
        v: (B, K, T, V) values.
        mixer: the far side's feature map and state, or None for window + sinks only.
        mix_logit: log-odds added to the far side: (H,), one a head, or (B, H, T), one a head and query. None is 0.
        window: W >= 1. A query sees its own chunk of W tokens and the one before exactly.
        sinks: S >= 0 first tokens that every query sees exactly.
        mix: "normalizer" (one softmax denominator) or "gate" (r = sigmoid(mix_logit)).
        scale: factor on q.k; None is D^(-1/2).
        mask: (B, T), true (or 1) for real tokens; None is all real. Padding may stand anywhere; outputs there are 0.
        backend: "reference" (the formula, T x T), "torch" (chunks), "triton", or "auto".

    Returns:
        (B, H, T, V) in q's dtype. Sums, exponentials and the state are float32 (float64 for float64 inputs).

    Raises:
        LinearizeError: a shape, dtype or option that does not fit, with its value.
        NotImplementedError: backend="triton", which has no kernels yet.
    """
    _check(q, k, v, mixer, mix_logit, window, sinks, mix, mask, backend)
    if backend == "triton":
        raise NotImplementedError(
            "backend: 'triton' has no near-and-far kernels yet; use backend='auto' or 'torch', which runs on any device"
        )
    form = near_far_reference if backend == "reference" else near_far_chunked
    if mask is not None and bool(mask.all()):
        mask = None
    return form(q, k, v, mixer, mix_logit, window=window, sinks=sinks, mix=mix, scale=scale, mask=mask)


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
