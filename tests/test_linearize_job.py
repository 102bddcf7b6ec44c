"""The whole job of a recipe: parts done once, gone on with after a stop, and never mixed up with another run's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from linearize import job, tasks
from linearize.benchmarks.work import Work
from linearize.cli import app
from linearize.distill.recipe import Recipe, dump_recipe, load_recipe
from linearize.errors import LinearizeError
from linearize.job import Job
from linearize.models import load_model
from tests.saved_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
TEXT = "In a small house near the far hill they keep what they saw and forget the rest.\n"
ALL = ["student", "control", "window", "evaluate.json", "bench.json", "report.html"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, a text and a recipe of three steps a stage."""
    folder = tmp_path_factory.mktemp("job")
    save_tiny_model(folder / "original")
    (folder / "text.txt").write_text("\n".join(f"{number}. {TEXT}" for number in range(200)))
    stage: dict[str, Any] = {"budget": {"steps": 3}, "log_every": 1}
    values = {
        "model": str(folder / "original"),
        "convert": {"window": 8, "sinks": 2},
        "data": {"sources": [{"kind": "text", "path": str(folder / "text.txt")}], "seq_len": 64},
        "stages": [{"transfer": stage}, {"distill": stage | {"lora_rank": 2}}],
        "evaluate": {
            **{"tokens": 256, "contexts": [64], "needle_lengths": [100], "needle_depths": [0.5]},
            **{"recall_lengths": [100]},
            **{"kl_tokens": 64, "answers": 1, "answer_tokens": 4, "window": True},
        },
        "bench": {"contexts": [16], "decode_tokens": 2, "repeats": 1, "modes": ["dynamic", "static"]},
        "dtype": "float32",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


def run(place: Path, out: Path, *settings: str, command: str = "run") -> Result:
    words = [command, str(place / "recipe.yaml"), "--out", str(out)]
    return CliRunner().invoke(app, [*words, *(word for setting in settings for word in ("--set", setting))])


def recipe(place: Path, *settings: str) -> Recipe:
    return load_recipe(place / "recipe.yaml", settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, "float32", "cpu")[0].state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, Result]:
    out = place / "finished"
    return out, run(place, out)


class TestRun:
    def test_makes_everything(self, finished: tuple[Path, Result]):
        out, result = finished
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-len(ALL) :] == [str(out / name) for name in ALL]
        for name in ALL:
            assert (out / name).exists()
        assert not (out / "control.partial").exists()
        for name in ("control", "window"):
            found = sorted(path.name for path in (out / name).iterdir())
            assert found == ["adapter_config.json", "adapter_model.safetensors"]
        stages = [json.loads(line)["stage"] for line in (out / "train.jsonl").read_text().splitlines()]
        assert stages == ["transfer"] * 3 + ["distill"] * 3 + ["control"] * 3 + ["window"] * 3

    def test_says_what_each_stage_did(self, finished: tuple[Path, Result]):
        lines = finished[1].stderr.splitlines()
        for stage in ("transfer", "distill", "control", "window"):
            assert any(line.startswith(f"{stage}: 3 steps, 192 tokens in ") for line in lines)
        assert sum(line.startswith("  layer.") for line in lines) == 2

    def test_compares_all_rows(self, finished: tuple[Path, Result]):
        found = json.loads((finished[0] / "evaluate.json").read_text())
        rows = found["perplexity"]["rows"]
        assert list(rows) == [
            "original",
            "control",
            "window + sinks",
            "window + sinks, trained",
            "student",
            "student, state off",
            "student, window off",
        ]
        assert len({row["ppl"] for row in rows.values()}) == len(rows)  # each is another model
        assert json.loads((finished[0] / "bench.json").read_text())["rows"] == ["original", "student"]

    def test_the_original_row_is_the_original(self, place: Path, finished: tuple[Path, Result], tmp_path: Path):
        out = tmp_path / "alone.json"
        held_out = tmp_path / "held_out.txt"
        tokenizer = load_model(place / "original", "float32", "cpu")[1]
        held_out.write_text(
            tokenizer.decode(Job(recipe(place), finished[0])._texts["held-out"], skip_special_tokens=True)
        )
        words = ["evaluate", str(place / "original"), "--text", str(held_out), "--out", str(out), "--contexts", "64"]
        options = ["--tokens", "256", "--needle", "none", "--dtype", "float32"]
        assert CliRunner().invoke(app, [*words, *options]).exit_code == 0
        alone = json.loads(out.read_text())["perplexity"]["rows"]["original"]["ppl"]
        rows = json.loads((finished[0] / "evaluate.json").read_text())["perplexity"]["rows"]
        assert rows["original"]["ppl"] == pytest.approx(alone, rel=1e-6)

    def test_a_second_call_repeats_nothing(self, place: Path, finished: tuple[Path, Result]):
        out = finished[0]
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
        result = run(place, out)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("done before") == 5
        after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
        assert {path.name for path in after if after[path] != before.get(path)} == {"report.html"}

    def test_another_recipe_in_the_same_folder(self, place: Path, finished: tuple[Path, Result]):
        result = run(place, finished[0], "stages.1.distill.lr=0.5")
        assert result.exit_code == 2
        assert result.stderr == (
            f"error: out: '{finished[0]}' holds the run of another recipe (stages[1].distill.lr is 0.0002 there and "
            "0.5 here); give another --out, or the same recipe to go on\n"
        )

    def test_distill_makes_the_student_and_run_goes_on(self, place: Path, tmp_path: Path, finished):
        out = tmp_path / "out"
        settings = ("evaluate.control=false", "evaluate.window=false")
        result = run(place, out, *settings, command="distill")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{out / 'student'}\n"
        assert not (out / "evaluate.json").exists()
        assert same(weights(out / "student"), weights(finished[0] / "student"))
        result = run(place, out, *settings)
        assert result.exit_code == 0, result.output
        assert "[1/4] student: done before" in result.stderr
        assert not (out / "control").exists()
        assert not (out / "window").exists()


class TestGoingOn:
    def test_inside_of_the_evaluation(self, place: Path, tmp_path: Path, finished, monkeypatch):
        """What was measured of some rows is not measured again."""
        out, measured = tmp_path / "out", []
        write = Work.write

        def kept(self, row, measurement, settings, found):
            write(self, row, measurement, settings, found)
            measured.append((row, measurement))
            if row == "window + sinks":
                raise KeyboardInterrupt

        monkeypatch.setattr(Work, "write", kept)
        assert run(place, out).exit_code == 130
        monkeypatch.setattr(Work, "write", lambda self, *args: (write(self, *args), measured.append(args[:2])))
        assert run(place, out).exit_code == 0
        assert len(set(measured)) == len(measured) > 7
        mine, whole = (json.loads((folder / "evaluate.json").read_text()) for folder in (out, finished[0]))
        assert mine["perplexity"]["rows"] == whole["perplexity"]["rows"]

    @pytest.mark.parametrize("part", ["control", "window", "evaluate", "bench"])
    def test_after_a_stop_between_parts(self, place: Path, tmp_path: Path, finished, monkeypatch, part: str):
        def stop(self):
            raise KeyboardInterrupt

        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(Job, f"_{part}", stop)
            result = run(place, out)
            assert result.exit_code == 130
            assert "the same command goes on from here" in result.stderr
        assert run(place, out).exit_code == 0
        for name in ("evaluate.json",):
            mine, whole = (json.loads((folder / name).read_text()) for folder in (out, finished[0]))
            assert mine["perplexity"] == whole["perplexity"]

    def test_a_stage_that_was_killed(self, place: Path, tmp_path: Path, finished):
        """SIGKILL while the second stage runs; the student is then the one of a run that was not killed."""
        out = tmp_path / "out"
        settings = ["--set", "stages.0.transfer.checkpoint_minutes=1e-9", "--set", "stages.1.distill.budget.steps=60"]
        settings += ["--set", "stages.1.distill.checkpoint_minutes=1e-9"]
        words = [sys.executable, "-m", "linearize", "distill", str(place / "recipe.yaml"), *settings, "--out"]
        killed = subprocess.Popen([*words, str(out)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        while not list(out.glob("checkpoints/distill/step-*")):
            assert killed.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        assert "student" not in json.loads((out / "progress.json").read_text())["done"]

        chosen = [word for word in settings if word != "--set"]
        assert run(place, out, *chosen, command="distill").exit_code == 0
        assert run(place, tmp_path / "whole", *chosen, command="distill").exit_code == 0
        assert same(weights(out / "student"), weights(tmp_path / "whole" / "student"))

    def test_the_dtype_is_chosen_once(self, place: Path, tmp_path: Path, monkeypatch):
        out = tmp_path / "out"
        answers = iter([(torch.bfloat16, "first"), (torch.float32, "second")])
        monkeypatch.setattr(job, "resolve_dtype", lambda name: next(answers))
        settings = ("dtype=auto", "evaluate.control=false", "evaluate.window=false")
        assert run(place, out, *settings, command="distill").exit_code == 0
        assert run(place, out, *settings).exit_code == 0
        assert json.loads((out / "bench.json").read_text())["dtypes"]["student"] == "bfloat16"


class TestGoingOnWithChanges:
    def stopped_in_distill(self, place: Path, out: Path, monkeypatch) -> tuple[str, ...]:
        """A run whose second stage ended with an error; returns its settings."""

        def stop(*args, **named):
            raise LinearizeError("distill: the loss diverges")

        settings = ("evaluate.control=false", "evaluate.window=false")
        with monkeypatch.context() as patch:
            patch.setattr(job, "run_distill", stop)
            assert run(place, out, *settings, command="distill").exit_code == 2
        return settings

    def test_an_unfinished_stage_takes_another_lr(self, place: Path, tmp_path: Path, monkeypatch):
        """What a loss that diverges asks for: the same folder, a lower lr, from the last checkpoint."""
        out = tmp_path / "out"

        settings = self.stopped_in_distill(place, out, monkeypatch)
        refused = run(place, out, *settings, "stages.0.transfer.lr=1e-5", command="distill")  # that stage is over
        assert "(stages[0].transfer.lr is 0.02 there and 1e-05 here)" in refused.stderr
        refused = run(place, out, *settings, "stages.1.distill.lora_rank=3", command="distill")
        assert "(stages[1].distill.lora_rank is 2 there and 3 here)" in refused.stderr
        result = run(place, out, *settings, "stages.1.distill.lr=1e-5", command="distill")
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        assert 0 < max(line["lr"] for line in lines if line["stage"] == "distill") <= 1e-5
        progress = json.loads((out / "progress.json").read_text())
        assert progress["changed"] == [
            {"what": "stages[1].distill.lr is 0.0002 there and 1e-05 here", "after": {"transfer": 3}}
        ]
        assert yaml.safe_load((out / "recipe.yaml").read_text())["stages"][1]["distill"]["lr"] == 1e-5
        refused = run(place, out, *settings, "stages.1.distill.lr=1e-4", command="distill")
        assert "(stages[1].distill.lr is 1e-05 there and 0.0001 here)" in refused.stderr

    def test_other_processes_share_a_step(self, place: Path, tmp_path: Path, monkeypatch):
        """Half as many processes with twice the accumulation is the same training, and nothing else is."""
        out = tmp_path / "out"

        settings = self.stopped_in_distill(place, out, monkeypatch)
        progress = json.loads((out / "progress.json").read_text())
        assert progress["processes"] == 1
        (out / "progress.json").write_text(json.dumps(progress | {"processes": 2}))
        refused = run(place, out, *settings, "gradient_accumulation=3", command="distill")
        assert "(gradient_accumulation is 1 there and 3 here)" in refused.stderr
        result = run(place, out, *settings, "gradient_accumulation=2", command="distill")
        assert result.exit_code == 0, result.output
        progress = json.loads((out / "progress.json").read_text())
        assert (progress["processes"], progress["recipe"]["gradient_accumulation"]) == (1, 2)
        lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        assert [line["tokens"] for line in lines if line["stage"] == "distill"] == [128, 256, 384]

    @pytest.mark.parametrize("file", ["adapter.safetensors", "adapter_model.safetensors", "linearize.json.partial"])
    def test_a_full_disk_while_the_student_is_saved(
        self, place: Path, tmp_path: Path, finished, monkeypatch, file: str
    ):
        import peft.peft_model
        import safetensors.torch

        from linearize import checkpoint

        out = tmp_path / "out"
        save, write = safetensors.torch.save_file, Path.write_text

        def save_file(tensors, path, **named):
            if Path(path).name == file:
                Path(path).write_bytes(b"half")
                raise OSError(28, "No space left on device")
            save(tensors, path, **named)

        def write_text(path, text, **named):
            if path.name == file:
                write(path, text[:9], **named)
                raise OSError(28, "No space left on device")
            return write(path, text, **named)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", save_file)
            patch.setattr(peft.peft_model, "safe_save_file", save_file)
            patch.setattr(Path, "write_text", write_text)
            result = run(place, out, command="distill")
        assert result.exit_code == 2, result.output
        message = result.stderr.splitlines()[-1]
        assert message.startswith(f"error: {out}/student: cannot be written (No space left on device); it needs ")
        assert "free; make room, then the same command goes on" in message
        assert not (out / "student").exists()
        assert not (out / "student.partial").exists()
        assert run(place, out, command="distill").exit_code == 0
        assert same(weights(out / "student"), weights(finished[0] / "student"))


class TestOtherRecipes:
    def test_chosen_parameters_make_a_whole_student(self, place: Path, tmp_path: Path):
        train = "stages.1.distill.train=['*.o_proj.weight']"
        settings = (train, "evaluate.control=false", "evaluate.window=false")
        result = run(place, tmp_path / "out", *settings)
        assert result.exit_code == 0, result.output
        student = weights(tmp_path / "out" / "student")
        original = weights(place / "original")
        name = "model.layers.0.self_attn.{}.weight"
        assert not torch.equal(student[name.format("o_proj")], original[name.format("o_proj")])
        assert torch.equal(student[name.format("q_proj")], original[name.format("q_proj")])
        rows = json.loads((tmp_path / "out" / "evaluate.json").read_text())["perplexity"]["rows"]
        assert rows["window + sinks"]["ppl"] != rows["student, state off"]["ppl"]

    def test_no_stage_and_no_state(self, place: Path, tmp_path: Path):
        result = run(place, tmp_path / "out", "stages=[]", "convert.mixer=none")
        assert result.exit_code == 0, result.output
        rows = json.loads((tmp_path / "out" / "evaluate.json").read_text())["perplexity"]["rows"]
        assert list(rows) == ["original", "window + sinks", "student"]
        assert rows["student"]["ppl"] == rows["window + sinks"]["ppl"]

    def test_distill_twice_and_a_generated_source(self, place: Path, tmp_path: Path):
        stage = "{distill: {budget: {steps: 1}, lora_rank: 2, log_every: 1}}"
        generated = "{kind: generated, tokens: 200}"
        text = "{kind: text, path: '" + str(place / "text.txt") + "'}"
        result = run(place, tmp_path / "out", f"stages=[{stage}, {stage}]", f"data.sources=[{generated}, {text}]")
        assert result.exit_code == 0, result.output
        lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
        stages = [json.loads(line)["stage"] for line in lines]
        assert stages == [f"{name}{more}" for name in ("distill", "control", "window") for more in ("", "-2")]
        assert list((tmp_path / "out" / "texts").iterdir())


@pytest.fixture(scope="module")
def whole(finished: tuple[Path, Result], tmp_path_factory) -> Path:
    """A whole student whose weights are not the original's."""
    folder = tmp_path_factory.mktemp("given") / "whole"
    model, tokenizer = load_model(finished[0] / "student", "float32", "cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestGivenStudent:
    """`student: FOLDER`: one that exists is measured and reported, and nothing is trained."""

    @staticmethod
    def run(place: Path, out: Path, student: Path, *settings: str) -> Result:
        values = yaml.safe_load((place / "recipe.yaml").read_text())
        values |= {"student": str(student), "stages": []}
        del values["convert"]
        (out.parent / "given.yaml").write_text(yaml.safe_dump(values))
        words = ["run", str(out.parent / "given.yaml"), "--out", str(out)]
        return CliRunner().invoke(app, [*words, *(word for setting in settings for word in ("--set", setting))])

    def test_an_adapter(self, place: Path, finished: tuple[Path, Result], tmp_path: Path):
        made, out = finished[0], tmp_path / "out"
        result = self.run(place, out, made / "student")
        assert result.exit_code == 0, result.output
        names = ["student", "evaluate.json", "bench.json", "report.html"]
        assert result.stdout.splitlines()[-4:] == [str(out / name) for name in names]
        files, copied = (
            {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for folder in (made / "student", out / "student")
        )
        assert files == copied
        assert not (out / "train.jsonl").exists()
        found, there = (json.loads((folder / "evaluate.json").read_text()) for folder in (out, made))
        rows = found["perplexity"]["rows"]
        assert list(rows) == ["original", "window + sinks", "student", "student, state off", "student, window off"]
        assert rows == {row: there["perplexity"]["rows"][row] for row in rows}
        assert found["tokens_seen"]["student"] == there["tokens_seen"]["student"] == 2 * 192
        assert json.loads((out / "bench.json").read_text())["rows"] == ["original", "student"]
        assert "convert" not in yaml.safe_load((out / "recipe.yaml").read_text())

    def test_a_whole_student_and_its_original(self, place: Path, whole: Path, finished, tmp_path: Path):
        result = self.run(place, tmp_path / "out", whole, "bench.control=true")
        assert result.exit_code == 0, result.output
        rows, there = (
            json.loads((folder / "evaluate.json").read_text())["perplexity"]["rows"]
            for folder in (tmp_path / "out", finished[0])
        )
        for row in ("original", "window + sinks", "student"):
            assert rows[row]["ppl"] == pytest.approx(there[row]["ppl"], rel=1e-4)
        bench = json.loads((tmp_path / "out" / "bench.json").read_text())
        assert bench["rows"] == ["original", "original again", "student"]

    def test_goes_on_without_the_folder_it_was_copied_from(self, place: Path, whole: Path, tmp_path: Path, monkeypatch):
        moved, out = tmp_path / "moved", tmp_path / "out"
        whole.rename(moved)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Job, "_evaluate", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
                assert self.run(place, out, moved).exit_code == 130
        finally:
            moved.rename(whole)
        result = self.run(place, out, moved)
        assert result.exit_code == 0, result.output
        assert "[1/4] student: done before" in result.stderr

    def test_an_adapter_of_another_original(self, place: Path, finished, tmp_path: Path):
        torch.manual_seed(1)
        model, tokenizer = load_model(place / "original", "float32", "cpu")
        for parameter in model.parameters():
            parameter.data.normal_()
        model.save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        result = self.run(place, tmp_path / "out", finished[0] / "student", f"model={tmp_path / 'other'}")
        assert result.exit_code == 2
        assert "sampled weights are not those of the original" in result.stderr
        assert not (tmp_path / "out" / "student").exists()

    @pytest.mark.parametrize(
        ("given", "settings", "message"),
        [
            ("nowhere", [], "student: no folder"),
            ("original", [], "holds an original, no student; give a student's folder, or leave student out"),
            ("finished", [], "holds a run, not a model; did you mean"),
            ("empty", [], "has neither a config.json"),
            ("student", ["stages=[{distill: {budget: {steps: 1}}}]"], "stages: distill beside student"),
            ("student", ["convert.window=16"], "convert: given beside student"),
            ("whole", ["model=larger"], "'layers': 2, 'vocabulary': 100}; give the original that it was made of"),
        ],
    )
    def test_refusals(
        self, place: Path, finished, whole: Path, tmp_path: Path, given: str, settings: list[str], message: str
    ):
        (tmp_path / "empty").mkdir()
        save_tiny_model(tmp_path / "larger", num_hidden_layers=3)
        settings = [setting.replace("larger", str(tmp_path / "larger")) for setting in settings]
        folders = {"student": finished[0] / "student", "whole": whole, "empty": tmp_path / "empty"}
        result = self.run(place, tmp_path / "out", folders.get(given, place / given), *settings)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_a_run_inside_of_the_student(self, place: Path, whole: Path):
        with pytest.raises(LinearizeError, match="lies inside the student's folder"):
            Job(recipe(place, "stages=[]", "convert={}", f"student={whole}"), whole / "out")
        assert not (whole / "out").exists()


class TestSeveralProcesses:
    """`accelerate launch`, whose processes train together; the first one does the rest."""

    @staticmethod
    def launched(place: Path, out: Path, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "accelerate.commands.launch", *words, "--num_processes", "2"]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0", "-m", "linearize"]
        command += ["run", str(place / "recipe.yaml"), "--out", str(out)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)

    @pytest.mark.slow
    def test_a_whole_job(self, place: Path, tmp_path: Path):
        out = tmp_path / "two"
        result = self.launched(place, out, "--multi_gpu")
        assert result.returncode == 0, result.stderr
        # Process 0 alone spoke.
        assert result.stdout.splitlines()[-len(ALL) :] == [str(out / name) for name in ALL]
        assert result.stdout.count(str(out / "student")) == 1
        assert result.stderr.count("transfer: 3 steps") == 1
        assert run(place, tmp_path / "one", "gradient_accumulation=2").exit_code == 0
        lines, others = (
            [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
            for name in ("one", "two")
        )
        assert [(x["stage"], x["step"], x["tokens"]) for x in lines] == [
            (x["stage"], x["step"], x["tokens"]) for x in others
        ]
        for line, other in zip(lines, others):
            assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
        rows = [
            json.loads((tmp_path / name / "evaluate.json").read_text())["perplexity"]["rows"] for name in ("one", "two")
        ]
        assert rows[0].keys() == rows[1].keys()
        # One process goes on with what two have done.
        assert run(place, out).stderr.count("done before") == len(ALL) - 1

    @pytest.mark.slow
    def test_sharded(self, place: Path, tmp_path: Path):
        out = tmp_path / "two"
        result = self.launched(place, out, "--use_fsdp", "--fsdp_version", "2")
        assert result.returncode == 0, result.stderr
        assert "in one process; the same command without accelerate launch goes on with it" in result.stderr
        assert not (out / "evaluate.json").exists()
        after = run(place, out)
        assert after.exit_code == 0, after.output
        assert (out / "evaluate.json").exists()


def test_a_tracker_by_name(place: Path, tmp_path: Path):
    words = ["distill", str(place / "recipe.yaml"), "--out", str(tmp_path / "out"), "--track", "tensorbored"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: track: 'tensorbored' is unknown; choose from aim, clearml, ")


class TestRefusals:
    """Found before anything is trained or written."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                ["stages.1.distill.train=['*.o_proj.weight']"],
                "evaluate.control: a control row is trained with LoRA only",
            ),
            (["stages.1={transfer: {budget: {steps: 1}}}"], "stages: transfer is listed twice; give it once"),
            (["evaluate.text=[nowhere.txt]"], "text: 'nowhere.txt' is not a file"),
            (["evaluate.choices=[nowhere.jsonl]"], "choices: 'nowhere.jsonl' is not a file"),
            (
                ["evaluate.tokens=99999", "evaluate.contexts=[99999]"],
                "held-out tokens do not fill one sequence of 99999",
            ),
            (["evaluate.needle_lengths=[65]"], "needle_lengths: 65 is too short for the sentence"),
            (["data.held_out=0"], "data.held_out: 0.0 leaves no text to evaluate on"),
            (["data.sources.0.path=nowhere.txt"], "nowhere.txt"),
            (["convert.softmax_layers=[5]"], "softmax_layers: layer 5 is out of range, the model has layers 0 to 1"),
            (["model=./nowhere"], "model: no folder './nowhere'"),
        ],
    )
    def test_mistakes_in_a_recipe(self, place: Path, tmp_path: Path, settings: list[str], message: str):
        out = tmp_path / "out"
        result = run(place, out, *settings)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
        assert not out.exists()

    def test_a_folder_of_something_else(self, place: Path, tmp_path: Path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(LinearizeError, match="holds files of something else; give a new folder"):
            Job(recipe(place), tmp_path)
        with pytest.raises(LinearizeError, match="holds files of something else; give a new folder"):
            Job(recipe(place), tmp_path / "notes.txt")


class TestLongRows:
    """What `extend` asks for is checked before the stages that come first."""

    def stages(self, place: Path, **changes: Any) -> str:
        stages = yaml.safe_load((place / "recipe.yaml").read_text())["stages"]
        stages.append({"extend": {"budget": {"steps": 2}, "seq_len": 128, "segment": 64, "lora_rank": 2} | changes})
        return f"stages={json.dumps(stages)}"

    def test_short_documents(self, place: Path, tmp_path: Path):
        chats = tmp_path / "chats.jsonl"
        chats.write_text("".join(json.dumps({"text": f"{n} is a short one."}) + "\n" for n in range(60)))
        settings = ["data.sources.0.kind=jsonl", f"data.sources.0.path={chats}", self.stages(place)]
        with pytest.raises(LinearizeError, match=r"no document of jsonl .* has 64 tokens .* rows of up to 128"):
            Job(recipe(place, *settings), tmp_path / "run").run(["student"])
        assert not (tmp_path / "run" / "train.jsonl").exists()

    def test_too_many_positions(self, place: Path, tmp_path: Path):
        settings = [self.stages(place), "stages.0.transfer.positions=10000000"]
        with pytest.raises(LinearizeError, match=r"transfer\.positions: 10000000, and the model knows"):
            Job(recipe(place, *settings), tmp_path / "run").run(["student"])
        assert not (tmp_path / "run" / "train.jsonl").exists()

    def test_rows_are_full(self, place: Path, tmp_path: Path):
        Job(recipe(place, self.stages(place)), tmp_path / "run").run(["student"])
        lines = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
        assert [x["tokens"] for x in lines if x.get("stage") == "extend"][-1] == 2 * 128


def test_unknown_part(tmp_path: Path):
    with pytest.raises(
        LinearizeError, match="parts: 'studnt' is unknown; choose from student, control, window, evaluate"
    ):
        Job(load_recipe("demo"), str(tmp_path)).run(["studnt"])


class TestTextOfARun:
    def test_a_students_held_out_text_is_its_runs(self, tmp_path: Path):
        dump_recipe(load_recipe("demo", ["data.held_out=0.3", "seed=5"]), tmp_path / "recipe.yaml")
        (tmp_path / "student").mkdir()
        data, seed = tasks._data(str(tmp_path / "student"), 1)
        assert (data.held_out, seed) == (0.3, 5)

    def test_any_other_models_is_pythons_documentation(self, tmp_path: Path):
        assert tasks._data(str(tmp_path), 1) == (tasks.DEFAULT_DATA, 1)
