"""Decode and prefill time of several models by context and batch, each in its best mode, against the original.

How it is measured
    Each row is measured in every mode that it has (see `linearize.benchmarks.modes`), each with its own cache: what is
    compared is the best mode of each, at every context and batch.
    Repeats are interleaved: repeat 1 of every context, batch and row, then repeat 2, ... with the order of rows
    rotating, so that a machine that slows down slows all rows alike. A *block* is one repeat of one context and batch:
    all rows on the same random tokens of the held-out text. A fixed matrix product is timed before and after each
    block; where its time moves by more than 10 %, the block is measured once more, and marked if it moves again.
    One measurement is a prefill (timed apart), `WARMUP` steps, then `decode_tokens` greedy steps, each timed. What
    a compiled mode compiles, it compiles while it warms up; compilations during timed steps are counted and marked.
    The prefill grows by `decode_tokens` from one repeat to the next: together the timed steps run through consecutive
    positions, so that work that a converted layer does once in W tokens is met as often as in use, not by luck: the
    mean of all steps shows it, the median, by which rows are compared, does not. A
    preallocated cache has room for all of them, as if one text of that length were generated.
    Where context times batch exceeds `fill`, only a part of the context is read and the rest of the cache filled in
    (see `linearize.benchmarks.filling`): the steps cost the same, and the prefill is not reported.
    Contexts and batches that do not fit into memory, or into the time that is given, are dropped for all rows alike.

`bench_decode` returns what `write_json` stores as bench.json. Times are milliseconds; SPREAD is
`{"p50": float, "min": float, "max": float}`. Everything of one cell is of all `batch` sequences together.

    {"kind": "linearize.bench", "schema": 2,
     "baseline": "original", "rows": ["original", "student", ...],
     "modes": {ROW: [MODE, ...]}, "skipped": [{"row": ROW, "mode": MODE, "reason": str}, ...],
     "decode_tokens": int, "warmup": int, "repeats_asked": int, "fill": int | null, "threads": int, "seed": int,
     "device": "cpu", "dtypes": {ROW: "float32"},
     "contexts": [int, ...], "batches": [int, ...],            measured for all rows, though not in every combination
     "dropped": [{"what": "decode" | "prefill", "context": int, "batch": int, "reason": str}, ...],
     "cells": [{"row": ROW, "mode": MODE, "context": int, "batch": int, "repeats": int,
                "ms_per_token": {"p50", "p95", "mean",         over all timed steps; a token of each sequence
                                 "min", "max"},                of the repeats' medians
                "tokens_per_s": float,                         batch / p50
                "prefill_ms": SPREAD | null,                   over repeats; null where a part was filled in
                "filled": int,                                 tokens of the context that were not read
                "weight_bytes": int,                           parameters that a step reads
                "cache_bytes": {"softmax", "window", "state", "total"},       allocated, read and not
                "first_ms": float,                             the very first step, which compiles where the mode does
                "recompiles": int,                             during timed steps: above 0 these are not to be trusted
                "skipped_graphs": int,                         graphs on a GPU that became no CUDA graph
                "bound_ms": float | null,                      no step takes less here: bytes that must move over the
                                                               bandwidth (see `linearize.benchmarks.step_costs`)
                "share_of_bound": float | null},               of its time, bound_ms / p50: 1 is the fastest possible
               ...],
     "bandwidth": {...} | null,                                of `roofline.bandwidth`, measured before the first block
     "comparisons": [{"row": ROW, "context": int, "batch": int, "mode": MODE, "baseline_mode": MODE,   the best modes
                      "speedup": {SPREAD, "ci95": [low, high] | null},      baseline / row, repeat by repeat; above 1:
                                                                            row faster; null after one repeat
                      "verdict": "faster" | "slower" | "undecided"}, ...],  by the interval
     "crossover": [{"row": ROW, "batch": int, "kind": "everywhere" | "at" | "never" | "mixed",
                    "context": float | null, "measured_to": int}, ...],
     "prefill": [{"row": ROW, "length": int, "batch": int, "repeats": int, "ms": SPREAD}, ...],    the lengths asked for
     "prefill_growth": [{"row": ROW, "from": 4096, "to": int, "ratio": float}, ...],
     "blocks": [{"what": "decode" | "prefill", "repeat": int, "context": int, "batch": int, "attempts": 1 | 2,
                 "matmul_before_ms", "matmul_after_ms", "moved": bool}, ...],
     "seconds": float,
     "machine": {...}}                                         see linearize.benchmarks.machine
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from linearize.benchmarks.evaluate import BASELINE
from linearize.benchmarks.files import read_json
from linearize.benchmarks.filling import tokens_to_read
from linearize.benchmarks.inference import Rows, inference, progress_bar
from linearize.benchmarks.machine import available_memory, machine_info, matmul_ms
from linearize.benchmarks.measurement import WARMUP, OutOfMemory, Run, measure, measure_prefill, memory_errors
from linearize.benchmarks.modes import (
    MODES,
    Mode,
    first_line,
    mode_obstacle,
)
from linearize.benchmarks.probe import Probe, probe
from linearize.benchmarks.roofline import bandwidth, measured_roof, step_seconds
from linearize.benchmarks.speed import (
    Cell,
    Sample,
    comparisons,
    crossover,
    describe_cells,
    prefill_growth,
    spread,
)
from linearize.benchmarks.step_costs import ModelCosts
from linearize.errors import LinearizeError

__all__ = ["FILL", "KIND", "bench_decode", "check_bench", "read_bench"]

KIND = "linearize.bench"
SCHEMA = 2
MOVED_LIMIT = 0.10
# Context times batch up to which a context is read, not filled in.
FILL = 8192
# Memory beyond what a cell is estimated to need.
SPARE_MEMORY = 0.10


def read_bench(path: str | Path) -> dict[str, Any]:
    """Read a bench.json.

    Raises:
        LinearizeError: another kind of file, or one that an older version of linearize wrote.
    """
    return read_json(path, KIND, schema=SCHEMA)


def bench_decode(
    rows: Rows,
    contexts: Sequence[int],
    tokens: Tensor,
    *,
    batches: Sequence[int] = (1,),
    decode_tokens: int = 16,
    repeats: int = 5,
    modes: Sequence[str] | None = None,
    fill: int | None = FILL,
    prefill: Sequence[int] = (),
    max_minutes: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time every row in every mode at every context and batch.

    Args:
        rows: name -> function without arguments whose context manager yields the model; entered once a measurement,
            so entering must be cheap (a switch, not a load). One is `"original"`.
        contexts: tokens before the first timed one, each > `WARMUP`.
        tokens: LongTensor (n,), held-out text; prompts are drawn from its tokens.
        batches: sequences at once; every context is measured with each.
        decode_tokens: timed steps a repeat.
        repeats: how often each cell is measured.
        modes: names of `MODES`, of which each row is measured in those that it has; None is all of them.
        fill: where context times batch exceeds this, a part of the context is filled in instead of read; None reads
            every context.
        prefill: lengths whose prefill is timed besides, with the smallest batch, in mode "dynamic".
        max_minutes: no block is begun that is not expected to end within this time. A context and batch without a
            single whole block is dropped for all rows; the smallest is always measured once. A block that is already
            running may end late by one measurement.
        seed: of the prompts.

    Returns:
        JSON-able; the module's docstring has the keys.

    Raises:
        LinearizeError: no row `"original"`, a number out of range, or modes that a row has none of.
    """
    if BASELINE not in rows:
        raise LinearizeError(f"rows: {sorted(rows)} have no {BASELINE!r}; everything is compared with that row")
    if tokens.dim() != 1 or len(tokens) == 0:
        raise LinearizeError(f"tokens: shape {tuple(tokens.shape)} is not one text; pass a tensor of one dimension")
    check_bench(
        contexts,
        batches=batches,
        decode_tokens=decode_tokens,
        repeats=repeats,
        modes=modes,
        fill=fill,
        prefill=prefill,
        max_minutes=max_minutes,
    )
    probes = {}
    for row, enter in rows.items():
        with enter() as model:
            probes[row] = probe(model)
    chosen, skipped = _choose_modes(probes, modes)
    points = [Point("decode", context, batch) for context in contexts for batch in batches]
    points += [Point("prefill", length, min(batches)) for length in prefill]
    points = sorted(set(points), key=lambda point: (point.what, point.size, point.context))
    bench = _Bench(rows, probes, chosen, skipped, tokens, decode_tokens, repeats, fill, max_minutes, seed)
    start = time.perf_counter()
    rates = _rates(probes)
    with _room_for_graphs(chosen, len(points) * len(rows)), progress_bar("bench", total=repeats * len(points)) as tick:
        for repeat in range(repeats):
            for point in points:
                bench.block(repeat, point)
                tick(f"{point.what} at {point.context}, batch {point.batch}")
    measured = [point for point in points if point in bench.seconds and point.what == "decode"]
    measured_batches = sorted({point.batch for point in measured})
    growth = bench.prefills or bench.context_prefills(measured)
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "baseline": BASELINE,
        "rows": list(rows),
        "modes": {row: [mode.name for mode in kept] for row, kept in bench.modes.items()},
        "skipped": bench.skipped,
        "decode_tokens": decode_tokens,
        "warmup": WARMUP,
        "repeats_asked": repeats,
        "fill": fill,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "device": str(probes[BASELINE].device),
        "dtypes": {row: str(found.dtype).removeprefix("torch.") for row, found in probes.items()},
        "contexts": sorted({point.context for point in measured}),
        "batches": measured_batches,
        "dropped": [
            point.described | {"reason": bench.reason(point)} for point in points if point not in bench.seconds
        ],
        "cells": [
            cell | _bound(cell, probes[cell["row"]].costs, rates)
            for cell in describe_cells(bench.samples, {row: found.weight_bytes for row, found in probes.items()})
        ],
        "bandwidth": rates,
        "comparisons": comparisons(bench.samples, BASELINE),
        "crossover": [
            {"row": row, "batch": batch} | crossover(bench.samples, BASELINE, row, batch)
            for batch in measured_batches
            for row in rows
            if row != BASELINE
        ],
        "prefill": [
            {"row": row, "length": length, "batch": min(batches), "repeats": len(ms), "ms": spread(ms)}
            for (row, length), ms in bench.prefills.items()
        ],
        "prefill_growth": prefill_growth(growth),
        "blocks": bench.blocks,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine_info(seed),
    }


def _rates(probes: dict[str, Probe]) -> dict[str, Any] | None:
    """What this device's memory and products give; None where no row has a bound."""
    dtypes = sorted({found.costs.dtype for found in probes.values() if found.costs is not None})
    return bandwidth(probes[BASELINE].device, dtypes=dtypes) if dtypes else None


def _bound(cell: dict[str, Any], costs: ModelCosts | None, rates: dict[str, Any] | None) -> dict[str, float | None]:
    """The roofline of a cell at its context, and how near it comes: that of weights that do not fit into the caches."""
    if costs is None or rates is None:
        return {"bound_ms": None, "share_of_bound": None}
    roof = measured_roof(rates["device"], found=rates)
    bound_ms = 1e3 * step_seconds(costs, cell["context"], cell["batch"], roof)
    return {"bound_ms": bound_ms, "share_of_bound": bound_ms / cell["ms_per_token"]["p50"]}


def check_bench(
    contexts: Sequence[int],
    *,
    batches: Sequence[int],
    decode_tokens: int,
    repeats: int,
    modes: Sequence[str] | None,
    fill: int | None,
    prefill: Sequence[int],
    max_minutes: float | None,
) -> None:
    """Raise the LinearizeError that `bench_decode` would raise of its numbers, without a model."""
    if not contexts:
        raise LinearizeError("contexts: the list is empty; name at least one context in tokens, such as 1024")
    if not batches:
        raise LinearizeError("batch: the list is empty; name at least one number of sequences, such as 1")
    for context in contexts:
        if context <= WARMUP:
            raise LinearizeError(f"contexts: {context} is too short to warm up; use {WARMUP + 1} or more")
    listed = [("batch", batch) for batch in batches] + [("prefill", length) for length in prefill]
    single = [("decode_tokens", decode_tokens), ("repeats", repeats), ("fill", fill)]
    for name, value in (*listed, *single):
        if value is not None and value < 1:
            raise LinearizeError(f"{name}: {value} measures nothing; use 1 or more")
    if max_minutes is not None and max_minutes <= 0:
        raise LinearizeError(
            f"max_minutes: {max_minutes} leaves no time; use more than 0, or leave it out for no limit"
        )
    for mode in modes or ():
        if mode not in MODES:
            raise LinearizeError(f"modes: there is no {mode!r}; choose from {', '.join(MODES)}")


def _choose_modes(
    probes: dict[str, Probe], asked: Sequence[str] | None
) -> tuple[dict[str, list[Mode]], list[dict[str, str]]]:
    """The modes of each row, and those that it has and is not measured in."""
    chosen: dict[str, list[Mode]] = {}
    skipped = []
    for row, found in probes.items():
        chosen[row] = []
        for mode in found.modes:
            reason = None
            if asked is not None and mode.name not in asked:
                reason = "it was not asked for"
            else:
                reason = mode_obstacle(mode, found.device)
            if reason is None:
                chosen[row].append(mode)
            else:
                skipped.append({"row": row, "mode": mode.name, "reason": reason})
        if not chosen[row]:
            names = ", ".join(mode.name for mode in found.modes if mode.name not in (asked or ()))
            raise LinearizeError(
                f"modes: row {row!r} cannot be measured in {', '.join(asked or ())}; add one of {names}"
            )
    return chosen, skipped


@contextmanager
def _room_for_graphs(modes: dict[str, list[Mode]], shapes: int) -> Iterator[None]:
    """Inside, torch.compile keeps a graph of every shape: past its limit of 8 it would stop compiling, silently."""
    if not any(mode.compiled for kept in modes.values() for mode in kept):
        yield
        return
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit + 2 * shapes):
        yield


@dataclass(frozen=True)
class Point:
    """What a block measures: `"decode"` at a context, or a `"prefill"` of that many tokens; `batch` sequences."""

    what: str
    context: int
    batch: int

    @property
    def size(self) -> int:
        """Tokens in all."""
        return self.context * self.batch

    @property
    def described(self) -> dict[str, Any]:
        """For the result."""
        return {"what": self.what, "context": self.context, "batch": self.batch}


class _Bench:
    """The running measurement: samples by cell, blocks, and how long a block of each point takes."""

    def __init__(
        self,
        rows: Rows,
        probes: dict[str, Probe],
        modes: dict[str, list[Mode]],
        skipped: list[dict[str, str]],
        tokens: Tensor,
        decode_tokens: int,
        repeats: int,
        fill: int | None,
        max_minutes: float | None,
        seed: int,
    ) -> None:
        self.rows = rows
        self.probes = probes
        self.modes = modes
        self.skipped = skipped
        self.tokens = tokens
        self.decode_tokens = decode_tokens
        self.repeats = repeats
        self.fill = fill
        self.max_minutes = max_minutes
        self.generator = torch.Generator().manual_seed(seed)
        self.device = probes[BASELINE].device
        self.period = math.lcm(*(found.period for found in probes.values()))  # all rows read the same tokens
        self.deadline = None if max_minutes is None else time.perf_counter() + 60 * max_minutes
        self.samples: dict[Cell, list[Sample]] = {}
        self.first_ms: dict[Cell, float] = {}  # the first step that a cell ever did
        self.prefills: dict[tuple[str, int], list[float]] = {}  # (row, length) -> ms of each repeat
        self.blocks: list[dict[str, Any]] = []
        self.seconds: dict[Point, float] = {}  # length of a point's last whole block, without what it compiled
        self.too_large: dict[Point, str] = {}  # why a point does not fit into memory

    def block(self, repeat: int, point: Point) -> None:
        """Measure all rows once at one point, or nothing where time or memory is short."""
        if point in self.too_large or self._late(self._expected(repeat, point)):
            return
        read, capacity = self._extent(repeat, point)
        if reason := self._does_not_fit(point, read, capacity):
            self._drop(point, reason)
            return
        # Both attempts read the same tokens too.
        prompt = self.tokens[torch.randint(len(self.tokens), (point.batch, read), generator=self.generator)]
        for attempt in (1, 2):
            start, before = time.perf_counter(), matmul_ms(self.device)
            try:
                measured = self._measure_rows(repeat, point, prompt, capacity)
            except OutOfMemory as error:
                self._drop(point, str(error))
                return
            if measured is None:
                if attempt == 1:
                    return
                break
            found, compiling = measured
            after = matmul_ms(self.device)
            moved = abs(after / before - 1) > MOVED_LIMIT
            self.seconds[point] = time.perf_counter() - start - compiling
            block = point.described | {
                "repeat": repeat,
                "attempts": attempt,
                "matmul_before_ms": before,
                "matmul_after_ms": after,
                "moved": moved,
            }
            if not moved or self._late(self.seconds[point]):
                break
        self.blocks.append(block)
        for cell, sample in found.items():
            if not isinstance(sample, Sample):
                self.prefills.setdefault((cell.row, cell.context), []).append(sample)
            elif MODES[cell.mode] in self.modes[cell.row]:  # else it stopped working in the second attempt
                self.samples.setdefault(cell, []).append(sample)

    def _measure_rows(
        self, repeat: int, point: Point, prompt: Tensor, capacity: int
    ) -> tuple[dict[Cell, Sample | float], float] | None:
        """A sample of each row and mode, and the seconds that went into compiling; None where time was up before the
        last one."""
        found: dict[Cell, Sample | float] = {}
        compiling = 0.0
        turns = [(row, mode) for row, modes in self.modes.items() for mode in modes]
        if point.what == "prefill":
            turns = [(row, MODES["dynamic"]) for row in self.rows]
        turn = repeat % len(turns)
        for row, mode in turns[turn:] + turns[:turn]:
            # Without a first whole block there would be nothing to report.
            if self.seconds and self._late(0):
                return None
            run = Run(mode, prompt, self._length(repeat, point) - prompt.shape[1], capacity, self.decode_tokens)
            cell = Cell(row, mode.name, point.context, point.batch)
            with self.rows[row]() as model, inference(model, torch.no_grad), memory_errors():
                if point.what == "prefill":
                    found[cell] = measure_prefill(model, prompt)
                    continue
                try:
                    sample = measure(model, run)
                except torch._dynamo.exc.TorchDynamoException as error:
                    self._give_up(row, mode, f"compiling the step failed: {first_line(error)}")
                    continue
            compiling += sample.first_ms / 1e3 if mode.compiled else 0.0
            # What was compiled in a block that is then measured again stays compiled.
            found[cell] = replace(sample, first_ms=self.first_ms.setdefault(cell, sample.first_ms))
        return found, compiling

    def _give_up(self, row: str, mode: Mode, reason: str) -> None:
        """A mode that does not work for a row: its cells go, at every point."""
        self.modes[row] = [kept for kept in self.modes[row] if kept is not mode]
        if not self.modes[row]:
            raise LinearizeError(f"modes: row {row!r} has none but {mode.name}, and {reason}; add another mode")
        self.skipped.append({"row": row, "mode": mode.name, "reason": reason})
        self.samples = {cell: kept for cell, kept in self.samples.items() if (cell.row, cell.mode) != (row, mode.name)}

    def _drop(self, point: Point, reason: str) -> None:
        """A point that needs too much memory: also what was measured of it before, for all rows alike."""
        self.too_large[point] = reason
        self.seconds.pop(point, None)
        if point.what == "prefill":
            self.prefills = {key: kept for key, kept in self.prefills.items() if key[1] != point.context}
        else:
            place = point.context, point.batch
            self.samples = {cell: kept for cell, kept in self.samples.items() if (cell.context, cell.batch) != place}
        self.blocks = [block for block in self.blocks if not point.described.items() <= block.items()]

    def _filled(self, point: Point) -> bool:
        return point.what == "decode" and self.fill is not None and point.size > self.fill

    def _length(self, repeat: int, point: Point) -> int:
        """Tokens in the cache before the steps that warm up. Consecutive over the repeats; see the module."""
        return point.context if point.what == "prefill" else point.context - WARMUP + repeat * self.decode_tokens

    def _extent(self, repeat: int, point: Point) -> tuple[int, int]:
        """Tokens that are read, and the capacity of a preallocated cache, which is the same in every repeat: another
        length would be another graph."""
        length = self._length(repeat, point)
        if point.what == "prefill":
            return length, length
        read = tokens_to_read(length, self.period) if self._filled(point) else length
        return read, point.context + self.repeats * self.decode_tokens

    def _does_not_fit(self, point: Point, read: int, capacity: int) -> str | None:
        """Why the row that needs most would not fit into memory, or None."""
        needs = {row: found.needed_bytes(read, capacity, point.batch) for row, found in self.probes.items()}
        row, needed = max(needs.items(), key=lambda pair: pair[1])
        available = available_memory(self.device)
        if available is None or needed <= (1 - SPARE_MEMORY) * available:
            return None
        return f"{row} needs about {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB of memory are free"

    def reason(self, point: Point) -> str:
        """Why a point was not measured."""
        if point in self.too_large:
            return self.too_large[point]
        return f"not one repeat of all rows fitted into {self.max_minutes:g} minutes"

    def context_prefills(self, points: Sequence[Point]) -> dict[tuple[str, int], list[float]]:
        """The prefills of contexts that were read, with the smallest batch: each row's faster mode."""
        found: dict[tuple[str, int], list[float]] = {}
        batch = min((point.batch for point in points), default=1)
        for cell, samples in self.samples.items():
            times = [sample.prefill_ms for sample in samples if sample.prefill_ms is not None]
            if times and cell.batch == batch:
                key = cell.row, cell.context
                found[key] = min(found.get(key, times), times, key=median)
        return found

    def _expected(self, repeat: int, point: Point) -> float:
        """Seconds that a block will take at least; 0 where nothing was measured yet."""
        if point in self.seconds:
            return self.seconds[point]
        if repeat:  # dropped in the first round: repeats of other points would have to become cheaper to fit it
            return float("inf")
        kind = point.what, self._filled(point)
        smaller = [known for known in self.seconds if (known.what, self._filled(known)) == kind]
        if not smaller:
            return 0.0
        nearest = max(smaller, key=lambda known: known.size)
        # A prefill grows at least in proportion to the tokens; what is filled in costs little beside the steps.
        return self.seconds[nearest] * (1 if self._filled(point) else point.size / nearest.size)

    def _late(self, seconds: float) -> bool:
        """Whether `seconds` from now is past the deadline. Before the first whole block nothing is late."""
        if not self.seconds or self.deadline is None:
            return False
        return time.perf_counter() + seconds > self.deadline
