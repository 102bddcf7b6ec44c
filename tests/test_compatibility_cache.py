"""The interface of transformers' caches, with converted layers in them: after every move it goes on as a fresh one."""

import contextlib
import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from linearize import LinearizeError, cache_bytes
from tests.parity import (
    LENGTH,
    LOGITS,
    MODELS,
    ORIGINAL,
    WINDOW,
    Case,
    alone,
    covering,
    everywhere,
    in_pieces,
    left_padded,
    make,
    student,
)
from tests.tiny_models import make_tokens

ROLL_BACK = (*MODELS[:2], Case("qwen3", "peak", (1,)), Case("mistral", "none", (0,)))
READ = 43  # in the middle of the sixth chunk


def ragged(count=3, seed=2):
    """Texts of different lengths, as (tokens, mask) with padding on the left."""
    lengths = (LENGTH, LENGTH - 5, LENGTH - 19)[:count]
    return left_padded([row[:n] for row, n in zip(make_tokens(count, LENGTH, seed), lengths, strict=True)])


def goes_on(model, cache, tokens, mask, start):
    """After `start` columns in `cache`, the rest gives what a fresh cache gives that gets everything."""
    actual, _ = in_pieces(model, [3, *[1] * WINDOW, 7], tokens[:, start:], mask, cache)
    expected, _ = in_pieces(model, [tokens.shape[1]], tokens, mask)
    real = mask[:, start:].bool()
    torch.testing.assert_close(actual[real], expected[:, start:][real], **LOGITS)


class TestSizes:
    @everywhere
    def test_lengths(self, case):
        """Columns of the batch, padding included; the mask covers the past and the new tokens."""
        model, (tokens, mask) = make(case), ragged()
        _, cache = in_pieces(model, [READ], tokens[:, :READ], mask[:, :READ])
        assert len(cache) == 2
        for layer in range(2):
            assert cache.get_seq_length(layer) == READ
            assert cache.get_mask_sizes(5, layer) == (READ + 5, 0)
            assert cache.get_max_length(layer) == -1
        assert cache.get_seq_length() == READ
        assert cache.get_max_length() == -1
        assert not any(cache.is_sliding)
        assert DynamicCache().get_seq_length() == 0

    @student
    def test_a_constant_size(self, case):
        """Only softmax layers grow."""
        model, tokens = make(case), make_tokens(1, 3 * LENGTH)
        sizes = [cache_bytes(in_pieces(model, [n], tokens[:, :n])[1]) for n in (LENGTH, 3 * LENGTH)]
        assert sizes[0]["window"] == sizes[1]["window"] > 0
        assert sizes[0]["state"] == sizes[1]["state"]
        assert sizes[1]["softmax"] == 3 * sizes[0]["softmax"]

    @everywhere
    def test_what_it_says_it_can(self, case):
        model, tokens = make(case), make_tokens(1, READ)
        assert in_pieces(model, [READ], tokens)[1].is_croppable == (case.far != "gla")
        cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        assert in_pieces(model, [READ], tokens, cache=cache)[1].is_compileable


class TestRows:
    @everywhere
    @pytest.mark.parametrize(
        ("move", "order"),
        [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        ],
        ids=["reorder_cache", "batch_repeat_interleave", "batch_select_indices"],
    )
    def test_moves(self, case, move, order):
        model, (tokens, mask) = make(case), ragged()
        _, cache = in_pieces(model, [READ], tokens[:, :READ], mask[:, :READ])
        move(cache)
        goes_on(model, cache, tokens[order], mask[order], READ)

    @everywhere
    def test_moves_of_an_empty_cache(self, case):
        model, (tokens, mask) = make(case), ragged()
        cache = DynamicCache(config=model.config)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
        cache.crop(0)
        goes_on(model, cache, tokens, mask, 0)


class TestReset:
    @everywhere
    @pytest.mark.parametrize("static", [False, True])
    def test_as_a_fresh_one(self, case, static):
        """For a batch of another size too, where the cache grows."""
        model, (tokens, mask) = make(case), ragged()
        cache = StaticCache(config=model.config, max_cache_len=LENGTH) if static else DynamicCache(config=model.config)
        _, cache = in_pieces(model, [READ, 1], *ragged(seed=9), cache)
        cache.reset()
        if case.far == ORIGINAL and cache.get_seq_length():
            pytest.skip("this version of transformers keeps as many zeros")
        assert cache.get_seq_length() == 0
        if not static:
            tokens, mask = tokens[:2], mask[:2]
        expected, _ = in_pieces(model, [LENGTH], tokens, mask)
        actual, _ = in_pieces(model, [READ, 1], tokens, mask, cache)
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **LOGITS)


class TestCrop:
    @everywhere
    def test_by_a_tensor(self, case):
        """As some versions of transformers give it: lengths stay numbers."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        _, cache = in_pieces(model, [READ - 5], tokens[:, : READ - 5])
        cache.activate_past_recording()
        _, cache = in_pieces(model, [5], tokens[:, READ - 5 : READ], cache=cache)
        cache.crop(-torch.tensor(3))
        assert cache.get_seq_length() == READ - 3
        assert not any(isinstance(layer.get_seq_length(), torch.Tensor) for layer in cache.layers)
        actual, _ = in_pieces(model, [LENGTH], tokens[:, READ - 3 :], cache=cache)
        expected = torch.stack(alone(model, list(tokens)))[:, READ - 3 :]
        torch.testing.assert_close(actual, expected, **LOGITS)

    """`crop(-n)` and other tokens instead give what those give a cache that never saw the n tokens."""

    @pytest.mark.parametrize(
        ("case", "read", "remove"),
        covering(ROLL_BACK, (5, WINDOW, 5 * WINDOW - 1, 5 * WINDOW, 5 * WINDOW + 1, READ), (1, 3, WINDOW - 1, WINDOW)),
        ids=str,
    )
    def test_after_a_pass(self, case, read, remove):
        model, tokens = make(case), make_tokens(2, LENGTH)
        remove = min(remove, read)
        other = torch.cat([tokens[:, : read - remove], make_tokens(2, LENGTH - read + remove, seed=9)], dim=1)
        _, cache = in_pieces(model, [read], tokens[:, :read])
        cache.crop(-remove)
        assert cache.get_seq_length() == read - remove
        goes_on(model, cache, other, torch.ones_like(other), read - remove)

    @pytest.mark.parametrize("remove", [1, WINDOW])
    @pytest.mark.parametrize("read", [5 * WINDOW, 5 * WINDOW + 1, 5 * WINDOW + 6])
    def test_after_tokens(self, read, remove):
        """The same tokens came one by one, over the end of a chunk."""
        model, tokens = make(Case("llama", "gate", (1,))), make_tokens(2, LENGTH)
        other = torch.cat([tokens[:, : read - remove], make_tokens(2, LENGTH - read + remove, seed=9)], dim=1)
        _, cache = in_pieces(model, [4 * WINDOW - 2, 1], tokens[:, :read])
        cache.crop(-remove)
        goes_on(model, cache, other, torch.ones_like(other), read - remove)

    @pytest.mark.parametrize("case", ROLL_BACK, ids=str)
    def test_rows_of_different_lengths(self, case):
        """Chunks end at other columns in every row; rows move before and after."""
        model, (tokens, mask) = make(case), ragged()
        _, cache = in_pieces(model, [READ - 4, 1], tokens[:, :READ], mask[:, :READ])
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        cache.crop(-6)
        cache.batch_repeat_interleave(2)
        order, start = [1, 1, 2, 2, 0, 0], READ - 6
        mask = mask[order]
        tokens = torch.cat([tokens[order][:, :start], make_tokens(6, LENGTH - start, seed=9)], dim=1)
        goes_on(model, cache, tokens, mask, start)

    @pytest.mark.parametrize("case", ROLL_BACK, ids=str)
    @pytest.mark.parametrize("after", [0, 2])
    def test_padding_among_them(self, case, after):
        """What is taken back is columns: in every row another number of tokens, and in one none at all."""
        model, (tokens, mask) = make(case), ragged()
        mask[0, READ - 6 : READ] = 0
        mask[1, READ - 8 : READ - 2 : 2] = 0
        _, cache = in_pieces(model, [READ - after, 1], tokens[:, :READ], mask[:, :READ])
        start = READ - 5
        cache.crop(start - READ)
        mask[:, start:] = 1
        tokens = torch.cat([tokens[:, :start], make_tokens(3, LENGTH - start, seed=9)], dim=1)
        goes_on(model, cache, tokens, mask, start)

    @pytest.mark.parametrize("case", ROLL_BACK, ids=str)
    def test_again_and_again(self, case):
        """As assisted decoding does it: a few candidates, some of them taken back, thirty times over."""
        model, tokens = make(case), make_tokens(1, 3 * LENGTH)
        _, cache = in_pieces(model, [READ], tokens[:, :READ])
        (expected,) = alone(model, list(tokens))
        done, step = READ, 0
        while done + 6 <= tokens.shape[1]:
            good = (step * 7) % 6
            candidates = torch.cat([tokens[:, done : done + good], make_tokens(1, 6 - good, seed=step)], dim=1)
            logits, _ = in_pieces(model, [6], candidates, cache=cache)
            torch.testing.assert_close(logits[0, :good], expected[done : done + good], **LOGITS)
            cache.crop(good - 6)
            done, step = done + good, step + 1
            logits, _ = in_pieces(model, [1], tokens[:, done : done + 1], cache=cache)
            torch.testing.assert_close(logits[0, 0], expected[done], **LOGITS)
            done += 1
        assert step > 30

    @pytest.mark.parametrize("case", ROLL_BACK, ids=str)
    def test_nothing_to_remove(self, case):
        model, (tokens, mask) = make(case), ragged()
        _, cache = in_pieces(model, [READ], tokens[:, :READ], mask[:, :READ])
        cache.crop(0)
        goes_on(model, cache, tokens, mask, READ)

    @everywhere
    @pytest.mark.parametrize("remove", [1, WINDOW + 3, 2 * WINDOW + 5])
    def test_recorded(self, case, remove):
        """After `activate_past_recording` as far back as it came since, with any mixer; and once more from there."""
        model, tokens = make(case), make_tokens(2, 2 * LENGTH)
        _, cache = in_pieces(model, [READ - 21], tokens[:, : READ - 21])
        cache.activate_past_recording()
        assert cache.is_croppable
        in_pieces(model, [7, 14], tokens[:, READ - 21 : READ], cache=cache)
        cache.crop(-remove)
        middle = READ - remove + 9
        other = torch.cat([tokens[:, : READ - remove], make_tokens(2, LENGTH, seed=9)], dim=1)
        in_pieces(model, [9], other[:, READ - remove : middle], cache=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == middle - 4
        tokens = torch.cat([other[:, : middle - 4], make_tokens(2, 11, seed=8)], dim=1)
        goes_on(model, cache, tokens, torch.ones_like(tokens), middle - 4)

    @student
    def test_too_far(self, case):
        """More than W tokens; a state that decays takes none back that were not recorded."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        _, cache = in_pieces(model, [READ], tokens[:, :READ])
        says = "keeps nothing to go back to" if case.far == "gla" else f"its window of {WINDOW} at most; remove fewer"
        with pytest.raises(LinearizeError, match=says):
            cache.crop(-1 if case.far == "gla" else -3 * WINDOW)


def by_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


class TestCopies:
    @everywhere
    @pytest.mark.parametrize("way", [copy.deepcopy, by_pickle])
    def test_branches(self, case, way):
        """Two continuations of one prompt, each from its own copy."""
        model, (tokens, mask) = make(case), ragged()
        _, cache = in_pieces(model, [READ], tokens[:, :READ], mask[:, :READ])
        other = torch.cat([tokens[:, :READ], make_tokens(3, LENGTH - READ, seed=9)], dim=1)
        branch = way(cache)
        goes_on(model, cache, tokens, mask, READ)
        goes_on(model, branch, other, mask, READ)

    @everywhere
    def test_offload_and_prefetch(self, case):
        """Layer by layer, to the CPU and back to the layer's own device."""
        model, (tokens, mask) = make(case), ragged()
        _, cache = in_pieces(model, [READ], tokens[:, :READ], mask[:, :READ])
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        goes_on(model, cache, tokens, mask, READ)

    @student
    @pytest.mark.parametrize("recorded", [False, True])
    @pytest.mark.parametrize("piece", [1, 3, 8])
    def test_in_and_out_of_inference_mode(self, case, piece, recorded):
        """A few tokens there and the next elsewhere, also after going back to where recording began."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        texts = torch.stack(alone(model, list(tokens)))
        _, cache = in_pieces(model, [20], tokens[:, :20])
        with torch.inference_mode():
            if recorded:
                cache.activate_past_recording()
            for begin in (20, 20 + piece):
                model(tokens[:, begin : begin + piece], past_key_values=cache)
        kept = 20 + 2 * piece
        with torch.no_grad():
            if recorded:
                cache.crop(-min(10, 2 * piece))
                kept -= min(10, 2 * piece)
            for t in (kept, kept + 1):
                found = model(tokens[:, t : t + 1], past_key_values=cache).logits[:, 0]
                torch.testing.assert_close(found, texts[:, t], **LOGITS)

    @student
    def test_inference_mode(self, case):
        model, (tokens, mask) = make(case), ragged()
        with torch.inference_mode():
            _, cache = in_pieces(model, [READ], tokens[:, :READ], mask[:, :READ])
        goes_on(model, cache, tokens, mask, READ)


class NoStream(contextlib.nullcontext):
    """Stands for a stream of a GPU: things happen in the order in which they are asked for."""

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("kept", [(0,), (1,), (2,), (0, 2), (0, 1)], ids=str)
def test_offloaded_layers_are_back_in_time(kept, monkeypatch):
    """`cache_implementation="offloaded"` sends softmax layers to the CPU and asks for the next one before its turn."""
    away = set()
    update = DynamicLayer.update

    def recorded(layer, *args, **kwargs):
        assert id(layer) not in away, "on a GPU this layer's keys would be on the CPU"
        return update(layer, *args, **kwargs)

    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    monkeypatch.setattr(DynamicLayer, "offload", lambda layer: away.add(id(layer)))
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda layer: away.discard(id(layer)))
    monkeypatch.setattr(DynamicLayer, "update", recorded)
    model, tokens = make(Case("llama", "normalizer", kept), num_hidden_layers=3), make_tokens(2, LENGTH)
    logits, _ = in_pieces(model, [READ, 5, 1], tokens, cache=DynamicCache(config=model.config, offloading=True))
    torch.testing.assert_close(logits, torch.stack(alone(model, list(tokens))), **LOGITS)
    assert away
