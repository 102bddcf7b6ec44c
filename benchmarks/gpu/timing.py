"""Timing of calls on a GPU, and the rows of tables that come of it."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linearize.kernels.devices import DEVICES, Device

from ..attention_work import Work

__all__ = ["both_ways", "flash", "graphed", "known_device", "labelled", "peak_mib", "reported", "row", "time_calls"]

SECONDS = 0.4  # of timed calls
REPEATS = 5, 50
L2_BYTES = 256 * 2**20


def time_calls(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(median, least) milliseconds of a call, after one that does not count."""
    run()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (1e3 * (time.perf_counter() - start),) * 2
    sweep = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    torch.cuda.synchronize()
    times: list[float] = []
    least, most = REPEATS
    until = time.perf_counter() + SECONDS
    while len(times) < most and (len(times) < least or time.perf_counter() < until):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sweep.zero_()
        start_event.record()
        run()
        end_event.record()
        end_event.synchronize()
        times.append(start_event.elapsed_time(end_event))
    return median(times), min(times)


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same kernels as a CUDA graph, without Python in between."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a call takes at most beyond what is there before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def known_device(device: torch.device) -> Device | None:
    """The data sheet of this GPU, by its name."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words: an L40 is no L4.
    return next((found for key, found in DEVICES.items() if re.search(rf"\b{re.escape(key)}\b", name)), None)


def row(
    what: str,
    times: tuple[float, float],
    work: Work,
    device: torch.device,
    **more: Any,
) -> dict[str, Any]:
    """A row of a table. work: (operations, bytes) of each kernel."""
    ms, least = times
    flops, moved = (sum(x) for x in zip(*work))
    found: dict[str, Any] = {"what": what, **more, "ms": round(ms, 4), "ms min": round(least, 4)}
    found |= {"GB/s": round(moved / ms / 1e6, 1), "TFLOP/s": round(flops / ms / 1e9, 2)}
    sheet = known_device(device)
    if sheet is not None:
        bound = 1e3 * sum(max(operations / sheet.bf16, size / sheet.bandwidth) for operations, size in work)
        found |= {"bound ms": round(bound, 4), "of bound": round(bound / ms, 3)}
    return found


@contextmanager
def flash(device: torch.device) -> Iterator[None]:
    """SDPA takes flash attention, or fails; whatever there is on a CPU."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


@contextmanager
def reported(table: list[dict[str, Any]], what: str) -> Iterator[None]:
    """A row that PyTorch refuses says why, and the rows before it are kept."""
    try:
        yield
    except RuntimeError as error:
        table.append({"what": what, "refused": " ".join(str(error).split())[:200]})


def both_ways(run: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward without gradients, forward and backward) of run() with gradients of `leaves`."""

    @torch.no_grad()
    def forward() -> Tensor:
        return run()

    with torch.no_grad():
        weight = torch.randn_like(run())

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), leaves, weight)

    return forward, backward


def labelled(table: list[dict[str, Any]], **labels: Any) -> list[dict[str, Any]]:
    """The rows with the same first columns."""
    return [labels | found for found in table]
