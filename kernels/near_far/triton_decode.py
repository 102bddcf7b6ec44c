"""Launches the decode step of `triton_decode_kernels`: tiles and splits for a shape and a target, and buffers."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..devices import INTERPRETER, Target
from ..launch import current_target, launch
from .few_tokens import fold
from .memory import Memory
from .mixers import Hedgehog, Mixer, accumulation_dtype
from .triton_arguments import TL_TYPES, last_contiguous, tile
from .triton_decode_kernels import decode_combine, decode_prepare, decode_step

__all__ = ["Blocks", "decode_blocks", "triton_step"]

# Programs that a step should have, so that most multiprocessors of an A100 (108) or H100 (132) have one.
PROGRAMS = 128
SMALLEST_SHARE = 16


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


@lru_cache(maxsize=256)  # half of a step's time on the host otherwise
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
    block_d, block_v = tile(head_dim), tile(value_dim)
    # A tile of keys or values has at most 8 KiB, so that registers hold what is made of it.
    rows = 8192 // (max(block_d, block_v) * element_bytes)
    slot_share, block_n = share_and_block(2 * window, 16 if tests else max(16, min(64, rows)))
    sink_share, block_s = share_and_block(sinks, 16 if tests else 32)
    feature_share, block_f = share_and_block(half, 16 if tests or block_v > 128 or element_bytes > 2 else 32)
    fold_f = tile(half)
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

    What `triton_obstacle` finds is the caller's to ask. Query rows of a tile that no head owns cost nothing but
    registers, so groups need not be multiples of 16.

    Raises:
        LinearizeError: a mixer other than Hedgehog, or a memory whose tensors are not contiguous.
    """
    from linearize.errors import LinearizeError

    if mixer is not None and type(mixer) is not Hedgehog:
        raise LinearizeError(
            f"near_far_step: the Triton step knows no mixer {type(mixer).__name__}; use Hedgehog, or the PyTorch step"
        )
    undo = memory.undo
    if undo is None:
        raise LinearizeError("near_far_step: the Triton step keeps what tokens are taken back by; use Memory.empty")
    captured = q.is_cuda and torch.cuda.is_current_stream_capturing()
    memory.uniform = None if captured else memory.uniform
    if mixer is None:
        fold(memory, None, window=window, sinks=sinks)
    s, z = (None, None) if mixer is None or memory.state is None else memory.state
    ring = {"near_k": memory.near_k, "near_v": memory.near_v, "sink_k": memory.sink_k, "sink_v": memory.sink_v}
    rest: dict[str, Tensor | None] = {"lengths": memory.lengths, "state_s": s, "state_z": z}
    held = {**ring, **rest}
    for name, x in {"keys": memory.keys, "values": memory.values, **rest}.items():
        if x is not None and not x.is_contiguous():
            raise LinearizeError(f"near_far_step: the memory's {name} are not contiguous; copy it with .contiguous()")
    q, k, v = (last_contiguous(x) for x in (q, k, v))

    (batch, heads, _, head_dim), kv_heads, value_dim = q.shape, k.shape[1], v.shape[-1]
    half = 0 if mixer is None else mixer.num_features // 2
    target = current_target(q.device)
    dtype = accumulation_dtype(q)
    exact = q.dtype in (torch.float32, torch.float64)
    blocks = decode_blocks(
        target, batch=batch, kv_heads=kv_heads, group=heads // kv_heads, window=window, sinks=sinks, head_dim=head_dim,
        value_dim=value_dim, half=half, element_bytes=q.element_size(), splits=splits,
    )  # fmt: skip

    def chosen(*names: str) -> dict[str, int]:
        return {name: getattr(blocks, name) for name in names}

    common = {
        **held, "q": q, "q_row": q.stride(0), "q_head": q.stride(1), "KV_HEADS": kv_heads, "WINDOW": window,
        "SINKS": sinks, "D": head_dim, "V": value_dim, "HALF": half,
        "ACC": TL_TYPES[dtype],
    }  # fmt: skip
    projected = None
    if isinstance(mixer, Hedgehog) and undo.state is not None:
        kept = {"undo_k": undo.keys, "undo_v": undo.values, "undo_s": undo.state.s, "undo_z": undo.state.z}
        projected = q.new_empty(batch, heads, half, dtype=dtype)
        folds = batch * kv_heads * triton.cdiv(value_dim, blocks.FOLD_SHARE)
        projects = triton.cdiv(batch, blocks.ROWS) * heads * triton.cdiv(half, blocks.BLOCK_P)
        arguments = {
            **common, **kept, "projected": projected, "query_weight": mixer.query_weight.detach().contiguous(),
            "key_weight": mixer.key_weight.detach().contiguous(), "batch": batch, "folds": folds, "HEADS": heads,
            "FEATURE_DOT": "ieee" if exact or target.backend == "hip" else "tf32x3",
            **chosen("ROWS", "PROJECT_D", "BLOCK_P", "FOLD_N", "FOLD_D", "FOLD_F", "FOLD_V", "FOLD_SHARE"),
        }  # fmt: skip
        for name in ("sink_k", "sink_v"):
            del arguments[name]
        launch(decode_prepare, (folds + projects,), arguments, num_warps=4, num_stages=1)

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
    ending = {
        "lengths": memory.lengths, "mix_logit": mix_logit, "mix_row": mix_row, "mix_head": mix_head, "out": out,
        "part_acc": part_acc, "part_stats": part_stats, "far_acc": far_acc, "V": value_dim, "FAR": far,
        "TINY": torch.finfo(dtype).tiny, "ACC": common["ACC"], **chosen("SPLITS", "BLOCK_V"),
    }  # fmt: skip
    arguments = {
        **common, **ending, "k": k, "v": v, "projected": projected, "k_row": k.stride(0), "k_head": k.stride(1),
        "v_row": v.stride(0), "v_head": v.stride(1), "GROUP": heads // kv_heads,
        "scale": head_dim**-0.5 if scale is None else float(scale),
        "STATE_DOT": "ieee" if exact or target.backend == "hip" else "tf32",
        **chosen("TILES", "SLOT_SHARE", "SINK_SHARE", "FEATURE_SHARE", "BLOCK_G", "BLOCK_N", "BLOCK_S", "BLOCK_F",
                 "BLOCK_D", "BLOCK_HALF"),
    }  # fmt: skip
    # Products of float32 operands need more registers: wide heads get them from more warps.
    warps = 8 if blocks.BLOCK_V * q.element_size() > 512 else 4
    launch(decode_step, (batch * kv_heads * blocks.TILES, blocks.SPLITS), arguments, num_warps=warps, num_stages=2)
    if blocks.SPLITS > 1:
        launch(decode_combine, (batch * heads,), {**ending, "HEADS": heads}, num_warps=4, num_stages=1)
    else:
        memory.lengths.add_(1)
    memory.uniform = None if memory.uniform is None else memory.uniform + 1
    return out
