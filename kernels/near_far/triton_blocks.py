"""Which blocks a kernel runs with on a target: heuristics."""

from dataclasses import dataclass
from typing import Any

from ..devices import INTERPRETER, Target

__all__ = ["Blocks", "blocks_of"]


@dataclass(frozen=True)
class Blocks:
    """Constants, by the kernel's names, and launch options."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int


def blocks_of(kernel: str, key: dict[str, Any], target: Target) -> Blocks:
    """Blocks for `kernel` at the sizes of `key`."""
    head_dim, value_dim = _power(key["head_dim"]), _power(key["value_dim"])
    narrow = key["dtype"].itemsize <= 2
    most = 32 if target is INTERPRETER else 64 if narrow else 32
    rows = min(most, _power(key["group"] * key["window"]))
    features = _power(key["half"]) if key["features"] == "hedgehog" else min(most, _power(key["half"]))
    wide = max(head_dim, value_dim, features) > 64
    warps = 8 if wide else 4
    constants = {"BLOCK_M": rows, "BLOCK_D": head_dim, "BLOCK_K": min(head_dim, 32), "BLOCK_F": features, "BLOCK_V": value_dim}
    if kernel == "chunk_sums":
        constants["BLOCK_V"] = min(value_dim, 64)
        return Blocks(constants, warps, 1)
    constants["BLOCK_N"] = min(most, _power(key["window"]))
    if kernel in ("far_backward_keys", "near_backward_keys"):
        constants["BLOCK_M"] = min(most, _power(2 * key["window"]))
        return Blocks(constants, warps, 1)
    constants["BLOCK_S"] = min(most, _power(key["sinks"]))
    return Blocks(constants, warps, 2)


def _power(size: int) -> int:
    """The power of two at or above `size`, at least 16: the least that a matrix product takes."""
    return max(16, 1 << max(size - 1, 0).bit_length())
