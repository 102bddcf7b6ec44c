"""What a conversion would do, layer by layer, computed from a model's configuration alone.

No weights are read and nothing is allocated: an 8 billion parameter model costs no more than a small one. A GGUF file
takes some seconds all the same, because transformers reads its header together with the whole vocabulary.

Bytes are those of the cache at one sequence:

    softmax layer     T * kv_heads * 2 D * dtype_bytes                       grows with the context T
    converted layer   (2 W + S) * kv_heads * 2 D * dtype_bytes               near keys and values, and sinks
                      + kv_heads * F * (D + 1) * 4                           state and normaliser, float32 (gla: F * D)
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from linearize.config import LinearizeConfig
from linearize.convert import plan_layers
from linearize.errors import LinearizeError
from linearize.families import geometry_of, own_window

__all__ = ["DTYPE_BYTES", "Inspection", "LayerReport", "inspect_config", "layer_bytes", "softmax_bytes"]

STATE_BYTES = 4  # the state and its normaliser are float32 whatever the model's dtype
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LayerReport:
    """One layer, before and after.

    Attributes:
        layer: index of the layer.
        old: the attention it has.
        new: the attention it gets; equal to `old` where the layer stays as it is.
        converted: whether the two differ.
        kv_heads, head_dim: geometry of its cached keys and values.
        kv_bytes: what the original caches, one number a context.
        new_bytes: what it caches after conversion, one number a context.
        break_even: the smallest context, in tokens, at which the original caches more; None in a layer that stays.
    """

    layer: int
    old: str
    new: str
    converted: bool
    kv_heads: int
    head_dim: int
    kv_bytes: tuple[int, ...]
    new_bytes: tuple[int, ...]
    break_even: int | None


@dataclass(frozen=True)
class Inspection:
    """The plan of a whole model. Bytes are for one sequence in `dtype`; `contexts` are in tokens.

    `positions` is the longest context that the model was made for, in tokens; None where its configuration says none.
    """

    model: str
    family: str
    dtype: str
    positions: int | None
    contexts: tuple[int, ...]
    layers: tuple[LayerReport, ...]

    @property
    def converted(self) -> int:
        """How many layers would be converted."""
        return sum(layer.converted for layer in self.layers)

    @property
    def kv_bytes(self) -> tuple[int, ...]:
        """The original's whole cache, one number a context."""
        return tuple(map(sum, zip(*(layer.kv_bytes for layer in self.layers))))

    @property
    def new_bytes(self) -> tuple[int, ...]:
        """The converted model's whole cache, one number a context."""
        return tuple(map(sum, zip(*(layer.new_bytes for layer in self.layers))))

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        totals = {"converted": self.converted, "kv_bytes": self.kv_bytes, "new_bytes": self.new_bytes}
        return asdict(self) | totals


def inspect_config(
    model_config: Any,
    config: LinearizeConfig,
    contexts: Sequence[int] = (1024, 8192, 32768, 131072),
    dtype: str = "bfloat16",
    name: str = "",
) -> Inspection:
    """Plan the conversion of a model from its transformers configuration.

    Args:
        model_config: a transformers configuration of a known family.
        config: the conversion.
        contexts: sequence lengths, in tokens, to give bytes for.
        dtype: "float32", "bfloat16" or "float16": the dtype of cached keys and values.
        name: what to call the model in the result.

    Raises:
        LinearizeError: an unknown dtype, or whatever `convert` would refuse: an unknown family, a layer index, window
            or number of sinks that does not fit, nothing to convert.
    """
    if dtype not in DTYPE_BYTES:
        raise LinearizeError(f"dtype: {dtype!r} is not known; use one of {', '.join(DTYPE_BYTES)}")
    geometry = geometry_of(model_config)
    kv_heads, head_dim = geometry.kv_heads, geometry.head_dim
    token_bytes = 2 * kv_heads * head_dim * DTYPE_BYTES[dtype]
    fixed = layer_bytes(config, kv_heads, head_dim, head_dim, dtype)
    layers = []
    for plan in plan_layers(model_config, config):
        kv_bytes = tuple(softmax_bytes(model_config, plan.index, tokens, dtype) for tokens in contexts)
        layers.append(
            LayerReport(
                layer=plan.index,
                old=plan.before,
                new=plan.after,
                converted=plan.converted,
                kv_heads=kv_heads,
                head_dim=head_dim,
                kv_bytes=kv_bytes,
                new_bytes=(fixed,) * len(contexts) if plan.converted else kv_bytes,
                break_even=fixed // token_bytes + 1 if plan.converted else None,
            )
        )
    positions = getattr(model_config, "max_position_embeddings", None)
    return Inspection(name, model_config.model_type, dtype, positions, tuple(contexts), tuple(layers))


def softmax_bytes(model_config: Any, layer: int, tokens: int, dtype: str) -> int:
    """What one layer of the original caches for one sequence of `tokens`; no more than its own sliding window."""
    geometry, window = geometry_of(model_config), own_window(model_config, layer)
    # A sliding layer's cache keeps window - 1 tokens: the new one makes it window.
    held = tokens if window is None else min(tokens, window - 1)
    return 2 * geometry.kv_heads * geometry.head_dim * DTYPE_BYTES[dtype] * held


def layer_bytes(config: LinearizeConfig, kv_heads: int, head_dim: int, value_dim: int, dtype: str) -> int:
    """What one converted layer caches for one sequence, at any context: 2 W near tokens, S sinks and the state; and,
    to take tokens back by, W more tokens and the state before them (which a recurrent state has not)."""
    token = kv_heads * (head_dim + value_dim) * DTYPE_BYTES[dtype]
    near, aside = (2 * config.window + config.sinks) * token, config.window * token
    if config.mixer == "none":
        return near + aside
    if config.mixer == "gla":  # softmax over the head's channels, and no normaliser
        return near + kv_heads * head_dim * value_dim * STATE_BYTES
    features = 2 * (config.feature_dim or head_dim)  # hedgehog: softmax(xW) and softmax(-xW)
    return near + aside + 2 * kv_heads * features * (value_dim + 1) * STATE_BYTES
