"""Largest batches under a memory limit: what is measured, what is predicted from what, and the cost of answers."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from linearize.benchmarks import capacity
from linearize.benchmarks.capacity import KIND, bench_capacity
from linearize.benchmarks.files import read_json
from linearize.benchmarks.measurement import WARMUP
from linearize.benchmarks.roofline import Roof, model_costs, predict, step_seconds
from linearize.benchmarks.speed import Sample
from linearize.benchmarks.step_costs import prefill_flops
from linearize.cli import app
from linearize.config import LinearizeConfig
from linearize.convert import converted_layers, is_converted
from linearize.errors import LinearizeError
from linearize.rows import speed_rows
from tests.saved_models import save_tiny_model
from tests.tiny_models import make_config, make_student

CONFIG = LinearizeConfig(window=4, sinks=2)
RATES = {"name": "made up", "read_gb_s": 0.1, "matmul_gflop_s": {"float32": 0.01}}
ROOF = Roof("made up", 1e8, {"float32": 1e7}, None)
MEMORY = 3_000_000


@pytest.fixture(scope="module")
def rows():
    return speed_rows(make_student("llama", "normalizer"))


@pytest.fixture
def made_up(monkeypatch):
    """Prefills that take 3 times their bound and steps that take 5 ms beyond theirs, recorded: (converted, batch,
    tokens behind the first timed step, tokens read, mode). In the mode "static" a step takes 1 ms more."""
    measured = []

    def costs(model):
        return costs_of("student" if is_converted(model) else "original")

    def measure(model, run):
        batch, read = run.prompt.shape
        context = read + run.filled + WARMUP
        measured.append((is_converted(model), batch, context, read, run.mode.name))
        assert run.capacity == context + run.decode_tokens
        half = run.decode_tokens // 2
        ms = 1e3 * step_seconds(costs(model), context + half, batch, ROOF) + 5 + run.mode.static
        return Sample(None, (ms - 2,) * half + (ms + 2,) * half, {})

    def measure_prefill(model, prompt):
        batch, length = prompt.shape
        measured.append((is_converted(model), batch, length, length, "prefill"))
        return 3e3 * bound_of_prefill(costs(model), length)

    # Of the original's four modes two would change nothing where this product is the slower one.
    monkeypatch.setattr("linearize.projections.product_ms", lambda threads: (1.0, 2.0))
    monkeypatch.setattr(capacity, "measure", measure)
    monkeypatch.setattr(capacity, "measure_prefill", measure_prefill)
    monkeypatch.setattr(capacity, "bandwidth", lambda device, dtypes: RATES)
    monkeypatch.setattr(capacity, "available_memory", lambda device: 2**40)
    return measured


def bound_of_prefill(costs, tokens: int) -> float:
    return predict(costs.read_bytes, prefill_flops(costs, tokens), ROOF, "float32")


def costs_of(row: str):
    return model_costs(make_config("llama"), None if row == "original" else CONFIG, "float32")


def test_everything_is_measured_where_that_is_possible(rows, made_up):
    found = bench_capacity(rows, MEMORY, [1000, 200], answer_tokens=40, max_minutes=1e9)
    assert (found["kind"], found["rows"], found["dtype"]) == (KIND, ["original", "student"], "float32")
    assert found["decode_tokens"] == 4  # W, so that one of them folds
    assert [(x["context"], x["row"]) for x in found["cells"]] == [
        (200, "original"), (200, "student"), (1000, "original"), (1000, "student"),
    ]  # fmt: skip
    for cell in found["cells"]:
        costs, batch, prompt = costs_of(cell["row"]), cell["batch"], cell["context"] - 40
        assert cell["prompt_tokens"] == prompt
        assert costs.weight_bytes + costs.cache_bytes(cell["context"], batch) <= MEMORY
        assert costs.weight_bytes + costs.cache_bytes(cell["context"], batch + 1) > MEMORY
        step, prefill = cell["step"], cell["prefill"]
        assert (step["how"], step["at"], step["reason"]) == ("measured", batch, None)
        assert (prefill["how"], prefill["at"], prefill["reason"]) == ("measured", prompt, None)
        # The step in the middle of the answer, in the best mode.
        assert (step["mode"], prefill["mode"]) == ("dynamic", None)
        assert step["ms"] == pytest.approx(1e3 * step_seconds(costs, prompt + 20, batch, ROOF) + 5)
        assert step["bound_ms"] == pytest.approx(1e3 * step_seconds(costs, prompt + 20, batch, ROOF))
        assert cell["tokens_per_s"] == pytest.approx(1e3 * batch / step["ms"])
        read = 3 * bound_of_prefill(costs, prompt)
        seconds = 1000 * (read + 40 * step["ms"] / 1e3 / batch)
        assert cell["seconds_per_1000_answers"] == pytest.approx(seconds)
    assert (False, 1, 960, 960, "prefill") in made_up  # prompts are read one at a time
    assert {mode for converted, *_, mode in made_up if not converted} == {"prefill", "dynamic", "static"}
    # Of a long context a part is read, of a short one all.
    steps = [(context, read) for *_, context, read, mode in made_up if mode == "dynamic"]
    assert len(steps) == 4
    for context, read in steps:
        assert read == context - WARMUP if context < 500 else 512 <= read < 600
    json.dumps(found, allow_nan=False)


def test_a_model_beside_itself_and_one_that_is_slowed_down(rows, made_up, monkeypatch):
    """The same batch and the same cost of answers; a step that takes 1.5 times as long raises the cost by what it is of
    it, and nothing else."""
    asked = {"answer_tokens": 40, "max_minutes": 1e9}
    twice = {"original": rows["original"], "student": rows["original"]}
    original, same = bench_capacity(twice, MEMORY, [200], **asked)["cells"]
    assert same == original | {"row": "student"}

    before = bench_capacity(rows, MEMORY, [200], **asked)["cells"]
    quick = capacity.measure

    def slowed(model, run):
        sample, times = quick(model, run), 1.5 if is_converted(model) else 1
        return replace(sample, step_ms=tuple(times * ms for ms in sample.step_ms))

    monkeypatch.setattr(capacity, "measure", slowed)
    original, student = bench_capacity(rows, MEMORY, [200], **asked)["cells"]
    assert original == before[0]
    assert student["batch"] == before[1]["batch"]
    assert student["step"]["ms"] == pytest.approx(1.5 * before[1]["step"]["ms"])
    assert student["tokens_per_s"] == pytest.approx(before[1]["tokens_per_s"] / 1.5)
    more = 1000 * 40 * (student["step"]["ms"] - before[1]["step"]["ms"]) / 1e3 / student["batch"]
    assert student["seconds_per_1000_answers"] == pytest.approx(before[1]["seconds_per_1000_answers"] + more)


def test_a_prompt_of_its_own_length(rows, made_up):
    cell = bench_capacity(rows, MEMORY, [1000], 40, prompt_tokens=100, max_minutes=1e9)["cells"][0]
    assert (cell["prompt_tokens"], cell["prefill"]["at"]) == (100, 100)
    assert cell["batch"] == costs_of("original").largest_batch(1000, MEMORY)  # room for the whole context all the same
    assert cell["step"]["bound_ms"] == pytest.approx(1e3 * step_seconds(costs_of("original"), 120, cell["batch"], ROOF))


def test_what_takes_too_long_is_predicted_from_less(rows, made_up):
    original = costs_of("original")
    batch, middle = original.largest_batch(500, MEMORY), 480
    assert batch >= 4
    # Time to read half of the batch and take 4 steps in each of two modes, but not for all of it.
    token, read = 3 * bound_of_prefill(original, 460) / 460, middle - WARMUP - 2
    half, whole = (2 * (n * read * token + 4 * step_seconds(original, middle, n, ROOF)) for n in (batch // 2, batch))
    found = bench_capacity(rows, MEMORY, [500], 40, max_minutes=(half + whole) / 2 / 60)["cells"][0]
    step = found["step"]
    assert found["prefill"]["how"] == "measured"
    assert (step["how"], step["at"]) == ("predicted", batch // 2)
    assert step["reason"].startswith(f"{batch} x {middle} tokens would take about ")
    # Beyond its bound half of the batch takes 5 ms, and so does all of it.
    assert step["ms"] == pytest.approx(1e3 * step_seconds(original, middle, batch, ROOF) + 5)
    assert found["tokens_per_s"] == pytest.approx(1e3 * batch / step["ms"])


def test_what_each_sequence_costs_beyond_its_bound_is_predicted_too(rows, made_up, monkeypatch):
    plain, original = capacity.measure, costs_of("original")
    batch = original.largest_batch(500, MEMORY)
    assert batch // 2 >= 2

    def measure(model, run):
        if run.prompt.shape[0] > batch // 2:
            raise torch.OutOfMemoryError("out of memory")
        sample = plain(model, run)
        return replace(sample, step_ms=tuple(ms + 3 * run.prompt.shape[0] for ms in sample.step_ms))

    monkeypatch.setattr(capacity, "measure", measure)
    step = bench_capacity(rows, MEMORY, [500], 40, max_minutes=1e9)["cells"][0]["step"]
    assert (step["how"], step["at"]) == ("predicted", batch // 2)
    assert step["ms"] == pytest.approx(1e3 * step_seconds(original, 480, batch, ROOF) + 5 + 3 * batch)


def test_a_long_prompt_is_predicted_from_a_shorter_one(rows, made_up):
    original = costs_of("original")
    minutes = 0.6 * 4 * bound_of_prefill(original, 960) / 60  # the first is expected to take 4 times its bound
    prefill = bench_capacity(rows, MEMORY, [1000], 40, max_minutes=minutes)["cells"][0]["prefill"]
    assert (prefill["how"], prefill["at"]) == ("predicted", 480)
    assert prefill["ms"] == pytest.approx(3e3 * bound_of_prefill(original, 960))


def test_what_this_machine_cannot_hold_is_a_bound(rows, made_up, monkeypatch):
    monkeypatch.setattr(capacity, "available_memory", lambda device: 1000)
    found = bench_capacity(rows, MEMORY, [500], 40, max_minutes=1e9)["cells"][0]
    assert made_up == []
    for name in ("step", "prefill"):
        assert (found[name]["how"], found[name]["at"]) == ("bound", None)
        assert found[name]["ms"] == found[name]["bound_ms"]
        assert found[name]["reason"].endswith("of 1.0 KiB free")


def test_running_out_of_memory_halves_the_batch(rows, made_up, monkeypatch):
    plain = capacity.measure

    def measure(model, run):
        if run.prompt.shape[0] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return plain(model, run)

    monkeypatch.setattr(capacity, "measure", measure)
    step = bench_capacity(rows, MEMORY, [500], 40, max_minutes=1e9)["cells"][0]["step"]
    batch = costs_of("original").largest_batch(500, MEMORY)
    assert (step["how"], step["reason"]) == ("predicted", f"there is too little memory for {batch} here")
    assert 1 <= step["at"] <= 2


def test_nothing_fits(rows, made_up):
    for cell in bench_capacity(rows, 1000, [500], 40)["cells"]:
        assert (cell["batch"], cell["cache_bytes"]) == (0, 0)
        assert cell["step"] is cell["prefill"] is cell["tokens_per_s"] is cell["seconds_per_1000_answers"] is None
    assert made_up == []


def test_real_measurements_hold_as_many_bytes_as_the_batch_was_chosen_by(rows, monkeypatch):
    """No made-up times: the cache that a measurement leaves is the one that was counted."""
    held = []
    plain = capacity.measure

    def measure(model, run):
        sample = plain(model, run)
        total = sample.cache_bytes["total"]
        if is_converted(model) and run.mode.static:  # keeps no chunk to go back by
            window = LinearizeConfig.from_dict(model.config.linearize).window
            total += run.prompt.shape[0] * len(converted_layers(model)) * window * 2 * 2 * 16 * 4
        held.append((is_converted(model), run.prompt.shape[0], run.capacity, total))
        return sample

    monkeypatch.setattr(capacity, "measure", measure)
    monkeypatch.setattr(capacity, "bandwidth", lambda device, dtypes: RATES)
    memory = 600_000
    bench_capacity(rows, memory, [64, 700], answer_tokens=16, max_minutes=1e9)
    assert {converted for converted, *_ in held} == {True, False}
    for converted, batch, tokens, total in held:
        costs = costs_of("student" if converted else "original")
        assert batch == costs.largest_batch(700 if tokens > 64 else 64, memory)
        assert total == costs.cache_bytes(tokens, batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": 0}, "memory: 0 is below 1; use 1 or more"),
        ({"answer_tokens": 0}, "answer_tokens: 0 is below 1; use 1 or more"),
        ({"prompt_tokens": 0}, "prompt_tokens: 0 is below 1; use 1 or more"),
        ({"max_minutes": 0}, "max_minutes: 0 leaves no time to measure; use more than 0"),
        ({"contexts": []}, "contexts: the list is empty; name at least one context in tokens, such as 4096"),
        (
            {"contexts": [512]},
            "contexts: 512 tokens have no room for 1 of a prompt and 512 of an answer; use contexts of 513 or more, or "
            "a shorter prompt or answer",
        ),
        (
            {"rows": {"student": nullcontext}},
            "rows: ['student'] have no 'original'; everything is compared with that row",
        ),
    ],
)
def test_bad_input(rows, changes, message):
    with pytest.raises(LinearizeError) as error:
        bench_capacity(**({"rows": rows, "memory": MEMORY, "contexts": [1000]} | changes))
    assert str(error.value) == message


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("capacity")
    original = save_tiny_model(folder / "original")
    words = ("convert", original, folder / "student", "--window", 8, "--adapter")
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    return folder / "student"


class TestCommand:
    def call(self, *words: object) -> Result:
        return CliRunner().invoke(app, ["bench", "capacity", *map(str, words), "--dtype", "float32"])

    def test_table_and_file(self, student: Path, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(capacity, "bandwidth", lambda device, dtypes: RATES)
        words = ("--memory", "1MiB", "--contexts", "64,128", "--answer-tokens", 16, "--out", tmp_path / "c.json")
        result = self.call(student, *words, "--device", "cpu")
        assert result.exit_code == 0, result.output
        data = read_json(tmp_path / "c.json", KIND)
        assert [(x["context"], x["row"]) for x in data["cells"]] == [
            (64, "original"), (64, "student"), (128, "original"), (128, "student"),
        ]  # fmt: skip
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        for cell in data["cells"]:
            assert cell["step"]["how"] == "measured"
            assert any(line.startswith(f"{cell['context']} {cell['row']} {cell['batch']} ") for line in lines)
        assert "s per 1000 answers of 16" in result.stdout
        assert "written: " in result.stderr

    def test_says_what_is_predicted(self, student: Path, tmp_path: Path, made_up, monkeypatch):
        monkeypatch.setattr(capacity, "available_memory", lambda device: 1000)
        words = ("--memory", "1MiB", "--contexts", "64", "--answer-tokens", 16, "--out", tmp_path / "c.json")
        text = " ".join(self.call(student, *words, "--device", "cpu").stdout.split())
        assert "64, student, step: bound, nothing was measured: " in text
        assert "Bound: no faster than that, nothing measured." in text

    def test_mistakes_show_before_the_weights_are_read(self, tmp_path: Path):
        result = self.call(tmp_path / "no-model", "--memory", "1GiB", "--contexts", "100")
        assert result.exit_code == 2
        assert "have no room for 1 of a prompt and 512 of an answer" in result.stderr
        result = self.call(tmp_path / "no-model", "--memory", "a lot")
        assert "memory: 'a lot' is not a number of bytes" in result.stderr
