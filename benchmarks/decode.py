"""Decode and prefill time of several models by context, against the original under its better cache.

How it is measured
    Repeats are interleaved: repeat 1 of every context and row, then repeat 2, ... with the order of rows rotating, so
    that a machine that slows down slows all rows alike. A *block* is one repeat of one context: all rows on the same
    random tokens of the held-out text. A fixed matrix product is timed before and after each block; where its time
    moves by more than 10 %, the block is marked.
    One measurement is a prefill (timed apart), two steps to warm up, then `decode_tokens` greedy steps, each timed.
    The prefill grows by `decode_tokens` from one repeat to the next: together the timed steps run through consecutive
    positions, so that work that a converted layer does once in W tokens is met as often as in use, not by luck.
    The original runs under DynamicCache and StaticCache, both without compilation; the baseline of a context is the
    faster of the two there.

`bench_decode` returns what `write_json` stores as bench.json. Times are milliseconds; SPREAD is
`{"p50": float, "min": float, "max": float}`.

    {"kind": "linearize.bench", "schema": 1,
     "baseline": "original", "rows": ["original", "student", ...],
     "batch": int, "decode_tokens": int, "warmup": 2, "repeats_asked": int, "threads": int, "seed": int,
     "device": "cpu", "dtypes": {ROW: "float32"},
     "contexts": [int, ...],                                   measured for all rows
     "dropped": [{"context": int, "reason": str}, ...],        for all rows alike
     "cells": [{"row": ROW, "cache": "dynamic" | "static", "context": int, "repeats": int,
                "ms_per_token": {"p50", "p95", "mean",         over all timed steps
                                 "min", "max"},                of the repeats' medians
                "tokens_per_s": float,                         batch / p50
                "prefill_ms": SPREAD,                          over repeats
                "cache_bytes": {"softmax", "window", "state", "total"}}, ...],
     "comparisons": [{"row": ROW, "context": int, "baseline_cache": "dynamic" | "static",
                      "speedup": SPREAD,                       baseline / row, repeat by repeat; above 1: row faster
                      "verdict": "faster" | "slower" | "undecided"}, ...],    undecided: repeats disagree
     "crossover": {ROW: {"kind": "everywhere" | "at" | "never" | "mixed", "context": float | null,
                         "measured_to": int}},
     "blocks": [{"repeat": int, "context": int, "matmul_before_ms", "matmul_after_ms", "moved": bool}, ...],
     "seconds": float,
     "machine": {...}}                                         see linearize.benchmarks.machine
"""

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize.benchmarks.evaluate import BASELINE
from linearize.benchmarks.inference import Rows, device_of, inference, progress_bar
from linearize.benchmarks.machine import machine_info, matmul_ms, synchronize
from linearize.benchmarks.speed import Cell, Sample, comparisons, crossover, describe_cells
from linearize.cache import cache_bytes
from linearize.errors import LinearizeError

__all__ = ["KIND", "bench_decode", "measure"]

KIND = "linearize.bench"
WARMUP = 2
MOVED_LIMIT = 0.10


def bench_decode(
    rows: Rows,
    contexts: Sequence[int],
    tokens: Tensor,
    decode_tokens: int = 16,
    repeats: int = 5,
    batch: int = 1,
    max_minutes: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time every row at every context.

    Args:
        rows: name -> function without arguments whose context manager yields the model; entered once a measurement,
            so entering must be cheap (a switch, not a load). One is `"original"`.
        contexts: tokens before the first timed one, each >= 3.
        tokens: LongTensor (n,), held-out text; prompts are drawn from its tokens.
        decode_tokens: timed steps a repeat.
        repeats: how often each cell is measured.
        batch: sequences at once.
        max_minutes: no block is begun that is not expected to end within this time. A context without a single
            whole block is dropped for all rows; the smallest context is always measured once. A block that is
            already running may end late by one measurement.
        seed: of the prompts.

    Returns:
        JSON-able; the module's docstring has the keys.

    Raises:
        LinearizeError: no row `"original"`, or a number out of range.
    """
    _check(rows, contexts, tokens, decode_tokens, repeats, batch, max_minutes)
    contexts = sorted(set(contexts))
    bench = _Bench(rows, tokens, decode_tokens, batch, max_minutes, seed)
    start = time.perf_counter()
    with progress_bar("bench", total=repeats * len(contexts)) as advance:
        for repeat in range(repeats):
            for context in contexts:
                bench.block(repeat, context)
                advance(f"context {context}")
    measured = [context for context in contexts if context in bench.seconds]
    return {
        "kind": KIND,
        "schema": 1,
        "baseline": BASELINE,
        "rows": list(rows),
        "batch": batch,
        "decode_tokens": decode_tokens,
        "warmup": WARMUP,
        "repeats_asked": repeats,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "device": bench.device,
        "dtypes": bench.dtypes,
        "contexts": measured,
        "dropped": [
            {"context": context, "reason": f"not one repeat of all rows fitted into {max_minutes:g} minutes"}
            for context in contexts
            if context not in measured
        ],
        "cells": describe_cells(bench.samples, batch),
        "comparisons": comparisons(bench.samples, BASELINE),
        "crossover": {row: crossover(bench.samples, BASELINE, row) for row in rows if row != BASELINE},
        "blocks": bench.blocks,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine_info(seed),
    }


def _check(
    rows: Rows,
    contexts: Sequence[int],
    tokens: Tensor,
    decode_tokens: int,
    repeats: int,
    batch: int,
    max_minutes: float | None,
) -> None:
    if BASELINE not in rows:
        raise LinearizeError(f"rows: {sorted(rows)} have no {BASELINE!r}; everything is compared with that row")
    if not contexts:
        raise LinearizeError("contexts: the list is empty; name at least one context in tokens, such as 1024")
    for context in contexts:
        if context <= WARMUP:
            raise LinearizeError(f"contexts: {context} is too short to warm up; use {WARMUP + 1} or more")
    for name, value in (("decode_tokens", decode_tokens), ("repeats", repeats), ("batch", batch)):
        if value < 1:
            raise LinearizeError(f"{name}: {value} measures nothing; use 1 or more")
    if max_minutes is not None and max_minutes <= 0:
        raise LinearizeError(
            f"max_minutes: {max_minutes} leaves no time; use more than 0, or leave it out for no limit"
        )
    if tokens.dim() != 1 or len(tokens) == 0:
        raise LinearizeError(f"tokens: shape {tuple(tokens.shape)} is not one text; pass a tensor of one dimension")


class _Bench:
    """The running measurement: samples by cell, blocks, and how long a block of each context takes."""

    def __init__(
        self, rows: Rows, tokens: Tensor, decode_tokens: int, batch: int, max_minutes: float | None, seed: int
    ) -> None:
        self.rows = rows
        self.tokens = tokens
        self.decode_tokens = decode_tokens
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)
        self.deadline = None if max_minutes is None else time.perf_counter() + 60 * max_minutes
        # The baseline under both caches; the other rows under the cache that they make themselves.
        self.kinds = [(BASELINE, "static"), *((row, "dynamic") for row in rows)]
        self.samples: dict[Cell, list[Sample]] = {}
        self.blocks: list[dict[str, Any]] = []
        self.seconds: dict[int, float] = {}  # context -> length of its last whole block
        self.dtypes: dict[str, str] = {}
        self.device = ""

    def block(self, repeat: int, context: int) -> None:
        """Measure all rows once at one context, or nothing where time is short."""
        start = time.perf_counter()
        if self._late(self._expected(repeat, context)):
            return
        # Consecutive positions over the repeats; see the module's docstring.
        length = context - WARMUP + repeat * self.decode_tokens
        prompt = self.tokens[torch.randint(len(self.tokens), (self.batch, length), generator=self.generator)]
        before = self._matmul_ms()
        block: dict[Cell, Sample] = {}
        turn = repeat % len(self.kinds)
        for row, cache in self.kinds[turn:] + self.kinds[:turn]:
            # Without a first whole block there would be nothing to report.
            if self.seconds and self._late(0):
                return
            with self.rows[row]() as model, inference(model):
                block[Cell(row, cache, context)] = measure(model, prompt, cache, self.decode_tokens)
                self.dtypes[row] = str(next(model.parameters()).dtype).removeprefix("torch.")
        after = self._matmul_ms()
        for cell, sample in block.items():
            self.samples.setdefault(cell, []).append(sample)
        self.blocks.append(
            {
                "repeat": repeat,
                "context": context,
                "matmul_before_ms": before,
                "matmul_after_ms": after,
                "moved": abs(after / before - 1) > MOVED_LIMIT,
            }
        )
        self.seconds[context] = time.perf_counter() - start

    def _expected(self, repeat: int, context: int) -> float:
        """Seconds that a block will take at least; 0 where nothing was measured yet."""
        if context in self.seconds:
            return self.seconds[context]
        if repeat:  # dropped in the first round: repeats of other contexts would have to become cheaper to fit it
            return float("inf")
        nearest = max(self.seconds, default=0)
        # Prefill grows at least in proportion to the context.
        return self.seconds[nearest] * context / nearest if nearest else 0.0

    def _late(self, seconds: float) -> bool:
        """Whether `seconds` from now is past the deadline. Before the first whole block nothing is late."""
        if not self.seconds or self.deadline is None:
            return False
        return time.perf_counter() + seconds > self.deadline

    def _matmul_ms(self) -> float:
        if not self.device:
            with self.rows[BASELINE]() as model:
                self.device = str(device_of(model))
        return matmul_ms(torch.device(self.device))


def measure(model: nn.Module, prompt: Tensor, cache: str, decode_tokens: int) -> Sample:
    """Prefill a prompt, warm up, then time greedy steps, one token each.

    Args:
        model: in evaluation mode.
        prompt: LongTensor (batch, length).
        cache: `"static"` preallocates with transformers' StaticCache; `"dynamic"` is what the model makes itself:
            DynamicCache, with the layers of a converted model where there are any.
        decode_tokens: timed steps.
    """
    device = device_of(model)
    prompt = prompt.to(device)
    past = None
    if cache == "static":
        from transformers import StaticCache

        past = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + WARMUP + decode_tokens)
    gc.collect()  # here rather than inside a timed step
    synchronize(device)
    start = time.perf_counter()
    # Logits of the last token only, as in generation: all of them would be gigabytes.
    output = model(input_ids=prompt, past_key_values=past, use_cache=True, logits_to_keep=1)
    synchronize(device)
    prefill_ms = 1e3 * (time.perf_counter() - start)
    steps = []
    for _ in range(WARMUP + decode_tokens):
        token = output.logits[:, -1:].argmax(-1)
        synchronize(device)
        start = time.perf_counter()
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        synchronize(device)
        steps.append(1e3 * (time.perf_counter() - start))
    return Sample(prefill_ms, tuple(steps[WARMUP:]), cache_bytes(output.past_key_values))
