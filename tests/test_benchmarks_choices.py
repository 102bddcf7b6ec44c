"""Multiple choice: the scores of padded batches, the split of query and choice, retention."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.benchmarks.choices import (
    encode_choices,
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
