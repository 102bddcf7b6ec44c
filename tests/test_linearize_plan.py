"""`linearize plan`: bounds of time and memory before anything is converted."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from linearize.benchmarks import decode_plan, roofline
from linearize.benchmarks.decode_plan import plan_decode
from linearize.benchmarks.roofline import Roof, model_costs, named_roof, step_seconds
from linearize.cli import app
from linearize.config import LinearizeConfig
from linearize.errors import LinearizeError
from linearize.inspection import inspect_config
from tests.saved_models import save_tiny_model
from tests.tiny_models import make_config

CONFIG = LinearizeConfig(window=8, sinks=2, softmax_layers=(1,))
ROOF = Roof("made up", bandwidth=1e9, peaks={"float32": 1e12}, memory=2e6)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a configuration and no weights."""
    folder = tmp_path_factory.mktemp("plan")
    make_config("llama").save_pretrained(folder)
    return folder


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def error_line(result: Result) -> str:
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr.strip().removeprefix("error: ")


@pytest.fixture(scope="module")
def found():
    return plan_decode(make_config("llama"), CONFIG, [1000, 100], [1, 4], ROOF, "float32", name="tiny")


class TestPlan:
    def test_cells(self, found):
        assert found["kind"] == decode_plan.KIND
        assert found["bound"] is True
        labels = [(x["context"], x["batch"], x["row"]) for x in found["cells"]]
        assert labels == [(c, b, row) for c in (100, 1000) for b in (1, 4) for row in ("original", "student")]
        plan = inspect_config(make_config("llama"), CONFIG, [100, 1000], "float32")
        for cell in found["cells"]:
            costs = model_costs(make_config("llama"), CONFIG if cell["row"] == "student" else None, "float32")
            seconds = step_seconds(costs, cell["context"], cell["batch"], ROOF)
            assert cell["ms_per_token"] == 1e3 * seconds
            assert cell["tokens_per_s"] == cell["batch"] / seconds
            one = (plan.new_bytes if cell["row"] == "student" else plan.kv_bytes)[cell["context"] == 1000]
            assert cell["cache_bytes"] == cell["batch"] * one
            assert cell["fits"] == (cell["weight_bytes"] + cell["cache_bytes"] <= 2e6)
        assert {cell["fits"] for cell in found["cells"]} == {True, False}
        # Weights count: the cache alone would fit.
        tight = plan_decode(make_config("llama"), CONFIG, [100], [1], ROOF, "float32", memory=100_000)
        assert all(cell["cache_bytes"] <= 100_000 and not cell["fits"] for cell in tight["cells"])
        json.dumps(found, allow_nan=False)

    def test_what_limits(self, found):
        assert {cell["limited_by"] for cell in found["cells"]} == {"memory"}
        slow = Roof("slow", bandwidth=1e15, peaks={"float32": 1e6}, memory=None)
        found = plan_decode(make_config("llama"), CONFIG, [100], [1], slow, "float32")
        assert {cell["limited_by"] for cell in found["cells"]} == {"arithmetic"}
        assert {cell["fits"] for cell in found["cells"]} == {None}
        assert found["largest_batch"] == []

    def test_largest_batch(self, found):
        for cell in found["largest_batch"]:
            costs = model_costs(make_config("llama"), CONFIG if cell["row"] == "student" else None, "float32")
            fits = [costs.weight_bytes + costs.cache_bytes(cell["context"], cell["batch"] + i) <= 2e6 for i in (0, 1)]
            assert fits == [True, False]
            assert cell["batch"] >= 1
        small = plan_decode(make_config("llama"), CONFIG, [100], [1], ROOF, "float32", memory=1000)
        assert [(x["batch"], x["tokens_per_s"]) for x in small["largest_batch"]] == [(0, None)] * 2
        assert small["memory_bytes"] == 1000

    def test_crossover(self, found):
        for cross in found["crossover"]:
            assert 16 <= cross["context"] < 1000
        assert [cross["batch"] for cross in found["crossover"]] == [1, 4]

    @pytest.mark.parametrize("contexts", [[], [0]])
    def test_bad_numbers(self, contexts):
        with pytest.raises(LinearizeError, match=r"context: .* is not a list of numbers >= 1"):
            plan_decode(make_config("llama"), CONFIG, contexts, [1], ROOF, "float32")


class TestCommand:
    def test_table(self, model: Path):
        words = ("--context", "1k,16k", "--batch", "2", "--gpu", "l4", "--window", "8", "--softmax-layers", "0")
        result = call(model, *words)
        assert result.exit_code == 0, result.output
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        config = LinearizeConfig(window=8, softmax_layers=(0,))
        found = plan_decode(make_config("llama"), config, [1024, 16384], [2], named_roof("l4"))
        for cell in found["cells"]:
            start = f"{cell['context'] // 1024}k 2 {cell['row']} {cell['ms_per_token']:.3g} "
            assert any(line.startswith(start) for line in lines), start
        assert "on L4 (data sheet)" in lines[0]
        assert "no faster than" in result.stdout
        assert "These are bounds, not measurements" in result.stdout
        assert (
            f"the student's bound is the lower one from {found['crossover'][0]['context']} tokens on." in result.stdout
        )
        assert "The model was made for" not in result.stdout
        assert "The model was made for 16384 tokens" in call(model, "--context", "32k").stdout

    def test_json(self, model: Path):
        found = json.loads(call(model, "--json", "--memory", "1MiB", "--dtype", "float16").stdout)
        assert (found["kind"], found["schema"], found["memory_bytes"]) == ("linearize.plan", 1, 2**20)
        assert [x["context"] for x in found["cells"]] == [32768] * 4 + [131072] * 4
        assert found["conversion"] == LinearizeConfig().to_dict()
        assert (found["device"]["name"], found["device"]["measured"], found["measurement"]) == ("H100", False, None)

    def test_here_measures_first(self, model: Path, monkeypatch):
        measured = roofline.bandwidth("cpu", dtypes=["float32"], buffer_mib=1, repeats=1)
        asked = []
        monkeypatch.setattr(roofline, "bandwidth", lambda device, dtypes: asked.append((device, dtypes)) or measured)
        result = call(model, "--gpu", "here", "--dtype", "float32")
        assert result.exit_code == 0, result.output
        assert [dtypes for _, dtypes in asked] == [["float32"]]
        assert f"on {measured['name']} (measured here)" in result.stdout
        found = json.loads(call(model, "--gpu", "here", "--dtype", "float32", "--json").stdout)
        assert found["measurement"] == measured
        assert found["device"]["bandwidth_gb_s"] == pytest.approx(measured["read_gb_s"])

    def test_a_student_is_planned_as_it_is(self, tmp_path: Path):
        original = save_tiny_model(tmp_path / "original")
        words = ("convert", original, tmp_path / "student", "--window", "8")
        assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
        result = call(tmp_path / "student", "--json")
        assert json.loads(result.stdout)["conversion"] == LinearizeConfig(window=8).to_dict()
        assert "This is a student" in result.stderr
        message = error_line(call(tmp_path / "student", "--window", "9"))
        assert message.endswith("is converted already; leave the options of a conversion out")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--gpu", "v100"], "gpu: 'v100' is unknown; use here for this machine, or one of h100"),
            (["--dtype", "int8"], "dtype: 'int8' is not known; use one of float32, bfloat16, float16"),
            (["--memory", "lots"], "memory: 'lots' is not a number of bytes; write for example 50MB, 48MiB or 8GB"),
            (["--batch", "0"], "batch: '0' is not a number >= 1; write for example 1,16"),
            (["--context", "x"], "context: 'x' is not a number of tokens"),
            (["--softmax-layers", "0,1,2"], "softmax_layers: (0, 1, 2) leaves none of the 3 layers to convert"),
        ],
    )
    def test_mistakes(self, model: Path, words: list[str], message: str):
        assert error_line(call(model, *words)).startswith(message)

    def test_every_gpu_is_in_the_help(self):
        text = " ".join(call("--help").stdout.replace("\u2502", " ").split())
        assert ", ".join(roofline.GPUS) in text
