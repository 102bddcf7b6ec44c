"""Near-and-far attention in Triton, forward: the state of every chunk, the sums before every chunk, the attention.

Three kernels, each with a program for a chunk of a sequence (`rows.py` has the tables):

    chunk_sums      s_c = sum_i a_i phi_i y_i^T,  z_c = sum_i b_i phi_i        over the tokens i of chunk c
    prefix          states before each chunk: S_c = S_0 + sum_{c' < c} s_c', one running sum in float32
    attention       softmax over chunk c - 1, chunk c and the sinks, online; then the far term from S_{c-1}

Rows of a tile are the queries of a whole KV group, r = g W + t: a tile of more than W rows shares its loads of keys,
values and state among query heads, and tiles of one group are neighbours in the grid, so that they meet in the cache.

The far term comes last: with the largest near logit m and the sum l of exp(logit - m) at hand it is one more term of
the softmax, log n + mix_logit, whose value is phi_q S / n; nothing is ever divided by exp(m). A row with n at or below
the smallest normal number has no far term. Exponentials are taken of differences of logits in their own units: scaling
by log2(e) first would cost 1e-3 at logits of 1e4.

Saved for the backward pass, a row each: m (`top`), 1 / l (`inverse`), and w (`far`), the weight of phi_q S in the
output. m and l stay apart because the rounding of m + log l at 1e4 is an error of 5e-4 in every weight.

Shape legend as in `chunked`; FEATURES "hedgehog" computes phi inside from a weight (heads, D, HALF), F = 2 HALF;
"given" reads it. Operands of far products are bfloat16 under 16-bit inputs (float16 has no room for sums), as wide as
the inputs otherwise. ACC is float32, float64 for float64 inputs.
"""

import triton
import triton.language as tl

__all__ = ["attention_forward", "chunk_sums", "prefix_sums"]

# Columns of the chunk table.
ROW = tl.constexpr(0)
COLUMN = tl.constexpr(1)
TOKENS = tl.constexpr(2)
LOCAL = tl.constexpr(3)
CHUNK = tl.constexpr(4)
SINK_COLUMN = tl.constexpr(5)
SINK_COUNT = tl.constexpr(6)
FIELDS = tl.constexpr(8)


@triton.jit
def project(
    x_rows,
    there,
    group_of_row,
    low,
    high,
    weight,
    weight_low,
    first_head,
    D,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x W of each row's own head: BLOCK_M rows of D at the pointers `x_rows` -> (BLOCK_M, BLOCK_F), 0 beyond HALF.

    16-bit inputs meet W as two 16-bit terms: an error of 2^-9 in a logit of a feature would be one of percents in it.
    BLOCK_K of D at a time, so that W passes through few registers.
    """
    f = tl.arange(0, BLOCK_F)[None, :]
    p = tl.zeros((BLOCK_M, BLOCK_F), ACC)
    for g in range(low, high + 1):
        own = there
        if not ONE_HEAD:
            own = there & (group_of_row == g)
        for begin in range(0, D, BLOCK_K):
            d = begin + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows[:, None] + d[None, :], mask=own[:, None] & (d < D)[None, :], other=0.0)
            at = (first_head + g) * D * HALF + d[:, None] * HALF + f
            inside = (d < D)[:, None] & (f < HALF)
            w = tl.load(weight + at, mask=inside, other=0.0)
            p += tl.dot(x, w, input_precision=PRECISION, out_dtype=ACC)
            if weight_low is not None:
                w = tl.load(weight_low + at, mask=inside, other=0.0)
                p += tl.dot(x, w, input_precision=PRECISION, out_dtype=ACC)
    return p


@triton.jit
def half_of_features(p, sign, HALF: tl.constexpr, BLOCK_F: tl.constexpr):
    """softmax(sign p) over the first HALF columns, 0 in the others."""
    s = tl.where((tl.arange(0, BLOCK_F) < HALF)[None, :], p * sign, -float("inf"))
    e = tl.exp(s - tl.max(s, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def load_state(base, rows, V, F, BLOCK_V: tl.constexpr):
    """Rows of a state (F, V) at `base`: (len(rows), BLOCK_V), zeros outside."""
    d = tl.arange(0, BLOCK_V)[None, :]
    return tl.load(base + rows[:, None] * V + d, mask=(rows[:, None] < F) & (d < V), other=0.0)


@triton.jit
def attend(queries, key, value, seen, top, total, acc, scale, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: (top, total, acc) with the keys that are seen, one at least now or before."""
    logits = tl.dot(queries, tl.trans(key), input_precision=PRECISION, out_dtype=ACC) * scale
    logits = tl.where(seen, logits, -float("inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp(logits - new_top[:, None])
    shrink = tl.exp(top - new_top)
    acc = acc * shrink[:, None]
    acc += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION, out_dtype=ACC)
    return new_top, total * shrink + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["factor", "factor_norm"])
def chunk_sums(
    x,
    y,
    phi,
    weight,
    weight_low,
    factor,
    factor_norm,
    sums,
    norms,
    chunks,
    x_row,
    x_head,
    x_token,
    y_row,
    y_head,
    y_token,
    phi_row,
    phi_head,
    phi_token,
    T,
    KV_HEADS,
    D,
    V,
    F,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    HALF: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    ACC: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s = sum a phi y^T (F, V) and z = sum b phi (F,) of one chunk and KV head.

    Of keys: a = b = 1, 0 for sinks (factor None). In the backward pass, of queries: a = `factor`, b = `factor_norm`,
    (B, H, T), over the rows of the whole group. Axis 2 of the grid counts blocks of V and of F, of which hedgehog has
    two, its halves.
    """
    p, block = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)  # times a stride it may leave 32 bits
    entry = chunks + p * FIELDS
    tokens = tl.load(entry + TOKENS)
    row = tl.load(entry + ROW).to(tl.int64)
    column = tl.load(entry + COLUMN).to(tl.int64)
    position = tl.load(entry + CHUNK) * WINDOW
    blocks_v = tl.cdiv(V, BLOCK_V)
    first_v = (block % blocks_v) * BLOCK_V
    half = block // blocks_v
    first_f = half * BLOCK_F
    sign = 1.0 - 2.0 * half
    if FEATURES == "hedgehog":
        first_f = 0
    r = tl.arange(0, BLOCK_M)
    e = first_v + tl.arange(0, BLOCK_V)[None, :]
    f = first_f + tl.arange(0, BLOCK_F)
    x += row * x_row + head * GROUP * x_head + column * x_token
    y += row * y_row + head * GROUP * y_head + column * y_token
    per_row = (row * KV_HEADS + head) * GROUP * T + column

    s = tl.zeros((BLOCK_F, BLOCK_V), ACC)
    z = tl.zeros((BLOCK_F,), ACC)
    for first in range(0, GROUP * WINDOW, BLOCK_M):
        g = (first + r) // WINDOW
        t = (first + r) % WINDOW
        there = (g < GROUP) & (t < tokens)
        values = tl.load(y + g[:, None] * y_head + t[:, None] * y_token + e, mask=there[:, None] & (e < V), other=0.0)
        if factor is None:
            a = (there & (position + t >= SINKS)).to(ACC)
            b = a
        else:
            at = per_row + g * T + t
            a = tl.load(factor + at, mask=there, other=0.0)
            b = tl.load(factor_norm + at, mask=there, other=0.0)
        if FEATURES == "hedgehog":
            low = first // WINDOW
            high = tl.minimum((first + BLOCK_M - 1) // WINDOW, GROUP - 1)
            x_rows = x + g * x_head + t * x_token
            projected = project(x_rows, there, g, low, high, weight, weight_low, head * GROUP, D, HALF, BLOCK_M,
                                BLOCK_K, BLOCK_F, ONE_HEAD, ACC, PRECISION)  # fmt: skip
            features = half_of_features(projected, sign, HALF, BLOCK_F)
        else:
            base = phi + row * phi_row + head * GROUP * phi_head + column * phi_token
            at = g[:, None] * phi_head + t[:, None] * phi_token + f[None, :]
            features = tl.load(base + at, mask=there[:, None] & (f < F)[None, :], other=0.0).to(ACC)
        z += tl.sum(features * b[:, None], 0)
        weighed = tl.trans((features * a[:, None]).to(FAR))
        s += tl.dot(weighed, values.to(FAR), input_precision=PRECISION, out_dtype=ACC)

    stored = f < F
    if FEATURES == "hedgehog":
        stored = f < HALF
        f += half * HALF
    base = (p.to(tl.int64) * KV_HEADS + head) * F
    tl.store(sums + base * V + f[:, None] * V + e, s, mask=stored[:, None] & (e < V))
    tl.store(norms + base + f, z, mask=stored & (first_v == 0))


@triton.jit
def prefix_sums(
    sums,
    initial,
    before,
    kept,
    sequences,
    KV_HEADS,
    SIZE,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Running sums of `sums` (P, K, SIZE) along each sequence's chunks, in one pass.

    Forward: before[c] = initial + sums[0] + ... + sums[c - 1], and those at the table's `keep` and a chunk earlier once
    more in float32: kept (2, N, K, SIZE).
    REVERSE: before[c] = sums[c + 2] + sums[c + 3] + ...: what the queries that read a state leave to its chunk.
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    first = tl.load(sequences + sequence * 3)
    count = tl.load(sequences + sequence * 3 + 1)
    keep = tl.load(sequences + sequence * 3 + 2)
    own = (sequence.to(tl.int64) * KV_HEADS + head) * SIZE + at
    plane = tl.num_programs(0).to(tl.int64) * KV_HEADS * SIZE
    total = tl.zeros((BLOCK,), ACC)
    pending = tl.zeros((BLOCK,), ACC)
    if initial is not None:
        total += tl.load(initial + own, mask=inside, other=0.0)
    for i in range(0, count):
        c = i
        if REVERSE:
            c = count - 1 - i
        here = (tl.cast(first + c, tl.int64) * KV_HEADS + head) * SIZE + at
        tl.store(before + here, total.to(before.dtype.element_ty), mask=inside)
        new = tl.load(sums + here, mask=inside, other=0.0)
        if REVERSE:
            total += pending
            pending = new
        else:
            if kept is not None:
                tl.store(kept + own, total, mask=inside & (c == keep))
                tl.store(kept + plane + own, total, mask=inside & (c == keep - 1))
            total += new


@triton.jit(do_not_specialize=["T", "plane"])
def attention_forward(
    q,
    k,
    v,
    sink_k,
    sink_v,
    mix,
    phi,
    weight,
    weight_low,
    before,
    norms,
    out,
    stats,
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
    mix_row,
    mix_head,
    mix_token,
    phi_row,
    phi_head,
    phi_token,
    out_row,
    out_head,
    out_token,
    plane,
    T,
    KV_HEADS,
    D,
    V,
    F,
    scale,
    tiny,
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
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    ACC: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The outputs of BLOCK_M rows (queries of one chunk and one KV group) and what the backward pass needs of them.

    MIX "normalizer" or "gate" as in `near_far_attention`; "far" has no near side: out = phi_q S / n, top = log n.
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
    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_V)[None, :]
    low = first // WINDOW
    high = tl.minimum((first + BLOCK_M - 1) // WINDOW, GROUP - 1)
    q += row * q_row + head * GROUP * q_head + column * q_token
    queries = tl.load(q + g[:, None] * q_head + t[:, None] * q_token + d, mask=there[:, None] & (d < D), other=0.0)

    top = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    if MIX != "far":
        # The chunk before and the own one stand in consecutive columns; key i of them is at i - past in the chunk.
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
            top, total, acc = attend(queries, key, value, seen, top, total, acc, scale, ACC, PRECISION)
        if SINKS > 0:
            # Sinks inside the window are among its keys already.
            shown = tl.minimum(tl.load(entry + SINK_COUNT), (chunk - 1) * WINDOW)
            sink_column = tl.load(entry + SINK_COLUMN).to(tl.int64)
            keys = sink_k + row * sink_k_row + head * sink_k_head + sink_column * sink_k_token
            values = sink_v + row * sink_v_row + head * sink_v_head + sink_column * sink_v_token
            for begin in range(0, shown, BLOCK_S):
                i = begin + tl.arange(0, BLOCK_S)
                stored = i < shown
                key = tl.load(keys + i[:, None] * sink_k_token + d, mask=stored[:, None] & (d < D), other=0.0)
                value = tl.load(values + i[:, None] * sink_v_token + e, mask=stored[:, None] & (e < V), other=0.0)
                top, total, acc = attend(queries, key, value, stored[None, :], top, total, acc, scale, ACC, PRECISION)
    else:
        total += 1.0

    far = tl.zeros((BLOCK_M,), ACC)
    if FEATURES != "none":
        if (local > 0) & (chunk > 1):
            base = ((p - 1).to(tl.int64) * KV_HEADS + head) * F
            state = before + base * V
            f = tl.arange(0, BLOCK_F)
            # n = phi_q . z
            n = tl.zeros((BLOCK_M,), ACC)
            if FEATURES == "hedgehog":
                x_rows = q + g * q_head + t * q_token
                projected = project(x_rows, there, g, low, high, weight, weight_low, head * GROUP, D, HALF, BLOCK_M,
                                    BLOCK_K, BLOCK_F, ONE_HEAD, ACC, PRECISION)  # fmt: skip
                for half in range(2):
                    features = half_of_features(projected, 1.0 - 2.0 * half, HALF, BLOCK_F)
                    z = tl.load(norms + base + half * HALF + f, mask=f < HALF, other=0.0)
                    n += tl.sum(features * z[None, :], 1)
            else:
                feature_rows = phi + row * phi_row + head * GROUP * phi_head + column * phi_token
                for begin in range(0, F, BLOCK_F):
                    i = begin + f
                    at = g[:, None] * phi_head + t[:, None] * phi_token + i[None, :]
                    features = tl.load(feature_rows + at, mask=there[:, None] & (i < F)[None, :], other=0.0).to(ACC)
                    n += tl.sum(features * tl.load(norms + base + i, mask=i < F, other=0.0)[None, :], 1)
            some = n > tiny
            safe = tl.where(some, n, 1.0)
            logit = tl.zeros((BLOCK_M,), ACC)
            if mix is not None:
                mixes = mix + row * mix_row + head * GROUP * mix_head + column * mix_token
                logit += tl.load(mixes + g * mix_head + t * mix_token, mask=there, other=0.0)
            # What phi_q S is multiplied by before the division by `total`.
            if MIX == "normalizer":
                mass = tl.where(some, logit + tl.log(safe), -float("inf"))
                new_top = tl.maximum(top, mass)
                shrink = tl.exp(top - new_top)
                share = tl.exp(mass - new_top)
                total = total * shrink + share
                acc = acc * shrink[:, None]
                factor = share / safe
                top = new_top
            elif MIX == "gate":
                share = tl.where(some, 1.0 / (1.0 + tl.exp(-logit)), 0.0)
                acc = acc * tl.where(some, 1.0 / (1.0 + tl.exp(logit)), 1.0)[:, None]
                factor = share / safe * total
            else:
                top = tl.where(some, tl.log(safe), -float("inf"))
                factor = tl.where(some, 1.0 / safe, 0.0)
            far = factor / total
            if FEATURES == "hedgehog":
                for half in range(2):
                    features = half_of_features(projected, 1.0 - 2.0 * half, HALF, BLOCK_F) * factor[:, None]
                    stored_sums = load_state(state, half * HALF + f, V, (half + 1) * HALF, BLOCK_V)
                    acc += tl.dot(features.to(FAR), stored_sums, input_precision=PRECISION, out_dtype=ACC)
            else:
                for begin in range(0, F, BLOCK_F):
                    i = begin + f
                    at = g[:, None] * phi_head + t[:, None] * phi_token + i[None, :]
                    features = tl.load(feature_rows + at, mask=there[:, None] & (i < F)[None, :], other=0.0).to(ACC)
                    stored_sums = load_state(state, i, V, F, BLOCK_V)
                    weighed = (features * factor[:, None]).to(FAR)
                    acc += tl.dot(weighed, stored_sums, input_precision=PRECISION, out_dtype=ACC)

    out += row * out_row + head * GROUP * out_head + column * out_token
    at = g[:, None] * out_head + t[:, None] * out_token + e
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=there[:, None] & (e < V))
    stats += (row * KV_HEADS + head) * GROUP * T + column
    at = g * T + t
    tl.store(stats + at, top, mask=there)
    tl.store(stats + plane + at, 1.0 / total, mask=there)
    tl.store(stats + 2 * plane + at, far, mask=there)
