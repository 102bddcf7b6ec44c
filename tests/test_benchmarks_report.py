"""The report: one valid page that needs nothing else, with or without plots."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from linearize.benchmarks import plots
from linearize.benchmarks.files import write_json, write_text
from linearize.benchmarks.report import read_train_log, write_report
from linearize.errors import LinearizeError
from tests.benchmark_results import fabricate_bench, fabricate_evaluation, fabricate_log

NLL = {
    "original": 3.0,
    "control": 2.9,
    "window + sinks": 3.8,
    "student": 3.4,
    "student, state off": 3.9,
    "student, window off": 6.0,
}
TIMES = {
    "original": {1024: 20.0, 4096: 40.0, 8192: 70.0},
    "static": {1024: 22.0, 4096: 35.0, 8192: 60.0},
    "student": {1024: 30.0, 4096: 30.0, 8192: 30.0},
    "window + sinks": {1024: 25.0, 4096: 25.0, 8192: 25.0},
}
RECIPE = "model: package://some/Model-135M.gguf\nconvert: {mixer: hedgehog, window: 32, sinks: 4}\n"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.tags, self.references, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.references.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with all results and the report of them, drawn once: drawing takes a second."""
    folder = tmp_path_factory.mktemp("run")
    right = dict.fromkeys(NLL, 0.7) | {"student": 0.5}
    found = dict.fromkeys(NLL, 3) | {"original": 9}
    write_json(folder / "evaluate.json", fabricate_evaluation(NLL, right, found))
    with pytest.MonkeyPatch.context() as monkeypatch:
        write_json(folder / "bench.json", fabricate_bench(monkeypatch, TIMES))
    write_text(folder / "train.jsonl", "".join(json.dumps(record) + "\n" for record in fabricate_log()))
    write_text(folder / "recipe.yaml", RECIPE)
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def text(results):
    return (results / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def run(results, tmp_path, monkeypatch):
    """A copy of the results to change, reported on without plots."""
    monkeypatch.setattr(plots, "available", lambda: False)
    return Path(shutil.copytree(results, tmp_path / "run", ignore=shutil.ignore_patterns("report.html")))


def test_page_is_valid_and_needs_nothing_else(text):
    assert len(text.encode()) < 1_000_000
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.references
    assert all(reference.startswith("#") and reference[1:] in page.ids for reference in page.references)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert set(re.findall(r"https?://[^\s\"<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    clips = set(re.findall(r"url\(#([^)]+)\)", text))
    assert clips <= set(page.ids)
    assert page.tags.count("svg") == 6
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_page_says_what_the_results_say(text):
    words = " ".join(" ".join(Page(text).words).split())
    for part in (
        "Model-135M, converted",
        "mixer hedgehog, window 32, sinks 4",
        "The state carries information.",
        "At 1024 tokens of context the student decodes a token in",
        "original, static cache",
        "linearize evaluate runs/demo",
        "transfer: loss of each layer",
        "100 questions; guessing gives 25 %",
        "1024 at 90 %",
    ):
        assert part in words


def test_every_table_scrolls_in_its_own_container(text):
    assert text.count("<table>") == text.count('<div class="scroll"') == 8


def test_same_results_same_bytes(results, text):
    assert write_report(results).read_bytes() == text.encode()


def test_placeholder_colours_are_all_replaced(text):
    assert "#0101" not in text
    for variable in plots.COLORS:
        assert f"{variable}: #" in text  # defined in the stylesheet
    # Two themes define every colour.
    assert text.count("--student: #") == 2
    assert re.search(r"(stroke|fill): ?#(?!ffffff|none)[0-9a-f]{6}", text) is None


def test_user_text_is_escaped(run):
    evil = "<script>alert('1')</script>&\""
    write_text(run / "recipe.yaml", f"model: {json.dumps(evil)}\nconvert: {{mixer: {json.dumps(evil)}}}\n")
    result = json.loads((run / "evaluate.json").read_text(encoding="utf-8"))
    result["machine"]["command"] = evil
    result["notes"] = [evil]
    write_json(run / "evaluate.json", result)
    text = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4
    Page(text)


def test_row_names_are_escaped_in_plots(tmp_path):
    nll = {"original": 3.0, "student": 3.4, "a <b> & $x$ row": 3.5}
    write_json(tmp_path / "evaluate.json", fabricate_evaluation(nll))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "b" not in page.tags


def test_without_matplotlib_the_tables_remain(run, text, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what Python takes as not installed
    plain = write_report(run).read_text(encoding="utf-8")
    assert "svg" not in Page(plain).tags
    assert plain.count("<table>") == text.count("<table>")
    assert "they need matplotlib (pip install &#x27;linearize[report]&#x27;)" in plain


@pytest.mark.parametrize(
    ("kept", "part"),
    [
        ("evaluate.json", "There is no bench.json in this folder; `linearize bench` writes it."),
        ("bench.json", "There is no evaluate.json in this folder; `linearize evaluate` writes it."),
        ("train.jsonl", "Stages, as logged"),
    ],
)
def test_a_part_of_the_results_is_enough(run, kept, part):
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    text = write_report(run).read_text(encoding="utf-8")
    Page(text)
    assert part in text


def test_results_with_holes_are_shown_as_dashes(tmp_path):
    result = fabricate_evaluation({"original": 3.0, "student": float("nan")}, sequences=1)
    write_json(tmp_path / "evaluate.json", result)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "nan" not in text.lower().replace("nano", "")
    assert "are not finite numbers" in text


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(LinearizeError, match=r"no evaluate\.json, bench\.json or train\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_is_not_yaml_is_refused_in_one_line(run):
    write_text(run / "recipe.yaml", "a: [1\nb: 2")
    with pytest.raises(LinearizeError, match=r"recipe\.yaml: not YAML") as error:
        write_report(run)
    assert "\n" not in str(error.value)


def test_a_log_cut_off_by_a_kill_is_read_up_to_there(tmp_path):
    path = write_text(tmp_path / "train.jsonl", '{"stage": "a", "tokens": 1, "loss": 2.0}\n{"stage": "a", "to')
    assert read_train_log(path) == [{"stage": "a", "tokens": 1, "loss": 2.0}]
    write_text(path, '{"stage": "a", "to\n{"stage": "a", "tokens": 1, "loss": 2.0}\n')
    with pytest.raises(LinearizeError, match=r"train\.jsonl:1: not JSON"):
        read_train_log(path)
    write_text(path, '{"stage": "a"}\n')
    with pytest.raises(LinearizeError, match="it needs stage, tokens and loss"):
        read_train_log(path)
