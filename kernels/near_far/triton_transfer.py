"""Attention transfer in Triton: `transfer.split_attention` and the two halves of `transfer.far_divergence`.

    split_forward    a tile of queries of one head: online softmax over the far keys, then over sinks and near keys
    far_sums         a tile of queries: four sums over their far keys
    far_queries      a tile of queries: d loss / d phi_q, weights and features' products computed again
    far_keys         a tile of keys: d loss / d phi_k, over the queries of the whole KV group

Every program owns what it writes: no atomics, the same result each time. Exponentials are of differences of logits in
their own units. ACC is float32, float64 for float64 inputs; FAR, of the products of features, is the inputs' dtype,
bfloat16 for float16. Shape legend as in `chunked`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import INTERPRETER, Target
from ..launch import current_target, launch
from .mixers import accumulation_dtype
from .triton_arguments import TL_TYPES, far_dtype, last_contiguous, precision_of, strided, tile

__all__ = ["far_gradients", "far_sums", "split_attention"]


@triton.jit
def far_border(t, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """Where the far keys of query t end; they begin at SINKS."""
    return tl.maximum((t // WINDOW - 1) * WINDOW, SINKS)


@triton.jit
def load_rows(base, first, row_stride, size, there, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first .. first + BLOCK_R - 1 of a matrix at `base`, (BLOCK_R, BLOCK); zeros outside and where not `there`.

    Where a tile begins is a 64-bit number; inside it 32 bits do, which halves the registers of its addresses.
    """
    base += tl.cast(first, tl.int64) * row_stride
    r = tl.arange(0, BLOCK_R)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    return tl.load(base + r * row_stride + d, mask=there[:, None] & (d < size), other=0.0)


@triton.jit
def store_rows(base, first, row_stride, size, x, there, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """x (BLOCK_R, BLOCK) to rows first .. of a matrix at `base`, where `there` and inside."""
    base += tl.cast(first, tl.int64) * row_stride
    r = tl.arange(0, BLOCK_R)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    tl.store(base + r * row_stride + d, x, mask=there[:, None] & (d < size))


@triton.jit
def attend(
    queries,
    k,
    v,
    t,
    begin,
    end,
    top,
    total,
    acc,
    k_token,
    v_token,
    D,
    V,
    scale,
    FAR_SIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax goes on over the keys begin .. end - 1 that are on this side of the queries t."""
    for first in range(begin, end, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        key = load_rows(k, first, k_token, D, i < end, BLOCK_N, BLOCK_D)
        logits = tl.dot(queries, tl.trans(key), input_precision=PRECISION, out_dtype=ACC) * scale
        if FAR_SIDE:
            seen = i[None, :] < far_border(t, WINDOW, SINKS)[:, None]
        else:
            border = (t // WINDOW - 1) * WINDOW
            seen = (i[None, :] <= t[:, None]) & ((i[None, :] >= border[:, None]) | (i < SINKS)[None, :])
        logits = tl.where(seen & (i < end)[None, :], logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top > -float("inf"), new_top, 0.0)  # a query may have no key yet
        weights = tl.exp(logits - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(v, first, v_token, V, i < end, BLOCK_N, BLOCK_V)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION, out_dtype=ACC)
        top = new_top
    return top, total, acc


@triton.jit
def split_forward(
    q,
    k,
    v,
    near,
    far,
    near_lse,
    far_lse,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    T,
    D,
    V,
    scale,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both halves of BLOCK_M queries of one head. near, far: (B, H, T, V); near_lse, far_lse: (B, H, T)."""
    # The last tiles have the most keys: they begin first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = first + tl.arange(0, BLOCK_M)
    there = t < T
    last = tl.minimum(first + BLOCK_M, T) - 1
    queries = load_rows(q + row * q_row + head.to(tl.int64) * q_head, first, q_token, D, there, BLOCK_M, BLOCK_D)
    kv_head = (head // GROUP).to(tl.int64)
    k += row * k_row + kv_head * k_head
    v += row * v_row + kv_head * v_head
    near += (row * tl.num_programs(1) + head) * T * V
    far += (row * tl.num_programs(1) + head) * T * V
    rows = (row * tl.num_programs(1) + head) * T + t

    top = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    top, total, acc = attend(
        queries, k, v, t, SINKS, far_border(last, WINDOW, SINKS), top, total, acc, k_token, v_token, D, V, scale,
        True, WINDOW, SINKS, BLOCK_N, BLOCK_D, BLOCK_V, ACC, PRECISION,
    )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    store_rows(far, first, V, V, acc / safe[:, None], there, BLOCK_M, BLOCK_V)
    tl.store(far_lse + rows, top + tl.log(safe), mask=there)  # -inf + 0 where there was no key

    # Sinks that the first query's window has left, then all from that window on: no key twice.
    window_begin = tl.maximum((first // WINDOW - 1) * WINDOW, 0)
    top = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    top, total, acc = attend(
        queries, k, v, t, 0, tl.minimum(window_begin, SINKS), top, total, acc, k_token, v_token, D, V, scale,
        False, WINDOW, SINKS, BLOCK_N, BLOCK_D, BLOCK_V, ACC, PRECISION,
    )  # fmt: skip
    top, total, acc = attend(
        queries, k, v, t, window_begin, last + 1, top, total, acc, k_token, v_token, D, V, scale,
        False, WINDOW, SINKS, BLOCK_N, BLOCK_D, BLOCK_V, ACC, PRECISION,
    )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    store_rows(near, first, V, V, acc / safe[:, None], there, BLOCK_M, BLOCK_V)
    tl.store(near_lse + rows, top + tl.log(safe), mask=there)


@triton.jit
def feature_products(
    left,
    right,
    left_first,
    right_first,
    left_there,
    right_there,
    F,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS_F: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """phi . phi of the rows of two matrices (., F): (BLOCK_L, BLOCK_R)."""
    products = tl.zeros((BLOCK_L, BLOCK_R), ACC)
    for b in range(0, BLOCKS_F):
        x = load_rows(left + b * BLOCK_F, left_first, F, F - b * BLOCK_F, left_there, BLOCK_L, BLOCK_F)
        y = load_rows(right + b * BLOCK_F, right_first, F, F - b * BLOCK_F, right_there, BLOCK_R, BLOCK_F)
        products += tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=ACC)
    return products


@triton.jit
def far_sums_kernel(
    q,
    k,
    shift,
    phi_q,
    phi_k,
    sums,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    plane,
    T,
    D,
    F,
    scale,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS_F: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`transfer._far_sums` of BLOCK_M queries of one head. phi_q: (B, H, T, F), phi_k: (B, K, T, F), contiguous."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = first + tl.arange(0, BLOCK_M)
    there = t < T
    last = tl.minimum(first + BLOCK_M, T) - 1
    heads = tl.num_programs(1)
    kv_head = (head // GROUP).to(tl.int64)
    queries = load_rows(q + row * q_row + head.to(tl.int64) * q_head, first, q_token, D, there, BLOCK_M, BLOCK_D)
    k += row * k_row + kv_head * k_head
    phi_q += (row * heads + head) * T * F
    phi_k += (row * (heads // GROUP) + kv_head) * T * F
    rows = (row * heads + head) * T + t
    shifts = tl.load(shift + rows, mask=there, other=0.0)[:, None]
    border = far_border(t, WINDOW, SINKS)[:, None]

    total = tl.zeros((BLOCK_M,), ACC)
    moment = tl.zeros((BLOCK_M,), ACC)
    mass = tl.zeros((BLOCK_M,), ACC)
    bounded_mass = tl.zeros((BLOCK_M,), ACC)
    end = far_border(last, WINDOW, SINKS)
    for begin in range(SINKS, end, BLOCK_N):
        i = begin + tl.arange(0, BLOCK_N)
        key = load_rows(k, begin, k_token, D, i < end, BLOCK_N, BLOCK_D)
        logits = tl.dot(queries, tl.trans(key), input_precision=PRECISION, out_dtype=ACC) * scale - shifts
        products = feature_products(
            phi_q, phi_k, first, begin, there, i < end, F, BLOCK_M, BLOCK_N, BLOCK_F, BLOCKS_F, ACC, PRECISION
        )
        seen = i[None, :] < border
        weights = tl.where(seen, tl.exp(logits), 0.0)
        bounded = tl.maximum(products, TINY)
        total += tl.sum(weights, 1)
        moment += tl.sum(weights * (logits - tl.log(bounded)), 1)
        mass += tl.sum(tl.where(seen, products, 0.0), 1)
        bounded_mass += tl.sum(tl.where(seen, bounded, 0.0), 1)
    tl.store(sums + rows, total, mask=there)
    tl.store(sums + plane + rows, moment, mask=there)
    tl.store(sums + 2 * plane + rows, mass, mask=there)
    tl.store(sums + 3 * plane + rows, bounded_mass, mask=there)


@triton.jit
def product_gradient(logits, products, seen, sharp, even, share, TINY: tl.constexpr):
    """d loss / d f of a tile: [f > tiny] (even - sharp exp(logits) / f) + share, 0 where a key is not `seen`."""
    steep = even - sharp * tl.exp(tl.where(seen, logits, 0.0)) / tl.maximum(products, TINY)
    return tl.where(seen, tl.where(products > TINY, steep, 0.0) + share, 0.0)


@triton.jit
def far_queries(
    q,
    k,
    shift,
    phi_q,
    phi_k,
    sharp,
    even,
    share,
    dphi,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    T,
    D,
    F,
    scale,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCKS_O: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_O columns of dphi_q (B, H, T, F) of BLOCK_M queries of one head: sum_i w_ti phi_k_i."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) // BLOCKS_O * BLOCK_M
    column = tl.program_id(0) % BLOCKS_O * BLOCK_O
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = first + tl.arange(0, BLOCK_M)
    there = t < T
    last = tl.minimum(first + BLOCK_M, T) - 1
    heads = tl.num_programs(1)
    kv_head = (head // GROUP).to(tl.int64)
    queries = load_rows(q + row * q_row + head.to(tl.int64) * q_head, first, q_token, D, there, BLOCK_M, BLOCK_D)
    k += row * k_row + kv_head * k_head
    phi_q += (row * heads + head) * T * F
    phi_k += (row * (heads // GROUP) + kv_head) * T * F
    rows = (row * heads + head) * T + t
    shifts = tl.load(shift + rows, mask=there, other=0.0)[:, None]
    sharps = tl.load(sharp + rows, mask=there, other=0.0)[:, None]
    evens = tl.load(even + rows, mask=there, other=0.0)[:, None]
    shares = tl.load(share + rows, mask=there, other=0.0)[:, None]
    border = far_border(t, WINDOW, SINKS)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    end = far_border(last, WINDOW, SINKS)
    for begin in range(SINKS, end, BLOCK_N):
        i = begin + tl.arange(0, BLOCK_N)
        key = load_rows(k, begin, k_token, D, i < end, BLOCK_N, BLOCK_D)
        logits = tl.dot(queries, tl.trans(key), input_precision=PRECISION, out_dtype=ACC) * scale - shifts
        products = feature_products(
            phi_q, phi_k, first, begin, there, i < end, F, BLOCK_M, BLOCK_N, BLOCK_F, BLOCKS_F, ACC, PRECISION
        )
        w = product_gradient(logits, products, i[None, :] < border, sharps, evens, shares, TINY)
        features = load_rows(phi_k + column, begin, F, F - column, i < end, BLOCK_N, BLOCK_O)
        acc += tl.dot(w.to(features.dtype), features, input_precision=PRECISION, out_dtype=ACC)
    dphi += (row * heads + head) * T * F + column
    store_rows(dphi, first, F, F - column, acc, there, BLOCK_M, BLOCK_O)


@triton.jit
def far_keys(
    q,
    k,
    shift,
    phi_q,
    phi_k,
    sharp,
    even,
    share,
    dphi,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    T,
    D,
    F,
    scale,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCKS_O: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_O columns of dphi_k (B, K, T, F) of BLOCK_N keys of one KV head: sum_t w_ti phi_q_t over its queries.

    Tiles are keys by queries, so that each feeds the next product as it is.
    """
    first = tl.program_id(0) // BLOCKS_O * BLOCK_N
    column = tl.program_id(0) % BLOCKS_O * BLOCK_O
    kv_head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1)
    i = first + tl.arange(0, BLOCK_N)
    there = i < T
    keys = load_rows(k + row * k_row + kv_head.to(tl.int64) * k_head, first, k_token, D, there, BLOCK_N, BLOCK_D)
    phi_k += (row * kv_heads + kv_head) * T * F
    # The first query that has the first of these keys, or the first key at all, among its far ones.
    begin = (tl.maximum(first, SINKS) // WINDOW + 2) * WINDOW

    acc = tl.zeros((BLOCK_N, BLOCK_O), ACC)
    for g in range(0, GROUP):
        head = (row * kv_heads + kv_head) * GROUP + g
        queries_g = q + row * q_row + (kv_head * GROUP + g).to(tl.int64) * q_head
        phi_g = phi_q + head * T * F
        for t0 in range(begin, T, BLOCK_M):
            t = t0 + tl.arange(0, BLOCK_M)
            inside = t < T
            rows = head * T + t
            shifts = tl.load(shift + rows, mask=inside, other=0.0)[None, :]
            sharps = tl.load(sharp + rows, mask=inside, other=0.0)[None, :]
            evens = tl.load(even + rows, mask=inside, other=0.0)[None, :]
            shares = tl.load(share + rows, mask=inside, other=0.0)[None, :]
            queries = load_rows(queries_g, t0, q_token, D, inside, BLOCK_M, BLOCK_D)
            logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC) * scale - shifts
            products = feature_products(
                phi_k, phi_g, first, t0, there, inside, F, BLOCK_N, BLOCK_M, BLOCK_F, BLOCKS_F, ACC, PRECISION
            )
            seen = (i >= SINKS)[:, None] & (i[:, None] < far_border(t, WINDOW, SINKS)[None, :]) & inside[None, :]
            w = product_gradient(logits, products, seen, sharps, evens, shares, TINY)
            features = load_rows(phi_g + column, t0, F, F - column, inside, BLOCK_M, BLOCK_O)
            acc += tl.dot(w.to(features.dtype), features, input_precision=PRECISION, out_dtype=ACC)
    dphi += (row * kv_heads + kv_head) * T * F + column
    store_rows(dphi, first, F, F - column, acc, there, BLOCK_N, BLOCK_O)


# --- launchers -------------------------------------------------------------------------------------------------------


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """near, near_lse, far, far_lse of `transfer.split_attention`."""
    batch, heads, length, _ = q.shape
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    wide = accumulation_dtype(q)
    near, far = (torch.empty(batch, heads, length, v.shape[-1], dtype=wide, device=q.device) for _ in range(2))
    near_lse, far_lse = (torch.empty(batch, heads, length, dtype=wide, device=q.device) for _ in range(2))
    block_m, block_n, warps, stages = split_blocks(current_target(q.device), q.dtype, max(q.shape[-1], v.shape[-1]))
    arguments = {
        **strided(q=q, k=k, v=v),
        **{"near": near, "far": far, "near_lse": near_lse, "far_lse": far_lse},
        **_common(q, k, window, sinks, scale),
        **{"V": v.shape[-1], "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_V": tile(v.shape[-1])},
    }
    grid = (-(-length // block_m), heads, batch)
    launch(split_forward, grid, arguments, num_warps=warps, num_stages=stages)
    return near, near_lse, far, far_lse


def far_sums(
    q: Tensor, k: Tensor, shift: Tensor, phi_q: Tensor, phi_k: Tensor, *, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as `transfer._far_sums`."""
    batch, heads, length, _ = q.shape
    sums = torch.empty(4, batch, heads, length, dtype=accumulation_dtype(q), device=q.device)
    own, inner, most_f, warps, stages = far_blocks(current_target(q.device), q.dtype, q.shape[-1], gradient=False)
    arguments = {
        **_far_arguments(q, k, shift, phi_q, phi_k, most_f, window, sinks, scale),
        **{"sums": sums, "plane": sums[0].numel(), "BLOCK_M": own, "BLOCK_N": inner},
    }
    launch(far_sums_kernel, (-(-length // own), heads, batch), arguments, num_warps=warps, num_stages=stages)
    return sums[0], sums[1], sums[2], sums[3]


def far_gradients(
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
) -> tuple[Tensor, Tensor]:
    """The same as `transfer._far_gradients`."""
    wide = accumulation_dtype(q)
    gradients = tuple(torch.empty(x.shape, dtype=wide, device=q.device) for x in (phi_q, phi_k))
    own, inner, most_f, warps, stages = far_blocks(current_target(q.device), q.dtype, q.shape[-1], gradient=True)
    block_o = min(tile(phi_q.shape[-1]), WIDEST_OUTPUT)
    blocks_o = -(-phi_q.shape[-1] // block_o)
    arguments = {
        **_far_arguments(q, k, shift, phi_q, phi_k, most_f, window, sinks, scale),
        **{name: x.to(wide).contiguous() for name, x in (("sharp", sharp), ("even", even), ("share", share))},
        **{"BLOCK_O": block_o, "BLOCKS_O": blocks_o},
    }
    for kernel, (block_m, block_n), dphi in zip((far_queries, far_keys), ((own, inner), (inner, own)), gradients):
        grid = (-(-q.shape[2] // own) * blocks_o, dphi.shape[1], q.shape[0])
        arguments |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "dphi": dphi}
        launch(kernel, grid, dict(arguments), num_warps=warps, num_stages=stages)
    return gradients[0], gradients[1]


WIDEST_OUTPUT = 128  # columns of a gradient that one program holds; beyond, others compute the weights again


def split_blocks(target: Target, dtype: torch.dtype, width: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) of `split_forward` for heads of `width`."""
    if target is INTERPRETER:
        return 16, 32, 4, 1
    if dtype.itemsize > 2:
        return (32, 32, 8, 1) if width <= 64 else (16, 32, 8, 1)
    return (64, 32, 4, 2) if width <= 128 else (64, 32, 8, 1)


def far_blocks(target: Target, dtype: torch.dtype, width: int, gradient: bool) -> tuple[int, int, int, int, int]:
    """(rows a program owns, rows of what it loops over, most of BLOCK_F, warps, stages) of the other kernels."""
    if target is INTERPRETER:
        return 16, 32, 32, 4, 1
    if dtype.itemsize > 2:
        return (32, 32, 32, 8, 1) if width <= 64 else (16, 32, 32, 8, 1)
    if gradient or width > 128:  # a wavefront of gfx942 has twice the registers of a warp, and twice the threads
        return (64, 32, 64, 8, 2) if target.backend == "cuda" else (64, 32, 64, 4, 2)
    return 64, 64, 64, 4, 2


def _far_arguments(
    q: Tensor,
    k: Tensor,
    shift: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    most_f: int,
    window: int,
    sinks: int,
    scale: float,
) -> dict[str, Any]:
    """What the kernels over features share."""
    q, k = last_contiguous(q), last_contiguous(k)
    far = far_dtype(q.dtype)
    features = phi_q.shape[-1]
    block_f = min(tile(features), most_f)
    return {
        **strided(q=q, k=k),
        **_common(q, k, window, sinks, scale),
        "shift": shift.contiguous(),
        "phi_q": phi_q.to(far).contiguous(),
        "phi_k": phi_k.to(far).contiguous(),
        "F": features,
        "TINY": torch.finfo(accumulation_dtype(q)).tiny,
        "BLOCK_F": block_f,
        "BLOCKS_F": -(-features // block_f),
    }


def _common(q: Tensor, k: Tensor, window: int, sinks: int, scale: float) -> dict[str, Any]:
    return {
        "T": q.shape[2],
        "D": q.shape[-1],
        "scale": scale,
        "WINDOW": window,
        "SINKS": sinks,
        "GROUP": q.shape[1] // k.shape[1],
        "BLOCK_D": tile(q.shape[-1]),
        "ACC": TL_TYPES[accumulation_dtype(q)],
        "PRECISION": precision_of(q.dtype, current_target(q.device)),
    }
