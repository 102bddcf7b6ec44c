"""What else is done with a transformers model: outputs, training, other vocabularies, copies, files, pipelines."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, pipeline

from linearize import LinearizeError
from tests.parity import LENGTH, LOGITS, ORIGINAL, Case, alone, in_pieces, make
from tests.tiny_models import VOCAB, make_tokens
from tests.tiny_tokenizer import tiny_tokenizer

MODELS = (
    Case("llama", ORIGINAL),
    Case("llama", "normalizer"),  # its language head is tied to its embeddings
    Case("qwen3", "peak", (1,)),
    Case("qwen3", "gla"),
)
STUDENTS = MODELS[1:]
everywhere = pytest.mark.parametrize("case", MODELS, ids=str)
student = pytest.mark.parametrize("case", STUDENTS, ids=str)


def run(model, tokens, **options):
    """Logits."""
    with torch.no_grad():
        return model(tokens, **options).logits


class TestOutputs:
    @everywhere
    @pytest.mark.parametrize("keep", [1, 5, torch.tensor([3, 50])])
    def test_some_logits(self, case, keep):
        model, tokens = make(case), make_tokens(2, LENGTH)
        places = slice(-keep, None) if isinstance(keep, int) else keep
        torch.testing.assert_close(run(model, tokens, logits_to_keep=keep), run(model, tokens)[:, places], **LOGITS)

    @everywhere
    def test_hidden_states(self, case):
        """Three of them, the same under a cache."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        with torch.no_grad():
            once = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
            cached = model(tokens, output_hidden_states=True).hidden_states
        assert len(once) == len(cached) == 3
        for a, b in zip(cached, once, strict=True):
            assert a.shape == (2, LENGTH, model.config.hidden_size)
            torch.testing.assert_close(a, b, **LOGITS)

    @everywhere
    def test_loss(self, case):
        """Labels of -100 do not count, and neither do the tokens after the last that does."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        labels = tokens.clone()
        labels[:, :20] = -100
        with torch.no_grad():
            out = model(tokens, labels=labels)
        by_hand = torch.nn.functional.cross_entropy(out.logits[:, 19:-1].flatten(0, 1), tokens[:, 20:].flatten())
        torch.testing.assert_close(out.loss, by_hand, **LOGITS)

    @everywhere
    def test_tuples(self, case):
        model, tokens = make(case), make_tokens(2, LENGTH)
        with torch.no_grad():
            logits, cache = model(tokens, return_dict=False)
        assert torch.equal(logits, run(model, tokens))
        assert cache.get_seq_length() == LENGTH

    @student
    def test_attention_maps(self, case):
        """A converted layer has none."""
        with pytest.raises(LinearizeError, match="a converted layer has no attention map; leave it out"):
            run(make(case), make_tokens(2, LENGTH), output_attentions=True)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
class TestTraining:
    @everywhere
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, case, reentrant):
        """Loss and gradients are those without; a cache is left out, as in the original."""
        model, tokens = make(case).train(), make_tokens(2, LENGTH)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model.zero_grad()
            out = model(tokens, labels=tokens, use_cache=False)
            out.loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert len(gradients[0]) > 10
        for name, expected in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], expected, **LOGITS)

    @everywhere
    def test_no_cache_under_checkpointing(self, case):
        model = make(case).train()
        model.gradient_checkpointing_enable()
        out = model(make_tokens(2, LENGTH), use_cache=True)
        assert out.past_key_values is None or out.past_key_values.get_seq_length() == 0

    @everywhere
    def test_training_mode(self, case):
        """Without dropout the logits are those of evaluation."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        torch.testing.assert_close(run(copy.deepcopy(model).train(), tokens), run(model, tokens), **LOGITS)


class TestVocabulary:
    @everywhere
    def test_more_and_fewer_tokens(self, case):
        """The logits of the tokens that stay do not move."""
        model, tokens = make(case), make_tokens(2, LENGTH) % 60 + 1
        expected = run(model, tokens)
        model.resize_token_embeddings(VOCAB + 9, mean_resizing=False)
        more = run(model, tokens)
        assert more.shape[-1] == VOCAB + 9
        torch.testing.assert_close(more[..., :VOCAB], expected, **LOGITS)
        model.resize_token_embeddings(70)
        torch.testing.assert_close(run(model, tokens), expected[..., :70], **LOGITS)
        assert model.config.vocab_size == 70
        out = model.generate(tokens, max_new_tokens=5, do_sample=False)
        assert torch.equal(out, model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False))

    @everywhere
    def test_tied_weights(self, case, tmp_path):
        """Tied before and after a round trip, where the family ties them; never where it does not."""
        model = make(case)
        model.save_pretrained(tmp_path)
        for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
            shared = one.get_output_embeddings().weight is one.get_input_embeddings().weight
            assert shared == (case.family == "llama")


class TestCopies:
    @everywhere
    def test_save_and_load(self, case, tmp_path):
        model, tokens = make(case), make_tokens(2, LENGTH)
        model.save_pretrained(tmp_path)
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert torch.equal(run(loaded, tokens), run(model, tokens))

    @everywhere
    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_model(self, case, way):
        model, tokens = make(case), make_tokens(2, LENGTH)
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        expected = run(model, tokens)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(run(twin, tokens), expected)

    @everywhere
    def test_state_dict(self, case):
        model, other, tokens = make(case), make(case, seed=5), make_tokens(2, LENGTH)
        assert not torch.equal(run(other, tokens), run(model, tokens))
        other.load_state_dict(model.state_dict())
        assert torch.equal(run(other, tokens), run(model, tokens))

    @everywhere
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half(self, case, dtype):
        """`half()` and `bfloat16()` on a model in memory, which round what conversion added too: near the model that
        they round, and generating with a cache what they generate without."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        exact = run(model, tokens)
        low = model.half() if dtype == torch.float16 else model.bfloat16()
        rounded = run(low, tokens)
        assert rounded.dtype == dtype
        # Weights of 8 or 11 bits through two layers, on logits of a few units: a wrong mask is off by more than 1.
        assert (rounded.float() - exact).abs().mean() < {torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
        pieces, _ = in_pieces(low, [45, 1], tokens)
        assert (pieces.float() - exact).abs().mean() < {torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]


@everywhere
def test_pipeline(case):
    """Several texts at once, of different lengths, as one by one."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    model = make(case, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=3)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["a long prompt that the window does not cover, by far", "another, which is shorter than it"]
    options = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
    together = [texts[0]["generated_text"] for texts in write(prompts, batch_size=2, **options)]
    assert together == [write(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert together == [write(prompt, use_cache=False, **options)[0]["generated_text"] for prompt in prompts]
    assert all(len(text) > 0 for text in together)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self, caplog):
        import logging

        # torch writes its trace to this logger at DEBUG, and pytest would keep minutes' worth of it.
        caplog.set_level(logging.WARNING, logger="torch.__trace")
        torch.compiler.reset()
        counters.clear()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("case", [MODELS[1], Case("llama", "gate", (1,))], ids=str)
    def test_decoding(self, case):
        """A static cache: one graph decodes every token, over the ends of chunks, beside softmax layers too."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        expected = torch.stack(alone(model, list(tokens)))
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
        logits = [run(model, tokens[:, :30], past_key_values=cache)]
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        positions = torch.arange(LENGTH)[None]
        for t in range(30, LENGTH):
            inputs = {"position_ids": positions[:, t : t + 1].clone(), "past_key_values": cache}
            with torch.no_grad():
                logits.append(step(input_ids=tokens[:, t : t + 1].clone(), **inputs).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **LOGITS)
        assert counters["stats"]["unique_graphs"] == 1


@everywhere
def test_two_models_do_not_share(case):
    """A conversation with one is not heard by another, or by a second cache of the same."""
    model, tokens = make(case), make_tokens(2, LENGTH)
    expected = torch.stack(alone(model, list(tokens)))
    caches, logits = [DynamicCache(), DynamicCache()], [[], []]
    for start in range(0, LENGTH, 6):
        for i, cache in enumerate(caches):
            logits[i].append(run(model, tokens[i : i + 1, start : start + 6], past_key_values=cache))
    torch.testing.assert_close(torch.cat([torch.cat(row, dim=1) for row in logits]), expected, **LOGITS)
