"""Projections of few rows on a CPU, as decoding has them: the faster of PyTorch's two products.

On some CPUs `torch.nn.functional.linear` of one to four float32 rows reads the weight at half of what one core could
do, and in one thread (MKL's sgemv and small sgemm). The same product of slices of the weight, W as (P, N / P, K) times
x^T as (P, K, rows), takes MKL's batched form, which there is faster in one thread and takes a slice a thread. On others
it is the slower one. Measured with two threads on two cores, GB/s of the weight:

                                    AMD EPYC, avx512      Intel Xeon, AMX
                                    linear    slices      linear    slices
    576 -> 1536, one row                16        57          21         9
    576 -> 1536, four rows              11        41          14         8
    4096 -> 4096, one row               25        46          29        14
    4096 -> 4096, four rows             13        17          14        13

From eight rows on nothing is won at the larger sizes on either. Which one a machine has no flag tells, so both are
timed, once a process, and `install` does nothing where the slices are not clearly faster.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn

__all__ = ["FewRows", "apply_to", "fast_projections", "install", "obstacle", "remove"]

MOST_ROWS = 4
# A slice a thread, for up to so many threads. Fixed, so that sums do not depend on the number of threads.
SLICES = 32
# By how much the slices have to be faster: less is within what timings differ by.
CLEARLY = 1.25
# What both products are timed on, (outputs, inputs): a small model's weights, 19 MB in all, more than a second-level
# cache holds, as one that keeps them would be timed and not the memory.
TIMED = ((1536, 576), (576, 576)) * 4
REPEATS = 6


class FewRows:
    """Stands as `forward` of a linear layer, whose type stays what it is.

    What is not a forward pass of 1 to `MOST_ROWS` float32 rows on a CPU without gradients goes to
    `torch.nn.functional.linear`, as before.
    """

    def __init__(self, linear: nn.Linear):
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        weight, bias = self.linear.weight, self.linear.bias
        size = x.shape[-1]
        slices = math.gcd(weight.shape[0], SLICES)  # asked each time: a vocabulary may be resized
        if (
            slices > 1
            and size == weight.shape[-1]
            and 0 < x.numel() <= MOST_ROWS * size
            and type(weight) is nn.Parameter  # no quantized or sharded one, which has no views
            and weight.is_contiguous()
            and x.dtype is torch.float32 is weight.dtype
            and x.device.type == "cpu" == weight.device.type
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        ):
            out = sliced_product(x, weight, slices)
            return out if bias is None else out + bias
        return nn.functional.linear(x, weight, bias)


def sliced_product(x: Tensor, weight: Tensor, slices: int) -> Tensor:
    """x W^T as a batch of products, one for each slice of the outputs: (..., K) and (N, K), contiguous -> (..., N)."""
    size = x.shape[-1]
    rows = x.numel() // size
    # (P, N / P, rows); the rows' dimension last but with stride K, or MKL would take the slow form again.
    out = torch.bmm(weight.view(slices, -1, size), x.reshape(rows, size).t().expand(slices, size, rows))
    return out.permute(2, 0, 1).contiguous().view(*x.shape[:-1], -1)


def obstacle() -> str | None:
    """Why `install` does nothing on this machine, in one line, or None. Asked by timing both products."""
    if not torch.backends.mkl.is_available():
        return "PyTorch was built without MKL"
    linear, slices = product_ms(torch.get_num_threads())
    if linear > CLEARLY * slices:
        return None
    return f"the product by slices is not clearly faster on this CPU: {slices:.2f} ms, PyTorch's linear {linear:.2f} ms"


@cache
def product_ms(threads: int) -> tuple[float, float]:
    """Milliseconds of one row times all `TIMED` weights, by linear and by slices: the best of interleaved repeats.

    Args:
        threads: what torch uses now; other threads have other times. 20 to 50 ms each, once.
    """
    x = torch.ones(1, TIMED[0][1], dtype=torch.float32, device="cpu")
    weights = [torch.ones(*shape, dtype=torch.float32, device="cpu") for shape in TIMED]
    sliced = partial(sliced_product, slices=SLICES)
    products: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (nn.functional.linear, sliced)
    best = [math.inf, math.inf]
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for _ in range(REPEATS):
            for index, product in enumerate(products):
                start = time.perf_counter()
                for weight in weights:
                    product(x, weight)
                best[index] = min(best[index], 1000 * (time.perf_counter() - start))
    return best[0], best[1]


def install(model: nn.Module) -> None:
    """Give all plain linear layers of a model this forward pass, unless there is an `obstacle`; `remove` takes it off.

    A model on another device gets it too, as it may come back to the CPU.
    """
    if obstacle() is not None:
        return
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            module.__dict__["forward"] = FewRows(module)
            module.__dict__["_replicate_for_data_parallel"] = partial(_replica, module)


def remove(model: nn.Module) -> None:
    """Take off what `install` gave, also from under a hook of accelerate, which keeps the forward that it found."""
    for module in model.modules():
        kept = module.__dict__
        kept.pop("_replicate_for_data_parallel", None)
        if isinstance(kept.get("forward"), FewRows):
            del module.forward
        elif isinstance(kept.get("_old_forward"), FewRows):
            kept["_old_forward"] = partial(type(module).forward, module)


def _replica(linear: nn.Linear) -> nn.Linear:
    """What `nn.DataParallel` makes for another device: plain, as an attribute would go on to read the first weight."""
    replica = nn.Linear._replicate_for_data_parallel(linear)
    for name in ("forward", "_replicate_for_data_parallel"):
        replica.__dict__.pop(name, None)
    return replica


def apply_to(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether projections of few rows on a device, in a dtype, would go this way where there is no `obstacle`."""
    return device.type == "cpu" and dtype == torch.float32


@contextmanager
def fast_projections(model: nn.Module) -> Iterator[None]:
    """Inside, a model that is not converted has the projections that a converted one would have."""
    install(model)
    try:
        yield
    finally:
        remove(model)
