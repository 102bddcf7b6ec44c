"""Two rows of several documents each, and a student for them."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from tests.tiny_models import make_student

# With a window of 4 and 2 sinks: shorter than the sinks, one window, two of them, and longer.
LENGTHS = ([3, 1, 4, 8, 24], [9, 30, 1])
T = 40
POSITIONS = torch.tensor([list(itertools.chain(*(range(n) for n in row))) for row in LENGTHS])


def pieces() -> Iterator[tuple[slice, slice]]:
    """(row, columns) of each document."""
    for row, sizes in enumerate(LENGTHS):
        ends = list(itertools.accumulate(sizes))
        yield from ((slice(row, row + 1), slice(end - size, end)) for size, end in zip(sizes, ends))


def make(far: str, attention: str = "sdpa", **options: Any) -> Any:
    """A student of two layers, with a window of 4 and 2 sinks."""
    changes = {"attn_implementation": attention, "num_hidden_layers": 2}
    return make_student("llama", far, changes=changes, **options)
