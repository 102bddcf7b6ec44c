"""What attention transfer measures, streamed: softmax attention split into near and far, and the divergence of the
student's far weights from the teacher's. Both visit every key of a query once and hold one tile of queries by keys at
a time, never a T x T map.

For a query t in chunk c = t // W and keys i <= t, as in the module `reference`:

    near:  i < S  or  i >= (c - 1) W            far:  the rest, S <= i < (c - 1) W
    l_i = scale q.k_i, capped if so             f_i = phi_q.phi_k_i
    Z_near = sum_near exp l_i                   Z_far = sum_far exp l_i
    p_i = exp(l_i) / Z_far                      n = sum_far f_i

The map of the teacher is a_i = exp(l_i) / (Z_near + Z_far), of which rho = Z_near / (Z_near + Z_far) is near. That of
near-and-far attention is s_i = (1 - r) exp(l_i) / Z_near for near keys and r f_i / n for far ones, whichever mix says
what r is. By the chain rule of relative entropy

    sum_i a_i log (a_i / s_i)  =  KL(1 - rho || r)  +  (1 - rho) sum_far p_i log (p_i n / f_i)

with KL between two coins: the near keys, which both weigh alike, cancel. All of it but the last sum are numbers a
query that log-sum-exps give; `far_divergence` is that sum. KL(a || s) is the cross-entropy of the maps less the
teacher's entropy, so it is 0 where they are equal, and has the same gradient.

Rows hold their real tokens first (`pack.pack_rows`): a padded key is then in no real query's past.
Source: attention transfer by cross-entropy of maps, Zhang et al. 2024 (arXiv 2402.04347); log-sum-exps instead of
maps, flash attention (arXiv 2205.14135). Shape legend as in `chunked`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import choose_backend
from .checks import check_documents, softmax_obstacle
from .chunked import capped, near_chunked, pad_to_chunks
from .documents import Documents
from .mixers import accumulation_dtype

__all__ = ["far_divergence", "split_attention"]

QUERIES, KEYS = 64, 1024  # a tile of the PyTorch form


@torch.no_grad()
def split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logit: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal softmax attention in its two parts, each with its log-sum-exp; no gradient.

    o = rho near + (1 - rho) far with rho = sigmoid(near_lse - far_lse) is softmax attention over all keys. As each sum
    is taken by itself, a far share of e^-50 is as exact as any other.

    Args:
        q: (B, H, T, D), any float dtype; k: (B, K, T, D), v: (B, K, T, V), K divides H.
        window: W >= 1, tokens a chunk. sinks: S >= 0.
        scale: factor on q.k; None is D^(-1/2).
        soft_cap, sink_logit: as in `near_far_attention`; the sink counts as near. Not in "triton".
        documents: of these rows, each a sequence of its own; None is one a row.
        backend: "torch", "triton", or "auto": Triton for tensors on a GPU.

    Returns:
        near (B, H, T, V), near_lse (B, H, T) = log Z_near, far (B, H, T, V), far_lse (B, H, T) = log Z_far, in
        float32 (float64 for float64 inputs). Where a query has no far key, far is 0 and far_lse -inf.

    Raises:
        LinearizeError: a shape or option that does not fit, or Triton where it cannot run.
    """
    _check("split_attention", q, window, sinks, k=(k, k.shape[:2], q.shape[-1]), v=(v, k.shape[:2], None))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if documents is not None:
        check_documents(documents, q, None)
        options: dict[str, Any] = {"window": window, "sinks": sinks, "scale": scale, "backend": backend}
        options |= {"soft_cap": soft_cap, "sink_logit": sink_logit}
        parts = [split_attention(q, k, v, **options) for q, k, v in documents.split(q, k, v)]
        nears, near_lses, fars, far_lses = zip(*parts, strict=True)
        return documents.join(nears), _join(documents, near_lses), documents.join(fars), _join(documents, far_lses)
    if kernels := _kernels("split_attention", backend, q, v, obstacle=softmax_obstacle(soft_cap, sink_logit)):
        return kernels.split_attention(q, k, v, window=window, sinks=sinks, scale=scale)
    length = q.shape[2]
    if not q.numel():
        empty = q.new_empty(*q.shape[:3], v.shape[-1], dtype=accumulation_dtype(q))
        return empty, empty[..., 0], empty, empty[..., 0]
    sink_k, sink_v = k[:, :, :sinks], v[:, :, :sinks]
    q_rows, k_rows, v_rows = (pad_to_chunks(x, window) for x in (q, k, v))
    own: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sink_logit": sink_logit}
    near, near_lse = near_chunked(q_rows, k_rows, v_rows, sink_k, sink_v, window=window, **own)
    return near[:, :, :length], near_lse[:, :, :length], *_far_attention(q, k, v, window, sinks, scale, soft_cap)


def far_divergence(
    q: Tensor,
    k: Tensor,
    far_lse: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """KL of the teacher's weights of far keys from the student's, and the student's far mass; see the module.

    divergence = sum_far p_i log (p_i n / f_i),  log_mass = log n.  Differentiable in phi_q and phi_k (once); the
    teacher's side has no gradient.

    In the logarithm, f_i and the terms of n count as at least the smallest normal number, so that one forgotten key
    costs 87 nats (in float32) and not infinitely many. A key below it has no gradient from the divergence, and log n
    of a row at or below it is -inf, as in `Mixer.read`.

    Args:
        q, k, window, sinks, scale, soft_cap, documents, backend: as in `split_attention`.
        far_lse: (B, H, T) log Z_far from there. An error in it of a rounding at logits of 1e4 does no harm: weights are
            divided by their sum.
        phi_q: (B, H, T, F), phi_k: (B, K, T, F), features >= 0. In the Triton form, under 16-bit q and k, their
            products are bfloat16 ones, which moves log f_i by 2^-8 at most.

    Returns:
        divergence (B, H, T) >= 0, in nats, 0 where a query has no far key; log_mass (B, H, T), -inf there.

    Raises:
        LinearizeError: as `split_attention`.
    """
    features = phi_q.shape[-1]
    _check(
        "far_divergence",
        q,
        window,
        sinks,
        k=(k, k.shape[:2], q.shape[-1]),
        phi_q=(phi_q, q.shape[:2], features),
        phi_k=(phi_k, k.shape[:2], features),
        far_lse=(far_lse[..., None], q.shape[:2], 1),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if documents is not None:
        check_documents(documents, q, None)
        options: dict[str, Any] = {"window": window, "sinks": sinks, "scale": scale, "backend": backend}
        options["soft_cap"] = soft_cap
        parts = [
            far_divergence(q, k, lse.squeeze(-1), phi_q, phi_k, **options)
            for q, k, lse, phi_q, phi_k in documents.split(q, k, far_lse[..., None], phi_q, phi_k)
        ]
        divergence, log_mass = zip(*parts, strict=True)
        return _join(documents, divergence), _join(documents, log_mass)
    kernels = _kernels("far_divergence", backend, q, k, features, softmax_obstacle(soft_cap, None))
    q, k, far_lse = q.detach(), k.detach(), far_lse.detach()
    return _FarDivergence.apply(q, k, far_lse, phi_q, phi_k, window, sinks, scale, soft_cap, kernels)


def _join(documents: Documents, parts: Sequence[Tensor]) -> Tensor:
    """Numbers a query (n, H, L) of each bucket -> (B, H, T)."""
    return documents.join([part[..., None] for part in parts]).squeeze(-1)


class _FarDivergence(torch.autograd.Function):
    """Saves numbers a query and computes weights and features' products a second time in the backward pass.

    With e_i = exp(l_i - far_lse), L = sum_far e_i (1, up to the rounding of far_lse), p_i = e_i / L, g_i = f_i but at
    least `tiny`, and M = sum_far g_i:

        divergence = sum_far e_i (l_i - far_lse - log g_i) / L - log L + log M
        d divergence / d f_i = [f_i > tiny] (1 / M - p_i / f_i)         d log_mass / d f_i = 1 / n
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        far_lse: Tensor,
        phi_q: Tensor,
        phi_k: Tensor,
        window: int,
        sinks: int,
        scale: float,
        soft_cap: float | None,
        kernels: ModuleType | None,
    ) -> tuple[Tensor, Tensor]:
        capped_form = partial(_far_sums, soft_cap=soft_cap), partial(_far_gradients, soft_cap=soft_cap)
        ctx.form = (kernels.far_sums, kernels.far_gradients) if kernels else capped_form
        ctx.options = {"window": window, "sinks": sinks, "scale": scale}
        tiny = torch.finfo(accumulation_dtype(q)).tiny
        # Without far keys far_lse is -inf, which no difference is taken of.
        shift = far_lse.masked_fill(far_lse == -torch.inf, 0.0)
        total, moment, mass, bounded_mass = ctx.form[0](q, k, shift, phi_q, phi_k, **ctx.options)
        some = total > 0
        safe = torch.where(some, total, 1.0)
        divergence = moment / safe - safe.log() + torch.where(some, bounded_mass, 1.0).log()
        log_mass = torch.where(mass > tiny, mass.clamp_min(tiny).log(), -torch.inf)
        ctx.save_for_backward(q, k, shift, phi_q, phi_k, total, mass, bounded_mass)
        return divergence, log_mass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_divergence, grad_log_mass = gradients
        q, k, shift, phi_q, phi_k, total, mass, bounded_mass = ctx.saved_tensors
        tiny = torch.finfo(total.dtype).tiny
        some = total > 0
        # d loss / d f_i = [f_i > tiny] (even - sharp e_i / f_i) + share
        sharp = torch.where(some, grad_divergence / torch.where(some, total, 1.0), 0.0)
        even = torch.where(some, grad_divergence / torch.where(some, bounded_mass, 1.0), 0.0)
        share = torch.where(mass > tiny, grad_log_mass / mass.clamp_min(tiny), 0.0)
        grad_q, grad_k = ctx.form[1](q, k, shift, phi_q, phi_k, sharp, even, share, **ctx.options)
        return None, None, None, grad_q.to(phi_q.dtype), grad_k.to(phi_k.dtype), None, None, None, None, None


def _far_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """The far half of `split_attention`, by online softmax over tiles."""
    dtype = accumulation_dtype(q)
    queries = (q.to(dtype) * scale).unflatten(1, (k.shape[1], -1))
    keys, values = k.to(dtype).transpose(-1, -2), v.to(dtype)
    out = queries.new_zeros(*queries.shape[:-1], v.shape[-1])
    top = queries.new_full((*queries.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(top)
    for rows, far, edge, hidden in _far_tiles(q.shape[2], window, sinks, q.device):
        part = queries[:, :, :, rows]
        logits = capped((part.flatten(2, 3) @ keys[..., far]).unflatten(2, part.shape[2:4]), soft_cap)
        logits[..., edge:].masked_fill_(hidden, -torch.inf)
        old_top = top[:, :, :, rows]
        new_top = torch.maximum(old_top, logits.amax(-1, keepdim=True))
        shift = new_top.masked_fill(new_top == -torch.inf, 0.0)  # a query may have no far key yet
        weights = logits.sub_(shift).exp_()
        shrink = (old_top - shift).exp_()
        total[:, :, :, rows] = total[:, :, :, rows] * shrink + weights.sum(-1, keepdim=True)
        value = (weights.flatten(2, 3) @ values[:, :, far]).unflatten(2, part.shape[2:4])
        out[:, :, :, rows] = out[:, :, :, rows] * shrink + value
        top[:, :, :, rows] = new_top
    out /= torch.where(total > 0, total, 1.0)
    return out.flatten(1, 2), (top + total.log()).squeeze(-1).flatten(1, 2)


def _far_sums(
    q: Tensor,
    k: Tensor,
    shift: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every query (B, H, T), over its far keys: sum e_i, sum e_i (l_i - shift - log g_i), sum f_i, sum g_i."""
    tiny = torch.finfo(accumulation_dtype(q)).tiny
    sums = torch.zeros(4, *q.shape[:3], dtype=accumulation_dtype(q), device=q.device)
    grouped = sums.unflatten(2, (k.shape[1], -1))
    for rows, _, edge, hidden, logits, mass in _far_products(q, k, shift, phi_q, phi_k, window, sinks, scale, soft_cap):
        weights, bounded = logits.exp(), mass.clamp_min(tiny)
        logits -= bounded.log()
        for x in (weights, mass, bounded):
            x[..., edge:].masked_fill_(hidden, 0.0)
        grouped[0, :, :, :, rows] += weights.sum(-1)
        grouped[1, :, :, :, rows] += weights.mul_(logits).sum(-1)
        grouped[2, :, :, :, rows] += mass.sum(-1)
        grouped[3, :, :, :, rows] += bounded.sum(-1)
    return sums[0], sums[1], sums[2], sums[3]


def _far_gradients(
    q: Tensor,
    k: Tensor,
    shift: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    sharp: Tensor,
    even: Tensor,
    share: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """sum_i w_ti phi_k_i (B, H, T, F) and sum_t w_ti phi_q_t (B, K, T, F).

    w_ti = [f_ti > tiny] (even_t - sharp_t e_ti / f_ti) + share_t for far keys i of query t.
    """
    dtype = accumulation_dtype(q)
    tiny = torch.finfo(dtype).tiny
    kv_heads = k.shape[1]
    features_q, features_k = phi_q.to(dtype).unflatten(1, (kv_heads, -1)), phi_k.to(dtype)
    sharp, even, share = (x.unflatten(1, (kv_heads, -1))[..., None] for x in (sharp, even, share))
    grad_q, grad_k = torch.zeros_like(features_q), torch.zeros_like(features_k)
    products = _far_products(q, k, shift, phi_q, phi_k, window, sinks, scale, soft_cap)
    for rows, far, edge, hidden, logits, mass in products:
        none = mass <= tiny
        weights = logits.exp_().div_(mass.clamp_min_(tiny)).mul_(-sharp[:, :, :, rows]).add_(even[:, :, :, rows])
        weights.masked_fill_(none, 0.0).add_(share[:, :, :, rows])
        weights[..., edge:].masked_fill_(hidden, 0.0)
        weights = weights.flatten(2, 3)
        grad_q[:, :, :, rows] += (weights @ features_k[:, :, far]).unflatten(2, (-1, rows.stop - rows.start))
        grad_k[:, :, far] += weights.transpose(-1, -2) @ features_q[:, :, :, rows].flatten(2, 3)
    return grad_q.flatten(1, 2), grad_k


def _far_products(
    q: Tensor,
    k: Tensor,
    shift: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    window: int,
    sinks: int,
    scale: float,
    soft_cap: float | None,
) -> Iterator[tuple[slice, slice, int, Tensor, Tensor, Tensor]]:
    """`_far_tiles`, each with its l_i - shift and f_i, (B, K, G, rows, keys), hidden keys included."""
    dtype = accumulation_dtype(q)
    kv_heads = k.shape[1]
    queries = (q.to(dtype) * scale).unflatten(1, (kv_heads, -1))
    features = phi_q.to(dtype).unflatten(1, (kv_heads, -1))
    shifts = shift.to(dtype).unflatten(1, (kv_heads, -1))[..., None]
    keys, key_features = (x.to(dtype).transpose(-1, -2) for x in (k, phi_k))
    for rows, far, edge, hidden in _far_tiles(q.shape[2], window, sinks, q.device):
        shape = queries.shape[2], rows.stop - rows.start
        logits = capped((queries[:, :, :, rows].flatten(2, 3) @ keys[..., far]).unflatten(2, shape), soft_cap)
        mass = (features[:, :, :, rows].flatten(2, 3) @ key_features[..., far]).unflatten(2, shape)
        yield rows, far, edge, hidden, logits.sub_(shifts[:, :, :, rows]), mass


def _far_tiles(
    length: int, window: int, sinks: int, device: torch.device
) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """Tiles of queries and far keys: both, how many of the tile's keys all of its queries have among their far ones,
    and which of its others each has not, (queries, keys) bool.
    """
    for first in range(0, length, QUERIES):
        last = min(first + QUERIES, length)
        border = (torch.arange(first, last, device=device) // window - 1)[:, None] * window
        begin, end = (max((t // window - 1) * window, sinks) for t in (first, last - 1))
        for key in range(sinks, end, KEYS):
            key_end = min(key + KEYS, end)
            edge = min(max(begin, key), key_end)
            yield (
                slice(first, last),
                slice(key, key_end),
                edge - key,
                torch.arange(edge, key_end, device=device) >= border,
            )


def _kernels(
    name: str, backend: str, q: Tensor, v: Tensor, num_features: int = 0, obstacle: str | None = None
) -> ModuleType | None:
    """The module of the Triton form, or None for the PyTorch form."""
    if backend == "reference":
        from linearize.errors import LinearizeError

        raise LinearizeError(f"{name}: backend 'reference' has no streamed form; use 'auto', 'torch' or 'triton'")
    # Nothing to do needs no kernel.
    if not q.numel() or choose_backend(backend, q, v, num_features, obstacle) == "torch":
        return None
    from . import triton_transfer

    return triton_transfer


def _check(name: str, q: Tensor, window: int, sinks: int, **tensors: tuple[Tensor, Any, int | None]) -> None:
    """A kernel reads where it is told to: what does not fit is refused first."""
    from linearize.errors import LinearizeError

    def need(fits: bool, message: str) -> None:
        if not fits:
            raise LinearizeError(f"{name}: {message}")

    need(window >= 1, f"window {window} is below 1; use at least 1")
    need(sinks >= 0, f"sinks {sinks} is below 0; use 0 for none")
    need(q.ndim == 4, f"q has shape {tuple(q.shape)}; it needs 4 dimensions (batch, heads, tokens, size)")
    for key, (x, heads, size) in tensors.items():
        wanted = (*heads, q.shape[2]) if size is None else (*heads, q.shape[2], size)
        need(
            x.ndim == 4 and x.shape[0] == q.shape[0] and x.shape[: len(wanted)] == wanted,
            f"{key} has shape {tuple(x.shape)}; it needs {wanted}{'' if size else ' and a size'}",
        )
        need(
            key not in ("k", "v") or x.dtype == q.dtype,
            f"{key} is {x.dtype} but q is {q.dtype}; convert them to one dtype",
        )
        need(x.device == q.device, f"{key} is on {x.device} but q is on {q.device}; move them to one device")
    kv_heads = tensors["k"][0].shape[1]
    need(
        kv_heads > 0 and q.shape[1] % kv_heads == 0,
        f"{q.shape[1]} query heads are no multiple of {kv_heads} key heads; k needs a divisor of {q.shape[1]}",
    )
