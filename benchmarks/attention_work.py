"""Operations and bytes of one attention call, of near-and-far attention and of softmax attention, for bounds of time.

Near-and-far attention is counted launch by launch, as the Triton kernels do it (`linearize.kernels.near_far.counts`
and `traffic`): what one launch leaves to the next must cross the memory bus. Softmax attention is one launch: inputs
read once, outputs written once, no T x T matrix in memory. A row of T tokens has T² / 2 pairs of a query and a key:

    forward    2 T² D H operations                       e (2 H + 2 K) T D bytes: q, k, v, output
    backward   2.5 times as many, for five products      twice as many, the gradients of them all
               instead of two

"backward" is always forward and backward, since that is what is timed. A decode step over T keys has 4 T D H
operations, and moves e (2 K T D + 2 H D) bytes.
"""

from linearize.kernels.near_far.counts import Shape, kernel_work

__all__ = ["BACKWARD", "FORWARD", "Work", "near_far_work", "sdpa_step_work", "sdpa_work"]

Work = list[tuple[float, float]]  # (operations, bytes) of each launch

FORWARD = ("chunk_sums", "prefix_sums", "attention_forward")
BACKWARD = (
    *("chunk_sums", "prefix_sums", "far_backward_queries", "near_backward_queries", "chunk_sums_backward"),
    *("prefix_sums", "far_backward_keys", "near_backward_keys", "sink_gradients"),
)


def near_far_work(shape: Shape, backward: bool) -> Work:
    """(operations, bytes) of each launch of a call; of `backward`, those of forward and backward."""
    return [kernel_work(name, shape) for name in (FORWARD + BACKWARD if backward else FORWARD)]


def sdpa_work(shape: Shape, backward: bool) -> Work:
    """The same of causal softmax attention."""
    flops = 2.0 * shape.tokens**2 * shape.head_dim * shape.heads
    moved = 2.0 * shape.element * shape.tokens * shape.head_dim * (shape.heads + shape.kv_heads)
    return [(flops, moved), (2.5 * flops, 2 * moved)] if backward else [(flops, moved)]


def sdpa_step_work(shape: Shape, batch: int) -> Work:
    """The same of one new token a row, over `shape.tokens` keys."""
    flops = 4.0 * batch * shape.heads * shape.tokens * shape.head_dim
    numbers = 2.0 * batch * shape.head_dim * (shape.kv_heads * shape.tokens + shape.heads)
    return [(flops, shape.element * numbers)]
