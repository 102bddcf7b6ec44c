"""Recipes: presets, round trips, overrides, and a page of mistakes with the messages that users see."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from linearize.config import LinearizeConfig
from linearize.distill import options as option_records
from linearize.distill.recipe import (
    Budget,
    DataOptions,
    DistillOptions,
    EvaluateOptions,
    Recipe,
    Source,
    TransferOptions,
    dump_recipe,
    load_recipe,
    preset_names,
)
from linearize.errors import LinearizeError

ROOT = Path(__file__).resolve().parents[1]
# What the presets leave to the user.
TEXTS = ["model=m", "data.sources.0.path=texts/*.txt"]
FILL_IN = {
    "demo": [],
    "default": TEXTS,
    "decomposed": TEXTS,
    "liger": ["model=m"],
    "lolcats": ["model=m"],
    "window-only": ["model=m"],
}


def test_presets_are_the_files_in_the_folder():
    assert preset_names() == sorted(path.stem for path in (ROOT / "distill" / "recipes").glob("*.yaml"))
    assert preset_names() == sorted(FILL_IN)


@pytest.mark.parametrize("name", FILL_IN)
def test_preset_round_trip(name, tmp_path):
    recipe = load_recipe(name, FILL_IN[name])
    assert recipe.name == name
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    dump_recipe(recipe, tmp_path / "copy.yaml")
    assert load_recipe(tmp_path / "copy.yaml") == recipe
    assert load_recipe(str(tmp_path / "copy.yaml")) == recipe


def test_round_trip_of_every_kind_of_value(tmp_path):
    recipe = Recipe(
        name="r",
        model="m",
        convert=LinearizeConfig(softmax_layers=(1, 3)),
        data=DataOptions(
            sources=(
                Source(kind="generated", tokens=7, prompt="Once"),
                Source(kind="dataset", path="some/set", name="en", field="body", weight=0.5),
            )
        ),
        stages=(
            ("transfer", TransferOptions(budget=Budget(tokens=10, minutes=0.5), objective="output")),
            ("distill", DistillOptions(budget=Budget(steps=3), train=("*.gate", "*.q_proj.*"), top_k=50)),
        ),
        evaluate=EvaluateOptions(needle_lengths=(), control=False),
    )
    dump_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_demo_is_the_small_model_in_minutes():
    demo = load_recipe("demo")
    assert demo.model.startswith("package://")
    assert [name for name, _ in demo.stages] == ["transfer", "distill"]
    assert all(options.budget.minutes for _, options in demo.stages)
    assert demo.convert.softmax_layers == "none"


def test_presets_are_found_from_another_folder(tmp_path):
    code = "from linearize.distill.recipe import load_recipe; print(load_recipe('demo').convert.window)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(load_recipe("demo").convert.window), done.stderr


def test_reading_a_recipe_loads_nothing_heavy():
    code = (
        "import sys; from linearize.distill.recipe import load_recipe; load_recipe('demo'); "
        "print([name for name in ('torch', 'transformers', 'fla', 'datasets') if name in sys.modules])"
    )
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_overrides():
    recipe = load_recipe(
        "demo",
        [
            "stages.0.transfer.budget.minutes=1",
            "stages[1].distill.lr=1e-3",
            "stages.1.distill.budget={steps: 4}",
            "evaluate.needle_lengths=[64, 128]",
            "convert.softmax_layers=every:4",
            "data.sources.0={kind: text, path: a=b.txt}",
            "seed=1e3",
        ],
    )
    (_, transfer), (_, distill) = recipe.stages
    assert transfer.budget == Budget(minutes=1)
    assert isinstance(transfer.budget.minutes, float)
    assert distill.lr == 1e-3
    assert distill.budget == Budget(steps=4)
    assert recipe.evaluate.needle_lengths == (64, 128)
    assert recipe.convert.softmax_layers == "every:4"
    assert recipe.data.sources[0].path == "a=b.txt"
    assert recipe.seed == 1000


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("'1e-3'", 1e-3), ("1.0e-3", 1e-3), ("1", 1.0), (".5", 0.5)],
)
def test_numbers_as_people_write_them(text, number):
    _, options = load_recipe("demo", [f"stages.0.transfer.lr={text}"]).stages[0]
    assert options.lr == number
    assert isinstance(options.lr, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.transfer.objectiv=x", "stages[0].transfer.objectiv: unknown key, did you mean 'objective'?"),
        ("stage=[]", "stage: unknown key, did you mean 'stages'?"),
        ("convert.windo=3", "convert.windo: unknown key, did you mean 'window'?"),
        ("convert.window=0", "convert.window: 0 is not an integer >= 1"),
        ("data.sources.0.weigth=2", "data.sources[0].weigth: unknown key, did you mean 'weight'?"),
        ("data.sources.0.weight=0", "data.sources[0].weight: 0 is out of range; give a value above 0"),
        ("data.sources.0.kind=txt", "data.sources[0].kind: 'txt' is unknown, did you mean 'text'?"),
        ("data.sources.0.kind=jsonl", "data.sources[0].path: nothing is given; kind 'jsonl' needs a file or a glob"),
        ("data.sources.0.tokens=5", "data.sources[0].tokens: kind 'pydoc' does not read it (generated can)"),
        ("data.sources.0=pydoc", "data.sources[0]: 'pydoc' is not a map of settings; known settings: kind, weight"),
        ("data.sources=[]", "data.sources: the list is empty; name at least one"),
        ("data.sources=pydoc", "data.sources: 'pydoc' is not a list"),
        ("data.seq_len=true", "data.seq_len: True is not an integer"),
        ("data.seq_len=1", "data.seq_len: 1 is out of range; give a value at least 2"),
        ("data.held_out=1", "data.held_out: 1 is out of range; give a value at least 0 and below 1"),
        ("data.packing=pack", "data.packing: 'pack' is unknown, did you mean 'packed'? (known: packed, document)"),
        ("stages.0.transfer.lr=-1", "stages[0].transfer.lr: -1 is out of range; give a value above 0"),
        ("stages.0.transfer.lr=.nan", "stages[0].transfer.lr: nan is not a number"),
        ("stages.0.transfer.lr=fast", "stages[0].transfer.lr: 'fast' is not a number"),
        ("stages.0.transfer.log_every=1.5", "stages[0].transfer.log_every: 1.5 is not an integer"),
        ("stages.0.transfer.budget={}", "stages[0].transfer.budget: no limit is given; name at least one of tokens"),
        ("stages.0.transfer.budget=null", "stages[0].transfer.budget: nothing is given; say when the stage ends"),
        ("stages.0.distill.lr=1", "stages[0]: a list entry is one stage, got transfer and distill"),
        ("stages=[{transfr: {}}]", "stages[0].transfr: unknown key, did you mean 'transfer'?"),
        ("stages.1.distill.kl_weight=0", "stages[1].distill.kl_weight: 0, and ce_weight is 0 too"),
        ("stages.1.distill.train=all", "stages[1].distill.train: 'all' is unknown; known: lora; or write a list"),
        ("stages.1.distill.train=[]", "stages[1].distill.train: the list is empty"),
        ("stages.1.distill.lora_targets=[1]", "stages[1].distill.lora_targets[0]: 1 is not a text"),
        ("convert.mixer=none", "stages[0]: transfer teaches the state, and convert.mixer 'none' has no state"),
        (
            "stages=[{distill: {budget: {steps: 1}}}, {transfer: {budget: {steps: 1}}}]",
            "stages[1]: transfer after an end-to-end stage would learn from the trained weights",
        ),
        ("evaluate.needle_depths=[0.5, 2]", "evaluate.needle_depths[1]: 2 is out of range"),
        ("evaluate.tokens=100", "evaluate.tokens: 100 is less than one sequence of 1024"),
        ("evaluate.control=1", "evaluate.control: 1 is neither true nor false"),
        ("bench.contexts=[]", "bench.contexts: the list is empty"),
        ("model=null", "model: nothing is given; give a model"),
        ("model=7", "model: 7 is not a text; give a model"),
        ("dtype=bf16", "dtype: 'bf16' is unknown, did you mean 'bfloat16'?"),
        ("seed=-1", "seed: -1 is out of range; give a value at least 0 and below 4294967296"),
        ("seed", "override 'seed': not of the form key=value"),
        ("seed=[1", "override 'seed=[1': the value is not valid YAML"),
        ("stages.7.transfer.lr=1", "'7' is no place in stages, which has 2 entries"),
        ("seed.x=1", "seed is 0, which holds no 'x'"),
    ],
)
def test_mistakes_in_settings(override, message):
    with pytest.raises(LinearizeError) as caught:
        load_recipe("demo", ["seed=0", override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_window_dropout_without_a_state():
    with pytest.raises(LinearizeError, match=r"distill.window_dropout: 0.1, and convert.mixer 'none' has no state"):
        load_recipe("window-only", [*FILL_IN["window-only"], "stages.0.distill.window_dropout=0.1"])


def test_mistakes_in_files(tmp_path):
    file = tmp_path / "mine.yaml"
    cases = {
        "seed: [1": "not valid YAML",
        "- a\n- b\n": "a recipe is a map of settings",
        "": "a recipe is a map of settings (name, model, data, ...), got null",
        "seed: 1\nmodel: m\nseed: 2\n": "'seed' is given twice",
        "model: m\n": "data: nothing is given; say what to train on",
        "data: {sources: [{kind: pydoc}]}\n": "model: nothing is given; give a model",
    }
    for text, message in cases.items():
        file.write_text(text)
        with pytest.raises(LinearizeError) as caught:
            load_recipe(file)
        assert message in str(caught.value)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    file.write_bytes(b"model: \xff\n")
    with pytest.raises(LinearizeError, match="not UTF-8 at byte 7"):
        load_recipe(file)


def test_unknown_recipes():
    with pytest.raises(LinearizeError, match=r"'demp': unknown, did you mean 'demo'\? \(known: decomposed, default"):
        load_recipe("demp")
    with pytest.raises(LinearizeError, match=r"no/such\.yaml: no such recipe file"):
        load_recipe("no/such.yaml")


@pytest.mark.parametrize("name", ["default", "window-only"])
def test_presets_say_what_they_lack(name):
    with pytest.raises(LinearizeError, match=f"recipe '{name}': model: nothing is given; give a model"):
        load_recipe(name)


def test_default_asks_for_texts():
    with pytest.raises(LinearizeError, match=r"data\.sources\[0\]\.path: nothing is given; .* e\.g\. texts/\*\.txt"):
        load_recipe("default", ["model=m"])


def test_records_check_themselves_in_code_too():
    with pytest.raises(LinearizeError, match="lr: 0 is out of range"):
        TransferOptions(budget=Budget(steps=1), lr=0)
    with pytest.raises(LinearizeError, match="no limit is given"):
        Budget()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(steps=1).steps = 2


def test_name_defaults_to_the_file(tmp_path):
    values = load_recipe("demo").to_dict()
    del values["name"]
    (tmp_path / "nightly.yaml").write_text(yaml.safe_dump(values))
    assert load_recipe(tmp_path / "nightly.yaml").name == "nightly"


# Fields whose reader is being written. A field that is read may not stand here, so the list can only shrink.


def test_every_field_is_read():
    defining = {"options.py", "recipe.py", "records.py"}
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("linearize", "distill", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if not (folder == "distill" and path.name in defining)
    )
    records = [Recipe, *(getattr(option_records, name) for name in option_records.__all__)]
    unread = {
        f"{record.__name__}.{spec.name}"
        for record in records
        for spec in dataclasses.fields(record)
        if not re.search(rf"\.{spec.name}\b(?!\s*\()", code)
    }
    assert not unread, "no code reads these: make it, or remove the fields"
