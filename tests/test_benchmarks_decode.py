"""Decode speed: what is timed, in which order, and what is made of the times."""

import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from linearize import LinearizeConfig, convert
from linearize.benchmarks import decode
from linearize.benchmarks.speed import Cell, Sample, comparisons, crossover, describe_cells
from linearize.errors import LinearizeError
from linearize.rows import speed_rows

TOKENS = torch.arange(100)


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return LlamaForCausalLM(config).eval()


def make_samples(times: dict[tuple[str, str], dict[int, list[float]]]) -> dict[Cell, list[Sample]]:
    """(row, cache) -> context -> ms of each repeat."""
    held = {"softmax": 1, "window": 0, "state": 0, "total": 1}
    return {
        Cell(row, cache, context): [Sample(10 * ms, (ms, ms, ms), held) for ms in repeats]
        for (row, cache), contexts in times.items()
        for context, repeats in contexts.items()
    }


def test_converted_model_from_end_to_end():
    model = convert(make_model(), LinearizeConfig(window=8, sinks=2))
    result = decode.bench_decode(speed_rows(model), [40, 20], TOKENS, decode_tokens=3, repeats=2, batch=2)
    json.dumps(result, allow_nan=False)
    assert result["contexts"] == [20, 40]
    assert result["dropped"] == []
    cells = {(cell["row"], cell["cache"], cell["context"]): cell for cell in result["cells"]}
    rows = list(result["rows"])
    assert cells.keys() == {
        (row, cache, context)
        for context in (20, 40)
        for row in rows
        for cache in (("dynamic", "static") if row == "original" else ("dynamic",))
    }
    for cell in cells.values():
        times = cell["ms_per_token"]
        assert cell["repeats"] == 2
        assert 0 < times["min"] <= times["max"]
        assert times["p50"] <= times["p95"]
        assert cell["tokens_per_s"] == pytest.approx(2000 / times["p50"])
    # 2 layers, keys and values, batch 2, 2 kv heads, head_dim 8, float32; the first repeat ends at context + 3.
    per_token = 2 * 2 * 2 * 2 * 8 * 4
    assert cells["original", "dynamic", 20]["cache_bytes"]["total"] == per_token * 23
    assert cells["original", "static", 40]["cache_bytes"]["total"] == per_token * 43
    student = [cells["student", "dynamic", context]["cache_bytes"] for context in (20, 40)]
    assert student[0] == student[1]
    assert student[0]["softmax"] == 0
    assert student[0]["window"] > 0
    assert student[0]["state"] > 0
    assert len(result["blocks"]) == 4
    assert result["dtypes"]["student"] == "float32"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_measure_decodes_what_generation_does(cache, monkeypatch):
    model = make_model()
    read = []
    forward = model.forward

    def spy(**kwargs):
        read.append(kwargs["input_ids"])
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", spy)
    prompt = torch.randint(128, (1, 30))
    with torch.inference_mode():
        sample = decode.measure(model, prompt, cache, 4)
    assert len(sample.step_ms) == 4
    assert [ids.shape[1] for ids in read] == [30, 1, 1, 1, 1, 1, 1]
    want = make_model()
    want.load_state_dict(model.state_dict())
    written = want.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.cat(read, 1).tolist() == written.tolist()


def fake_rows(names: list[str], log: list[str]) -> dict:
    def row(name):
        @contextmanager
        def enter():
            log.append(name)
            yield nn.Linear(1, 1)

        return enter

    return {name: row(name) for name in names}


@pytest.fixture
def fake(monkeypatch):
    """Replaces the clock and the measurement; a measurement takes one second per token of its prompt."""
    state = SimpleNamespace(now=0.0, lengths=[], prompts=[], matmul=[1.0], log=[])

    def measure(model, prompt, cache, decode_tokens):
        state.now += prompt.shape[1]
        state.lengths.append(prompt.shape[1])
        state.prompts.append(prompt)
        state.log.append(cache)
        return Sample(1.0, (1.0,) * decode_tokens, {"softmax": 0, "window": 0, "state": 0, "total": 0})

    def matmul(device):
        return state.matmul.pop(0) if len(state.matmul) > 1 else state.matmul[0]

    monkeypatch.setattr(decode, "measure", measure)
    monkeypatch.setattr(decode, "matmul_ms", matmul)
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: state.now))
    return state


def test_rows_take_turns_on_the_same_tokens(fake):
    log = fake.log
    decode.bench_decode(fake_rows(["original", "student"], log), [10, 20], TOKENS, decode_tokens=4, repeats=2)
    log = log[1:]  # the first enters the original to ask for its device
    runs = [tuple(log[i : i + 2]) for i in range(0, len(log), 2)]
    static, dynamic, student = ("original", "static"), ("original", "dynamic"), ("student", "dynamic")
    assert runs == 2 * [static, dynamic, student] + 2 * [dynamic, student, static]
    for block in (fake.prompts[i : i + 3] for i in range(0, 12, 3)):
        assert all(torch.equal(block[0], prompt) for prompt in block)
    assert not torch.equal(fake.prompts[0], fake.prompts[6][:, :8])


def test_repeats_time_consecutive_positions(fake):
    decode.bench_decode(fake_rows(["original"], []), [50], TOKENS, decode_tokens=4, repeats=3)
    # Two steps warm up; the timed ones start at 50, 54 and 58 tokens of context.
    assert fake.lengths[::2] == [48, 52, 56]


def test_a_context_that_does_not_fit_is_dropped_for_all_rows(fake):
    rows = fake_rows(["original", "student"], [])
    # Blocks take about 20, 200 and 2000 seconds; 7 minutes hold the first two once and the small one again.
    result = decode.bench_decode(rows, [10, 100, 1000], TOKENS, decode_tokens=1, repeats=3, max_minutes=7)
    assert result["contexts"] == [10, 100]
    assert [drop["context"] for drop in result["dropped"]] == [1000]
    assert result["dropped"][0]["reason"] == "not one repeat of all rows fitted into 7 minutes"
    repeats = {(cell["row"], cell["cache"], cell["context"]): cell["repeats"] for cell in result["cells"]}
    assert len(repeats) == 6
    assert {count for (_, _, context), count in repeats.items() if context == 10} == {3}
    assert {count for (_, _, context), count in repeats.items() if context == 100} == {1}
    assert fake.now < 7 * 60


def test_the_smallest_context_is_measured_once_whatever_the_limit(fake):
    result = decode.bench_decode(fake_rows(["original"], []), [10, 20], TOKENS, repeats=3, max_minutes=0.01)
    assert result["contexts"] == [10]
    assert {cell["repeats"] for cell in result["cells"]} == {1}


def test_a_block_that_runs_late_counts_for_no_row(fake, monkeypatch):
    measure = decode.measure

    def slow(model, prompt, cache, decode_tokens):
        fake.now += 600 if prompt.shape[1] > 50 else 0  # far more than in proportion to the context
        return measure(model, prompt, cache, decode_tokens)

    monkeypatch.setattr(decode, "measure", slow)
    result = decode.bench_decode(fake_rows(["original", "student"], []), [10, 100], TOKENS, repeats=2, max_minutes=9)
    assert result["contexts"] == [10]
    assert {cell["context"] for cell in result["cells"]} == {10}


def test_a_machine_that_changes_is_marked(fake):
    fake.matmul = [1.0, 1.05, 1.0, 1.2, 1.0, 0.8, 1.0]
    result = decode.bench_decode(fake_rows(["original"], []), [10], TOKENS, repeats=4)
    assert [block["moved"] for block in result["blocks"]] == [False, True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": []}, "contexts: the list is empty"),
        ({"contexts": [2]}, "contexts: 2 is too short to warm up; use 3 or more"),
        ({"repeats": 0}, "repeats: 0 measures nothing"),
        ({"decode_tokens": 0}, "decode_tokens: 0 measures nothing"),
        ({"batch": 0}, "batch: 0 measures nothing"),
        ({"max_minutes": 0}, "max_minutes: 0 leaves no time"),
        ({"tokens": torch.zeros(2, 2)}, "is not one text"),
        ({"rows": {"student": nullcontext}}, "have no 'original'"),
    ],
)
def test_refusals(options, message):
    arguments = {"rows": {"original": nullcontext}, "contexts": [10], "tokens": TOKENS} | options
    with pytest.raises(LinearizeError, match=message):
        decode.bench_decode(**arguments)


def test_describe_cells_takes_medians_and_the_spread_of_repeats():
    samples = {Cell("original", "dynamic", 8): [Sample(5.0, (1.0, 2.0, 9.0), {}), Sample(7.0, (3.0, 3.0, 3.0), {})]}
    (cell,) = describe_cells(samples, batch=4)
    assert cell["ms_per_token"] == {"p50": 3.0, "p95": 7.5, "mean": 3.5, "min": 2.0, "max": 3.0}
    assert cell["prefill_ms"] == {"p50": 6.0, "min": 5.0, "max": 7.0}
    assert cell["tokens_per_s"] == pytest.approx(4000 / 3)


ORIGINAL = {("original", "dynamic"): {100: [2, 2], 300: [6, 6]}, ("original", "static"): {100: [3, 3], 300: [5, 5]}}


@pytest.mark.parametrize(
    ("student", "kind", "context"),
    [
        ({100: [3, 3], 300: [3, 3]}, "at", 100 + 200 / 3),
        ({100: [1, 1], 300: [4, 4]}, "everywhere", None),
        ({100: [2, 2], 300: [5, 5]}, "never", None),  # as fast is not faster
        ({100: [1, 1], 300: [9, 9]}, "mixed", None),
    ],
)
def test_crossover_against_the_better_cache(student, kind, context):
    samples = make_samples({**ORIGINAL, ("student", "dynamic"): student})
    found = crossover(samples, "original", "student")
    assert (found["kind"], found["measured_to"]) == (kind, 300)
    assert found["context"] == (None if context is None else pytest.approx(context))


def test_speedup_is_against_the_better_cache_at_each_context():
    samples = make_samples({**ORIGINAL, ("student", "dynamic"): {100: [4, 4], 300: [2, 2.5]}})
    short, long = comparisons(samples, "original")
    assert (short["baseline_cache"], short["verdict"], short["speedup"]["p50"]) == ("dynamic", "slower", 0.5)
    assert (long["baseline_cache"], long["verdict"]) == ("static", "faster")
    assert long["speedup"] == {"p50": 2.25, "min": 2.0, "max": 2.5}


def test_repeats_that_disagree_decide_nothing():
    times = {("original", "dynamic"): {100: [2, 2, 2]}, ("student", "dynamic"): {100: [1.9, 2.1, 1.8]}}
    (pair,) = comparisons(make_samples(times), "original")
    assert pair["verdict"] == "undecided"
