"""Decode speed: what is timed, in which order and modes, and what is made of the times."""

import json
import logging
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from linearize import LinearizeConfig, convert
from linearize.benchmarks import decode, measurement, modes
from linearize.benchmarks.modes import MODES, modes_of
from linearize.benchmarks.probe import CacheLayer, probe
from linearize.benchmarks.speed import (
    Cell,
    Sample,
    comparisons,
    crossover,
    describe_cells,
    prefill_growth,
    ratio_interval,
)
from linearize.convert import is_converted, original_attention
from linearize.errors import LinearizeError
from linearize.rows import ORIGINAL_AGAIN, speed_rows
from tests.benchmark_results import make_probe
from tests.tiny_models import make_model, make_tokens

TOKENS = torch.arange(100)
EAGER = ["dynamic", "static"]
# What an original in float32 has besides, on a CPU.
PROJECTIONS = ["dynamic+projections", "static+projections"]
CPU = torch.device("cpu")


def make_student(layers: int = 3, **changes):
    model = make_model("llama", num_hidden_layers=layers)
    return convert(model, LinearizeConfig(window=8, sinks=2, **changes))


def make_samples(times: dict[tuple[str, str], dict[int, list[float]]], batch: int = 1) -> dict[Cell, list[Sample]]:
    """(row, mode) -> context -> ms of each repeat."""
    held = {"softmax": 1, "window": 0, "state": 0, "total": 1}
    return {
        Cell(row, mode, context, batch): [Sample(10 * ms, (ms, ms, ms), held) for ms in repeats]
        for (row, mode), contexts in times.items()
        for context, repeats in contexts.items()
    }


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Collecting garbage between measurements takes longer than all else in models this small."""
    monkeypatch.setattr(measurement, "gc", SimpleNamespace(collect=lambda: None))


@pytest.fixture
def traced(monkeypatch, caplog):
    """torch.compile without a code generator: it traces, guards and counts as ever, in a tenth of the time."""
    # torch writes its trace to this logger at DEBUG, and pytest would keep minutes' worth of it.
    caplog.set_level(logging.WARNING, logger="torch.__trace")
    options = modes.compile_options
    monkeypatch.setattr(modes, "compile_options", lambda device: options(device) | {"backend": "eager"})
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_converted_model_from_end_to_end():
    rows = speed_rows(make_student())
    sizes = {"decode_tokens": 3, "repeats": 2, "batches": [2, 1], "modes": EAGER}
    modes_in_order = [mode.name for mode in modes_of(make_model("llama"))]
    result = decode.bench_decode(rows, [40, 20], TOKENS, **sizes)
    json.dumps(result, allow_nan=False)
    assert (result["contexts"], result["batches"], result["dropped"]) == ([20, 40], [1, 2], [])
    cells = {(cell["row"], cell["mode"], cell["context"], cell["batch"]): cell for cell in result["cells"]}
    assert cells.keys() == {
        (row, mode, context, batch)
        for context in (20, 40)
        for batch in (1, 2)
        for row, names in (("original", EAGER), ("student", ["dynamic", "static"]))
        for mode in names
    }
    for (_, _, _, batch), cell in cells.items():
        times = cell["ms_per_token"]
        assert cell["repeats"] == 2
        assert 0 < times["min"] <= times["max"]
        assert times["p50"] <= times["p95"]
        assert cell["tokens_per_s"] == pytest.approx(1000 * batch / times["p50"])
        assert (cell["recompiles"], cell["filled"]) == (0, 0)
    # 3 layers, keys and values, 2 kv heads, head_dim 16, float32; the first repeat ends at context + 3, the second,
    # which a preallocated cache has room for too, at context + 6.
    per_token = 3 * 2 * 2 * 16 * 4
    assert cells["original", "dynamic", 20, 2]["cache_bytes"]["total"] == 2 * per_token * 23
    assert cells["original", "static", 40, 1]["cache_bytes"]["total"] == per_token * 46
    student = [cells["student", "dynamic", context, 2]["cache_bytes"] for context in (20, 40)]
    assert student[0] == student[1]
    assert student[0]["softmax"] == 0
    assert student[0]["window"] > 0
    assert student[0]["state"] > 0
    assert len(result["blocks"]) == 8
    assert result["dtypes"]["student"] == "float32"
    reason = "it was not asked for"
    left_out = [("original", mode) for mode in modes_in_order if mode not in EAGER] + [("student", "static+compile")]
    assert result["skipped"] == [{"row": row, "mode": mode, "reason": reason} for row, mode in left_out]
    assert {(pair["context"], pair["batch"]) for pair in result["comparisons"]} == {(20, 1), (20, 2), (40, 1), (40, 2)}
    assert [found["batch"] for found in result["crossover"]] == [1, 2]


class TestModes:
    def test_a_model_has_what_its_caches_can(self):
        original, student, hybrid = make_model("llama"), make_student(), make_student(softmax_layers=[0])
        own = ["dynamic", PROJECTIONS[0], "static", PROJECTIONS[1], "static+compile"]
        assert [mode.name for mode in modes_of(original)] == own
        for model in (make_model("llama").bfloat16(), student, hybrid):
            assert [mode.name for mode in modes_of(model)] == ["dynamic", "static", "static+compile"]
        with original_attention(student):
            assert [mode.name for mode in modes_of(student)] == ["dynamic", "static", "static+compile"]

    @torch.no_grad()
    def test_projections_are_the_students_and_are_taken_off(self, monkeypatch):
        model, seen = make_model("llama"), []
        plain = torch.bmm
        monkeypatch.setattr(torch, "bmm", lambda *args: (seen.append(args[1].shape[-1]), plain(*args))[1])
        for mode in ("dynamic", "static"):
            measurement.measure(model, measurement.Run(MODES[mode], make_tokens(1, 30), 0, 64, 2))
        assert seen.count(1) == 0
        if torch.backends.mkl.is_available():
            measurement.measure(model, measurement.Run(MODES["static+projections"], make_tokens(1, 30), 0, 64, 2))
            assert seen.count(1) > 0
        assert not any("forward" in module.__dict__ for module in model.modules())

    def test_projections_that_would_change_nothing_are_left_out_with_the_reason(self, monkeypatch):
        monkeypatch.setattr("linearize.projections.product_ms", lambda threads: (1.0, 2.0))
        rows = speed_rows(make_student(layers=1))
        sizes = {"decode_tokens": 1, "repeats": 1}
        result = decode.bench_decode(rows, [20], TOKENS, **sizes, modes=["dynamic", "dynamic+projections"])
        assert result["modes"]["original"] == ["dynamic"]
        skipped = {cell["mode"]: cell["reason"] for cell in result["skipped"] if cell["row"] == "original"}
        assert "by slices is not clearly faster on this CPU: 2.00 ms" in skipped["dynamic+projections"]
        with pytest.raises(LinearizeError, match="add one of dynamic, static, static"):
            decode.bench_decode(rows, [20], TOKENS, **sizes, modes=PROJECTIONS)

    @pytest.mark.parametrize("mode", ["dynamic", "static", "static+compile", *PROJECTIONS])
    def test_measure_decodes_what_generation_does(self, mode, traced):
        model, read = make_model("llama"), []
        prompt = make_tokens(2, 30)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        want = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
        with torch.no_grad():
            sample = measurement.measure(model, measurement.Run(MODES[mode], prompt, 0, 64, 4))
        assert (len(sample.step_ms), sample.recompiles) == (4, 0)
        assert [ids.shape[1] for ids in read] == [30] + [1] * 8
        assert torch.cat(read, 1).tolist() == want.tolist()

    def test_a_compiled_step_is_one_graph_for_each_shape_and_none_in_timed_steps(self, traced):
        rows = speed_rows(make_student(layers=1), control=True)
        del rows["student"]
        modes.compile_obstacle.cache_clear()
        before = counters["stats"]["unique_graphs"]
        sizes = {"decode_tokens": 2, "repeats": 2, "modes": ["static+compile"]}
        result = decode.bench_decode(rows, range(20, 29), TOKENS, **sizes)
        # One for the question whether it works. The original and itself once more are one model, and nine shapes are
        # more than torch.compile keeps by default.
        assert counters["stats"]["unique_graphs"] - before == 1 + 9
        assert {(cell["row"], cell["mode"]) for cell in result["cells"]} == {(row, "static+compile") for row in rows}
        assert not any(cell["recompiles"] for cell in result["cells"])
        first = [
            cell["first_ms"] / cell["ms_per_token"]["p50"] for cell in result["cells"] if cell["row"] == "original"
        ]
        assert min(first) > 10

    def test_recompiling_is_counted(self, traced):
        """A memory that counts on the host compiles at every token; no mode of a student has one in a graph."""
        student, mode = make_student(layers=1), modes.Mode("dynamic, compiled", compiled=True)
        with torch.no_grad():
            sample = measurement.measure(student, measurement.Run(mode, make_tokens(1, 20), 0, 64, 2))
            run = measurement.Run(MODES["static+compile"], make_tokens(1, 20), 0, 64, 2)
            static = measurement.measure(student, run)
        assert sample.recompiles >= 2
        assert static.recompiles == 0
        (cell,) = describe_cells({Cell("student", mode.name, 20): [sample, sample]}, {"student": 1})
        assert cell["recompiles"] == 2 * sample.recompiles

    def test_a_missing_compiler_is_a_reason(self, monkeypatch):
        def broken(*args, **kwargs):
            raise RuntimeError("No working C++ compiler found.\n\nSet TORCHDYNAMO_VERBOSE=1")

        modes.compile_obstacle.cache_clear()
        monkeypatch.setattr(torch, "compile", broken)
        result = decode.bench_decode(speed_rows(make_student()), [20], TOKENS, decode_tokens=1, repeats=1)
        modes.compile_obstacle.cache_clear()
        reason = "torch.compile does not work on this machine: No working C++ compiler found"
        assert result["skipped"] == [
            {"row": row, "mode": "static+compile", "reason": reason} for row in ("original", "student")
        ]
        assert sorted(result["modes"]["original"]) == sorted(["dynamic", "static", *PROJECTIONS])
        assert result["modes"]["student"] == ["dynamic", "static"]

    def test_a_model_that_does_not_compile_is_left_out_everywhere(self, monkeypatch):
        failing = {"after": 3}

        def step(model, device):
            def call(**kwargs):
                failing["after"] -= 1 / 6  # a sample is six steps
                if failing["after"] < 0:
                    raise torch._dynamo.exc.TorchDynamoException("no such operator\nand more")
                return model(**kwargs)

            return call

        monkeypatch.setattr(modes, "compile_obstacle", lambda device: None)
        monkeypatch.setattr(measurement, "compiled_call", step)
        result = decode.bench_decode(speed_rows(make_student()), [20, 30], TOKENS, decode_tokens=2, repeats=2)
        assert {cell["mode"] for cell in result["cells"]} == {"dynamic", "static", *PROJECTIONS}
        assert {cell["repeats"] for cell in result["cells"]} == {2}
        reason = "compiling the step failed: no such operator"
        skipped = {cell["row"]: (cell["mode"], cell["reason"]) for cell in result["skipped"]}
        assert skipped == dict.fromkeys(("original", "student"), ("static+compile", reason))
        failing["after"] = 0
        original = {"original": speed_rows(make_student())["original"]}
        with pytest.raises(LinearizeError, match=r"'original' has none but static\+compile, and compiling the step"):
            decode.bench_decode(original, [20], TOKENS, modes=["static+compile"])


class TestRows:
    def test_original_and_student_are_two_models_around_the_same_weights(self):
        student = make_student()
        rows = speed_rows(student, control=True)
        with rows["original"]() as original, rows["student"]() as same:
            assert same is student
            assert is_converted(student)
            assert not is_converted(original)
            assert type(original).__name__ == "LlamaForCausalLM"
            assert not original.model._forward_pre_hooks
            shared = {id(parameter) for parameter in student.parameters()}
            assert all(id(parameter) in shared for parameter in original.parameters())
            tokens = make_tokens(1, 40)
            with torch.no_grad(), original_attention(student):
                assert torch.equal(original(tokens).logits, student(tokens).logits)
        with rows[ORIGINAL_AGAIN]() as again:
            assert again is original

    def test_an_original_stays_what_it_is_beside_window_and_sinks(self):
        model = make_model("llama")
        rows = speed_rows(model)
        assert list(rows) == ["original", "window + sinks"]
        with rows["original"]() as original, rows["window + sinks"]() as other:
            assert original is model
            assert not is_converted(model)
            assert is_converted(other)
            assert other.lm_head.weight is model.lm_head.weight


class TestProbe:
    @pytest.mark.parametrize("family", ["llama", "mistral"])  # tied and untied
    def test_weights_that_a_step_reads(self, family):
        model = make_model(family)
        table = model.get_input_embeddings().weight.nbytes
        every = sum(parameter.nbytes for parameter in model.parameters())
        assert probe(model).weight_bytes == (every if family == "llama" else every - table)

    def test_cache_bytes_are_what_a_cache_will_hold(self):
        student = make_student(softmax_layers=[0])
        found = probe(student)
        with torch.no_grad():
            cache = student(make_tokens(3, 70), use_cache=True).past_key_values
        assert 3 * sum(layer.bytes(70) for layer in found.layers) == measurement.cache_bytes(cache)["total"]
        assert found.period == 16
        assert probe(make_model("llama")).period == 1

    def test_sliding_layers_hold_their_window(self):
        model = make_model("mistral", sliding_window=32)
        with torch.no_grad():
            cache = model(make_tokens(1, 100), use_cache=True).past_key_values
        held = sum(layer.bytes(100) for layer in probe(model).layers)
        # transformers keeps the window less the token that is to come
        assert held == measurement.cache_bytes(cache)["total"] * 32 // 31


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
    """Replaces the clock and the measurement; a measurement takes one second per token that is read."""
    state = SimpleNamespace(now=0.0, runs=[], matmul=[1.0], log=[], available=None, probes={}, row=None)
    default = {"original": make_probe(*EAGER)}

    def read(tokens):
        state.now += tokens

    def measure(model, run):
        read(run.prompt.shape[1])
        state.runs.append(run)
        state.log.append(run.mode.name)
        held = {"softmax": 0, "window": 0, "state": 0, "total": 0}
        return Sample(None if run.filled else 1.0, (1.0,) * run.decode_tokens, held, run.filled)

    def measure_prefill(model, prompt):
        read(prompt.shape[1])
        state.log.append("prefill")
        return float(prompt.shape[1])

    def matmul(device):
        return state.matmul.pop(0) if len(state.matmul) > 1 else state.matmul[0]

    def found(model):
        row = state.log.pop()
        return state.probes.get(row, default.get(row, make_probe("dynamic")))

    monkeypatch.setattr(decode, "measure", measure)
    monkeypatch.setattr(decode, "measure_prefill", measure_prefill)
    monkeypatch.setattr(decode, "matmul_ms", matmul)
    monkeypatch.setattr(decode, "probe", found)
    monkeypatch.setattr(decode, "available_memory", lambda device: state.available)
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: state.now))
    return state


def bench(fake, names, contexts, **options):
    return decode.bench_decode(fake_rows(names, fake.log), contexts, TOKENS, **{"fill": None} | options)


class TestSchedule:
    def test_rows_and_modes_take_turns_on_the_same_tokens(self, fake):
        bench(fake, ["original", "student"], [10, 20], decode_tokens=4, repeats=2)
        turns = [tuple(fake.log[i : i + 2]) for i in range(0, len(fake.log), 2)]
        dynamic, static, student = ("original", "dynamic"), ("original", "static"), ("student", "dynamic")
        assert turns == 2 * [dynamic, static, student] + 2 * [static, student, dynamic]
        for block in (fake.runs[i : i + 3] for i in range(0, 12, 3)):
            assert all(torch.equal(block[0].prompt, run.prompt) for run in block)
        assert not torch.equal(fake.runs[0].prompt, fake.runs[6].prompt[:, :6])

    def test_every_context_meets_every_batch(self, fake):
        result = bench(fake, ["original"], [10, 20], batches=[1, 3], repeats=1)
        shapes = [tuple(run.prompt.shape) for run in fake.runs[::2]]
        assert shapes == [(1, 6), (1, 16), (3, 6), (3, 16)]  # the smallest first: a limit of time cuts the largest
        assert {(cell["context"], cell["batch"]) for cell in result["cells"]} == {(10, 1), (10, 3), (20, 1), (20, 3)}

    def test_repeats_time_consecutive_positions_in_one_capacity(self, fake):
        bench(fake, ["original"], [50], decode_tokens=4, repeats=3)
        # Four steps warm up; the timed ones start at 50, 54 and 58 tokens of context and end at 62.
        assert [run.prompt.shape[1] for run in fake.runs[::2]] == [46, 50, 54]
        assert {run.capacity for run in fake.runs} == {62}

    def test_more_tokens_than_the_limit_are_filled_in(self, fake):
        fake.probes = {"student": make_probe("dynamic", period=48)}
        sizes = {"batches": [1, 6], "repeats": 2, "fill": 2000, "decode_tokens": 3}
        result = bench(fake, ["original", "student"], [400, 2000], **sizes)
        runs = {(run.prompt.shape[0], run.prompt.shape[1] + run.filled): run for run in fake.runs}
        assert runs[1, 1996].filled == 0
        assert runs[6, 396].filled == 0  # above the limit, but shorter than what has to be read
        for length in (1996, 1999):  # the rest is whole turns of the student's ring, for all rows alike
            assert runs[6, length].filled % 48 == 0
            assert 512 <= runs[6, length].prompt.shape[1] < 512 + 48
        prefills = {(cell["context"], cell["batch"]): cell["prefill_ms"] for cell in result["cells"]}
        assert [key for key, value in prefills.items() if value is None] == [(2000, 6)]

    def test_prefills_are_timed_apart(self, fake):
        rows = ["original", "student"]
        result = bench(fake, rows, [10], batches=[4, 2], repeats=2, prefill=[4096, 8192])
        ms = {(found["row"], found["length"]): found["ms"]["p50"] for found in result["prefill"]}
        assert ms == {(row, length): float(length) for row in rows for length in (4096, 8192)}
        assert {(found["batch"], found["repeats"]) for found in result["prefill"]} == {(2, 2)}
        assert result["prefill_growth"] == [{"row": row, "from": 4096, "to": 8192, "ratio": 2.0} for row in rows]

    def test_without_lengths_of_its_own_prefill_grows_over_the_contexts_that_were_read(self, fake):
        result = bench(fake, ["original"], [4096, 8192, 16384], repeats=1, fill=8192)
        assert result["prefill"] == []
        assert result["prefill_growth"] == [{"row": "original", "from": 4096, "to": 8192, "ratio": 1.0}]


class TestLimits:
    def test_a_context_that_does_not_fit_into_the_time_is_dropped_for_all_rows(self, fake):
        # Blocks take about 20, 200 and 2000 seconds; 7 minutes hold the first two once and the small one again.
        sizes = {"decode_tokens": 1, "repeats": 3, "max_minutes": 7}
        result = bench(fake, ["original", "student"], [10, 100, 1000], **sizes)
        assert result["contexts"] == [10, 100]
        reason = "not one repeat of all rows fitted into 7 minutes"
        assert result["dropped"] == [{"what": "decode", "context": 1000, "batch": 1, "reason": reason}]
        repeats = {(cell["row"], cell["mode"], cell["context"]): cell["repeats"] for cell in result["cells"]}
        assert len(repeats) == 6
        assert {count for (_, _, context), count in repeats.items() if context == 10} == {3}
        assert {count for (_, _, context), count in repeats.items() if context == 100} == {1}
        assert fake.now < 7 * 60

    def test_the_smallest_context_is_measured_once_whatever_the_limit(self, fake):
        result = bench(fake, ["original"], [10, 20], repeats=3, max_minutes=0.01)
        assert result["contexts"] == [10]
        assert {cell["repeats"] for cell in result["cells"]} == {1}

    def test_a_block_that_runs_late_counts_for_no_row(self, fake, monkeypatch):
        measure = decode.measure

        def slow(model, run):
            fake.now += 600 if run.prompt.shape[1] > 50 else 0  # far more than in proportion to the context
            return measure(model, run)

        monkeypatch.setattr(decode, "measure", slow)
        result = bench(fake, ["original", "student"], [10, 100], repeats=2, max_minutes=9)
        assert result["contexts"] == [10]
        assert {cell["context"] for cell in result["cells"]} == {10}

    def test_what_compiling_takes_is_not_expected_again(self, fake, monkeypatch):
        measure = decode.measure
        fake.probes = {"original": make_probe("dynamic", "static+compile")}

        def slow(model, run):
            compiles = run.mode.compiled and len(fake.runs) < 2
            fake.now += 100 if compiles else 0
            return replace(measure(model, run), first_ms=1e5 if compiles else 1.0)

        monkeypatch.setattr(modes, "compile_obstacle", lambda device: None)
        monkeypatch.setattr(decode, "measure", slow)
        result = bench(fake, ["original"], [10], repeats=3, decode_tokens=1, max_minutes=2.5)
        assert {cell["repeats"] for cell in result["cells"]} == {3}

    def test_what_does_not_fit_into_memory_is_dropped_for_all_rows(self, fake):
        layers = (CacheLayer(50, 0), CacheLayer(0, 100))
        fake.probes = {"student": replace(make_probe("dynamic"), layers=layers, token_bytes=7, logits_bytes=11)}
        probed = fake.probes["student"]
        # Both layers, twice the larger one for the copy of it, the tokens read, and the logits of the last.
        assert probed.needed_bytes(4, 9, 3) == 3 * (50 + 900 + 2 * 900 + 4 * 7 + 11)
        needed = probed.needed_bytes(96, 101, 2)
        fake.available = int(needed / 0.9) + 1
        result = bench(fake, ["original", "student"], [100], batches=[1, 2, 3], decode_tokens=1, repeats=1)
        assert result["batches"] == [1, 2]
        (dropped,) = result["dropped"]
        assert (dropped["context"], dropped["batch"]) == (100, 3)
        assert dropped["reason"].startswith("student needs about 0.0 GiB, and")
        assert {cell["batch"] for cell in result["cells"]} == {1, 2}

    def test_an_allocation_that_fails_drops_what_was_measured_before(self, fake, monkeypatch):
        measure = decode.measure

        def hungry(model, run):
            if run.prompt.shape[1] > 20:
                raise RuntimeError(
                    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 5 bytes.\nmore"
                )
            return measure(model, run)

        monkeypatch.setattr(decode, "measure", hungry)
        result = bench(fake, ["original", "student"], [10, 20], decode_tokens=4, repeats=3)
        assert result["contexts"] == [10]
        (dropped,) = result["dropped"]
        assert dropped["reason"].startswith("out of memory: [enforce fail]")
        assert "more" not in dropped["reason"]
        assert {cell["context"] for cell in result["cells"]} == {10}
        assert {(block["context"], block["repeat"]) for block in result["blocks"]} == {(10, 0), (10, 1), (10, 2)}

    def test_other_errors_are_not_swallowed(self, fake, monkeypatch):
        def broken(model, run):
            raise RuntimeError("a bug")

        monkeypatch.setattr(decode, "measure", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            bench(fake, ["original"], [10])

    def test_a_block_in_which_the_machine_changes_is_measured_again(self, fake):
        # before and after: fine; moved, then fine; moved, then moved again
        fake.matmul = [1.0, 1.05, 1.0, 1.2, 1.0, 1.0, 1.0, 0.8, 1.0, 1.5, 1.0]
        result = bench(fake, ["original"], [10], repeats=3)
        blocks = [(block["attempts"], block["moved"], block["matmul_after_ms"]) for block in result["blocks"]]
        assert blocks == [(1, False, 1.05), (2, False, 1.0), (2, True, 1.5)]
        assert {cell["repeats"] for cell in result["cells"]} == {3}
        assert len(fake.runs) == 5 * 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"contexts": []}, "contexts: the list is empty"),
            ({"contexts": [4]}, "contexts: 4 is too short to warm up; use 5 or more"),
            ({"repeats": 0}, "repeats: 0 measures nothing"),
            ({"decode_tokens": 0}, "decode_tokens: 0 measures nothing"),
            ({"batches": []}, "batch: the list is empty"),
            ({"batches": [1, 0]}, "batch: 0 measures nothing"),
            ({"prefill": [0]}, "prefill: 0 measures nothing"),
            ({"fill": 0}, "fill: 0 measures nothing"),
            ({"max_minutes": 0}, "max_minutes: 0 leaves no time"),
            ({"tokens": torch.zeros(2, 2)}, "is not one text"),
            ({"rows": {"student": nullcontext}}, "have no 'original'"),
        ],
    )
    def test_refusals(self, options, message):
        arguments = {"rows": {"original": nullcontext}, "contexts": [10], "tokens": TOKENS} | options
        with pytest.raises(LinearizeError, match=message):
            decode.bench_decode(**arguments)

    def test_modes_that_a_row_does_not_have_are_refused(self, fake):
        with pytest.raises(LinearizeError, match="row 'student' cannot be measured in static; add one of dynamic"):
            bench(fake, ["original", "student"], [10], modes=["static"])
        with pytest.raises(LinearizeError, match="modes: there is no 'eager'; choose from dynamic, static, "):
            bench(fake, ["original"], [10], modes=["eager"])


class TestNumbers:
    def test_cells_take_medians_and_the_spread_of_repeats(self):
        repeats = [Sample(5.0, (1.0, 2.0, 9.0), {}), Sample(7.0, (3.0, 3.0, 3.0), {})]
        (cell,) = describe_cells({Cell("original", "dynamic", 8, 4): repeats}, {"original": 77})
        assert cell["ms_per_token"] == {"p50": 3.0, "p95": 7.5, "mean": 3.5, "min": 2.0, "max": 3.0}
        assert cell["prefill_ms"] == {"p50": 6.0, "min": 5.0, "max": 7.0}
        assert cell["tokens_per_s"] == pytest.approx(4000 / 3)
        assert cell["weight_bytes"] == 77

    ORIGINAL: ClassVar = {
        ("original", "dynamic"): {100: [2, 2], 300: [6, 6]},
        ("original", "static"): {100: [3, 3], 300: [5, 5]},
    }

    @pytest.mark.parametrize(
        ("student", "kind", "context"),
        [
            ({100: [3, 3], 300: [3, 3]}, "at", 100 + 200 / 3),
            ({100: [1, 1], 300: [4, 4]}, "everywhere", None),
            ({100: [2, 2], 300: [5, 5]}, "never", None),  # as fast is not faster
            ({100: [1, 1], 300: [9, 9]}, "mixed", None),
        ],
    )
    def test_crossover_of_best_modes(self, student, kind, context):
        slow = {place: [100 * ms for ms in times] for place, times in student.items()}
        times = {**self.ORIGINAL, ("student", "dynamic"): student, ("student", "static+compile"): slow}
        never = {**self.ORIGINAL, ("student", "dynamic"): {50: [9, 9], 100: [9, 9], 300: [9, 9]}}
        never["original", "dynamic"] = never["original", "dynamic"] | {50: [1, 1]}
        found = crossover(make_samples(times, batch=2) | make_samples(never), "original", "student", 2)
        assert (found["kind"], found["measured_to"]) == (kind, 300)
        assert found["context"] == (None if context is None else pytest.approx(context))

    def test_best_mode_stands_against_best_mode_at_each_context(self):
        times = {
            **self.ORIGINAL,
            ("student", "dynamic"): {100: [4, 4], 300: [2, 2.5]},
            ("student", "static+compile"): {100: [8, 8], 300: [1, 2.5]},
        }
        short, long = comparisons(make_samples(times), "original")
        assert (short["mode"], short["baseline_mode"], short["verdict"]) == ("dynamic", "dynamic", "slower")
        assert short["speedup"] == {"p50": 0.5, "min": 0.5, "max": 0.5, "ci95": [pytest.approx(0.5)] * 2}
        assert (long["mode"], long["baseline_mode"]) == ("static+compile", "static")
        assert long["speedup"]["p50"] == 3.5
        assert long["verdict"] == "undecided"  # two repeats, and 5 and 2 times as fast

    def test_batches_are_compared_apart(self):
        theirs = {("original", "dynamic"): {100: [4, 4]}}
        fast, slow = (theirs | {("student", "dynamic"): {100: [ms, ms]}} for ms in (2, 8))
        found = comparisons(make_samples(fast) | make_samples(slow, batch=4), "original")
        assert [(pair["batch"], pair["verdict"]) for pair in found] == [(1, "faster"), (4, "slower")]

    def test_interval_is_students_on_logarithms(self):
        # Logarithms 0 and 1: mean 0.5, standard error 0.5, 12.706 of it with one degree of freedom.
        e = torch.e
        assert ratio_interval([1.0, e]) == pytest.approx([e ** (0.5 - 12.7062 * 0.5), e ** (0.5 + 12.7062 * 0.5)])
        assert ratio_interval([2.0]) is None

    def test_interval_holds_the_ratio_as_often_as_it_says(self):
        generator = torch.Generator().manual_seed(0)
        for repeats in (3, 5, 10):
            trials = (1.3 * (0.1 * torch.randn(1000, repeats, generator=generator)).exp()).tolist()
            held = sum(low < 1.3 < high for low, high in map(ratio_interval, trials))
            assert 930 < held < 970

    def test_one_repeat_decides_nothing(self):
        times = {("original", "dynamic"): {100: [2]}, ("student", "dynamic"): {100: [1]}}
        (pair,) = comparisons(make_samples(times), "original")
        assert pair["verdict"] == "undecided"
        assert pair["speedup"]["ci95"] is None

    def test_a_model_is_as_fast_as_itself(self):
        """Whatever its modes cost: 2 % of noise and a machine that becomes slower."""
        generator = torch.Generator().manual_seed(3)

        def noisy(ms):
            noise = 0.02 * torch.randn(5, generator=generator)
            return [ms * (1 + repeat / 10) * (1 + x) for repeat, x in enumerate(noise.tolist())]

        times = {
            (row, mode): {100: noisy(ms)}
            for row in ("original", ORIGINAL_AGAIN)
            for mode, ms in (("dynamic", 4), ("static", 3))
        }
        (pair,) = comparisons(make_samples(times), "original")
        low, high = pair["speedup"]["ci95"]
        assert low < 1 < high
        assert high - low < 0.15
        assert pair["speedup"]["p50"] == pytest.approx(1, abs=0.03)

    def test_growth_needs_4096_tokens_and_more(self):
        times = {("original", 4096): [10.0], ("original", 16384): [50.0, 70.0], ("student", 8192): [1.0]}
        assert prefill_growth(times) == [{"row": "original", "from": 4096, "to": 16384, "ratio": 6.0}]


@pytest.mark.slow
def test_a_model_is_as_fast_as_itself_by_the_clock():
    """The real thing, compiled by the default backend, on models so small that nothing but overhead is timed."""
    rows = speed_rows(make_student(), control=True)
    result = decode.bench_decode(rows, [64], torch.arange(100), decode_tokens=32, repeats=7)
    (pair,) = [pair for pair in result["comparisons"] if pair["row"] == ORIGINAL_AGAIN]
    low, high = pair["speedup"]["ci95"]
    assert low < 1 < high
    assert {"dynamic", "static", "static+compile"} == {c["mode"] for c in result["cells"] if c["row"] == "original"}
    assert not any(cell["recompiles"] for cell in result["cells"])
