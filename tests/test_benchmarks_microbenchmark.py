"""The microbenchmark of near-and-far attention: what it times, what it writes, what it refuses."""

import json

import pytest
import torch
from typer.testing import CliRunner

from linearize.benchmarks import microbenchmark
from linearize.benchmarks.files import read_json
from linearize.benchmarks.microbenchmark import KIND, Problem, bench_kernels, make_runs, markdown
from linearize.cli import app
from linearize.errors import LinearizeError
from tests.cost import flops

SMALL = Problem("SmolLM2-135M", window=16, sinks=2)


@pytest.fixture(scope="module")
def result():
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
def test_on_a_gpu():
    found = bench_kernels(SMALL, [256, 512], dtypes=["bfloat16"], device="cuda", repeats=2)
    assert {cell["row"] for cell in found["cells"]} == {"torch", "triton", "sdpa"}
    assert found["sdpa"] == {"bfloat16": "flash"}


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

    def test_wants_a_json_file(self, tmp_path):
        result = self.call("--out", tmp_path)
        assert result.exit_code == 2
        assert "does not end in .json" in result.stderr
