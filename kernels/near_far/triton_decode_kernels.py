"""The decode step in Triton: one new token of every row, attended and remembered, with no host in between.

Three kernels a step, launched one behind the other:

    decode_prepare  p = q W of the query features; and where a row's token begins a chunk c >= 2, chunk c - 2 from the
                    ring into the state (`_fold_chunk`; in all other steps those programs return at once)
    decode_step     softmax over the row's part of ring, sinks and new token, and the far term from the state
    decode_combine  the parts of a row into its output

Everything that depends on data is read from `lengths` on the device, so a captured graph of a step stays right for
every later token, and rows of a batch fold at different steps. A program of `decode_step` holds the G query heads of
one key head, which share its loads, and a share (split) of the 2 W slots, of the S sinks and of the features; its
numbers are the largest logit m, l = sum exp(logit - m) and acc = sum exp(logit - m) v. With mix "normalizer" the
split's far mass n = phi_q . z is one more logit, log n + mix_logit, whose value is phi_q S / n: a split has one
accumulator, and nothing is ever divided by exp(m). With mix "gate" n and phi_q S stay apart, and are plain sums.
A mass at or below the smallest normal number counts as none, as in `Mixer.read` (here: of a split).

The new token is attended from k and v, not from its slot, which the first split writes: nobody reads what another
program writes in the same launch.

Shape legend as in `memory`; HALF features of each sign, F = 2 HALF. ACC is float32, float64 for float64 inputs (in the
interpreter). Exponentials are of differences in natural units. Precision of products of float32 operands: FEATURE_DOT
where an error would sit in a feature's exponent or stay in the state, STATE_DOT where window and state are read.
"""

import triton
import triton.language as tl

from .triton_forward import half_of_features

__all__ = ["decode_combine", "decode_prepare", "decode_step"]


@triton.jit
def decode_prepare(
    q,
    near_k,
    near_v,
    query_weight,
    key_weight,
    state_s,
    state_z,
    undo_k,
    undo_v,
    undo_s,
    undo_z,
    lengths,
    projected,
    q_row,
    q_head,
    batch,
    folds,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PROJECT_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FOLD_N: tl.constexpr,
    FOLD_D: tl.constexpr,
    FOLD_F: tl.constexpr,
    FOLD_V: tl.constexpr,
    FOLD_SHARE: tl.constexpr,
    FEATURE_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """The first `folds` programs fold, the others project queries.

    Fold: programs of (row, key head, share of V). Project: of (block of rows, head, block of columns).
    """
    pid = tl.program_id(0)
    if pid < folds:
        parts: tl.constexpr = (V + FOLD_SHARE - 1) // FOLD_SHARE
        _fold_chunk(
            pid // parts, pid % parts, near_k, near_v, key_weight, state_s, state_z, undo_k, undo_v, undo_s, undo_z,
            lengths, KV_HEADS, WINDOW, SINKS, D, V, HALF, FOLD_N, FOLD_D, FOLD_F, FOLD_V, FOLD_SHARE, FEATURE_DOT, ACC,
        )  # fmt: skip
    else:
        _project_queries(
            pid - folds, q, query_weight, projected, q_row, q_head, batch, HEADS, D, HALF, ROWS, PROJECT_D, BLOCK_P,
            FEATURE_DOT, ACC,
        )  # fmt: skip


@triton.jit
def _project_queries(
    pid,
    q,
    weight,
    projected,
    q_row,
    q_head,
    batch,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PROJECT_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FEATURE_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """projected[b, h, f] = q[b, h] . W[h, :, f] for ROWS rows of one head: a tile of W serves them all."""
    columns: tl.constexpr = (HALF + BLOCK_P - 1) // BLOCK_P
    head = (pid // columns) % HEADS
    rows = ((pid // (columns * HEADS)) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = (rows < batch)[:, None]
    f = (pid % columns) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    p = tl.zeros((ROWS, BLOCK_P), ACC)
    for begin in range(0, D, PROJECT_D):
        d = begin + tl.arange(0, PROJECT_D)
        inside = (d[:, None] < D) & (f < HALF)
        w = tl.load(weight + head * D * HALF + d[:, None] * HALF + f, mask=inside, other=0.0).to(ACC)
        at = rows[:, None] * q_row + head * q_head + d[None, :]
        x = tl.load(q + at, mask=there & (d[None, :] < D), other=0.0).to(ACC)
        if ROWS == 1:
            p += tl.sum(tl.trans(x) * w, 0)[None, :]
        else:
            p += tl.dot(x, w, input_precision=FEATURE_DOT, out_dtype=ACC)
    tl.store(projected + (rows[:, None] * HEADS + head) * HALF + f, p, mask=there & (f < HALF))


@triton.jit
def _fold_chunk(
    owner,
    part,
    near_k,
    near_v,
    weight,
    state_s,
    state_z,
    undo_k,
    undo_v,
    undo_s,
    undo_z,
    lengths,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    HALF: tl.constexpr,
    FOLD_N: tl.constexpr,
    FOLD_D: tl.constexpr,
    FOLD_F: tl.constexpr,
    FOLD_V: tl.constexpr,
    FOLD_SHARE: tl.constexpr,
    FEATURE_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """s += phi_k^T v and z += sum phi_k over chunk c - 2 without sinks, if the row's next token begins chunk c >= 2;
    that chunk and the state before it are kept (`rollback`).

    A program has FOLD_SHARE columns of v and all features, whose softmax needs them all.
    """
    position = tl.load(lengths + owner // KV_HEADS)
    chunk = position // WINDOW
    if (position % WINDOW == 0) & (chunk >= 2):
        f = tl.arange(0, FOLD_F)
        w = weight + (owner % KV_HEADS) * D * HALF
        keys = near_k + owner.to(tl.int64) * ((SINKS + 2 * WINDOW) * D)
        values = near_v + owner.to(tl.int64) * ((SINKS + 2 * WINDOW) * V)
        s = state_s + owner.to(tl.int64) * (2 * HALF * V)
        z = state_z + owner * (2 * HALF)
        undo_k += owner.to(tl.int64) * (WINDOW * D)
        undo_v += owner.to(tl.int64) * (WINDOW * V)
        undo_s += owner.to(tl.int64) * (2 * HALF * V)
        undo_z += owner * (2 * HALF)
        for first in range(0, WINDOW, FOLD_N):
            i = first + tl.arange(0, FOLD_N)
            slot = (chunk % 2) * WINDOW + i
            stored = i < WINDOW
            p = tl.zeros((FOLD_N, FOLD_F), ACC)
            for begin in range(0, D, FOLD_D):
                d = begin + tl.arange(0, FOLD_D)
                there = stored[:, None] & (d[None, :] < D)
                k = tl.load(keys + slot[:, None] * D + d[None, :], mask=there, other=0.0)
                tl.store(undo_k + i[:, None] * D + d[None, :], k, mask=there & (part == 0))
                k = k.to(ACC)
                there = (d[:, None] < D) & (f[None, :] < HALF)
                columns = tl.load(w + d[:, None] * HALF + f[None, :], mask=there, other=0.0).to(ACC)
                p += tl.dot(k, columns, input_precision=FEATURE_DOT, out_dtype=ACC)
            kept = (stored & (position - 2 * WINDOW + i >= SINKS))[:, None]
            once = (f < HALF) & (part == 0)
            for minus in tl.static_range(2):
                phi = tl.where(kept, half_of_features(p, 1.0 - 2.0 * minus, HALF, FOLD_F), 0.0)
                z_at = z + minus * HALF + f
                norm = tl.load(z_at, mask=once, other=0.0)
                tl.store(undo_z + minus * HALF + f, norm, mask=once & (first == 0))
                tl.store(z_at, norm + tl.sum(phi, 0), mask=once)
                phi = tl.trans(phi)
                for begin in range(part * FOLD_SHARE, tl.minimum((part + 1) * FOLD_SHARE, V), FOLD_V):
                    e = begin + tl.arange(0, FOLD_V)[None, :]
                    there = stored[:, None] & (e < V)
                    v = tl.load(values + slot[:, None] * V + e, mask=there, other=0.0)
                    tl.store(undo_v + i[:, None] * V + e, v, mask=there & (minus == 0))
                    at = (minus * HALF + f)[:, None] * V + e
                    inside = (f[:, None] < HALF) & (e < V)
                    before = tl.load(s + at, mask=inside, other=0.0)
                    tl.store(undo_s + at, before, mask=inside & (first == 0))
                    total = before.to(ACC) + tl.dot(phi, v.to(ACC), input_precision=FEATURE_DOT, out_dtype=ACC)
                    tl.store(s + at, total.to(state_s.dtype.element_ty), mask=inside)
            # The next keys add to what was stored here, perhaps by other threads.
            tl.debug_barrier()


@triton.jit
def decode_step(
    q,
    k,
    v,
    near_k,
    near_v,
    sink_k,
    sink_v,
    state_s,
    state_z,
    projected,
    mix_logit,
    lengths,
    out,
    part_acc,
    part_stats,
    far_acc,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    mix_row,
    mix_head,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    HALF: tl.constexpr,
    FAR: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    SLOT_SHARE: tl.constexpr,
    SINK_SHARE: tl.constexpr,
    FEATURE_SHARE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    STATE_DOT: tl.constexpr,
    ACC: tl.constexpr,
    TINY: tl.constexpr,
):
    """Programs of (row, key head, tile of BLOCK_G query heads) and split. FAR: "none", "normalizer" or "gate".

    One split writes `out` (B, H, V). More write part_acc (B, H, SPLITS, V), part_stats (B, H, SPLITS, 3) with m, l and
    n, and, for the gate, far_acc (B, H, SPLITS, V).
    """
    owner = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    split = tl.program_id(1)
    row = (owner // KV_HEADS).to(tl.int64)
    kv_head = owner % KV_HEADS
    member = tile * BLOCK_G + tl.arange(0, BLOCK_G)
    live = member < GROUP
    head = kv_head * GROUP + member
    lane = row * (KV_HEADS * GROUP) + head
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    position = tl.load(lengths + row)
    chunk = position // WINDOW
    offset = position % WINDOW
    own_slot = position % (2 * WINDOW)
    # Sinks and ring of a key head lie beside each other.
    near_k += owner.to(tl.int64) * ((SINKS + 2 * WINDOW) * D)
    near_v += owner.to(tl.int64) * ((SINKS + 2 * WINDOW) * V)
    sink_k += owner.to(tl.int64) * ((SINKS + 2 * WINDOW) * D)
    sink_v += owner.to(tl.int64) * ((SINKS + 2 * WINDOW) * V)
    query = tl.load(
        q + row * q_row + head[:, None] * q_head + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0
    )

    # The new token: the first split writes it and starts from it.
    new_k = tl.load(k + row * k_row + kv_head * k_head + d, mask=d < D, other=0.0)
    new_v = tl.load(v + row * v_row + kv_head * v_head + e, mask=e < V, other=0.0)
    writes = (split == 0) & (tile == 0)
    tl.store(near_k + own_slot * D + d, new_k, mask=writes & (d < D))
    tl.store(near_v + own_slot * V + e, new_v, mask=writes & (e < V))
    tl.store(sink_k + position * D + d, new_k, mask=writes & (position < SINKS) & (d < D))
    tl.store(sink_v + position * V + e, new_v, mask=writes & (position < SINKS) & (e < V))
    top = tl.sum(query.to(ACC) * new_k[None, :].to(ACC), 1) * scale
    top = tl.where(split == 0, top, -float("inf"))
    total = tl.where(split == 0, 1.0, 0.0) + tl.zeros((BLOCK_G,), ACC)
    acc = tl.where(split == 0, new_v[None, :].to(ACC), 0.0) + tl.zeros((BLOCK_G, BLOCK_V), ACC)

    for first in range(split * SLOT_SHARE, tl.minimum((split + 1) * SLOT_SHARE, 2 * WINDOW), BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        own = slot // WINDOW == chunk % 2
        seen = (slot < 2 * WINDOW) & tl.where(own, slot % WINDOW < offset, chunk > 0)
        top, total, acc = _attend(
            query, near_k, near_v, slot, seen, top, total, acc, scale, D, V, BLOCK_D, BLOCK_V, STATE_DOT, ACC
        )
    # Sinks that the window has left behind; those inside it are among its slots.
    shown = tl.minimum((chunk - 1) * WINDOW, SINKS)
    for first in range(split * SINK_SHARE, tl.minimum((split + 1) * SINK_SHARE, SINKS), BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        top, total, acc = _attend(
            query, sink_k, sink_v, slot, slot < shown, top, total, acc, scale, D, V, BLOCK_D, BLOCK_V, STATE_DOT, ACC
        )

    n = tl.zeros((BLOCK_G,), ACC)
    u = tl.zeros((BLOCK_G, BLOCK_V), ACC)
    if FAR != "none":
        if chunk >= 2:
            state_s += owner.to(tl.int64) * (2 * HALF * V)
            state_z += owner * (2 * HALF)
            rows = projected + lane[:, None] * HALF
            all_f = tl.arange(0, BLOCK_HALF)[None, :]
            every = tl.load(rows + all_f, mask=live[:, None] & (all_f < HALF), other=0.0)
            plus = tl.where(all_f < HALF, every, -float("inf"))
            plus_top = tl.max(plus, 1)
            plus_sum = tl.sum(tl.exp(plus - plus_top[:, None]), 1)
            minus = tl.where(all_f < HALF, -every, -float("inf"))
            minus_top = tl.max(minus, 1)
            minus_sum = tl.sum(tl.exp(minus - minus_top[:, None]), 1)
            for first in range(split * FEATURE_SHARE, tl.minimum((split + 1) * FEATURE_SHARE, HALF), BLOCK_F):
                f = first + tl.arange(0, BLOCK_F)
                inside = f[:, None] < HALF
                p = tl.load(rows + f[None, :], mask=live[:, None] & (f[None, :] < HALF), other=0.0)
                at = f[:, None] * V + e[None, :]
                s = tl.load(state_s + at, mask=inside & (e[None, :] < V), other=0.0).to(ACC)
                z = tl.load(state_z + f, mask=f < HALF, other=0.0)
                phi = tl.exp(p - plus_top[:, None]) / plus_sum[:, None]
                n += tl.sum(phi * z[None, :], 1)
                u += tl.dot(phi, s, input_precision=STATE_DOT, out_dtype=ACC)
                s = tl.load(state_s + HALF * V + at, mask=inside & (e[None, :] < V), other=0.0).to(ACC)
                z = tl.load(state_z + HALF + f, mask=f < HALF, other=0.0)
                phi = tl.exp(-p - minus_top[:, None]) / minus_sum[:, None]
                n += tl.sum(phi * z[None, :], 1)
                u += tl.dot(phi, s, input_precision=STATE_DOT, out_dtype=ACC)
        logit = tl.zeros((BLOCK_G,), ACC)
        if mix_logit is not None:
            logit += tl.load(mix_logit + row * mix_row + head * mix_head, mask=live, other=0.0)
        some = n > TINY
        safe = tl.where(some, n, 1.0)
        if FAR == "normalizer":
            mass = tl.where(some, tl.log(safe) + logit, -float("inf"))
            new_top = tl.maximum(top, mass)
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            shrink = tl.exp(top - base)
            share = tl.exp(mass - base)
            total = total * shrink + share
            acc = acc * shrink[:, None] + u * (share / safe)[:, None]
            top = new_top
        elif SPLITS == 1:
            share = tl.where(some, 1.0 / (1.0 + tl.exp(-logit)), 0.0)[:, None]
            acc = acc / total[:, None]
            acc += share * (u / safe[:, None] - acc)
            total = tl.full((BLOCK_G,), 1.0, ACC)

    mask = live[:, None] & (e[None, :] < V)
    if SPLITS == 1:
        tl.store(out + lane[:, None] * V + e[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        part = lane * SPLITS + split
        tl.store(part_acc + part[:, None] * V + e[None, :], acc, mask=mask)
        tl.store(part_stats + part * 3, top, mask=live)
        tl.store(part_stats + part * 3 + 1, total, mask=live)
        if FAR == "gate":
            tl.store(part_stats + part * 3 + 2, n, mask=live)
            tl.store(far_acc + part[:, None] * V + e[None, :], u, mask=mask)


@triton.jit
def _attend(
    query,
    keys,
    values,
    slot,
    seen,
    top,
    total,
    acc,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STATE_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile of keys and values more in the online softmax (top, total, acc). A tile may have nothing to be seen."""
    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_V)[None, :]
    k = tl.load(keys + slot[:, None] * D + d, mask=seen[:, None] & (d < D), other=0.0)
    logits = tl.dot(query, tl.trans(k), input_precision=STATE_DOT, out_dtype=ACC) * scale
    logits = tl.where(seen[None, :], logits, -float("inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    shrink = tl.exp(top - base)
    weights = tl.exp(logits - base[:, None])
    v = tl.load(values + slot[:, None] * V + e, mask=seen[:, None] & (e < V), other=0.0)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=STATE_DOT, out_dtype=ACC)
    return new_top, total * shrink + tl.sum(weights, 1), acc


@triton.jit
def decode_combine(
    part_acc,
    part_stats,
    far_acc,
    mix_logit,
    lengths,
    out,
    mix_row,
    mix_head,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    FAR: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    TINY: tl.constexpr,
):
    """out (B, H, V) from the parts, a program a row and head; the program of head 0 counts the row's new token."""
    lane = tl.program_id(0).to(tl.int64)
    row = lane // HEADS
    head = lane % HEADS
    e = tl.arange(0, BLOCK_V)
    part = lane * SPLITS + tl.arange(0, SPLITS)
    at = part[:, None] * V + e[None, :]
    inside = (e < V)[None, :]
    top = tl.load(part_stats + part * 3)
    weights = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weights * tl.load(part_stats + part * 3 + 1), 0)
    acc = tl.sum(weights[:, None] * tl.load(part_acc + at, mask=inside, other=0.0), 0) / total
    if FAR == "gate":
        n = tl.sum(tl.load(part_stats + part * 3 + 2), 0)
        u = tl.sum(tl.load(far_acc + at, mask=inside, other=0.0), 0)
        share = tl.full((), 0.5, ACC)
        if mix_logit is not None:
            logit = tl.load(mix_logit + row * mix_row + head * mix_head).to(ACC)
            share = 1.0 / (1.0 + tl.exp(-logit))
        some = n > TINY
        acc += tl.where(some, share, 0.0) * (u / tl.where(some, n, 1.0) - acc)
    tl.store(out + lane * V + e, acc.to(out.dtype.element_ty), mask=e < V)
    if head == 0:
        tl.store(lengths + row, tl.load(lengths + row) + 1)
