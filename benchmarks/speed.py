"""From timed steps to the numbers of bench.json: medians, spreads, paired speedups, the crossover context."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import torch

from linearize.benchmarks.resampling import student_t

__all__ = [
    "Cell",
    "Sample",
    "comparisons",
    "crossover",
    "describe_cells",
    "prefill_growth",
    "ratio_interval",
    "spread",
    "verdict",
]

# What a long prefill is compared with.
GROWTH_FROM = 4096


@dataclass(frozen=True)
class Cell:
    """What is timed: a row in a mode (see `linearize.benchmarks.modes`) at a context in tokens, `batch` sequences."""

    row: str
    mode: str
    context: int
    batch: int = 1


@dataclass(frozen=True)
class Sample:
    """One repeat of one cell.

    Attributes:
        prefill_ms: the prefill; None where a part of the context was filled in.
        step_ms: each timed decode step.
        cache_bytes: what the cache holds at the end.
        filled: tokens of the context that were not read.
        first_ms: the first step, which is not timed: in a compiled mode it compiles.
        recompiles: graphs compiled during the timed steps; more than 0 spoils them.
        skipped_graphs: graphs on a GPU that were to be CUDA graphs and are none.
    """

    prefill_ms: float | None
    step_ms: tuple[float, ...]
    cache_bytes: dict[str, int]
    filled: int = 0
    first_ms: float = 0.0
    recompiles: int = 0
    skipped_graphs: int = 0

    @property
    def median_ms(self) -> float:
        """Median step."""
        return median(self.step_ms)


Samples = Mapping[Cell, Sequence[Sample]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"p50": median(values), "min": min(values), "max": max(values)}


def _place(cell: Cell) -> tuple[int, int]:
    return cell.context, cell.batch


def describe_cells(samples: Samples, weight_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One record a cell, in order of context and batch. `weight_bytes`: of each row, read by a step."""
    cells = []
    for cell, repeats in sorted(samples.items(), key=lambda pair: _place(pair[0])):
        steps = [step for sample in repeats for step in sample.step_ms]
        medians = [sample.median_ms for sample in repeats]
        prefills = [sample.prefill_ms for sample in repeats if sample.prefill_ms is not None]
        p50 = median(steps)
        cells.append(
            {
                "row": cell.row,
                "mode": cell.mode,
                "context": cell.context,
                "batch": cell.batch,
                "repeats": len(repeats),
                "ms_per_token": {
                    "p50": p50,
                    "p95": float(torch.tensor(steps, dtype=torch.float64).quantile(0.95)),
                    "mean": fmean(steps),
                    "min": min(medians),
                    "max": max(medians),
                },
                "tokens_per_s": 1e3 * cell.batch / p50,
                "prefill_ms": spread(prefills) if prefills else None,
                # The prompt grows a little from repeat to repeat; the first one has the context's own length.
                "filled": repeats[0].filled,
                "weight_bytes": weight_bytes[cell.row],
                "cache_bytes": repeats[0].cache_bytes,
                "first_ms": repeats[0].first_ms,
                "recompiles": sum(sample.recompiles for sample in repeats),
                "skipped_graphs": sum(sample.skipped_graphs for sample in repeats),
            }
        )
    return cells


def _best(samples: Samples, row: str, place: tuple[int, int]) -> Cell:
    """A row's cell with the lowest median at this context and batch: its best mode there."""
    cells = [cell for cell in samples if cell.row == row and _place(cell) == place]
    return min(cells, key=lambda cell: _p50(samples[cell]))


def _p50(repeats: Sequence[Sample]) -> float:
    return median(step for sample in repeats for step in sample.step_ms)


def comparisons(samples: Samples, baseline: str) -> list[dict[str, Any]]:
    """Each other row in its best mode against the baseline in its best mode, repeat by repeat, in order of context and
    batch."""
    result = []
    for place in sorted({_place(cell) for cell in samples}):
        best = _best(samples, baseline, place)
        for row in dict.fromkeys(cell.row for cell in samples if cell.row != baseline and _place(cell) == place):
            cell = _best(samples, row, place)
            ratios = [theirs.median_ms / ours.median_ms for theirs, ours in zip(samples[best], samples[cell])]
            interval = ratio_interval(ratios)
            result.append(
                {
                    "row": row,
                    "context": cell.context,
                    "batch": cell.batch,
                    "mode": cell.mode,
                    "baseline_mode": best.mode,
                    "speedup": spread(ratios) | {"ci95": interval},
                    "verdict": verdict(interval),
                }
            )
    return result


def ratio_interval(ratios: Sequence[float]) -> list[float] | None:
    """The 95 % interval of a paired ratio from its repeats; None for a single one.

    Student's t on the logarithms: with so few repeats a bootstrap could not reach beyond the smallest and the largest,
    which hold the true ratio in 50 % of cases with two repeats and in 75 % with three.
    """
    if len(ratios) < 2:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    middle, half = fmean(logs), student_t(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return [math.exp(middle - half), math.exp(middle + half)]


def verdict(interval: Sequence[float] | None) -> str:
    """`"faster"` or `"slower"` where the interval of a speedup leaves out 1, else `"undecided"`."""
    if interval is None:
        return "undecided"
    low, high = interval
    return "faster" if low > 1 else "slower" if high < 1 else "undecided"


def crossover(samples: Samples, baseline: str, row: str, batch: int = 1) -> dict[str, Any]:
    """The context from which `row` takes less time per token than the baseline, by linear interpolation; each in its
    best mode at each context.

    Returns:
        `kind` is `"everywhere"` (faster at every measured context), `"at"` (slower at first, faster from `context`
        on), `"never"` (not faster at any) or `"mixed"` (faster at some, then slower again; no single crossover).
    """
    points = []
    for place in sorted({_place(cell) for cell in samples if cell.row == row and cell.batch == batch}):
        ours, theirs = (_p50(samples[_best(samples, name, place)]) for name in (row, baseline))
        points.append((place[0], ours - theirs))
    faster = [difference < 0 for _, difference in points]
    result: dict[str, Any] = {"kind": "mixed", "context": None, "measured_to": points[-1][0]}
    if all(faster):
        result["kind"] = "everywhere"
    elif not any(faster):
        result["kind"] = "never"
    elif faster == sorted(faster):  # False ... True: one change, from slower to faster
        after = faster.index(True)
        (c0, d0), (c1, d1) = points[after - 1], points[after]
        result |= {"kind": "at", "context": c0 + (c1 - c0) * d0 / (d0 - d1)}
    return result


def prefill_growth(prefills: Mapping[tuple[str, int], Sequence[float]]) -> list[dict[str, Any]]:
    """How much longer each row's longest prefill takes than one of 4096 tokens, from milliseconds of each repeat by
    (row, length). 2 is what twice the tokens cost where the cost is linear, 4 where it is quadratic."""
    growth = []
    for row in dict.fromkeys(row for row, _ in prefills):
        lengths = [length for name, length in prefills if name == row]
        if GROWTH_FROM in lengths and max(lengths) > GROWTH_FROM:
            short, long = prefills[row, GROWTH_FROM], prefills[row, max(lengths)]
            ratio = median(long) / median(short)
            growth.append({"row": row, "from": GROWTH_FROM, "to": max(lengths), "ratio": ratio})
    return growth
