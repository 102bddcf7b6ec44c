"""How many sequences fit into a given memory, how fast they are decoded there, and what finished answers cost.

A smaller cache is worth the sequences that fit beside each other. So the original and the student are compared each at
the largest batch that it has room for, at every context: weights and caches in `memory` bytes (activations and what a
GPU keeps for itself are not counted, see `linearize.benchmarks.step_costs`).

An answer is `prompt_tokens` read and `answer_tokens` written. Prompts are read one after another, as servers do, and
then all sequences are decoded together:

    seconds of 1000 answers  =  1000 (prefill of one prompt + answer_tokens * step of the batch / batch)

The step is that in the middle of the answer, which is the mean of a cost that grows evenly; itself it is the mean of
W consecutive ones, so that the one that folds a chunk into the state counts as often as in use.

Where the numbers are from
    measured    by `measurement.measure` at that very batch and length, each row in the best of its modes that need no
                compiler; of a long context a part is read and the rest filled in, see `linearize.benchmarks.filling`
    predicted   this machine cannot hold or reach that batch in time (`max_minutes`), so half of it is measured, or a
                quarter, ..., and half of that: what each sequence between the two adds, every further one adds, and
                no less than its bound. Of a single sequence: what it takes beyond its bound is added to the bound of
                the batch. A prompt too long to read is predicted from a shorter one, in proportion to their bounds
    bound       not even one sequence could be measured: no faster than that

`bench_capacity` returns what `write_json` stores as capacity.json.

    {"kind": "linearize.capacity", "schema": 1, "baseline": "original", "rows": [str, ...], "device": str, "dtype": str,
     "memory_bytes": int, "answer_tokens": int, "decode_tokens": int, "max_minutes": float,   decode_tokens: timed steps
     "bandwidth": {...},                                  of `roofline.bandwidth`
     "cells": [{"row": str, "context": int, "prompt_tokens": int, "batch": int,      0: not even one fits, all else null
                "weight_bytes": int, "cache_bytes": int,                             of that batch
                "step": FOUND | null, "prefill": FOUND | null,                       of the batch; of one prompt
                "tokens_per_s": float | null, "seconds_per_1000_answers": float | null}, ...],
     "seconds": float, "machine": {...}}

FOUND is {"ms": float, "how": "measured" | "predicted" | "bound", "bound_ms": float, "at": int | null, "reason": str |
null, "mode": str | null}: `at` is the batch or the prompt's tokens that were measured, `reason` why those and not all
of them, `mode` how a step was decoded, see `linearize.benchmarks.modes`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from linearize.benchmarks.evaluate import BASELINE
from linearize.benchmarks.filling import tokens_to_read
from linearize.benchmarks.inference import Rows, inference, progress_bar
from linearize.benchmarks.machine import available_memory, machine_info
from linearize.benchmarks.measurement import WARMUP, OutOfMemory, Run, measure, measure_prefill, memory_errors
from linearize.benchmarks.modes import mode_obstacle
from linearize.benchmarks.probe import Probe, probe
from linearize.benchmarks.roofline import Roof, bandwidth, calibrate, measured_roof, predict, step_seconds
from linearize.benchmarks.step_costs import ModelCosts, prefill_flops
from linearize.console import human_bytes, human_tokens
from linearize.errors import LinearizeError
from linearize.inspection import DTYPE_BYTES

__all__ = ["KIND", "bench_capacity", "check_capacity"]

KIND = "linearize.capacity"
ANSWERS = 1000
# Of what is free, for one measurement: the rest is for what the allocator loses between blocks.
FREE_SHARE = 0.8
# How many times its bound the first prompt is expected to take; later ones go by the one before.
SLOWNESS = 4.0
STEPS = 16  # timed where nothing folds


@dataclass(frozen=True)
class Found:
    """One number of a cell; see the module."""

    ms: float
    how: str
    bound_ms: float
    at: int | None = None
    reason: str | None = None
    mode: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def bench_capacity(
    rows: Rows,
    memory: int,
    contexts: Sequence[int],
    answer_tokens: int = 512,
    prompt_tokens: int | None = None,
    max_minutes: float = 2.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Largest batch, tokens a second and the cost of answers, for every row at every context.

    Args:
        rows: as `bench_decode` takes them; one is `"original"`, the others are conversions of it.
        memory: bytes for weights and caches.
        contexts: tokens that each sequence has room for: prompt and answer.
        answer_tokens: of an answer, >= 1.
        prompt_tokens: of a prompt; what an answer leaves of the context if left out.
        max_minutes: the longest that one measurement is expected to take.
        seed: of the prompts.

    Returns:
        JSON-able; the module's docstring has the keys.

    Raises:
        LinearizeError: no row `"original"`, or a number out of range.
    """
    check_capacity(memory, contexts, answer_tokens, prompt_tokens, max_minutes)
    if BASELINE not in rows:
        raise LinearizeError(f"rows: {sorted(rows)} have no {BASELINE!r}; everything is compared with that row")
    start = time.perf_counter()
    lengths = sorted(set(contexts))
    probes = {}
    for row, enter in rows.items():
        with enter() as model:
            probes[row] = probe(model)
    device, dtype = probes[BASELINE].device, str(probes[BASELINE].dtype).removeprefix("torch.")
    costs = {row: found.costs for row, found in probes.items() if found.costs is not None}
    if len(costs) < len(rows):
        raise LinearizeError(f"dtype: the model is in {dtype}; load it in one of {', '.join(DTYPE_BYTES)}")
    rates = bandwidth(device, dtypes=[dtype])
    roof = measured_roof(device, found=rates)
    steps = max((x.conversion.window for x in costs.values() if x.conversion is not None), default=STEPS)
    cells = []
    with progress_bar("capacity", total=len(lengths) * len(rows)) as advance:
        for row in rows:
            bench = _Row(row, rows[row], probes[row], costs[row], roof, 60 * max_minutes, steps, seed)
            for context in lengths:
                prompt = context - answer_tokens if prompt_tokens is None else prompt_tokens
                cells.append(_cell(bench, context, prompt, answer_tokens, memory))
                advance(f"{row}, {human_tokens(context)}")
    cells.sort(key=lambda cell: cell["context"])  # stable: rows stay in their order
    return {
        "kind": KIND,
        "schema": 1,
        "baseline": BASELINE,
        "rows": list(rows),
        "device": str(device),
        "dtype": dtype,
        "memory_bytes": memory,
        "answer_tokens": answer_tokens,
        "decode_tokens": steps,
        "max_minutes": max_minutes,
        "bandwidth": rates,
        "cells": cells,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine_info(seed),
    }


def _cell(bench: "_Row", context: int, prompt: int, answer: int, memory: int) -> dict[str, Any]:
    costs = bench.costs
    batch = costs.largest_batch(context, memory)
    cell = {
        "row": bench.row,
        "context": context,
        "prompt_tokens": prompt,
        "batch": batch,
        "weight_bytes": costs.weight_bytes,
        "cache_bytes": costs.cache_bytes(context, batch),
    }
    if batch == 0:
        return cell | dict.fromkeys(("step", "prefill", "tokens_per_s", "seconds_per_1000_answers"))
    prefill = bench.prefill(prompt)
    step = bench.step(batch, prompt + answer // 2, prefill.ms / 1e3 / prompt)
    seconds = ANSWERS * (prefill.ms + answer * step.ms / batch) / 1e3
    return cell | {
        "step": step.to_dict(),
        "prefill": prefill.to_dict(),
        "tokens_per_s": 1e3 * batch / step.ms,
        "seconds_per_1000_answers": seconds,
    }


class _Row:
    """One row's measurements. `limit_s`: what each may be expected to take; `steps`: timed in each."""

    def __init__(
        self,
        row: str,
        enter: Callable[[], AbstractContextManager[Any]],
        found: Probe,
        costs: ModelCosts,
        roof: Roof,
        limit_s: float,
        steps: int,
        seed: int,
    ) -> None:
        self.row = row
        self.enter = enter
        self.probe = found
        self.costs = costs
        self.roof = roof
        self.limit_s = limit_s
        self.steps = steps
        self.generator = torch.Generator().manual_seed(seed)
        self.slowness = SLOWNESS  # measured prefill over its bound, of the last prompt

    def prefill(self, tokens: int) -> Found:
        """Of one prompt: measured, or predicted from the longest half, quarter, ... that can be measured in time."""

        def bound(length: int) -> float:
            return predict(self.costs.read_bytes, prefill_flops(self.costs, length), self.roof, self.costs.dtype)

        def obstacle(length: int) -> str | None:
            return self._obstacle(1, length, self.slowness * bound(length), self.probe.needed_bytes(length, length, 1))

        def run(length: int) -> tuple[float, None]:
            with self._ready() as model:
                return measure_prefill(model, self._prompt(1, length)) / 1e3, None

        tried = _largest(tokens, obstacle, run)
        if tried.seconds is None:
            return Found(1e3 * bound(tokens), "bound", 1e3 * bound(tokens), reason=tried.reason)
        self.slowness = tried.seconds / bound(tried.size)
        how = "measured" if tried.size == tokens else "predicted"
        seconds = tried.seconds if how == "measured" else bound(tokens) * self.slowness
        return Found(1e3 * seconds, how, 1e3 * bound(tokens), tried.size, tried.reason)

    def step(self, batch: int, context: int, read_s: float) -> Found:
        """Of the whole batch. `read_s`: seconds that reading a token of a prompt takes."""
        # The timed steps lie around `context`, so that their mean is that there.
        length = max(1, context - WARMUP - self.steps // 2)
        read, capacity = tokens_to_read(length, self.probe.period), length + WARMUP + self.steps
        device = self.probe.device
        modes = [mode for mode in self.probe.modes if not mode.compiled and mode_obstacle(mode, device) is None]

        def bound(size: int) -> float:
            return step_seconds(self.costs, context, size, self.roof)

        def obstacle(size: int) -> str | None:
            seconds = len(modes) * (size * read * read_s + self.steps * bound(size))
            return self._obstacle(size, context, seconds, self.probe.needed_bytes(read, capacity, size))

        def run(size: int) -> tuple[float, str]:
            prompt, found = self._prompt(size, read), []
            for mode in modes:
                with self._ready() as model:
                    sample = measure(model, Run(mode, prompt, length - read, capacity, self.steps))
                found.append((fmean(sample.step_ms) / 1e3, mode.name))
            return min(found)

        tried = _largest(batch, obstacle, run)
        if tried.seconds is None:
            return Found(1e3 * bound(batch), "bound", 1e3 * bound(batch), reason=tried.reason)
        if tried.size == batch:
            return Found(1e3 * tried.seconds, "measured", 1e3 * bound(batch), batch, None, tried.mode)
        if tried.size == 1:
            roof = calibrate(self.roof, [(bound(1), tried.seconds)])
            seconds = step_seconds(self.costs, context, batch, roof)
        else:
            half = tried.size // 2
            grown = (tried.seconds - run(half)[0]) / (tried.size - half)
            # A sequence more costs what its bytes do, whatever the noise of two measurements says.
            least = (bound(batch) - bound(tried.size)) / (batch - tried.size)
            seconds = tried.seconds + (batch - tried.size) * max(grown, least)
        return Found(1e3 * seconds, "predicted", 1e3 * bound(batch), tried.size, tried.reason, tried.mode)

    def _obstacle(self, batch: int, tokens: int, seconds: float, needed: int) -> str | None:
        """Why a measurement of so many seconds and bytes cannot be made here."""
        if seconds > self.limit_s:
            return f"{batch} x {tokens} tokens would take about {seconds:.3g} s, above the {self.limit_s:.3g} s allowed"
        free = available_memory(self.probe.device)
        if free is not None and needed > FREE_SHARE * free:
            return f"{batch} x {tokens} tokens would take about {human_bytes(needed)} of {human_bytes(free)} free"
        return None

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """The row's model, to be measured."""
        with self.enter() as model, inference(model, torch.no_grad):
            yield model

    def _prompt(self, batch: int, length: int) -> torch.Tensor:
        vocabulary = self.costs.model_config.vocab_size
        return torch.randint(vocabulary, (batch, length), generator=self.generator)


@dataclass(frozen=True)
class Tried:
    """The largest size that was measured: seconds there, the mode, and why no larger one; None where none was."""

    size: int = 0
    seconds: float | None = None
    mode: str | None = None
    reason: str | None = None


def _largest(size: int, obstacle: Callable[[int], str | None], run: Callable[[int], tuple[float, str | None]]) -> Tried:
    """Measure `size`, or half of it, or a quarter, ...: the first that nothing speaks against."""
    first = None
    while size >= 1:
        reason = obstacle(size)
        if reason is None:
            try:
                with memory_errors():
                    seconds, mode = run(size)
            except OutOfMemory:
                reason = f"there is too little memory for {size} here"
            else:
                return Tried(size, seconds, mode, first)
        first = first or reason
        size //= 2
    return Tried(reason=first)


def check_capacity(
    memory: int, contexts: Sequence[int], answer_tokens: int, prompt_tokens: int | None, max_minutes: float
) -> None:
    """Raise the LinearizeError that `bench_capacity` would raise of its numbers, without a model."""
    if not contexts:
        raise LinearizeError("contexts: the list is empty; name at least one context in tokens, such as 4096")
    numbers = {"memory": memory, "answer_tokens": answer_tokens, "prompt_tokens": prompt_tokens}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise LinearizeError(f"{name}: {value} is below 1; use 1 or more")
    if max_minutes <= 0:
        raise LinearizeError(f"max_minutes: {max_minutes} leaves no time to measure; use more than 0")
    prompt = 1 if prompt_tokens is None else prompt_tokens
    if min(contexts) < prompt + answer_tokens:
        raise LinearizeError(
            f"contexts: {min(contexts)} tokens have no room for {prompt} of a prompt and {answer_tokens} of an answer; "
            f"use contexts of {prompt + answer_tokens} or more, or a shorter prompt or answer"
        )
