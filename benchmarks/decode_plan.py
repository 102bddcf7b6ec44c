"""What decoding would take at most fast, original beside student, before anything is converted: `linearize plan`.

`plan_decode` returns

    {"kind": "linearize.plan", "schema": 1, "model": str, "family": str, "dtype": str, "bound": true,
     "conversion": {...},                                  as in LinearizeConfig.to_dict
     "device": {"name": str, "measured": bool, "bandwidth_gb_s": float, "peak_tflop_s": float,
                "memory_bytes": int | null, "overhead_ms": float | null},
     "measurement": {...} | null,                          of `roofline.bandwidth`, where the device is this machine
     "memory_bytes": int | null,                           the limit that fits and largest_batch are for
     "positions": int | null,                              the longest context that the model was made for
     "cells": [{"row": "original" | "student", "context": int, "batch": int, "ms_per_token": float,
                "tokens_per_s": float,                     of the whole batch
                "limited_by": "memory" | "arithmetic", "bytes": {...}, "flops": float,     of one step
                "weight_bytes": int, "cache_bytes": int, "fits": bool | null}, ...],
     "largest_batch": [{"row", "context", "batch": int, "tokens_per_s": float | null}, ...],     [] without a limit
     "crossover": [{"batch": int, "context": int | null}, ...]}        the student is faster from there on; null: never

Times are lower bounds and rates upper bounds; both leave out prefill. A context is the tokens behind the new one.
"""

from collections.abc import Sequence
from typing import Any

from linearize.benchmarks.roofline import Roof, predicted_crossover, step_seconds
from linearize.benchmarks.step_costs import ModelCosts, model_costs, step_bytes, step_flops
from linearize.config import LinearizeConfig
from linearize.errors import LinearizeError

__all__ = ["KIND", "plan_decode"]

KIND = "linearize.plan"


def plan_decode(
    model_config: Any,
    conversion: LinearizeConfig,
    contexts: Sequence[int],
    batches: Sequence[int],
    roof: Roof,
    dtype: str = "bfloat16",
    memory: float | None = None,
    name: str = "",
    measurement: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Bounds of every context and batch, for the original and its student.

    Args:
        model_config: a transformers configuration of a known family.
        conversion: what the student is.
        contexts: tokens behind the new one, each >= 1.
        batches: rows at once, each >= 1.
        roof: the device.
        dtype: "float32", "bfloat16" or "float16", of weights, keys and values.
        memory: bytes for weights and caches; the device's own if left out.
        name: what to call the model in the result.
        measurement: how the roof was measured, for the record.

    Returns:
        JSON-able; the module's docstring has the keys.

    Raises:
        LinearizeError: a number below 1, or whatever `model_costs` or `predict` refuses.
    """
    for option, values in (("context", contexts), ("batch", batches)):
        if not values or min(values) < 1:
            raise LinearizeError(f"{option}: {list(values)} is not a list of numbers >= 1; give one or more of them")
    rows = {"original": model_costs(model_config, None, dtype), "student": model_costs(model_config, conversion, dtype)}
    limit = roof.memory if memory is None else memory
    lengths = sorted(set(contexts))
    cells = [
        {"row": row, "context": context, "batch": batch, **_cell(costs, context, batch, roof, limit)}
        for context in lengths
        for batch in sorted(set(batches))
        for row, costs in rows.items()
    ]
    largest = [
        {"row": row, "context": context, **_largest(costs, context, roof, limit)}
        for context in lengths
        for row, costs in rows.items()
        if limit is not None
    ]
    return {
        "kind": KIND,
        "schema": 1,
        "model": name,
        "family": model_config.model_type,
        "dtype": dtype,
        "bound": True,
        "conversion": conversion.to_dict(),
        "device": {
            "name": roof.name,
            "measured": roof.measured,
            "bandwidth_gb_s": roof.bandwidth / 1e9,
            "peak_tflop_s": roof.peaks[dtype] / 1e12,
            "memory_bytes": None if roof.memory is None else int(roof.memory),
            "overhead_ms": None if roof.overhead_s is None else 1e3 * roof.overhead_s,
        },
        "measurement": measurement,
        "memory_bytes": None if limit is None else int(limit),
        "positions": getattr(model_config, "max_position_embeddings", None),
        "cells": cells,
        "largest_batch": largest,
        "crossover": [
            {"batch": batch, "context": predicted_crossover(rows["original"], rows["student"], roof, batch)}
            for batch in sorted(set(batches))
        ],
    }


def _cell(costs: ModelCosts, context: int, batch: int, roof: Roof, limit: float | None) -> dict[str, Any]:
    seconds = step_seconds(costs, context, batch, roof)
    moved, operations = step_bytes(costs, context, batch), step_flops(costs, context, batch)
    arithmetic = operations / roof.peaks[costs.dtype] > moved.total / roof.bandwidth
    cache = costs.cache_bytes(context, batch)
    return {
        "ms_per_token": 1e3 * seconds,
        "tokens_per_s": batch / seconds,
        "limited_by": "arithmetic" if arithmetic else "memory",
        "bytes": moved._asdict() | {"total": moved.total},
        "flops": operations,
        "weight_bytes": costs.weight_bytes,
        "cache_bytes": cache,
        "fits": None if limit is None else costs.weight_bytes + cache <= limit,
    }


def _largest(costs: ModelCosts, context: int, roof: Roof, limit: float) -> dict[str, Any]:
    batch = costs.largest_batch(context, limit)
    seconds = step_seconds(costs, context, batch, roof) if batch else None
    return {"batch": batch, "tokens_per_s": None if seconds is None else batch / seconds}
