"""Recall probes: prompts that can be answered in one way, and scores that follow memory and nothing else."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from linearize.benchmarks.evaluate import _comparisons, evaluate_rows
from linearize.benchmarks.recall import (
    AGAIN,
    PROBES,
    QUERIES,
    RecallPrompt,
    build_recall,
    recall,
    summarise_recall,
)
from linearize.benchmarks.words import NOUNS
from linearize.distill.options import EvaluateOptions
from linearize.errors import LinearizeError
from linearize.rows import comparison_rows
from linearize.tables import print_evaluation
from tests.induction_model import make_inducer, teach_inducer
from tests.tiny_models import make_model, make_tokens
from tests.tiny_tokenizer import tiny_tokenizer, word_tokenizer

WORDS = NOUNS[:80]
# Ordinary text that says some of the words as well.
TEXT = f"the quick brown ox, a {WORDS[3]} and the {WORDS[5]} jump over a lazy toad; "


def make_prompts(lengths=(512,), bos=False) -> tuple[list[RecallPrompt], object]:
    tokenizer = word_tokenizer(WORDS, bos)
    text = torch.tensor(tokenizer(TEXT * 20, add_special_tokens=False)["input_ids"])
    return build_recall(tokenizer, text, lengths), tokenizer


def test_every_prompt_has_its_length_and_answers():
    prompts, tokenizer = make_prompts((512, 600), bos=True)
    assert {(p.probe, p.length, p.pairs) for p in prompts} == {
        *(("associative", length, pairs) for length in (512, 600) for pairs in (8, 32)),
        *((probe, length, pairs) for length in (512, 600) for probe, pairs in (("copy", 0), ("induction", 8))),
    }
    for prompt in prompts:
        assert prompt.tokens[0] == tokenizer.bos_token_id
        assert len(prompt.tokens) == prompt.length
        assert len(set(prompt.candidates)) == len(prompt.candidates)
        assert {prompt.tokens[place] for place in prompt.places} <= set(prompt.candidates)
    assert len({p.tokens for p in prompts}) == len(prompts)
    assert make_prompts((512, 600), bos=True)[0] == prompts


def test_an_association_is_said_once_and_asked_for_once():
    prompts, tokenizer = make_prompts()
    for prompt in (p for p in prompts if p.probe == "associative"):
        said, asked = tokenizer.decode(prompt.tokens).split(AGAIN)
        lists = []
        for text in (said, asked):
            lines = [line.removeprefix("- ") for line in text.split("\n") if line.startswith("- ")]
            lists.append(dict(line.split(": ") for line in lines))
        assert (len(lists[0]), len(lists[1])) == (prompt.pairs, QUERIES)
        assert lists[1].items() <= lists[0].items()
        ids = {key: tokenizer(f" {key}")["input_ids"][0] for key in WORDS}
        assert [prompt.tokens[place] for place in prompt.places] == [ids[value] for value in lists[1].values()]
        assert prompt.candidates == tuple(ids[value] for value in lists[0].values())
        counts = {word: prompt.tokens.count(ids[word]) for pair in lists[0].items() for word in pair}
        assert sorted(counts.values()) == [1] * 2 * (prompt.pairs - QUERIES) + [2] * 2 * QUERIES
        firsts = [prompt.tokens.index(prompt.tokens[place]) for place in prompt.places]
        assert prompt.distance == sum(a - b for a, b in zip(prompt.places, firsts)) / QUERIES


def test_a_copy_is_one():
    prompts = build_recall(tiny_tokenizer(), make_tokens(1, 500)[0], (101,))
    (copy, *_) = [p for p in prompts if p.probe == "copy"]
    assert copy.tokens[1:51] == copy.tokens[51:]
    assert copy.tokens[0] not in copy.tokens[1:]
    assert copy.places == tuple(range(52, 101))
    assert copy.distance == 50


def test_a_short_copy_of_a_long_text_repeats_no_token():
    prompts = build_recall(tiny_tokenizer(), torch.arange(4, 100).repeat(3), (160,))
    copies = [p for p in prompts if p.probe == "copy"]
    assert all(len(set(p.tokens[:80])) == 80 == len(p.candidates) for p in copies)


def test_pairs_of_induction_stand_nowhere_else():
    prompts, _ = make_prompts((256,))
    for prompt in (p for p in prompts if p.probe == "induction"):
        assert prompt.distance == 256 - 48
        for place in prompt.places:
            before, answer = prompt.tokens[place - 1 : place + 1]
            assert prompt.tokens.count(before) == prompt.tokens.count(answer) == 2
            assert prompt.tokens.index(answer) == prompt.tokens.index(before) + 1 == place - prompt.distance


def test_a_tokenizer_without_words_has_two_probes():
    prompts = build_recall(tiny_tokenizer(), make_tokens(1, 500)[0], (128,))
    assert {p.probe for p in prompts} == {"copy", "induction"}


@pytest.mark.parametrize(
    ("tokens", "length", "message"),
    [
        (range(10, 40), 64, "recall_lengths: 64 is too short for 8 pairs, twice; use 96 or more"),
        (range(10, 27), 128, "recall_lengths: the held-out text has 17 different tokens, and the probes need 18"),
    ],
)
def test_refusals(tokens, length, message):
    with pytest.raises(LinearizeError, match=message):
        build_recall(tiny_tokenizer(), torch.tensor([*tokens]), (length,))


def test_the_named_shortest_length_works():
    with pytest.raises(LinearizeError, match="too short for 32 pairs and 8 questions") as error:
        make_prompts((128,))
    least = int(str(error.value).split("use ")[1].split()[0])
    prompts, _ = make_prompts((least,))
    assert all(len(p.tokens) == least for p in prompts if p.probe == "associative" and p.pairs == 32)


class Reader(nn.Module):
    """Reads lists: after `key:` it says what followed the last `key:` before, if it remembers that."""

    def __init__(self, tokenizer, memory: int):
        super().__init__()
        self.head, self.memory = nn.Linear(1, 1), memory
        self.colon = tokenizer(":")["input_ids"][0]
        self.size = len(tokenizer)
        self.head.forward = lambda hidden: hidden

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, use_cache):
        hidden = torch.zeros(*input_ids.shape, self.size)
        ids = input_ids[0].tolist()
        for t, token in enumerate(ids):
            for s in range(t - 2, max(0, t - self.memory), -1) if token == self.colon else ():
                if ids[s : s + 2] == ids[t - 1 : t + 1]:
                    hidden[0, t, ids[s + 2]] = 5.0
                    break
        return SimpleNamespace(logits=self.head(hidden))


def test_a_list_is_known_to_who_remembers_it():
    prompts, tokenizer = make_prompts((512,))
    prompts = [p for p in prompts if p.probe == "associative"]
    near = int(min(p.distance for p in prompts) / 2)
    found = {"original": recall(Reader(tokenizer, 1000), prompts), "student": recall(Reader(tokenizer, near), prompts)}
    part = summarise_recall(found, prompts, _comparisons(list(found)))["probes"]["associative"]
    assert (part["n_prompts"], part["n_answers"], part["chance_first"]) == (8, 64, (1 / 8 + 1 / 32) / 2)
    rows = part["rows"]
    assert (rows["original"]["first"], rows["original"]["greedy"], rows["original"]["first_ci95"]) == (1, 1, [1, 1])
    assert rows["original"]["nll"] == pytest.approx(math.log1p((len(tokenizer) - 1) * math.exp(-5)), abs=1e-5)
    # What is not remembered leaves all alike, and a tie is no answer.
    assert (rows["student"]["first"], rows["student"]["greedy"]) == (0, 0)
    assert rows["student"]["nll"] == pytest.approx(math.log(len(tokenizer)), abs=1e-5)
    (pair,) = part["comparisons"]
    assert pair == {"row": "student", "against": "original"} | {
        "first_difference": -1.0, "first_ci95": [-1.0, -1.0], "greedy_difference": -1.0, "greedy_ci95": [-1.0, -1.0]
    }  # fmt: skip
    cells = rows["original"]["cells"]
    assert [(c["length"], c["pairs"], c["answers"], c["chance_first"]) for c in cells] == [
        (512, 8, 32, 1 / 8),
        (512, 32, 32, 1 / 32),
    ]


def test_scores_are_those_of_the_whole_models_logits():
    model = make_model("llama")
    prompts = build_recall(tiny_tokenizer(), make_tokens(1, 500)[0].clamp(max=40), (128,))
    for prompt, result in zip(prompts, recall(model, prompts)):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt.tokens])).logits[0].double()
        first = greedy = nll = 0.0
        for place in prompt.places:
            row, answer = logits[place - 1], prompt.tokens[place]
            first += all(row[answer] > row[other] for other in prompt.candidates if other != answer)
            greedy += int(row.argmax()) == answer
            nll += float(row.logsumexp(-1) - row[answer])
        n = len(prompt.places)
        assert result["first"] == pytest.approx(first / n)
        assert result["greedy"] == pytest.approx(greedy / n)
        assert result["nll"] == pytest.approx(nll / n, rel=1e-5)


def test_logits_that_are_not_finite_are_no_answer():
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    prompts = build_recall(tiny_tokenizer(), make_tokens(1, 500)[0], (128,))
    found = {"original": recall(model, prompts)}
    row = summarise_recall(found, prompts, [])["probes"]["copy"]["rows"]["original"]
    assert (row["first"], row["greedy"], row["nll"]) == (0.0, 0.0, None)


INDUCER_TEXT = {"t": torch.arange(4, 32).repeat(20)}


def inducer_options(**changes) -> EvaluateOptions:
    given = {"tokens": 128, "contexts": (128,), "needle_lengths": (), "kl_tokens": 0, "answers": 0}
    return EvaluateOptions(**(given | {"recall_lengths": (128, 192)} | changes))


def test_a_student_that_needs_its_state_recalls_with_it_and_not_without(capsys):
    """The negative control: the same weights, and one row's state is not read."""
    rows = comparison_rows(teach_inducer())
    del rows["student, window off"]  # keeps layer 0 from seeing the token before
    result = evaluate_rows(rows, tiny_tokenizer(), INDUCER_TEXT, inducer_options(), only=["recall"])
    part = result["recall"]["probes"]["induction"]
    first = {row: one["first"] for row, one in part["rows"].items()}
    assert (first["original"], first["student"]) == (1.0, 1.0)
    assert first["student, state off"] <= part["chance_first"]
    assert first["window + sinks"] <= part["chance_first"]
    pairs = {(c["row"], c["against"]): c for c in part["comparisons"]}
    assert pairs["student", "student, state off"]["first_ci95"][0] > 0.5
    assert pairs["student", "original"]["first_difference"] == 0.0
    assert result["notes"] == [
        "Associative recall was left out: the tokenizer has too few common words that are one token."
    ]
    print_evaluation(result)
    shown = capsys.readouterr().out
    assert "recall, induction: 64 answers in 8 prompts" in shown
    assert "-100 (-100 to -100)" in shown


def test_a_model_against_itself_is_no_difference():
    original = make_inducer()
    rows = {"original": lambda: nullcontext(original), "student": lambda: nullcontext(original)}
    options = inducer_options(recall_lengths=(128,))
    result = evaluate_rows(rows, tiny_tokenizer(), INDUCER_TEXT, options, only=["recall"])
    assert set(result["recall"]["probes"]) < set(PROBES)
    for part in result["recall"]["probes"].values():
        assert part["rows"]["student"] == part["rows"]["original"]
        (pair,) = part["comparisons"]
        assert (pair["first_difference"], pair["greedy_difference"]) == (0.0, 0.0)
        assert (pair["first_ci95"], pair["greedy_ci95"]) == ([0.0, 0.0], [0.0, 0.0])
