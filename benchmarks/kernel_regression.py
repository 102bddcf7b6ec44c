"""Whether kernels became slower: two results of the microbenchmark from one device, cell by cell.

Other programs make single repeats slower, hardly ever faster, so the least time is nearest to what the code costs, and
its distance to the median says how far to trust it: a cell's *noise* is median / least - 1. A cell is

    slower   if its least time and its median are above the old ones by more than the tolerance, and the least time by
             more than the noise of the old cell and that of the new one
    faster   if the old cell is slower than the new one in that sense
    same     otherwise

The median has a say because a least time of one lucky repeat (inputs that were still in a cache) would make everything
after it look slow.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from linearize.benchmarks.files import read_json
from linearize.benchmarks.machine import machine_info
from linearize.benchmarks.microbenchmark import KIND, Problem
from linearize.errors import LinearizeError

__all__ = ["VERDICTS", "compare_kernels", "read_old"]

VERDICTS = ("slower", "faster", "same")


def read_old(
    path: Path,
    problem: Problem,
    device: str,
    tokens: Sequence[int],
    whats: Sequence[str],
    dtypes: Sequence[str],
    tolerance: float = 10.0,
) -> dict[str, Any]:
    """The result to compare with, if it is one of this device and problem: asked before anything is measured.

    Args:
        path: of the result.
        problem, device, tokens, whats, dtypes: of the one that will be measured.
        tolerance: percent, >= 0.

    Raises:
        LinearizeError: no such result, another device or problem, nothing in common, or a tolerance below 0.
    """
    if tolerance < 0:
        raise LinearizeError(f"tolerance: {tolerance:g} % is below 0; use 0 or more, such as 10")
    old = read_json(path, KIND, schema=1)
    shape = problem.shape if problem.model == old["model"] else {}  # another model's is not asked for
    _check(old, {"device": device, "model": problem.model, "shape": shape, "machine": machine_info()}, path)
    wanted = set(product(whats, dtypes, tokens))
    if not any((cell["what"], cell["dtype"], cell["tokens"]) in wanted for cell in old["cells"]):
        raise _nothing_shared(old)
    return old


def compare_kernels(old: dict[str, Any], new: dict[str, Any], tolerance: float = 10.0) -> dict[str, Any]:
    """Both results cell by cell.

    Args:
        old, new: what `bench_kernels` returns, of one device and one problem.
        tolerance: percent of the old least time that do not count.

    Returns:
        {"tolerance": float, "slower": int, "faster": int, "same": int,
        "cells": [{"what", "dtype", "row", "tokens", "min_ms": [old, new], "ratio_min": float, "ratio_p50": float,
        "noise": [old, new], "verdict": "slower" | "faster" | "same"}, ...],
        "matmul_ratio": float,             new over old time of the fixed matrix product, before everything
        "differences": [str, ...],         threads and versions that are not the same
        "only_old": [...], "only_new": [...]}                          cells without a counterpart, as (what, ...)

    Raises:
        LinearizeError: another device or problem, or not one cell in common.
    """
    _check(old, new, None)
    before, after = ({_key(cell): cell for cell in result["cells"]} for result in (old, new))
    shared = [key for key in after if key in before]
    if not shared:
        raise _nothing_shared(old)
    cells = [_compare(before[key], after[key], tolerance / 100) for key in shared]
    return {
        "tolerance": tolerance,
        **{verdict: sum(cell["verdict"] == verdict for cell in cells) for verdict in VERDICTS},
        "cells": cells,
        "matmul_ratio": new["matmul_ms"]["before"] / old["matmul_ms"]["before"],
        "differences": _differences(old["machine"], new["machine"]),
        "only_old": [list(key) for key in before if key not in after],
        "only_new": [list(key) for key in after if key not in before],
    }


def _key(cell: dict[str, Any]) -> tuple[str, str, str, int]:
    return cell["what"], cell["dtype"], cell["row"], cell["tokens"]


def _compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> dict[str, Any]:
    noise = [cell["ms"]["p50"] / cell["ms"]["min"] - 1 for cell in (old, new)]
    least, middle = (new["ms"][name] / old["ms"][name] for name in ("min", "p50"))

    def above(least: float, middle: float) -> bool:
        return min(least, middle) - 1 > tolerance and least - 1 > max(noise)

    verdict = "slower" if above(least, middle) else "faster" if above(1 / least, 1 / middle) else "same"
    what, dtype, row, tokens = _key(new)
    return {
        "what": what,
        "dtype": dtype,
        "row": row,
        "tokens": tokens,
        "min_ms": [old["ms"]["min"], new["ms"]["min"]],
        "ratio_min": least,
        "ratio_p50": middle,
        "noise": noise,
        "verdict": verdict,
    }


def _processor(result: dict[str, Any]) -> str:
    """What did the work: the GPU's name, or the CPU's model."""
    machine, kind = result["machine"], result["device"].partition(":")[0]
    if kind == "cuda":
        return f"{kind} ({(machine['gpu'] or {}).get('name')})"
    return f"{kind} ({machine['cpu']['model']})"


def _check(old: dict[str, Any], new: dict[str, Any], path: Path | None) -> None:
    name = "the old result" if path is None else str(path)
    was, now = _processor(old), _processor(new)
    if was != now:
        raise LinearizeError(
            f"compare: {name} was measured on {was}, and this is {now}; times of two devices say nothing about a "
            "change, so measure the old state on this one"
        )
    if old["model"] != new["model"]:
        raise LinearizeError(
            f"compare: {name} is of {old['model']}, not of {new['model']}; give --model {old['model']}"
        )
    for size, value in new["shape"].items():
        if old["shape"][size] != value:
            raise LinearizeError(
                f"compare: {name} has {size} {old['shape'][size]}, not {value}; measure with --{size} "
                f"{old['shape'][size]}, or compare with another result"
            )


def _nothing_shared(old: dict[str, Any]) -> LinearizeError:
    return LinearizeError(
        "compare: the two results have no cell in common; measure with the same --tokens, --what and --dtype as the "
        f"old one, {old['machine']['command']!r}"
    )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Threads, cores and versions that are not the same, as "torch 2.11.0 -> 2.12.0"."""
    pairs = {"threads": (old["threads"], new["threads"]), "cores": (old["cpu"]["usable"], new["cpu"]["usable"])}
    for name in dict.fromkeys([*old["versions"], *new["versions"]]):
        pairs[name] = old["versions"].get(name), new["versions"].get(name)
    return [f"{name} {was} -> {now}" for name, (was, now) in pairs.items() if was != now]
