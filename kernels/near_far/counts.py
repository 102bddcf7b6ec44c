"""How much work the prefill kernels have to do: operations and bytes, for time bounds.

Operations are those of the definition (a product of (m, k) and (k, n) counts 2 m k n), bytes are what must cross the
memory bus if every input is read once and every output written once; what a kernel computes twice to save a round trip
counts once. Time is therefore at least max(operations / peak, bytes / bandwidth).

Shape legend as in `chunked`, for a batch of one row; E bytes an element of q, k, v; a query sees 1.5 W keys of the
window on average, and S sinks.
"""

from dataclasses import dataclass

__all__ = ["MODELS", "Shape", "kernel_work"]

# heads, kv_heads, head_dim, feature_dim of what is compiled and timed
MODELS = {
    "SmolLM2-135M": (9, 3, 64, 64),
    "Qwen3-0.6B": (16, 8, 128, 128),
    "Llama-3.1-8B": (32, 8, 128, 128),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. half: features of each sign, 0 without a mixer; element: bytes of q, k, v."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    half: int
    window: int
    sinks: int
    tokens: int
    element: int = 2


def kernel_work(kernel: str, shape: Shape) -> tuple[int, int]:
    """(operations, bytes) of one launch of a Triton kernel, by its name.

    Those of `triton_transfer` see every earlier key: a query has T / 2 on average, nearly all of them far.
    "chunk_sums" is that of the keys and "chunk_sums_backward" that of the queries; "prefix_sums" is of the states.
    """
    s = shape
    h, k, d, v, w, t, e = s.heads, s.kv_heads, s.head_dim, s.value_dim, s.window, s.tokens, s.element
    features = 2 * s.half
    chunks = -(-t // w)
    near = 1.5 * w + s.sinks
    queries, keys = e * h * t * d, e * k * t * d
    outputs, values = e * h * t * v, e * k * t * v
    row = 4 * h * t  # a float32 for each query
    sums, norms = 4 * chunks * k * features * v, 4 * chunks * k * features
    states = e * chunks * k * features * v + norms
    query_weights, key_weights = 2 * e * h * d * s.half, 2 * e * k * d * s.half
    projected_q, projected_k = e * h * t * s.half, e * k * t * s.half
    project = 2 * d * s.half
    phi_q, phi_k = e * h * t * features, e * k * t * features
    far_features = phi_q + phi_k
    parts = 4 * chunks * k * s.sinks * (d + v)

    work: dict[str, tuple[float, float]] = {
        "chunk_sums": (k * t * (project + 2 * features * v), keys + values + key_weights + sums + norms),
        "prefix_sums": (chunks * k * features * v, sums + states - norms),
        "attention_forward": (
            h * t * (2 * near * (d + v) + project + 2 * features * v),
            queries + outputs + keys + values + states + query_weights + 5 * row,
        ),
        "far_backward_queries": (
            h * t * (project + 4 * features * v),
            queries + 2 * outputs + states + query_weights + projected_q + 8 * row,
        ),
        "near_backward_queries": (
            h * t * (near * (4 * d + 2 * v) + 2 * s.sinks * (d + v) + project),
            2 * queries + outputs + keys + values + query_weights / 2 + projected_q + 3 * row + parts,
        ),
        "chunk_sums_backward": (
            h * t * (project + 2 * features * v),
            queries + outputs + query_weights + sums + norms + 2 * row,
        ),
        "far_backward_keys": (
            k * t * (project + 4 * features * v),
            keys + values + key_weights + states + projected_k + 4 * k * t * v,
        ),
        "near_backward_keys": (
            h * t * 1.5 * w * (4 * d + 4 * v) + k * t * project,
            queries + outputs + 2 * keys + 2 * values + key_weights / 2 + projected_k + 4 * k * t * v + 3 * row,
        ),
        "split_forward": (h * t * t * (d + v), queries + keys + values + 8 * h * t * v + 2 * row),
        "far_sums_kernel": (h * t * t * (d + features), queries + keys + far_features + 5 * row),
        "far_queries": (h * t * t * (d + 2 * features), queries + keys + far_features + phi_q + 6 * row),
        "far_keys": (h * t * t * (d + 2 * features), queries + keys + far_features + phi_k + 6 * row),
        "sink_gradients": (chunks * k * s.sinks * (d + v) / 2, parts / 2),
    }
    operations, moved = work[kernel]
    return round(operations), round(moved)
