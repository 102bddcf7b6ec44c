"""The scaling page: its tables are what `linearize inspect --train` computes, and its commands and keys exist."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from typer.main import get_command
from typer.testing import CliRunner

from linearize.benchmarks import scaling_page
from linearize.benchmarks.numerics_page import renew
from linearize.benchmarks.scaling_page import SHAPES, model_config, tables
from linearize.cli import app
from linearize.distill.recipe import Recipe
from linearize.distill.sharding import wants_sharding

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
LAUNCHES = [line for line in LINES if line.startswith("accelerate")]
FSDP = next(text for kind, text in BLOCKS if kind == "yaml" and "fsdp_config" in text)


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return tables()


def column(table: str, name: str) -> dict[str, float]:
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return {row[0]: float(row[head.index(name)]) for row in rows}


def test_tables_are_those_that_are_computed(found, monkeypatch):
    assert renew(PAGE, found) == PAGE, "run python -m linearize.benchmarks.scaling_page"
    monkeypatch.setitem(SHAPES, "8B", (SHAPES["8B"][0], (*SHAPES["8B"][1][:3], 33, *SHAPES["8B"][1][4:])))
    changed = tables()
    assert changed.keys() == found.keys()
    assert all(changed[name] != found[name] for name in found)


def test_one_cell_by_the_command_itself(found, tmp_path):
    model_config("1.7B").save_pretrained(tmp_path)
    words = ["inspect", str(tmp_path), "--train", "--batch-size", "8", "--processes", "8", "--fsdp", "--json"]
    stages = json.loads(CliRunner().invoke(app, words).stdout)["stages"]
    (total,) = [stage["total"] for stage in stages if stage["checkpointing"]]
    assert column(found["divided"], "LoRA, checkpointing")["1.7B"] == round(total / 2**30, 1)


def test_what_the_prose_says_fits(found):
    room = 80 * 0.95 - 1
    whole, divided = found["whole"], found["divided"]
    assert column(whole, "transfer")["32B"] < room
    lora = column(whole, "LoRA, checkpointing")
    assert lora["14B"] < 80 * 0.8 - 1 < lora["32B"] < room < lora["70B"]
    assert column(whole, "transfer")["70B"] > room > column(divided, "LoRA, checkpointing")["70B"]
    config = scaling_page.training_memory(model_config("32B"), scaling_page.CONFIG, seq_len=1024, batch_size=4)
    (fewer,) = [s.total for s in config.stages if s.stage == "distill, lora" and s.checkpointing]
    assert fewer / 2**30 < lora["32B"] - 4


def test_the_page_has_launch_lines():
    assert len(LAUNCHES) == 4
    assert any(line.startswith("linearize") for line in LINES)


@pytest.mark.parametrize("line", LINES)
def test_commands_and_their_options_exist(line):
    words = shlex.split(line)
    if words[0] == "accelerate":
        known = launch_command_parser().parse_args(words[2:])
        assert words[1] == "launch"
        assert known.module
        assert known.training_script == "linearize"
        words = ["linearize", *known.training_script_args]
    command = get_command(app).commands[words[1]]
    command.make_context(words[1], words[2:])  # reads the words, and runs nothing
    with pytest.raises(Exception, match="No such option"):
        command.make_context(words[1], [*words[2:], "--nowhere"])


@pytest.mark.parametrize("line", LAUNCHES)
def test_launches_ask_for_what_they_say(line, tmp_path, monkeypatch):
    """accelerate's own reading of each line, as on a machine with GPUs."""
    file = tmp_path / "fsdp.yaml"
    file.write_text(FSDP)
    words = [str(file) if word == "fsdp.yaml" else word for word in shlex.split(line)[2:]]
    args = launch_command_parser().parse_args(words)
    args = _validate_launch_command(args)[0]
    environment = prepare_multi_gpu_env(args)
    machines = 2 if "--num_machines 2" in line else 1
    assert int(args.nnodes if machines > 1 else 1) == machines
    assert int(args.nproc_per_node) == 8
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    assert wants_sharding() == ("fsdp.yaml" in line)


def test_the_fsdp_file_is_whole(tmp_path):
    file = tmp_path / "fsdp.yaml"
    file.write_text(FSDP)
    config = load_config_from_file(str(file))
    assert config.fsdp_config == {"fsdp_version": 2}
    assert config.num_processes == 8


def test_recipe_keys_exist():
    (text,) = [text for kind, text in BLOCKS if kind == "yaml" and text != FSDP]
    named = yaml.safe_load(text)
    given = {"name": "page", "model": "m", "data": {"sources": [{"kind": "pydoc"}]} | named.pop("data")} | named
    stage = {
        "budget": {"steps": 1},
        "checkpointing": True,
        "top_k": 8,
        "teacher_cache": "told",
        "checkpoint_minutes": 1,
    }
    recipe = Recipe.from_dict(given | {"stages": [{"distill": stage}]})
    assert recipe.gradient_accumulation == 4
    for key in stage:
        assert key == "budget" or f"`{key}" in PAGE
    known = {option for command in get_command(app).commands.values() for p in command.params for option in p.opts}
    launch = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for option in set(re.findall(r"`(--[\w-]+)", PAGE)):
        assert option in known | launch, option
