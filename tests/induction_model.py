"""A model whose weights are written down so that it does one thing: after A it says what followed the last A before.

Layer 0 looks at the token before, by position, and notes it beside the own one; layer 1 looks for a token whose note
is the own token, and says that one. The first needs a window of two tokens. The second has to reach as far back as A
stands, so a converted model does it by its state or not at all. Hedgehog with its weights at the identity can, as the
contents that are matched are nearly one-hot.

Hidden: 32 channels for the own token, 32 for the note, 32 for the answer, and one that is always on. Rotary
frequencies are 10^(-i / 4): the sixteen fast ones tell positions apart, the slow ones hardly turn and carry contents.
"""

from typing import Any

import torch

from linearize import LinearizeConfig, convert
from linearize.convert import converted_layers

__all__ = ["TOKENS", "make_inducer", "teach_inducer"]

TOKENS, HIDDEN, HEAD = 32, 128, 64
ON = 3 * TOKENS
SHARP, MATCH = 12.0, 12.65  # e^12 and e^20 between the looked-for key and the next best one


def make_inducer() -> Any:
    """The original: two layers of one head, no MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=HIDDEN,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=HEAD,
            max_position_embeddings=16384,
            rope_parameters={"rope_type": "default", "rope_theta": 1e8},
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        own, noted, answer = (slice(start, start + TOKENS) for start in (0, TOKENS, 2 * TOKENS))
        one_hot = torch.eye(TOKENS)
        model.model.embed_tokens.weight[:, own] = one_hot
        model.model.embed_tokens.weight[:, ON] = 1.0
        model.lm_head.weight[:, answer] = 20 * one_hot

        frequency = 10.0 ** (-torch.arange(16) / 4)
        first, second = (layer.self_attn for layer in model.model.layers)
        # What a norm makes of a channel that holds 1, beside one and two others.
        on, on_two = (HIDDEN / 2) ** 0.5, (HIDDEN / 3) ** 0.5
        first.k_proj.weight[:16, ON] = SHARP / on
        # A query as it would be one position earlier is most like the key there.
        first.q_proj.weight[:16, ON] = SHARP * torch.cos(-frequency) / on
        first.q_proj.weight[32:48, ON] = SHARP * torch.sin(-frequency) / on
        first.v_proj.weight[:TOKENS, own] = one_hot / on
        first.o_proj.weight[noted, :TOKENS] = one_hot
        slow = [*range(16, 32), *range(48, 64)]
        second.q_proj.weight[slow, own] = MATCH * one_hot / on_two
        second.k_proj.weight[slow, noted] = MATCH * one_hot / on_two
        second.v_proj.weight[:TOKENS, own] = one_hot / on_two
        second.o_proj.weight[answer, :TOKENS] = one_hot
    return model


def teach_inducer(window: int = 8) -> Any:
    """The student: every layer converted, no sinks, a state that is read wherever it has something."""
    model = convert(make_inducer(), LinearizeConfig(window=window, sinks=0, mixer="hedgehog", feature_scale=1.0))
    with torch.no_grad():
        for layer in converted_layers(model).values():
            layer.mix.bias.fill_(10.0)
    return model
