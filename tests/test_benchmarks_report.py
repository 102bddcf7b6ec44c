"""The report: one valid page that needs nothing else, with or without plots."""

import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from linearize.benchmarks import plots
from linearize.benchmarks.files import write_json, write_text
from linearize.benchmarks.report import read_train_log, write_report
from linearize.benchmarks.training_log import COLUMNS, POINTS, heat_map, stage_logs, thinned
from linearize.errors import LinearizeError
from tests.benchmark_results import fabricate_bench, fabricate_evaluation, fabricate_log
from tests.html_page import Page

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
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert set(re.findall(r"https?://[^\s\"<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert "@font-face" not in text
    clips = set(re.findall(r"url\(#([^)]+)\)", text))
    assert clips <= set(page.ids)
    assert page.tags.count("svg") == 16
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r" on[a-z]+=", re.sub(r"<style>.*?</style>|>[^<]*<", "><", text, flags=re.S))


def test_page_says_what_the_results_say(text):
    words = Page(text).text
    for part in (
        "Model-135M, converted",
        "mixer hedgehog, window 32, sinks 4",
        "The state carries information.",
        "At 1024 tokens of context the student decodes a token in",
        "original, static",
        "linearize evaluate runs/demo",
        "transfer: loss of each layer by tokens read",
        "Curves of distill",
        "100 questions; guessing gives 25 %",
        "1024 at 90 %",
        "the machine's own speed moved during 0 of 15 blocks",
    ):
        assert part in words


def test_the_headline_comes_first_and_has_both_sides(text):
    page = Page(text)
    first = page.text.index("In short")
    assert first < page.text.index("Findings")
    found = re.search(r"Decodes [12]\.\d\d× as fast at 8192 tokens, 0\.6\d× at 1024 tokens; holds 1\.3 %", page.text)
    assert found is not None
    assert found[0] in re.search(r'<meta name="description" content="([^"]*)"', text)[1].replace(
        "\N{NO-BREAK SPACE}", " "
    )
    for topic, verdict in (
        ("Decoding at 8192 tokens", "+ better"),
        ("Decoding at 1024 tokens", "− worse"),
        ("Accuracy on tasks", "− worse"),
        ("Needles at 1024 tokens", "− worse"),
    ):
        assert f"{topic} {verdict}" in page.text


def test_what_was_not_measured_is_said(tmp_path, plain):
    result = fabricate_evaluation({"original": 3.0, "student": 3.4})
    write_json(tmp_path / "evaluate.json", result)
    words = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    for topic in ("Speed and memory", "Accuracy on tasks", "Needles"):
        assert f"{topic} · not measured" in words
    assert "Speed and memory: not measured; perplexity 1.49× the original's on held-out text" in words
    assert "Needle in a haystack" not in words


def test_contents_lead_to_every_section(text):
    page = Page(text)
    anchors = [value["id"] for tag, value in page.elements if tag == "section"]
    links = [reference for reference in page.references if reference[1:] in anchors]
    assert links == [f"#{anchor}" for anchor in anchors]
    assert len(anchors) == 8
    assert "#content" in page.references  # the skip link
    # Headings do not jump a level.
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_table_scrolls_in_a_box_that_can_be_focused(text):
    page = Page(text)
    boxes = [value for _, value in page.elements if "scroll" in value.get("class", "").split()]
    assert len(boxes) == page.tags.count("table") + page.tags.count("pre")
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in boxes)


def test_every_figure_has_a_title_and_its_numbers(text):
    page = Page(text)
    pictures = [value for tag, value in page.elements if tag == "svg"]
    for picture in pictures:
        title, description = picture["aria-labelledby"].split()
        assert picture["role"] == "img"
        assert {title, description} <= set(page.ids)
    figures = re.findall(r"<figure>\n<svg.*?</figure>", text, flags=re.S)
    assert len(figures) == len(pictures)
    assert all("<details" in figure and "<table" in figure and "download=" in figure for figure in figures)


def test_tables_of_figures_equal_the_results(results, text):
    page = Page(text)
    bench = json.loads((results / "bench.json").read_text(encoding="utf-8"))
    rows = page.files["decode-times.csv"]
    assert rows[0][:5] == ["row", "mode", "context", "batch", "ms p50"]
    cells = {(row[0], row[1], int(row[2])): row for row in rows[1:]}
    assert len(cells) == len(bench["cells"])
    for cell in bench["cells"]:
        row = cells[cell["row"], cell["mode"], cell["context"]]
        assert [float(value) for value in row[4:7]] == [cell["ms_per_token"][key] for key in ("p50", "min", "max")]
    quality = json.loads((results / "evaluate.json").read_text(encoding="utf-8"))
    drawn = {row[0]: [float(value) for value in row[1:]] for row in page.files["nll-differences-held-out-text.csv"][1:]}
    pairs = {pair["row"]: pair for pair in quality["perplexity"]["comparisons"] if pair["against"] == "original"}
    assert drawn == {name: [pair["nll_difference"], *pair["ci95"]] for name, pair in pairs.items()}
    needles = page.files["needles-greedy.csv"]
    student = [float(row[-1]) for row in needles[1:] if row[0] == "student"]
    assert student == [cell["greedy"] for cell in quality["needle"]["rows"]["student"]["cells"]]
    assert len(page.files) == text.count(" download=") == 24  # no name twice


def test_losses_are_marked_in_tables(text):
    """In words and with a sign, not by colour alone."""
    page = Page(text)
    (times,) = [table for table in page.tables if "speed-up" in table[0] and "tokens/s" in table[0]]
    student = {row[1]: row[7] for row in times if row[0] == "student"}
    assert student["1024"].endswith("✗, worse than the original")
    assert student["8192"].endswith("✓, better than the original")
    assert all("✗" not in row[7] and "✓" not in row[7] for row in times if row[0].startswith("original"))


def test_same_results_same_bytes(results, text):
    assert write_report(results).read_bytes() == text.encode()


def test_placeholder_colours_are_all_replaced(text):
    assert "#0101" not in text
    for variable in plots.COLORS:
        assert f"{variable}: #" in text  # defined in the stylesheet
    # Two themes define every colour.
    assert all(text.count(f"{variable}: #") == 2 for variable in plots.COLORS)
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
    # Heat maps need no library: two of needles, one of layers.
    assert Page(plain).tags.count("svg") == 3
    assert {table[0][0] for table in Page(plain).tables} == {"row", "stage", "layer", "what"}
    assert "perplexity by the number of tokens before the predicted one" in plain
    assert "they need matplotlib (pip install &#x27;linearize[report]&#x27;)" in plain


@pytest.mark.parametrize(
    ("kept", "part"),
    [
        ("evaluate.json", "There is no bench.json in this folder; `linearize bench decode` writes it."),
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


def test_a_bench_of_an_older_version_is_refused_in_one_line(run):
    result = json.loads((run / "bench.json").read_text(encoding="utf-8"))
    write_json(run / "bench.json", result | {"schema": 1})
    with pytest.raises(LinearizeError, match=r"bench\.json: schema 1 of 'linearize\.bench' .* reads 2; measure again"):
        write_report(run)


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


STAGED = """
model: some/model
stages:
- transfer:
    budget: {tokens: 4000, steps: 100, minutes: null}
- distill:
    budget: {minutes: 10.0}
evaluate: {control: true, window: false}
"""


def lines(stage: str, count: int, layers: int = 0, **changes) -> list[dict]:
    """One line every 10 steps of 10 tokens and half a second each."""
    found = []
    for n in range(1, count + 1):
        record = {"stage": stage, "step": 10 * n, "tokens": 100 * n, "seconds": 5.0 * n, "loss": 1 / n, "lr": 0.1}
        record |= {"tokens_per_s": 20.0, "peak_memory_bytes": 2**30, **changes}
        if layers:
            record["losses_per_layer"] = {str(layer): (layer + 1) / n for layer in range(layers)}
        found.append(record)
    return found


def report_on(folder: Path, log: list[dict], recipe: str | None = STAGED) -> str:
    write_text(folder / "train.jsonl", "".join(json.dumps(record) + "\n" for record in log))
    if recipe is not None:
        write_text(folder / "recipe.yaml", recipe)
    text = write_report(folder).read_text(encoding="utf-8")
    Page(text)
    return " ".join(" ".join(Page(text).words).split())


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)


class TestWhileItTrains:
    def test_stage_progress_and_time_left(self, tmp_path, plain):
        words = report_on(tmp_path, lines("transfer", 4, layers=3))
        # 40 of 100 steps in 20 s: the largest share among the limits; 60 more take 30 s.
        assert "transfer: 40 % done, step 40, loss 0.250, less than a minute left" in words
        assert "Still to come: distill." in words
        assert "linearize report" in words

    def test_time_is_hours_and_minutes(self, tmp_path, plain):
        log = [record | {"seconds": 9000.0} for record in lines("transfer", 5)]
        assert "50 % done" in report_on(tmp_path, log)
        assert ", 2 h 30 min left at the speed so far." in report_on(tmp_path, log)

    def test_between_two_stages(self, tmp_path, plain):
        words = report_on(tmp_path, lines("transfer", 10))
        assert "transfer is done. Still to come: distill." in words

    def test_nothing_is_said_once_all_is_done(self, tmp_path, plain):
        done = lines("transfer", 10) + [record | {"seconds": 600.0} for record in lines("distill", 3)]
        assert "Not finished yet" not in report_on(tmp_path, done)
        # The control trains for as many steps as the student has.
        words = report_on(tmp_path, done + lines("control", 2))
        assert "control: 67 % done, step 20" in words
        assert "Not finished yet" not in report_on(tmp_path, done + lines("control", 3))

    def test_a_line_that_is_being_written(self, tmp_path, plain):
        report_on(tmp_path, lines("transfer", 4))
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write('{"stage": "transfer", "st')
        assert "step 40" in write_report(tmp_path).read_text(encoding="utf-8")

    def test_before_the_first_step(self, tmp_path):
        write_text(tmp_path / "recipe.yaml", STAGED)
        with pytest.raises(LinearizeError, match="or wait for a training's first step"):
            write_report(tmp_path)


def test_progress_is_that_of_the_loop():
    """The budget's rule is written twice: the loop loads what a report should not wait for."""
    from linearize.distill.loop import progress_of
    from linearize.distill.options import Budget

    limits = {"tokens": 4000, "steps": 70, "minutes": 1.5}
    recipe = {"stages": [{"distill": {"budget": limits}}, {"distill": {"budget": {"tokens": 100}}}]}
    for n in (1, 3, 6, 9):
        log = lines("distill", n)
        stage, later = stage_logs(log, recipe)
        last = log[-1]
        assert stage.share == pytest.approx(
            progress_of(Budget(**limits), last["step"], last["tokens"], last["seconds"])
        )
        assert (later.name, later.share, later.finished) == ("distill-2", 0.0, False)


def test_stages_have_the_names_that_a_job_gives_them():
    from linearize.distill.recipe import load_recipe
    from linearize.job import _named

    extend = {"extend": {"budget": {"steps": 1}, "seq_len": 64, "segment": 32}}
    distill = {"distill": {"budget": {"steps": 1}}}
    recipe = load_recipe("demo")
    raw = recipe.to_dict() | {"stages": [distill, extend, distill]}
    named = [name for name, _ in _named(type(recipe).from_dict(raw))]
    assert [stage.name for stage in stage_logs([], raw)] == named == ["distill", "extend", "distill-2"]


def test_logs_of_older_runs(tmp_path, plain):
    """Without seconds, memory, learning rate, recipe: what is there is shown."""
    old = [
        {key: value for key, value in record.items() if key in ("stage", "step", "tokens", "loss", "tokens_per_s")}
        for record in lines("transfer", 4)
    ]
    words = report_on(tmp_path, old, recipe=None)
    assert "Not finished yet" not in words
    assert "40 % done" in report_on(tmp_path, old)
    bare = [{"stage": "a", "tokens": 1, "loss": 2.0}]
    assert "Stages, as logged" in report_on(tmp_path, bare)


class TestHeatMap:
    def test_spans_are_equal_and_hold_geometric_means(self):
        log = lines("transfer", 3 * COLUMNS + 1, layers=2)
        heat = heat_map(log)
        assert heat.layers == ("0", "1")
        assert len(heat.edges) == COLUMNS + 1
        assert (heat.edges[0], heat.edges[-1]) == (100.0, pytest.approx(100.0 * (3 * COLUMNS + 1)))
        assert heat.losses[0][0] == pytest.approx((1 * 1 / 2 * 1 / 3) ** (1 / 3))
        assert heat.losses[1][0] == pytest.approx(2 * heat.losses[0][0])

    def test_what_is_no_loss_is_left_empty(self, tmp_path, plain):
        log = lines("transfer", 3, layers=2)
        log[1]["losses_per_layer"] = {"0": 0.0, "1": float("nan"), "7": 1.0}
        heat = heat_map(log)
        assert heat.layers == ("0", "1", "7")
        assert heat.losses[0][1] is None
        assert heat.losses[1][1] is None
        assert heat.losses[2] == (None, 1.0, None)
        assert "–" in report_on(tmp_path, log)
        assert heat_map(lines("distill", 3)) is None

    def test_it_is_shown_with_its_numbers(self, tmp_path, plain):
        report_on(tmp_path, lines("transfer", 4, layers=3))
        page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert page.files["transfer-layers.csv"][1:3] == [
            [str(layer), *(str((layer + 1) / n) for n in (1, 2, 3, 4))] for layer in range(2)
        ]


def test_long_logs_are_thinned():
    log = lines("distill", 3 * POINTS + 5)
    kept = thinned(log)
    assert len(kept) <= POINTS + 2
    assert (kept[0], kept[-1]) == (log[0], log[-1])
    assert thinned(log[:7]) == log[:7]
    assert thinned([]) == []
