"""Choices by letter: who reads them is right in every order, who likes a letter is right by chance and seen."""

import json

import pytest
import torch
from torch import nn

from linearize.benchmarks.evaluate import _comparisons, evaluate_rows
from linearize.benchmarks.items import Contexts, Item, LastWord
from linearize.benchmarks.letters import build_letters, choose_letters, lettered, summarise_letters
from linearize.distill.options import EvaluateOptions
from linearize.errors import LinearizeError
from linearize.rows import comparison_rows
from linearize.tables import print_evaluation
from tests.tiny_models import make_model, make_student
from tests.tiny_tokenizer import tiny_tokenizer

ITEMS = [
    Item("Question: which is red?", ("sky", "blood", "grass", "snow"), 1),
    Item("Question: which is cold? ", ("fire", "ice", "tea"), 1),
    Item("Question: which flies?", ("stone", "fish", "horse", "bird"), 3),
]


def test_prompts_show_every_order_and_end_before_the_letter():
    tokenizer = tiny_tokenizer(bos=True)
    (first, second, _) = build_letters(tokenizer, ITEMS)
    prompts, letters = first
    assert [tokenizer.decode([letter]) for letter in letters] == ["A", "B", "C", "D"]
    # This tokenizer writes the space before a letter by itself, so the prompt has it.
    assert tokenizer.decode(prompts[0]) == ("<s>Question: which is red?\nA. sky\nB. blood\nC. grass\nD. snow\nAnswer: ")
    assert tokenizer.decode(prompts[1]).split("\n")[1:5] == ["A. blood", "B. grass", "C. snow", "D. sky"]
    assert tokenizer.decode(second[0][2]) == "<s>Question: which is cold?\nA. tea\nB. fire\nC. ice\nAnswer: "
    assert (len(first[0]), len(second[0]), len(second[1])) == (4, 3, 3)


def test_only_items_of_three_or_more_choices_are_asked_so():
    assert lettered(ITEMS)
    assert not lettered([*ITEMS, Item("q", ("a", "b"), 0)])
    assert not lettered([Contexts(("a", "b", "c"), "d", 0)])
    assert not lettered([LastWord("a", "b")])


def test_the_likeliest_letter_is_that_of_the_whole_models_logits():
    model = make_model("llama")
    items = build_letters(tiny_tokenizer(), ITEMS)
    for (prompts, letters), chosen in zip(items, choose_letters(model, items)):
        with torch.inference_mode():
            logits = [model(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
        assert chosen == [int(row[letters].argmax()) for row in logits]


def test_letters_are_counted_and_orders_undone():
    reads = [[(item.gold - order) % len(item.choices) for order in range(len(item.choices))] for item in ITEMS]
    always_a = [[0] * len(item.choices) for item in ITEMS]
    broken = [[-1] * len(item.choices) for item in ITEMS]
    rows = {"original": reads, "student": always_a, "other": broken}
    part = summarise_letters(rows, ITEMS, _comparisons(list(rows)))
    assert (part["n_items"], part["letters"]) == (3, ["A", "B", "C", "D"])
    # Eleven orders; an item of three choices has no D.
    assert part["true"] == [3 / 11, 3 / 11, 3 / 11, 2 / 11]
    assert part["chance"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 4) / 3)
    assert part["chance_consistency"] == pytest.approx((1 / 64 + 1 / 9 + 1 / 64) / 3)
    found = part["rows"]
    assert (found["original"]["accuracy"], found["original"]["consistency"]) == (1.0, 1.0)
    assert found["original"]["letters"] == part["true"]
    assert found["original"]["letter_distance"] == 0.0
    # The collapse: right exactly as often as guessing, and the histogram says why.
    assert found["student"]["accuracy"] == pytest.approx(part["chance"])
    assert found["student"]["letters"] == [1.0, 0.0, 0.0, 0.0]
    assert found["student"]["letter_distance"] == pytest.approx(8 / 11)
    assert found["student"]["consistency"] == 0.0
    assert (found["other"]["accuracy"], found["other"]["letters"], found["other"]["consistency"]) == (0, [0] * 4, 0)
    pairs = {(pair["row"], pair["against"]): pair for pair in part["comparisons"]}
    assert pairs["student", "original"]["accuracy_difference"] == pytest.approx(part["chance"] - 1)
    assert pairs["student", "original"]["ci95"][1] < 0


def test_the_same_wrong_choice_in_every_order_is_consistent():
    wrong = [[(item.gold + 1 - order) % len(item.choices) for order in range(len(item.choices))] for item in ITEMS]
    row = summarise_letters({"original": wrong}, ITEMS, [])["rows"]["original"]
    assert (row["accuracy"], row["consistency"]) == (0.0, 1.0)


def test_logits_that_are_not_finite_choose_nothing():
    model = make_model("llama")
    nn.init.constant_(model.model.norm.weight, float("nan"))
    items = build_letters(tiny_tokenizer(), ITEMS[:1])
    assert choose_letters(model, items) == [[-1] * 4]


def write_items(path, choices) -> str:
    path.write_text((json.dumps({"query": "Question: why?", "choices": choices, "gold": 0}) + "\n") * 3)
    return str(path)


def make_options(**changes) -> EvaluateOptions:
    given = {"tokens": 64, "contexts": (64,), "needle_lengths": (), "recall_lengths": (), "kl_tokens": 0, "answers": 0}
    return EvaluateOptions(**(given | changes))


def test_tasks_that_can_be_asked_so_are(tmp_path, capsys):
    files = (write_items(tmp_path / "four.jsonl", list("abcd")), write_items(tmp_path / "two.jsonl", ["a", "b"]))
    rows = comparison_rows(make_student("llama", "normalizer"))
    texts = {"t": torch.arange(4, 100)}
    result = evaluate_rows(rows, tiny_tokenizer(), texts, make_options(choices=files, letters=2), only=["letters"])
    assert list(result["letters"]) == ["four"]
    part = result["letters"]["four"]
    assert (part["n_items"], list(part["rows"])) == (2, list(rows))
    assert all(sum(row["letters"]) == pytest.approx(1) for row in part["rows"].values())
    print_evaluation(result)
    assert "four by letter: 2 questions in every cyclic order" in capsys.readouterr().out


def test_letters_need_a_task(tmp_path):
    files = (write_items(tmp_path / "two.jsonl", ["a", "b"]),)
    rows = {"original": lambda: None}
    for given in ((), files):
        with pytest.raises(LinearizeError, match="letters: 2 questions are asked by letter, and no file of choices"):
            evaluate_rows(rows, tiny_tokenizer(), {"t": torch.arange(4, 100)}, make_options(choices=given, letters=2))
