"""Bytes and operations of a decode step, for time bounds and to compare with measured time.

Counted a step, over a whole batch, averaged over the W places that a token can have in its chunk: bytes are what the
kernels of `triton_decode` ask for, each tensor once a kernel; a product of (m, k) and (k, n) is 2 m k n operations.
"""

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["DecodeBytes", "DecodeShape", "decode_bytes", "decode_flops", "decode_work"]

FLOAT32 = 4
LENGTH = 8
# Rows of a batch that share one read of the query features' weights.
ROWS_PER_READ = 16


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of one step. half: features of each sign, 0 without a mixer; element, state_element: bytes of an element
    of q, k, v and of the state; splits: as `triton_decode.decode_blocks` chooses; gate: mix "gate"."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    half: int
    window: int
    sinks: int
    element: int = 2
    state_element: int = FLOAT32
    splits: int = 1
    gate: bool = False

    @property
    def near(self) -> float:
        """Older tokens that a query sees in the ring: the chunk before and, on average, half of its own."""
        return self.window + (self.window - 1) / 2


class DecodeBytes(NamedTuple):
    """Bytes a step by what they are.

    state, window, sinks: read. They are `least`: what any step of this definition must read.
    tokens: q, k, v, mix_logit and lengths read; k, v into the ring, output and lengths written.
    fold: 1 / W of a fold: a chunk of keys and values and the state read, the state written.
    projected: q W of the query features, written by one kernel and read by the next.
    parts: of splits, written and read; with one split there are none.
    weights: of both feature maps, the keys' 1 / W of the time. They belong to the model, not to a row: read once a
        step if the batch has up to 16 rows.
    """

    state: float
    window: float
    sinks: float
    tokens: float
    fold: float
    projected: float
    parts: float
    weights: float

    @property
    def least(self) -> float:
        """state + window + sinks."""
        return self.state + self.window + self.sinks

    @property
    def total(self) -> float:
        """Everything."""
        return float(sum(self))

    @property
    def of_rows(self) -> float:
        """Everything but the model's weights."""
        return self.total - self.weights

    @property
    def from_memory(self) -> float:
        """`of_rows` without `projected` and `parts`, which one kernel writes and the next one reads: at the sizes that
        have splits they are below 1 MiB and stay in a GPU's L2 cache."""
        return self.of_rows - self.projected - self.parts


def decode_bytes(shape: DecodeShape) -> DecodeBytes:
    """The bytes that one step moves."""
    s = shape
    owners, lanes, token = s.batch * s.kv_heads, s.batch * s.heads, s.element * (s.head_dim + s.value_dim)
    state = 2 * s.half * (s.value_dim * s.state_element + FLOAT32)
    part = FLOAT32 * (s.value_dim * (2 if s.gate else 1) + (3 if s.gate else 2)) if s.splits > 1 else 0
    reads = -(-s.batch // ROWS_PER_READ)
    return DecodeBytes(
        state=owners * state,
        window=owners * s.near * token,
        sinks=owners * s.sinks * token,
        tokens=lanes * (token + (FLOAT32 if s.half else 0)) + 2 * owners * token + 2 * s.batch * LENGTH,
        # A chunk is read and put aside; the state is read, put aside and written.
        fold=owners * (2 * token + 3 * state / s.window),
        projected=2 * lanes * s.half * FLOAT32,
        parts=2 * lanes * s.splits * part,
        weights=s.head_dim * s.half * FLOAT32 * (reads * s.heads + s.kv_heads / s.window),
    )


def decode_flops(shape: DecodeShape) -> float:
    """The operations of one step, the 1 / W of a fold included."""
    return sum(decode_work(name, shape)[0] for name in ("decode_prepare", "decode_step"))


def decode_work(kernel: str, shape: DecodeShape) -> tuple[float, float]:
    """(operations, bytes) of a launch of "decode_prepare" (in a step without folds), "decode_fold" (what a fold of all
    rows adds to it, divided by W), "decode_step" or "decode_combine"."""
    s, moved = shape, decode_bytes(shape)
    lanes, owners = s.batch * s.heads, s.batch * s.kv_heads
    size = s.head_dim + s.value_dim
    fold = owners * (2 * s.head_dim * s.half + 4 * s.half * s.value_dim)
    key_weights = s.kv_heads * s.head_dim * s.half * FLOAT32 / s.window
    query = lanes * s.head_dim * s.element
    out = lanes * s.value_dim * s.element
    counts = LENGTH * s.batch
    work = {
        "decode_prepare": (
            2.0 * lanes * s.head_dim * s.half,
            query + moved.projected / 2 + moved.weights - key_weights + counts,
        ),
        "decode_fold": (float(fold), moved.fold + key_weights),
        "decode_step": (
            2.0 * lanes * ((s.near + 1 + s.sinks) * size + 2 * s.half * (s.value_dim + 1)),
            moved.least + moved.tokens - counts + moved.projected / 2 + (moved.parts / 2 - out if s.splits > 1 else 0),
        ),
        "decode_combine": (2.0 * lanes * s.splits * s.value_dim, moved.parts / 2 + out + 2 * counts),
    }
    return work[kernel]
