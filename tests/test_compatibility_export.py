"""A folder that is handed on: it loads where linearize is installed, and says what is missing where it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import linearize
from linearize import LinearizeError, export, load, save
from linearize.cli import app
from linearize.models import load_model
from tests.saved_models import CHECK, save_tiny_model
from tests.tiny_models import make_student, make_tokens
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]

PREAMBLE = (
    CHECK
    + """
def error_of(call):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
"""
)
# What a program does with the folder, and what it says.
PROGRAMS = {
    "linearize is imported": (
        """
import linearize
from transformers import AutoModelForCausalLM
check(AutoModelForCausalLM.from_pretrained(folder))
""",
        "same LinearizedQwen3ForCausalLM",
    ),
    "it is not": (
        """
from transformers import AutoModelForCausalLM, AutoTokenizer
assert AutoTokenizer.from_pretrained(folder).decode([4]) != ""
assert "linearize" not in sys.modules
check(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
""",
        "same LinearizedQwen3ForCausalLM",
    ),
    "its code is not trusted": (
        """
from transformers import AutoModelForCausalLM
error_of(lambda: AutoModelForCausalLM.from_pretrained(folder))
""",
        "trust_remote_code=True",
    ),
    "it is not installed": (
        """
import importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "linearize":
            raise ModuleNotFoundError(f"No module named {name.split('.')[0]!r}")
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM
error_of(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
""",
        "ImportError This model's attention is in the Python package linearize, which cannot be imported here (No "
        f"module named 'linearize'). Install linearize {linearize.__version__} or later.",
    ),
    "it is too old": (
        """
import json, pathlib
config = pathlib.Path(folder + "/config.json")
values = json.loads(config.read_text())
values["linearize"] |= {"format": 2, "version": "9.9"}
newer = pathlib.Path(folder + "/newer")
newer.mkdir()
(newer / "config.json").write_text(json.dumps(values))
(newer / "linearize_student.py").write_text(pathlib.Path(folder + "/linearize_student.py").read_text())
from transformers import AutoModelForCausalLM
error_of(lambda: AutoModelForCausalLM.from_pretrained(newer, trust_remote_code=True))
""",
        f"LinearizeError config.json: format 2 of the conversion is not the 1 that linearize {linearize.__version__} "
        "reads; it was written by linearize 9.9, install that one",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(stdout, stderr) of the programs above, run side by side: most of it is the import of transformers."""
    folder = tmp_path_factory.mktemp("exported")
    student = make_student("qwen3", "gate")
    export(student, folder, tiny_tokenizer())
    with torch.no_grad():
        torch.save((make_tokens(2, 30), student(make_tokens(2, 30)).logits), folder / "expected.pt")
    own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + program, str(folder)],
            cwd=folder,
            env=os.environ | own | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))},
            text=True,
            stdin=subprocess.DEVNULL,  # nobody is there to say whether the code may run
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name, (program, _) in PROGRAMS.items()
    }
    return {name: process.communicate(timeout=120) for name, process in running.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_another_process(name, finished):
    out, err = finished[name]
    assert PROGRAMS[name][1] in out, err


def test_what_is_written(tmp_path):
    student = make_student("llama", "normalizer", softmax_layers=[1])
    student.config.name_or_path = "some/model"
    export(student, tmp_path)
    names = {"config.json", "generation_config.json", "model.safetensors", "linearize_student.py", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["auto_map"] == {"AutoConfig": "linearize_student.ExportedConfig"}
    assert values["linearize"]["version"] == linearize.__version__
    card = (tmp_path / "README.md").read_text()
    assert "Made from some/model, a `LlamaForCausalLM`" in card
    assert f"| `window` | {student.config.linearize['window']} |" in card
    assert "| `softmax_layers` | [1] |" in card


def test_the_card_names_no_folder(tmp_path):
    """Where the original lay on one machine is of no use on another."""
    student, _ = load_model(save_tiny_model(tmp_path / "original"))
    linearize.convert(student, linearize.LinearizeConfig(window=8, mixer="none"))
    export(student, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Made from a `LlamaForCausalLM`" in card
    assert str(tmp_path) not in card


def test_a_card_of_ones_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    export(make_student("llama", "none"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saved_again(tmp_path):
    """As any student: without the code that an exported folder has, config.json must not ask for it."""
    export(make_student("llama", "gate"), tmp_path / "exported")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    student.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    tokens = make_tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(tokens).logits, student(tokens).logits)


def test_refusals(tmp_path):
    from peft import LoraConfig, get_peft_model

    student = make_student("llama", "gate")
    with pytest.raises(LinearizeError, match="LoRA weights are not merged"):
        export(get_peft_model(student, LoraConfig(target_modules=["q_proj"])), tmp_path)
    assert not list(tmp_path.iterdir())


class TestCommand:
    def run(self, *words):
        return CliRunner().invoke(app, ["export", *map(str, words)])

    def test_an_adapter_with_lora(self, tmp_path):
        from peft import LoraConfig, get_peft_model

        original = save_tiny_model(tmp_path / "original")
        student, tokenizer = load_model(original)
        linearize.convert(student, linearize.LinearizeConfig(window=8, sinks=1))
        lora = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
        save(get_peft_model(student, lora), tmp_path / "adapter", adapter=True, tokenizer=tokenizer)
        done = self.run(tmp_path / "adapter", tmp_path / "out")
        assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out'}\n")
        tokens = make_tokens(1, 30) % len(tokenizer)
        expected, _ = load_model(tmp_path / "adapter", torch.float32)
        exported, same = load_model(tmp_path / "out", torch.float32)
        with torch.no_grad():
            assert torch.equal(exported(tokens).logits, expected(tokens).logits)
        assert same.get_vocab() == tokenizer.get_vocab()

    def test_refusals(self, tmp_path):
        original = save_tiny_model(tmp_path / "original")
        done = self.run(original, tmp_path / "out")
        assert done.exit_code == 2
        assert f"student: {str(original)!r} is not converted; give a student's folder" in done.stderr
        done = self.run(original, original)
        assert done.exit_code == 2
        assert "already holds something" in done.stderr
