"""What identifies a row: the same row is known again in another comparison."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linearize import LinearizeConfig, LinearizeError, convert
from linearize.also import also_rows, row_identities, tokens_seen
from linearize.benchmarks.work import Measured, Work
from linearize.distill.checkpoints import latest, load_trained
from linearize.distill.recipe import Recipe
from linearize.job import Job
from linearize.models import load_model
from tests.saved_models import save_tiny_model
from tests.tiny_models import make_model, make_tokens


def put(folder: Path, file: str, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / file).write_text(text)
    return folder


def test_rows_of_another_run_are_known_again(tmp_path: Path):
    """A control does not depend on the student that it stands beside; a student as another's row is that student."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, window in zip(runs, (8, 16)):
        put(run / "student", "linearize.json", f"window {window}")
        put(run / "control", "adapter_config.json", "the same")
        put(run / "window", "adapter_config.json", "the same")
    names = ["original", "control", "window + sinks, trained", "student"]
    one, two = (
        row_identities(
            names,
            convert(make_model("llama"), LinearizeConfig(window=window)),
            "original",
            str(run / "student"),
            run,
            [],
        )
        for run, window in zip(runs, (8, 16))
    )
    assert one["control"] == two["control"]
    assert one["window + sinks, trained"] != two["window + sinks, trained"]
    assert one["student"] != two["student"]
    also = [f"first={runs[0] / 'student'}", f"its control={runs[0] / 'control'}"]
    model = convert(make_model("llama"), LinearizeConfig(window=16))
    seen = row_identities(["student", "first", "its control"], model, "original", str(runs[1] / "student"), None, also)
    assert seen == {"student": two["student"], "first": one["student"], "its control": one["control"]}
    # And what was measured is found under the other name.
    measured = Measured({"nll": 1.0}, 2.0)
    Work(tmp_path / "work", one).write("student", "perplexity", {}, measured)
    assert Work(tmp_path / "work", seen).read("first", "perplexity", {}) == measured
    assert Work(tmp_path / "work", seen).read("student", "perplexity", {}) is None


def test_a_home_folder_is_found_and_a_missing_one_has_no_digest(tmp_path: Path, monkeypatch) -> None:
    """The digest of a folder that is not there would be that of any other."""
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "control", "adapter_config.json", "mine")
    model = convert(make_model("llama"), LinearizeConfig(window=8))
    named = [row_identities(["x"], model, "original", "no", None, [f"x={at}/control"]) for at in ("~", tmp_path)]
    assert named[0] == named[1]
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        row_identities(["x"], model, "original", "no", None, ["x=~/nowhere"])


class TestCheckpoints:
    """RUN/checkpoints/STAGE is the student as it was after that stage."""

    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("also")
        save_tiny_model(folder / "original")
        (folder / "text.txt").write_text("\n".join(f"{number}. They keep what they saw.\n" for number in range(300)))
        stage = {"budget": {"steps": 2}, "lr": 0.05}
        values = {
            "name": "run",
            "model": str(folder / "original"),
            "convert": {"window": 8, "sinks": 2},
            "data": {"sources": [{"kind": "text", "path": str(folder / "text.txt")}], "seq_len": 64},
            "stages": [{"transfer": stage}, *([{"distill": stage | {"lora_rank": 2}}] * 2)],
            "dtype": "float32",
        }
        Job(Recipe.from_dict(values), folder / "run").run(["student"])
        return folder / "run"

    def logits(self, folder: Path, base: Path) -> torch.Tensor:
        (enter,) = also_rows([f"row={folder}"], [], str(base), torch.float32, "cpu").values()
        with enter() as model, torch.no_grad():
            return model(input_ids=make_tokens(1, 64) % 40).logits

    def test_each_stage(self, run: Path) -> None:
        base = run.parent / "original"
        student = self.logits(run / "student", base)
        after = {
            stage: self.logits(run / "checkpoints" / stage, base) for stage in ("transfer", "distill", "distill-2")
        }
        assert torch.equal(after["distill-2"], student)
        assert not torch.allclose(after["distill"], student, atol=1e-3)
        # After transfer there was no LoRA: the original's weights and the mixers of that moment.
        model, _ = load_model(str(base), torch.float32, "cpu")
        convert(model, LinearizeConfig(window=8, sinks=2))
        [weights] = (run / "checkpoints/transfer").glob("*/weights.safetensors")
        assert not model.load_state_dict(load_file(weights), strict=False).unexpected_keys
        with torch.no_grad():
            expected = model.eval()(input_ids=make_tokens(1, 64) % 40).logits
        torch.testing.assert_close(after["transfer"], expected)

    def test_tokens_are_those_up_to_the_stage(self, run: Path) -> None:
        also = [f"{stage}={run / 'checkpoints' / stage}" for stage in ("transfer", "distill", "distill-2")]
        found = tokens_seen(["transfer", "distill", "distill-2"], None, also)
        assert found == {"transfer": 128, "distill": 256, "distill-2": 384}

    def test_a_stage_that_left_the_mixers_alone(self, run: Path, tmp_path: Path) -> None:
        shutil.copytree(run, tmp_path / "run")
        [path] = (tmp_path / "run/checkpoints/distill").glob("*/weights.safetensors")
        save_file({name: x for name, x in load_file(path).items() if ".lora_" in name}, path)
        with pytest.raises(LinearizeError, match="its stage left mixers or mixes as they were"):
            self.logits(tmp_path / "run/checkpoints/distill", run.parent / "original")

    @pytest.mark.parametrize("stage", ["control", "window-extend"])
    def test_of_what_is_no_student(self, run: Path, tmp_path: Path, stage: str) -> None:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run/checkpoints" / stage).symlink_to(run / "checkpoints/distill")
        role = stage.partition("-")[0]
        with pytest.raises(LinearizeError, match=rf"{stage}' is no stage of the student; give '.*run/{role}'"):
            also_rows([f"row={tmp_path / 'run/checkpoints' / stage}"], [], None, torch.float32, "cpu")

    def test_of_another_student(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").symlink_to(run / "checkpoints")
        stage = tmp_path / "run" / "checkpoints" / "transfer"
        with pytest.raises(LinearizeError, match=r"are of '.*run/student', which is not there"):
            also_rows([f"row={stage}"], [], None, torch.float32, "cpu")
        other = convert(make_model("llama", num_hidden_layers=1), LinearizeConfig(window=8, feature_dim=8))
        with pytest.raises(LinearizeError, match=r"the student beside it has no model.layers.0.self_attn.m.* of \["):
            load_trained(latest(stage), other)
