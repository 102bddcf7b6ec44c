"""The microbenchmark of near-and-far attention: what it times, what it writes, what it refuses."""

import json
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

from linearize.benchmarks import microbenchmark
from linearize.benchmarks.files import read_json, write_json
from linearize.benchmarks.fla_rows import FLA_ROWS, fla_calls, fla_obstacle, fla_steps
from linearize.benchmarks.kernel_regression import compare_kernels, read_old
from linearize.benchmarks.microbenchmark import KIND, Problem, bench_kernels, cell_work, make_runs
from linearize.benchmarks.microbenchmark_page import markdown
from linearize.benchmarks.roofline import bandwidth
from linearize.cli import app
from linearize.errors import LinearizeError
from tests.cost import flops
from tests.interpreter import install
from tests.tolerance import assert_near

SMALL = Problem("SmolLM2-135M", window=16, sinks=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def rates():
    """The device's rates, measured once and by a small buffer."""
    found = bandwidth("cpu", dtypes=["float32", "bfloat16", "float16"], buffer_mib=1, repeats=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microbenchmark, "bandwidth", lambda device, dtypes: found)
        yield found


@pytest.fixture(scope="module")
def result(rates):
    return bench_kernels(SMALL, [96, 48], dtypes=["float32", "bfloat16"], repeats=2)


def test_every_cell_is_there(result):
    found = {(cell["what"], cell["dtype"], cell["row"], cell["tokens"]) for cell in result["cells"]}
    assert found == {
        (what, dtype, row, tokens)
        for what in ("forward", "backward", "decode")
        for dtype in ("float32", "bfloat16")
        for row in ("torch", "sdpa")  # the Triton kernels in the interpreter are no row
        for tokens in (48, 96)
    }
    assert len(result["cells"]) == len(found)
    for cell in result["cells"]:
        ms = cell["ms"]
        assert 0 < ms["min"] <= ms["p50"] <= ms["max"]
        tokens = 1 if cell["what"] == "decode" else cell["tokens"]
        assert cell["tokens_per_s"] == pytest.approx(1e3 * tokens / ms["p50"])
    assert {(x["from"], x["to"]) for x in result["growth"]} == {(48, 96)}
    assert {x["row"] for x in result["crossover"]} == {"torch"}
    json.dumps(result, allow_nan=False)


def test_the_page_has_every_number(result):
    page = markdown(result)
    for title in ("## Forward, float32", "## Forward and backward, bfloat16", "## One decoded token, float32"):
        assert title in page
    for cell in result["cells"]:
        assert f"{cell['ms']['p50']:.3g} (" in page
    assert page.count("SDPA") >= len(result["crossover"])


def test_growth_and_crossover_are_by_the_times(monkeypatch):
    """Times that are made up: 1 ms a 1000 tokens, and for SDPA the square of that."""
    made = {
        length: {"torch": lambda x=length: x / 1000, "sdpa": lambda x=length: (x / 1000) ** 2 / 10}
        for length in (4096, 16384, 32768)
    }
    monkeypatch.setattr(microbenchmark, "make_runs", lambda problem, what, length, *rest: made[length])
    found = bench_kernels(SMALL, list(made), whats=["forward"], repeats=3)
    ratios = {x["row"]: (x["from"], x["to"], x["p50"], x["min"]) for x in found["growth"]}
    assert ratios == {"torch": (4096, 32768, 8.0, 8.0), "sdpa": (4096, 32768, 64.0, 64.0)}
    (cross,) = found["crossover"]
    assert cross["kind"] == "at"
    assert 4096 < cross["context"] < 16384
    assert "- torch is faster than SDPA from about" in markdown(found)


def test_calls_of_less_than_a_second_are_warm(monkeypatch):
    called = {"torch": 0, "sdpa": 0}

    def made(row, ms):
        def run():
            called[row] += 1
            return ms

        return run

    runs = {"torch": made("torch", 999.0), "sdpa": made("sdpa", 1001.0)}
    monkeypatch.setattr(microbenchmark, "make_runs", lambda *rest: runs)
    bench_kernels(SMALL, [64], whats=["forward"], repeats=3)
    # Before all repeats, before the first one, where nothing is known yet, and then before every quick one.
    assert called == {"torch": 1 + 3 * 2, "sdpa": 1 + 2 + 1 + 1}


def test_rows_compute_what_they_say():
    """By the arithmetic, as `tests/test_kernels_chunked.py` counts it: linear here, quadratic for SDPA."""

    def work(what, row, length):
        return flops(make_runs(Problem("SmolLM2-135M"), what, length, torch.float32, torch.device("cpu"))[row])

    for what, times in (("forward", 1), ("backward", 3)):
        assert work(what, "torch", 4096) == pytest.approx(4 * work(what, "torch", 1024), rel=0.01)
        assert work(what, "torch", 1024) == pytest.approx(times * work("forward", "torch", 1024), rel=0.2)
    # A step does not grow, and is nearly the same for every token: W of them are one call.
    assert work("decode", "torch", 2048) == work("decode", "torch", 512)


def test_the_compiled_form_is_a_row_where_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    runs = make_runs(SMALL, "backward", 32, torch.float32, torch.device("cpu"), compiled=True)
    assert list(runs) == ["torch", "compiled", "sdpa"]
    assert all(run() > 0 for run in runs.values())
    assert compiled == [{"fullgraph": True, "dynamic": True}]


def test_triton_is_a_row_where_it_runs(monkeypatch):
    """Its place among the rows; whether its kernels are right is for other tests."""
    monkeypatch.setattr(microbenchmark, "triton_obstacle", lambda q, v, features: None)
    monkeypatch.setattr(microbenchmark, "interpreted", lambda: False)
    assert list(make_runs(SMALL, "forward", 32, torch.float32, torch.device("cpu"))) == ["torch", "triton", "sdpa"]
    monkeypatch.setattr(microbenchmark, "interpreted", lambda: True)
    assert list(make_runs(SMALL, "forward", 32, torch.float32, torch.device("cpu"))) == ["torch", "sdpa"]


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(microbenchmark, "bandwidth", bandwidth)
    found = bench_kernels(SMALL, [256, 512], dtypes=["bfloat16"], device="cuda", repeats=2)
    absent = {x["row"] for x in found["absent"]}
    rows = {"torch", "triton", "sdpa", "sdpa efficient", *FLA_ROWS}
    assert {cell["row"] for cell in found["cells"]} | absent == rows
    assert not absent & {"torch", "triton", "sdpa", "sdpa efficient"}, found["absent"]
    assert found["sdpa"] == {"bfloat16": "flash"}
    assert found["bandwidth"]["read_gb_s"] > 100


class TestGuests:
    """Rows to compare with: on a GPU where they run, elsewhere a reason."""

    def test_absent_with_a_reason(self, result):
        reasons = {x["row"]: x["reason"] for x in result["absent"]}
        assert set(reasons) == {"sdpa efficient", *FLA_ROWS}
        for row in FLA_ROWS:
            assert reasons[row] == "flash-linear-attention's kernels need a GPU, and this is cpu"
            assert row in markdown(result)

    def test_without_fla(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
        reason = fla_obstacle(torch.device("cuda"))
        assert reason.startswith("flash-linear-attention cannot be imported (")

    def test_one_that_refuses_is_left_out_at_every_length(self, monkeypatch):
        """As on a GPU; the memory-efficient kernel is not there on a CPU, and fla refuses the longer text."""
        monkeypatch.setattr(microbenchmark, "_on_gpu", lambda device: True)
        monkeypatch.setattr(microbenchmark, "fla_obstacle", lambda device: None)

        def calls(q, k, v):
            def refuse():
                if q.shape[2] > 40:
                    raise RuntimeError("too\nlong")
                return q + k.repeat_interleave(3, 1) + v.repeat_interleave(3, 1)

            return {"fla gla": refuse, "fla simple_gla": lambda: q + k.repeat_interleave(3, 1) * v.sum()}

        monkeypatch.setattr(microbenchmark, "fla_calls", calls)
        found = bench_kernels(SMALL, [32, 48], whats=["forward", "backward"], repeats=1)
        assert {cell["row"] for cell in found["cells"]} == {"torch", "sdpa", "fla simple_gla"}
        refused = [(x["what"], x["row"]) for x in found["absent"]]
        assert sorted(set(refused)) == [
            (what, row) for what in ("backward", "forward") for row in ("fla gla", "sdpa efficient")
        ]
        assert {x["reason"] for x in found["absent"] if x["row"] == "fla gla"} == {"too long"}
        assert {x["row"] for x in found["crossover"]} == {"torch"}

    def test_our_own_rows_may_not_refuse(self, monkeypatch):
        def refuse():
            raise RuntimeError("broken")

        monkeypatch.setattr(microbenchmark, "make_runs", lambda *rest: {"torch": refuse, "sdpa": lambda: 1.0})
        with pytest.raises(RuntimeError, match="broken"):
            bench_kernels(SMALL, [64], whats=["forward"])

    def test_the_efficient_kernel_gets_what_sdpa_gets(self, monkeypatch):
        """Keys and values are repeated in the order of the heads: the same numbers."""
        monkeypatch.setattr(microbenchmark, "sdpa_kernel", lambda backend: nullcontext())
        q, k, v = (torch.randn(2, heads, 12, 8) for heads in (6, 2, 2))
        for causal in (True, False):
            expected = microbenchmark._sdpa(q, k, v, causal)
            assert_near(microbenchmark._sdpa_efficient(q, k, v, causal), expected)

    @pytest.mark.interpret
    def test_fla_runs(self):
        """Its kernels, in the interpreter or on the GPU: outputs of the right shape, gradients, and the same step as
        the last token of a text."""
        install()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        q, k, v = (torch.randn(1, heads, 16, 16, device=device, requires_grad=True) for heads in (2, 1, 1))
        calls = fla_calls(q, k, v)
        assert tuple(calls) == FLA_ROWS
        for call in calls.values():
            out = call()
            assert out.shape == (1, 2, 16, 16)
            assert bool(out.isfinite().all())
            gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            assert all(bool(x.isfinite().all()) and bool(x.any()) for x in gradients)
        one = [x.detach()[:, :, -1:].contiguous() for x in (q, k, v)]
        steps = fla_steps(*one)
        assert tuple(steps) == FLA_ROWS
        for row, step in steps.items():
            # From an empty state, which every call starts from, a step is a text of one token.
            out, state = step()
            assert_near(out.transpose(1, 2), fla_calls(*one)[row]().detach())
            assert state.shape == (1, 2, 16, 16)


class TestWork:
    """Bytes and operations of a cell, and what they make of its time."""

    def test_of_every_cell(self, result, rates):
        for cell in result["cells"]:
            work, ms = cell["work"], cell["ms"]["p50"]
            assert work["gb_s"] == pytest.approx(work["bytes"] / ms / 1e6)
            assert work["tflop_s"] == pytest.approx(work["flops"] / ms / 1e9)
            peak, reads = 1e9 * rates["matmul_gflop_s"][cell["dtype"]], 1e9 * rates["read_gb_s"]
            whole = 1e3 * max(work["flops"] / peak, work["bytes"] / reads)
            assert whole <= work["bound_ms"] * 1.0001 <= 1.0002 * 1e3 * (work["flops"] / peak + work["bytes"] / reads)
            assert work["of_bound"] == pytest.approx(work["bound_ms"] / ms)
        assert "| tokens | row | GB/s | TFLOP/s | bound, ms | reached |" in markdown(result)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_operations_are_those_of_the_calls(self, batch: int, monkeypatch):
        """By torch's counter, which counts whole squares where half is masked."""
        problem = Problem("SmolLM2-135M", batch=batch)
        monkeypatch.setattr("linearize.kernels.near_far.few_tokens._flash", None)  # as below

        def counted(what, row, tokens):
            run = make_runs(problem, what, tokens, torch.float32, CPU)[row]
            with sdpa_kernel(SDPBackend.MATH):  # the counter knows nothing of a CPU's flash attention
                return flops(run)

        def ours(what, row, tokens):
            return sum(operations for operations, _ in cell_work(problem, what, row, tokens, "float32"))

        assert counted("forward", "sdpa", 512) == pytest.approx(2 * ours("forward", "sdpa", 512), rel=0.01)
        # W steps a call; the counter sees the products alone.
        assert counted("decode", "sdpa", 512) == pytest.approx(64 * ours("decode", "sdpa", 512), rel=0.01)
        # 2 W near keys in each chunk, of which 1.5 W are seen.
        assert ours("forward", "torch", 4096) == pytest.approx(counted("forward", "torch", 4096), rel=0.3)
        assert ours("decode", "torch", 4096) == pytest.approx(counted("decode", "torch", 4096) / 64, rel=0.3)

    def test_bytes_are_those_of_the_tensors(self):
        problem, tokens, element = Problem("SmolLM2-135M", batch=2), 1024, 2
        q, k = 2 * 9 * tokens * 64 * element, 2 * 3 * tokens * 64 * element
        (work,) = cell_work(problem, "forward", "sdpa", tokens, "bfloat16")
        assert work[1] == 2 * (q + k)  # q, k, v and the output
        (work,) = cell_work(problem, "decode", "sdpa", tokens, "bfloat16")
        assert work[1] == 2 * k + 2 * q // tokens
        forward, backward = (cell_work(problem, x, "sdpa", tokens, "bfloat16") for x in ("forward", "backward"))
        assert backward == [*forward, (2.5 * forward[0][0], 2 * forward[0][1])]
        assert cell_work(problem, "forward", "sdpa efficient", tokens, "bfloat16") == forward

    def test_near_and_far_is_linear_and_a_step_constant(self):
        problem = Problem("SmolLM2-135M")
        for what in ("forward", "backward"):
            short, long = (cell_work(problem, what, "triton", tokens, "bfloat16") for tokens in (4096, 16384))
            for i in (0, 1):
                assert sum(x[i] for x in long) == pytest.approx(4 * sum(x[i] for x in short), rel=0.01)
        steps = [cell_work(problem, "decode", "torch", tokens, "bfloat16") for tokens in (512, 4096)]
        assert steps[0] == steps[1]

    def test_what_nobody_counts(self):
        problem = Problem("SmolLM2-135M")
        assert cell_work(problem, "forward", "torch", 127, "float32") is None  # below 2 W
        assert cell_work(problem, "decode", "torch", 127, "float32") is None
        assert cell_work(problem, "forward", "fla gla", 4096, "float32") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": Problem("GPT-2")}, "model: 'GPT-2' is unknown; known: SmolLM2-135M, Qwen3-0.6B, Llama-3.1-8B"),
        ({"whats": ["sideways"]}, "what: 'sideways' is unknown; known: forward, backward, decode"),
        ({"dtypes": ["int8"]}, "dtype: 'int8' is unknown; known: float32, bfloat16, float16"),
        ({"problem": Problem("SmolLM2-135M", batch=0)}, "batch: 0 is below 1; use 1 or more"),
        ({"problem": Problem("SmolLM2-135M", sinks=-1)}, "sinks: -1 is below 0; use 0 for none"),
        ({"repeats": 0}, "repeats: 0 is below 1; use 1 or more"),
        ({"tokens": []}, "tokens: the list is empty; name at least one"),
        ({"tokens": [64, 0]}, "tokens: 0 is below 1; use 1 or more"),
        ({"device": "abacus"}, "device: 'abacus' does not work here; use cpu, or cuda where there is a GPU"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(LinearizeError) as error:
        bench_kernels(**({"problem": SMALL, "tokens": [64]} | changes))
    assert str(error.value) == message


class TestRegression:
    """Two results from one machine, cell by cell."""

    @staticmethod
    def make(*cells: tuple[float, float]) -> dict:
        """A result with a cell for each (least, median), in ms; lengths 64, 128, ..."""
        made = [
            {"what": "forward", "dtype": "float32", "row": "torch", "tokens": 64 * (i + 1)}
            | {"ms": {"min": least, "p50": middle, "max": 100.0}}
            for i, (least, middle) in enumerate(cells)
        ]
        machine = {
            "cpu": {"model": "A", "usable": 2},
            "gpu": None,
            "threads": 2,
            "versions": {"torch": "2.11"},
            "command": "linearize bench kernels",
        }
        result = {"kind": KIND, "model": SMALL.model, "shape": SMALL.shape, "device": "cpu", "cells": made}
        return result | {"matmul_ms": {"before": 2.0, "after": 2.0}, "machine": machine}

    def test_verdicts(self):
        old = self.make((10, 10.2), (10, 10.2), (10, 10.2), (10, 11.8), (10, 10.2), (10, 10.2), (10, 14))
        new = self.make((10.9, 11.1), (11.3, 11.4), (8.9, 9.1), (11.5, 13.1), (13, 18), (8.5, 10.1), (14.5, 14.6))
        found = compare_kernels(old, new, 10.0)
        # 9 % is tolerated, 13 % is slower, and 12 % faster the other way round; 15 % is within the old cell's noise of
        # 18 %, 30 % within the new one's of 38 %; a least time of 18 % less counts for nothing where medians are equal,
        # nor does one of 45 % more, where the old one was a lucky repeat.
        verdicts = ["same", "slower", "faster", "same", "same", "same", "same"]
        assert [x["verdict"] for x in found["cells"]] == verdicts
        assert (found["slower"], found["faster"], found["same"]) == (1, 1, 5)
        assert found["cells"][1]["ratio_min"] == pytest.approx(1.13)
        assert found["cells"][1]["ratio_p50"] == pytest.approx(11.4 / 10.2)
        back = [x["verdict"] for x in compare_kernels(new, old, 10.0)["cells"]]
        assert back == ["same", "faster", "slower", "same", "same", "same", "same"]
        assert found["cells"][4]["noise"] == pytest.approx([0.02, 5 / 13])
        assert compare_kernels(old, new, 13.5)["slower"] == 0

    def test_the_same_run_is_the_same(self, result):
        found = compare_kernels(result, result, 0.0)
        assert (found["slower"], found["faster"], found["same"]) == (0, 0, len(result["cells"]))
        assert (found["differences"], found["only_old"], found["only_new"]) == ([], [], [])
        assert found["matmul_ratio"] == 1.0

    def test_a_slowed_kernel_is_found_and_no_other(self, monkeypatch):
        """The negative control: every call of the PyTorch form really works 20 times as long. Timed by this thread's
        work, which other programs on the machine do not move."""

        def time_ms(call, device, calls=1):
            start = time.thread_time()
            for _ in range(calls):
                call()
            return 1e3 * (time.thread_time() - start) / calls

        def slowed(function):
            def slow(*arguments, **options):
                start = time.thread_time()
                out = function(*arguments, **options)
                until = start + 20 * (time.thread_time() - start)
                while time.thread_time() < until:
                    pass
                return out

            return slow

        def measure():
            return bench_kernels(SMALL, [64, 128], whats=["forward", "decode"], repeats=4)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            monkeypatch.setattr(microbenchmark, "time_ms", time_ms)
            old = measure()
            for name in ("near_far_attention", "near_far_step"):
                monkeypatch.setattr(microbenchmark, name, slowed(getattr(microbenchmark, name)))
            new = measure()
        finally:
            torch.set_num_threads(threads)
        found = compare_kernels(old, new, 400.0)
        slow = {(x["what"], x["row"], x["tokens"]) for x in found["cells"] if x["verdict"] == "slower"}
        assert slow == {(what, "torch", tokens) for what in ("forward", "decode") for tokens in (64, 128)}

    def test_what_is_not_the_same_is_said(self):
        old, new = self.make((1, 1)), self.make((1, 1), (2, 2))
        new["machine"] = new["machine"] | {"threads": 4, "versions": {"torch": "2.12", "triton": "3.6"}}
        new["matmul_ms"] = {"before": 3.0, "after": 3.0}
        found = compare_kernels(old, new)
        assert found["differences"] == ["threads 2 -> 4", "torch 2.11 -> 2.12", "triton None -> 3.6"]
        assert found["matmul_ratio"] == 1.5
        assert (found["only_old"], found["only_new"]) == ([], [["forward", "float32", "torch", 128]])

    def test_another_device_is_refused(self):
        old, new = self.make((1, 1)), self.make((1, 1))
        new["machine"] = new["machine"] | {"cpu": {"model": "B", "usable": 2}}
        with pytest.raises(LinearizeError) as error:
            compare_kernels(old, new)
        assert str(error.value) == (
            "compare: the old result was measured on cpu (A), and this is cpu (B); times of two devices say nothing "
            "about a change, so measure the old state on this one"
        )
        for gpu in ("H100", "A100"):
            new = self.make((1, 1)) | {"device": "cuda"}
            new["machine"] = new["machine"] | {"gpu": {"name": gpu}}
            with pytest.raises(LinearizeError, match=rf"on cpu \(A\), and this is cuda \({gpu}\)"):
                compare_kernels(old, new)

    def test_another_problem_is_refused(self, tmp_path):
        old = self.make((1, 1))
        with pytest.raises(LinearizeError, match=r"is of SmolLM2-135M, not of Qwen3-0\.6B; give --model SmolLM2-135M"):
            compare_kernels(old, self.make((1, 1)) | {"model": "Qwen3-0.6B"})
        with pytest.raises(LinearizeError, match="has window 16, not 32; measure with --window 16"):
            compare_kernels(old, self.make((1, 1)) | {"shape": SMALL.shape | {"window": 32}})
        with pytest.raises(LinearizeError, match="have no cell in common"):
            compare_kernels(old, self.make((1, 1)) | {"cells": []})

    def test_it_is_refused_before_anything_is_measured(self, tmp_path, result):
        path = write_json(tmp_path / "old.json", result)
        cells = [96], ["decode"], ["bfloat16"]
        assert read_old(path, SMALL, "cpu", *cells) == result
        with pytest.raises(LinearizeError, match="have no cell in common; measure with the same --tokens"):
            read_old(path, SMALL, "cpu", [97], *cells[1:])
        with pytest.raises(LinearizeError, match="is of SmolLM2-135M, not of GPT-2"):
            read_old(path, Problem("GPT-2"), "cpu", *cells)
        with pytest.raises(LinearizeError, match="tolerance: -1 % is below 0; use 0 or more, such as 10"):
            read_old(path, SMALL, "cpu", *cells, -1.0)
        with pytest.raises(LinearizeError, match=r"holds 'other', expected 'linearize\.bench_kernels'"):
            read_old(write_json(tmp_path / "other.json", {"kind": "other"}), SMALL, "cpu", *cells)
        with pytest.raises(LinearizeError, match=r"schema 2 of .* was written by another version"):
            read_old(write_json(tmp_path / "new.json", result | {"schema": 2}), SMALL, "cpu", *cells)


@pytest.mark.slow
def test_two_runs_of_the_same_code_are_the_same():
    """On a machine that others use, one of several pairs: what moves between two runs is then the machine."""
    runs = [bench_kernels(SMALL, [512, 1024], whats=["forward", "decode"], repeats=7)]
    for _ in range(6):
        runs.append(bench_kernels(SMALL, [512, 1024], whats=["forward", "decode"], repeats=7))
        found = compare_kernels(*runs[-2:], 25.0)
        if found["same"] == len(found["cells"]) == 8:
            return
    pytest.fail(f"{found['slower']} slower and {found['faster']} faster in the last of six pairs")


class TestCommand:
    def call(self, *words):
        return CliRunner().invoke(app, ["bench", "kernels", *map(str, words)])

    def test_writes_json_and_page(self, tmp_path):
        out = tmp_path / "new" / "kernels.json"
        words = ("--tokens", "32,64", "--what", "forward", "--repeats", 1, "--window", 16, "--out", out)
        result = self.call(*words, "--device", "cpu")
        assert result.exit_code == 0, result.output
        data = read_json(out, KIND)
        assert data["shape"]["window"] == 16
        assert [(cell["row"], cell["tokens"]) for cell in data["cells"]] == [
            ("torch", 32), ("sdpa", 32), ("torch", 64), ("sdpa", 64),
        ]  # fmt: skip
        assert out.with_suffix(".md").read_text() == markdown(data)
        assert "## Forward, float32" in result.stdout
        assert f"written: {out.with_suffix('.md')}" in result.stderr

    def test_compares(self, tmp_path):
        words = ("--tokens", "32,64", "--what", "forward", "--repeats", 2, "--window", 16, "--device", "cpu")
        assert self.call(*words, "--out", tmp_path / "old.json").exit_code == 0
        words = (*words, "--compare", tmp_path / "old.json")
        # Everything is tolerated, so nothing is slower.
        result = self.call(*words, "--out", tmp_path / "new.json", "--tolerance", 1e9)
        assert result.exit_code == 0, result.output
        assert "0 slower, 0 faster, 4 same" in result.stdout
        # As if everything had been a thousand times as fast before.
        old = read_json(tmp_path / "old.json", KIND)
        for cell in old["cells"]:
            cell["ms"] = {name: ms / 1e3 for name, ms in cell["ms"].items()}
        write_json(tmp_path / "old.json", old)
        result = self.call(*words, "--out", tmp_path / "new.json")
        assert result.exit_code == 1
        assert "4 slower, 0 faster, 0 same" in result.stdout
        assert result.stderr.startswith("written: ")  # no error: the table says it

    def test_comparing_has_its_own_mistakes(self, tmp_path):
        out = tmp_path / "kernels.json"
        for words, message in (
            (("--compare", out), "would be replaced by the new result; give another --out"),
            (("--tolerance", 5), "tolerance: 5 is a setting of --compare; add --compare, or leave it out"),
            (("--compare", tmp_path / "no.json"), "No such file or directory; check the path"),
        ):
            result = self.call("--out", out, *words)
            assert (result.exit_code, result.stdout) == (2, "")
            assert message in result.stderr

    def test_wants_a_json_file(self, tmp_path):
        result = self.call("--out", tmp_path)
        assert result.exit_code == 2
        assert "does not end in .json" in result.stderr
