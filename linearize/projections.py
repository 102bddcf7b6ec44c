"""Projections of few rows on a CPU, as decoding has them: the weight is read at the memory's speed.

`torch.nn.functional.linear` of one to four float32 rows reads the weight at half of what one core could do, and in one
thread (MKL's sgemv and small sgemm). The same product of slices of the weight, W as (P, N / P, K) times x^T as
(P, K, rows), takes MKL's batched form, which is faster in one thread and takes a slice a thread. Measured on two cores
of an AMD EPYC, GB/s of the weight, linear and this: 576 -> 1536, one row 16 and 57, four rows 11 and 41; 4096 -> 4096,
one row 25 and 46, four rows 13 and 17; from eight rows on nothing is won at the larger sizes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["FewRows", "fast_projections", "help_with", "install", "remove"]

MOST_ROWS = 4
# A slice a thread, for up to so many threads. Fixed, so that sums do not depend on the number of threads.
SLICES = 32


class FewRows:
    """Stands as `forward` of a linear layer, whose type stays what it is.

    What is not a forward pass of 1 to `MOST_ROWS` float32 rows on a CPU without gradients goes to
    `torch.nn.functional.linear`, as before.
    """

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self.slices = math.gcd(linear.out_features, SLICES)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        weight, bias = self.linear.weight, self.linear.bias
        size = x.shape[-1]
        if (
            self.slices > 1
            and size == weight.shape[-1]
            and 0 < x.numel() <= MOST_ROWS * size
            and type(weight) is nn.Parameter  # no quantized or sharded one, which has no views
            and weight.is_contiguous()
            and x.dtype is torch.float32 is weight.dtype
            and x.device.type == "cpu" == weight.device.type
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        ):
            rows = x.numel() // size
            # (P, N / P, rows); the rows' dimension last but with stride K, or MKL would take the slow form again.
            out = torch.bmm(
                weight.view(self.slices, -1, size), x.reshape(rows, size).t().expand(self.slices, size, rows)
            )
            out = out.permute(2, 0, 1).contiguous().view(*x.shape[:-1], -1)
            return out if bias is None else out + bias
        return nn.functional.linear(x, weight, bias)


def install(model: nn.Module) -> None:
    """Give all plain linear layers of a model this forward pass, where PyTorch has MKL; `remove` takes it off."""
    if not torch.backends.mkl.is_available():
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


def help_with(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model's projections of few rows would go this way on a device, in a dtype."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkl.is_available()


@contextmanager
def fast_projections(model: nn.Module) -> Iterator[None]:
    """Inside, a model that is not converted has these projections too."""
    install(model)
    try:
        yield
    finally:
        remove(model)
