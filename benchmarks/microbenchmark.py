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
     "cells": [{"what": str, "dtype": str, "row": str, "tokens": int, "ms": SPREAD, "tokens_per_s": float}, ...],
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
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from linearize.benchmarks.files import write_json, write_text
from linearize.benchmarks.inference import progress_bar
from linearize.benchmarks.machine import machine_info, matmul_ms, synchronize
from linearize.benchmarks.speed import Cell, Sample, crossover, spread
from linearize.errors import LinearizeError
from linearize.kernels.backends import interpreted, triton_obstacle
from linearize.kernels.near_far import Hedgehog, Memory, near_far_attention, near_far_step

__all__ = ["KIND", "MODELS", "WHATS", "Problem", "bench_kernels", "make_runs", "markdown", "write_result"]

KIND = "linearize.bench_kernels"
WHATS = ("forward", "backward", "decode")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# heads, kv_heads, head_dim, feature_dim
MODELS = {
    "SmolLM2-135M": (9, 3, 64, 64),
    "Qwen3-0.6B": (16, 8, 128, 128),
    "Llama-3.1-8B": (32, 8, 128, 128),
}
SDPA = "sdpa"
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
    before = matmul_ms(place)
    times: dict[tuple[str, str], dict[Cell, list[float]]] = {}
    lengths = sorted(set(tokens))
    with progress_bar("bench", total=(repeats + 1) * len(whats) * len(dtypes) * len(lengths)) as advance:
        for what in whats:
            for dtype in dtypes:
                runs = {}
                for length in lengths:
                    torch.manual_seed(seed)
                    runs[length] = make_runs(problem, what, length, DTYPES[dtype], place, compiled)
                    for run in runs[length].values():
                        run()
                    advance(f"{what}, {dtype}, {length} tokens, warming up")
                times[what, dtype] = _interleaved(runs, repeats, f"{what}, {dtype}", advance)
    return {
        "kind": KIND,
        "schema": 1,
        "model": problem.model,
        "shape": problem.shape,
        "device": str(place),
        "repeats": repeats,
        "sdpa": {dtype: "flash" if _flash(place, DTYPES[dtype]) else "default" for dtype in dtypes},
        **_summary(times, problem.batch),
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
        return runs | {SDPA: _timed(lambda: _sdpa(step, k, v, causal=False), device, calls=window)}

    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda name=name: near_far_attention(q, k, v, mixer, mix_logit, **options, backend=name)  # type: ignore[misc]
        for name in backends
    }
    if compiled:
        fast = torch.compile(near_far_attention, fullgraph=True, dynamic=True)
        calls["compiled"] = lambda: fast(q, k, v, mixer, mix_logit, **options, backend="torch")
    calls[SDPA] = lambda: _sdpa(q, k, v, causal=True)
    if what == "forward":
        return {name: _timed(torch.no_grad()(call), device) for name, call in calls.items()}
    weight = torch.randn(batch, length, heads, head_dim, device=device).to(dtype).transpose(1, 2)
    leaves = [q, k, v]
    return {
        name: _timed(_with_backward(call, weight, leaves if name == SDPA else [*leaves, *mixer.parameters()]), device)
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


def _flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether SDPA is held to flash attention: on a GPU, where it exists in half precision only."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _timed(call: Callable[[], Any], device: torch.device, calls: int = 1) -> Run:
    """Milliseconds of a call, as a mean over so many in a row."""

    def run() -> float:
        synchronize(device)
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(calls):
                call()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / calls
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - start) / calls

    return run


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


def _summary(times: dict[tuple[str, str], dict[Cell, list[float]]], batch: int) -> dict[str, Any]:
    cells, growth, crossovers = [], [], []
    for (what, dtype), found in times.items():
        samples = {cell: [Sample(0.0, (ms,), {}) for ms in values] for cell, values in found.items()}
        rows = list(dict.fromkeys(cell.row for cell in found))
        lengths = sorted({cell.context for cell in found})
        for cell in sorted(found, key=lambda cell: (cell.context, rows.index(cell.row))):
            ms = spread(found[cell])
            done = batch * (1 if what == "decode" else cell.context)
            labels = {"what": what, "dtype": dtype, "row": cell.row}
            cells.append(labels | {"tokens": cell.context, "ms": ms, "tokens_per_s": 1e3 * done / ms["p50"]})
        least = GROWTH_FROM if GROWTH_FROM in lengths else lengths[0]
        for row in rows:
            short, long = (found[Cell(row, "", length)] for length in (least, lengths[-1]))
            labels = {"what": what, "dtype": dtype, "row": row}
            ratios = {"p50": median(long) / median(short), "min": min(long) / min(short)}
            growth.append(labels | {"from": least, "to": lengths[-1]} | ratios)
            if row != SDPA:
                crossovers.append(labels | crossover(samples, SDPA, row))
    return {"cells": cells, "growth": growth, "crossover": crossovers}


def _load() -> list[float] | None:
    """How many programs wanted a core in the last 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def write_result(path: Path, result: dict[str, Any]) -> tuple[Path, Path]:
    """`path` as JSON, and the page beside it with the ending .md."""
    return write_json(path, result), write_text(path.with_suffix(".md"), markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    shape, machine = result["shape"], result["machine"]
    cpu = machine["cpu"]
    where = (
        machine["gpu"]["name"]
        if machine["gpu"] and result["device"] != "cpu"
        else f"{cpu['model']}, {cpu['usable']} cores"
    )
    load = "" if result["load"] is None else f", load before {result['load'][0]}"
    lines = [
        f"# Near-and-far attention alone: {result['model']}, {result['device']}",
        "",
        f"One layer, batch {shape['batch']}, {shape['heads']} query heads, {shape['kv_heads']} key-value heads of "
        f"{shape['head_dim']}, {2 * shape['feature_dim']} features, W = {shape['window']}, S = {shape['sinks']}. "
        f"{where}, {machine['threads']} threads{load}; torch {machine['versions']['torch']}, linearize "
        f"{machine['versions']['linearize']}, {machine['date'][:10]}; written by `{machine['command']}`.",
        "",
        f"Milliseconds: median (least to most) of {result['repeats']} interleaved repeats, warm. A fixed matrix "
        f"product took {result['matmul_ms']['before']:.2f} ms before and {result['matmul_ms']['after']:.2f} ms after.",
    ]
    for what, dtype in dict.fromkeys((cell["what"], cell["dtype"]) for cell in result["cells"]):
        cells = [cell for cell in result["cells"] if (cell["what"], cell["dtype"]) == (what, dtype)]
        rows = list(dict.fromkeys(cell["row"] for cell in cells))
        title = {"forward": "Forward", "backward": "Forward and backward", "decode": "One decoded token"}[what]
        lines += ["", f"## {title}, {dtype}", ""]
        lines += _row(["tokens", *rows, *(f"{row}, tokens/s" for row in rows)])
        lines += _row(["---"] * (2 * len(rows) + 1))
        for tokens in dict.fromkeys(cell["tokens"] for cell in cells):
            by_row = {cell["row"]: cell for cell in cells if cell["tokens"] == tokens}
            lines += _row(
                [
                    str(tokens),
                    *(_ms(by_row[row]["ms"]) for row in rows),
                    *(f"{by_row[row]['tokens_per_s']:.0f}" for row in rows),
                ]
            )
        lines.append("")
        for growth in result["growth"]:
            if (growth["what"], growth["dtype"]) == (what, dtype):
                lines.append(
                    f"- {growth['row']}: {growth['to']} tokens take {growth['p50']:.2f} times as long as "
                    f"{growth['from']} (by the least times {growth['min']:.2f})."
                )
        for cross in result["crossover"]:
            if (cross["what"], cross["dtype"]) == (what, dtype):
                lines.append(f"- {cross['row']} {_crossover(cross)}.")
    return "\n".join(lines) + "\n"


def _row(columns: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |"]


def _ms(ms: dict[str, float]) -> str:
    return f"{ms['p50']:.3g} ({ms['min']:.3g} to {ms['max']:.3g})"


def _crossover(cross: dict[str, Any]) -> str:
    return {
        "at": f"is faster than SDPA from about {cross['context'] or 0:.0f} tokens on",
        "everywhere": f"is faster than SDPA at every length, up to {cross['measured_to']}",
        "never": f"is not faster than SDPA at any length up to {cross['measured_to']}",
        "mixed": f"is faster than SDPA at some lengths only, up to {cross['measured_to']}",
    }[cross["kind"]]


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
