"""Model families: one record each, everything else is shared."""

from dataclasses import dataclass
from typing import Any, Literal

from linearize.errors import LinearizeError

__all__ = ["FAMILIES", "REFUSED", "Family", "Geometry", "family_of", "geometry_of", "own_features", "own_window"]


@dataclass(frozen=True)
class Family:
    """What differs between families, as far as an attention layer can tell. Beside it the attention module has
    `layer_idx` and `scaling`, the factor on q.k.

    Attributes:
        model_type: `config.model_type` in transformers.
        models: some that belong to it, for people.
        layers: path of the decoder layers below the causal language model.
        attention: name of the attention module in a decoder layer.
        projections: names of the linear layers that make q, k and v; one name where one layer makes all of them.
        fused: how the outputs of that one layer lie: "blocks", all heads' q, then k, then v; or "heads", q, k and v of
            one head after those of another. None where there are three layers.
        output: name of the linear layer behind the attention.
        qk_norm: what q and k are normalised over before the rotary embedding: "head", each head, from (B, T, H, D);
            "whole", the whole projection, (B, T, H D); "transposed", each head, from (B, H, T, D). None: they are not.
        norms: names of the two norms.
        norms_if: attribute of the attention module that says whether it has them; None where it always has.
        rotary: which channels turn together: "halves", i and i + D / 2; "pairs", 2 i and 2 i + 1; or "once", as
            "halves", but cosines and sines come once for both. As many channels turn as there are cosines.
        rotary_if: attribute of the attention module that says whether this layer turns q and k; None where all do.
        soft_cap: attribute of the attention module with the cap c of logits, c tanh(logit / c), or None.
        sink: parameter of the attention module with a logit a head that counts in the denominator and has no value.
        cache: argument of the attention module that takes the cache.
        hands_down: decoder layers pass arguments that they do not know to their attention.
        packs: the decoder tells packed documents apart, by positions that restart in a row.
    """

    model_type: str
    models: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused: Literal["blocks", "heads"] | None = None
    output: str = "o_proj"
    qk_norm: Literal["head", "whole", "transposed"] | None = None
    norms: tuple[str, str] = ("q_norm", "k_norm")
    norms_if: str | None = None
    rotary: Literal["halves", "pairs", "once"] = "halves"
    rotary_if: str | None = None
    soft_cap: str | None = None
    sink: str | None = None
    cache: str = "past_key_values"
    hands_down: bool = True
    packs: bool = True

    @property
    def decoder(self) -> str:
        """Path of the module that holds the layers and runs them."""
        return self.layers.rpartition(".")[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all linear layers of the attention."""
        return (*self.projections, self.output)

    def modules(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Llama's names of linear layers as this family has them: what q_proj, k_proj, v_proj and o_proj do may be done
        by others, or by one together. Other names stay what they are."""
        made = self.projections * (3 if self.fused else 1)
        own = dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), (*made, self.output), strict=True))
        return tuple(dict.fromkeys(own.get(name, name) for name in names))

    def qk_norm_of(self, attention: Any) -> str | None:
        """`qk_norm` of one attention module, which may have none."""
        return self.qk_norm if self.norms_if is None or getattr(attention, self.norms_if, False) else None


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama 2 and 3, SmolLM2, TinyLlama"),
        Family("mistral", "Mistral 7B v0.2 and later, Mistral NeMo"),
        Family("qwen2", "Qwen 2, Qwen 2.5"),
        Family("qwen3", "Qwen 3", qk_norm="head"),
        Family("qwen3_moe", "Qwen 3 30B-A3B, Qwen 3 235B-A22B", qk_norm="head"),
        Family("gemma2", "Gemma 2", soft_cap="attn_logit_softcapping"),
        Family("gemma3_text", "Gemma 3 270M and 1B", qk_norm="head"),
        Family("phi3", "Phi 3, Phi 3.5, Phi 4", projections=("qkv_proj",), fused="blocks"),
        Family("olmo2", "OLMo 2", qk_norm="whole"),
        Family("smollm3", "SmolLM3", rotary_if="use_rope"),
        Family("gpt_oss", "GPT-OSS", rotary="once", sink="sinks", packs=False),
        Family("granite", "Granite 3"),
        Family("cohere", "Command R, Aya", rotary="pairs", qk_norm="head", norms_if="use_qk_norm"),
        Family(
            "stablelm",
            "StableLM 3B, StableLM 2",
            qk_norm="transposed",
            norms=("q_layernorm", "k_layernorm"),
            norms_if="qk_layernorm",
            hands_down=False,
        ),
        Family(
            "gpt_neox",
            "Pythia, GPT-NeoX 20B",
            layers="gpt_neox.layers",
            attention="attention",
            projections=("query_key_value",),
            fused="heads",
            output="dense",
            cache="layer_past",
        ),
    )
}

_LATENT = "it makes keys and values from one small vector a token (latent attention), and caches only that"
_ALIBI = "its logits have a bias by distance (ALiBi), which the far side cannot follow"
_CALLED = "its attention may add a bias by distance (ALiBi), and is called in a way of its own"
_STATE = "it has layers with a state of fixed size already, beside softmax attention or instead of it"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _LATENT),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    "falcon": _CALLED,
    **dict.fromkeys(
        (
            "bamba",
            "falcon_h1",
            "falcon_mamba",
            "granitemoehybrid",
            "jamba",
            "lfm2",
            "mamba",
            "mamba2",
            "minimax",
            "nemotron_h",
            "qwen3_next",
            "recurrent_gemma",
            "rwkv",
            "zamba",
            "zamba2",
        ),
        _STATE,
    ),
}
"""model_type -> why no entry would do for it."""


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
        LinearizeError: one whose attention is of another kind, or an unknown one; the message says which, and what an
            entry must provide.
    """
    name = config.model_type
    if name in FAMILIES:
        return FAMILIES[name]
    if name in REFUSED:
        raise LinearizeError(f"model_type {name!r} cannot be converted: {REFUSED[name]}; use a model of another family")
    if getattr(config, "text_config", None) is not None:
        raise LinearizeError(
            f"model_type {name!r} reads more than text; give a model of text alone ('linearize families' lists them)"
        )
    raise LinearizeError(
        f"model_type {name!r} is not among the known families ({', '.join(sorted(FAMILIES))}); add an entry to "
        "linearize/families.py that says where its decoder layers and attention are, and what its attention has of its "
        "own"
    )


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
    """The sliding window, in tokens, that layer `layer` of the original has, or None where it sees everything: also
    where the window is as long as the longest text."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and types[layer] != "sliding_attention"):
        return None
    longest = getattr(config, "max_position_embeddings", None)
    return None if longest is not None and window >= longest else window


def own_features(family: Family) -> list[str]:
    """What the attention of a family has that Llama's has not, in words."""
    normed = {
        "head": "q and k normalised per head",
        "whole": "q and k normalised as a whole",
        "transposed": "q and k normalised per head",
    }
    found = []
    if family.fused:
        found.append("one projection for q, k and v")
    if family.qk_norm:
        found.append(normed[family.qk_norm] + (", if so configured" if family.norms_if else ""))
    if family.rotary == "pairs":
        found.append("rotary embedding by pairs")
    if family.rotary_if:
        found.append("layers without rotary embedding")
    if family.soft_cap:
        found.append("soft cap of logits (PyTorch only)")
    if family.sink:
        found.append("a learned sink a head (PyTorch only)")
    return found
