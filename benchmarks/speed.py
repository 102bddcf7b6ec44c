"""From timed steps to the numbers of bench.json: medians, spreads, paired speedups, the crossover context."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

__all__ = ["Cell", "Sample", "comparisons", "crossover", "describe_cells", "spread"]


@dataclass(frozen=True)
class Cell:
    """What is timed: a row under a kind of cache (`"dynamic"` or `"static"`) at a context in tokens."""

    row: str
    cache: str
    context: int


@dataclass(frozen=True)
class Sample:
    """One repeat of one cell: the prefill, then each timed decode step, and what the cache holds at the end."""

    prefill_ms: float
    step_ms: tuple[float, ...]
    cache_bytes: dict[str, int]

    @property
    def median_ms(self) -> float:
        """Median step."""
        return median(self.step_ms)


Samples = Mapping[Cell, Sequence[Sample]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"p50": median(values), "min": min(values), "max": max(values)}


def describe_cells(samples: Samples, batch: int) -> list[dict[str, Any]]:
    """One record a cell, in order of context."""
    cells = []
    for cell, repeats in sorted(samples.items(), key=lambda pair: pair[0].context):
        steps = [step for sample in repeats for step in sample.step_ms]
        medians = [sample.median_ms for sample in repeats]
        p50 = median(steps)
        cells.append(
            {
                "row": cell.row,
                "cache": cell.cache,
                "context": cell.context,
                "repeats": len(repeats),
                "ms_per_token": {
                    "p50": p50,
                    "p95": float(torch.tensor(steps, dtype=torch.float64).quantile(0.95)),
                    "mean": fmean(steps),
                    "min": min(medians),
                    "max": max(medians),
                },
                "tokens_per_s": 1e3 * batch / p50,
                "prefill_ms": spread([sample.prefill_ms for sample in repeats]),
                # The prompt grows a little from repeat to repeat; the first one has the context's own length.
                "cache_bytes": repeats[0].cache_bytes,
            }
        )
    return cells


def _best_baseline(samples: Samples, baseline: str, context: int) -> Cell:
    """The baseline's cell with the lower median at this context."""
    cells = [cell for cell in samples if cell.row == baseline and cell.context == context]
    return min(cells, key=lambda cell: _p50(samples[cell]))


def _p50(repeats: Sequence[Sample]) -> float:
    return median(step for sample in repeats for step in sample.step_ms)


def comparisons(samples: Samples, baseline: str) -> list[dict[str, Any]]:
    """Each other row against the baseline's better cache, repeat by repeat, in order of context."""
    result = []
    for cell, repeats in sorted(samples.items(), key=lambda pair: pair[0].context):
        if cell.row == baseline:
            continue
        best = _best_baseline(samples, baseline, cell.context)
        ratios = [theirs.median_ms / ours.median_ms for theirs, ours in zip(samples[best], repeats)]
        verdict = "faster" if min(ratios) > 1 else "slower" if max(ratios) < 1 else "undecided"
        result.append(
            {
                "row": cell.row,
                "context": cell.context,
                "baseline_cache": best.cache,
                "speedup": spread(ratios),
                "verdict": verdict,
            }
        )
    return result


def crossover(samples: Samples, baseline: str, row: str) -> dict[str, Any]:
    """The context from which `row` takes less time per token than the baseline, by linear interpolation.

    Returns:
        `kind` is `"everywhere"` (faster at every measured context), `"at"` (slower at first, faster from `context`
        on), `"never"` (not faster at any) or `"mixed"` (faster at some, then slower again; no single crossover).
    """
    points = []
    for cell, repeats in sorted(samples.items(), key=lambda pair: pair[0].context):
        if cell.row == row:
            best = _best_baseline(samples, baseline, cell.context)
            points.append((cell.context, _p50(repeats) - _p50(samples[best])))
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
