"""The measurement of speculative decoding, on a tiny student with a LoRA of its own."""

import json
from pathlib import Path

import pytest

from linearize import LinearizeConfig, convert
from linearize.benchmarks import speculative
from linearize.benchmarks.files import read_json
from linearize.benchmarks.speculative import KIND, compare_texts, main
from linearize.checkpoint import save
from linearize.models import load_model
from tests.saved_models import save_tiny_model
from tests.tiny_models import make_model, make_tokens, randomize_far

CHATS = [("what did they keep", "what they saw"), ("where is the house", "near the far hill"), ("who", "they")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), chat=True)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    original, tokenizer = load_model(model, "float32", "cpu")
    student = randomize_far(convert(original, LinearizeConfig(window=8, sinks=2)))
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    save(get_peft_model(student, lora), folder, adapter=True, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "chats.jsonl"
    roles = ("user", "assistant")
    lines = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, chat)]} for chat in CHATS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(name, prompts, out, *words):
    return main([str(name), "--prompts", str(prompts), "--dtype", "float32", "--out", str(out), *words])


def test_a_student_with_lora(adapter, prompts, tmp_path, capsys):
    out = tmp_path / "found.json"
    words = (
        "--contexts",
        "64,40",
        "--equality",
        "3",
        "--new-tokens",
        "6",
        "--repeats",
        "2",
        "--modes",
        "dynamic,static",
    )
    assert run(adapter, prompts, out, *words) == 0
    found = read_json(out, KIND)
    assert (found["trained"], found["weights"], found["draft_tokens"]) == (True, 1, "auto")
    assert found["conversion"]["window"] == 8
    assert found["equality"]["prompts"] == found["equality"]["equal"] == 3
    assert found["equality"]["differences"] == []
    assert found["equality"]["original_against_itself"] == {"prompts": 0, "tokens": 0}
    assert [cell["context"] for cell in found["cells"]] == [64, 40]
    for cell in found["cells"]:
        assert set(cell["original"]) == {"dynamic", "static"}
        assert cell["mode"] in cell["original"]
        ours, theirs = cell["speculative"]["ms_per_token"], cell["original"][cell["mode"]]["ms_per_token"]
        assert theirs["min"] / ours["max"] <= cell["speedup"]["p50"] <= theirs["max"] / ours["min"]
        assert 1 <= cell["speculative"]["acceptance_length"] <= 5
        assert len(cell["matmul_ms"]) == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("3 of 3 texts equal; ")
    assert printed[-1] == str(out)


def test_an_original_apart(adapter, prompts, tmp_path):
    assert run(adapter, prompts, tmp_path / "found.json", "--equality", "2", "--new-tokens", "4", "--apart") == 0
    found = read_json(tmp_path / "found.json", KIND)
    assert (found["weights"], found["equality"]["equal"], found["cells"]) == (2, 2, [])


def test_an_original_drafts_untrained(model, prompts, tmp_path):
    words = ("--equality", "2", "--new-tokens", "4", "--window", "4", "--draft-tokens", "3")
    assert run(model, prompts, tmp_path / "found.json", *words) == 0
    found = read_json(tmp_path / "found.json", KIND)
    assert (found["trained"], found["conversion"]["window"], found["draft_tokens"]) == (False, 4, 3)


def test_differences_are_found():
    """Of a student whose own weights are others: its original is another model."""
    original, other = make_model("llama", seed=0), make_model("llama", seed=1)
    student = convert(other, LinearizeConfig(window=4, sinks=2))
    tokens = make_tokens(2, 9).tolist()
    found = compare_texts(student, original, False, tokens, 6)
    assert found["equal"] == 0
    assert [one["prompt"] for one in found["differences"]] == [0, 1]
    assert all(one["margin"] > 0 for one in found["differences"])
    assert compare_texts(student, original, True, tokens, 6)["equal"] == 2


def test_prompts_of_a_context_end_with_a_question(model, prompts):
    _, tokenizer = load_model(model, "float32", "cpu")
    made = speculative._long_prompts(tokenizer, [str(prompts)], 100, 3)
    assert [len(one) for one in made] == [100] * 3
    assert len({tuple(one) for one in made}) == 3
    questions = speculative.encode_prompts(tokenizer, [question for question, _ in CHATS])
    assert all(any(one[-len(question) :] == question for question in questions) for one in made)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "contexts: neither they nor --equality are given"),
        (("--equality", "9"), "prompts: the files have 3 but --equality asks for 9"),
        (("--contexts", "2"), "contexts: 2 tokens are less than a question"),
        (("--equality", "2", "--draft-tokens", "few"), "draft_tokens: 'few' is neither a number nor 'auto'"),
        (("--equality", "2", "--new-tokens", "1"), "new_tokens: 1 is less than 2"),
        (("--contexts", "64", "--modes", "best"), "modes: the original has none of best here; it has dynamic"),
    ],
)
def test_errors(words, message, model, prompts, tmp_path, capsys):
    assert run(model, prompts, tmp_path / "found.json", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "found.json").exists()


def test_a_whole_student_needs_its_original(model, prompts, tmp_path, capsys):
    student, tokenizer = load_model(model, "float32", "cpu")
    save(convert(student, LinearizeConfig(window=8)), tmp_path / "student", tokenizer=tokenizer)
    assert run(tmp_path / "student", prompts, tmp_path / "found.json", "--equality", "2") == 2
    assert "is a whole student; name its original with --base" in capsys.readouterr().err
    words = ("--equality", "2", "--new-tokens", "4", "--base", str(model))
    assert run(tmp_path / "student", prompts, tmp_path / "found.json", *words) == 0
    assert read_json(tmp_path / "found.json", KIND)["weights"] == 2
