"""States that decay or follow the delta rule, at the borders of chunks, and the ops that read them at every token: in
PyTorch on any device, or by flash-linear-attention's Triton kernels on a GPU.

    decayed   S_t = a_h S_{t-1} + k_t v_t^T                                     one decay a head (or a head and token)
    gated     S_t = diag(a_t) S_{t-1} + k_t v_t^T                               one decay a feature and token
    delta     S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T             gated delta rule

Shape legend: B batch, H query heads, K key-value heads (G = H / K share one), T tokens, F features of q and k, V of v,
W tokens a chunk, N = ceil(T / W) chunks. Decays are given as natural logarithms (a = exp(log_decay), log_decay <= 0);
-inf empties the state. All forms sum in float32 (float64 under float64 inputs).

The PyTorch forms never divide by a decay and never subtract two cumulative sums: a decay between two tokens is the
exponential of the sum of what lies between, so that log decays of -30 a token cost no digit. The delta rule is solved
a chunk at a time (WY form): with S_t = a_t S_{t-1} + k_t u_t^T, the W vectors u of a chunk are the solution of a unit
triangular system, linear in the state before the chunk.

fla's kernels take float32 products in TF32 and subtract cumulative sums inside blocks of 64 tokens: where log decays of
-30 and of -1e-4 take turns, that costs a relative error of 1e-4 in states and 1e-3 in outputs, in exact float32
products too (PyTorch forms: 1e-6). States at borders come from kernels without a gradient for them; there the gradient
is the PyTorch form's, recomputed.

Sources: Lightning Attention-2 (arXiv 2401.04658); Gated Linear Attention (arXiv 2312.06635), section 4; Gated Delta
Networks (arXiv 2412.06464), section 3; Parallelizing DeltaNet (arXiv 2406.06484), section 3. Checked against fla's
naive recurrences.
"""

import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["BACKENDS", "decayed_states", "delta_states", "gated_delta_rule", "gated_states", "gla", "simple_gla"]

BACKENDS = ("auto", "torch", "fla")
# Chunks of the forms that read every token. gla holds a (C, C, F) tensor a chunk, the others (C, C).
READ_CHUNK, GLA_READ_CHUNK = 64, 16
# fla's kernels subtract cumulative sums, where -inf would be NaN. exp(-100) is far below float32's resolution.
FLA_SMALLEST_LOG_DECAY = -100.0
FLA_DELTA_FEATURES = 256

_log = logging.getLogger("linearize")


def decayed_states(
    k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, *, chunk: int, backend: str = "auto"
) -> Tensor:
    """States before each chunk and after the last, of S_t = exp(log_decay) S_{t-1} + k_t v_t^T (lightning).

    Args:
        k: (B, K, T, F), v: (B, K, T, V), one float dtype. The last chunk may be shorter; T = 0 is allowed.
        log_decay: (K,), one a head, or (B, K, T), one a head and token; natural logarithm, <= 0.
        state: (B, K, F, V), what is known before the first token; None is zeros.
        chunk: W >= 1 tokens.
        backend: "torch"; "fla" (a GPU, no float64); "auto": fla on a GPU where it can be imported, no gradient is
            needed and TF32 loses nothing that was asked for (half precision inputs, or float32 with
            `torch.set_float32_matmul_precision` below "highest"); else PyTorch.

    Returns:
        (B, K, N + 1, F, V), float32 (float64 under float64), differentiable in every argument.

    Raises:
        LinearizeError: a shape, dtype, chunk or backend that does not fit.
    """
    _check("decayed_states", None, k, v, {"log_decay": log_decay}, state, chunk, backend, per_head=True)
    gates = (_at_tokens(log_decay, k)[..., None],)
    return _states("decayed_states", _additive_torch, _additive_fla, k, v, gates, state, chunk, backend)


def gated_states(
    k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, *, chunk: int, backend: str = "auto"
) -> Tensor:
    """States before each chunk and after the last, of S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T (GLA).

    log_decay: (B, K, T, F), natural logarithm, <= 0. Everything else as in `decayed_states`.
    """
    _check("gated_states", None, k, v, {"log_decay": log_decay}, state, chunk, backend, per_feature=True)
    return _states("gated_states", _additive_torch, _additive_fla, k, v, (log_decay,), state, chunk, backend)


def delta_states(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int,
    backend: str = "auto",
) -> Tensor:
    """States before each chunk and after the last, of the gated delta rule: the state first decays, then its answer to
    k_t moves by the fraction beta_t towards v_t.

        S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,        a_t = exp(log_decay_t)

    log_decay: (B, K, T), natural logarithm, <= 0; beta: (B, K, T), in [0, 2]. Keys are taken as they are: the state
    stays bounded where |k_t|^2 beta_t <= 2. "fla" needs F <= 256. Everything else as in `decayed_states`.
    """
    _check("delta_states", None, k, v, {"log_decay": log_decay, "beta": beta}, state, chunk, backend)
    return _states("delta_states", _delta_states_torch, _delta_fla, k, v, (log_decay, beta), state, chunk, backend)


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention with one decay a head and token: o_t = scale S_t^T q_t, S_t as in `decayed_states`.

    Args:
        q: (B, H, T, F), k: (B, K, T, F), v: (B, K, T, V), one float dtype; K divides H.
        log_decay: (K,) or (B, K, T), natural logarithm, <= 0.
        state: (B, K, F, V) before the first token; None is zeros.
        scale: factor on q; None is F^(-1/2).
        backend: as in `decayed_states`, but fla's own backward serves gradients, so "auto" takes fla for them too.
            fla has no grouped queries here: its call repeats k, v and decays for the G queries of a group.

    Returns:
        o (B, H, T, V) in q's dtype, and the state after the last token (B, K, F, V), float32 (float64 under float64).

    Raises:
        LinearizeError: a shape, dtype or backend that does not fit.
    """
    _check("simple_gla", q, k, v, {"log_decay": log_decay}, state, 1, backend, per_head=True)
    return _output("simple_gla", _simple_gla_torch, q, k, v, {"g": _at_tokens(log_decay, k)}, state, scale, backend)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gated linear attention: o_t = scale S_t^T q_t, S_t as in `gated_states`.

    log_decay: (B, K, T, F), natural logarithm, <= 0. Everything else as in `simple_gla`.
    """
    _check("gla", q, k, v, {"log_decay": log_decay}, state, 1, backend, per_feature=True)
    return _output("gla", _gla_torch, q, k, v, {"g": log_decay}, state, scale, backend)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gated delta rule, read at every token: o_t = scale S_t^T q_t, S_t as in `delta_states`.

    log_decay, beta: (B, K, T). "fla" needs F <= 256. Everything else as in `simple_gla`.
    """
    _check("gated_delta_rule", q, k, v, {"log_decay": log_decay, "beta": beta}, state, 1, backend)
    gates = {"g": log_decay, "beta": beta}
    return _output("gated_delta_rule", _gated_delta_rule_torch, q, k, v, gates, state, scale, backend)


# PyTorch, every argument in the accumulation dtype.


def _additive_torch(k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int) -> Tensor:
    """log_decay: (B, K, T, F), or (B, K, T, 1) for all features alike."""
    k, v, log_decay = (_in_chunks(x, chunk) for x in (k, v, log_decay))
    update = (k * _until_end(log_decay).exp()).transpose(-1, -2) @ v
    factor = log_decay.sum(3).exp()[..., None]
    states = [state]
    # unbind, not an index a chunk: its backward is one stack.
    for a, more in zip(factor.unbind(2), update.unbind(2)):
        states.append(torch.addcmul(more, a, states[-1]))
    return torch.stack(states, dim=2)


def _delta_states_torch(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, chunk: int) -> Tensor:
    # The triangular systems cost T W (F + V): long chunks are solved in parts of 64 tokens.
    part = READ_CHUNK if chunk % READ_CHUNK == 0 else chunk
    states, _ = _delta_torch(k, v, log_decay, beta, state, part)
    return states if part == chunk else torch.cat([states[:, :, : -1 : chunk // part], states[:, :, -1:]], dim=2)


def _delta_torch(
    k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The states at the borders, and u (B, K, N, W, V): what each token writes, S_t = a_t S_{t-1} + k_t u_t^T."""
    k, v, log_decay, beta = (_in_chunks(x, chunk) for x in (k, v, log_decay, beta))
    # u_t + b_t sum_{s<t} exp(g_{s+1} + ... + g_t) (k_t . k_s) u_s = b_t (v_t - exp(g_1 + ... + g_t) S^T k_t)
    lower = ((k @ k.transpose(-1, -2)) * _between(log_decay).exp() * beta[..., None]).tril(-1)
    right = torch.cat([v, k * log_decay.cumsum(3).exp()[..., None]], dim=-1) * beta[..., None]
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    own, from_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # u = own - from_state S
    to_end = (k * _until_end(log_decay).exp()[..., None]).transpose(-1, -2)
    factor = log_decay.sum(3).exp()[..., None, None]

    states, written = [state], [own[:, :, :0]]
    for a, keys, plain, reads in zip(*(x.unbind(2) for x in (factor, to_end, own, from_state))):
        u = plain - reads @ states[-1]
        states.append(a * states[-1] + keys @ u)
        written.append(u[:, :, None])
    return torch.stack(states, dim=2), torch.cat(written, dim=2)


def _simple_gla_torch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    states = _additive_torch(k, v, g[..., None], state, READ_CHUNK)
    k, v, g = (_in_chunks(x, READ_CHUNK) for x in (k, v, g))
    return _read_scalar(q, k, g, states, v), states[:, :, -1]


def _gated_delta_rule_torch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    states, written = _delta_torch(k, v, g, beta, state, READ_CHUNK)
    k, g = (_in_chunks(x, READ_CHUNK) for x in (k, g))
    return _read_scalar(q, k, g, states, written), states[:, :, -1]


def _read_scalar(q: Tensor, k: Tensor, log_decay: Tensor, states: Tensor, written: Tensor) -> Tensor:
    """S_t^T q_t of q (B, H, T, F), with S_t the decayed state before the chunk and the chunk's k_s written_s^T."""
    queries = _group_in_chunks(q, k)
    since = log_decay.cumsum(3).exp()[:, :, None, ..., None]
    scores = (queries @ k[:, :, None].transpose(-1, -2)) * _between(log_decay).exp()[:, :, None]
    out = (queries * since) @ states[:, :, None, :-1] + scores @ written[:, :, None]
    return out.flatten(3, 4)[:, :, :, : q.shape[2]].flatten(1, 2)


def _gla_torch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    states = _additive_torch(k, v, g, state, GLA_READ_CHUNK)
    k, v, g = (_in_chunks(x, GLA_READ_CHUNK) for x in (k, v, g))
    queries = _group_in_chunks(q, k)
    # A decay a feature does not factor out of the scores; exp(-sum) would overflow, so the pairs are written out.
    pairs = k[:, :, :, None] * _between(g).exp()  # (B, K, N, C queries, C keys, F)
    scores = torch.einsum("bhgntf,bhntsf->bhgnts", queries, pairs)
    out = (queries * g.cumsum(3).exp()[:, :, None]) @ states[:, :, None, :-1] + scores @ v[:, :, None]
    return out.flatten(3, 4)[:, :, :, : q.shape[2]].flatten(1, 2), states[:, :, -1]


def _in_chunks(x: Tensor, chunk: int, multiple: int = 1) -> Tensor:
    """(B, K, T, ...) -> (B, K, N, W, ...), W rounded up to a multiple. Zeros fill up: no key, no decay, no beta."""
    chunk = max(1, min(chunk, x.shape[2]))
    chunks = -(-x.shape[2] // chunk)
    trailing = (0, 0) * (x.ndim - 3)
    x = F.pad(x, (*trailing, 0, chunks * chunk - x.shape[2]))
    x = x.reshape(*x.shape[:2], chunks, chunk, *x.shape[3:])
    return F.pad(x, (*trailing, 0, -chunk % multiple)) if chunk % multiple else x


def _at_tokens(log_decay: Tensor, k: Tensor) -> Tensor:
    """A decay a head (K,) or a head and token (B, K, T): (B, K, T)."""
    return log_decay if log_decay.ndim == 3 else log_decay[None, :, None].expand(k.shape[:3])


def _group_in_chunks(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, T, F) for k (B, K, N, C, F): (B, K, G, N, C, F)."""
    batch, kv_heads, chunks, chunk, features = k.shape
    q = F.pad(q, (0, 0, 0, chunks * chunk - q.shape[2]))
    return q.reshape(batch, kv_heads, q.shape[1] // kv_heads, chunks, chunk, features)


def _until_end(x: Tensor) -> Tensor:
    """Sums over the later tokens of the chunk: [t] = x_{t+1} + ... + x_last. (B, K, N, W, ...), same shape."""
    later = torch.cat([x[:, :, :, 1:], torch.zeros_like(x[:, :, :, :1])], dim=3)
    return later.flip(3).cumsum(3).flip(3)


def _between(x: Tensor) -> Tensor:
    """[t, s] = x_{s+1} + ... + x_t, -inf where s > t. (B, K, N, W, ...) -> (B, K, N, W, W, ...)."""
    size = x.shape[3]
    earlier = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)
    earlier = earlier.reshape(size, size, *(1,) * (x.ndim - 4))
    spread = x.unsqueeze(4).expand(*x.shape[:4], size, *x.shape[4:])
    sums = spread.masked_fill(~earlier, 0).cumsum(3)
    return sums.masked_fill(earlier.transpose(0, 1), -torch.inf)


# fla, float32 on a GPU.


def _additive_fla(k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int) -> Tensor:
    from fla.ops.common.chunk_h import chunk_fwd_h

    block = _fla_block(chunk)
    k, v, log_decay = (_in_chunks(x, chunk, block) for x in (k, v, log_decay))
    sums = _block_sums(_to_fla(log_decay), block)
    per_head = log_decay.shape[-1] == 1
    states, last = chunk_fwd_h(
        k=_to_fla(k),
        v=_to_fla(v),
        g=sums.squeeze(-1) if per_head else None,
        gk=None if per_head else sums,
        h0=state.contiguous(),
        output_final_state=True,
        chunk_size=block,
        split_size=k.shape[3],
        states_in_fp32=True,
    )
    return torch.cat([states.transpose(1, 2), last[:, :, None]], dim=2)


def _delta_fla(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, chunk: int) -> Tensor:
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra

    block = _fla_block(chunk)
    k, v, log_decay, beta = (_in_chunks(x, chunk, block) for x in (k, v, log_decay, beta))
    blocks = k.shape[3] // block  # a chunk
    k, v, log_decay, beta = (_to_fla(x) for x in (k, v, log_decay, beta))
    sums = _block_sums(log_decay, block)
    w, u, _ = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=sums, beta=beta, chunk_size=block)
    states, _, last = chunk_gated_delta_rule_fwd_h(
        k=k,
        w=w,
        u=u,
        g=sums,
        initial_state=state.contiguous(),
        output_final_state=True,
        chunk_size=block,
        save_new_value=False,
    )
    return torch.cat([states[:, ::blocks].transpose(1, 2), last[:, :, None]], dim=2)


def _fla_block(chunk: int) -> int:
    """Tokens that fla handles at once: 16, 32 or 64. A chunk is filled up to a multiple of it."""
    return next((block for block in (16, 32) if chunk <= block), 64)


def _to_fla(x: Tensor) -> Tensor:
    """(B, K, N, W, ...) -> fla's (B, N W, K, ...), contiguous."""
    return x.flatten(2, 3).transpose(1, 2).contiguous()


def _block_sums(log_decay: Tensor, block: int) -> Tensor:
    """Cumulative sums inside each block of tokens, in powers of 2, as fla's kernels want them: (B, T, K, ...)."""
    log_decay = log_decay.clamp_min(FLA_SMALLEST_LOG_DECAY)
    return log_decay.unflatten(1, (-1, block)).cumsum(2).mul_(math.log2(math.e)).flatten(1, 2)


class _FlaStates(torch.autograd.Function):
    """fla's states, with the PyTorch form's gradient."""

    @staticmethod
    def forward(ctx: Any, engine: Callable, form: Callable, chunk: int, *inputs: Tensor) -> Tensor:
        ctx.form, ctx.chunk = form, chunk
        ctx.save_for_backward(*inputs)
        if not inputs[0].is_cuda:  # Triton's interpreter
            return engine(*inputs, chunk)
        with torch.cuda.device(inputs[0].device):
            return engine(*inputs, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needs)]
            states = ctx.form(*inputs, ctx.chunk)
        grads = iter(torch.autograd.grad(states, [x for x in inputs if x.requires_grad], grad))
        return None, None, None, *(next(grads) if need else None for need in needs)


# The choice, and the checks.


def _states(
    name: str,
    form: Callable,
    engine: Callable,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    state: Tensor | None,
    chunk: int,
    backend: str,
) -> Tensor:
    dtype, start = _accumulation_dtype(k), _start(k, v, state)
    inputs = [x.to(dtype) for x in (k, v, *gates, start)]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    # With a gradient fla would come on top of the PyTorch form, which the backward runs anyway.
    if _use_fla(name, k, v, backend) and not (needs_grad and backend == "auto"):
        return _FlaStates.apply(engine, form, chunk, *inputs)
    return form(*inputs, chunk)


def _output(
    name: str,
    form: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    state: Tensor | None,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype, start = _accumulation_dtype(k), _start(k, v, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not _use_fla(name, k, v, backend):
        q_scaled, *rest = (x.to(dtype) for x in (q, k, v, *gates.values(), start))
        out, last = form(q_scaled * scale, *rest)
        return out.to(q.dtype), last

    group = q.shape[1] // k.shape[1]
    gates = {key: x.float() for key, x in gates.items()}
    gates["g"] = gates["g"].clamp_min(FLA_SMALLEST_LOG_DECAY)
    shared = {key: x.repeat_interleave(group, 1).transpose(1, 2) for key, x in {"k": k, "v": v, **gates}.items()}
    start = start.repeat_interleave(group, 1).contiguous()
    arguments = {"q": q.transpose(1, 2), **shared, "scale": scale, "initial_state": start, "output_final_state": True}
    out, last = _fla_ops()[name](**arguments)
    return out.transpose(1, 2), last[:, ::group]


def _use_fla(name: str, k: Tensor, v: Tensor, backend: str) -> bool:
    """Whether fla runs; LinearizeError where it was asked for and cannot."""
    from linearize.errors import LinearizeError

    if backend == "torch" or not (k.numel() and v.numel()):
        return False  # no tokens, no heads: nothing for a kernel to do
    features, obstacle = k.shape[-1], None
    if not k.is_cuda and (backend == "auto" or not _interpreted()):
        obstacle = f"k is on {k.device}, and fla's kernels need a CUDA or ROCm device"
    elif k.dtype == torch.float64:
        obstacle = "k is torch.float64, and fla's kernels sum in float32"
    elif "delta" in name and features > FLA_DELTA_FEATURES:
        obstacle = f"k has {features} features, and fla's delta rule takes at most {FLA_DELTA_FEATURES}"
    elif backend == "auto" and k.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        obstacle = "fla would round float32 products to TF32"
    elif not _fla_ops():
        obstacle = "flash-linear-attention cannot be imported (pip install flash-linear-attention)"
    if backend == "fla" and obstacle:
        raise LinearizeError(f"{name}: backend 'fla': {obstacle}; use backend='auto' or 'torch'")
    return obstacle is None


def _interpreted() -> bool:
    """Whether Triton's interpreter runs kernels here, on the CPU."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


@lru_cache
def _fla_ops() -> dict[str, Callable]:
    """fla's ops by the names of this module; none where it cannot be imported. Imported late: it takes seconds."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        _log.warning("flash-linear-attention cannot be imported (%s): decayed states run in PyTorch", error)
        return {}
    return {"simple_gla": chunk_simple_gla, "gla": chunk_gla, "gated_delta_rule": chunk_gated_delta_rule}


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _start(k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    """The state before the first token, in the accumulation dtype."""
    dtype = _accumulation_dtype(k)
    if state is not None:
        return state.to(dtype)
    return torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=dtype, device=k.device)


def _check(
    name: str,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    state: Tensor | None,
    chunk: int,
    backend: str,
    *,
    per_head: bool = False,
    per_feature: bool = False,
) -> None:
    from linearize.errors import LinearizeError

    def need(fits: bool, message: str) -> None:
        if not fits:
            raise LinearizeError(f"{name}: {message}")

    for label, x in (("q", q), ("k", k), ("v", v)):
        if x is not None:
            need(x.ndim == 4, f"{label} has shape {tuple(x.shape)}; it needs 4 dimensions (batch, heads, tokens, size)")
    optional: dict[str, Tensor | None] = {"q": q, "k": k, "v": v, **gates, "state": state}
    given = {label: x for label, x in optional.items() if x is not None}
    for label, x in given.items():
        need(x.is_floating_point(), f"{label} is {x.dtype}; convert it to a float dtype")
        need(x.device == k.device, f"{label} is on {x.device} but k is on {k.device}; move them to one device")
    for label, x in (("q", q), ("v", v)):
        if x is not None:
            need(x.dtype == k.dtype, f"{label} is {x.dtype} but k is {k.dtype}; convert them to one dtype")

    batch, kv_heads, length, features = k.shape
    shapes: dict[str, list[tuple[int, ...]]] = {
        "v": [(batch, kv_heads, length, v.shape[3])],
        "state": [(batch, kv_heads, features, v.shape[3])],
    }
    for label in gates:
        shapes[label] = [(batch, kv_heads, length, features) if per_feature else (batch, kv_heads, length)]
        if per_head:
            shapes[label].append((kv_heads,))
    if q is not None:
        need(
            kv_heads > 0 and q.shape[1] % kv_heads == 0,
            f"{q.shape[1]} query heads are no multiple of {kv_heads} key heads; k and v need a divisor of {q.shape[1]}",
        )
        shapes["q"] = [(batch, q.shape[1], length, features)]
    for label, x in given.items():
        allowed = shapes.get(label, [tuple(k.shape)])
        fitting = " or ".join(map(str, allowed))
        need(
            tuple(x.shape) in allowed, f"{label} has shape {tuple(x.shape)}; with k {tuple(k.shape)} it needs {fitting}"
        )
    need(isinstance(chunk, int) and chunk >= 1, f"chunk {chunk!r} is no integer >= 1; use 16 to 512")
    need(backend in BACKENDS, f"backend {backend!r} is unknown; known: {', '.join(BACKENDS)}")
