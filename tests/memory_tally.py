"""Bytes of tensors that are alive, counted allocation by allocation: the same in every run, unlike a process's size."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tally:
    """Bytes above those at the start: `peak`, and `left` at the end."""

    peak: int
    left: int


def tally(run: Callable[[], object]) -> Tally:
    """What `run()` allocates on the CPU through PyTorch, temporaries inside of operators too."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
        gc.collect()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return Tally(peak, live)
