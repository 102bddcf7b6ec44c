"""The plan of a conversion, against the caches of real tiny models."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from linearize.cache import cache_bytes
from linearize.config import LinearizeConfig
from linearize.convert import convert, converted_layers
from linearize.errors import LinearizeError
from linearize.inspection import inspect_config
from tests.tiny_models import FAMILIES, make_config

CONFIGS = {
    "hedgehog": LinearizeConfig(window=8, sinks=2),
    "gla": LinearizeConfig(mixer="gla", mix="gate", window=8, sinks=2),
    "narrow": LinearizeConfig(window=4, sinks=0, feature_dim=3, mix="gate"),
    "no state": LinearizeConfig(mixer="none", window=8, sinks=1),
    "hybrid": LinearizeConfig(window=8, sinks=2, softmax_layers=(1,)),
}


def used_bytes(model, tokens: int) -> dict[str, int]:
    with torch.no_grad():
        return cache_bytes(model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_a_real_cache(family: str, name: str, dtype: str):
    contexts = (5, 40, 130)  # before the window is full, and after
    model = AutoModelForCausalLM.from_config(make_config(family)).to(getattr(torch, dtype)).eval()
    plan = inspect_config(model.config, CONFIGS[name], contexts, dtype)
    before = tuple(used_bytes(model, tokens)["total"] for tokens in contexts)
    convert(model, CONFIGS[name])
    after = tuple(used_bytes(model, tokens)["total"] for tokens in contexts)
    assert plan.kv_bytes == before
    assert plan.new_bytes == after
    assert [layer.layer for layer in plan.layers if layer.converted] == list(converted_layers(model))
    assert plan.converted == len(converted_layers(model))


def test_break_even_is_the_first_context_where_the_original_caches_more():
    config = LinearizeConfig(window=8, sinks=2)
    even = inspect_config(make_config("llama"), config).layers[0].break_even
    plan = inspect_config(make_config("llama"), config, contexts=(even - 1, even))
    for layer in plan.layers:
        assert layer.kv_bytes[0] <= layer.new_bytes[0]
        assert layer.kv_bytes[1] > layer.new_bytes[1]


def test_a_kept_layer_stays_as_it_is():
    plan = inspect_config(make_config("llama"), LinearizeConfig(softmax_layers=(0,)), (100,))
    kept, converted, _ = plan.layers
    assert (kept.converted, kept.new, kept.new_bytes, kept.break_even) == (False, kept.old, kept.kv_bytes, None)
    assert converted.converted
    assert converted.new != converted.old


def test_a_sliding_layer_caches_no_more_than_its_window():
    changes = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config = make_config("qwen2", **changes)
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(config).eval()
    plan = inspect_config(config, LinearizeConfig(window=4), (10, 15, 16, 60), "float32")
    assert [layer.converted for layer in plan.layers] == [True, False, False]
    assert plan.kv_bytes == tuple(used_bytes(model, tokens)["total"] for tokens in plan.contexts)


def test_to_dict_is_json_and_has_the_totals():
    plan = inspect_config(make_config("llama"), LinearizeConfig(), (1024,), "float16", name="tiny")
    read = json.loads(json.dumps(plan.to_dict()))
    assert (read["model"], read["family"], read["dtype"], read["converted"]) == ("tiny", "llama", "float16", 3)
    assert read["kv_bytes"] == [sum(layer["kv_bytes"][0] for layer in read["layers"])] == [3 * 1024 * 2 * 2 * 16 * 2]


def test_refusals():
    with pytest.raises(LinearizeError, match="dtype: 'int8' is not known; use one of float32, bfloat16, float16"):
        inspect_config(make_config("llama"), LinearizeConfig(), dtype="int8")
    with pytest.raises(LinearizeError, match="layer 3 is out of range, the model has layers 0 to 2"):
        inspect_config(make_config("llama"), LinearizeConfig(softmax_layers=(3,)))
