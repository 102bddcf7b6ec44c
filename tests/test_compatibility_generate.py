"""`generate` on a student: with a cache as without, in a padded batch as row by row, in all of transformers' modes.

The original runs through the same tests: they are the bar. Prompts are long enough for the state to be in use.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache, StoppingCriteria, TextIteratorStreamer, TextStreamer

from tests.parity import LOGITS, ORIGINAL, WINDOW, Case, covering, in_pieces, left_padded, make, positions_of
from tests.tiny_models import make_tokens
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

NEW = 8
MODELS = (
    Case("llama", ORIGINAL),
    Case("llama", "normalizer"),
    Case("qwen3", "gate", (1,)),
    Case("qwen3", "gla", (0,)),
)
LENGTHS = (5 * WINDOW + 3, 3 * WINDOW + 2)


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request):
    return make(request.param)


@pytest.fixture
def texts():
    return [row[:length] for row, length in zip(make_tokens(2, max(LENGTHS)), LENGTHS, strict=True)]


def generate(model, tokens, mask=None, **options):
    """What `generate` returns; NEW tokens without an end unless named."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(tokens, attention_mask=mask, **options)


def drawn(model, tokens, mask=None, seed=4, **options):
    """The same, sampled."""
    torch.manual_seed(seed)
    return generate(model, tokens, mask, **{"do_sample": True, "top_k": 0} | options)


def agree(model, texts, call=generate, rows=True, **options):
    """The tokens of a left-padded batch, (rows, width + new), which must be those without a cache and, unless they
    are drawn, those of each text alone."""
    tokens, mask = left_padded(texts)
    out = call(model, tokens, mask, **options)
    assert torch.equal(out, call(model, tokens, mask, use_cache=False, **options))
    several = out.shape[0] // len(texts)
    for i, text in enumerate(texts if rows else texts[-1:]):
        single = call(model, text[None], **options)
        if rows:
            assert torch.equal(out[i * several : (i + 1) * several, tokens.shape[1] :], single[:, len(text) :])
        else:  # other numbers are drawn for a batch of another size
            assert torch.equal(single, call(model, text[None], use_cache=False, **options))
    return out


class TestModes:
    def test_greedy(self, model, texts):
        assert agree(model, texts).shape == (2, max(LENGTHS) + NEW)

    def test_greedy_with_processors(self, model, texts):
        """What looks at the text so far, and changes the scores, does not depend on the cache."""
        agree(model, texts, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=5)

    def test_rows_that_end_early(self, model, texts):
        tokens, mask = left_padded(texts)
        end = int(generate(model, tokens, mask)[1, tokens.shape[1] + 3])
        out = generate(model, tokens, mask, eos_token_id=end)
        assert torch.equal(out, generate(model, tokens, mask, eos_token_id=end, use_cache=False))
        assert bool((out[1, tokens.shape[1] + 4 :] == 0).all())

    def test_stopping_criteria(self, model, texts):
        class After(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((input_ids.shape[0],), input_ids.shape[1] >= max(LENGTHS) + 5)

        tokens, mask = left_padded(texts)
        out = generate(model, tokens, mask, stopping_criteria=[After()])
        assert out.shape[1] == max(LENGTHS) + 5
        assert torch.equal(out, generate(model, tokens, mask)[:, : out.shape[1]])

    @pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9, "temperature": 0.7}], ids=["all", "likeliest"])
    def test_sampling(self, model, texts, options):
        out = agree(model, texts, drawn, rows=False, **options)
        assert not torch.equal(out, drawn(model, *left_padded(texts), seed=5, **options))

    def test_several_sequences(self, model, texts):
        out = agree(model, texts, drawn, rows=False, num_return_sequences=3)
        assert len({tuple(row.tolist()) for row in out}) == 6

    def test_beam_search(self, model, texts):
        agree(model, texts, num_beams=3)

    def test_beam_search_with_several_sequences(self, model, texts):
        assert agree(model, texts, num_beams=4, num_return_sequences=2, length_penalty=0.5).shape[0] == 4

    def test_beam_scores(self, model, texts):
        tokens, mask = left_padded(texts)
        options = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
        out, again = (generate(model, tokens, mask, use_cache=use_cache, **options) for use_cache in (True, False))
        torch.testing.assert_close(out.sequences_scores, again.sequences_scores, **LOGITS)
        assert torch.equal(out.beam_indices, again.beam_indices)
        # Beams did change places, or the cache would never have been reordered.
        assert any(len(set(row)) > 1 for row in out.beam_indices[:, 1:].tolist())

    def test_beam_sample(self, model, texts):
        agree(model, texts, drawn, rows=False, num_beams=3)

    def test_what_transformers_has_moved_to_the_hub(self, model, texts):
        """Contrastive search, DoLa and group beams are code on the hub now: for the original as for the student."""
        for options in (
            {"penalty_alpha": 0.6, "top_k": 4},
            {"dola_layers": "low"},
            {"num_beams": 4, "num_beam_groups": 2},
        ):
            with pytest.raises((ValueError, OSError)):
                generate(model, texts[0][None], **options)


class TestOutputs:
    def test_scores_and_logits(self, model, texts):
        """Both are the logits of the text that came out, read in one pass."""
        tokens, mask = left_padded(texts)
        out = generate(model, tokens, mask, output_scores=True, output_logits=True, return_dict_in_generate=True)
        full = torch.cat([mask, torch.ones(2, NEW, dtype=mask.dtype)], dim=1)
        with torch.no_grad():
            logits = model(out.sequences, attention_mask=full, position_ids=positions_of(full), use_cache=False).logits[
                :, -NEW - 1 : -1
            ]
        torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, **LOGITS)
        torch.testing.assert_close(torch.stack(out.scores, dim=1), logits, **LOGITS)

    def test_hidden_states(self, model, texts):
        tokens, mask = left_padded(texts)
        options = {"output_hidden_states": True, "return_dict_in_generate": True}
        out, again = (generate(model, tokens, mask, use_cache=use_cache, **options) for use_cache in (True, False))
        assert len(out.hidden_states) == NEW
        for step, redone in zip(out.hidden_states, again.hidden_states, strict=True):
            for layer, expected in zip(step, redone, strict=True):
                torch.testing.assert_close(layer[:, -1], expected[:, -1], **LOGITS)

    def test_streamers(self, model):
        """Text that is streamed is the text that is returned; the tokens are written one by one."""
        tokenizer, tokens = tiny_tokenizer(), make_tokens(1, 43) % len(VOCABULARY)
        allowed = {"suppress_tokens": list(range(len(VOCABULARY), model.config.vocab_size))}
        out = generate(model, tokens, **allowed)
        said = tokenizer.decode(out[0, tokens.shape[1] :])
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        assert torch.equal(generate(model, tokens, streamer=streamer, **allowed), out)
        assert "".join(streamer) == said

    def test_streamer_to_the_console(self, model, capsys):
        tokenizer, tokens = tiny_tokenizer(), make_tokens(1, 43) % len(VOCABULARY)
        allowed = {"suppress_tokens": list(range(len(VOCABULARY), model.config.vocab_size))}
        out = generate(model, tokens, streamer=TextStreamer(tokenizer, skip_prompt=True), **allowed)
        assert capsys.readouterr().out == tokenizer.decode(out[0, tokens.shape[1] :]) + "\n"


class TestInputs:
    def test_mask_or_none(self, model, texts):
        tokens = texts[0][None]
        options = {"max_new_tokens": NEW, "do_sample": False}
        assert torch.equal(model.generate(tokens, **options), generate(model, tokens))

    def test_embeddings(self, model, texts):
        tokens, mask = left_padded(texts)
        embedded = model.get_input_embeddings()(tokens)
        out = model.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, generate(model, tokens, mask)[:, tokens.shape[1] :])
        both = generate(model, tokens, mask, inputs_embeds=embedded)
        assert torch.equal(both, generate(model, tokens, mask))

    def test_embeddings_into_a_given_cache(self, model, texts):
        tokens, mask = left_padded(texts)
        embedded, cache = model.get_input_embeddings()(tokens), DynamicCache(config=model.config)
        options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
        out = model.generate(inputs_embeds=embedded, past_key_values=cache, **options)
        assert torch.equal(out, generate(model, tokens, mask)[:, tokens.shape[1] :])

    @pytest.mark.parametrize("size", [5, WINDOW, 50])
    def test_prefill_in_pieces(self, model, texts, size):
        tokens, mask = left_padded(texts)
        assert torch.equal(generate(model, tokens, mask, prefill_chunk_size=size), generate(model, tokens, mask))

    def test_a_cache_from_forward(self, model, texts):
        """The prompt goes in by hand, all of it but its last token, and `generate` goes on."""
        tokens, mask = left_padded(texts)
        _, cache = in_pieces(model, [30, 1], tokens[:, :-1], mask[:, :-1])
        assert torch.equal(generate(model, tokens, mask, past_key_values=cache), generate(model, tokens, mask))

    def test_a_chat_goes_on(self, model, texts):
        """Two turns: what was said, what was answered, what is said next; the other way recomputes everything."""
        tokens, mask = left_padded(texts)
        cache = None
        for turn in range(2):
            out = generate(model, tokens, mask, past_key_values=cache, return_dict_in_generate=True)
            assert torch.equal(out.sequences, generate(model, tokens, mask, use_cache=False))
            cache = out.past_key_values
            assert cache.get_seq_length() == out.sequences.shape[1] - 1
            tokens = torch.cat([out.sequences, make_tokens(2, 7, seed=10 + turn)], dim=1)
            mask = torch.cat([mask, torch.ones(2, tokens.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)

    def test_one_prefill_for_several_sequences(self, model, texts):
        """`num_return_sequences` reads the prompt once a sequence; a cache that is repeated after one reading does
        the same with less."""
        tokens, mask = left_padded(texts)
        _, cache = in_pieces(model, [tokens.shape[1] - 1], tokens[:, :-1], mask[:, :-1])
        cache.batch_repeat_interleave(3)
        repeated = tokens.repeat_interleave(3, dim=0), mask.repeat_interleave(3, dim=0)
        assert torch.equal(
            drawn(model, *repeated, past_key_values=cache), drawn(model, tokens, mask, num_return_sequences=3)
        )

    def test_half_of_the_batch_goes_on(self, model, texts):
        tokens, mask = left_padded(texts)
        out = generate(model, tokens, mask, return_dict_in_generate=True)
        out.past_key_values.batch_select_indices(torch.tensor([1]))
        longer = torch.cat([mask, torch.ones(2, NEW, dtype=mask.dtype)], dim=1)[[1]]
        actual = generate(model, out.sequences[[1]], longer, past_key_values=out.past_key_values)
        assert torch.equal(actual, generate(model, out.sequences[[1]], longer, use_cache=False))


class TestCaches:
    def test_a_cache_of_the_user(self, model, texts):
        tokens, mask = left_padded(texts)
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            assert torch.equal(generate(model, tokens, mask, past_key_values=cache), generate(model, tokens, mask))
            assert cache.get_seq_length() == tokens.shape[1] + NEW - 1

    def test_static(self, model, texts):
        tokens, mask = left_padded(texts)
        expected = generate(model, tokens, mask)
        assert torch.equal(generate(model, tokens, mask, cache_implementation="static"), expected)
        cache = StaticCache(config=model.config, max_cache_len=96)
        assert torch.equal(generate(model, tokens, mask, past_key_values=cache), expected)
        assert cache.is_compileable
        cache.reset()  # transformers uses a static cache again
        assert torch.equal(generate(model, tokens, mask, past_key_values=cache), expected)

    def test_static_with_beams_and_pieces(self, model, texts):
        tokens, mask = left_padded(texts)
        for options in ({"num_beams": 3}, {"prefill_chunk_size": 16}):
            static = generate(model, tokens, mask, cache_implementation="static", **options)
            assert torch.equal(static, generate(model, tokens, mask, **options))


HELPERS = (Case("llama", ORIGINAL), Case("llama", "normalizer"), Case("mistral", "none", (0,)), Case("qwen2", "gla"))


class TestAssisted:
    """Candidates are tried and some are taken back. What comes out is what greedy decoding writes."""

    @staticmethod
    def check(model, tokens, **options):
        expected = generate(model, tokens)
        out = generate(model, tokens, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, expected)
        cache = out.past_key_values
        assert cache.get_seq_length() == expected.shape[1] - 1
        longer = torch.cat([expected, make_tokens(1, 7, seed=10)], dim=1)
        assert torch.equal(generate(model, longer, past_key_values=cache), generate(model, longer, use_cache=False))

    @pytest.mark.parametrize("case", [*MODELS, Case("qwen3", "none", (0,)), Case("qwen2", "peak")], ids=str)
    def test_prompt_lookup(self, case):
        self.check(make(case), make_tokens(1, 15).repeat(1, 3), prompt_lookup_num_tokens=3)

    @pytest.mark.parametrize(
        ("case", "helper", "seed", "candidates"), covering(MODELS, HELPERS, (0, 1), (3, 2 * WINDOW + 1)), ids=str
    )
    def test_an_assistant_model(self, case, helper, seed, candidates):
        """An original or a student helps: with the model's own weights (seed 0) it is often right, else never."""
        assistant = make(helper, seed=seed)
        assistant.generation_config.num_assistant_tokens = candidates
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        self.check(make(case), make_tokens(1, 43), assistant_model=assistant)
