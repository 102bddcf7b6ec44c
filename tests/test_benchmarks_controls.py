"""Negative controls of measurements, from end to end: a model beside itself is no difference, a broken one is found.

The broken student has lost its layers: whatever comes before the last token is nothing to it. What an original is right
about is what it says itself: the text is its own, and so are the answers. Where a measurement has controls of its own
kind, they stand beside its other tests: needle, recall, attention, letters that collapse, kernels that are compared.
"""

import copy
import json
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.benchmarks import decode
from linearize.benchmarks.choices import multiple_choice
from linearize.benchmarks.evaluate import evaluate_rows
from linearize.benchmarks.items import Item
from linearize.distill.options import EvaluateOptions
from tests.tiny_models import make_tokens
from tests.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "cheese", "moon", "river", "stone"]


@pytest.fixture(scope="module")
def original() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def broken(original: Any) -> Any:
    model = copy.deepcopy(original)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def texts(original: Any) -> dict[str, torch.Tensor]:
    """What the original writes by chance: its expected loss on that is the least of all models."""
    torch.manual_seed(0)
    sampling = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    rows = original.generate(make_tokens(8, 1), max_new_tokens=63, **sampling)
    return {"own": rows.flatten()}


@pytest.fixture(scope="module")
def choices(original: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixty questions to which the original knows the answer, as it is its own."""
    generator = torch.Generator().manual_seed(5)

    def words(count: int) -> str:
        return " ".join(WORDS[int(n)] for n in torch.randint(len(WORDS), (count,), generator=generator))

    items = [Item(words(6), tuple(f"{words(2)} {end}" for end in WORDS[:4]), 0) for _ in range(60)]
    path = tmp_path_factory.mktemp("controls") / "own.jsonl"
    scores = multiple_choice(original, TOKENIZER, items)
    normalised = [
        [score / len(choice.encode()) for score, choice in zip(row, item.choices, strict=True)]
        for row, item in zip(scores, items, strict=True)
    ]
    lines = [
        {"query": item.query, "choices": item.choices, "gold": max(range(4), key=row.__getitem__)}
        for item, row in zip(items, normalised, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def measure(original: Any, student: Any, texts: dict[str, torch.Tensor], **changes: Any) -> dict[str, Any]:
    rows = {"original": lambda: nullcontext(original), "student": lambda: nullcontext(student)}
    nothing = {"needle_lengths": (), "recall_lengths": (), "kl_tokens": 0, "answers": 0}
    options = EvaluateOptions(**(nothing | {"tokens": 512, "contexts": (64,)} | changes))
    return evaluate_rows(rows, TOKENIZER, texts, options)


def test_a_model_beside_itself_is_no_difference(original: Any, texts: dict[str, torch.Tensor], choices: str):
    same = copy.deepcopy(original)
    found = measure(
        original,
        same,
        texts,
        kl_tokens=512,
        answers=4,
        answer_tokens=8,
        choices=(choices,),
        letters=10,
        needle_lengths=(150,),
        needle_depths=(0.5,),
        recall_lengths=(128,),
    )
    (pair,) = found["perplexity"]["comparisons"]
    assert (pair["nll_difference"], pair["ci95"]) == (0.0, [0.0, 0.0])
    assert found["kl"]["rows"]["student"]["kl"] < 1e-6
    letters = found["letters"]["own"]
    for part in (found["needle"], found["generation"], letters, *found["recall"]["probes"].values()):
        assert part["rows"]["student"] | {"length_ratio": 1} == part["rows"]["original"] | {"length_ratio": 1}
    assert found["generation"]["rows"]["student"]["length_ratio"] == 1
    kept = found["choices"]["rows"]["student"]["normalised"]["retention_over_chance"]
    assert (kept["value"], kept["ci95"]) == (1.0, [1.0, 1.0])
    assert [(pair["accuracy_difference"], pair["ci95"]) for pair in letters["comparisons"]] == [(0.0, [0.0, 0.0])]


def test_a_broken_student_has_a_higher_perplexity(original: Any, broken: Any, texts: dict[str, torch.Tensor]):
    (pair,) = measure(original, broken, texts)["perplexity"]["comparisons"]
    assert pair["ci95"][0] > 0.1


def test_a_broken_student_is_far_from_its_original(original: Any, broken: Any, texts: dict[str, torch.Tensor]):
    found = measure(original, broken, texts, kl_tokens=512)
    row = found["kl"]["rows"]["student"]
    assert row["ci95"][0] > 0.1
    # On text of the original's own the mean KL is what the loss is worse by, but for chance.
    assert row["kl"] == pytest.approx(found["perplexity"]["comparisons"][0]["nll_difference"], rel=0.5)


def test_a_broken_student_loses_the_answers(original: Any, broken: Any, texts: dict[str, torch.Tensor], choices: str):
    rows = measure(original, broken, texts, choices=(choices,))["choices"]["rows"]
    assert rows["original"]["normalised"]["accuracy"] == 1
    kept = rows["student"]["normalised"]["retention_over_chance"]
    assert kept["ci95"][1] < 0.9


def test_a_student_that_cannot_stop_is_found(original: Any, texts: dict[str, torch.Tensor]):
    """The original ends every answer; the student is the same but for that token, and runs into a loop."""
    ends, runs = copy.deepcopy(original), copy.deepcopy(original)
    with torch.no_grad():
        for model in (ends, runs):
            for layer in model.model.layers:  # the next token is a function of this one: a loop, if nothing ends it
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        ends.lm_head.weight.mul_(0.01)
        ends.lm_head.weight[TOKENIZER.eos_token_id] = ends.model.embed_tokens.weight.mean(0)
        runs.lm_head.weight[TOKENIZER.eos_token_id] = 0
    rows = measure(ends, runs, texts, answers=6, answer_tokens=64)["generation"]["rows"]
    assert rows["original"]["end_rate"] > rows["student"]["end_rate"] == 0
    assert rows["student"]["loop_rate"] > rows["original"]["loop_rate"]
    assert rows["student"]["repetition"] > 0.3
    assert rows["student"]["mean_length"] == 64


def test_a_student_that_is_slowed_down_is_slower_by_the_clock(original: Any, monkeypatch: pytest.MonkeyPatch):
    rates = {"device": "cpu", "name": "made up", "read_gb_s": 10.0, "matmul_gflop_s": {"float32": 100.0}}
    monkeypatch.setattr(decode, "bandwidth", lambda device, dtypes: rates)  # which takes seconds to measure
    slowed = copy.deepcopy(original)
    slowed.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    rows = {"original": lambda: nullcontext(original), "student": lambda: nullcontext(slowed)}
    sizes = {"decode_tokens": 2, "repeats": 4, "modes": ["dynamic"]}
    (pair,) = decode.bench_decode(rows, [16], torch.arange(100), **sizes)["comparisons"]
    assert (pair["row"], pair["verdict"]) == ("student", "slower")
    assert pair["speedup"]["ci95"][1] < 1
