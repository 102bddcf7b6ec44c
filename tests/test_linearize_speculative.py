"""Speculative decoding: the text is the original's, token for token or in distribution, whatever the student drafts."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch

from linearize import LinearizeConfig, LinearizeError, convert, original_attention, speculative_generate
from linearize.speculative import _Greedy, _Sampled, _warpers, _write
from tests.tiny_models import VOCAB, make_model, make_tokens, pad, randomize_far

SLIDING = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 6,
}
NEW = 14


def make_pair(family="llama", changes=None, **options):
    """(original, student with its weights and random far weights). Logits are spread far beyond rounding: in a random
    model the two likeliest tokens are often all but tied."""

    def one():
        model = make_model(family, **({"num_hidden_layers": 2} | (changes or {}) | {"tie_word_embeddings": False}))
        with torch.no_grad():
            model.lm_head.weight *= 20
        return model

    config = LinearizeConfig(**({"window": 4, "sinks": 2} | options))
    return one(), randomize_far(convert(one(), config))


def written(original, ids, new=NEW, **options):
    """What the original generates by itself, greedily; ids (1, T)."""
    return original.generate(ids, max_new_tokens=new, do_sample=False, **options)


def all_written(original, prompts):
    """The same of prompts of different lengths, in one left-padded batch: (number, NEW)."""
    longest = max(prompt.shape[1] for prompt in prompts)
    rows, mask = torch.zeros(len(prompts), longest, dtype=torch.long), torch.zeros(len(prompts), longest)
    for i, prompt in enumerate(prompts):
        rows[i, longest - prompt.shape[1] :], mask[i, longest - prompt.shape[1] :] = prompt, 1
    return written(original, rows, attention_mask=mask.long())[:, longest:]


class TestGreedy:
    @pytest.mark.parametrize(
        ("family", "changes", "options"),
        [
            ("llama", {}, {}),
            ("mistral", {}, {"mixer": "none", "draft_tokens": 3}),
            ("qwen2", {"num_hidden_layers": 3}, {"softmax_layers": [1], "draft_tokens": 4}),
            ("qwen2", SLIDING | {"num_hidden_layers": 3}, {"mixer": "none"}),
            ("qwen3", {}, {"window": 7, "softmax_layers": [0], "mix": "gate"}),
            ("llama", {}, {"mixer": "gla", "mix": "gate"}),
        ],
    )
    def test_is_the_originals(self, family, changes, options):
        """Prompts shorter than sinks, window and both, and longer; drafts that stand, fall, and fall at once."""
        k = {"draft_tokens": options.pop("draft_tokens")} if "draft_tokens" in options else {}
        original, student = make_pair(family, changes, **options)
        prompts = [make_tokens(1, length, seed=length) for length in (1, 2, 3, 5, 9, 16, 22)]
        fell = 0
        for prompt, expected in zip(prompts, all_written(original, prompts)):
            got = speculative_generate(student, prompt, max_new_tokens=NEW, **k)
            assert torch.equal(got.sequences, torch.cat([prompt, expected[None]], dim=1))
            fell += sum(got.drafted) - sum(got.accepted)
        assert fell  # or nothing was taken back

    def test_a_student_that_is_never_wrong(self):
        """Its window covers the text."""
        original, student = make_pair(window=32)
        prompt = make_tokens(1, 10)
        got = speculative_generate(student, prompt, max_new_tokens=30)
        assert torch.equal(got.sequences, written(original, prompt, 30))
        assert got.drafted == got.accepted == (4, 5, 6, 7, 2)  # 1 + 5 + 6 + 7 + 8 + 3 = 30
        assert (got.new_tokens, got.acceptance_length, got.acceptance_rate) == (30, 29 / 5, 1.0)
        got = speculative_generate(student, prompt, max_new_tokens=30, draft_tokens=9)
        assert got.drafted == got.accepted == (9, 9, 8)

    @pytest.mark.parametrize(
        "options", [{}, {"softmax_layers": [1]}, {"mixer": "none"}, {"mixer": "gla", "mix": "gate"}], ids=str
    )
    @pytest.mark.parametrize("k", [1, 3, 4])
    def test_drafts_are_the_students_after_the_text_that_stands(self, options, k):
        """What a cache remembered of tokens that fell would show in the drafts alone, as the original decides."""
        _, student = make_pair(**options)
        prompt, new = make_tokens(1, 6), 24
        got = speculative_generate(student, prompt, max_new_tokens=new, draft_tokens=k)
        text, accepted = got.sequences[0].tolist(), []
        length = 7
        while length < 6 + new:
            drafts = min(k, 6 + new - length - 1)
            with_drafts = text[:length]
            for _ in range(drafts):
                with torch.no_grad():
                    with_drafts.append(
                        int(student(torch.tensor([with_drafts]), use_cache=False).logits[0, -1].argmax())
                    )
            pairs = zip(with_drafts[length:], text[length:])
            accepted.append(next((i for i, (a, b) in enumerate(pairs) if a != b), drafts))
            length += accepted[-1] + 1
        assert got.accepted == tuple(accepted)
        assert 0 < sum(accepted) < sum(got.drafted)

    def test_the_longest_answer_may_end_inside_a_block(self):
        original, student = make_pair()
        prompt = make_tokens(1, 7)
        expected = written(original, prompt, 9)
        for new in range(1, 10):
            got = speculative_generate(student, prompt, max_new_tokens=new)
            assert torch.equal(got.sequences, expected[:, : 7 + new])
            assert got.new_tokens == len(got.margins) == new
            assert all(a <= d for a, d in zip(got.accepted, got.drafted, strict=True))
        alone = speculative_generate(student, prompt, max_new_tokens=1)
        assert (alone.drafted, alone.acceptance_length, alone.acceptance_rate) == ((), None, None)

    @pytest.mark.parametrize("window", [4, 32])
    def test_the_text_may_end_inside_a_block(self, window):
        original, student = make_pair(window=window)
        prompt = make_tokens(1, 7)
        text = written(original, prompt)[0, 7:].tolist()
        for end in dict.fromkeys(text):
            stop = text.index(end) + 1
            got = speculative_generate(student, prompt, max_new_tokens=NEW, eos_token_id=end)
            assert got.sequences[0, 7:].tolist() == text[:stop]
            assert len(got.margins) == stop
            # Every block gives its drafts that stand and one more, unless the text ends with a draft.
            assert stop - 1 - len(got.drafted) <= sum(got.accepted) <= stop - len(got.drafted)
        student.generation_config.eos_token_id = [VOCAB - 1, text[5]]
        stop = text.index(text[5]) + 1
        assert speculative_generate(student, prompt, max_new_tokens=NEW).new_tokens == stop
        assert speculative_generate(student, prompt, max_new_tokens=NEW, eos_token_id=[]).new_tokens == NEW

    def test_padding_is_left_out(self):
        original, student = make_pair()
        rows, mask = pad(make_tokens(1, 12), [5], "left")
        got = speculative_generate(student, rows, mask, max_new_tokens=NEW)
        assert torch.equal(got.sequences, written(original, rows, attention_mask=mask))

    def test_margins_are_those_of_the_originals_logits(self):
        original, student = make_pair()
        prompt = make_tokens(1, 9)
        got = speculative_generate(student, prompt, max_new_tokens=NEW)
        with torch.no_grad():
            logits = original(got.sequences[:, :-1]).logits[0, 8:]
        first, second = logits.topk(2).values.T
        torch.testing.assert_close(torch.tensor(got.margins), first - second, rtol=1e-4, atol=1e-3)

    def test_the_switch_and_the_weights_are_as_before(self):
        _, student = make_pair()
        prompt = make_tokens(1, 20)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        with torch.no_grad():
            logits = student(prompt).logits
            speculative_generate(student, prompt, max_new_tokens=NEW)
            assert torch.equal(student(prompt).logits, logits)
        assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


class TestWhichOriginal:
    @pytest.fixture
    def adapted(self):
        """(original, student with a LoRA that changes its text)."""
        from peft import LoraConfig, get_peft_model

        original, student = make_pair()
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return original, get_peft_model(student, lora).eval()

    def test_an_adapter_is_off_while_the_original_decides(self, adapted):
        original, student = adapted
        prompt = make_tokens(1, 9)
        expected = written(original, prompt)
        with original_attention(student):
            assert not torch.equal(written(student, prompt), expected)
        learning = [parameter.requires_grad for parameter in student.parameters()]
        with torch.no_grad():
            logits = student(prompt).logits
            assert torch.equal(speculative_generate(student, prompt, max_new_tokens=NEW).sequences, expected)
            assert torch.equal(student(prompt).logits, logits)
        assert [parameter.requires_grad for parameter in student.parameters()] == learning

    def test_an_adapter_is_on_while_the_student_drafts(self, adapted):
        """With a window that covers the text the adapter alone makes drafts fall."""
        from peft import LoraConfig, get_peft_model

        original, student = make_pair(window=32)
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        student = get_peft_model(student, adapter).eval()
        prompt = make_tokens(1, 9)
        got = speculative_generate(student, prompt, max_new_tokens=NEW)
        assert torch.equal(got.sequences, written(original, prompt))
        assert sum(got.accepted) < sum(got.drafted)
        with student.disable_adapter():
            got = speculative_generate(student, prompt, max_new_tokens=NEW)
        assert got.accepted == got.drafted

    def test_an_original_of_its_own(self, adapted):
        original, student = adapted
        merged = student.merge_and_unload()
        prompt = make_tokens(1, 9)
        expected = written(original, prompt)
        assert torch.equal(
            speculative_generate(merged, prompt, max_new_tokens=NEW, original=original).sequences, expected
        )
        assert not torch.equal(speculative_generate(merged, prompt, max_new_tokens=NEW).sequences, expected)


class Table:
    """A reader whose logits depend on the last token alone: row of `logits` (vocabulary, vocabulary)."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits = logits
        self.text = []

    @property
    def seen(self):
        return len(self.text)

    def read(self, tokens, last=1):
        self.text += tokens
        return self.logits[self.text[-last:]]

    def keep(self, tokens):
        del self.text[tokens:]

    def expect_rollback(self):
        pass


class AcceptsAll(_Sampled):
    """The control: what is drafted stands."""

    def judge(self, drafts, chances, logits):
        (token,), _ = super().judge([], [], logits[-1:])
        return [*drafts, token], []


TOKENS = 8
TABLES = torch.randn(2, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)) * 1.3


def warped(logits, temperature=None, top_k=None):
    """Chances by the definition of the two settings."""
    chances = (logits.double() / (temperature or 1)).exp()
    if top_k is not None:
        chances[chances < chances.sort(descending=True).values[:, top_k - 1 : top_k]] = 0
    return chances / chances.sum(-1, keepdim=True)


def distance(counts, expected):
    """How far counts lie from what is expected, in standard deviations of chi square; rare cells count as one."""
    counts, expected = counts.double().flatten(), expected.flatten()
    assert not counts[expected == 0].any()
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


class TestSampling:
    RUNS = 1200

    def pairs(self, rule, student=TABLES[1], most=None, length=2):
        """Counts of the first two new tokens, and of the second and third; (2, TOKENS, TOKENS)."""
        counts = torch.zeros(2, TOKENS, TOKENS)
        for _ in range(self.RUNS):
            found = _write(Table(student), Table(TABLES[0]), rule, [1], 4, length, most, set(), lambda tokens: None)
            for place in range(2):
                counts[place, found.tokens[place], found.tokens[place + 1]] += 1
        return counts

    def expected(self, **options):
        chances = warped(TABLES[0], **options)
        first = chances[1][:, None] * chances
        return self.RUNS * torch.stack([first, first.sum(0)[:, None] * chances])

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 1.4, "top_k": 4}])
    def test_has_the_originals_distribution(self, options):
        warpers = _warpers(**({"temperature": None, "top_k": None, "top_p": None} | options))
        for found, wanted in zip(self.pairs(_Sampled(warpers, None)), self.expected(**options)):
            assert distance(found, wanted) < 4

    def test_accepting_everything_has_not(self):
        rule = AcceptsAll(_warpers(None, None, None), None)
        first, second = self.pairs(rule)
        assert distance(first, self.expected()[0]) > 20
        assert distance(second, self.expected()[1]) > 20

    def test_top_p_leaves_out_what_the_original_leaves_out(self):
        """Even where the student is sure of it."""
        sure = torch.full((TOKENS, TOKENS), -20.0)
        least = TABLES[0].argmin(-1)
        sure[torch.arange(TOKENS), least] = 20.0
        rule = _Sampled(_warpers(None, None, 0.8), None)
        for _ in range(50):
            text = [1, *_write(Table(sure), Table(TABLES[0]), rule, [1], 6, 3, None, set(), lambda tokens: None).tokens]
            assert all(least[a] != b for a, b in pairwise(text))

    def test_p_and_q_that_differ_by_rounding_alone(self):
        """Where the draft falls and nothing is left of (p - q)+, the next token is drawn from p."""

        class Never(_Sampled):
            def _chances(self, logits):
                return logits

        rule = Never(None, None)
        p = torch.tensor([[0.5, 0.5, 0.0]]).repeat(2, 1)
        for _ in range(20):
            tokens, _ = rule.judge([2], [torch.tensor([0.5, 0.5, 1e-30])], p)
            assert len(tokens) == 1
            assert tokens[0] in (0, 1)

    def test_same_generator_same_text(self):
        _, student = make_pair()
        options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 20.0}
        run = partial(speculative_generate, student, make_tokens(1, 9), **options)
        first, again, other = (run(generator=torch.Generator().manual_seed(seed)).sequences for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert run().margins is None

    @pytest.mark.slow
    def test_a_real_pair_has_the_originals_distribution(self):
        changes = {"vocab_size": 12, "num_hidden_layers": 1}
        original, student = make_pair("llama", changes, window=2, sinks=1)
        prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
        options = {"do_sample": True, "temperature": 30.0}
        runs, counts = 2000, torch.zeros(12, 12)
        for _ in range(runs):
            got = speculative_generate(student, prompt, max_new_tokens=3, draft_tokens=1, **options)
            counts[tuple(got.sequences[0, 8:10])] += 1
        with torch.no_grad():
            first = warped(original(prompt).logits[0, -1:], 30.0)[0]
            after = torch.cat([prompt.expand(12, -1), torch.arange(12)[:, None]], dim=1)
            second = warped(original(after).logits[:, -1], 30.0)
            drafted = warped(student(after).logits[:, -1], 30.0)
        assert distance(counts, runs * first[:, None] * second) < 4
        assert distance(counts, runs * first[:, None] * drafted) > 20


class TestLength:
    """Of drafts, by a student and an original that are tables."""

    def drafted(self, student, new, **options):
        found = _write(Table(student), Table(TABLES[0]), _Greedy(), [1], new, put=lambda tokens: None, **options)
        return found.drafted

    def test_grows_up_to_the_window(self):
        assert self.drafted(TABLES[0], 31, length=4, most=6, ends=set()) == [4, 5, 6, 6, 4]

    def test_shrinks_down_to_one(self):
        wrong = TABLES[0].clone()
        wrong[torch.arange(TOKENS), TABLES[0].argmax(-1)] = -9.0
        assert self.drafted(wrong, 8, length=4, most=6, ends=set()) == [4, 3, 2, 1, 1, 1, 0]

    def test_stays_where_it_is_given(self):
        assert self.drafted(TABLES[0], 14, length=4, most=None, ends=set()) == [4, 4, 2]


class Listener:
    """A streamer that writes down what it gets."""

    def __init__(self):
        self.got, self.ended = [], False

    def put(self, tokens):
        assert tokens.device.type == "cpu"
        assert not self.ended
        self.got.append(tokens.tolist())

    def end(self):
        self.ended = True


class TestStreamer:
    @pytest.mark.parametrize("end", [False, True])
    def test_gets_what_it_would_get_from_generate(self, end):
        original, student = make_pair(window=32)
        prompt = make_tokens(1, 9)
        ends = written(original, prompt)[0, 9 + 6].item() if end else []
        ours, theirs = Listener(), Listener()
        written(original, prompt, streamer=theirs, eos_token_id=ends or None)
        speculative_generate(student, prompt, max_new_tokens=NEW, streamer=ours, eos_token_id=ends)
        assert ours.got == theirs.got
        assert ours.ended


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens: 0 is not an integer >= 1"),
            ({"draft_tokens": 5}, "draft_tokens: 5 exceeds the window 4"),
            ({"draft_tokens": 0}, "draft_tokens: 0 is not an integer >= 1"),
            ({"draft_tokens": "many"}, "draft_tokens: 'many' is not an integer >= 1"),
            ({"draft_tokens": True}, "draft_tokens: True is not an integer >= 1"),
            ({"temperature": 0.7}, "temperature: 0.7 is for sampling; add do_sample=True"),
            ({"top_k": 5}, "top_k: 5 is for sampling"),
            ({"do_sample": True, "temperature": 0.0}, "temperature"),
            ({"do_sample": True, "top_k": 0}, "top_k"),
            ({"do_sample": True, "top_p": 1.5}, "top_p"),
            ({"input_ids": make_tokens(2, 5)}, r"input_ids: \(2, 5\) is not \(1, tokens\)"),
            ({"input_ids": make_tokens(1, 5)[0]}, r"input_ids: \(5,\) is not \(1, tokens\)"),
            ({"input_ids": make_tokens(1, 0)}, "input_ids: there is no token"),
            ({"attention_mask": torch.zeros(1, 5)}, "input_ids: there is no token"),
            ({"attention_mask": torch.ones(1, 4)}, r"attention_mask: \(1, 4\) is not \(1, 5\)"),
        ],
    )
    def test_settings(self, options, message):
        _, student = make_pair()
        with pytest.raises(LinearizeError, match=message):
            speculative_generate(student, **({"input_ids": make_tokens(1, 5), "max_new_tokens": 3} | options))

    def test_models(self):
        original, student = make_pair()
        call = partial(speculative_generate, input_ids=make_tokens(1, 5), max_new_tokens=3)
        with pytest.raises(LinearizeError, match="model: LlamaForCausalLM is not converted"):
            call(original)
        with pytest.raises(LinearizeError, match="original: it is converted itself"):
            call(student, original=copy.deepcopy(student))
        with pytest.raises(LinearizeError, match="original: it has 64 tokens but the student has 128"):
            call(student, original=make_model("llama", vocab_size=64))

    def test_an_error_leaves_the_student_converted(self):
        _, student = make_pair()

        def fail(tokens):
            raise RuntimeError("the streamer broke")

        listener = Listener()
        listener.put = fail
        prompt = make_tokens(1, 20)
        with torch.no_grad():
            logits = student(prompt).logits
        with pytest.raises(RuntimeError, match="the streamer broke"):
            speculative_generate(student, prompt, max_new_tokens=3, streamer=listener)
        with torch.no_grad():
            assert torch.equal(student(prompt).logits, logits)
