"""Caches that are filled in instead of read: what a decode step finds in them is what a prefill leaves."""

from statistics import median

import pytest
import torch
from transformers import DynamicCache, StaticCache

from linearize import LinearizeConfig, convert
from linearize.benchmarks import measurement
from linearize.benchmarks.filling import READ, extend, fill_period, tokens_to_read
from linearize.benchmarks.modes import MODES
from linearize.cache import NearFarLayer
from tests.tiny_models import make_model, make_tokens

WINDOW = 8
PERIOD = 2 * WINDOW
READ_TOKENS, TOKENS, CAPACITY = 45, 45 + 5 * PERIOD, 200


def make_case(kind: str):
    """(model, a new cache for it or None)."""
    if kind in ("dynamic", "static"):
        model = make_model("llama")
        return model, StaticCache(config=model.config, max_cache_len=CAPACITY) if kind == "static" else None
    if kind == "sliding":
        return make_model("mistral", sliding_window=24), None
    mixer, _, kept = kind.partition("+")
    config = LinearizeConfig(window=WINDOW, sinks=2, mixer=mixer, mix="gate" if mixer == "gla" else "normalizer")
    return convert(
        make_model("llama"), config if not kept else LinearizeConfig(window=WINDOW, softmax_layers=(1,))
    ), None


KINDS = ("dynamic", "static", "sliding", "none", "hedgehog", "gla", "hedgehog+softmax")


def read(kind: str, tokens: int, batch: int = 2):
    """(model, its output after a prefill)."""
    model, cache = make_case(kind)
    with torch.no_grad():
        return model, model(make_tokens(batch, tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)


def structure(cache) -> list:
    """Everything about a cache but the numbers in its keys, values and states."""
    found = [type(cache).__name__, cache.get_seq_length(), *(cache.get_mask_sizes(query, 0) for query in (1, 3))]
    for layer in cache.layers:
        found += [type(layer).__name__, layer.get_seq_length(), layer.get_mask_sizes(1), layer.is_initialized]
        if isinstance(layer, NearFarLayer):
            memory = layer.memory
            tensors = [memory.near_k, memory.near_v, memory.sink_k, memory.sink_v, *(memory.state or ())]
            found += [layer.seen, memory.uniform, memory.lengths.tolist()]
        else:
            tensors = [layer.keys, layer.values]
            found.append(int(getattr(layer, "cumulative_length", layer.keys.shape[2])))
        found += [(x.shape, x.dtype, x.device) for x in tensors]
    return [x.item() if isinstance(x, torch.Tensor) else x for x in found]


@pytest.mark.parametrize("kind", KINDS)
def test_structure_is_that_of_a_prefill_and_stays_it(kind):
    model, filled = read(kind, READ_TOKENS)
    extend(filled.past_key_values, TOKENS - READ_TOKENS)
    _, whole = read(kind, TOKENS)
    caches = filled.past_key_values, whole.past_key_values
    assert structure(caches[0]) == structure(caches[1])
    # Over a border of chunks, where a converted layer folds, and once around the ring.
    for _ in range(PERIOD + 1):
        with torch.no_grad():
            outputs = [model(make_tokens(2, 1), past_key_values=cache, use_cache=True).logits for cache in caches]
        assert all(logits.isfinite().all() for logits in outputs)
        assert structure(caches[0]) == structure(caches[1])


@pytest.mark.parametrize("kind", ["dynamic", "static", "hedgehog"])
def test_a_step_reads_what_was_filled_in_at_the_position_after_it(kind):
    """The next token's position is the one after all tokens, read and not; its attention sees them all."""
    model, output = read(kind, READ_TOKENS)
    cache, seen = output.past_key_values, {}
    extend(cache, TOKENS - READ_TOKENS)
    rotary = model.model.rotary_emb
    rotary.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        before = model(make_tokens(2, 1), past_key_values=cache, use_cache=True).logits
    assert seen["position_ids"].flatten().tolist() == [TOKENS]
    if kind == "hedgehog":
        return
    again = read(kind, READ_TOKENS)[1].past_key_values
    extend(again, TOKENS - READ_TOKENS)
    for layer in again.layers:
        layer.values[:, :, TOKENS - 1] += 5
    with torch.no_grad():
        after = model(make_tokens(2, 1), past_key_values=again, use_cache=True).logits
    assert not torch.allclose(before, after)


def test_keys_and_values_keep_their_mean_and_spread_by_layer_and_head():
    _, output = read("dynamic", 400)
    held = [(layer.keys.clone(), layer.values.clone()) for layer in output.past_key_values.layers]
    extend(output.past_key_values, 6000)
    for layer, before in zip(output.past_key_values.layers, held):
        for x, old in zip((layer.keys, layer.values), before):
            assert torch.equal(x[:, :, :400], old)
            spread = old.std(2)
            assert torch.allclose(x[:, :, 400:].mean(2) / spread, old.mean(2) / spread, atol=0.08)
            assert torch.allclose(x[:, :, 400:].std(2) / spread, torch.ones_like(spread), atol=0.08)
    # A token keeps its value beside its key, and is the same one in every layer. Keys tell where it stood.
    drawn = [
        (before[0] == layer.keys[:, :, 400:401]).all(-1).all(1).nonzero()[:, 1].tolist()
        for layer, before in zip(output.past_key_values.layers, held)
    ]
    assert drawn == [drawn[0]] * 3
    for layer, before in zip(output.past_key_values.layers, held):
        assert torch.equal(layer.values[:, :, 400], before[1][:, :, drawn[0][0]])


def test_no_slot_that_was_never_written_is_drawn():
    cache = read("static", READ_TOKENS)[1].past_key_values
    extend(cache, TOKENS - READ_TOKENS)
    for layer in cache.layers:
        written = layer.keys.abs().sum(-1) > 0
        assert written[:, :, :TOKENS].all()
        assert not written[:, :, TOKENS:].any()


def test_the_same_seed_draws_the_same_tokens():
    caches = [read("dynamic", 40)[1].past_key_values for _ in range(3)]
    for cache, seed in zip(caches, (0, 0, 1)):
        extend(cache, 30, seed)
    keys = [cache.layers[0].keys for cache in caches]
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[0], keys[2])


def test_the_ring_moves_by_whole_turns_only():
    cache = read("hedgehog", READ_TOKENS)[1].past_key_values
    assert fill_period(cache) == PERIOD
    assert fill_period(DynamicCache()) == 1
    before = structure(cache)
    with pytest.raises(ValueError, match="tokens: 15 would move the window's ring; give a multiple of 16"):
        extend(cache, PERIOD - 1)
    assert structure(cache) == before


def test_padded_rows_are_not_filled():
    model, _ = make_case("hedgehog")
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        cache = model(make_tokens(2, 30), attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="its rows have lengths of their own"):
        extend(cache, PERIOD)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_measurement_fills_in_what_it_does_not_read(mode):
    model, filled = make_model("llama"), TOKENS - READ_TOKENS
    with torch.no_grad():
        sample = measurement.measure(
            model, measurement.Run(MODES[mode], make_tokens(2, READ_TOKENS), filled, CAPACITY, 3)
        )
    assert (sample.prefill_ms, sample.filled, len(sample.step_ms)) == (None, filled, 3)
    held = CAPACITY if mode == "static" else TOKENS + measurement.WARMUP + 3
    # 3 layers, keys and values, batch 2, 2 key-value heads of 16, float32
    assert sample.cache_bytes["softmax"] == 3 * 2 * 2 * 2 * 16 * 4 * held


@pytest.mark.parametrize("period", [1, 16, 64, 1024])
def test_tokens_to_read(period):
    for length in (1, 500, READ, 3000, 100_001, 100_002):
        count = tokens_to_read(length, period)
        assert count <= length
        assert (length - count) % period == 0
        assert count == length or max(READ, 2 * period) <= count < max(READ, 2 * period) + period


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static", "hedgehog", "hedgehog+softmax"])
def test_a_step_costs_what_it_costs_after_a_prefill(kind):
    """Measurements take turns, on a model whose cache outweighs it; of each the least step, which nothing disturbed."""
    model, _ = make_case(kind)
    length = 512 + 190 * PERIOD  # 3552
    prompt = make_tokens(4, length)
    mode = MODES["static" if kind == "static" else "dynamic"]
    runs = [measurement.Run(mode, prompt[:, :count], length - count, length + 64, 20) for count in (512, length)]
    times = [[], []]
    with torch.no_grad():
        for _ in range(8):
            for run, steps in zip(runs, times):
                steps.append(min(measurement.measure(model, run).step_ms))
    assert 0.8 < median(times[0]) / median(times[1]) < 1.25
