"""One door to every Triton kernel: launch it, or record the launch, so that it can be compiled for a device that is not
here.

A launcher allocates its outputs, chooses blocks for the target and calls `launch` with every argument by name. Under
`recording` with tensors on `meta` the same code runs without a GPU, and what it would have launched comes back as
`Launch` objects: the offline compiler's table is therefore about the very launches that run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .devices import Target, target_of
from .tuning import choose

__all__ = ["Launch", "current_target", "launch", "launch_best", "recording"]

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    kernel: the function under `@triton.jit`; grid: programs by axis; arguments: every parameter by name, constexprs
    included, tensors possibly on `meta`; num_warps and num_stages as Triton means them.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("linearize_recorded", default=None)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *, num_warps: int = 4, num_stages: int = 1
) -> None:
    """Run `kernel` over `grid`, on the device of its tensors; under `recording`, note it instead.

    A grid with a 0 runs nothing: an empty batch has no programs.
    """
    record = _recorded.get()
    if record is not None:
        record[1].append(Launch(kernel, grid, arguments, num_warps, num_stages))
        return
    if not all(grid):
        return
    tensor = next(x for x in arguments.values() if isinstance(x, Tensor))
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
    else:
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Inside, `launch` runs nothing and appends to the list; blocks are chosen for `target`."""
    launches: list[Launch] = []
    token = _recorded.set((target, launches))
    try:
        yield launches
    finally:
        _recorded.reset(token)


def current_target(device: torch.device) -> Target:
    """What to choose blocks for: the target under `recording`, else the device itself."""
    record = _recorded.get()
    return target_of(device) if record is None else record[0]


_chosen: dict[tuple, int] = {}


def launch_best(key: tuple, candidates: Sequence[Choice], run: Callable[[Choice], None], tensor: Tensor) -> None:
    """Launch by `run(candidate)` with the best candidate for `key` on the tensor's device.

    The first one, unless a measurement chose another (`tuning`); where one needs more shared memory or registers than
    the device has, the next, which is then remembered. Not on a GPU: the first.

    Raises:
        LinearizeError: none of the candidates fits the device.
    """
    if not tensor.is_cuda or _recorded.get() is not None:
        run(candidates[0])
        return
    from triton.runtime.errors import OutOfResources

    where = (tensor.device.index, *key)
    index = _chosen.get(where)
    capturing = torch.cuda.is_current_stream_capturing()
    if index is None:
        name = torch.cuda.get_device_name(tensor.device)
        timed = None if capturing else lambda i: _milliseconds(run, candidates[i], tensor.device)
        index = choose(f"{name}: {', '.join(map(str, key))}", len(candidates), timed)
    # The chosen one, then the others by preference.
    failure: Exception | None = None
    for i in (index, *(i for i in range(len(candidates)) if i != index)):
        try:
            run(candidates[i])
        except OutOfResources as error:
            failure = error
            continue
        if not capturing:  # what was not timed for that reason may still be
            _chosen[where] = i
        return
    from linearize.errors import LinearizeError

    raise LinearizeError(
        f"backend: {key[0]} does not fit {torch.cuda.get_device_name(tensor.device)} with any blocks ({failure}); "
        "use backend='torch'"
    ) from failure


def _milliseconds(run: Callable[[Choice], None], candidate: Choice, device: torch.device) -> float:
    """The best of a few launches, compilation apart; infinity where the candidate does not fit."""
    from triton.runtime.errors import OutOfResources

    try:
        run(candidate)
    except OutOfResources:
        return float("inf")
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        run(candidate)
        end.record(stream)
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
