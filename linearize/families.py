"""Model families: one record each, everything else is shared."""

from dataclasses import dataclass
from typing import Any

from linearize.errors import LinearizeError

__all__ = ["FAMILIES", "Family", "Geometry", "family_of", "geometry_of", "own_window"]


@dataclass(frozen=True)
class Family:
    """What differs between families, as far as an attention layer can tell.

    Attributes:
        model_type: `config.model_type` in transformers.
        layers: path of the decoder layers below the causal language model.
        attention: name of the attention module in a decoder layer. It has `q_proj`, `k_proj`, `v_proj`, `o_proj`
            linear layers, and `layer_idx`, `head_dim`, `scaling`; rotary embeddings turn halves of the whole head.
        qk_norm: the attention has `q_norm` and `k_norm`, applied per head before the rotary embedding.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    qk_norm: bool = False

    @property
    def decoder(self) -> str:
        """Path of the module that holds the layers and runs them."""
        return self.layers.rpartition(".")[0]


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),  # also SmolLM2
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3", qk_norm=True),
    )
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of an attention layer: H query heads, K key-value heads, D head size, and the number of layers."""

    heads: int
    kv_heads: int
    head_dim: int
    layers: int


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        LinearizeError: an unknown family; the message says what an entry must provide.
    """
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        raise LinearizeError(
            f"model_type {config.model_type!r} is not among the known families ({', '.join(sorted(FAMILIES))}); "
            "add an entry to linearize/families.py with its model_type, the path of its decoder layers, the name of "
            "its attention module and whether q and k are normalised per head"
        ) from None


def geometry_of(config: Any) -> Geometry:
    """The sizes, from a transformers config alone.

    Raises:
        LinearizeError: query heads that are no multiple of key-value heads.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise LinearizeError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}; correct the model's config"
        )
    return Geometry(heads, kv_heads, head_dim, config.num_hidden_layers)


def own_window(config: Any, layer: int) -> int | None:
    """The sliding window, in tokens, that layer `layer` of the original has, or None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return window
