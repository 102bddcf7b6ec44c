"""One measurement of the decode benchmark: a prefill, the rest of the context filled in, and timed steps."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.benchmarks.filling import extend
from linearize.benchmarks.inference import device_of
from linearize.benchmarks.machine import synchronize
from linearize.benchmarks.modes import Mode, compilations, compiled_call, cuda_graphs_skipped, first_line, preallocated
from linearize.benchmarks.speed import Sample
from linearize.cache import cache_bytes
from linearize.projections import fast_projections

__all__ = ["WARMUP", "OutOfMemory", "Run", "measure", "measure_prefill", "memory_errors"]

# A CUDA graph is compiled in the first step, recorded in the second and replayed from the third on.
WARMUP = 4


@dataclass(frozen=True)
class Run:
    """One measurement.

    Attributes:
        mode: how to decode.
        prompt: LongTensor (batch, n), which is read.
        filled: tokens that follow it in the cache without having been read.
        capacity: tokens that a preallocated cache holds.
        decode_tokens: timed steps.
    """

    mode: Mode
    prompt: Tensor
    filled: int
    capacity: int
    decode_tokens: int


class OutOfMemory(Exception):
    """A measurement ran out of memory, in one line."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn an allocation that failed into `OutOfMemory`; on a CPU PyTorch raises a plain RuntimeError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"out of memory: {first_line(error)}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(f"out of memory: {first_line(error)}") from error


def measure_prefill(model: nn.Module, prompt: Tensor) -> float:
    """Milliseconds of reading a prompt, LongTensor (batch, length), into the cache that the model makes itself."""
    return _prefill(model, prompt.to(device_of(model)), None)[1]


def _prefill(model: nn.Module, prompt: Tensor, past: Any) -> tuple[Any, float]:
    gc.collect()  # here rather than inside a timed step
    synchronize(prompt.device)
    start = time.perf_counter()
    # Logits of the last token only, as in generation: all of them would be gigabytes.
    output = model(input_ids=prompt, past_key_values=past, use_cache=True, logits_to_keep=1)
    synchronize(prompt.device)
    return output, 1e3 * (time.perf_counter() - start)


def measure(model: nn.Module, run: Run) -> Sample:
    """Prefill a prompt, fill in the rest of the context, warm up, then time greedy steps, one token each.

    Args:
        model: in evaluation mode; without gradients, but not in inference mode, in which nothing compiles as `generate`
            compiles it.
        run: what to do.
    """
    if run.mode.projections:
        with fast_projections(model):
            return measure(model, replace(run, mode=replace(run.mode, projections=False)))
    device = device_of(model)
    past = preallocated(model, run.capacity) if run.mode.static else None
    output, prefill_ms = _prefill(model, run.prompt.to(device), past)
    past = output.past_key_values
    if run.filled:
        extend(past, run.filled)
    step = compiled_call(model, device) if run.mode.compiled else model
    times, before, skips = [], 0, -cuda_graphs_skipped() if run.mode.compiled else 0
    for index in range(WARMUP + run.decode_tokens):
        token = output.logits[:, -1:].argmax(-1)
        if run.mode.compiled and index == WARMUP:
            before = compilations()
        if run.mode.compiled and device.type == "cuda":
            # The logits of the step before, which a CUDA graph is about to overwrite, are done with.
            torch.compiler.cudagraph_mark_step_begin()
        synchronize(device)
        start = time.perf_counter()
        output = step(input_ids=token, past_key_values=past, use_cache=True)
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return Sample(
        prefill_ms=None if run.filled else prefill_ms,
        step_ms=tuple(times[WARMUP:]),
        cache_bytes=cache_bytes(past),
        filled=run.filled,
        first_ms=times[0],
        recompiles=compilations() - before if run.mode.compiled else 0,
        skipped_graphs=skips + cuda_graphs_skipped() if run.mode.compiled else 0,
    )
