"""What one decode step must move and compute, from a model's configuration and a conversion alone.

Bytes of a step of B rows, each of which has T tokens behind it, with e bytes a number of the model's dtype:

    weights    every parameter once: layers, norms, output head, mixers and mixes (float32; the keys' feature map, which
               only a fold reads, 1 / W). Not the table of token embeddings, unless the head is tied to it
    rows       of that table: B hidden e where it is not the head
    softmax    keys and values of softmax layers, as many as they cache: T, or their own sliding window less 1
    window     of converted layers: the chunk before and, averaged over the places in a chunk, half of the own one
    sinks, state, fold      see `linearize.kernels.near_far.traffic`, which counts them; gla's state is read and written
                            at every token
    written    the new token's keys and values, in all layers

A converted layer that has fewer than 2 W tokens behind it reads those, and no state. Left out is what fits into caches
between two kernels (activations, logits, rotary tables), so this is a lower bound; a cache that is copied at every
token, as transformers' DynamicCache is, moves more.

Operations count 2 m k n for a product of (m, k) and (k, n). Nothing here reads weights: parameters are counted on the
model built without memory, on PyTorch's meta device.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from linearize.benchmarks.attention_work import near_far_work
from linearize.config import LinearizeConfig
from linearize.errors import LinearizeError
from linearize.families import Geometry, geometry_of, own_window
from linearize.inspection import DTYPE_BYTES, layer_bytes, softmax_bytes
from linearize.kernels.near_far.counts import Shape
from linearize.kernels.near_far.traffic import DecodeShape, decode_bytes, decode_flops

__all__ = ["ModelCosts", "StepBytes", "model_costs", "prefill_flops", "step_bytes", "step_flops"]

FLOAT = 4  # bytes of float32: what conversion adds, and states


class StepBytes(NamedTuple):
    """Bytes of one step of the whole batch, by what they are; see the module."""

    weights: float
    rows: float
    softmax: float
    window: float
    sinks: float
    state: float
    fold: float
    written: float

    @property
    def total(self) -> float:
        """Everything."""
        return float(sum(self))


@dataclass(frozen=True)
class ModelCosts:
    """A model's sizes, from which steps and caches follow.

    Attributes:
        model_config: its transformers configuration.
        conversion: None for the original.
        dtype: "float32", "bfloat16" or "float16", of weights, keys and values.
        weight_bytes: all parameters, as they lie in memory.
        read_bytes: those that a step reads.
        row_bytes: a token's row of the embedding table, where the head has a matrix of its own; else 0.
        products: numbers in the matrices that a token is multiplied with, the head's left out.
        head: numbers in the head's matrix.
        converted, kept: indices of converted layers and of softmax layers.
    """

    model_config: Any
    conversion: LinearizeConfig | None
    dtype: str
    weight_bytes: int
    read_bytes: float
    row_bytes: int
    products: int
    head: int
    converted: tuple[int, ...]
    kept: tuple[int, ...]

    @cached_property
    def geometry(self) -> Geometry:
        """Of its attention layers."""
        return geometry_of(self.model_config)

    def cache_bytes(self, tokens: int, batch: int = 1) -> int:
        """What `cache_bytes` of `linearize.cache` finds in a cache of `batch` rows of `tokens`."""
        one = sum(softmax_bytes(self.model_config, layer, tokens, self.dtype) for layer in self.kept)
        if self.conversion is not None:
            g = self.geometry
            one += len(self.converted) * layer_bytes(self.conversion, g.kv_heads, g.head_dim, g.head_dim, self.dtype)
        return batch * one

    def largest_batch(self, tokens: int, memory: float) -> int:
        """How many rows of `tokens` fit into `memory` bytes beside the weights; 0 where none does."""
        return max(0, int((memory - self.weight_bytes) // self.cache_bytes(tokens)))


def model_costs(model_config: Any, conversion: LinearizeConfig | None, dtype: str = "bfloat16") -> ModelCosts:
    """Count the parameters of a model.

    Args:
        model_config: a transformers configuration of a known family, an original's or a student's.
        conversion: of the student; None counts the original.
        dtype: "float32", "bfloat16" or "float16": of weights, keys and values.

    Raises:
        LinearizeError: an unknown dtype, or what `convert` would refuse.
    """
    if dtype not in DTYPE_BYTES:
        raise LinearizeError(f"dtype: {dtype!r} is not known; use one of {', '.join(DTYPE_BYTES)}")
    import torch
    from transformers import AutoModelForCausalLM

    from linearize.convert import added_parameters, convert, is_converted, revert

    element = DTYPE_BYTES[dtype]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    if is_converted(model):  # the configuration of a whole student builds one
        revert(model)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = dict(model.named_parameters())  # a tied head once
    numbers = sum(x.numel() for x in parameters.values())
    tied = head is table
    experts = sum(x.numel() for name, x in parameters.items() if ".experts." in name)
    others = [x for name, x in parameters.items() if ".experts." not in name and x is not table and x is not head]
    used = experts * _used_experts(model_config)
    matrices = sum(x.numel() for x in others if x.ndim == 2) + used
    layers = range(geometry_of(model_config).layers)
    added = keys = 0
    converted: tuple[int, ...] = ()
    if conversion is not None:
        convert(model, conversion)
        sizes = {name: x.numel() for name, x in added_parameters(model).items()}
        added = sum(sizes.values())
        keys = sum(size for name, size in sizes.items() if name.endswith(".key_weight"))
        converted = tuple(model._linearize[1])
    folded = 0.0 if conversion is None else keys * (1 - 1 / conversion.window)
    return ModelCosts(
        model_config=model_config,
        conversion=conversion,
        dtype=dtype,
        weight_bytes=element * numbers + FLOAT * added,
        read_bytes=element * (numbers - experts + used - (0 if tied else table.numel())) + FLOAT * (added - folded),
        row_bytes=0 if tied else element * table.shape[1],
        products=round(matrices),
        head=head.numel(),
        converted=converted,
        kept=tuple(layer for layer in layers if layer not in converted),
    )


def _used_experts(model_config: Any) -> float:
    """The part of its experts that one token goes through; a batch reads no less."""
    count = getattr(model_config, "num_experts", None) or getattr(model_config, "num_local_experts", None)
    return model_config.num_experts_per_tok / count if count else 1.0


def step_bytes(costs: ModelCosts, context: int, batch: int = 1) -> StepBytes:
    """What a step of `batch` rows moves at least, each with `context` >= 0 tokens behind it."""
    g, config = costs.geometry, costs.conversion
    element, layers = DTYPE_BYTES[costs.dtype], len(costs.converted)
    token = 2 * batch * g.kv_heads * g.head_dim * element
    softmax = batch * sum(softmax_bytes(costs.model_config, layer, context, costs.dtype) for layer in costs.kept)
    window = sinks = state = fold = 0.0
    if config is not None:
        one = decode_bytes(_decode_shape(costs, config, batch))
        full = context >= 2 * config.window
        window = layers * (one.window if full else token * context)
        sinks = layers * one.sinks if full else 0.0
        state, fold = (layers * x if full else 0.0 for x in (one.state, one.fold))
        if config.mixer == "gla":  # at every token, from the first one on
            state = fold = float(layers * batch * g.kv_heads * g.head_dim**2 * FLOAT)
    return StepBytes(
        weights=costs.read_bytes,
        rows=batch * costs.row_bytes,
        softmax=softmax,
        window=window,
        sinks=sinks,
        state=state,
        fold=fold,
        written=g.layers * token,
    )


def step_flops(costs: ModelCosts, context: int, batch: int = 1) -> float:
    """Operations of that step: products with weights, and attention."""
    g, config = costs.geometry, costs.conversion
    flops = 2.0 * batch * (costs.products + costs.head)
    for layer in costs.kept:
        flops += _softmax_flops(costs, layer, context, batch)
    if config is not None:
        if context >= 2 * config.window:
            flops += len(costs.converted) * decode_flops(_decode_shape(costs, config, batch))
        else:
            flops += len(costs.converted) * 4.0 * batch * g.heads * (context + 1) * g.head_dim
        flops += len(costs.converted) * batch * _recurrence_flops(costs)
    return flops


def prefill_flops(costs: ModelCosts, tokens: int, batch: int = 1) -> float:
    """Operations of reading prompts of `tokens` each, with logits of the last token only."""
    g, config = costs.geometry, costs.conversion
    flops = 2.0 * (costs.products * tokens + costs.head)
    for layer in costs.kept:
        window = own_window(costs.model_config, layer)
        whole = min(tokens, window or tokens)  # queries up to this one see everything before them
        pairs = whole * (whole + 1) / 2 + (tokens - whole) * whole
        flops += 4.0 * g.heads * g.head_dim * pairs
    if config is not None:
        half = _half(costs, config)
        shape = Shape(g.heads, g.kv_heads, g.head_dim, g.head_dim, half, config.window, config.sinks, tokens)
        attention = sum(operations for operations, _ in near_far_work(shape, backward=False))
        flops += len(costs.converted) * (attention + tokens * _recurrence_flops(costs))
    return batch * flops


def _half(costs: ModelCosts, config: LinearizeConfig) -> int:
    """Features of each sign: hedgehog's alone, as the counts of the kernels mean them."""
    return (config.feature_dim or costs.geometry.head_dim) if config.mixer == "hedgehog" else 0


def _decode_shape(costs: ModelCosts, config: LinearizeConfig, batch: int) -> DecodeShape:
    g = costs.geometry
    return DecodeShape(
        batch=batch,
        heads=g.heads,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        value_dim=g.head_dim,
        half=_half(costs, config),
        window=config.window,
        sinks=config.sinks,
        element=DTYPE_BYTES[costs.dtype],
    )


def _softmax_flops(costs: ModelCosts, layer: int, context: int, batch: int) -> float:
    """Logits and sums of values of one softmax layer; a query sees itself too."""
    g, window = costs.geometry, own_window(costs.model_config, layer)
    seen = context + 1 if window is None else min(context + 1, window)
    return 4.0 * batch * g.heads * seen * g.head_dim


def _recurrence_flops(costs: ModelCosts) -> float:
    """Of one token in one layer of mixer gla: the state decays, takes phi_k v^T, and is read by every query head."""
    g = costs.geometry
    if costs.conversion is None or costs.conversion.mixer != "gla":
        return 0.0
    return g.head_dim**2 * (3.0 * g.kv_heads + 2.0 * g.heads)
