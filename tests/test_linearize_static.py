"""Preallocated caches: what a growing one gives, tensors that stay where they are, and one graph for all tokens."""

import copy
import logging

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from linearize import cache_bytes, original_attention
from linearize.cache import NearFarLayer
from tests.tiny_models import make_student, make_tokens, pad

LOGITS = {"rtol": 1e-5, "atol": 1e-5}
KEPT = ("none", [0], [1])


@pytest.fixture(autouse=True)
def fresh(caplog):
    caplog.set_level(logging.WARNING, logger="torch.__trace")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def addresses(cache):
    found = []
    for layer in cache.layers:
        if isinstance(layer, NearFarLayer):
            memory = layer.memory
            found += [memory.keys, memory.values, memory.lengths, layer.seen, *(memory.state or ())]
            found += [*(memory.pending or ())]
        else:
            found += [layer.keys, layer.values]
    return [x.data_ptr() for x in found]


@pytest.mark.parametrize("far", ["none", "normalizer", "gate"])
@pytest.mark.parametrize("kept", KEPT, ids=str)
@torch.no_grad()
def test_tokens_and_pieces(kept, far):
    student, tokens = make_student("llama", far, softmax_layers=kept), make_tokens(2, 40)
    expected = student(tokens, use_cache=False).logits
    cache = StaticCache(config=student.config, max_cache_len=64)
    done, held = 0, None
    for piece in (13, *[1] * 9, 5, *[1] * 13):
        part = tokens[:, done : done + piece]
        out = student(part, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits, expected[:, done : done + piece], **LOGITS)
        done += piece
        assert int(cache.get_seq_length()) == done
        held = addresses(cache) if held is None else held
        assert addresses(cache) == held
    assert cache.is_compileable
    assert not cache.is_croppable
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    again = student(tokens[:, :21], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, expected[:, :21], **LOGITS)
    assert addresses(cache) == held


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_generate(padded, kept, family):
    student = make_student(family, "normalizer", softmax_layers=kept)
    rows, mask = pad(make_tokens(3, 23), [0, 5, 11] if padded else [0, 0, 0], "left")
    options = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    expected = student.generate(rows, use_cache=False, **options)
    assert torch.equal(student.generate(rows, cache_implementation="static", **options), expected)
    cache = StaticCache(config=student.config, max_cache_len=48)
    assert torch.equal(student.generate(rows, past_key_values=cache, **options), expected)
    assert cache_bytes(cache)["window"] > 0
    with original_attention(student):
        own = student.generate(rows, use_cache=False, **options)
        assert torch.equal(student.generate(rows, cache_implementation="static", **options), own)


@torch.no_grad()
def test_a_mask_of_every_slot():
    """One column for each slot of the cache, as users of preallocated caches give it."""
    student = make_student("llama", "normalizer")
    rows, mask = pad(make_tokens(2, 20), [0, 7], "left")
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = student(rows, attention_mask=mask, position_ids=positions, use_cache=False).logits
    whole = torch.cat([mask, torch.zeros(2, 12, dtype=mask.dtype)], 1)
    cache = StaticCache(config=student.config, max_cache_len=32)
    for part in (slice(0, 15), *(slice(i, i + 1) for i in range(15, 20))):
        out = student(rows[:, part], attention_mask=whole, position_ids=positions[:, part], past_key_values=cache)
        real = mask[:, part].bool()
        torch.testing.assert_close(out.logits[real], expected[:, part][real], **LOGITS)


@pytest.mark.parametrize("kept", ["none", [1]], ids=str)
def test_one_graph_for_all_tokens(kept):
    """torch.compile(fullgraph=True) over 300 tokens and 75 chunks: compiled once, perhaps a second time, then never."""
    student = make_student("llama", "normalizer", softmax_layers=kept, changes={"num_hidden_layers": 2})
    tokens = make_tokens(2, 330)
    cache = StaticCache(config=student.config, max_cache_len=384)
    step = torch.compile(student, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = student(tokens, use_cache=False).logits
        student(tokens[:, :30], past_key_values=cache, use_cache=True)
        held = addresses(cache)
        for t in range(30, 330):
            out = step(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits, expected[:, t : t + 1], **LOGITS)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert addresses(cache) == held


@pytest.mark.parametrize("kept", ["none", [1]], ids=str)
def test_generate_compiles_its_step(kept):
    """As `generate` does it: the masks are made ahead, and the step is one graph for left-padded rows too."""
    student = make_student("llama", "normalizer", softmax_layers=kept, changes={"num_hidden_layers": 2})
    rows, mask = pad(make_tokens(2, 23), [0, 5], "left")
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    expected = student.generate(rows, **options)
    how = CompileConfig(fullgraph=True, backend="aot_eager")
    how._compile_all_devices = True
    got = student.generate(rows, cache_implementation="static", compile_config=how, **options)
    assert torch.equal(got, expected)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_padding_without_positions(static, kept):
    """Real tokens are counted where a mask says which they are, and from then on in every later call."""
    student, tokens = make_student("llama", "normalizer", softmax_layers=kept), make_tokens(2, 30)
    rows, mask = pad(tokens, [0, 7], "left")
    alone = [student(tokens[:1], use_cache=False).logits, student(tokens[1:, :23], use_cache=False).logits]
    for later in ("whole", "new", "none"):
        cache = StaticCache(config=student.config, max_cache_len=48) if static else None
        out = student(rows[:, :20], attention_mask=mask[:, :20], past_key_values=cache, use_cache=True)
        got, cache = [out.logits], out.past_key_values
        for part in (slice(20, 21), slice(21, 26), slice(26, 27), slice(27, 30)):
            masks = {"whole": mask[:, : part.stop], "new": mask[:, part], "none": None}
            if kept != "none" and later != "whole":
                continue  # a softmax layer needs to know what it must not see
            out = student(rows[:, part], attention_mask=masks[later], past_key_values=cache, use_cache=True)
            got.append(out.logits)
        whole = torch.cat(got, 1)
        for row, (first, expected) in enumerate(zip((0, 7), alone, strict=True)):
            seen = whole[row, first:]
            torch.testing.assert_close(seen, expected[0, : len(seen)], **LOGITS)


def test_modes_of_gradients():
    """Read in inference mode or with gradients, the cache goes on without, and can be copied."""
    student, tokens = make_student("llama", "normalizer"), make_tokens(2, 30)
    with torch.no_grad():
        expected = student(tokens, use_cache=False).logits
    for mode in (torch.inference_mode(), torch.enable_grad()):
        cache = StaticCache(config=student.config, max_cache_len=48)
        with mode:
            student(tokens[:, :17], past_key_values=cache, use_cache=True)
        with torch.no_grad():
            if not cache.layers[0].memory.keys.is_inference():
                cache = copy.deepcopy(cache)
            for t in range(17, 30):
                out = student(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
                torch.testing.assert_close(out.logits, expected[:, t : t + 1], **LOGITS)
            cache.reset()
            out = student(tokens[:, :9], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits, expected[:, :9], **LOGITS)
