"""Microbenchmark: near-and-far attention alone, by length, beside PyTorch's softmax attention (SDPA) of the same shape.

What is timed, for one layer of a model's shape and random inputs in the layout of models
    forward   without gradients
    backward  forward and backward, with gradients of q, k, v and the mixer's weights
    decode    one token after T, as a mean over W consecutive tokens, so that the step that folds a chunk into the state
              counts as often as in use; SDPA reads T keys and values that are there already
and by what
    torch, triton   the library's backends; triton where its kernels run
    compiled        the PyTorch form under torch.compile, forward and backward, where asked for
    sdpa            torch's scaled_dot_product_attention: flash attention on a GPU in half precision, elsewhere what
                    torch chooses
    sdpa efficient  on a GPU: the same by its memory-efficient kernel, which has no grouped queries: keys and values are
                    repeated inside the timed call
    fla ...         on a GPU: flash-linear-attention's operators, see `linearize.benchmarks.fla_rows`
Rows beside our own that are not there, or that refuse, are in the result with the reason.

What the times are worth
    Each cell of near-and-far attention and of SDPA has the bytes and operations that its call must move and do, by the
    formulas of `linearize.benchmarks.attention_work`, and what they make of the median: GB/s and TFLOP/s. The bound is
    the least time at the rates that this device was measured to have (`roofline.bandwidth`): the sum over launches of
    max(bytes / bandwidth, operations / matrix products a second in that dtype); `of_bound` is bound / median. The torch
    and compiled rows have the bound of the kernels' launches: it says what the definition needs, not what they do. In
    texts of less than 2 W tokens, most of which lie in the window, the formulas would count too much: there is no
    bound. Inputs that fit into the caches can beat the bandwidth of memory.

How it is measured
    Everything runs once before it counts. Repeats are interleaved: repeat 1 of every length and row, then repeat 2, ...
    with the order of rows rotating, so that a machine that slows down slows all rows alike. A call of less than a
    second follows one that is not timed: while other rows ran, its inputs went out of the caches, and out of memory on
    machines that take back what waits. The medians, and the least and most, are reported: on a machine that others use
    too, the least is nearest to what the code costs.
    On a GPU by events on its stream, elsewhere by the clock. A fixed matrix product is timed before and after.

`bench_kernels` returns what `write_result` stores; SPREAD is `{"p50": float, "min": float, "max": float}`.

    {"kind": "linearize.bench_kernels", "schema": 1, "model": str, "shape": {"heads", "kv_heads", "head_dim",
     "feature_dim", "window", "sinks", "batch"}, "device": str, "repeats": int, "sdpa": "flash" | "default" per dtype,
     "bandwidth": {...},                                    of `roofline.bandwidth`
     "cells": [{"what": str, "dtype": str, "row": str, "tokens": int, "ms": SPREAD, "tokens_per_s": float,
                "work": {"bytes", "flops", "gb_s", "tflop_s", "bound_ms", "of_bound": float} | null}, ...],
     "absent": [{"row": str, "what": str | null, "dtype": str | null, "reason": str}, ...],      null: all of them
     "growth": [{"what", "dtype", "row", "from": int, "to": int, "p50": float, "min": float}, ...],
                                        time at the longest length over that at 4096 tokens or the shortest
     "crossover": [{"what", "dtype", "row", "kind", "context", "measured_to"}, ...],    as `speed.crossover` has it
     "matmul_ms": {"before": float, "after": float}, "load": [float, float, float] | null, "seconds": float,
     "machine": {...}}                  see linearize.benchmarks.machine; tokens_per_s is of the median, over the batch
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from linearize.benchmarks.attention_work import Work, near_far_work, sdpa_step_work, sdpa_work
from linearize.benchmarks.fla_rows import FLA_ROWS, fla_calls, fla_obstacle, fla_steps
from linearize.benchmarks.inference import progress_bar
from linearize.benchmarks.machine import machine_info, matmul_ms, time_ms
from linearize.benchmarks.roofline import bandwidth
from linearize.benchmarks.speed import Cell, Sample, crossover, spread
from linearize.errors import LinearizeError
from linearize.kernels.backends import interpreted, triton_obstacle
from linearize.kernels.near_far import Hedgehog, Memory, near_far_attention, near_far_step
from linearize.kernels.near_far.counts import MODELS, Shape
from linearize.kernels.near_far.traffic import DecodeShape, decode_bytes, decode_flops

__all__ = ["KIND", "MODELS", "WHATS", "Problem", "bench_kernels", "cell_work", "make_runs"]

KIND = "linearize.bench_kernels"
WHATS = ("forward", "backward", "decode")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SDPA, EFFICIENT = "sdpa", "sdpa efficient"
# What is only compared with: such a row may be missing.
GUESTS = (EFFICIENT, *FLA_ROWS)
GROWTH_FROM = 4096
COLD_MS = 1e3
Run = Callable[[], float]  # milliseconds of one call


@dataclass(frozen=True)
class Problem:
    """One layer: a model of `MODELS` by name, batch, window and sinks, and what is built of it."""

    model: str
    batch: int = 1
    window: int = 64
    sinks: int = 4

    @property
    def shape(self) -> dict[str, int]:
        """All sizes but the length."""
        heads, kv_heads, head_dim, feature_dim = MODELS[self.model]
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "feature_dim": feature_dim}
        return sizes | {"window": self.window, "sinks": self.sinks, "batch": self.batch}


def bench_kernels(
    problem: Problem,
    tokens: Sequence[int],
    whats: Sequence[str] = WHATS,
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    repeats: int = 5,
    compiled: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Time every row at every length.

    Args:
        problem: the layer.
        tokens: lengths, each >= 1.
        whats: among `WHATS`.
        dtypes: of q, k and v: "float32", "bfloat16", "float16".
        device: such as "cpu" or "cuda".
        repeats: how often each cell is measured.
        compiled: whether the PyTorch form under torch.compile is a row too.
        seed: of the inputs.

    Returns:
        JSON-able; the module's docstring has the keys.

    Raises:
        LinearizeError: an unknown name, a device that is not there, or a number out of range.
    """
    _check(problem, tokens, whats, dtypes, repeats)
    place = _device(device)
    start, load = time.perf_counter(), _load()
    before, rates = matmul_ms(place), bandwidth(place, dtypes=dtypes)
    absent = _absent(place)
    times: dict[tuple[str, str], dict[Cell, list[float]]] = {}
    lengths = sorted(set(tokens))
    with progress_bar("bench", total=(repeats + 1) * len(whats) * len(dtypes) * len(lengths)) as advance:
        for what in whats:
            for dtype in dtypes:
                runs = {}
                for length in lengths:
                    torch.manual_seed(seed)
                    runs[length] = make_runs(problem, what, length, DTYPES[dtype], place, compiled)
                    absent += _warm_up(runs[length], what, dtype)
                    advance(f"{what}, {dtype}, {length} tokens, warming up")
                refused = {x["row"] for x in absent if (x["what"], x["dtype"]) == (what, dtype)}
                for by_row in runs.values():  # a row that refuses one length is left out at all of them
                    for row in refused & set(by_row):
                        del by_row[row]
                times[what, dtype] = _interleaved(runs, repeats, f"{what}, {dtype}", advance)
    return {
        "kind": KIND,
        "schema": 1,
        "model": problem.model,
        "shape": problem.shape,
        "device": str(place),
        "repeats": repeats,
        "sdpa": {dtype: "flash" if _flash(place, DTYPES[dtype]) else "default" for dtype in dtypes},
        "bandwidth": rates,
        **_summary(times, problem, rates),
        "absent": absent,
        "matmul_ms": {"before": before, "after": matmul_ms(place)},
        "load": load,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine_info(seed),
    }


def make_runs(
    problem: Problem, what: str, length: int, dtype: torch.dtype, device: torch.device, compiled: bool = False
) -> dict[str, Run]:
    """The timed calls of one length by row."""
    heads, kv_heads, head_dim, feature_dim = MODELS[problem.model]
    batch, window, sinks = problem.batch, problem.window, problem.sinks

    def normal(tokens: int, count: int) -> Tensor:
        x = torch.randn(batch, tokens, count, head_dim, device=device).to(dtype).transpose(1, 2)
        return x.requires_grad_(what == "backward")

    q, k, v = (normal(length, count) for count in (heads, kv_heads, kv_heads))
    mixer = Hedgehog(heads, kv_heads, head_dim, feature_dim).to(device)
    mix_logit = torch.zeros(heads, device=device)
    options: dict[str, Any] = {"window": window, "sinks": sinks}
    backends = ["torch"]
    # In the interpreter the Triton kernels run too, but what that takes says nothing.
    if triton_obstacle(q, v, mixer.num_features) is None and not interpreted():
        backends.append("triton")
    if what == "decode":
        runs: dict[str, Run] = {
            name: _decode(q, k, v, mixer, mix_logit, options | {"backend": name}) for name in backends
        }
        step = q[:, :, -1:]
        runs[SDPA] = _timed(lambda: _sdpa(step, k, v, causal=False), device, calls=window)
        guests: dict[str, Callable[[], Any]] = {}
        if _on_gpu(device):
            guests[EFFICIENT] = lambda: _sdpa_efficient(step, k, v, causal=False)
        if fla_obstacle(device) is None:
            guests |= fla_steps(*(x[:, :, -1:].contiguous() for x in (q, k, v)))
        return runs | {row: _timed(call, device, calls=window) for row, call in guests.items()}

    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda name=name: near_far_attention(q, k, v, mixer, mix_logit, **options, backend=name)  # type: ignore[misc]
        for name in backends
    }
    if compiled:
        fast = torch.compile(near_far_attention, fullgraph=True, dynamic=True)
        calls["compiled"] = lambda: fast(q, k, v, mixer, mix_logit, **options, backend="torch")
    calls[SDPA] = lambda: _sdpa(q, k, v, causal=True)
    if _on_gpu(device):
        calls[EFFICIENT] = lambda: _sdpa_efficient(q, k, v, causal=True)
    if fla_obstacle(device) is None:
        calls |= fla_calls(q, k, v)
    if what == "forward":
        return {name: _timed(torch.no_grad()(call), device) for name, call in calls.items()}
    weight = torch.randn(batch, length, heads, head_dim, device=device).to(dtype).transpose(1, 2)
    leaves = [q, k, v]
    plain = (SDPA, *GUESTS)  # without a mixer
    return {
        name: _timed(_with_backward(call, weight, leaves if name in plain else [*leaves, *mixer.parameters()]), device)
        for name, call in calls.items()
    }


def _with_backward(call: Callable[[], Tensor], weight: Tensor, leaves: list[Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(call(), leaves, weight)


def _decode(q: Tensor, k: Tensor, v: Tensor, mixer: Hedgehog, mix_logit: Tensor, options: dict[str, Any]) -> Run:
    """W steps after all of k and v, over and over: the memory goes on from where it is, and stays as large."""
    window = options["window"]
    with torch.no_grad():
        memory = Memory.empty(k, v, mixer, window=window, sinks=options["sinks"])
        memory = near_far_step(q, k, v, memory, mixer, mix_logit, **options)[1]
    q, k, v = (x[:, :, -1:].clone() for x in (q, k, v))

    @torch.no_grad()
    def one() -> None:
        nonlocal memory
        memory = near_far_step(q, k, v, memory, mixer, mix_logit, **options)[1]

    return _timed(one, q.device, calls=window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if _flash(q.device, q.dtype) else nullcontext():
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _sdpa_efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """By the memory-efficient kernel, or an error."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _absent(device: torch.device) -> list[dict[str, Any]]:
    """The rows to compare with that this device has not at all."""
    reasons: dict[str, str | None] = dict.fromkeys(FLA_ROWS, fla_obstacle(device))
    reasons[EFFICIENT] = None if _on_gpu(device) else "on a CPU torch chooses the one kernel that it has"
    return [
        {"row": row, "what": None, "dtype": None, "reason": reasons[row]} for row in GUESTS if reasons[row] is not None
    ]


def _warm_up(runs: dict[str, Run], what: str, dtype: str) -> list[dict[str, Any]]:
    """Call every row once. A row to compare with that refuses these inputs is taken out and said; ours may not."""
    refused = []
    for row, run in list(runs.items()):
        try:
            run()
        except (RuntimeError, LinearizeError) as error:
            if row not in GUESTS:
                raise
            del runs[row]
            reason = " ".join(str(error).split())[:200]
            refused.append({"row": row, "what": what, "dtype": dtype, "reason": reason})
    return refused


def _flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether SDPA is held to flash attention: on a GPU, where it exists in half precision only."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _timed(call: Callable[[], Any], device: torch.device, calls: int = 1) -> Run:
    """Milliseconds of a call, as a mean over so many in a row."""
    return lambda: time_ms(call, device, calls)


def _interleaved(
    runs: dict[int, dict[str, Run]], repeats: int, label: str, advance: Callable[[str], None]
) -> dict[Cell, list[float]]:
    times: dict[Cell, list[float]] = {}
    for repeat in range(repeats):
        for length, by_row in runs.items():
            rows = list(by_row)
            turn = repeat % len(rows)
            for row in rows[turn:] + rows[:turn]:
                found = times.setdefault(Cell(row, "", length), [])
                if not found or found[-1] < COLD_MS:
                    by_row[row]()
                found.append(by_row[row]())
            advance(f"{label}, {length} tokens")
    return times


def cell_work(problem: Problem, what: str, row: str, tokens: int, dtype: str) -> Work | None:
    """(operations, bytes) of each launch of a cell's call; None where nothing counts them. See the module."""
    heads, kv_heads, head_dim, half = MODELS[problem.model]
    window, sinks, batch, element = problem.window, problem.sinks, problem.batch, DTYPES[dtype].itemsize
    if row in FLA_ROWS:
        return None
    softmax = row in (SDPA, EFFICIENT)
    if what != "decode" and not softmax:
        # The rows of a batch lie end to end: near-and-far attention costs the same, and reads its weights once.
        shape = Shape(heads, kv_heads, head_dim, head_dim, half, window, sinks, batch * tokens, element)
        return None if tokens < 2 * window else near_far_work(shape, what == "backward")
    shape = Shape(heads, kv_heads, head_dim, head_dim, half, window, sinks, tokens, element)
    if softmax:
        if what == "decode":
            return sdpa_step_work(shape, batch)
        return [(batch * flops, batch * moved) for flops, moved in sdpa_work(shape, what == "backward")]
    step = DecodeShape(batch, heads, kv_heads, head_dim, head_dim, half, window, sinks, element)
    moved = decode_bytes(step)
    return None if tokens < 2 * window else [(decode_flops(step), moved.from_memory + moved.weights)]


def _worth(work: Work | None, ms: float, dtype: str, rates: dict[str, Any]) -> dict[str, float] | None:
    """What a median of `ms` makes of a cell's work, and how near it is to the rates of `roofline.bandwidth`."""
    if work is None:
        return None
    flops, moved = (float(sum(x)) for x in zip(*work))
    per_ms = rates["matmul_gflop_s"][dtype] * 1e6, rates["read_gb_s"] * 1e6
    bound = sum(max(operations / per_ms[0], size / per_ms[1]) for operations, size in work)
    found = {"bytes": moved, "flops": flops, "gb_s": moved / ms / 1e6, "tflop_s": flops / ms / 1e9}
    return found | {"bound_ms": bound, "of_bound": bound / ms}


def _summary(
    times: dict[tuple[str, str], dict[Cell, list[float]]], problem: Problem, rates: dict[str, Any]
) -> dict[str, Any]:
    cells, growth, crossovers = [], [], []
    for (what, dtype), found in times.items():
        samples = {cell: [Sample(0.0, (ms,), {}) for ms in values] for cell, values in found.items()}
        rows = list(dict.fromkeys(cell.row for cell in found))
        lengths = sorted({cell.context for cell in found})
        for cell in sorted(found, key=lambda cell: (cell.context, rows.index(cell.row))):
            ms = spread(found[cell])
            done = problem.batch * (1 if what == "decode" else cell.context)
            labels = {"what": what, "dtype": dtype, "row": cell.row}
            work = _worth(cell_work(problem, what, cell.row, cell.context, dtype), ms["p50"], dtype, rates)
            found_here = {"ms": ms, "tokens_per_s": 1e3 * done / ms["p50"], "work": work}
            cells.append(labels | {"tokens": cell.context} | found_here)
        least = GROWTH_FROM if GROWTH_FROM in lengths else lengths[0]
        for row in rows:
            short, long = (found[Cell(row, "", length)] for length in (least, lengths[-1]))
            labels = {"what": what, "dtype": dtype, "row": row}
            ratios = {"p50": median(long) / median(short), "min": min(long) / min(short)}
            growth.append(labels | {"from": least, "to": lengths[-1]} | ratios)
            if row not in (SDPA, *GUESTS):
                crossovers.append(labels | crossover(samples, SDPA, row))
    return {"cells": cells, "growth": growth, "crossover": crossovers}


def _load() -> list[float] | None:
    """How many programs wanted a core in the last 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown to torch, not built in, or not there
        raise LinearizeError(f"device: {name!r} does not work here; use cpu, or cuda where there is a GPU") from error
    return torch.device(name)


def _check(problem: Problem, tokens: Sequence[int], whats: Sequence[str], dtypes: Sequence[str], repeats: int) -> None:
    for option, given, known in (
        ("model", [problem.model], MODELS),
        ("what", whats, WHATS),
        ("dtype", dtypes, DTYPES),
    ):
        for name in given:
            if name not in known:
                raise LinearizeError(f"{option}: {name!r} is unknown; known: {', '.join(known)}")
    for option, value in (("batch", problem.batch), ("window", problem.window), ("repeats", repeats)):
        if value < 1:
            raise LinearizeError(f"{option}: {value} is below 1; use 1 or more")
    if problem.sinks < 0:
        raise LinearizeError(f"sinks: {problem.sinks} is below 0; use 0 for none")
    for option, values in (("tokens", tokens), ("what", whats), ("dtype", dtypes)):
        if not values:
            raise LinearizeError(f"{option}: the list is empty; name at least one")
    if min(tokens) < 1:
        raise LinearizeError(f"tokens: {min(tokens)} is below 1; use 1 or more")
