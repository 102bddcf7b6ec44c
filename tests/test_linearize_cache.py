"""The cache and generation: whatever way tokens come, the outputs are those of one pass without a cache."""

import copy

import pytest
import torch
from transformers import DynamicCache

from linearize import LinearizeConfig, LinearizeError, cache_bytes, convert, original_attention, state_off
from linearize.cache import NearFarLayer, new_cache
from tests.tiny_models import FAMILIES, FAR, make_config, make_model, make_student, make_tokens, pad, randomize_far

LOGITS = {"rtol": 1e-5, "atol": 1e-5}  # float32, logits of a few units
SLIDING = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 6,
}


def in_pieces(model, pieces, tokens, mask=None, cache=None):
    """Logits of all positions and the cache, the tokens given in pieces of these lengths, the last one repeated."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    out, done, pieces = [], 0, list(pieces)
    past = cache.get_seq_length()
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    while done < tokens.shape[1]:
        piece = pieces.pop(0) if len(pieces) > 1 else pieces[0]
        part = slice(done, done + piece)
        inputs = {}
        if mask is not None:
            columns = slice(past + done, past + done + piece)
            inputs = {"attention_mask": mask[:, : columns.stop], "position_ids": positions[:, columns]}
        with torch.no_grad():
            result = model(tokens[:, part], past_key_values=cache, use_cache=True, **inputs)
        assert result.past_key_values is cache
        out.append(result.logits)
        done += piece
    return torch.cat(out, dim=1), cache


def one_pass(model, tokens, mask=None):
    """Logits without a cache."""
    inputs = {}
    if mask is not None:
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


# Every family with every far side; softmax layers beside converted ones in one family.
CASES = [(family, far, "none") for family in FAMILIES for far in FAR] + [("qwen2", far, [1]) for far in FAR]
PIECES = {
    "one": [40],
    "tokens": [1],
    "uneven": [1, 7, 3, 4, 5, 17, 1, 2],  # 1, 7, W - 1, W, W + 1, 3 W + 5
    "prefill and decode": [20, 1],
    "chunks": [4],
}


class TestPieces:
    @pytest.mark.parametrize(("family", "far", "kept"), CASES)
    def test_all_alike(self, family, far, kept):
        """Full = token by token = uneven pieces = left-padded = right-padded."""
        student = make_student(family, far, softmax_layers=kept, changes={"num_hidden_layers": 2})
        tokens = make_tokens(3, 40)
        expected = one_pass(student, tokens)
        for pieces in PIECES.values():
            torch.testing.assert_close(in_pieces(student, pieces, tokens)[0], expected, **LOGITS)
        amounts = [0, 5, 13]
        for side in ("left", "right"):
            rows, mask = pad(tokens, amounts, side)
            real = torch.cat([expected[i, : 40 - amount] for i, amount in enumerate(amounts)])
            torch.testing.assert_close(one_pass(student, rows, mask)[mask.bool()], real, **LOGITS)
            got, _ = in_pieces(student, PIECES["uneven"], rows, mask)
            torch.testing.assert_close(got[mask.bool()], real, **LOGITS)

    @pytest.mark.parametrize("kept", [[0], [0, 2]])
    def test_first_layer_kept(self, kept):
        """transformers asks the first layer of a cache for its length."""
        student, tokens = make_student("llama", "gate", softmax_layers=kept), make_tokens(3, 40)
        rows, mask = pad(tokens, [0, 5, 13], "left")
        expected = one_pass(student, rows, mask)[mask.bool()]
        for pieces in PIECES.values():
            got, _ = in_pieces(student, pieces, rows, mask)
            torch.testing.assert_close(got[mask.bool()], expected, **LOGITS)

    @pytest.mark.parametrize("far", FAR)
    def test_beside_sliding_layers(self, far):
        student, tokens = make_student("qwen2", far, changes=SLIDING), make_tokens(2, 40)
        expected = one_pass(student, tokens)
        for pieces in PIECES.values():
            torch.testing.assert_close(in_pieces(student, pieces, tokens)[0], expected, **LOGITS)

    def test_cache_made_by_the_model(self):
        student, tokens = make_student("llama", "gate"), make_tokens(2, 30)
        with torch.no_grad():
            cache = student(tokens[:, :13]).past_key_values
            assert [type(layer) for layer in cache.layers] == [NearFarLayer] * 3
            assert cache.get_seq_length() == 13
            rest = student(tokens[:, 13:], past_key_values=cache).logits
        torch.testing.assert_close(rest, one_pass(student, tokens)[:, 13:], **LOGITS)

    def test_two_conversations_at_once(self):
        """Nothing is kept in the model."""
        student, tokens = make_student("llama", "gate"), make_tokens(2, 30)
        expected = one_pass(student, tokens)
        caches = [new_cache(student.config, [0, 1, 2]) for _ in range(2)]
        got = [[], []]
        for start in range(0, 30, 5):
            for i, cache in enumerate(caches):
                got[i].append(in_pieces(student, [5], tokens[i : i + 1, start : start + 5], cache=cache)[0])
        torch.testing.assert_close(torch.cat([torch.cat(x, dim=1) for x in got]), expected, **LOGITS)

    def test_branches_of_a_copied_cache(self):
        student, tokens = make_student("llama", "gate"), make_tokens(1, 40)
        other = torch.cat([tokens[:, :23], make_tokens(1, 17, seed=9)], dim=1)
        _, cache = in_pieces(student, [23], tokens[:, :23])
        branch = copy.deepcopy(cache)
        first, _ = in_pieces(student, [1], tokens[:, 23:], cache=cache)
        second, _ = in_pieces(student, [1], other[:, 23:], cache=branch)
        torch.testing.assert_close(first, one_pass(student, tokens)[:, 23:], **LOGITS)
        torch.testing.assert_close(second, one_pass(student, other)[:, 23:], **LOGITS)

    def test_reset(self):
        student, tokens = make_student("llama", "gate", softmax_layers=[1]), make_tokens(2, 30)
        _, cache = in_pieces(student, [30], make_tokens(2, 30, seed=9))
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache_bytes(cache)["total"] == 0
        torch.testing.assert_close(
            in_pieces(student, [7, 1], tokens, cache=cache)[0], one_pass(student, tokens), **LOGITS
        )

    @pytest.mark.parametrize("ragged", [False, True])
    @pytest.mark.parametrize("kept", ["none", [1]])
    def test_rows_move(self, kept, ragged):
        """Reordered, repeated and selected rows go on as rows that always stood there."""
        student, tokens = make_student("llama", "normalizer", softmax_layers=kept), make_tokens(3, 40)
        rows, mask = pad(tokens, [0, 5 * ragged, 2 * ragged], "left")
        moves = [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        ]
        for move, order in moves:
            _, cache = in_pieces(student, [21], rows[:, :21], mask[:, :21] if ragged else None)
            move(cache)
            moved_rows, moved_mask = rows[order], mask[order]
            got, _ = in_pieces(student, [1], moved_rows[:, 21:], moved_mask if ragged else None, cache)
            expected = one_pass(student, moved_rows, moved_mask if ragged else None)[:, 21:]
            torch.testing.assert_close(got, expected, **LOGITS)

    def test_states_off(self):
        student, tokens = make_student("llama", "normalizer"), make_tokens(2, 30)
        with state_off(student):
            torch.testing.assert_close(in_pieces(student, [11, 1], tokens)[0], one_pass(student, tokens), **LOGITS)


@pytest.mark.parametrize("far", ["none", "normalizer"])
def test_what_inference_mode_has_read_can_be_gone_on_with(far):
    student, tokens = make_student("llama", far), make_tokens(2, 40)
    expected = one_pass(student, tokens)
    with torch.inference_mode():
        cache = student(tokens[:, :30], use_cache=True).past_key_values
    for step in range(30, 40):
        with torch.no_grad():
            out = student(tokens[:, step : step + 1], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[:, 0], expected[:, step], **LOGITS)


class TestBytes:
    @pytest.mark.parametrize(("far", "kept"), [("none", "none"), ("normalizer", "none"), ("gate", [1])])
    def test_constant_in_the_context(self, far, kept):
        student = make_student(
            "llama", far, window=16, softmax_layers=kept, feature_dim=None if far == "none" else 8,
            changes={"num_hidden_layers": 2},
        )  # fmt: skip
        tokens = make_tokens(2, 8192)
        counts, cache = {}, None
        for length, pieces in ((1024, [1000, 1]), (8192, [2048, 2048, 2048, 1000, 23, 1])):
            seen = 0 if cache is None else cache.get_seq_length()
            _, cache = in_pieces(student, pieces, tokens[:, seen:length], cache=cache)
            assert cache.get_seq_length() == length
            counts[length] = cache_bytes(cache)
        converted = 2 if kept == "none" else 1
        rows_and_heads = 2 * 2
        # 2 W + S keys and values of 16 float32; 2 * feature_dim features by 16 values and a normaliser, float32. To go
        # back by: W more keys and values, and one more state.
        window = converted * rows_and_heads * (3 * 16 + 2) * (16 + 16) * 4
        state = 0 if far == "none" else converted * rows_and_heads * 2 * 16 * (16 + 1) * 4
        for length, count in counts.items():
            softmax = 0 if kept == "none" else rows_and_heads * length * (16 + 16) * 4
            assert count == {
                "softmax": softmax, "window": window, "state": state, "total": softmax + window + state
            }  # fmt: skip

    def test_half_precision(self):
        """The window in the model's dtype, the state in float32."""
        tokens = make_tokens(2, 30)
        wide, half = (
            cache_bytes(in_pieces(make_student("llama", "gate", dtype), [30], tokens)[1])
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert half["window"] * 2 == wide["window"]
        assert half["state"] == wide["state"] > 0

    def test_of_an_original(self):
        model, tokens = make_model("llama"), make_tokens(2, 30)
        with torch.no_grad():
            cache = model(tokens, use_cache=True).past_key_values
        size = 3 * 2 * 2 * 30 * 32 * 4
        assert cache_bytes(cache) == {"softmax": size, "window": 0, "state": 0, "total": size}

    def test_of_an_empty_cache(self):
        student = make_student("llama", "gate", softmax_layers=[1])
        assert cache_bytes(new_cache(student.config, [0, 2])) == dict.fromkeys(
            ("softmax", "window", "state", "total"), 0
        )


def generate(model, tokens, **options):
    """Tokens after the prompt; 14 of them, without an end, unless named."""
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(tokens, **options)[:, tokens.shape[1] :]


class TestGenerate:
    @pytest.mark.parametrize(("family", "far", "kept"), CASES)
    def test_greedy(self, family, far, kept):
        student, tokens = make_student(family, far, softmax_layers=kept), make_tokens(2, 19)
        out = generate(student, tokens)
        assert out.shape == (2, 14)
        assert torch.equal(out, generate(student, tokens, use_cache=False))
        # And by hand: the most likely token, again and again.
        text = tokens
        for _ in range(14):
            text = torch.cat([text, one_pass(student, text)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(out, text[:, 19:])

    @pytest.mark.parametrize(("family", "far", "kept"), CASES)
    def test_left_padded_batch(self, family, far, kept):
        student, tokens = make_student(family, far, softmax_layers=kept), make_tokens(3, 19)
        amounts = [0, 6, 13]
        rows, mask = pad(tokens, amounts, "left")
        out = generate(student, rows, attention_mask=mask)
        assert torch.equal(out, generate(student, rows, attention_mask=mask, use_cache=False))
        for i, amount in enumerate(amounts):
            assert torch.equal(out[i : i + 1], generate(student, tokens[i : i + 1, : 19 - amount]))

    @pytest.mark.parametrize("kept", ["none", [1]])
    @pytest.mark.parametrize("padded", [False, True])
    def test_sampling_with_several_sequences(self, padded, kept):
        student, tokens = make_student("llama", "normalizer", softmax_layers=kept), make_tokens(2, 19)
        rows, mask = pad(tokens, [0, 6 if padded else 0], "left")
        options = {"attention_mask": mask, "do_sample": True, "num_return_sequences": 3, "top_k": 0}
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(4)
            drawn.append(generate(student, rows, use_cache=use_cache, **options))
        assert drawn[0].shape == (6, 14)
        assert torch.equal(*drawn)
        assert len({tuple(row.tolist()) for row in drawn[0]}) == 6

    @pytest.mark.parametrize("kept", ["none", [1]])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("far", FAR)
    def test_beam_search(self, far, padded, kept):
        student, tokens = make_student("qwen3", far, softmax_layers=kept), make_tokens(2, 19)
        rows, mask = pad(tokens, [0, 6 if padded else 0], "left")
        options = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 2, "output_scores": True}
        out, recomputed = (
            student.generate(
                rows, max_new_tokens=14, do_sample=False, pad_token_id=0, use_cache=use_cache,
                return_dict_in_generate=True, **options,
            )
            for use_cache in (True, False)
        )  # fmt: skip
        assert out.sequences.shape == (4, 33)
        assert torch.equal(out.sequences, recomputed.sequences)
        torch.testing.assert_close(out.sequences_scores, recomputed.sequences_scores, **LOGITS)
        # Beams did change places, or the cache would never have been reordered.
        assert any(len(set(row)) > 1 for row in out.beam_indices[:, 1:].tolist())

    def test_rows_that_end_early(self):
        student, tokens = make_student("llama", "gate"), make_tokens(3, 19)
        free = generate(student, tokens)
        end = int(free[0, 4])
        out = generate(student, tokens, eos_token_id=end)
        assert torch.equal(out, generate(student, tokens, eos_token_id=end, use_cache=False))
        assert bool((out[0, 5:] == 0).all())

    @pytest.mark.parametrize("kept", ["none", [1]])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("far", FAR)
    def test_continued_turns(self, far, padded, kept):
        """Three turns on one cache: what was said, what was answered, what is said next."""
        student = make_student("mistral", far, softmax_layers=kept)
        text, mask = pad(make_tokens(2, 19), [0, 6 if padded else 0], "left")
        cache = None
        for turn in range(3):
            out = student.generate(
                text, attention_mask=mask, past_key_values=cache, max_new_tokens=9, do_sample=False, pad_token_id=0,
                return_dict_in_generate=True,
            )  # fmt: skip
            expected = generate(student, text, attention_mask=mask, max_new_tokens=9, use_cache=False)
            assert torch.equal(out.sequences[:, text.shape[1] :], expected)
            cache = out.past_key_values
            assert cache.get_seq_length() == out.sequences.shape[1] - 1
            text = torch.cat([out.sequences, make_tokens(2, 7, seed=10 + turn)], dim=1)
            mask = torch.cat([mask, torch.ones(2, text.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)

    @pytest.mark.parametrize("kept", ["none", [1]])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("size", [5, 8, 50])
    def test_prefill_in_pieces(self, size, padded, kept):
        student, tokens = make_student("llama", "normalizer", softmax_layers=kept), make_tokens(2, 33)
        rows, mask = pad(tokens, [0, 6 if padded else 0], "left")
        out = generate(student, rows, attention_mask=mask, prefill_chunk_size=size)
        assert torch.equal(out, generate(student, rows, attention_mask=mask))

    @pytest.mark.parametrize("make", [DynamicCache, lambda: DynamicCache(config=make_config("llama"))])
    @pytest.mark.parametrize("kept", ["none", [1]])
    def test_cache_of_the_user(self, kept, make):
        student, tokens = make_student("llama", "normalizer", softmax_layers=kept), make_tokens(2, 19)
        cache = make()
        assert torch.equal(generate(student, tokens, past_key_values=cache), generate(student, tokens))
        assert [type(layer) is NearFarLayer for layer in cache.layers] == [True, kept == "none", True]

    def test_half_precision(self):
        for dtype in (torch.bfloat16, torch.float16):
            out = generate(make_student("llama", "normalizer", dtype), make_tokens(2, 19))
            assert out.shape == (2, 14)

    def test_adapted_student(self):
        from peft import LoraConfig, get_peft_model

        student, tokens = make_student("llama", "normalizer"), make_tokens(2, 19)
        torch.manual_seed(5)
        adapted = get_peft_model(
            student, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        ).eval()
        assert torch.equal(generate(adapted, tokens), generate(adapted, tokens, use_cache=False))

    def test_gradients_on(self):
        """A single token takes another path with gradients; the numbers are the same."""
        student, tokens = make_student("llama", "normalizer"), make_tokens(2, 30)
        cache, out = None, []
        for t in range(30):
            result = student(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(result.logits)
        torch.testing.assert_close(torch.cat(out, dim=1).detach(), one_pass(student, tokens), **LOGITS)


class TestBadInputs:
    @staticmethod
    def message(use):
        with pytest.raises(LinearizeError) as error:
            use()
        return str(error.value)

    def test_cache_of_the_original(self):
        student, tokens = make_student("llama", "gate"), make_tokens(2, 9)
        with original_attention(student), torch.no_grad():
            cache = student(tokens, use_cache=True).past_key_values
        assert self.message(lambda: student(tokens, past_key_values=cache)) == (
            "cache: layer 0 holds 9 tokens of a DynamicLayer, made by the original attention; start a new cache for "
            "the converted model"
        )

    def test_cache_with_too_few_layers(self):
        student = make_student("llama", "gate")
        cache = DynamicCache(config=make_config("llama", num_hidden_layers=2))
        assert self.message(lambda: student(make_tokens(2, 9), past_key_values=cache)) == (
            "cache: it has 2 layers but the model needs layer 2"
        )

    def test_other_number_of_rows(self):
        student = make_student("llama", "gate")
        _, cache = in_pieces(student, [9], make_tokens(2, 9))
        assert self.message(lambda: student(make_tokens(3, 1), past_key_values=cache)) == (
            "cache: it holds 2 rows but the batch has 3; reorder or repeat the cache first, or start a new one"
        )

    def test_cache_of_the_student_in_the_original(self):
        student = make_student("llama", "gate")
        _, cache = in_pieces(student, [9], make_tokens(2, 9))
        with original_attention(student), pytest.raises(LinearizeError, match="the original attention needs every key"):
            student(make_tokens(2, 1), past_key_values=cache)

    def test_cache_of_another_window(self):
        _, cache = in_pieces(make_student("llama", "gate", window=4), [9], make_tokens(2, 9))
        other = randomize_far(convert(make_model("llama"), LinearizeConfig(window=8, sinks=2, mix="gate")))
        assert self.message(lambda: other(make_tokens(2, 1), past_key_values=cache)) == (
            "cache: it was made with window 4, 2 sinks and a state, which are not this model's; start a new cache"
        )
