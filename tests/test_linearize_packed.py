"""Packed rows: several documents in a row, told apart by positions that restart, in the original and the student."""

import pytest
import torch

from linearize import LinearizeError, original_attention
from linearize.convert import added_parameters
from tests.packed_rows import POSITIONS, T, make, pieces
from tests.tiny_models import FAR, make_tokens
from tests.tolerance import assert_near


def run(model, who, **inputs):
    if who == "original":
        with original_attention(model):
            return model(**inputs, use_cache=False).logits
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("who", "far"), [("original", "none"), *(("student", far) for far in FAR)])
class TestDocuments:
    def test_each_gives_what_it_gives_alone(self, who, far, attention):
        """In a student with a layer that stays softmax, and without."""
        for kept in ("none", [1]):
            model, tokens = make(far, attention, softmax_layers=kept), make_tokens(2, T)
            with torch.no_grad():
                packed = run(model, who, input_ids=tokens, position_ids=POSITIONS)
                for row, part in pieces():
                    assert_near(packed[row, part], run(model, who, input_ids=tokens[row, part]))
                assert (run(model, who, input_ids=tokens) - packed).abs().max() > 0.1, "unpacked is another thing"

    def test_nothing_leaks(self, who, far, attention):
        """A changed token changes its own document from there on, and no other logit by a bit."""
        model, tokens = make(far, attention), make_tokens(2, T)
        with torch.no_grad():
            before = run(model, who, input_ids=tokens, position_ids=POSITIONS)
            for (row, part), at in zip(pieces(), (1, 0, 3, 2, 5, 0, 29, 0)):
                other = tokens.clone()
                other[row, part][:, at] = other[row, part][:, at] % 126 + 1
                changed = (run(model, who, input_ids=other, position_ids=POSITIONS) != before).any(-1)
                assert changed[row, part][:, at].all()
                changed[row, part] = False
                assert not changed.any()

    def test_no_gradient_leaks(self, who, far, attention):
        model, tokens = make(far, attention), make_tokens(2, T)
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = run(model, who, inputs_embeds=embedded, position_ids=POSITIONS)
        for row, part in pieces():
            (gradient,) = torch.autograd.grad(logits[row, part].square().sum(), embedded, retain_graph=True)
            reached = gradient.abs().sum(-1) > 0
            assert reached[row, part].all()
            reached[row, part] = False
            assert not reached.any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_parameters_are_the_sum_over_documents(checkpointing):
    model, tokens = make("normalizer"), make_tokens(2, T)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    weight = torch.randn(2, T, model.config.vocab_size)
    added = added_parameters(model)
    logits = model(input_ids=tokens, position_ids=POSITIONS, use_cache=False).logits
    packed = torch.autograd.grad((logits * weight).sum(), list(added.values()))
    alone = [torch.zeros_like(p) for p in added.values()]
    for row, part in pieces():
        logits = model(input_ids=tokens[row, part], use_cache=False).logits
        found = torch.autograd.grad((logits * weight[row, part]).sum(), list(added.values()), allow_unused=True)
        for total, gradient in zip(alone, found):
            total += 0 if gradient is None else gradient
    for a, b in zip(packed, alone):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)  # sums over 80 tokens of up to 50 each


def test_one_row_of_positions_for_all():
    model, tokens = make("gate"), make_tokens(2, T)
    with torch.no_grad():
        shared = run(model, "student", input_ids=tokens, position_ids=POSITIONS[:1])
        assert torch.equal(
            shared, run(model, "student", input_ids=tokens, position_ids=POSITIONS[:1].expand(2, -1).contiguous())
        )


@pytest.mark.parametrize("positions", [torch.arange(T)[None], torch.arange(T)[None] + 5])
def test_positions_that_do_not_restart_are_one_text(positions):
    model, tokens = make("normalizer"), make_tokens(2, T)
    with torch.no_grad():
        out = run(model, "student", input_ids=tokens, position_ids=positions)
        masked = {"attention_mask": torch.ones_like(tokens), "position_ids": positions}
        assert_near(out, run(model, "student", input_ids=tokens, **masked))


def test_with_a_mask_they_are_one_text():
    """As the original attention has it, which mixes them in silence; here positions that go back are refused."""
    model, tokens = make("normalizer", window=T), make_tokens(2, T)
    inputs = {"input_ids": tokens, "position_ids": POSITIONS, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad(), pytest.raises(LinearizeError, match="texts that share a row without attention_mask"):
        run(model, "student", **inputs)
    with torch.no_grad():
        run(model, "original", **inputs)


@pytest.mark.parametrize("cache", ["default", "given"])
def test_no_cache(cache):
    model, tokens = make("normalizer"), make_tokens(2, T)
    options = {}
    if cache == "given":
        from transformers import DynamicCache

        options["past_key_values"] = DynamicCache(config=model.config)
    with pytest.raises(LinearizeError) as error:
        model(input_ids=tokens, position_ids=POSITIONS, **options)
    assert str(error.value) == (
        "position_ids: they restart inside a row (packed documents), which no cache can hold; pass use_cache=False, or "
        "give each document its own row, padded, with an attention_mask"
    )


def test_an_attention_that_would_leak():
    """transformers tells documents apart for flash attention where there is a single row."""
    model, tokens = make("normalizer"), make_tokens(2, T)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(LinearizeError, match="flash_attention_2 would tell documents apart in a single row only; use"):
        model(input_ids=tokens, position_ids=POSITIONS, use_cache=False)
    model(input_ids=tokens[:1], position_ids=POSITIONS[:1], use_cache=False)
