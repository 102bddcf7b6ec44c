"""Unusual and wrong inputs: what the original accepts gives what it should, what cannot work says so in one line."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from linearize import LinearizeConfig, LinearizeError, convert, original_attention
from tests.parity import (
    LENGTH,
    LOGITS,
    MODELS,
    ORIGINAL,
    STUDENTS,
    Case,
    alone,
    everywhere,
    in_pieces,
    left_padded,
    make,
    positions_of,
    student,
)
from tests.tiny_models import make_model, make_tokens

READ = 35
RESTART = torch.cat([torch.arange(25), torch.arange(LENGTH - 25)])[None]


def logits_of(model, *args, **options):
    with torch.no_grad():
        return model(*args, **options).logits


class Asked(TorchDispatchMode):
    """Counts how often the host waits for a number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def message(use):
    """The one line of the error that `use` raises."""
    with pytest.raises(LinearizeError) as error:
        use()
    assert "\n" not in str(error.value)
    return str(error.value)


class TestMasks:
    @everywhere
    @pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32], ids=str)
    def test_dtypes(self, case, dtype):
        model, texts = make(case), [row[:n] for row, n in zip(make_tokens(2, LENGTH), (LENGTH, 41), strict=True)]
        tokens, mask = left_padded(texts)
        inputs = {"attention_mask": mask.to(dtype), "position_ids": positions_of(mask)}
        actual = logits_of(model, tokens, **inputs)[mask.bool()]
        torch.testing.assert_close(actual, torch.cat(alone(model, texts)), **LOGITS)

    @everywhere
    @pytest.mark.parametrize("cached", [False, True])
    def test_room_for_the_future(self, case, cached):
        """A mask that is allocated once, at full length, and is 0 where nothing was said yet."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        expected = torch.stack(alone(model, list(tokens)))
        mask = (torch.arange(LENGTH) < READ).long().expand(2, -1)
        if cached:
            _, cache = in_pieces(model, [READ - 5], tokens[:, : READ - 5])
            actual = logits_of(model, tokens[:, READ - 5 : READ], attention_mask=mask, past_key_values=cache)
            torch.testing.assert_close(actual, expected[:, READ - 5 : READ], **LOGITS)
        else:
            actual = logits_of(model, tokens[:, :READ], attention_mask=mask, use_cache=False)
            torch.testing.assert_close(actual, expected[:, :READ], **LOGITS)

    @everywhere
    @pytest.mark.parametrize("use_cache", [False, True])
    def test_left_padding_without_positions(self, case, use_cache):
        """Rotary attention is relative, so the original needs none; a state's features are not."""
        model, texts = make(case), [row[:n] for row, n in zip(make_tokens(2, LENGTH), (LENGTH, 41), strict=True)]
        tokens, mask = left_padded(texts)
        actual = logits_of(model, tokens, attention_mask=mask, use_cache=use_cache)[mask.bool()]
        torch.testing.assert_close(actual, torch.cat(alone(model, texts)), **LOGITS)

    @everywhere
    def test_a_row_of_nothing(self, case):
        """A row that is all padding: its outputs are of no use but finite, and the other rows are as they are."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        mask = torch.ones_like(tokens)
        mask[1] = 0
        positions = positions_of(mask)
        logits = logits_of(model, tokens, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(logits[0], alone(model, [tokens[0]])[0], **LOGITS)
        assert bool(logits.isfinite().all())
        pieces, _ = in_pieces(model, [READ, 1], tokens, mask)
        torch.testing.assert_close(pieces[0], logits[0], **LOGITS)
        assert bool(pieces.isfinite().all())

    @student
    def test_four_dimensions(self, case):
        """Which token sees which is not a converted layer's to choose."""
        mask = torch.ones(LENGTH, LENGTH).tril().bool().expand(2, 1, -1, -1)
        assert message(lambda: make(case)(make_tokens(2, LENGTH), attention_mask=mask)) == (
            f"attention_mask: (2, 1, {LENGTH}, {LENGTH}) is not (batch, tokens); a converted layer takes a 2-D mask of "
            "real tokens only"
        )

    @student
    def test_too_short(self, case):
        mask = torch.ones(2, 50, dtype=torch.long)
        assert message(lambda: make(case)(make_tokens(2, LENGTH), attention_mask=mask)) == (
            f"attention_mask: it covers 50 tokens but {LENGTH} are given; make it cover all, past and new"
        )

    @student
    @pytest.mark.parametrize("new", [1, 5])
    def test_hidden_later(self, case, new):
        """A state cannot forget a token."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        _, cache = in_pieces(model, [READ], tokens[:, :READ])
        mask = torch.ones_like(tokens)[:, : READ + new]
        mask[1, 9:12] = 0
        for positions in (None, torch.arange(READ, READ + new)[None]):
            options = {"attention_mask": mask, "past_key_values": cache, "position_ids": positions}
            assert message(lambda o=options: model(tokens[:, READ : READ + new], **o)) == (
                f"attention_mask: row 1 hides 3 of the {READ} tokens that the cache has read, and what is in a state "
                "stays there; start a new cache from the texts without them"
            )

    @pytest.mark.parametrize("far", ["normalizer", "none", "gla"])
    def test_of_the_new_tokens_alone(self, far):
        """Padded, and as many as were read and more: nothing is hidden. Softmax layers want a mask of all tokens."""
        model, tokens = make(Case("llama", far)), make_tokens(2, LENGTH)
        expected = alone(model, [tokens[0], tokens[1, torch.arange(LENGTH) != 10]])
        _, cache = in_pieces(model, [10], tokens[:, :10])
        mask = torch.ones(2, LENGTH - 10, dtype=torch.long)
        mask[1, 0] = 0
        found = logits_of(model, tokens[:, 10:], attention_mask=mask, past_key_values=cache)
        torch.testing.assert_close(found[1, 1:], expected[1][10:], **LOGITS)

    @student
    def test_pads_of_a_chat(self, case):
        """The same by `generate`: a row that ended early was filled up with pads, which the next turn hides."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        first = model.generate(tokens[:, :READ], max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
        history = torch.cat([first.sequences, tokens[:, READ : READ + 5]], dim=1)
        mask = torch.ones_like(history)
        mask[0, READ + 3 : READ + 9] = 0
        options = {"attention_mask": mask, "past_key_values": first.past_key_values, "max_new_tokens": 3}
        said = message(lambda: model.generate(history, do_sample=False, **options))
        assert said.startswith(f"attention_mask: row 0 hides 5 of the {READ + 8} tokens that the cache has read")


class TestPositions:
    """Under a window that covers the text a student is its original, so any positions give the original's logits."""

    @pytest.mark.parametrize("masked", [True, False])
    @pytest.mark.parametrize(
        "positions",
        [
            torch.arange(LENGTH)[None] * 3,
            torch.arange(LENGTH)[None] + 7,
            torch.arange(LENGTH)[None] // 2,
            torch.arange(LENGTH)[None] - 9,
            torch.arange(LENGTH)[None] * 0.5,
        ],
        ids=["every third", "later", "every one twice", "negative", "halves"],
    )
    def test_as_the_original_takes_them(self, positions, masked):
        """Without a mask positions that do not go up by one tell documents apart, in both."""
        config = LinearizeConfig(window=LENGTH, softmax_layers=(0,))
        original, converted = (make_model("qwen3", num_hidden_layers=2) for _ in range(2))
        convert(converted, config)
        tokens, options = make_tokens(2, LENGTH), {"position_ids": positions, "use_cache": False}
        if masked:
            options["attention_mask"] = torch.ones_like(tokens)
        actual, expected = logits_of(converted, tokens, **options), logits_of(original, tokens, **options)
        torch.testing.assert_close(actual, expected, **LOGITS)

    @pytest.mark.parametrize("positions", [torch.arange(LENGTH).flip(0)[None], RESTART], ids=["backwards", "restart"])
    def test_without_a_mask_they_tell_documents_apart(self, positions):
        config = LinearizeConfig(window=LENGTH, softmax_layers=(0,))
        original, converted = (make_model("qwen3", num_hidden_layers=2) for _ in range(2))
        convert(converted, config)
        tokens, options = make_tokens(2, LENGTH), {"position_ids": positions, "use_cache": False}
        actual, expected = logits_of(converted, tokens, **options), logits_of(original, tokens, **options)
        torch.testing.assert_close(actual, expected, **LOGITS)

    @student
    def test_backwards(self, case):
        model, tokens = make(case), make_tokens(2, LENGTH)
        mask, positions = torch.ones_like(tokens), torch.arange(LENGTH).repeat(2, 1)
        positions[1, 9] = 4
        for use_cache in (False, True):
            options = {"attention_mask": mask, "use_cache": use_cache}
            assert message(lambda o=options: model(tokens, position_ids=positions, **o)) == (
                "position_ids: token 9 of row 1 goes back to position 4, below 8, where the tokens before it end; "
                "count on, crop the cache first, or give texts that share a row without attention_mask and with "
                "use_cache=False"
            )
        with original_attention(model):
            model(tokens, position_ids=positions, attention_mask=mask)

    @student
    @pytest.mark.parametrize("masked", [True, False])
    def test_backwards_with_a_past(self, case, masked):
        model, tokens = make(case), make_tokens(2, LENGTH)
        _, cache = in_pieces(model, [READ], tokens[:, :READ])
        for new in (1, 3):
            options = {"attention_mask": torch.ones(2, READ + new, dtype=torch.long)} if masked else {}
            positions = torch.arange(READ - 1, READ - 1 + new)[None]
            said = message(lambda o=options, p=positions, n=new: model(
                tokens[:, READ : READ + n], position_ids=p, past_key_values=cache, **o
            ))  # fmt: skip
            assert said.startswith(
                f"position_ids: token 0 of row 0 goes back to position {READ - 1}, below {READ}, where the tokens "
                "before it end; count on, crop the cache first"
            )
        assert cache.get_seq_length() == READ
        expected = alone(model, list(tokens))
        positions = torch.arange(READ, LENGTH)[None]
        found = logits_of(model, tokens[:, READ:], position_ids=positions, past_key_values=cache)
        torch.testing.assert_close(found, torch.stack(expected)[:, READ:], **LOGITS)

    @student
    def test_gaps_with_a_past(self, case):
        """Positions are known to be behind what was read by the number of its tokens."""
        model, tokens = make(case), make_tokens(1, LENGTH)
        positions = 3 * torch.arange(LENGTH)[None]
        options = {"position_ids": positions, "attention_mask": torch.ones_like(tokens)}
        expected = logits_of(model, tokens, use_cache=False, **options)
        cache = DynamicCache()
        logits_of(model, tokens[:, :READ], position_ids=positions[:, :READ], past_key_values=cache,
                  attention_mask=options["attention_mask"][:, :READ])  # fmt: skip
        options |= {"position_ids": positions[:, READ:], "past_key_values": cache}
        torch.testing.assert_close(logits_of(model, tokens[:, READ:], **options), expected[:, READ:], **LOGITS)

    @pytest.mark.parametrize("case", [case for case in STUDENTS if case.far != "gla"], ids=str)
    def test_a_step_for_graphs_is_not_asked(self, case):
        """No check waits for the device."""
        model, tokens = make(case), make_tokens(1, LENGTH)
        cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        logits_of(model, tokens[:, :READ], past_key_values=cache)
        with torch.no_grad(), Asked() as asked:
            model(tokens[:, READ : READ + 1], past_key_values=cache)
        assert asked.count == 0

    @student
    def test_padding_has_any_position(self, case):
        """Tokens that nobody reads may say what they like, and a row's own count is what its tokens are held to."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        mask = torch.ones_like(tokens)
        mask[1, :11] = 0
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 40)
        expected = alone(model, [tokens[0], tokens[1, 11:]])
        _, cache = in_pieces(model, [READ], tokens[:, :READ], mask=mask[:, :READ])
        options = {"attention_mask": mask, "position_ids": positions[:, READ:], "past_key_values": cache}
        rest = logits_of(model, tokens[:, READ:], **options)
        torch.testing.assert_close(rest[1], expected[1][READ - 11 :], **LOGITS)
        whole = logits_of(model, tokens, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(whole[1, 11:], expected[1], **LOGITS)

    @student
    def test_documents_with_a_cache(self, case):
        """No cache can go on with several documents of one row."""
        model, tokens = make(case), make_tokens(1, LENGTH)
        for options in ({}, {"past_key_values": DynamicCache()}):
            assert "packed documents" in message(lambda o=options: model(tokens, position_ids=RESTART, **o))

    def test_documents_with_a_cache_in_the_original(self):
        """There a cache silently mixes the documents: no bar for the student."""
        model, tokens = make(MODELS[0]), make_tokens(1, LENGTH)
        apart = torch.cat(alone(model, [tokens[0, :25], tokens[0, 25:]]))
        torch.testing.assert_close(logits_of(model, tokens, position_ids=RESTART, use_cache=False)[0], apart, **LOGITS)
        mixed = logits_of(model, tokens, position_ids=RESTART, use_cache=True)[0]
        assert (mixed - apart).abs().max() > 1


class TestCaches:
    @student
    def test_another_number_of_rows(self, case):
        model, tokens = make(case), make_tokens(2, LENGTH)
        for rows in (1, 3):
            _, cache = in_pieces(model, [READ], tokens[:, :READ])
            assert message(lambda r=rows, c=cache: model(make_tokens(r, 1), past_key_values=c)).startswith(
                f"cache: it holds 2 rows but the batch has {rows}; reorder or repeat the cache first"
            )

    @pytest.mark.parametrize(
        ("case", "maker", "says"),
        [
            (Case("llama", "normalizer"), Case("llama", ORIGINAL), "made by the original attention; start a new cache"),
            (
                Case("llama", "normalizer"),
                Case("llama", "none"),
                "no state, which are not this model's; start a new cache",
            ),
            (Case("llama", "none"), Case("llama", "gate"), "a state, which are not this model's; start a new cache"),
            (Case("llama", "gla"), Case("llama", "gate"), "the memory holds a state of shape"),
            (
                Case("llama", "gate"),
                Case("qwen3", "gate"),
                "the memory holds 2 rows of 2 key heads, torch.float32 of 32",
            ),
            (Case("llama", "gate", (1,)), Case("llama", "gate"), "the original attention needs every key and value"),
            (Case("llama", "gate"), Case("llama", "gate", (0,)), "made by the original attention; start a new cache"),
            (Case("llama", ORIGINAL), Case("llama", "gate"), "the original attention needs every key and value"),
        ],
        ids=lambda value: str(value).replace(" ", "_"),
    )
    def test_of_another_model(self, case, maker, says):
        tokens = make_tokens(2, LENGTH)
        _, cache = in_pieces(make(maker), [READ], tokens[:, :READ])
        assert says in message(lambda: make(case)(tokens[:, READ:], past_key_values=cache))

    def test_of_another_window(self):
        tokens, other = (
            make_tokens(2, LENGTH),
            convert(make_model("llama", num_hidden_layers=2), LinearizeConfig(window=16)),
        )
        _, cache = in_pieces(make(Case("llama", "normalizer")), [READ], tokens[:, :READ])
        assert "which are not this model's; start a new cache" in message(
            lambda: other(tokens[:, READ:], past_key_values=cache)
        )

    def test_of_another_dtype(self):
        tokens, case = make_tokens(2, LENGTH), Case("llama", "normalizer")
        _, cache = in_pieces(make(case, torch.bfloat16), [READ], tokens[:, :READ])
        assert "torch.bfloat16" in message(lambda: make(case)(tokens[:, READ:], past_key_values=cache))

    @student
    def test_of_fewer_layers(self, case):
        tokens, model = make_tokens(2, LENGTH), make(case, num_hidden_layers=3)
        cache = DynamicCache(config=make(case).config)
        assert (
            message(lambda: model(tokens, past_key_values=cache))
            == "cache: it has 2 layers but the model needs layer 2"
        )

    @everywhere
    def test_crop_by_a_length(self, case):
        """Once a positive number was the length to keep; transformers refuses it now, and so do converted layers."""
        _, cache = in_pieces(make(case), [READ], make_tokens(2, READ))
        with pytest.raises(ValueError, match=str(READ - 2)):
            cache.crop(READ - 2)


class TestInputs:
    @everywhere
    def test_both_kinds_of_tokens(self, case):
        model, tokens = make(case), make_tokens(2, LENGTH)
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(tokens, inputs_embeds=model.get_input_embeddings()(tokens))

    @everywhere
    def test_no_tokens_at_all(self, case):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            make(case)()

    @everywhere
    def test_a_token_that_is_none(self, case):
        with pytest.raises(IndexError):
            make(case)(make_tokens(2, LENGTH) + 1000)
