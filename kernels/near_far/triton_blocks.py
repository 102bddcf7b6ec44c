"""Which blocks a kernel runs with: heuristics from what the compilers make of each, and a choice by measurement.

The first candidate is the default: no spilled register and within shared memory on its target at the shapes of
`cases` (`linearize bench compile` shows it). Where a launch does not fit a device after all, the next one is taken.
With LINEARIZE_TUNE=1 the candidates are timed on the device, each kernel and shape once, and the best is kept in a
file (see `..tuning`).
"""

from dataclasses import dataclass
from typing import Any

from ..devices import INTERPRETER, Target
from .triton_arguments import tile

__all__ = ["Blocks", "candidates"]


@dataclass(frozen=True)
class Blocks:
    """Constants, by the kernel's names, and launch options."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int


# (rows of queries, keys, warps, stages) by kernel, family of targets, and whether any tile is wider than 64. A kernel
# without tiles of queries, or of keys, ignores that number.
PREFERRED = {
    "chunk_sums": {
        "ampere": ((64, 0, 4, 1), (32, 0, 4, 1)),
        "hopper": ((64, 0, 4, 1), (64, 0, 4, 1)),
        "cdna": ((64, 0, 4, 1), (64, 0, 4, 1)),
    },
    "attention_forward": {
        "ampere": ((32, 64, 4, 2), (64, 64, 8, 2)),
        "hopper": ((64, 64, 4, 2), (64, 64, 8, 2)),
        "cdna": ((64, 64, 4, 2), (64, 64, 8, 2)),
    },
    "far_backward_queries": {
        "ampere": ((64, 0, 4, 1), (32, 0, 4, 2)),
        "hopper": ((64, 0, 4, 1), (64, 0, 8, 1)),
        "cdna": ((64, 0, 4, 1), (64, 0, 8, 1)),
    },
    "near_backward_queries": {
        "ampere": ((64, 64, 4, 2), (64, 64, 8, 2)),
        "hopper": ((64, 64, 4, 2), (64, 64, 8, 2)),
        "cdna": ((64, 64, 4, 2), (64, 32, 8, 1)),
    },
    "far_backward_keys": {
        "ampere": ((0, 32, 4, 2), (0, 64, 8, 1)),
        "hopper": ((0, 64, 4, 1), (0, 64, 8, 1)),
        "cdna": ((0, 64, 4, 1), (0, 32, 4, 2)),
    },
    "near_backward_keys": {
        "ampere": ((64, 32, 4, 2), (32, 64, 8, 2)),
        "hopper": ((64, 64, 4, 1), (32, 64, 8, 2)),
        "cdna": ((64, 64, 4, 1), (32, 32, 4, 2)),
    },
}


def candidates(kernel: str, key: dict[str, Any], target: Target) -> list[Blocks]:
    """Blocks for `kernel` at the sizes of `key`, best guess first, less demanding ones behind it."""
    head_dim, value_dim = tile(key["head_dim"]), tile(key["value_dim"])
    wide = max(head_dim, value_dim, tile(key["half"]) if key["features"] == "hedgehog" else 0)
    if target is INTERPRETER:
        preferred = (32, 32, 4, 1)
    else:
        family = "cdna" if target.backend == "hip" else "hopper" if int(target.arch) >= 90 else "ampere"
        preferred = PREFERRED[kernel][family][wide > 64]
    rows, keys, warps, stages = preferred
    # Tiles of twice the bytes have half the rows.
    size = key["dtype"].itemsize / 2 * max(wide / 128, 1)
    while size > 1 and target is not INTERPRETER:
        rows, keys, warps, stages, size = max(rows // 2, 16), max(keys // 2, 16), 8, 1, size / 2
    found: list[Blocks] = []
    options = [(rows, keys, warps, stages), (rows, keys, 12 - warps, stages), (rows, keys, warps, 1)]
    options += [(max(rows // 2, 16), max(keys // 2, 16), w, 1) for w in (warps, 8)] + [(16, 16, 8, 1), (16, 16, 4, 1)]
    for option in options:
        blocks = _blocks(kernel, key, *option)
        if blocks not in found:
            found.append(blocks)
    return found


def _blocks(kernel: str, key: dict[str, Any], rows: int, keys: int, warps: int, stages: int) -> Blocks:
    """Tiles no larger than what there is to fill them."""
    head_dim, value_dim = tile(key["head_dim"]), tile(key["value_dim"])
    hedgehog = key["features"] == "hedgehog"
    constants = {
        "BLOCK_M": min(rows, tile(key["group"] * key["window"])),
        "BLOCK_D": head_dim,
        "BLOCK_K": min(head_dim, 32),
        "BLOCK_F": tile(key["half"]) if hedgehog else min(tile(key["half"]), max(rows, keys)),
        "BLOCK_V": min(value_dim, 64) if kernel == "chunk_sums" else value_dim,
    }
    if kernel != "chunk_sums":
        constants["BLOCK_N"] = min(keys, tile(key["window"]))
        constants["BLOCK_S"] = min(32, tile(key["sinks"]))
    if kernel == "near_backward_keys":
        constants["BLOCK_M"] = min(rows, tile(2 * key["window"]))
    return Blocks(constants, warps, stages)
