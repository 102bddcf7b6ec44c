"""The most memory that a piece of work has alive at once."""

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch

__all__ = ["allocations", "peak_bytes"]


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of every tensor that `run` allocates on the CPU, below 0 of every one that it frees, in the order of time,
    by the profiler's record.

    Its running total would not do: that goes on from the profiler's last use in the process and misses what was freed
    in between.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return [event["args"]["Bytes"] for event in events]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors alive at once during `run`: on a GPU of all, on a CPU of those made in it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    return max(accumulate(allocations(run)), default=0)
