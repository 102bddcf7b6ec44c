"""`evaluate_rows` from end to end on tiny models, plain and converted."""

import json
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize import LinearizeConfig, convert
from linearize.benchmarks.evaluate import evaluate_rows
from linearize.benchmarks.files import read_json, write_json
from linearize.benchmarks.work import Work
from linearize.distill.options import EvaluateOptions
from linearize.errors import LinearizeError
from linearize.rows import comparison_rows
from linearize.tables import print_evaluation
from tests.tiny_tokenizer import tiny_tokenizer

TEXTS = {"fox": torch.tensor(tiny_tokenizer()("the quick brown fox jumps over the lazy dog, " * 12)["input_ids"])}


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def make_options(**changes) -> EvaluateOptions:
    return EvaluateOptions(
        **(
            {"tokens": 400, "contexts": (100,), "needle_lengths": (150,), "needle_depths": (0.5,), "answer_tokens": 8}
            | {"recall_lengths": ()}
            | changes
        )
    )


def test_converted_rows(tmp_path):
    """All that a converted model's rows go through, and the JSON round trip."""
    items = tmp_path / "items.jsonl"
    items.write_text('{"query": "the quick", "choices": ["brown fox", "cheese"], "gold": 0}\n' * 3, encoding="utf-8")
    model = convert(make_model(), LinearizeConfig(window=8, sinks=2))
    rows = comparison_rows(model)
    result = evaluate_rows(rows, tiny_tokenizer(), TEXTS, make_options(choices=(str(items),)))
    path = write_json(tmp_path / "evaluate.json", result)
    assert read_json(path, "linearize.evaluate") == result
    assert result["rows"] == list(rows)
    perplexity = result["perplexity"]
    assert (perplexity["n_sequences"], perplexity["n_tokens"]) == (4, 396)
    assert (
        perplexity["rows"].keys() == result["choices"]["rows"].keys() == result["needle"]["rows"].keys() == rows.keys()
    )
    assert all(row["n_not_finite"] == 0 for row in perplexity["rows"].values())
    ppl = {name: row["ppl"] for name, row in perplexity["rows"].items()}
    # Untrained, the student without its state is window + sinks; the state changes what comes after the window.
    assert ppl["student, state off"] == pytest.approx(ppl["window + sinks"], rel=1e-5)
    assert abs(ppl["student"] - ppl["student, state off"]) > 1e-3
    assert abs(ppl["window + sinks"] - ppl["original"]) > 1e-3
    pairs = [(pair["row"], pair["against"]) for pair in perplexity["comparisons"]]
    assert ("window + sinks", "original") in pairs
    assert ("student", "student, state off") in pairs
    assert len(pairs) == len(set(pairs))


def test_a_window_over_the_whole_text_gives_the_originals_numbers():
    model = convert(make_model(), LinearizeConfig(window=256, sinks=0))
    result = evaluate_rows(comparison_rows(model), tiny_tokenizer(), TEXTS, make_options())
    rows = result["perplexity"]["rows"]
    assert rows["student"]["ppl"] == pytest.approx(rows["original"]["ppl"], rel=1e-5)
    assert result["needle"]["rows"]["student"] == result["needle"]["rows"]["original"]
    pair = result["perplexity"]["comparisons"][0]
    assert pair["nll_difference"] == pytest.approx(0, abs=1e-5)


def test_the_row_original_is_the_unconverted_model():
    model = make_model()
    plain = evaluate_rows({"original": lambda: nullcontext(model)}, tiny_tokenizer(), TEXTS, make_options())
    rows = comparison_rows(convert(model, LinearizeConfig(window=8)))
    switched = evaluate_rows(rows, tiny_tokenizer(), TEXTS, make_options())
    assert switched["perplexity"]["rows"]["original"] == plain["perplexity"]["rows"]["original"]


def test_each_row_is_entered_once_and_left():
    model = make_model()
    log = []

    def row(name):
        @contextmanager
        def enter():
            log.append(f"+{name}")
            yield model
            log.append(f"-{name}")

        return enter

    rows = {"original": row("original"), "control": row("control")}
    result = evaluate_rows(rows, tiny_tokenizer(), TEXTS, make_options(needle_lengths=()))
    assert log == ["+original", "-original", "+control", "-control"]
    assert (result["needle"], result["choices"]) == (None, None)
    assert result["perplexity"]["comparisons"] == [
        {"row": "control", "against": "original", "nll_difference": 0.0, "ci95": [0.0, 0.0]}
    ]


def test_less_text_than_asked_for_is_said():
    model = make_model()
    rows = {"original": lambda: nullcontext(model)}
    result = evaluate_rows(rows, tiny_tokenizer(), {"fox": TEXTS["fox"][:250]}, make_options(needle_lengths=()))
    assert result["notes"] == ["400 tokens were asked for, the text 'fox' has 250; 200 were used."]
    assert result["perplexity"]["n_sequences"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": (1000,), "tokens": 1000}, "do not fill one sequence of 1000"),
        ({"choices": ("nowhere.jsonl",)}, "'nowhere.jsonl' is not a file"),
        ({"needle_lengths": (5000,)}, "needle_lengths: 5000 is longer"),
    ],
)
def test_bad_options_are_refused_before_a_row_is_entered(changes, message):
    def enter():
        raise AssertionError("a row was entered")

    with pytest.raises(LinearizeError, match=message):
        evaluate_rows({"original": enter}, tiny_tokenizer(), TEXTS, make_options(**changes))


def test_a_row_named_original_is_needed():
    with pytest.raises(LinearizeError, match=r"rows: \['student'\] have no 'original'"):
        evaluate_rows({"student": lambda: nullcontext(None)}, tiny_tokenizer(), TEXTS, make_options())


def write_tasks(folder) -> tuple[str, ...]:
    """A file of each kind of question."""
    files = {
        "arc": {"query": "the quick", "choices": ["brown fox", "cheese"], "gold": 0},
        "winogrande": {"context_options": ["the fox", "the dog"], "continuation": "jumps", "gold": 0},
        "lambada": {"context": "the lazy", "continuation": "dog"},
    }
    for name, item in files.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(item) + "\n") * 4, encoding="utf-8")
    return tuple(str(folder / f"{name}.jsonl") for name in files)


def test_texts_contexts_and_tasks_side_by_side(tmp_path):
    rows = comparison_rows(convert(make_model(), LinearizeConfig(window=8, sinks=2)))
    texts = {"a": TEXTS["fox"], "b": TEXTS["fox"].flip(0)}
    options = make_options(
        contexts=(50, 100),
        choices=write_tasks(tmp_path),
        kl_tokens=200,
        answers=2,
        recall_lengths=(100,),
        attention=True,
    )
    result = evaluate_rows(rows, tiny_tokenizer(), texts, options)
    assert {name: list(found) for name, found in result["texts"].items()} == {"a": ["50", "100"], "b": ["50", "100"]}
    assert result["perplexity"] == result["texts"]["a"]["50"]
    assert [result["texts"]["a"][key]["n_sequences"] for key in ("50", "100")] == [8, 4]
    assert list(result["tasks"]) == ["arc", "winogrande", "lambada"]
    assert result["choices"] == result["tasks"]["arc"]
    assert [result["tasks"][name]["chance"] for name in result["tasks"]] == [0.5, 0.5, 0]
    assert result["task_mean"]["chance"] == pytest.approx(1 / 3)
    kl = result["kl"]
    assert (kl["text"], kl["seq_len"], kl["n_tokens"]) == ("a", 50, 200)
    assert list(kl["rows"]) == [row for row in rows if row != "original"]
    assert all(row["kl"] > 1e-3 for row in kl["rows"].values())
    assert result["generation"]["n_prompts"] == 2
    titles = ["perplexity a", "perplexity b", "choices arc", "choices winogrande", "choices lambada", "needle"]
    assert list(result["seconds_by_measurement"]["original"]) == [*titles, "generation", "recall", "attention"]
    assert list(result["seconds_by_measurement"]["student"]) == [*titles, "kl", "generation", "recall", "attention"]
    assert (result["attention"]["text"], result["attention"]["seq_len"]) == ("a", 50)
    assert (result["letters"], result["lm_eval"]) == (None, None)
    print_evaluation(result)


class Killed(Exception):
    """Stands for a kill in the middle."""


def test_a_stopped_evaluation_goes_on_and_measures_nothing_twice(tmp_path):
    model = convert(make_model(), LinearizeConfig(window=8, sinks=2))
    options = make_options(
        choices=write_tasks(tmp_path), kl_tokens=100, answers=2, recall_lengths=(100,), attention=True
    )
    entered = []

    def counted(dies: str = ""):
        @contextmanager
        def enter(name, row):
            entered.append(name)
            if name == dies:
                raise Killed
            with row() as found:
                yield found

        return {name: lambda name=name, row=row: enter(name, row) for name, row in comparison_rows(model).items()}

    def run(rows, seed=0, **more):
        work = Work(tmp_path / "work", {row: row for row in rows})
        return evaluate_rows(rows, tiny_tokenizer(), TEXTS, options, seed, work, **more)

    whole = evaluate_rows(comparison_rows(model), tiny_tokenizer(), TEXTS, options)
    with pytest.raises(Killed):
        run(counted(dies="student, state off"))
    assert entered == ["original", "window + sinks", "student", "student, state off"]
    entered.clear()
    again = run(counted())
    # The original is entered once more: KL compares the rows that are left with it.
    assert entered == ["original", "student, state off", "student, window off"]
    changing = ("seconds", "seconds_by_measurement", "machine")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in whole.items() if k not in changing
    }
    entered.clear()
    assert run(counted())["texts"] == whole["texts"]
    assert entered == []
    # Another setting is another measurement: a new choice of numbers and stretches for the needles, nothing else.
    other = run(counted(), seed=1, only=["needle"])
    assert entered == list(comparison_rows(model))
    assert other["texts"].keys() == whole["texts"].keys()


def test_only_some_measurements_and_rows(tmp_path):
    model = convert(make_model(), LinearizeConfig(window=8, sinks=2))
    rows = {name: row for name, row in comparison_rows(model).items() if name in ("original", "student")}
    result = evaluate_rows(rows, tiny_tokenizer(), TEXTS, make_options(), only=["needle"])
    assert (result["perplexity"], result["kl"], result["generation"], result["texts"]) == (None, None, None, {})
    assert list(result["needle"]["rows"]) == ["original", "student"]
    print_evaluation(result)
    with pytest.raises(LinearizeError, match="only: 'ppl' is not measured; choose from perplexity, choices"):
        evaluate_rows(rows, tiny_tokenizer(), TEXTS, make_options(), only=["ppl"])


def test_a_broken_row_does_not_stop_the_others():
    broken = make_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    model = make_model()
    rows = {"original": lambda: nullcontext(model), "student": lambda: nullcontext(broken)}
    result = evaluate_rows(rows, tiny_tokenizer(), TEXTS, make_options(needle_lengths=()))
    assert result["perplexity"]["rows"]["student"]["n_not_finite"] == 396
    json.dumps(result, allow_nan=False)
