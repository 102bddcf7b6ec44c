"""How cost grows with length: seconds of processor time, and bytes from torch's allocator."""

import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from linearize.benchmarks.peak import allocations


def growth_of_time(runs: dict[int, Callable[[], None]], limit: float) -> float:
    """Time of the longest run over that of the shortest, each at its best of at least 4 rounds.

    Other programs can only make a run slower, so rounds go on (40 at most) while the best ones exceed `limit`.
    """
    best = dict.fromkeys(runs, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for done in range(1, 41):
            for size, run in runs.items():
                start = time.thread_time()
                run()
                best[size] = min(best[size], time.thread_time() - start)
            growth = best[max(runs)] / best[min(runs)]
            if done >= 4 and growth <= limit:
                break
    finally:
        torch.set_num_threads(threads)
    return growth


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that `run` has alive at once, by the profiler's record of every allocation."""
    sizes = allocations(run)
    assert len(sizes) > 10
    return max(accumulate(sizes))


class LargestTensor(TorchDispatchMode):
    """While it is on: the bytes of the largest storage that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of one run, backward included; no busy machine moves them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
