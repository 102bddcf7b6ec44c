"""The command line: help, results, and the one line that a user sees after each mistake."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import linearize
from linearize.checkpoint import save
from linearize.cli import app
from linearize.config import LinearizeConfig
from linearize.console import human_bytes, human_tokens, parse_tokens
from linearize.convert import convert, converted_layers
from linearize.distill.recipe import dump_recipe, load_recipe, preset_names
from linearize.errors import LinearizeError
from linearize.models import load_model
from tests.saved_models import save_tiny_model

COMMANDS = (
    ["inspect"],
    ["convert"],
    ["export"],
    ["calibrate"],
    ["select"],
    ["plan"],
    ["distill"],
    ["run"],
    ["evaluate"],
    ["bench", "decode"],
    ["bench", "capacity"],
    ["bench", "compile"],
    ["bench", "kernels"],
    ["report"],
    ["doctor"],
    ["families"],
    ["generate"],
)
ROOT = Path(__file__).resolve().parents[1]
TEXT = "In a small house near the far hill they keep what they saw and forget the rest. " * 40


def call(*words: object, **options) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], **options)


def error_line(result: Result, status: int = 2) -> str:
    """The one line on stderr that a failed command leaves; nothing on stdout."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("dtype: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def process(*words: object, code: str | None = None) -> subprocess.CompletedProcess:
    arguments = ["-c", code] if code else ["-m", "linearize", *map(str, words)]
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120)


def put_on_hub(folder: Path, name: str, cache: Path, monkeypatch) -> None:
    """Put a model's files where transformers keeps what it fetched under a hub name, and turn the network off."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "original", chat=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("students") / "adapter"
    assert call("convert", model, out, "--window", "8", "--adapter").exit_code == 0
    return out


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_every_command_has_help_with_an_example(self, command: list[str]):
        result = call(*command, "--help")
        assert result.exit_code == 0
        assert f"Example: linearize {' '.join(command)}" in " ".join(result.stdout.split())

    def test_the_group_has_an_example_too(self):
        assert "Example: linearize bench decode" in call("bench", "--help").stdout

    def test_all_presets_are_named(self):
        text = " ".join(call("run", "--help").stdout.replace("\u2502", " ").split())
        named = text.partition("or a preset: ")[2].partition(".")[0]
        assert sorted(named.replace(" or ", ", ").split(", ")) == preset_names()

    @pytest.mark.parametrize("words", [[], ["bench"], ["run"], ["inspect"]], ids=str)
    def test_no_types_of_flags_and_no_braces(self, words: list[str]):
        text = call(*words, "--help").stdout
        assert "--help" in text
        assert "bool" not in text.lower()
        assert "{" not in text

    def test_all_commands_are_tested(self):
        names = {command.callback.__name__ for command in app.registered_commands}
        assert names == {command[0] for command in COMMANDS} - {"bench"}

    @pytest.mark.parametrize("words", [[], ["bench"]], ids=str)
    def test_a_group_alone_prints_its_help(self, words: list[str]):
        result = call(*words)
        assert result.exit_code == 2
        assert f"Usage: linearize {' '.join(words)}" in result.stdout
        assert result.stderr == ""

    def test_version(self):
        result = call("--version")
        assert (result.exit_code, result.stdout) == (0, f"linearize {linearize.__version__}\n")

    def test_nothing_heavy_is_imported(self):
        code = (
            "import sys; from linearize.cli import app\n"
            "try: app(['inspect', '--help'])\n"
            "except SystemExit: pass\n"
            "heavy = ('torch', 'transformers', 'peft', 'accelerate', 'fla', 'triton', 'datasets', 'numpy')\n"
            "print('heavy:', [name for name in heavy if name in sys.modules])"
        )
        assert process(code=code).stdout.splitlines()[-1] == "heavy: []"

    def test_as_a_module(self):
        assert process("--version").stdout == f"linearize {linearize.__version__}\n"


class TestInspect:
    def test_table(self, model: Path):
        result = call("inspect", model, "--contexts", "1k,8192", "--softmax-layers", "0", "--dtype", "float32")
        assert result.exit_code == 0
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        # A token: 2 x 2 key-value heads x head_dim 16 x 4 bytes. Converted: 132 tokens and 2 x 32 x 17 x 4 bytes.
        assert "0 softmax as it is 2 16 256 KiB 2.0 MiB as before -" in lines
        assert "1 softmax window 64 + sinks 4 + hedgehog (normalizer) 2 16 256 KiB 2.0 MiB 57.5 KiB 231" in lines
        assert "1 of 2 layers would be converted" in result.stdout
        assert "  at 8k tokens  4.0 MiB -> 2.1 MiB, 1.95 times smaller" in result.stdout

    def test_contexts_beyond_the_model_are_marked(self, model: Path):
        assert "The model was made for 16384 tokens" in call("inspect", model, "--contexts", "32k").stdout
        assert "The model was made for" not in call("inspect", model, "--contexts", "16k").stdout

    def test_json(self, model: Path):
        result = call("inspect", model, "--json", "--mixer", "none", "--contexts", "1m")
        plan = json.loads(result.stdout)
        assert plan["contexts"] == [1024**2]
        assert plan["new_bytes"] == [2 * (3 * 64 + 4) * 2 * 2 * 16 * 2]

    def test_reads_no_weights(self, model: Path, tmp_path: Path):
        (tmp_path / "config.json").write_text((model / "config.json").read_text())
        assert call("inspect", tmp_path).exit_code == 0

    def test_student(self, adapter: Path):
        result = call("inspect", adapter)
        assert "window 8 + sinks 4" in result.stdout
        assert "This is a student" in result.stderr
        assert "is converted already; leave the options" in error_line(call("inspect", adapter, "--window", "9"))


class TestConvert:
    def test_whole_student(self, model: Path, tmp_path: Path):
        result = call("convert", model, tmp_path / "new", "--window", "8", "--softmax-layers", "every:2")
        assert result.exit_code == 0
        assert result.stdout == f"1 of 2 layers converted, untrained; saved in {tmp_path / 'new'}\n"
        assert f"linearize distill default --model {model}" in result.stderr
        student, tokenizer = load_model(tmp_path / "new", "float32", "cpu")
        assert list(converted_layers(student)) == [0]
        assert tokenizer.chat_template

    @pytest.mark.parametrize(
        "words",
        [
            [],
            ["--window", "8", "--sinks", "0", "--mix", "gate"],
            ["--softmax-layers", "every:2", "--feature-dim", "4"],
            ["--softmax-layers", "1"],
        ],
        ids=str,
    )
    def test_the_advised_command_makes_the_same_conversion(self, model: Path, tmp_path: Path, words: list[str]):
        result = call("convert", model, tmp_path / "new", "--adapter", *words)
        assert result.exit_code == 0, result.output
        advice = shlex.split(result.stderr.splitlines()[-1])
        assert advice[:5] == ["linearize", "distill", "default", "--model", str(model)]
        assert advice[5::2] == ["--set"] * len(advice[6::2])
        recipe = load_recipe("default", [f"model={model}", *advice[6::2]])
        made = json.loads((tmp_path / "new" / "linearize.json").read_text())["conversion"]
        assert recipe.convert == LinearizeConfig.from_dict(made)

    def test_without_a_state_there_is_nothing_to_teach(self, model: Path, tmp_path: Path):
        result = call("convert", model, tmp_path / "new", "--mixer", "none", "--adapter")
        assert (result.exit_code, result.stderr) == (0, "")
        assert len(converted_layers(load_model(tmp_path / "new", "float32", "cpu")[0])) == 2

    def test_adapter_is_small_and_finds_its_base(self, adapter: Path, model: Path):
        assert not (adapter / "config.json").exists()
        description = json.loads((adapter / "linearize.json").read_text())
        assert description["base"] == str(model)
        assert description["conversion"]["window"] == 8
        assert load_model(adapter, "float32", "cpu")[1].chat_template


class TestEvaluate:
    ARGUMENTS = ("--tokens", "256", "--contexts", "64", "--needle", "128", "--answer-tokens", "8", "--dtype", "float32")
    ARGUMENTS += ("--recall-lengths", "none")

    def evaluate(self, model: Path, text: Path, out: Path, *more: object) -> dict:
        result = call("evaluate", model, "--text", text, "--out", out, *self.ARGUMENTS, *more)
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text())
        for row in found["rows"]:
            assert f"{found['perplexity']['rows'][row]['ppl']:.2f}" in result.stdout
        return found

    def test_original(self, model: Path, text: Path, tmp_path: Path):
        found = self.evaluate(model, text, tmp_path / "e.json")
        assert found["rows"] == ["original", "window + sinks"]
        near = "Converted layers keep exactly: window W = 64 (64 to 127 recent tokens) and sinks S = 4."
        assert near in found["notes"]
        assert near in call("evaluate", model, "--text", text, "--out", tmp_path / "e.json", *self.ARGUMENTS).stdout

    def test_adapter_is_compared_on_one_set_of_weights(self, adapter: Path, text: Path, tmp_path: Path):
        found = self.evaluate(adapter, text, tmp_path / "e.json", "--needle", "none")
        names = ["original", "window + sinks", "student", "student, state off", "student, window off"]
        assert found["rows"] == names
        assert found["needle"] is None
        ppl = {name: row["ppl"] for name, row in found["perplexity"]["rows"].items()}
        assert ppl["student, state off"] == ppl["window + sinks"]  # untrained: the near side is the original's
        assert len({ppl[name] for name in names}) == 4

    def test_whole_student_needs_its_base(self, model: Path, text: Path, tmp_path: Path):
        assert call("convert", model, tmp_path / "whole", "--window", "8").exit_code == 0
        message = error_line(call("evaluate", tmp_path / "whole", "--text", text))
        assert message.endswith("is a whole student, compared with its original; name that with --base")
        found = self.evaluate(tmp_path / "whole", text, tmp_path / "e.json", "--base", model)
        alone = self.evaluate(model, text, tmp_path / "o.json")
        assert len(found["rows"]) == 5
        assert found["perplexity"]["rows"]["original"] == alone["perplexity"]["rows"]["original"]

    def test_whole_student_on_the_hub_needs_its_base_too(self, model: Path, text: Path, tmp_path: Path, monkeypatch):
        assert call("convert", model, tmp_path / "whole", "--window", "8").exit_code == 0
        put_on_hub(tmp_path / "whole", "owner/student", tmp_path / "hub", monkeypatch)
        message = error_line(call("evaluate", "owner/student", "--text", text))
        assert message.endswith("is a whole student, compared with its original; name that with --base")
        found = self.evaluate("owner/student", text, tmp_path / "e.json", "--base", model)
        assert len(found["rows"]) == 5

    def test_more_rows_some_rows_and_what_was_measured_before(
        self, run: Path, adapter: Path, text: Path, tmp_path: Path
    ):
        out = tmp_path / "e.json"
        log = [("transfer", 100), ("distill", 200), ("distill-2", 300), ("control", 200), ("control-2", 300)]
        lines = [json.dumps({"stage": stage, "tokens": tokens, "loss": 1.0}) for stage, tokens in log]
        (run / "train.jsonl").write_text("\n".join(lines) + "\n")
        also = ("--also", f"other={adapter}", "--also", f"its control={run / 'control'}")
        found = self.evaluate(run / "student", text, out, *also)
        rows = ["original", "control", "window + sinks", "student", "student, state off", "student, window off"]
        assert found["rows"] == [*rows, "other", "its control"]
        ppl = {name: row["ppl"] for name, row in found["perplexity"]["rows"].items()}
        assert ppl["its control"] == pytest.approx(ppl["control"], rel=1e-5)
        assert len({ppl[name] for name in ("original", "control", "student", "other")}) == 4
        seen = {"original": 0, "window + sinks": 0, "control": 500, "its control": 500, "student": 600}
        assert {row: found["tokens_seen"][row] for row in seen} == seen
        assert "other" not in found["tokens_seen"]  # not from a run

        fewer = self.evaluate(run / "student", text, out, "--rows", "student", "--only", "needle")
        assert fewer["rows"] == ["original", "student"]
        for row in fewer["rows"]:
            assert fewer["perplexity"]["rows"][row] == found["perplexity"]["rows"][row]  # from e.work
        message = error_line(call("evaluate", run / "student", "--text", text, "--rows", "pupil", *self.ARGUMENTS))
        assert "rows: there is no row 'pupil'; choose from 'original', 'control'" in message

    def test_changed_weights_are_measured_again(self, adapter: Path, text: Path, tmp_path: Path):
        before = self.evaluate(adapter, text, tmp_path / "e.json")["perplexity"]["rows"]
        weights = load_file(adapter / "adapter.safetensors")
        save_file({name: x + 0.5 for name, x in weights.items()}, adapter / "adapter.safetensors")
        after = self.evaluate(adapter, text, tmp_path / "e.json")["perplexity"]["rows"]
        assert after["student"]["ppl"] != before["student"]["ppl"]
        assert after["original"] == before["original"]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("other", "also: 'other' is not NAME=FOLDER"),
            ("student=x", "also: there is a row 'student' already"),
            ("other={model}", "holds neither a student nor a LoRA"),
        ],
    )
    def test_more_rows_are_checked(self, adapter: Path, model: Path, text: Path, given: str, message: str):
        result = call("evaluate", adapter, "--text", text, "--also", given.format(model=model), *self.ARGUMENTS)
        assert message in error_line(result)

    def test_recall_needles_of_several_keys_and_attention(self, adapter: Path, text: Path, tmp_path: Path):
        more = (
            "--needle",
            "220",
            "--needle-keys",
            "1,2",
            "--recall-lengths",
            "128",
            "--attention",
            "--only",
            "needle,recall,attention",
        )
        words = ("--text", text, "--out", tmp_path / "e.json", *self.ARGUMENTS[:-2], *more)
        result = call("evaluate", adapter, *words)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "e.json").read_text())
        assert {cell["keys"] for cell in found["needle"]["rows"]["student"]["cells"]} == {1, 2}
        assert set(found["recall"]["probes"]) >= {"copy", "induction"}
        assert found["attention"]["rows"]["student, state off"]["mean"]["older"] == 0.0
        for title in ("needle: written / ranked first", "recall, copy", "attention at 64 tokens"):
            assert title in result.stdout

    def test_choices_and_default_text(self, model: Path, tmp_path: Path):
        items = tmp_path / "items.jsonl"
        items.write_text('{"query": "a b", "choices": [" c", " d"], "gold": 0}\n' * 4)
        out = tmp_path / "e.json"
        result = call("evaluate", model, "--choices", items, "--out", out, *self.ARGUMENTS)
        assert result.exit_code == 0, result.output
        assert json.loads(out.read_text())["choices"]["n_items"] == 4


class TestBench:
    BENCH = ("--repeats", "1", "--decode-tokens", "2", "--dtype", "float32", "--modes", "dynamic,static")

    def test_hybrid_and_original(self, model: Path, tmp_path: Path):
        assert call("convert", model, tmp_path / "hybrid", "--softmax-layers", "0").exit_code == 0
        for name, row in ((tmp_path / "hybrid", "student"), (model, "window + sinks")):
            out = tmp_path / "b.json"
            result = call("bench", "decode", name, "--contexts", "16", "--out", out, *self.BENCH)
            assert result.exit_code == 0, result.output
            assert json.loads(out.read_text())["rows"] == ["original", row]
            assert "window W = 64 (64 to 127 recent tokens) and sinks S = 4." in result.stderr

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--modes", "dynamic,none"], "modes: there is no 'none'; choose from dynamic, static"),
            (["--repeats", "0"], "repeats: 0 measures nothing; use 1 or more"),
            (["--contexts", "4"], "contexts: 4 is too short to warm up; use 5 or more"),
        ],
    )
    def test_mistakes_are_told_before_anything_is_loaded(self, words: list[str], message: str, tmp_path: Path):
        result = call("bench", "decode", "no-such-model", *words, "--out", tmp_path / "b.json")
        assert result.exit_code == 2
        assert f"error: {message}" in result.stderr

    def test_decode(self, adapter: Path, tmp_path: Path):
        out = tmp_path / "b.json"
        words = (
            "--contexts",
            "32,64",
            "--batch",
            "1,2",
            "--prefill",
            "16",
            "--fill",
            "none",
            "--control",
            "--out",
            out,
        )
        result = call("bench", "decode", adapter, *words, *self.BENCH)
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text())
        assert found["rows"] == ["original", "original again", "student"]
        assert (found["contexts"], found["batches"]) == ([32, 64], [1, 2])
        cells = {(cell["row"], cell["context"]): cell["cache_bytes"] for cell in found["cells"]}
        assert cells["student", 32] == cells["student", 64]
        assert cells["student", 32]["state"] > 0 == cells["original", 32]["state"]
        for part in (
            "decode, batch 2",
            "prefill, batch 1",
            "student, batch 1: ",
            "static+compile left out: it was not",
        ):
            assert part in result.stdout


class TestCalibrate:
    def test_adapter_that_is_fitted(self, model: Path, tmp_path: Path):
        text, out = tmp_path / "text.txt", tmp_path / "out"
        text.write_text(TEXT)
        shape = ["--window", "8", "--softmax-layers", "1"]
        result = call("calibrate", model, "--text", text, "--tokens", "150", "--seq-len", "64", "--out", out, *shape)
        assert result.exit_code == 0, result.output
        assert result.stdout.rstrip().endswith(str(out))
        assert "mix alone" in result.stdout
        student, tokenizer = load_model(out, "float32", "cpu")
        assert list(converted_layers(student)) == [0]
        assert tokenizer.chat_template
        assert all(converted_layers(student)[0].mix.bias != 0)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--mixer", "none"], "calibrate: mixer 'none' has no far side of its own"),
            (["--window", "32", "--seq-len", "64"], "data.seq_len: in rows of 64 tokens nothing has left a"),
            (["--text", "absent.txt"], "absent.txt"),
        ],
    )
    def test_refusals_leave_nothing(self, model: Path, tmp_path: Path, words: list[str], message: str):
        assert message in error_line(call("calibrate", model, "--out", tmp_path / "out", *words))
        assert not (tmp_path / "out").exists()

    def test_not_a_student_and_not_over_something(self, model: Path, adapter: Path, tmp_path: Path):
        assert "is a student already" in error_line(call("calibrate", adapter, "--out", tmp_path / "out"))
        assert "already holds something" in error_line(call("calibrate", model, "--out", adapter))


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """The folder of a run, as far as measuring its student needs it: LoRA in the student, and a control."""
    from peft import LoraConfig, get_peft_model

    out = tmp_path / "run"
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    original, tokenizer = load_model(model, "float32", "cpu")
    student = get_peft_model(convert(original, LinearizeConfig(window=8)), lora)
    save(student, out / "student", adapter=True, tokenizer=tokenizer)
    student.add_adapter("control", lora)
    student.save_pretrained(out, selected_adapters=["control"], save_embedding_layers=False)
    dump_recipe(load_recipe("demo", [f"model={model}"]), out / "recipe.yaml")
    return out


class TestWhereResultsGo:
    EVALUATE = ("--tokens", "128", "--contexts", "64", "--needle", "none", "--answers", "0", "--dtype", "float32")
    EVALUATE += ("--recall-lengths", "none")
    BENCH = ("--contexts", "16", *TestBench.BENCH)

    def test_a_runs_student_into_the_run_with_its_report(self, run: Path, text: Path, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = call("evaluate", "run/student", "--text", text, *self.EVALUATE)
        assert result.exit_code == 0, result.output
        report = "written: run/report.html, which shows it; linearize report run writes that again"
        assert result.stderr.splitlines()[-2:] == ["written: run/evaluate.json", report]
        rows = json.loads((run / "evaluate.json").read_text())["rows"]
        assert rows[:2] == ["original", "control"]
        assert "There is no bench.json" in (run / "report.html").read_text()

        result = call("bench", "decode", "run/student", *self.BENCH)
        assert result.exit_code == 0, result.output
        assert result.stderr.splitlines()[-2:] == ["written: run/bench.json", report]
        assert "There is no" not in (run / "report.html").read_text()

        monkeypatch.chdir(run / "student")
        result = call("bench", "decode", ".", *self.BENCH)
        assert f"written: {run / 'bench.json'}, in place of the one before" in result.stderr.splitlines()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def test_anything_else_here(self, adapter: Path, text: Path, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for _ in range(2):
            result = call("evaluate", adapter, "--text", text, *self.EVALUATE)
        assert result.stderr.splitlines()[-2:] == [
            "written: evaluate.json, in place of the one before",
            "to see it as a page: linearize report .",
        ]
        assert call("report", ".").stdout == "report.html\n"

    def test_where_asked(self, run: Path, text: Path, tmp_path: Path):
        for name, way in (("evaluate.json", ""), ("e.json", ", rename it to evaluate.json, then")):
            out = tmp_path / "a folder" / name
            result = call("evaluate", run / "student", "--text", text, "--out", out, *self.EVALUATE)
            assert result.exit_code == 0, result.output
            last = f"to see it as a page{way}: linearize report '{out.parent}'"
            assert result.stderr.splitlines()[-2:] == [f"written: {out}", last]
        assert not (run / "evaluate.json").exists()
        assert not (run / "report.html").exists()


class TestGenerate:
    WORDS = ("--max-new-tokens", "5", "--dtype", "float32")

    def test_streams_the_answer_and_nothing_else(self, model: Path, adapter: Path):
        for name in (model, adapter):
            result = call("generate", name, "--prompt", "they keep", *self.WORDS)
            assert result.exit_code == 0, result.output
            loaded, tokenizer = load_model(name, "float32", "cpu")
            ids = tokenizer("they keep", return_tensors="pt").input_ids
            with torch.no_grad():
                answer = loaded.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
            assert result.stdout.rstrip("\n") == tokenizer.decode(answer, skip_special_tokens=True).rstrip("\n")

    def test_speculative_writes_what_the_original_writes(self, model: Path, run: Path, tmp_path: Path):
        """Of a student with LoRA inside, and of a whole student beside its original."""
        words = ("--prompt", "they keep what they", "--max-new-tokens", "12", "--dtype", "float32")
        expected = call("generate", model, *words).stdout
        assert call("generate", run / "student", *words).stdout != expected
        result = call("generate", run / "student", "--speculative", *words)
        assert (result.exit_code, result.stdout) == (0, expected)
        whole, tokenizer = load_model(run / "student", "float32", "cpu")
        save(whole, tmp_path / "whole", tokenizer=tokenizer)
        result = call("generate", tmp_path / "whole", "--speculative", "--base", model, *words)
        assert (result.exit_code, result.stdout) == (0, expected)
        message = error_line(call("generate", tmp_path / "whole", "--speculative", *words))
        assert message.endswith("is a whole student, which drafts for its original; name that with --base")
        message = error_line(call("generate", model, "--speculative", *words))
        assert message.endswith("is an original, which drafts for none; leave --speculative out")
        sampled = call("generate", run / "student", "--speculative", "--temperature", "2", *words)
        assert sampled.exit_code == 0, sampled.output
        assert sampled.stdout != expected

    def test_sampling_follows_the_seed(self, model: Path):
        words = ("generate", model, "--prompt", "a", "--temperature", "2", "--max-new-tokens", "12")
        first, again, other = (call(*words, "--seed", seed).stdout for seed in (1, 1, 2))
        assert first == again != other

    def test_chat_and_standard_input(self, model: Path):
        result = call("generate", model, "--chat", "--prompt", "-", *self.WORDS, input="hello")
        assert result.exit_code == 0, result.output
        assert result.stdout

    def test_chat_without_a_template(self, text: Path, tmp_path: Path):
        save_tiny_model(tmp_path)
        message = error_line(call("generate", tmp_path, "--chat", "--prompt", "a"))
        assert message.endswith("has no chat template; leave --chat out, or use an instruct model")


class TestBadInputs:
    """Each with the message that the user sees."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["inspect"], "Missing argument 'MODEL' (see 'linearize inspect --help')"),
            (["inspekt", "x"], "No such command 'inspekt'"),
            (["inspect", "MODEL", "--windw", "3"], "No such option: --windw"),
            (["inspect", "./nowhere"], "model: no folder './nowhere', and it is not a hub name (owner/model)"),
            (["inspect", "nowhere.gguf"], "model: no file 'nowhere.gguf'; give the path of an existing .gguf file"),
            (["inspect", "EMPTY"], "has neither a config.json (a model) nor a linearize.json (a student)"),
            (["inspect", "GPT2"], "model_type 'gpt2' is not among the known families (cohere, gemma2, "),
            (["inspect", "MODEL", "--softmax-layers", "evry:4"], "softmax_layers: 'evry:4' is not understood; use"),
            (["inspect", "MODEL", "--softmax-layers", "0,9"], "layer 9 is out of range, the model has layers 0 to 1"),
            (["inspect", "MODEL", "--softmax-layers", "-1"], "layer -1 is out of range, the model has layers 0 to 1"),
            (["inspect", "MODEL", "--softmax-layers", "0,1"], "leaves none of the 2 layers to convert"),
            (["inspect", "MODEL", "--mixer", "none", "--window", "0"], "window: 0 is not an integer >= 1"),
            (["inspect", "MODEL", "--window", "many"], "Invalid value for '--window'"),
            (["inspect", "MODEL", "--window", "99999"], "window: 99999 exceeds the model's 16384 positions"),
            (["inspect", "MODEL", "--sinks", "-1"], "sinks: -1 is not an integer >= 0"),
            (["inspect", "MODEL", "--mixer", "hegdehog"], "mixer: 'hegdehog' is unknown; did you mean 'hedgehog'?"),
            (["inspect", "MODEL", "--mix", "sum"], "mix: 'sum' is unknown; known: normalizer, gate"),
            (["inspect", "MODEL", "--contexts", "1k,zero"], "contexts: 'zero' is not a number of tokens >= 1"),
            (["inspect", "MODEL", "--dtype", "fp8"], "dtype: 'fp8' is not known; use one of float32, bfloat16"),
            (["convert", "MODEL", "FULL"], "already holds something; give a new folder"),
            (["convert", "ADAPTER", "NEW"], "is converted already"),
            (
                ["distill", "MODEL/recipe.yaml"],
                "no such recipe file; give a YAML file or one of decomposed, default, demo",
            ),
            (["distill", "defualt"], "recipe 'defualt': unknown, did you mean 'default'?"),
            (["run", "demo", "--set", "stages.0.transfer.objectiv=output"], "unknown key, did you mean 'objective'?"),
            (["run", "demo", "--set", "seed"], "override 'seed': not of the form key=value"),
            (["run", "default"], "nothing is given; give a model: a local folder, a hub name"),
            (
                ["evaluate", "MODEL", "--text", "nowhere.txt"],
                "text: 'nowhere.txt' is not a file; write its path, or NAME=path",
            ),
            (["evaluate", "MODEL", "--choices", "nowhere.jsonl"], "choices: 'nowhere.jsonl' is not a file"),
            (["evaluate", "MODEL", "--tokens", "10"], "tokens: 10 is less than one sequence of 1024"),
            (["evaluate", "MODEL", "--needle", "3"], "needle_lengths[0]: 3 is out of range"),
            (["evaluate", "MODEL", "--needle-keys", "one"], "needle-keys: 'one' is not a number"),
            (["evaluate", "MODEL", "--needle-kind", "digit"], "needle_kind[0]: 'digit' is unknown, did you mean"),
            (["evaluate", "MODEL", "--needle-kind", ","], "needle_kind: the list is empty"),
            (["evaluate", "MODEL", "--recall-lengths", "32"], "recall_lengths[0]: 32 is out of range"),
            (
                ["evaluate", "MODEL", "--letters", "4"],
                "letters: 4 questions are asked by letter, and no file of choices",
            ),
            (["evaluate", "MODEL", "--lm-eval-limit", "4"], "lm_eval_limit: 4 without a task in lm_eval"),
            (["evaluate", "MODEL", "--base", "MODEL"], "is a complete model and takes no base; leave --base out"),
            (["evaluate", "MODEL", "--device", "abacus"], "device: 'abacus' is not a device"),
            (["bench", "decode", "MODEL", "--contexts", ""], "contexts: '' is not a number of tokens >= 1"),
            (["bench", "decode", "MODEL", "--batch", "1,x"], "batch: 'x' is not a whole number >= 1"),
            (["bench", "decode", "MODEL", "--fill", "1k,2k"], "fill: '1k,2k' is a list; give one number of tokens"),
            (
                ["bench", "decode", "MODEL", "--modes", "eager"],
                "modes: there is no 'eager'; choose from dynamic, static",
            ),
            (["bench", "decode", "MODEL", "--repeats", "0"], "repeats: 0 measures nothing; use 1 or more"),
            (["run", "demo", "--set", "bench.contexts=[2]"], "bench.contexts[0]: 2 is out of range"),
            (["bench", "decode", "MODEL", "--out", "FULL"], "FULL' is a folder; give a file, such as"),
            (["bench", "encode", "MODEL"], "No such command 'encode'"),
            (["report", "EMPTY"], "no evaluate.json, bench.json or train.jsonl to report on"),
            (["generate", "MODEL", "--prompt", " "], "prompt: it is empty; give the text to continue"),
            (["generate", "MODEL", "--prompt", "a", "--dtype", "half"], "dtype: 'half' is not known; use one of auto"),
            (["generate", "ORPHAN", "--prompt", "a"], "which is not there any more; give the original with --base"),
        ],
    )
    def test_one_line_and_status_2(self, words: list[str], message: str, model: Path, adapter: Path, tmp_path: Path):
        (tmp_path / "EMPTY").mkdir()
        (tmp_path / "FULL").mkdir()
        (tmp_path / "FULL" / "file").touch()
        (tmp_path / "GPT2").mkdir()
        (tmp_path / "GPT2" / "config.json").write_text('{"model_type": "gpt2"}')
        (tmp_path / "ORPHAN").mkdir()
        description = json.loads((adapter / "linearize.json").read_text()) | {"base": "/gone"}
        (tmp_path / "ORPHAN" / "linearize.json").write_text(json.dumps(description))
        places = {"MODEL": model, "ADAPTER": adapter, "MODEL/recipe.yaml": model / "recipe.yaml"}
        places |= {name: tmp_path / name for name in ("EMPTY", "FULL", "GPT2", "NEW", "ORPHAN")}
        result = call(*[places.get(word, word) for word in words])
        assert message in error_line(result)
        assert not (tmp_path / "NEW").exists()

    def test_debug_adds_the_traceback_anywhere(self):
        for words in (["--debug", "inspect", "./nowhere"], ["inspect", "./nowhere", "--debug"]):
            result = call(*words)
            assert result.exit_code == 2
            assert "Traceback (most recent call last)" in result.stderr
            assert result.stderr.splitlines()[-1].startswith("error: model: no folder './nowhere'")

    def test_our_own_mistakes_say_so(self, model: Path, monkeypatch):
        def broken(*arguments, **options):
            raise RuntimeError("two\nlines")

        monkeypatch.setattr("linearize.inspection.inspect_config", broken)
        message = error_line(call("inspect", model), status=1)
        assert message == "unexpected RuntimeError: two lines; add --debug for the traceback"
        assert "Traceback" in call("inspect", model, "--debug").stderr

    def test_interrupted(self, model: Path, monkeypatch):
        def interrupted(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr("linearize.inspection.inspect_config", interrupted)
        result = call("inspect", model)
        assert result.exit_code == 130
        assert result.stderr.startswith("interrupted")

    def test_as_a_process(self):
        done = process("inspect", "./nowhere")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: model: no folder './nowhere'")
        assert done.stderr.count("\n") == 1


class TestNumbers:
    def test_tokens(self):
        assert parse_tokens("1k, 8K,100,2m", "x") == (1024, 8192, 100, 2 * 1024**2)
        assert [human_tokens(n) for n in (1024, 8192, 100, 2 * 1024**2, 1000)] == ["1k", "8k", "100", "2m", "1000"]
        for wrong in ("", "k", "1.5k", "-1", "1k,,2k", "0"):
            with pytest.raises(LinearizeError, match=r"^x: .* is not a number of tokens >= 1"):
                parse_tokens(wrong, "x")

    def test_bytes(self):
        counts = (0, 999, 1536, 200 * 1024, 5.5 * 1024**3)
        assert [human_bytes(n) for n in counts] == ["0 B", "999 B", "1.5 KiB", "200 KiB", "5.5 GiB"]


def test_doctor_says_what_runs_and_why(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = call("doctor")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    if not torch.cuda.is_available():
        assert "no   Triton kernels on cpu: Triton has no kernels for cpu tensors" in lines
        assert "yes  backend 'auto' on cpu: torch" in lines
    assert all(line.startswith(("yes  ", "no   ")) for line in lines)
