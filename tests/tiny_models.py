"""Tiny random causal language models of every known family, built in code: no downloads."""

from typing import Any

import torch

VOCAB = 128
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# These too, in tests/test_linearize_families.py.
OTHER_FAMILIES = (
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "smollm3",
    "gpt_oss",
    "granite",
    "cohere",
    "stablelm",
    "gpt_neox",
)
# The first layer slides, and stays as it is; two others are converted.
_SLIDING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 6,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# Both ways of the language head occur, and a family whose head_dim does not follow from hidden_size.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 32},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 32, "decoder_sparse_step": 2},
    # Small caps, queries far from the usual scale.
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 8, "rope_parameters": _TWO_ROPES},
    "phi3": {"tie_word_embeddings": False, "partial_rotary_factor": 0.5},
    "olmo2": {"tie_word_embeddings": False},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1]},
    "gpt_oss": {**_SLIDING, **_EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granite": {"attention_multiplier": 0.4, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    "cohere": {"use_qk_norm": True, "logit_scale": 1.0},
    "stablelm": {"qk_layernorm": True, "partial_rotary_factor": 0.5, "use_parallel_residual": True},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": None},
}


def make_config(family: str, **changes: Any) -> Any:
    """The transformers config of a tiny model: 3 layers, 4 query heads, 2 key-value heads, 128 tokens."""
    from transformers import AutoConfig

    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 16384,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        # Many times the usual: with small weights attention is uniform, and a wrong mask or scale would not show.
        "initializer_range": 0.13,
    }
    return AutoConfig.for_model(family, **(values | _OWN[family] | changes))


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A tiny model in evaluation mode. `changes` go to its config; norms and biases are random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.7, 1.3)
            # As from_pretrained does; `model.to(dtype)` would round the rotary frequencies too.
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def randomize_far(model: Any, seed: int = 1) -> Any:
    """Random mixers and mixes, large enough that the far side carries a good share of every output."""
    from linearize.convert import converted_layers

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in converted_layers(model).values():
            if layer.mixer is None:
                continue
            if layer.mix is not None:
                layer.mix.bias.copy_(torch.randn(layer.mix.bias.shape, generator=generator) + 1.0)
                if layer.mix.weight is not None:
                    layer.mix.weight.copy_(torch.randn(layer.mix.weight.shape, generator=generator) * 0.1)
            for parameter in layer.mixer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def make_tokens(batch: int, length: int, seed: int = 2) -> torch.Tensor:
    """(batch, length) random token ids; never the padding token 0."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


FAR = ("none", "normalizer", "gate")


def make_student(family: str, far: str, dtype: torch.dtype = torch.float32, changes: Any = None, **options: Any) -> Any:
    """A tiny model converted with mixer "none", or hedgehog under the mix `far`, and random far weights.

    `options` go to `LinearizeConfig` (window 4 and 2 sinks unless named), `changes` to the model's config.
    """
    from linearize import LinearizeConfig, convert

    named = {"mixer": "none"} if far == "none" else {"mixer": "hedgehog", "mix": far}
    config = LinearizeConfig(**({"window": 4, "sinks": 2} | named | options))
    return randomize_far(convert(make_model(family, dtype, **(changes or {})), config))


def pad(tokens: torch.Tensor, amounts: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, mask): row i of `tokens` without its last amounts[i] tokens, as many padding tokens at `side`."""
    length = tokens.shape[1]
    rows, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for i, amount in enumerate(amounts):
        place = slice(amount, length) if side == "left" else slice(0, length - amount)
        rows[i, place], mask[i, place] = tokens[i, : length - amount], 1
    return rows, mask
