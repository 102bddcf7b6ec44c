"""Sweeps: one recipe with one thing changed at a time."""

import json
import math
from pathlib import Path

import pytest
import yaml

from linearize.benchmarks.sweep import FIRST, load_sweep, main, run_sweep
from linearize.errors import LinearizeError
from tests.saved_models import save_tiny_model

VARIANTS = {"base": [], "No state, a longer stage": ["convert.mixer=none", "stages.0.distill.budget.steps=2"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    save_tiny_model(folder / "original")
    (folder / "text.txt").write_text("\n".join(f"{number}. They keep what they saw.\n" for number in range(300)))
    values = {
        "model": str(folder / "original"),
        "convert": {"window": 8, "sinks": 2},
        "data": {"sources": [{"kind": "text", "path": str(folder / "text.txt")}], "seq_len": 64},
        "stages": [{"distill": {"budget": {"steps": 1}, "lora_rank": 2}}],
        "dtype": "float32",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


def write(place: Path, **changes) -> Path:
    values = {
        "recipe": str(place / "recipe.yaml"),
        "base_rows": ["window + sinks", "student"],
        "evaluate": {
            "text": [f"saw={place / 'text.txt'}"],
            "tokens": 128,
            "contexts": [64],
            "needle_lengths": [],
            "recall_lengths": [],
            "kl_tokens": 128,
            "answers": 0,
        },
        "variants": VARIANTS,
    } | changes
    path = place / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    main([str(write(place)), "--out", str(place / "out")])
    return place / "out"


def test_every_variant_is_trained_and_measured(finished: Path):
    found = json.loads((finished / "sweep.json").read_text())
    assert [variant["name"] for variant in found["variants"]] == list(VARIANTS)
    rows = [list(variant["evaluate"]["texts"]["saw"]["64"]["rows"]) for variant in found["variants"]]
    assert rows == [["original", "window + sinks", "student"], ["original", "student", FIRST]]
    steps = [variant["evaluate"]["tokens_seen"]["student"] for variant in found["variants"]]
    assert steps == [64, 128]
    recipe = yaml.safe_load((finished / "no-state-a-longer-stage" / "recipe.yaml").read_text())
    assert recipe["convert"]["mixer"] == "none"


def test_the_table(finished: Path):
    lines = (finished / "sweep.md").read_text().splitlines()
    assert [line.split(" |")[0] for line in lines[2:6]] == [
        "| original",
        "| base: window + sinks",
        "| base: student",
        "| No state, a longer stage: student",
    ]
    [ratio] = [line for line in lines[6:] if line.startswith("| No state, a longer stage |")]
    comparisons = json.loads((finished / "sweep.json").read_text())["variants"][1]["evaluate"]["texts"]["saw"]["64"]
    [found] = [c for c in comparisons["comparisons"] if (c["row"], c["against"]) == ("student", FIRST)]
    assert ratio.startswith(f"| No state, a longer stage | {math.exp(found['nll_difference']):.3f} (")
    assert lines[-2:] == [
        "- base: as it is",
        "- No state, a longer stage: `convert.mixer=none`, `stages.0.distill.budget.steps=2`",
    ]


def test_a_stopped_sweep_goes_on(place: Path, finished: Path, monkeypatch, tmp_path: Path):
    """Finished variants are neither trained nor measured again, and the original is measured once."""
    before = (finished / "sweep.json").read_text()
    measured = []
    monkeypatch.setattr("linearize.benchmarks.evaluate._measure", lambda rows, missing, *rest: measured.append(missing))
    run_sweep(load_sweep(write(place)), finished)
    assert all(not any(work.values()) for work in measured)
    after, earlier = json.loads((finished / "sweep.json").read_text()), json.loads(before)
    for new, old in zip(after["variants"], earlier["variants"], strict=True):
        assert new["evaluate"]["texts"] == old["evaluate"]["texts"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants: nothing is given; name at least one"),
        ({"variants": {"A b": [], "a-b": []}}, "variants: 'A b' and 'a-b' would share a folder; rename one"),
        (
            {"variants": {"x": ["convert.windw=3"]}},
            "variants: .x.: .*convert.windw: unknown key, did you mean",
        ),
        ({"recipe": "demmo"}, "'demmo': unknown, did you mean 'demo'"),
        ({"rwos": []}, "rwos: unknown key, did you mean 'rows'"),
        ({"rows": ["student, state off"]}, r"rows: \['student, state off'\] lack 'student', which all variants"),
        ({"evaluate": {"tokens": 1}}, "tokens: 1 is out of range"),
    ],
)
def test_mistakes_show_before_anything_is_trained(place: Path, changes, message):
    with pytest.raises(LinearizeError, match=message):
        load_sweep(write(place, **changes))


def test_no_file(tmp_path: Path):
    with pytest.raises(LinearizeError, match=r"nowhere.yaml: no such file"):
        load_sweep(tmp_path / "nowhere.yaml")


def test_another_seed_trains_otherwise_and_is_asked_the_same(place: Path, tmp_path: Path):
    """Needles are drawn by the recipe's seed for all, and the first student is not measured a second time."""
    evaluate = yaml.safe_load(write(place).read_text())["evaluate"] | {"needle_lengths": [100]}
    sweep = load_sweep(
        write(place, variants={"base": [], "seed": ["seed=1"]}, evaluate=evaluate, base_rows=["student"])
    )
    variants = run_sweep(sweep, tmp_path)["variants"]
    one, two = (variant["evaluate"] for variant in variants)
    assert one["needle"]["rows"]["original"] == two["needle"]["rows"]["original"]
    assert one["needle"]["rows"]["student"] == two["needle"]["rows"][FIRST]
    nll = [result["perplexity"]["rows"]["student"]["nll"] for result in (one, two)]
    assert nll[0] != nll[1]
    names = [path.name for path in (tmp_path / "measurements").glob("needle*")]
    assert len(names) == 3, names


def test_a_variant_named_twice(tmp_path):
    """PyYAML alone would quietly keep the last of them."""
    (tmp_path / "sweep.yaml").write_text("recipe: demo\nvariants:\n  base: []\n  base: [seed=1]\n")
    with pytest.raises(LinearizeError, match=r"sweep.yaml: not valid YAML: .*'base' is given twice"):
        load_sweep(tmp_path / "sweep.yaml")
