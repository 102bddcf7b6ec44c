"""One door to every Triton kernel: launch it, or record the launch, so that it can be compiled for a device that is not
here.

A launcher allocates its outputs, chooses blocks for the target and calls `launch` with every argument by name. Under
`recording` with tensors on `meta` the same code runs without a GPU, and what it would have launched comes back as
`Launch` objects: the offline compiler's table is therefore about the very launches that run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .devices import Target, target_of

__all__ = ["Launch", "current_target", "launch", "recording"]


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
