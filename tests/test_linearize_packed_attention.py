"""Grouped queries as rows of one head: the attention that it was, and only where it is asked for."""

import pytest
import torch
from transformers import DynamicCache

from linearize import packed_attention as module
from linearize.convert import MASKS_GROUP
from linearize.packed_attention import MOST_TOKENS, packed_attention
from tests.tiny_models import make_model, make_student, make_tokens

FAMILIES = ("llama", "qwen3", "gemma3_text", "cohere", "gpt_neox")


@pytest.fixture
def calls(monkeypatch):
    """How many rows each softmax had, and what was left to transformers."""
    found, own = {"rows": [], "left": []}, torch.nn.functional.scaled_dot_product_attention
    left = module.sdpa_attention_forward

    def attention(q, *args, **options):
        found["rows"].append(tuple(q.shape[1:3]))
        return own(q, *args, **options)

    def rest(layer, q, *args, **options):
        found["left"].append(q.shape[2])
        return left(layer, q, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(module, "sdpa_attention_forward", rest)
    return found


@torch.no_grad()
def in_pieces(model, tokens, pieces, packed, mask=None):
    cache, outs, at = DynamicCache(config=model.config), [], 0
    for n in pieces:
        options = {} if mask is None else {"attention_mask": mask[:, : at + n]}
        given = {"input_ids": tokens[:, at : at + n], "past_key_values": cache} | options
        if packed:
            with packed_attention(model):
                outs.append(model(**given).logits)
        else:
            outs.append(model(**given).logits)
        at += n
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_does_it(family, padded):
    model, tokens = make_model(family), make_tokens(2, 60)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    given = {"mask": mask if padded else None}
    pieces = (30, 1, 5, 1, 17, 6)
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    expected = in_pieces(model, tokens, pieces, packed=False, **given)[real]
    torch.testing.assert_close(in_pieces(model, tokens, pieces, packed=True, **given)[real], expected)


def test_what_is_packed(calls):
    """Four heads over two: tokens become rows of two heads, except a prompt's and those of a long piece."""
    model, tokens = make_model("llama"), make_tokens(1, 30 + 1 + 5 + MOST_TOKENS + 1)
    in_pieces(model, tokens, (30, 1, 5, MOST_TOKENS + 1), packed=True)
    layers = model.config.num_hidden_layers
    assert calls["left"] == [30] * layers + [MOST_TOKENS + 1] * layers
    assert calls["rows"][layers : 3 * layers] == [(2, 2)] * layers + [(2, 10)] * layers
    assert model.config._attn_implementation == "sdpa"


def test_in_half_precision():
    model, tokens = make_model("llama", torch.bfloat16), make_tokens(1, 60)
    exact = in_pieces(make_model("llama"), tokens, (30, 5, 25), packed=False)
    errors = [
        float((in_pieces(model, tokens, (30, 5, 25), packed).float() - exact).abs().max()) for packed in (False, True)
    ]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attentions_stay(implementation, calls):
    model = make_model("llama")
    model.set_attn_implementation(implementation)
    with packed_attention(model):
        inside = model.config._attn_implementation
    assert (inside == implementation) == (implementation == "eager")
    assert model.config._attn_implementation == implementation


def test_it_ends_with_an_error():
    model = make_model("llama")
    with pytest.raises(ZeroDivisionError), packed_attention(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_what_it_does_not_do_is_left(calls):
    model = make_model("llama")
    layer, x = model.model.layers[0].self_attn, torch.randn(1, 4, 3, 16)
    mask = torch.ones(1, 1, 3, 3).tril().bool()
    for options in (
        {"dropout": 0.1},
        {"position_bias": torch.zeros(1, 4, 3, 3)},
        {"attention_mask": mask.expand(1, 4, 3, 3)},
    ):
        given = {"attention_mask": mask} | options
        module._packed(layer, x, x[:, :2], x[:, :2], given.pop("attention_mask"), **given)
    assert calls["left"] == [3, 3, 3]


def test_a_student():
    """Its softmax layers, and its original inside."""
    student, tokens = make_student("llama", "gate", softmax_layers=[1]), make_tokens(2, 60)
    expected = in_pieces(student, tokens, (30, 1, 5, 24), packed=False)
    torch.testing.assert_close(in_pieces(student, tokens, (30, 1, 5, 24), packed=True), expected)


class TestOneToken:
    """A student's softmax layers get a mask for one token, by which transformers itself does this."""

    @pytest.mark.parametrize("width", [None, 0, 9])
    @torch.no_grad()
    def test_rows(self, width, calls):
        student, tokens = make_student("llama", "gate", softmax_layers=[1]), make_tokens(2, 60)
        expected = student(tokens, use_cache=False).logits
        cache = DynamicCache(config=student.config)
        student(tokens[:, :40], past_key_values=cache)
        for t in range(40, 60):
            calls["rows"].clear()
            options = {} if width is None else {"attention_mask": torch.ones(2, t + 1 + width)}
            found = student(tokens[:, t : t + 1], past_key_values=cache, **options).logits
            assert calls["rows"] == ([(2, 2)] if MASKS_GROUP else [(4, 1)])
            torch.testing.assert_close(found[:, 0], expected[:, t])

    @torch.no_grad()
    def test_padding(self, calls):
        student, tokens = make_student("llama", "gate", softmax_layers=[1]), make_tokens(2, 60)
        expected = student(tokens[1:, 7:], use_cache=False).logits
        mask = torch.ones_like(tokens)
        mask[1, :7] = 0
        cache = DynamicCache(config=student.config)
        student(tokens[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
        for t in range(40, 60):
            found = student(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(found[1, 0], expected[0, t - 7])

    def test_not_beside_sliding_layers(self):
        student = make_student("gemma3_text", "normalizer", softmax_layers=[2])
        assert not student.model._forward_pre_hooks[next(iter(student.model._forward_pre_hooks))].groups
