"""The one place that says how near two results must be."""

import torch
from torch import Tensor

# float64 after reordered sums; float32 after reordered sums. Moves, caches and files are compared exactly instead.
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 2e-4, "atol": 1e-5}}


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Shape, dtype and finiteness first, then the values at the dtype's tolerance."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert bool(actual.isfinite().all())
    torch.testing.assert_close(actual, expected, **TOLERANCE[actual.dtype])


def worst(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute difference, in float64."""
    assert actual.shape == truth.shape
    assert bool(actual.isfinite().all())
    return float((actual.detach().double() - truth.detach().double()).abs().max())
