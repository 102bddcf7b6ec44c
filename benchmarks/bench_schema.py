"""A bench.json of any schema in the form of schema 2, which the report reads.

Schema 1 has one batch, and a cell's mode is the name of its cache. What it lacks is None, 0 or empty here.
"""

from typing import Any

__all__ = ["as_schema_2"]


def as_schema_2(result: dict[str, Any]) -> dict[str, Any]:
    """The same measurements by row, mode, context and batch. A file of schema 2 is returned as it is.

    The parts that the report reads:

        "modes": {ROW: [MODE, ...]}, "batches": [int, ...], "skipped": [{"row", "mode", "reason"}, ...]
        "cells": [{"row", "mode", "context", "batch", "repeats", "ms_per_token", "tokens_per_s", "cache_bytes",
                   "prefill_ms": SPREAD | null, "weight_bytes": int | null, "recompiles": int}, ...]
        "comparisons": [{"row", "context", "batch", "mode", "baseline_mode", "verdict",
                         "speedup": {"p50", "min", "max", "ci95": [low, high] | null}}, ...]
        "prefill": [{"row", "length", "batch", "repeats", "ms": SPREAD}, ...]
        "blocks": [{"what", "repeat", "context", "batch", "matmul_before_ms", "matmul_after_ms", "moved"}, ...]
        "dropped": [{"what", "context", "batch", "reason"}, ...]
    """
    if result["schema"] > 1:
        return result
    batch, modes = result["batch"], dict[str, list[str]]()
    for cell in result["cells"]:
        own = modes.setdefault(cell["row"], [])
        if cell["cache"] not in own:
            own.append(cell["cache"])
    return {
        **result,
        "batches": [batch],
        "modes": modes,
        "skipped": [],
        "prefill": [],
        "cells": [
            {**cell, "mode": cell["cache"], "batch": batch, "weight_bytes": None, "recompiles": 0}
            for cell in result["cells"]
        ],
        "comparisons": [
            {**pair, "batch": batch, "mode": "dynamic", "baseline_mode": pair["baseline_cache"]}
            | {"speedup": {**pair["speedup"], "ci95": None}}
            for pair in result["comparisons"]
        ],
        "blocks": [{**block, "what": "decode", "batch": batch} for block in result["blocks"]],
        "dropped": [{**drop, "what": "decode", "batch": batch} for drop in result["dropped"]],
    }
