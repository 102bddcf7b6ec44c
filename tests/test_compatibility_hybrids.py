"""What the page says of transformers' own hybrids, by running the suite's ways on tiny ones.

Of one version of transformers: another may have mended what is said here, and then the page has to be written again.
"""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from tests.parity import LENGTH, WAYS, alone, in_pieces
from tests.tiny_models import VOCAB, make_tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the page speaks of transformers 5.23"),
]
READ = 43
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.13,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 96, "block_auto_adjust_ff_dim": False,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16,
    },
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 2, "block_size": 16},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | KINDS[kind])).eval()


def generate(model, tokens, **options):
    return model.generate(tokens, max_new_tokens=10, do_sample=False, pad_token_id=0, **options)


def gap(model, name):
    """By how much one of the suite's ways misses the logits of each text alone."""
    (way,) = (way for way in WAYS if way.name == name)
    texts = way.texts()
    return (torch.cat(way.run(model, texts)) - torch.cat(alone(model, texts))).abs().max()


@pytest.mark.parametrize("name", ["one pass", "left-padded", "right-padded"])
def test_ways_that_all_can_go(model, name):
    """The models are built as they should be."""
    assert gap(model, name) < 1e-4


@pytest.mark.parametrize("name", ["padding between tokens", "packed documents"])
def test_ways_that_go_wrong(model, name):
    assert gap(model, name) > 0.5


@pytest.mark.parametrize("name", ["padding between tokens in pieces", "token by token", "left-padded in pieces"])
def test_pieces(model, kind, name):
    if kind == "minimax":  # a class of its own in place of DynamicCache
        with pytest.raises(ValueError, match="uses cache of its own"):
            gap(model, name)
    else:
        assert (gap(model, name) > 0.5) == name.startswith("padding")


def test_an_empty_past(model):
    with pytest.raises((IndexError, ValueError)), torch.no_grad():
        model(make_tokens(1, 9), past_key_values=DynamicCache())


def test_beams_and_chats(model, kind):
    tokens = make_tokens(2, READ)
    alike = torch.equal(generate(model, tokens, num_beams=4), generate(model, tokens, num_beams=4, use_cache=False))
    assert alike == (kind != "minimax")
    out = generate(model, tokens, return_dict_in_generate=True)
    longer = torch.cat([out.sequences, make_tokens(2, 7, seed=9)], dim=1)
    alike = torch.equal(
        generate(model, longer, past_key_values=out.past_key_values), generate(model, longer, use_cache=False)
    )
    assert alike == (kind != "minimax")


def test_rolling_back(model, kind):
    phrase = make_tokens(1, 15).repeat(1, 3)
    if kind == "lfm2":
        assert torch.equal(
            generate(model, phrase, prompt_lookup_num_tokens=3), generate(model, phrase, use_cache=False)
        )
    else:
        with pytest.raises((ValueError, RuntimeError)):
            generate(model, phrase, prompt_lookup_num_tokens=3)
    if kind != "minimax":
        _, cache = in_pieces(model, [READ], make_tokens(2, READ))
        with pytest.raises(RuntimeError, match="does not track past states"):
            cache.crop(-3)


@pytest.mark.parametrize("move", ["batch_repeat_interleave", "batch_select_indices"])
def test_rows(model, kind, move):
    if kind == "minimax":
        pytest.skip("it has no DynamicCache to move rows of")
    tokens = make_tokens(3, LENGTH)
    _, cache = in_pieces(model, [READ], tokens[:, :READ])
    order, argument = ([0, 0, 1, 1, 2, 2], 2) if move == "batch_repeat_interleave" else ([1, 2], torch.tensor([1, 2]))

    def move_and_go_on():
        getattr(cache, move)(argument)
        in_pieces(model, [1], tokens[order][:, READ:], cache=cache)

    with pytest.raises((AttributeError, RuntimeError)):
        move_and_go_on()
