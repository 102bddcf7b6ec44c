"""Multiple choice: the scores of padded batches, the split of query and choice, retention."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.benchmarks.choices import (
    encode_choices,
    mean_retention,
    multiple_choice,
    score_items,
    summarise_choices,
    summarise_words,
)
from linearize.benchmarks.items import Contexts, Item, LastWord, load_items
from linearize.errors import LinearizeError
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return LlamaForCausalLM(config)


ITEMS = [
    Item("Question: what is it?", ("a long and wordy answer", "no"), 0),
    Item("The sky is", ("blue", "a kind of cheese", "up"), 2),
    Item("It ends in a space ", ("x", "yy"), 1),
]


@pytest.mark.parametrize("bos", [False, True])
def test_scores_equal_those_of_each_choice_alone(model, bos):
    tokenizer = tiny_tokenizer(bos)
    scores = multiple_choice(model, tokenizer, ITEMS)
    texts = [("Question: what is it?\nAnswer:", " "), ("The sky is", " "), ("It ends in a space ", "")]
    with torch.inference_mode():
        for item, (query, lead), values in zip(ITEMS, texts, scores):
            for choice, value in zip(item.choices, values):
                ids = torch.tensor([tokenizer(query + lead + choice)["input_ids"]])
                logits = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0, :-1]
                own = len(lead + choice)
                want = logits.gather(-1, ids[0, 1:, None])[-own:].sum()
                assert value == pytest.approx(float(want), rel=1e-4)


def test_an_empty_query_is_scored_after_a_special_token(model):
    ((a, b),) = multiple_choice(model, tiny_tokenizer(), [Item("", ("a", "ab"), 0)])
    assert b < a < 0


class MergingTokenizer:
    """Merges `n` and a following space: the query's last token is another one when a choice follows."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = []
        while text:
            width = 2 if text.startswith("n ") else 1
            ids.append(ord(text[0]) + 1000 * (width - 1))
            text = text[width:]
        return {"input_ids": ids}


def test_all_choices_are_scored_after_the_same_tokens():
    prefix, endings = encode_choices(MergingTokenizer(), "in", [" a", "b"])
    assert prefix == [ord("i")]
    assert endings == [[ord("n") + 1000, ord("a")], [ord("n"), ord("b")]]


def test_every_continuation_keeps_a_token():
    prefix, endings = encode_choices(tiny_tokenizer(), "abc", ["", "d"])
    assert len(prefix) == 2
    assert [len(ending) for ending in endings] == [1, 2]


def test_normalising_divides_by_bytes():
    items = [Item("q", ("short", "twice as long as that"), 1)]
    summary = summarise_choices({"original": [[-10.0, -20.0]]}, items, "original")
    row = summary["rows"]["original"]
    assert row["raw"]["accuracy"] == 0.0
    assert row["normalised"]["accuracy"] == 1.0
    assert summary["chance"] == 0.5


def make_scores(right: list[bool]) -> list[list[float]]:
    """Scores for items of four choices whose gold is 0."""
    return [[0.0, -1.0, -1.0, -1.0] if hit else [-1.0, 0.0, -1.0, -1.0] for hit in right]


def test_retention_raw_and_above_chance():
    items = [Item("q", ("a", "b", "c", "d"), 0)] * 200
    scores = {
        "original": make_scores([n < 150 for n in range(200)]),  # 0.75
        "student": make_scores([n < 100 for n in range(200)]),  # 0.5
    }
    kept = summarise_choices(scores, items, "original")["rows"]["student"]["raw"]
    assert kept["accuracy"] == 0.5
    assert kept["retention"]["value"] == pytest.approx(0.5 / 0.75)
    assert kept["retention_over_chance"]["value"] == pytest.approx(0.25 / 0.5)
    low, high = kept["retention_over_chance"]["ci95"]
    assert low < 0.5 < high < 1


def test_a_baseline_that_guesses_gives_no_retention():
    items = [Item("q", ("a", "b", "c", "d"), 0)] * 40
    at_chance = make_scores([n < 10 for n in range(40)])
    barely = make_scores([n < 12 for n in range(40)])
    kept = summarise_choices({"original": at_chance}, items, "original")["rows"]["original"]["raw"]
    assert kept["retention_over_chance"] == {"value": None, "ci95": None}
    kept = summarise_choices({"original": barely}, items, "original")["rows"]["original"]["raw"]
    assert kept["retention_over_chance"] == {"value": 1.0, "ci95": None}


def test_a_score_that_is_not_finite_is_wrong():
    items = [Item("q", ("a", "b"), 0)]
    summary = summarise_choices({"original": [[float("nan"), -1.0]]}, items, "original")
    assert summary["rows"]["original"]["raw"]["accuracy"] == 0.0


def write_items(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_load_items_samples_the_whole_file_with_a_seed(tmp_path):
    records = [{"query": str(n), "choices": ["a", "b"], "gold": n % 2, "extra": 1} for n in range(50)]
    path = write_items(tmp_path / "items.jsonl", records)
    assert len(load_items(path)) == 50
    sample = load_items(path, 10, seed=1)
    assert sample == load_items(path, 10, seed=1) != load_items(path, 10, seed=2)
    assert len(sample) == 10
    assert max(int(item.query) for item in sample) > 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "items.jsonl:2: not JSON"),
        ('{"query": "q", "choices": ["a", "b"]}', "needs the keys query, choices and gold"),
        ('{"query": 3, "choices": ["a", "b"], "gold": 0}', "query is 3, expected a text"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "two or more texts"),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', "two or more texts"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold is 2, expected the index of a choice, 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "gold is True"),
    ],
)
def test_load_items_names_the_bad_line(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(LinearizeError, match=message):
        load_items(path)


def test_load_items_needs_a_file_with_items(tmp_path):
    with pytest.raises(LinearizeError, match=r"'.*nowhere' is not a file"):
        load_items(tmp_path / "nowhere")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(LinearizeError, match="holds no items"):
        load_items(empty)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context_options": ["a"], "continuation": "b", "gold": 0}', "context_options is .* two or more texts"),
        (
            '{"context_options": ["a", "b"], "continuation": " ", "gold": 0}',
            "continuation is ' ', expected",
        ),
        ('{"context": "a", "continuation": ""}', "continuation is '', expected a text that is not empty"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 0}\n{"context": "a", "continuation": "b"}', ":2: another kind"),
    ],
)
def test_other_kinds_are_checked_too(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(LinearizeError, match=message):
        load_items(path)


def whole_score(model, tokenizer, before: str, after: str) -> tuple[float, bool]:
    """Log-likelihood of `after` and whether it is what greedy decoding writes, from one sequence alone."""
    ids = torch.tensor([tokenizer(before + after)["input_ids"]])
    with torch.inference_mode():
        logits = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0, :-1][-len(after) :]
    targets = ids[0, -len(after) :]
    return float(logits.gather(-1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


def test_contexts_and_last_words_equal_whole_sequences(model, tmp_path):
    tokenizer = tiny_tokenizer()
    path = tmp_path / "winogrande.jsonl"
    path.write_text('{"context_options": ["so Ann", "so the other"], "continuation": "left.", "gold": 1}\n')
    (item,) = load_items(path)
    assert item == Contexts(("so Ann", "so the other"), "left.", 1)
    # What greedy decoding writes, and something else: the flag has to tell them apart.
    prompt, allowed = "The last word is ", tokenizer("".join(map(chr, range(33, 127))))["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    best = tokenizer.decode([int(logits.argmax())])
    assert int(logits.argmax()) in allowed
    words = [LastWord(prompt, best), LastWord(prompt, "q" if best != "q" else "z")]
    (contexts,) = score_items(model, tokenizer, [item])
    for context, (value, greedy) in zip(item.contexts, contexts):
        want = whole_score(model, tokenizer, context, " left.")
        assert (value, greedy) == (pytest.approx(want[0], rel=1e-4), want[1])
    scored = [one for (one,) in score_items(model, tokenizer, words)]
    assert [greedy for _, greedy in scored] == [True, False]
    assert scored[0][0] == pytest.approx(whole_score(model, tokenizer, prompt, best)[0], rel=1e-4)


def test_last_words_count_greedy_ones_and_nobody_guesses():
    scores = {"original": [(-1.0, True), (-2.0, True), (-3.0, False)] * 20}
    scores["student"] = [(-2.0, True), (-2.0, False), (float("nan"), True)] * 20
    summary = summarise_words(scores, "original")
    original, student = summary["rows"]["original"], summary["rows"]["student"]
    assert summary["chance"] == 0
    assert original["log_likelihood"] == pytest.approx(-2)
    assert student["log_likelihood"] is None
    assert student["raw"]["accuracy"] == pytest.approx(1 / 3)  # a likelihood that is not finite is wrong
    assert student["raw"]["retention_over_chance"]["value"] == pytest.approx(0.5)
    assert student["raw"]["hits"] == "100" * 20


def test_mean_retention_weighs_tasks_the_same():
    items = [Item("q", ("a", "b", "c", "d"), 0)] * 200
    scores = {
        "original": make_scores([n < 150 for n in range(200)]),
        "student": make_scores([n < 100 for n in range(200)]),
    }
    words = {"original": [(-1.0, n < 40) for n in range(50)], "student": [(-1.0, n < 10) for n in range(50)]}
    tasks = [summarise_choices(scores, items, "original"), summarise_words(words, "original")]
    mean = mean_retention(tasks, "original")
    assert mean["chance"] == 0.125
    kept = mean["rows"]["student"]["retention_over_chance"]
    assert kept["value"] == pytest.approx(((0.5 + 0.2) / 2 - 0.125) / ((0.75 + 0.8) / 2 - 0.125))
    assert kept["ci95"][0] < kept["value"] < kept["ci95"][1]
    assert mean["rows"]["original"]["retention_over_chance"] == {"value": 1.0, "ci95": [1.0, 1.0]}
