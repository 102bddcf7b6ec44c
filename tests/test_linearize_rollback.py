"""Caches that go back: `crop`, and the ways of decoding that reject what they have read."""

import pytest
import torch
from transformers import StaticCache

from linearize import LinearizeConfig, LinearizeError, convert
from tests.tiny_models import make_model, make_student, make_tokens, pad, randomize_far

LOGITS = {"rtol": 1e-5, "atol": 1e-5}


def make_gla(**options):
    config = LinearizeConfig(mixer="gla", mix="gate", window=4, sinks=2, **options)
    return randomize_far(convert(make_model("llama"), config))


def read(student, tokens, mask=None, cache=None):
    """Logits of these tokens after those of the cache, and the cache."""
    past = 0 if cache is None else cache.get_seq_length()
    options = {}
    if mask is not None:
        options["attention_mask"] = mask[:, : past + tokens.shape[1]]
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, past : past + tokens.shape[1]]
    with torch.no_grad():
        out = student(tokens, past_key_values=cache, use_cache=True, **options)
    return out.logits, out.past_key_values


@pytest.mark.parametrize("far", ["none", "normalizer"])
@pytest.mark.parametrize("kept", ["none", [1]], ids=str)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_crop_is_as_if_they_had_never_come(side, kept, far):
    student = make_student("llama", far, softmax_layers=kept, changes={"num_hidden_layers": 2})
    tokens, other, mask = make_tokens(3, 40), make_tokens(3, 40, seed=5), None
    if side:
        tokens, mask = pad(tokens, [0, 5, 11], side)
    pieces = (17, 1, 1, 1, 1, 1, 3, 1, 4)
    for removed in (1, 2, 3, 4):
        cache, done = None, 0
        for piece in pieces:
            _, cache = read(student, tokens[:, done : done + piece], mask, cache)
            wrong = other[:, :removed]
            if mask is not None:
                wrong = wrong * mask[:, done + piece : done + piece + removed]
            read(student, wrong, mask, cache)
            done += piece
            cache.crop(-removed)
            assert cache.get_seq_length() == done
        logits, _ = read(student, tokens[:, done:], mask, cache)
        _, straight = read(student, tokens[:, :done], mask)
        expected, _ = read(student, tokens[:, done:], mask, straight)
        real = slice(None) if mask is None else mask[:, done:].bool()
        torch.testing.assert_close(logits[real], expected[real], **LOGITS)


@pytest.mark.parametrize("make", [make_gla, lambda **o: make_student("llama", "normalizer", **o)])
@pytest.mark.parametrize("kept", ["none", [1]], ids=str)
def test_what_is_recorded_goes_back_by_any_number(kept, make):
    student, tokens = make(softmax_layers=kept), make_tokens(2, 60)
    _, cache = read(student, tokens[:, :13])
    cache.activate_past_recording()
    assert cache.is_croppable
    for removed, piece in ((9, 11), (0, 1), (17, 20), (3, 3)):
        start = cache.get_seq_length()
        read(student, tokens[:, start : start + piece], cache=cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == start + piece - removed
    done = cache.get_seq_length()
    logits, _ = read(student, tokens[:, done:], cache=cache)
    with torch.no_grad():
        expected = student(tokens, use_cache=False).logits[:, done:]
    torch.testing.assert_close(logits, expected, **LOGITS)


def test_rows_move_with_what_is_kept():
    student, tokens = make_student("llama", "normalizer"), make_tokens(3, 40)
    rows, mask = pad(tokens, [0, 5, 11], "left")
    order = torch.tensor([2, 0, 0, 1])
    _, cache = read(student, rows[:, :21], mask)
    for t in range(21, 25):
        read(student, rows[:, t : t + 1], mask, cache)
    cache.reorder_cache(order)
    cache.crop(-4)
    logits, _ = read(student, rows[order, 21:], mask[order], cache)
    _, straight = read(student, rows[order, :21], mask[order])
    torch.testing.assert_close(logits, read(student, rows[order, 21:], mask[order], straight)[0], **LOGITS)


class TestAssisted:
    """Greedy decoding with candidates is greedy decoding; the drafts are longer than W = 4."""

    @pytest.mark.parametrize("make", [make_gla, lambda **o: make_student("llama", "normalizer", **o)])
    @pytest.mark.parametrize("kept", ["none", [1]], ids=str)
    def test_candidates(self, kept, make):
        student, tokens = make(softmax_layers=kept), make_tokens(1, 27)
        tokens = torch.cat([tokens, tokens[:, 3:15]], 1)
        options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
        expected = student.generate(tokens, use_cache=False, **options)
        original = make_model("llama")
        own = original.generate(tokens, **options)
        assert torch.equal(student.generate(tokens, assistant_model=original, **options), expected)
        assert torch.equal(student.generate(tokens, prompt_lookup_num_tokens=7, **options), expected)
        assert torch.equal(original.generate(tokens, assistant_model=student, **options), own)
        assert torch.equal(student.generate(tokens, assistant_model=student, **options), expected)


class TestErrors:
    def refused(self, cache, number, match):
        before = cache.get_seq_length()
        with pytest.raises(LinearizeError, match=match):
            cache.crop(number)
        assert cache.get_seq_length() == before

    def test_too_many(self):
        _, cache = read(make_student("llama", "gate"), make_tokens(2, 19))
        self.refused(cache, -5, "cannot remove 5 tokens, a converted layer can go back by its window of 4 at most")
        self.refused(cache, -20, "cannot remove 20 tokens, it holds 19")
        self.refused(cache, 3, r"crop\(3\) would name a length to keep")
        cache.crop(0)
        assert cache.get_seq_length() == 19

    def test_without_a_record(self):
        _, cache = read(make_gla(), make_tokens(2, 19))
        assert not cache.is_croppable
        self.refused(cache, -1, "keeps nothing to go back to")

    def test_further_than_the_record(self):
        student, tokens = make_student("llama", "gate"), make_tokens(2, 40)
        _, cache = read(student, tokens[:, :19])
        cache.activate_past_recording()
        read(student, tokens[:, 19:25], cache=cache)
        self.refused(cache, -7, "cannot remove 7 tokens, 6 came since the last crop")

    def test_static(self):
        student = make_student("llama", "gate")
        _, cache = read(student, make_tokens(2, 19), cache=StaticCache(config=student.config, max_cache_len=32))
        with pytest.raises(LinearizeError, match="static caches and recurrent mixers do not"):
            cache.crop(-1)


@pytest.mark.parametrize("kept", ["none", [1]], ids=str)
def test_padding_is_taken_off_however_much_there_is(kept):
    """As of a prompt that was filled up to a size: no real token goes, so it may be more than W columns."""
    student, tokens = make_student("llama", "normalizer", softmax_layers=kept), make_tokens(2, 30)
    rows, mask = torch.cat([tokens[:, :20], torch.zeros(2, 10, dtype=torch.long)], 1), torch.ones(2, 30).long()
    mask[:, 20:] = 0
    for steps in ([10], [2] * 5):
        _, cache = read(student, rows, mask)
        for step in steps:
            cache.crop(-step)
        assert cache.get_seq_length() == 20
        logits, _ = read(student, tokens[:, 20:], cache=cache)
        with torch.no_grad():
            expected = student(tokens, use_cache=False).logits[:, 20:]
        torch.testing.assert_close(logits, expected, **LOGITS)


def test_what_inference_mode_has_read_goes_back_too():
    student, tokens = make_student("llama", "normalizer"), make_tokens(2, 40)
    with torch.inference_mode():
        cache = student(tokens[:, :23], use_cache=True).past_key_values
    cache.crop(-4)
    logits, _ = read(student, tokens[:, 19:], cache=cache)
    with torch.no_grad():
        torch.testing.assert_close(logits, student(tokens, use_cache=False).logits[:, 19:], **LOGITS)
