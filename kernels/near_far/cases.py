"""The launches that the offline compiler checks: every kernel at the shapes of real models."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..devices import Target
from ..launch import Launch, recording
from . import triton_transfer
from .counts import MODELS, Shape, kernel_work
from .memory import Memory
from .mixers import Hedgehog
from .rows import Rows
from .traffic import DecodeShape, decode_work
from .triton_decode import decode_blocks, triton_step
from .triton_near_far import Problem, near_far_backward, near_far_forward

__all__ = ["DECODE_BATCHES", "MODELS", "WINDOWS", "Case", "cases", "decode_shape", "shapes"]

TOKENS = 8192
TRANSFER_TOKENS = 2048  # the objectives of transfer are quadratic
DECODE_BATCHES = (1, 16)
SINKS = 4
WINDOWS = (64, 128)


@dataclass(frozen=True)
class Case:
    """One launch. flops, bytes: what it must compute and move at least, see `counts`."""

    model: str
    window: int
    kernel: str
    launch: Launch
    flops: int
    bytes: int


def cases(target: Target) -> Iterator[Case]:
    """Every kernel at every model and window, bfloat16: prefill, a decode step, transfer; blocks for `target`."""
    for model, shape in shapes():
        yield from _prefill_cases(model, shape, target)
        for batch in DECODE_BATCHES:
            yield from _decode_cases(model, shape, target, batch)
        yield from _transfer_cases(model, replace(shape, tokens=TRANSFER_TOKENS), target)


def _tokens(shape: Shape, heads: int, size: int) -> Tensor:
    return torch.empty(1, shape.tokens, heads, size, dtype=torch.bfloat16, device="meta").transpose(1, 2)


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a model's shape, as a projection lays them out."""
    sizes = (shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim), (shape.kv_heads, shape.value_dim)
    return tuple(_tokens(shape, *size) for size in sizes)  # type: ignore[return-value]


def decode_shape(shape: Shape, target: Target, batch: int) -> DecodeShape:
    """A decode step of this shape, with as many splits as are chosen for the target."""
    s = shape
    blocks = decode_blocks(
        target, batch=batch, kv_heads=s.kv_heads, group=s.heads // s.kv_heads, window=s.window, sinks=s.sinks,
        head_dim=s.head_dim, value_dim=s.value_dim, half=s.half, element_bytes=s.element, splits=None,
    )  # fmt: skip
    return DecodeShape(
        batch, s.heads, s.kv_heads, s.head_dim, s.value_dim, s.half, s.window, s.sinks, splits=blocks.SPLITS
    )


def shapes() -> Iterator[tuple[str, Shape]]:
    """Every model and window."""
    for model, (heads, kv_heads, head_dim, half) in MODELS.items():
        for window in WINDOWS:
            yield model, Shape(heads, kv_heads, head_dim, head_dim, half, window, SINKS, TOKENS)


def _decode_cases(model: str, shape: Shape, target: Target, batch: int) -> Iterator[Case]:
    heads, kv_heads = shape.heads, shape.kv_heads
    q, k, v = (
        torch.empty(batch, own, 1, size, dtype=torch.bfloat16, device="meta")
        for own, size in ((heads, shape.head_dim), (kv_heads, shape.head_dim), (kv_heads, shape.value_dim))
    )
    with torch.device("meta"):
        mixer = Hedgehog(heads, kv_heads, shape.head_dim, shape.half)
        mix = torch.empty(batch, heads, 1)
    memory = Memory.empty(k, v, mixer, window=shape.window, sinks=shape.sinks)
    with recording(target) as launches:
        triton_step(q, k, v, memory, mixer, mix, window=shape.window, sinks=shape.sinks)
    sizes = decode_shape(shape, target, batch)
    for launch in launches:
        name = launch.kernel.__name__
        flops, moved = decode_work(name, sizes)
        yield Case(model, shape.window, f"{name}, batch {batch}", launch, round(flops), round(moved))


def _transfer_cases(model: str, shape: Shape, target: Target) -> Iterator[Case]:
    q, k, v = _inputs(shape)
    phi_q, phi_k = (_tokens(shape, heads, 2 * shape.half) for heads in (shape.heads, shape.kv_heads))
    row = torch.empty(1, shape.heads, shape.tokens, device="meta")
    options: dict[str, Any] = {"window": shape.window, "sinks": shape.sinks, "scale": shape.head_dim**-0.5}
    with recording(target) as launches:
        triton_transfer.split_attention(q, k, v, **options)
        triton_transfer.far_sums(q, k, row, phi_q, phi_k, **options)
        triton_transfer.far_gradients(q, k, row, phi_q, phi_k, row, row, row, **options)
    for launch in launches:
        name = launch.kernel.__name__
        yield Case(model, shape.window, name, launch, *kernel_work(name, shape))


def _prefill_cases(model: str, shape: Shape, target: Target) -> Iterator[Case]:
    q, k, v = _inputs(shape)
    w_q, w_k = (torch.empty(h, shape.head_dim, shape.half, device="meta") for h in (shape.heads, shape.kv_heads))
    mix = torch.empty(1, shape.heads, shape.tokens, device="meta")
    chunks = -(-shape.tokens // shape.window)
    table, sequences = (torch.empty(n, m, dtype=torch.int32, device="meta") for n, m in ((chunks + 1, 8), (1, 3)))
    rows = Rows(table, sequences, chunks, padded=False)
    problem = Problem(shape.window, shape.sinks, "normalizer", "hedgehog", shape.head_dim**-0.5)
    with recording(target) as forward:
        out, stats, _ = near_far_forward(q, k, v, k, v, mix, w_q, w_k, rows, problem)
    with recording(target) as backward:
        near_far_backward(out, None, q, k, v, mix, w_q, w_k, out, stats, rows, problem)
    seen = set()
    for launches, ending in ((forward, ""), (backward, "_backward")):
        for launch in launches:
            name = launch.kernel.__name__
            if name == "chunk_sums" and launch.arguments["GROUP"] > 1:
                name += ending
            # States are computed again in the backward pass, and sums of the normaliser are as those of the state.
            if name in seen:
                continue
            seen.add(name)
            yield Case(model, shape.window, name, launch, *kernel_work(name, shape))
