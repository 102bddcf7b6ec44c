"""The needle test: exact prompts, and scores that a model with memory passes and one without fails."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.benchmarks import needle as module
from linearize.benchmarks import recall
from linearize.benchmarks.needle import build_needles, needle, summarise_needles
from linearize.benchmarks.words import NOUNS, single_token_words
from linearize.errors import LinearizeError
from tests.tiny_tokenizer import tiny_tokenizer, word_tokenizer

TEXT = torch.tensor(tiny_tokenizer()("the quick brown fox jumps over the lazy dog, " * 40)["input_ids"])


class Seen:
    """The cache of `Copier`: the tokens themselves, (batch, length)."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def reorder_cache(self, index: torch.Tensor) -> None:
        self.ids = self.ids[index]


class Copier(nn.Module):
    """Predicts what followed the last earlier occurrence of the last few tokens, if it remembers them."""

    def __init__(self, memory: int, ngram: int = 8):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.memory = memory
        self.ngram = ngram
        self.steps: list[tuple[int, ...]] = []

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        self.steps.append(tuple(input_ids.shape))
        seen = input_ids if past_key_values is None else torch.cat([past_key_values.ids, input_ids], 1)
        logits = torch.zeros(*input_ids.shape, 160)
        before = seen.shape[1] - input_ids.shape[1]
        for row in range(len(seen)):
            for column in range(input_ids.shape[1]) if logits_to_keep != 1 else [input_ids.shape[1] - 1]:
                logits[row, column, self.predict(seen[row, : before + column + 1].tolist())] = 10.0
        if past_key_values is not None:
            past_key_values.ids = seen
        cache = past_key_values or Seen(seen)
        return SimpleNamespace(logits=logits[:, -1:] if logits_to_keep == 1 else logits, past_key_values=cache)

    def predict(self, ids: list[int]) -> int:
        ids = ids[-self.memory :]
        last = ids[-self.ngram :]
        for start in range(len(ids) - self.ngram - 1, -1, -1):
            if ids[start : start + self.ngram] == last:
                return ids[start + self.ngram]
        return 0


def test_prompts_have_the_asked_length_and_depth():
    tokenizer = tiny_tokenizer(bos=True)
    needles = build_needles(tokenizer, TEXT, (200, 300), (0.0, 0.5, 1.0), trials=2)
    assert len(needles) == 12
    assert len({task.values for task in needles}) == 12
    for task in needles:
        assert len(task.prompt) == task.length
        assert task.prompt[0] == tokenizer.bos_token_id
        text = tokenizer.decode(task.prompt[1:])
        assert text.count(task.values[0]) == 1
        assert not any(number in text for number in task.values[1:])
        sentence = f"the secret number is {task.values[0]}."
        before, after = text.split(sentence)
        assert after.endswith("the secret number is")
        share = len(before) / (len(before) + len(after))
        assert share == pytest.approx(task.depth, abs=0.3)
        assert tokenizer.decode(task.candidates[0]) == f" {task.values[0]}"


def test_several_keys_are_hidden_and_one_is_asked_for():
    tokenizer = tiny_tokenizer()
    for task in build_needles(tokenizer, TEXT, (500,), (0.0, 1.0), trials=3, keys=(3,), digits=7):
        assert len(task.prompt) == task.length
        text = tokenizer.decode(task.prompt)
        facts = dict(re.findall(r"fact to remember: the secret number of the (\w+) is (\d{7})\.\n", text))
        asked = re.search(r"the secret number of the (\w+) is$", text)
        assert len(facts) == 3
        assert facts[asked[1]] == task.values[0]
        assert sorted(facts.values()) == sorted(task.values[:3])  # the others' numbers are candidates
        assert not any(number in text for number in task.values[3:])


def test_a_model_that_remembers_finds_all_and_one_that_forgets_none():
    tokenizer = tiny_tokenizer()
    needles = build_needles(tokenizer, TEXT, (300,), (0.1, 0.5), trials=2)
    remembers, forgets = Copier(memory=1000, ngram=12), Copier(memory=100, ngram=12)
    found = summarise_needles({"a": needle(remembers, tokenizer, needles), "b": needle(forgets, tokenizer, needles)})
    assert (found["rows"]["a"]["greedy"], found["rows"]["a"]["first"]) == (1.0, 1.0)
    assert (found["rows"]["b"]["greedy"], found["rows"]["b"]["first"]) == (0.0, 0.0)
    assert found["rows"]["b"]["mean_rank"] == 10  # ties count against it
    # The prompt is read once; then one pass for the candidates, then single tokens.
    assert remembers.steps[:3] == [(1, 300), (10, 5), (1, 1)]


def test_scores_of_a_cached_model_equal_those_of_whole_sequences():
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config)
    needles = build_needles(tokenizer, TEXT, (150,), (0.2, 0.8))
    for task, result in zip(needles, needle(model, tokenizer, needles)):
        scores = []
        with torch.inference_mode():
            for candidate in task.candidates:
                ids = torch.tensor([[*task.prompt, *candidate]])
                logits = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0, :-1]
                scores.append(float(logits.gather(-1, ids[0, 1:, None])[-len(candidate) :].sum()))
            ids = torch.tensor([task.prompt])
            written = model.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=3)
        assert result["rank"] == 1 + sum(score > scores[0] for score in scores[1:])
        assert result["text"] == tokenizer.decode(written[0, 150:])


def test_written_number_must_end_where_it_ends():
    tokenizer = tiny_tokenizer()
    (task,) = build_needles(tokenizer, TEXT, (300,), (0.5,))
    digit = tokenizer(f"{task.values[0]}7")["input_ids"]

    class TooLong(Copier):
        def predict(self, ids):
            return digit[len(ids) - 301] if 301 <= len(ids) < 307 else tokenizer(" ")["input_ids"][0]

    (result,) = needle(TooLong(1000), tokenizer, [task])
    assert result["text"] == f" {task.values[0]}7"[: len(result["text"])]
    assert not result["greedy"]


def test_words_are_hidden_that_the_haystack_does_not_say():
    tokenizer = word_tokenizer(NOUNS[:40])
    # A text that says 28 of the 40, and one of those in capitals, which counts as said too.
    text = torch.tensor(tokenizer(" ".join([*NOUNS[:28], NOUNS[28].upper(), "a b c", ""]) * 20)["input_ids"])
    needles = build_needles(tokenizer, text, (400, 450), (0.0, 0.7), trials=2, keys=(1, 3), kinds=("words",))
    assert {(task.length, task.depth, task.keys, task.kind) for task in needles} == {
        (length, depth, keys, "words") for length in (400, 450) for depth in (0.0, 0.7) for keys in (1, 3)
    }
    assert len({task.values for task in needles}) == len(needles)
    for task in needles:
        assert len(task.prompt) == task.length
        assert set(task.values) <= set(NOUNS[29:40])
        said = tokenizer.decode(task.prompt)
        assert [said.count(f" {value}") for value in task.values] == [1] * task.keys + [0] * (10 - task.keys)
        assert f"is {task.values[0]}.\n" in said
        assert [len(candidate) for candidate in task.candidates] == [1] * 10
        assert tokenizer.decode(task.candidates[0]) == f" {task.values[0]}"


def test_a_model_that_remembers_writes_the_word():
    tokenizer = word_tokenizer(NOUNS[:40])
    text = torch.tensor(tokenizer("the quick brown ox jumps over a lazy toad, " * 20)["input_ids"])
    needles = build_needles(tokenizer, text, (300,), (0.1, 0.5), trials=2, keys=(1, 2), kinds=("words",))

    remembers, forgets = Copier(memory=1000, ngram=9), Copier(memory=100, ngram=9)
    found = summarise_needles({"a": needle(remembers, tokenizer, needles), "b": needle(forgets, tokenizer, needles)})
    assert (found["rows"]["a"]["greedy"], found["rows"]["a"]["first"]) == (1.0, 1.0)
    assert (found["rows"]["b"]["greedy"], found["rows"]["b"]["first"]) == (0.0, 0.0)


def test_what_else_is_asked_for_changes_no_prompt():
    tokenizer = word_tokenizer(NOUNS[:40])
    alone = build_needles(tokenizer, TEXT, (400,), (0.5,), trials=2, keys=(2,))
    many = build_needles(tokenizer, TEXT, (400,), (0.5,), trials=2, keys=(1, 2, 4), kinds=("words", "digits"))
    assert len(many) == 12
    assert [task for task in many if (task.keys, task.kind) == (2, "digits")] == alone


@pytest.mark.parametrize(
    ("words", "said", "message"),
    [
        (
            NOUNS[:9],
            "",
            "needle_kind: 'words' needs 10 words that are one token each, and the tokenizer has 9 of those",
        ),
        (NOUNS[:14], " ".join(NOUNS[:5]), "300 tokens of the text say all but 9 of the 14 words that could be hidden"),
    ],
)
def test_too_few_words(words, said, message):
    tokenizer = word_tokenizer(words)
    text = torch.tensor(tokenizer(f"a b c d e f {said} " * 60)["input_ids"])
    with pytest.raises(LinearizeError, match=message):
        build_needles(tokenizer, text, (300,), (0.5,), kinds=("words",))


def test_kinds_are_checked():
    with pytest.raises(LinearizeError, match="needle_kind: 'letters' is unknown; choose from digits, words"):
        build_needles(tiny_tokenizer(), TEXT, (300,), (0.5,), kinds=("letters",))


def test_the_words_are_told_apart():
    """No word begins another one, and none stands in a sentence or is asked about."""
    assert len(set(NOUNS)) == len(NOUNS) > 200
    assert not [(a, b) for a in NOUNS for b in NOUNS if a != b and b.startswith(a)]
    sentences = " ".join([module.SENTENCE_OF, module.QUESTION_OF, recall.LIST, recall.AGAIN])
    assert set(NOUNS).isdisjoint([*module.KEYS, *re.findall(r"\w+", sentences.lower()), "word", "number"])


def test_only_words_of_one_token_count():
    tokenizer = word_tokenizer(["apple", "river", "bread", "appl"])
    assert single_token_words(tokenizer) == {"apple": 100, "bread": 102}  # river is no noun of the list
    assert single_token_words(tokenizer, without=["bread"]) == {"apple": 100}
    assert single_token_words(tiny_tokenizer()) == {}


def test_cells_keep_length_depth_keys_and_kind():
    cell = {"depth": 0.1, "keys": 1, "kind": "digits", "text": ""}
    trials = [
        {"length": 256, **cell, "greedy": True, "rank": 1},
        {"length": 256, **cell, "greedy": False, "rank": 4},
        {"length": 512, **cell, "greedy": False, "rank": 10},
        {"length": 512, **cell, "greedy": True, "rank": 1, "keys": 4},
        {"length": 512, **cell, "greedy": True, "rank": 2, "kind": "words"},
    ]
    row = summarise_needles({"original": trials})["rows"]["original"]
    assert row["cells"] == [
        {"length": 256, "depth": 0.1, "keys": 1, "kind": "digits"}
        | {"trials": 2, "greedy": 0.5, "first": 0.5, "mean_rank": 2.5},
        {"length": 512, "depth": 0.1, "keys": 1, "kind": "digits"}
        | {"trials": 1, "greedy": 0.0, "first": 0.0, "mean_rank": 10.0},
        {"length": 512, "depth": 0.1, "keys": 4, "kind": "digits"}
        | {"trials": 1, "greedy": 1.0, "first": 1.0, "mean_rank": 1.0},
        {"length": 512, "depth": 0.1, "keys": 1, "kind": "words"}
        | {"trials": 1, "greedy": 1.0, "first": 0.0, "mean_rank": 2.0},
    ]
    assert row["lengths"] == [
        {"length": 256, "trials": 2, "greedy": 0.5, "first": 0.5, "mean_rank": 2.5},
        {"length": 512, "trials": 3, "greedy": 2 / 3, "first": 1 / 3, "mean_rank": 13 / 3},
    ]
    assert (row["trials"], row["mean_rank"]) == (5, 3.6)


@pytest.mark.parametrize(
    ("lengths", "depths", "message"),
    [
        ((50,), (0.5,), r"needle_lengths: 50 is too short for the sentence; use \d+ or more"),
        ((5000,), (0.5,), "needle_lengths: 5000 is longer than the 1800 held-out tokens"),
        ((256,), (1.5,), "needle_depths: 1.5 is outside 0 to 1"),
    ],
)
def test_refusals(lengths, depths, message):
    with pytest.raises(LinearizeError, match=message):
        build_needles(tiny_tokenizer(), TEXT, lengths, depths)


def test_as_many_keys_as_there_are():
    with pytest.raises(LinearizeError, match="needle_keys: 9 is outside 1 to 8"):
        build_needles(tiny_tokenizer(), TEXT, (500,), (0.5,), keys=(1, 9))


def test_the_named_smallest_length_works():
    tokenizer = tiny_tokenizer()
    with pytest.raises(LinearizeError) as error:
        build_needles(tokenizer, TEXT, (50,), (0.5,))
    least = int(str(error.value).split("use ")[1].split()[0])
    assert len(build_needles(tokenizer, TEXT, (least,), (0.5,))[0].prompt) == least
