"""Near-and-far attention in Triton, backward. No atomics: every gradient has one owner, and sums have a fixed order.

With P_i = exp(logit_i - m) / l the near weights, w the weight of phi_q S in the output (both saved by the forward
pass), delta = do . o, and under "gate" the far share r = w n, delta' = do . (phi_q S) / n:

    near     dlogit_i = P_i (do . v_i - delta)            (gate: P_i ((1 - r) do . v_i - (delta - r delta')))
    far      dphi_q   = w (S do - delta' z)               (normalizer: delta' = delta)
    mix      dmix     = w n (delta' - delta)              (normalizer: w (do . phi_q S - n delta))
    state    dS       = (w phi_q)^T do,  dz = -sum w delta' phi_q       of the chunk that the queries read

1. `far_backward_queries`, a program for each tile of query rows: delta, dmix, d(features).
2. `near_backward_queries`, the same tiles: dq, and this tile's part of the sinks' gradients.
3. `chunk_sums` of the queries: dS and dz of the state each chunk read; `prefix_sums` from the end: what a chunk's own
   sums get, from all queries two chunks on and later.
4. `far_backward_keys`, a program for each tile of keys: d(features) and dv's far part, from dS and dz.
5. `near_backward_keys`, the same tiles: dk and dv, from the queries of the own chunk and the next one.
6. `sink_gradients`: adds up the parts of 2. into dk and dv.

Near and far are kernels of their own because both at once need more registers than there are at D = 128.
Features computed inside (hedgehog) give d(x W) instead, 0 beyond HALF; dW is one matrix product of x with it. "far" has
no near side; its delta is do . o minus the gradient of log n (`dtop`).
"""

import triton
import triton.language as tl

from .triton_forward import (
    CHUNK,
    COLUMN,
    FIELDS,
    LOCAL,
    ROW,
    SINK_COLUMN,
    SINK_COUNT,
    TOKENS,
    half_of_features,
    load_state,
    project,
)

__all__ = [
    "far_backward_keys",
    "far_backward_queries",
    "near_backward_keys",
    "near_backward_queries",
    "sink_gradients",
]


@triton.jit
def project_back(
    dp,
    group_of_row,
    low,
    high,
    weight,
    first_head,
    D,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dp W^T of each row's own head: dp (BLOCK_M, BLOCK_F) in the operands' dtype -> (BLOCK_M, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    f = tl.arange(0, BLOCK_F)[:, None]
    inside = (d < D) & (f < HALF)
    dx = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for g in range(low, high + 1):
        own = dp
        if not ONE_HEAD:
            own = tl.where((group_of_row == g)[:, None], dp, 0.0).to(dp.dtype)
        at = (first_head + g) * D * HALF + d * HALF + f
        dx += tl.dot(own, tl.load(weight + at, mask=inside, other=0.0), input_precision=PRECISION, out_dtype=ACC)
    return dx


@triton.jit
def attend_back(queries, key, value, do, seen, top, near, error, scale, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """exp(logit - top) of the keys that are seen, and the gradient of q.k."""
    logits = tl.dot(queries, tl.trans(key), input_precision=PRECISION, out_dtype=ACC) * scale
    weights = tl.exp(tl.where(seen, logits - top[:, None], -float("inf")))
    change = tl.dot(do, tl.trans(value), input_precision=PRECISION, out_dtype=ACC)
    return weights, weights * (near[:, None] * change - error[:, None]) * scale


@triton.jit(do_not_specialize=["T", "plane"])
def far_backward_queries(
    q,
    mix,
    phi,
    weight,
    weight_low,
    before,
    norms,
    out,
    dout,
    dtop,
    stats,
    dmix,
    dphi,
    passed,
    chunks,
    q_row,
    q_head,
    q_token,
    mix_row,
    mix_head,
    mix_token,
    phi_row,
    phi_head,
    phi_token,
    out_row,
    out_head,
    out_token,
    dout_row,
    dout_head,
    dout_token,
    plane,
    T,
    KV_HEADS,
    D,
    V,
    F,
    tiny,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    FEATURES: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    ACC: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Step 1: delta, the far side of each query, and what the other steps need of it.

    passed (3, B, H, T): the factor of exp(logit - m) in P, the error to subtract, -w delta'.
    """
    TILES: tl.constexpr = (GROUP * WINDOW + BLOCK_M - 1) // BLOCK_M
    p = tl.program_id(0) // TILES
    first = (tl.program_id(0) % TILES) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)  # times a stride it may leave 32 bits
    entry = chunks + p * FIELDS
    tokens = tl.load(entry + TOKENS)
    if tokens == 0:
        return
    row = tl.load(entry + ROW).to(tl.int64)
    column = tl.load(entry + COLUMN).to(tl.int64)
    local = tl.load(entry + LOCAL)
    chunk = tl.load(entry + CHUNK)

    r = first + tl.arange(0, BLOCK_M)
    g = r // WINDOW
    t = r % WINDOW
    there = (g < GROUP) & (t < tokens)
    e = tl.arange(0, BLOCK_V)[None, :]
    f = tl.arange(0, BLOCK_F)
    low = first // WINDOW
    high = tl.minimum((first + BLOCK_M - 1) // WINDOW, GROUP - 1)
    q += row * q_row + head * GROUP * q_head + column * q_token
    out += row * out_row + head * GROUP * out_head + column * out_token
    dout += row * dout_row + head * GROUP * dout_head + column * dout_token
    shown = there[:, None] & (e < V)
    do = tl.load(dout + g[:, None] * dout_head + t[:, None] * dout_token + e, mask=shown, other=0.0)
    o = tl.load(out + g[:, None] * out_head + t[:, None] * out_token + e, mask=shown, other=0.0)
    delta = tl.sum(do.to(ACC) * o.to(ACC), 1)
    per_row = (row * KV_HEADS + head) * GROUP * T + column
    at_row = g * T + t
    top = tl.load(stats + per_row + at_row, mask=there, other=0.0)
    if MIX == "far":
        # Without a far side log n is -inf, and whatever gradient it got is of no consequence.
        delta -= tl.load(dtop + per_row + at_row, mask=there & (top > -float("inf")), other=0.0)
    near = tl.load(stats + per_row + plane + at_row, mask=there, other=0.0)
    error = near * delta
    norm_factor = tl.zeros((BLOCK_M,), ACC)
    dlogit = tl.zeros((BLOCK_M,), ACC)

    if FEATURES != "none":
        if (local > 0) & (chunk > 1):
            w = tl.load(stats + per_row + 2 * plane + at_row, mask=there, other=0.0)
            base = ((p - 1).to(tl.int64) * KV_HEADS + head) * F
            state = before + base * V
            do_far = do.to(FAR)
            if FEATURES == "hedgehog":
                x_rows = q + g * q_head + t * q_token
                projected = project(x_rows, there, g, low, high, weight, weight_low, head * GROUP, D, HALF, BLOCK_M,
                                    BLOCK_K, BLOCK_F, ONE_HEAD, ACC, PRECISION)  # fmt: skip
                # Both softmaxes' backward passes, one half after the other: of three tiles only two stay.
                n = tl.zeros((BLOCK_M,), ACC)
                u = tl.zeros((BLOCK_M,), ACC)
                dp = tl.zeros((BLOCK_M, BLOCK_F), ACC)
                for half in range(2):
                    features = half_of_features(projected, 1.0 - 2.0 * half, HALF, BLOCK_F)
                    n += tl.sum(
                        features * tl.load(norms + base + half * HALF + f, mask=f < HALF, other=0.0)[None, :], 1
                    )
                    sums = load_state(state, half * HALF + f, V, (half + 1) * HALF, BLOCK_V)
                    y = tl.dot(do_far, tl.trans(sums), input_precision=PRECISION, out_dtype=ACC)
                    part = tl.sum(features * y, 1)
                    u += part
                    dp += (1.0 - 2.0 * half) * features * (y - part[:, None])
            else:
                feature_rows = phi + row * phi_row + head * GROUP * phi_head + column * phi_token
                n = tl.zeros((BLOCK_M,), ACC)
                u = tl.zeros((BLOCK_M,), ACC)
                for begin in range(0, F, BLOCK_F):
                    i = begin + f
                    at = g[:, None] * phi_head + t[:, None] * phi_token + i[None, :]
                    features = tl.load(feature_rows + at, mask=there[:, None] & (i < F)[None, :], other=0.0).to(ACC)
                    n += tl.sum(features * tl.load(norms + base + i, mask=i < F, other=0.0)[None, :], 1)
                    sums = load_state(state, i, V, F, BLOCK_V)
                    y = tl.dot(do_far, tl.trans(sums), input_precision=PRECISION, out_dtype=ACC)
                    u += tl.sum(features * y, 1)
            far_delta = delta
            if MIX == "gate":
                some = n > tiny
                far_delta = tl.where(some, u / tl.where(some, n, 1.0), 0.0)
                error = near * (delta - w * n * far_delta)
                logit = tl.zeros((BLOCK_M,), ACC)
                if mix is not None:
                    mixes = mix + row * mix_row + head * GROUP * mix_head + column * mix_token
                    logit += tl.load(mixes + g * mix_head + t * mix_token, mask=there, other=0.0)
                near = near * tl.where(some, 1.0 / (1.0 + tl.exp(logit)), 1.0)
                dlogit = w * n * (far_delta - delta)
            else:
                dlogit = w * (u - n * delta)
            norm_factor = -w * far_delta
            if FEATURES == "hedgehog":
                for half in range(2):
                    features = half_of_features(projected, 1.0 - 2.0 * half, HALF, BLOCK_F)
                    z = tl.load(norms + base + half * HALF + f, mask=f < HALF, other=0.0)[None, :]
                    part = far_delta * tl.sum(features * z, 1)
                    dp -= (1.0 - 2.0 * half) * features * (far_delta[:, None] * z - part[:, None])
                at = (per_row + at_row)[:, None] * HALF + f[None, :]
                dp = (w[:, None] * dp).to(dphi.dtype.element_ty)
                tl.store(dphi + at, dp, mask=there[:, None] & (f < HALF)[None, :])
            else:
                for begin in range(0, F, BLOCK_F):
                    i = begin + f
                    z = tl.load(norms + base + i, mask=i < F, other=0.0)
                    sums = load_state(state, i, V, F, BLOCK_V)
                    y = tl.dot(do_far, tl.trans(sums), input_precision=PRECISION, out_dtype=ACC)
                    dfeatures = w[:, None] * (y - far_delta[:, None] * z[None, :])
                    at = (per_row + at_row)[:, None] * F + i[None, :]
                    tl.store(dphi + at, dfeatures.to(dphi.dtype.element_ty), mask=there[:, None] & (i < F)[None, :])

    tl.store(passed + per_row + at_row, near, mask=there)
    tl.store(passed + per_row + plane + at_row, error, mask=there)
    if FEATURES != "none":
        tl.store(passed + per_row + 2 * plane + at_row, norm_factor, mask=there)
        if dmix is not None:
            tl.store(dmix + per_row + at_row, dlogit, mask=there)


@triton.jit(do_not_specialize=["T", "plane"])
def near_backward_queries(
    q,
    k,
    v,
    sink_k,
    sink_v,
    weight,
    dout,
    stats,
    dq,
    dphi,
    passed,
    dsink_k,
    dsink_v,
    chunks,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    sink_k_row,
    sink_k_head,
    sink_k_token,
    sink_v_row,
    sink_v_head,
    sink_v_token,
    dout_row,
    dout_head,
    dout_token,
    dq_row,
    dq_head,
    dq_token,
    plane,
    T,
    KV_HEADS,
    D,
    V,
    scale,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    HALF: tl.constexpr,
    FEATURES: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Step 2: dq of BLOCK_M rows, and their part of the sinks' gradients."""
    TILES: tl.constexpr = (GROUP * WINDOW + BLOCK_M - 1) // BLOCK_M
    p = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    first = tile * BLOCK_M
    head = tl.program_id(1).to(tl.int64)  # times a stride it may leave 32 bits
    entry = chunks + p * FIELDS
    tokens = tl.load(entry + TOKENS)
    if tokens == 0:
        return
    row = tl.load(entry + ROW).to(tl.int64)
    column = tl.load(entry + COLUMN).to(tl.int64)
    local = tl.load(entry + LOCAL)
    chunk = tl.load(entry + CHUNK)

    r = first + tl.arange(0, BLOCK_M)
    g = r // WINDOW
    t = r % WINDOW
    there = (g < GROUP) & (t < tokens)
    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_V)[None, :]
    f = tl.arange(0, BLOCK_F)
    low = first // WINDOW
    high = tl.minimum((first + BLOCK_M - 1) // WINDOW, GROUP - 1)
    q += row * q_row + head * GROUP * q_head + column * q_token
    queries = tl.load(q + g[:, None] * q_head + t[:, None] * q_token + d, mask=there[:, None] & (d < D), other=0.0)
    dout += row * dout_row + head * GROUP * dout_head + column * dout_token
    shown = there[:, None] & (e < V)
    do = tl.load(dout + g[:, None] * dout_head + t[:, None] * dout_token + e, mask=shown, other=0.0)
    per_row = (row * KV_HEADS + head) * GROUP * T + column
    at_row = g * T + t
    dq_acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    if FEATURES == "hedgehog":
        if (local > 0) & (chunk > 1):
            at = (per_row + at_row)[:, None] * HALF + f[None, :]
            dp = tl.load(dphi + at, mask=there[:, None] & (f < HALF)[None, :], other=0.0)
            dq_acc += project_back(dp, g, low, high, weight, head * GROUP, D, HALF, BLOCK_M, BLOCK_D, BLOCK_F, ONE_HEAD,
                                   ACC, PRECISION)  # fmt: skip

    if MIX != "far":
        top = tl.load(stats + per_row + at_row, mask=there, other=0.0)
        near = tl.load(passed + per_row + at_row, mask=there, other=0.0)
        error = tl.load(passed + per_row + plane + at_row, mask=there, other=0.0)
        past = tl.where(local > 0, WINDOW, 0)
        last = tl.minimum(tokens, WINDOW)
        if ONE_HEAD:
            last = tl.minimum(tokens, first % WINDOW + BLOCK_M)
        keys = k + row * k_row + head * k_head + (column - past) * k_token
        values = v + row * v_row + head * v_head + (column - past) * v_token
        for begin in range(0, past + last, BLOCK_N):
            i = begin + tl.arange(0, BLOCK_N)
            stored = i < past + tokens
            key = tl.load(keys + i[:, None] * k_token + d, mask=stored[:, None] & (d < D), other=0.0)
            value = tl.load(values + i[:, None] * v_token + e, mask=stored[:, None] & (e < V), other=0.0)
            seen = stored[None, :] & ((i - past)[None, :] <= t[:, None])
            weights, change = attend_back(queries, key, value, do, seen, top, near, error, scale, ACC, PRECISION)
            dq_acc += tl.dot(change.to(key.dtype), key, input_precision=PRECISION, out_dtype=ACC)
        if SINKS > 0:
            count = tl.minimum(tl.load(entry + SINK_COUNT), (chunk - 1) * WINDOW)
            sink_column = tl.load(entry + SINK_COLUMN).to(tl.int64)
            keys = sink_k + row * sink_k_row + head * sink_k_head + sink_column * sink_k_token
            values = sink_v + row * sink_v_row + head * sink_v_head + sink_column * sink_v_token
            part = ((p * TILES + tile).to(tl.int64) * KV_HEADS + head) * SINKS
            for begin in range(0, count, BLOCK_S):
                i = begin + tl.arange(0, BLOCK_S)
                stored = i < count
                key = tl.load(keys + i[:, None] * sink_k_token + d, mask=stored[:, None] & (d < D), other=0.0)
                value = tl.load(values + i[:, None] * sink_v_token + e, mask=stored[:, None] & (e < V), other=0.0)
                weights, change = attend_back(
                    queries, key, value, do, stored[None, :], top, near, error, scale, ACC, PRECISION
                )
                change = change.to(key.dtype)
                dq_acc += tl.dot(change, key, input_precision=PRECISION, out_dtype=ACC)
                # Padded queries have zeros for q and do, and so no part.
                dkey = tl.dot(tl.trans(change), queries, input_precision=PRECISION, out_dtype=ACC)
                tl.store(dsink_k + (part + i)[:, None] * D + d, dkey, mask=stored[:, None] & (d < D))
                weights = (weights * near[:, None]).to(do.dtype)
                dvalue = tl.dot(tl.trans(weights), do, input_precision=PRECISION, out_dtype=ACC)
                tl.store(dsink_v + (part + i)[:, None] * V + e, dvalue, mask=stored[:, None] & (e < V))

    dq += row * dq_row + head * GROUP * dq_head + column * dq_token
    at = g[:, None] * dq_head + t[:, None] * dq_token + d
    tl.store(dq + at, dq_acc.to(dq.dtype.element_ty), mask=there[:, None] & (d < D))


@triton.jit(do_not_specialize=["T"])
def far_backward_keys(
    k,
    v,
    phi,
    weight,
    weight_low,
    dstates,
    dnorms,
    dv_far,
    dphi,
    chunks,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    phi_row,
    phi_head,
    phi_token,
    T,
    KV_HEADS,
    D,
    V,
    F,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    HALF: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Step 4: the far side of BLOCK_N keys: `dphi` (B, K, T, HALF or F) and dv's part, `dv_far` (B, K, T, V)."""
    TILES: tl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N
    p = tl.program_id(0) // TILES
    first = (tl.program_id(0) % TILES) * BLOCK_N
    head = tl.program_id(1).to(tl.int64)  # times a stride it may leave 32 bits
    entry = chunks + p * FIELDS
    tokens = tl.load(entry + TOKENS)
    if first >= tokens:
        return
    row = tl.load(entry + ROW).to(tl.int64)
    column = tl.load(entry + COLUMN).to(tl.int64)

    j = first + tl.arange(0, BLOCK_N)
    stored = j < tokens
    e = tl.arange(0, BLOCK_V)[None, :]
    k += row * k_row + head * k_head + column * k_token
    v += row * v_row + head * v_head + column * v_token
    value = tl.load(v + j[:, None] * v_token + e, mask=stored[:, None] & (e < V), other=0.0)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_V), ACC)

    base = (p.to(tl.int64) * KV_HEADS + head) * F
    state = dstates + base * V
    f = tl.arange(0, BLOCK_F)
    kept = stored & (tl.load(entry + CHUNK) * WINDOW + j >= SINKS)
    per_row = (row * KV_HEADS + head) * T + column
    if FEATURES == "hedgehog":
        projected = project(k + j * k_token, stored, j, 0, 0, weight, weight_low, head, D, HALF, BLOCK_N, BLOCK_K,
                            BLOCK_F, True, ACC, PRECISION)  # fmt: skip
        dp = tl.zeros((BLOCK_N, BLOCK_F), ACC)
        for half in range(2):
            features = half_of_features(projected, 1.0 - 2.0 * half, HALF, BLOCK_F)
            features = tl.where(kept[:, None], features, 0.0)
            dstate = load_state(state, half * HALF + f, V, (half + 1) * HALF, BLOCK_V)
            dv_acc += tl.dot(features.to(FAR), dstate, input_precision=PRECISION, out_dtype=ACC)
            dfeatures = tl.dot(value.to(FAR), tl.trans(dstate), input_precision=PRECISION, out_dtype=ACC)
            dfeatures += tl.load(dnorms + base + half * HALF + f, mask=f < HALF, other=0.0)[None, :]
            dp += (1.0 - 2.0 * half) * features * (dfeatures - tl.sum(features * dfeatures, 1)[:, None])
        at = (per_row + j)[:, None] * HALF + f[None, :]
        tl.store(dphi + at, dp.to(dphi.dtype.element_ty), mask=stored[:, None] & (f < HALF)[None, :])
    else:
        feature_rows = phi + row * phi_row + head * phi_head + column * phi_token
        for begin in range(0, F, BLOCK_F):
            i = begin + f
            at = j[:, None] * phi_token + i[None, :]
            features = tl.load(feature_rows + at, mask=kept[:, None] & (i < F)[None, :], other=0.0)
            dstate = load_state(state, i, V, F, BLOCK_V)
            dv_acc += tl.dot(features.to(FAR), dstate, input_precision=PRECISION, out_dtype=ACC)
            dfeatures = tl.dot(value.to(FAR), tl.trans(dstate), input_precision=PRECISION, out_dtype=ACC)
            dfeatures += tl.load(dnorms + base + i, mask=i < F, other=0.0)[None, :]
            dfeatures = tl.where(kept[:, None], dfeatures, 0.0)
            at = (per_row + j)[:, None] * F + i[None, :]
            tl.store(dphi + at, dfeatures.to(dphi.dtype.element_ty), mask=stored[:, None] & (i < F)[None, :])

    at = (per_row + j)[:, None] * V + e
    tl.store(dv_far + at, dv_acc, mask=stored[:, None] & (e < V))


@triton.jit(do_not_specialize=["T", "plane"])
def near_backward_keys(
    q,
    k,
    v,
    weight,
    dout,
    stats,
    passed,
    dk,
    dv,
    dphi,
    dv_far,
    chunks,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    dout_row,
    dout_head,
    dout_token,
    dk_row,
    dk_head,
    dk_token,
    dv_row,
    dv_head,
    dv_token,
    plane,
    T,
    KV_HEADS,
    D,
    V,
    scale,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    FEATURES: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Step 5: dk and dv of BLOCK_N keys of one chunk and KV head, from the queries of its own and the next chunk."""
    TILES: tl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N
    p = tl.program_id(0) // TILES
    first = (tl.program_id(0) % TILES) * BLOCK_N
    head = tl.program_id(1).to(tl.int64)  # times a stride it may leave 32 bits
    entry = chunks + p * FIELDS
    tokens = tl.load(entry + TOKENS)
    if first >= tokens:
        return
    row = tl.load(entry + ROW).to(tl.int64)
    column = tl.load(entry + COLUMN).to(tl.int64)
    # The next entry is the next chunk of this sequence if its index is the next one.
    follows = tl.load(entry + FIELDS + LOCAL) == tl.load(entry + LOCAL) + 1
    queries_end = tokens + tl.where(follows, tl.load(entry + FIELDS + TOKENS), 0)

    j = first + tl.arange(0, BLOCK_N)
    stored = j < tokens
    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_V)[None, :]
    k += row * k_row + head * k_head + column * k_token
    v += row * v_row + head * v_head + column * v_token
    key = tl.load(k + j[:, None] * k_token + d, mask=stored[:, None] & (d < D), other=0.0)
    value = tl.load(v + j[:, None] * v_token + e, mask=stored[:, None] & (e < V), other=0.0)
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_V), ACC)

    per_row = (row * KV_HEADS + head) * T + column
    if FEATURES != "none":
        dv_acc += tl.load(dv_far + (per_row + j)[:, None] * V + e, mask=stored[:, None] & (e < V), other=0.0)
    if FEATURES == "hedgehog":
        f = tl.arange(0, BLOCK_F)
        at = (per_row + j)[:, None] * HALF + f[None, :]
        dp = tl.load(dphi + at, mask=stored[:, None] & (f < HALF)[None, :], other=0.0)
        dk_acc += project_back(dp, j, 0, 0, weight, head, D, HALF, BLOCK_N, BLOCK_D, BLOCK_F, True, ACC, PRECISION)

    if MIX != "far":
        for g in range(0, GROUP):
            h = head * GROUP + g
            q_rows = q + row * q_row + h * q_head + column * q_token
            do_rows = dout + row * dout_row + h * dout_head + column * dout_token
            per_query = (row * KV_HEADS + head) * GROUP * T + column + g * T
            for begin in range(first, queries_end, BLOCK_M):
                t = begin + tl.arange(0, BLOCK_M)
                there = t < queries_end
                queries = tl.load(q_rows + t[:, None] * q_token + d, mask=there[:, None] & (d < D), other=0.0)
                do = tl.load(do_rows + t[:, None] * dout_token + e, mask=there[:, None] & (e < V), other=0.0)
                top = tl.load(stats + per_query + t, mask=there, other=0.0)
                near = tl.load(passed + per_query + t, mask=there, other=0.0)
                error = tl.load(passed + per_query + plane + t, mask=there, other=0.0)
                logits = tl.dot(key, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC) * scale
                seen = there[None, :] & (j[:, None] <= t[None, :])
                weights = tl.exp(tl.where(seen, logits - top[None, :], -float("inf")))
                dv_acc += tl.dot((weights * near[None, :]).to(do.dtype), do, input_precision=PRECISION, out_dtype=ACC)
                change = tl.dot(value, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
                change = weights * (near[None, :] * change - error[None, :]) * scale
                dk_acc += tl.dot(change.to(queries.dtype), queries, input_precision=PRECISION, out_dtype=ACC)

    dk += row * dk_row + head * dk_head + column * dk_token
    dv += row * dv_row + head * dv_head + column * dv_token
    tl.store(dk + j[:, None] * dk_token + d, dk_acc.to(dk.dtype.element_ty), mask=stored[:, None] & (d < D))
    tl.store(dv + j[:, None] * dv_token + e, dv_acc.to(dv.dtype.element_ty), mask=stored[:, None] & (e < V))


@triton.jit
def sink_gradients(
    parts,
    dx,
    sequences,
    chunks,
    dx_row,
    dx_head,
    dx_token,
    KV_HEADS,
    SIZE,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx += the sum over a sequence's chunks and row tiles of `parts` (P, TILES, K, S, SIZE), a sink a program."""
    sequence, head, sink = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(sequences + sequence * 3)
    count = tl.load(sequences + sequence * 3 + 1)
    entry = chunks + first * FIELDS
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    if (count > 0) & (sink < tl.load(entry + SINK_COUNT)):
        total = tl.zeros((BLOCK,), ACC)
        # Queries of chunk c have it apart from the window where sink < (c - 1) W.
        for i in range((sink // WINDOW + 2) * TILES, count * TILES):
            part = (tl.cast(first * TILES + i, tl.int64) * KV_HEADS + head) * SINKS + sink
            total += tl.load(parts + part * SIZE + at, mask=inside, other=0.0)
        row = tl.load(entry + ROW).to(tl.int64)
        column = tl.load(entry + SINK_COLUMN).to(tl.int64) + sink
        dx += row * dx_row + head * dx_head + column * dx_token
        total += tl.load(dx + at, mask=inside, other=0.0).to(ACC)
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)
