"""Compile every kernel at realistic shapes for GPUs that are not here, and write what each needs and could reach.

`bench_compile` writes compile.md, for people, and compile.json:

    {"kind": "linearize.compile", "schema": 1, "problems": int, "seconds": float, "compilations": int,
     "devices": {NAME: {"target": str, "bandwidth": bytes/s, "bf16": operations/s}},
     "cases": [{"model": str, "window": int, "kernel": str, "target": str, "grid": [int, ...],
                "flops": int, "bytes": int,
                "bounds": {NAME: {"us": float, "by": "memory" | "arithmetic"}},   devices with this target
                "resources": {...}}, ...],                                        see linearize.benchmarks.offline
     "machine": {...}}                                                            see linearize.benchmarks.machine

A bound is the least time that a device's data sheet allows, max(flops / peak, bytes / bandwidth): no measurement.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError
from linearize.kernels.devices import DEVICES, TARGETS, Device, Target
from linearize.kernels.near_far.cases import DECODE_BATCHES, Case, cases, decode_shape, shapes
from linearize.kernels.near_far.traffic import DecodeBytes, decode_bytes

from .files import write_json, write_text
from .inference import progress_bar
from .machine import machine_info
from .offline import Compilation, Resources, compilation_of, compile_offline

__all__ = ["Bound", "CompiledCase", "bench_compile", "bound", "compile_all"]

KIND = "linearize.compile"
PROCESSES = 2  # a compilation takes one core and up to 1 GiB
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Bound:
    """The least time in microseconds, and what sets it: "memory" or "arithmetic"."""

    us: float
    by: str


@dataclass(frozen=True)
class CompiledCase:
    """A case, the target that it was compiled for, and what came of it."""

    case: Case
    target: Target
    resources: Resources

    @property
    def bounds(self) -> dict[str, Bound]:
        """By the name of each device with this target."""
        found = {name: device for name, device in DEVICES.items() if device.target == self.target}
        return {name: bound(self.case.flops, self.case.bytes, device) for name, device in found.items()}


def bound(flops: int, bytes_: int, device: Device) -> Bound:
    """max(flops / peak in bfloat16, bytes / bandwidth) on `device`."""
    arithmetic, memory = flops / device.bf16, bytes_ / device.bandwidth
    return Bound(MICROSECONDS * max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory")


def bench_compile(
    folder: Path,
    targets: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    make_cases: Callable[[Target], Iterable[Case]] = cases,
) -> list[CompiledCase]:
    """Compile all cases and write compile.md and compile.json into `folder`.

    Args:
        folder: made where it is missing.
        targets: names out of `TARGETS`; all by default.
        models: names as the cases have them; all by default.
        make_cases: what to compile for a target.

    Returns:
        The cases with their resources, in the order of the tables. `resources.problems` says what is wrong.

    Raises:
        LinearizeError: a target or model that does not exist; Triton interprets kernels in this process.
    """
    start = time.perf_counter()
    chosen = [TARGETS[name] for name in _known("targets", targets, list(TARGETS))]
    found = [(case, target) for target in chosen for case in make_cases(target)]
    names = _known("models", models, list(dict.fromkeys(case.model for case, _ in found)))
    found = [(case, target) for case, target in found if case.model in names]
    plans = [compilation_of(case.launch, target) for case, target in found]
    unique = {plan.key: plan for plan in plans}
    results = dict(zip(unique, compile_all(list(unique.values()))))
    done = [CompiledCase(case, target, results[plan.key]) for (case, target), plan in zip(found, plans)]
    seconds = time.perf_counter() - start
    data = _data(done, len(unique), seconds)
    write_json(folder / "compile.json", data)
    write_text(folder / "compile.md", _page(done, data))
    return done


def _known(option: str, given: Sequence[str] | None, known: list[str]) -> list[str]:
    if given is None:
        return known
    for name in given:
        if name not in known:
            raise LinearizeError(f"{option}: {name!r} is unknown; known: {', '.join(known) or 'none'}")
    return list(given)


def compile_all(compilations: Sequence[Compilation], processes: int = PROCESSES) -> list[Resources]:
    """Compile in processes of their own, because some kernels take the compiler down with them.

    Where that happens, what was left is compiled once more, each alone, so that the crash is known by its kernel.
    """
    results: dict[int, Resources] = {}
    with progress_bar("compiling", len(compilations)) as advance:
        for index, found in _pool(list(range(len(compilations))), compilations, processes):
            if found is not None:
                results[index] = found
                advance(found.kernel)
        for index in [index for index in range(len(compilations)) if index not in results]:
            for _, found in _pool([index], compilations, 1):
                results[index] = found or _crashed(compilations[index])
                advance(results[index].kernel)
    return [results[index] for index in range(len(compilations))]


def _pool(
    indices: list[int], compilations: Sequence[Compilation], processes: int
) -> Iterator[tuple[int, Resources | None]]:
    """(index, result) as they come; None where the process died."""
    # Spawned, because a fork would inherit the threads of torch and LLVM half.
    with ProcessPoolExecutor(min(processes, max(1, len(indices))), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_offline, compilations[index]): index for index in indices}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], None


def _crashed(compilation: Compilation) -> Resources:
    return Resources(
        kernel=compilation.kernel,
        target=compilation.target.name,
        num_warps=compilation.num_warps,
        num_stages=compilation.num_stages,
        shared_limit=compilation.target.shared,
        problems=("does not compile: the compiler crashed",),
    )


def _data(done: Sequence[CompiledCase], compilations: int, seconds: float) -> dict[str, Any]:
    return {
        "kind": KIND,
        "schema": 1,
        "problems": sum(bool(row.resources.problems) for row in done),
        "seconds": round(seconds, 1),
        "compilations": compilations,
        "devices": {
            name: {"target": device.target.name, "bandwidth": device.bandwidth, "bf16": device.bf16}
            for name, device in DEVICES.items()
            if device.target in TARGETS.values()
        },
        "cases": [
            {
                "model": row.case.model,
                "window": row.case.window,
                "kernel": row.case.kernel,
                "target": row.target.name,
                "grid": list(row.case.launch.grid),
                "flops": row.case.flops,
                "bytes": row.case.bytes,
                "bounds": {name: asdict(found) for name, found in row.bounds.items()},
                "resources": asdict(row.resources),
            }
            for row in done
        ],
        "machine": machine_info(),
    }


# --- the page ----------------------------------------------------------------------------------------------------


def _page(done: Sequence[CompiledCase], data: dict[str, Any]) -> str:
    versions = data["machine"]["versions"]
    lines = [
        "# Kernels, compiled offline",
        "",
        f"Triton {versions['triton']}, torch {versions['torch']}, linearize {versions['linearize']}; "
        f"{data['machine']['date'][:10]}; written by `linearize bench compile`.",
        "",
        "**Nothing here ran on a GPU.** Registers, spills, shared memory and instructions are what the compilers "
        "report; times are bounds from data sheets, max(flops / peak, bytes / bandwidth), not measurements.",
        "",
        f"{len(done)} launches, {data['compilations']} different compilations, {data['problems']} with problems.",
    ]
    targets = dict.fromkeys(row.target for row in done)
    for target in targets:
        rows = [row for row in done if row.target == target]
        lines += ["", f"## {target.name}", "", *_resources_table(rows), "", *_bounds_table(rows)]
        lines += _remarks("Problems", rows, lambda row: row.resources.problems)
        lines += _remarks("Notes", rows, lambda row: row.resources.notes)
    lines += ["", *_decode_section()]
    return "\n".join(lines) + "\n"


def _decode_section() -> list[str]:
    """What a decode step moves, by kind."""
    body = []
    for model, shape in shapes():
        for batch in DECODE_BATCHES:
            moved = decode_bytes(decode_shape(shape, TARGETS["sm_90"], batch))
            body.append(
                [
                    model,
                    str(shape.window),
                    str(batch),
                    *(f"{x / 1e3:.4g}" for x in moved),
                    f"{moved.from_memory / moved.least:.3f}",
                    f"{(moved.from_memory + moved.weights) / moved.least:.2f}",
                ]
            )
    kinds = [name.replace("_", " ") for name in DecodeBytes._fields]
    columns = ["model", "W", "batch", *(f"{kind} kB" for kind in kinds), "rows / least", "with weights / least"]
    return [
        "## Bytes of a decode step",
        "",
        "One layer, bfloat16 cache, float32 state, averaged over the places of a token in its chunk; splits as chosen "
        "for sm_90. Least is what any step of this definition reads: states, window and sinks. Rows is all that a row "
        "of the batch adds and that crosses the memory bus (`projected` and `parts` are written by one kernel and read "
        "by the next, from the L2 cache). Weights are those of the feature maps, read once a step by up to 16 rows, as "
        "any weight of the model is.",
        "",
        *_table(columns, body),
    ]


def _resources_table(rows: Sequence[CompiledCase]) -> list[str]:
    columns = ["model", "W", "kernel", "grid", "warps", "stages", "registers", "spill B", "shared KiB", "tensor cores"]
    body = []
    for row in rows:
        found, launch = row.resources, row.case.launch
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.tensor_instructions.items())
        body.append(
            [
                *_label(row),
                " x ".join(map(str, launch.grid)),
                str(launch.num_warps),
                str(launch.num_stages),
                f"{found.registers} / {found.register_limit}",
                str(found.spill),
                f"{found.shared / 1024:.1f} / {found.shared_limit / 1024:.0f}",
                kinds or ("none" if found.dots else "no dots"),
                str(found.blocks_per_sm),
            ]
        )
    return _table([*columns, "blocks / SM"], body)


def _bounds_table(rows: Sequence[CompiledCase]) -> list[str]:
    devices = list(rows[0].bounds)
    body = []
    for row in rows:
        case = row.case
        intensity = case.flops / case.bytes if case.bytes else 0.0
        times = [f"{found.us:.3g} us, {found.by}" for found in row.bounds.values()]
        body.append([*_label(row), f"{case.flops / 1e9:.4g}", f"{case.bytes / 1e6:.4g}", f"{intensity:.3g}", *times])
    columns = ["model", "W", "kernel", "GFLOP", "MB", "FLOP / byte", *(f"bound on {name}" for name in devices)]
    return _table(columns, body)


def _remarks(
    title: str, rows: Sequence[CompiledCase], read: Callable[[CompiledCase], tuple[str, ...]]
) -> Iterator[str]:
    """A list of what stands out, each remark once with all it concerns."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for remark in read(row):
            found.setdefault(f"{row.case.kernel}: {remark}", []).append(f"{row.case.model} W {row.case.window}")
    if found:
        yield from ("", f"{title}:", "")
        yield from (f"- {remark} ({', '.join(dict.fromkeys(places))})" for remark, places in found.items())


def _label(row: CompiledCase) -> list[str]:
    return [row.case.model, str(row.case.window), row.case.kernel]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *cells)]
