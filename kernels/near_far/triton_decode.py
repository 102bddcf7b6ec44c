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
where an error would sit in an exponent or stay in the state, STATE_DOT where the state is read.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import INTERPRETER, Target
from ..launch import current_target, launch
from .memory import Memory
from .mixers import Hedgehog, Mixer, accumulation_dtype
from .triton_forward import half_of_features

__all__ = ["decode_blocks", "decode_combine", "decode_prepare", "decode_step", "triton_step", "unsupported"]

LARGEST_HEAD = 256
LARGEST_HALF = 256
# Programs that a step should have, so that most multiprocessors of an A100 (108) or H100 (132) have one.
PROGRAMS = 128
SMALLEST_SHARE = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def decode_prepare(
    q,
    near_k,
    near_v,
    query_weight,
    key_weight,
    state_s,
    state_z,
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
            pid // parts, pid % parts, near_k, near_v, key_weight, state_s, state_z, lengths, KV_HEADS, WINDOW, SINKS,
            D, V, HALF, FOLD_N, FOLD_D, FOLD_F, FOLD_V, FOLD_SHARE, FEATURE_DOT, ACC,
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
    """s += phi_k^T v and z += sum phi_k over chunk c - 2 without sinks, if the row's next token begins chunk c >= 2.

    A program has FOLD_SHARE columns of v and all features, whose softmax needs them all.
    """
    position = tl.load(lengths + owner // KV_HEADS)
    chunk = position // WINDOW
    if (position % WINDOW == 0) & (chunk >= 2):
        f = tl.arange(0, FOLD_F)
        w = weight + (owner % KV_HEADS) * D * HALF
        keys = near_k + owner.to(tl.int64) * (2 * WINDOW * D)
        values = near_v + owner.to(tl.int64) * (2 * WINDOW * V)
        s = state_s + owner.to(tl.int64) * (2 * HALF * V)
        z = state_z + owner * (2 * HALF)
        for first in range(0, WINDOW, FOLD_N):
            i = first + tl.arange(0, FOLD_N)
            slot = (chunk % 2) * WINDOW + i
            stored = i < WINDOW
            p = tl.zeros((FOLD_N, FOLD_F), ACC)
            for begin in range(0, D, FOLD_D):
                d = begin + tl.arange(0, FOLD_D)
                there = stored[:, None] & (d[None, :] < D)
                k = tl.load(keys + slot[:, None] * D + d[None, :], mask=there, other=0.0).to(ACC)
                there = (d[:, None] < D) & (f[None, :] < HALF)
                columns = tl.load(w + d[:, None] * HALF + f[None, :], mask=there, other=0.0).to(ACC)
                p += tl.dot(k, columns, input_precision=FEATURE_DOT, out_dtype=ACC)
            kept = (stored & (position - 2 * WINDOW + i >= SINKS))[:, None]
            once = (f < HALF) & (part == 0)
            for minus in tl.static_range(2):
                phi = tl.where(kept, half_of_features(p, 1.0 - 2.0 * minus, HALF, FOLD_F), 0.0)
                z_at = z + minus * HALF + f
                tl.store(z_at, tl.load(z_at, mask=once, other=0.0) + tl.sum(phi, 0), mask=once)
                phi = tl.trans(phi)
                for begin in range(part * FOLD_SHARE, tl.minimum((part + 1) * FOLD_SHARE, V), FOLD_V):
                    e = begin + tl.arange(0, FOLD_V)[None, :]
                    v = tl.load(values + slot[:, None] * V + e, mask=stored[:, None] & (e < V), other=0.0).to(ACC)
                    s_at = s + (minus * HALF + f)[:, None] * V + e
                    inside = (f[:, None] < HALF) & (e < V)
                    total = tl.load(s_at, mask=inside, other=0.0).to(ACC)
                    total += tl.dot(phi, v, input_precision=FEATURE_DOT, out_dtype=ACC)
                    tl.store(s_at, total.to(state_s.dtype.element_ty), mask=inside)
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
    near_k += owner.to(tl.int64) * (2 * WINDOW * D)
    near_v += owner.to(tl.int64) * (2 * WINDOW * V)
    sink_k += owner * (SINKS * D)
    sink_v += owner * (SINKS * V)
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
    inside = (e < V)[None, :] & (part >= 0)[:, None]
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


@dataclass(frozen=True)
class Blocks:
    """Tiles and splits of one step; names as in the kernels.

    The shares are what a split owns at most: multiples of their blocks.
    """

    SPLITS: int
    TILES: int
    SLOT_SHARE: int
    SINK_SHARE: int
    FEATURE_SHARE: int
    BLOCK_G: int
    BLOCK_N: int
    BLOCK_S: int
    BLOCK_F: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_HALF: int
    ROWS: int
    BLOCK_P: int
    PROJECT_D: int
    FOLD_N: int
    FOLD_D: int
    FOLD_F: int
    FOLD_V: int
    FOLD_SHARE: int


def decode_blocks(
    target: Target,
    *,
    batch: int,
    kv_heads: int,
    group: int,
    window: int,
    sinks: int,
    head_dim: int,
    value_dim: int,
    half: int,
    element_bytes: int,
    splits: int | None = None,
) -> Blocks:
    """What a step of this shape runs with. half: features of one sign, 0 without a state; element_bytes: of the
    inputs; splits: instead of the chosen number, a power of two."""
    block_g = 16
    tiles = triton.cdiv(group, block_g)
    if splits is None:
        splits = 1
        share = max(2 * window, half)
        while batch * kv_heads * tiles * splits < PROGRAMS and share // (2 * splits) >= SMALLEST_SHARE:
            splits *= 2

    def share_and_block(count: int, largest: int) -> tuple[int, int]:
        share = triton.cdiv(count, splits)
        block = max(SMALLEST_SHARE, min(largest, triton.next_power_of_2(share)))
        return triton.cdiv(share, block) * block, block

    tests = target is INTERPRETER  # small blocks, so that every loop turns
    block_d, block_v = (max(16, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    # A tile of keys or values has at most 8 KiB, so that registers hold what is made of it.
    rows = 8192 // (max(block_d, block_v) * element_bytes)
    slot_share, block_n = share_and_block(2 * window, 16 if tests else max(16, min(64, rows)))
    sink_share, block_s = share_and_block(sinks, 16 if tests else 32)
    feature_share, block_f = share_and_block(half, 16 if tests or block_v > 128 or element_bytes > 2 else 32)
    fold_f = max(16, triton.next_power_of_2(half))
    # Every program that folds computes all features of the chunk: several a key head only where few have work.
    fold_v = min(block_v, 16 if tests else 32)
    fold_share = fold_v * triton.cdiv(block_v, fold_v * max(1, PROGRAMS // max(1, 2 * batch * kv_heads)))
    return Blocks(
        SPLITS=splits,
        TILES=tiles,
        SLOT_SHARE=slot_share,
        SINK_SHARE=sink_share,
        FEATURE_SHARE=feature_share,
        BLOCK_G=block_g,
        BLOCK_N=block_n,
        BLOCK_S=block_s,
        BLOCK_F=block_f,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        BLOCK_HALF=fold_f,
        ROWS=1 if batch <= 1 else 16,
        BLOCK_P=16 if tests else 32,
        PROJECT_D=min(block_d, 16 if tests else 128 if batch <= 1 else 64),
        FOLD_N=16 if tests else max(16, min(32 if fold_f <= 128 else 16, triton.next_power_of_2(window))),
        FOLD_D=min(block_d, 16 if tests else 32),
        FOLD_F=fold_f,
        FOLD_V=fold_v,
        FOLD_SHARE=fold_share,
    )


def unsupported(q: Tensor, v: Tensor, mixer: Mixer | None) -> str | None:
    """Why the Triton step cannot do this, in words; None if it can. float64 is for the interpreter alone."""
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if q.dtype not in DTYPES and (q.is_cuda or q.dtype != torch.float64):
        return f"{q.dtype} inputs"
    if max(head_dim, value_dim) > LARGEST_HEAD:
        return f"heads of {max(head_dim, value_dim)}, above {LARGEST_HEAD}"
    if mixer is not None and type(mixer) is not Hedgehog:
        return f"mixer {type(mixer).__name__}"
    if mixer is not None and mixer.num_features > 2 * LARGEST_HALF:
        return f"{mixer.num_features} features, above {2 * LARGEST_HALF}"
    return None


def triton_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    mixer: Mixer | None = None,
    mix_logit: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    mix: str = "normalizer",
    scale: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of one new token of every row, which `memory` remembers in place: (B, H, 1, V) in q's dtype.

    q: (B, H, 1, D), k: (B, K, 1, D), v: (B, K, 1, V), the last dimension contiguous; mix_logit: (H,), (B, H, 1) or
    None. Other arguments as in `near_far_step`; splits: a power of two instead of the chosen number of splits. Nothing
    waits for the device, so a step may be captured in a CUDA graph after one warm-up; from then on the memory's
    `uniform` is None, since replays do not run this function.

    Raises:
        LinearizeError: a case of `unsupported`, or a memory whose tensors are not contiguous.
    """
    from linearize.errors import LinearizeError

    reason = unsupported(q, v, mixer)
    if reason is not None:
        raise LinearizeError(f"near_far_step: the Triton kernels do not take {reason}; use the PyTorch step")
    s, z = (None, None) if mixer is None or memory.state is None else memory.state
    held = {"near_k": memory.near_k, "near_v": memory.near_v, "sink_k": memory.sink_k, "sink_v": memory.sink_v}
    held |= {"lengths": memory.lengths, "state_s": s, "state_z": z}
    for name, x in held.items():
        if x is not None and not x.is_contiguous():
            raise LinearizeError(f"near_far_step: the memory's {name} is not contiguous; copy it with .contiguous()")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))

    (batch, heads, _, head_dim), kv_heads, value_dim = q.shape, k.shape[1], v.shape[-1]
    half = 0 if mixer is None else mixer.num_features // 2
    target = current_target(q.device)
    dtype = accumulation_dtype(q)
    blocks = decode_blocks(
        target, batch=batch, kv_heads=kv_heads, group=heads // kv_heads, window=window, sinks=sinks, head_dim=head_dim,
        value_dim=value_dim, half=half, element_bytes=q.element_size(), splits=splits,
    )  # fmt: skip
    wide = q.dtype in (torch.float32, torch.float64)
    common = {"ACC": tl.float64 if dtype == torch.float64 else tl.float32}
    shape = {"KV_HEADS": kv_heads, "WINDOW": window, "SINKS": sinks, "D": head_dim, "V": value_dim, "HALF": half}

    projected = None
    if isinstance(mixer, Hedgehog):
        projected = q.new_empty(batch, heads, half, dtype=dtype)
        folds = batch * kv_heads * triton.cdiv(value_dim, blocks.FOLD_SHARE)
        projects = triton.cdiv(batch, blocks.ROWS) * heads * triton.cdiv(half, blocks.BLOCK_P)
        names = ("ROWS", "PROJECT_D", "BLOCK_P", "FOLD_N", "FOLD_D", "FOLD_F", "FOLD_V", "FOLD_SHARE")
        launch(
            decode_prepare,
            (folds + projects,),
            {
                "q": q, "near_k": memory.near_k, "near_v": memory.near_v,
                "query_weight": mixer.query_weight.detach().contiguous(),
                "key_weight": mixer.key_weight.detach().contiguous(),
                "state_s": s, "state_z": z, "lengths": memory.lengths, "projected": projected,
                "q_row": q.stride(0), "q_head": q.stride(1), "batch": batch, "folds": folds, "HEADS": heads,
                "FEATURE_DOT": "tf32x3" if target.backend == "cuda" and not wide else "ieee",
                **shape, **common, **{name: getattr(blocks, name) for name in names},
            },
            num_warps=4,
            num_stages=1,
        )  # fmt: skip

    out = q.new_empty(batch, heads, 1, value_dim)
    far = "none" if mixer is None else mix
    part_acc = part_stats = far_acc = None
    if blocks.SPLITS > 1:
        part_acc = q.new_empty(batch, heads, blocks.SPLITS, value_dim, dtype=dtype)
        part_stats = q.new_empty(batch, heads, blocks.SPLITS, 3, dtype=dtype)
        far_acc = torch.empty_like(part_acc) if far == "gate" else None
    mix_row, mix_head = 0, 0
    if mixer is None:
        mix_logit = None
    elif mix_logit is not None:
        mix_row, mix_head = (0, mix_logit.stride(0)) if mix_logit.ndim == 1 else mix_logit.stride()[:2]
    last = {
        "mix_logit": mix_logit, "lengths": memory.lengths, "out": out, "part_acc": part_acc, "part_stats": part_stats,
        "far_acc": far_acc, "mix_row": mix_row, "mix_head": mix_head, "FAR": far, "SPLITS": blocks.SPLITS,
        "BLOCK_V": blocks.BLOCK_V, "TINY": torch.finfo(dtype).tiny, **common,
    }  # fmt: skip
    names = ("TILES", "SLOT_SHARE", "SINK_SHARE", "FEATURE_SHARE", "BLOCK_G", "BLOCK_N", "BLOCK_S", "BLOCK_F",
             "BLOCK_D", "BLOCK_HALF")  # fmt: skip
    launch(
        decode_step,
        (batch * kv_heads * blocks.TILES, blocks.SPLITS),
        {
            "q": q, "k": k, "v": v, "near_k": memory.near_k, "near_v": memory.near_v, "sink_k": memory.sink_k,
            "sink_v": memory.sink_v, "state_s": s, "state_z": z, "projected": projected, "q_row": q.stride(0),
            "q_head": q.stride(1), "k_row": k.stride(0), "k_head": k.stride(1), "v_row": v.stride(0),
            "v_head": v.stride(1), "scale": head_dim**-0.5 if scale is None else float(scale),
            "GROUP": heads // kv_heads, "STATE_DOT": "ieee" if wide or target.backend == "hip" else "tf32",
            **shape, **last, **{name: getattr(blocks, name) for name in names},
        },
        num_warps=8 if blocks.BLOCK_V * q.element_size() > 512 else 4,
        num_stages=2,
    )  # fmt: skip
    if blocks.SPLITS > 1:
        launch(decode_combine, (batch * heads,), {**last, "HEADS": heads, "V": value_dim}, num_warps=4, num_stages=1)
    else:
        memory.lengths.add_(1)
    captured = q.is_cuda and torch.cuda.is_current_stream_capturing()
    memory.uniform = None if memory.uniform is None or captured else memory.uniform + 1
    return out
