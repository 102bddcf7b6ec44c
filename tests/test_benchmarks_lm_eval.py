"""Tasks of lm-evaluation-harness by its own interface. Where it is not installed, a small stand-in has its shape."""

import builtins
import importlib.util
import json
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from linearize.benchmarks import harness
from linearize.benchmarks.choices import multiple_choice, summarise_choices
from linearize.benchmarks.evaluate import evaluate_rows
from linearize.benchmarks.items import load_items
from linearize.benchmarks.work import Work
from linearize.distill.options import EvaluateOptions
from linearize.errors import LinearizeError
from linearize.rows import comparison_rows
from linearize.tables import print_evaluation
from tests.tiny_models import make_student
from tests.tiny_tokenizer import tiny_tokenizer

REAL = importlib.util.find_spec("lm_eval") is not None
TASK = {
    "task": "own_choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    "metadata": {"version": 2.0},
}


class StandIn:
    """As much of the library as is used, for tasks of choices in local files."""

    class TaskManager:
        def __init__(self, include_path: str | None = None):
            found = [yaml.safe_load(path.read_text()) for path in Path(include_path or "/nowhere").glob("*.yaml")]
            self.tasks = {task["task"]: task for task in found}
            self.all_tasks = sorted(self.tasks)

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model, self.tokenizer = pretrained, tokenizer

    @staticmethod
    def simple_evaluate(model, tasks, limit, task_manager, log_samples):
        (name,) = tasks
        task = task_manager.tasks[name]
        items = load_items(task["dataset_kwargs"]["data_files"]["test"])[:limit]
        scores = multiple_choice(model.model, model.tokenizer, items)
        part = summarise_choices({"row": scores}, items, "row")["rows"]["row"]
        hits = {"acc": part["raw"]["hits"], "acc_norm": part["normalised"]["hits"]}
        results: dict = {"alias": name}
        for metric, found in hits.items():
            results |= {f"{metric},none": sum(map(int, found)) / len(found), f"{metric}_stderr,none": 0.1}
        samples = [
            {"doc_id": n, "filter": "none", "filtered_resps": scores[n]}
            | {metric: float(found[n]) for metric, found in hits.items()}
            for n in range(len(items))
        ]
        return {
            "results": {name: results},
            "samples": {name: samples[::-1]},
            "versions": {name: task["metadata"]["version"]},
            "configs": {name: {"output_type": task["output_type"]}},
        }


@pytest.fixture
def library(monkeypatch, tmp_path) -> None:
    """The library itself, or what stands for it."""
    if REAL:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        return
    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")}
    modules["lm_eval"].__version__ = "0"
    modules["lm_eval"].simple_evaluate = StandIn.simple_evaluate
    modules["lm_eval.tasks"].TaskManager = StandIn.TaskManager
    modules["lm_eval.models.huggingface"].HFLM = StandIn.HFLM
    modules["lm_eval.models"] = ModuleType("lm_eval.models")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with one task of thirty questions of three choices; one for all tests, as the library reads thousands
    of files beside each."""
    draw = random.Random(0)
    words = ("brown fox", "lazy dog", "cheese", "a toad", "quick", "jumps over it")
    items = [{"query": f"the {draw.choice(words)}", "choices": draw.sample(words, 3), "gold": n % 3} for n in range(30)]
    made = tmp_path_factory.mktemp("tasks")
    (made / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(made / "items.jsonl")}}}
    (made / "own.yaml").write_text(yaml.safe_dump(task))
    return made


def make_options(folder, **changes) -> EvaluateOptions:
    given = {"tokens": 64, "contexts": (64,), "needle_lengths": (), "recall_lengths": (), "kl_tokens": 0, "answers": 0}
    return EvaluateOptions(**(given | {"lm_eval": ("own_choice",), "lm_eval_tasks": str(folder)} | changes))


def evaluate(rows, options, **more):
    texts = {"t": torch.arange(4, 100)}
    return evaluate_rows(rows, tiny_tokenizer(), texts, options, only=["lm-eval"], **more)


def test_rows_of_a_task_of_ones_own(library, folder, capsys):
    model = make_student("llama", "normalizer")
    rows = {row: enter for row, enter in comparison_rows(model).items() if row in ("original", "student")}
    result = evaluate(rows, make_options(folder))
    part = result["lm_eval"]["own_choice"]
    assert (part["version"], part["n_samples"], part["chance"]) == (2.0, 30, pytest.approx(1 / 3))
    # The same questions by our own measurement.
    items = load_items(folder / "items.jsonl")
    scores = {}
    for row, enter in rows.items():
        with enter() as entered:
            scores[row] = multiple_choice(entered, tiny_tokenizer(), items)
    own = summarise_choices(scores, items, "original")["rows"]
    assert own["student"]["raw"]["accuracy"] != own["original"]["raw"]["accuracy"]
    for row, metrics in part["rows"].items():
        assert list(metrics) == ["acc", "acc_norm"]
        for metric, kind in (("acc", "raw"), ("acc_norm", "normalised")):
            assert metrics[metric]["value"] == pytest.approx(own[row][kind]["accuracy"])
            assert 0 < metrics[metric]["stderr"] < 0.2
            assert metrics[metric]["retention_over_chance"] == own[row][kind]["retention_over_chance"]
    print_evaluation(result)
    assert "lm-eval: own_choice, 30 questions" in capsys.readouterr().out
    json.dumps(result, allow_nan=False)


def test_a_model_against_itself_keeps_all(library, folder):
    model = make_student("llama", "none")
    rows = {row: lambda: nullcontext(model) for row in ("original", "student")}
    rows = evaluate(rows, make_options(folder))["lm_eval"]["own_choice"]["rows"]
    assert rows["student"] == rows["original"]
    for metric in rows["student"].values():
        assert metric["retention_over_chance"]["value"] in (None, 1.0)


def test_limit_and_what_was_measured_before(library, folder, tmp_path, monkeypatch):
    model = make_student("llama", "none")
    rows = {"original": lambda: nullcontext(model)}
    work = Work(tmp_path / "work", {"original": 1})
    first = evaluate(rows, make_options(folder, lm_eval_limit=7), work=work)
    assert first["lm_eval"]["own_choice"]["n_samples"] == 7

    def refuse(*_):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(harness.Harness, "measure", refuse)
        again = evaluate(rows, make_options(folder, lm_eval_limit=7), work=work)
        assert again["lm_eval"] == first["lm_eval"]
        # Another limit, or another file in the folder, is another measurement.
        for change in (lambda: make_options(folder), lambda: make_options(folder, lm_eval_limit=7)):
            (folder / "note.txt").write_text("changed")
            with pytest.raises(AssertionError, match="measured again"):
                evaluate(rows, change(), work=work)


def test_tasks_and_folders_are_checked(library, folder):
    with pytest.raises(LinearizeError, match="lm_eval: there is no task 'own_choise' among the"):
        harness.load_harness(["own_choise"], str(folder))
    with pytest.raises(LinearizeError, match="lm_eval_tasks: 'nowhere' is not a folder"):
        harness.load_harness(["own_choice"], "nowhere")


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    found = builtins.__import__

    def missing(name, *rest, **more):
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(LinearizeError, match=r"pip install 'linearize\[eval\]'"):
        harness.load_harness(["arc_easy"])


def test_options_of_no_task_are_refused():
    with pytest.raises(LinearizeError, match="lm_eval_limit: 5 without a task in lm_eval; name one"):
        EvaluateOptions(lm_eval_limit=5)
    with pytest.raises(LinearizeError, match="lm_eval_tasks: 'tasks' without a task in lm_eval"):
        EvaluateOptions(lm_eval_tasks="tasks")


def test_a_group_and_other_metrics():
    """What the library returns for a group: its own mean, and its tasks; texts where a number is not known."""
    found = {
        "results": {
            "group": {"alias": "group", "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
            "words": {"acc,none": 0.5, "acc_stderr,none": 0.2, "perplexity,none": float("inf")},
        },
        "samples": {
            "words": [
                {"doc_id": 1, "filter": "none", "filtered_resps": [0], "acc": 1.0},
                {"doc_id": 0, "filter": "none", "filtered_resps": [0], "acc": 0.0},
                {"doc_id": 0, "filter": "other", "filtered_resps": [0], "acc": 1.0},
            ]
        },
        "versions": {"words": 1},
        "configs": {"words": {"output_type": "loglikelihood"}},
    }
    group, words = (harness._outcome(found, name) for name in ("group", "words"))
    assert group == {
        "metrics": {"exact_match,strict": {"value": 0.25, "stderr": None}},
        "hits": {}, "version": None, "n_samples": None, "chance": None,
    }  # fmt: skip
    assert words["hits"] == {"acc": [0.0, 1.0]}
    assert (words["n_samples"], words["chance"], words["metrics"]["perplexity"]["value"]) == (2, 0.0, None)
    part = harness.summarise_harness({"original": {"words": words}}, "original")["words"]
    assert part["rows"]["original"]["acc"]["retention_over_chance"]["value"] == 1.0
    assert part["rows"]["original"]["perplexity"]["retention_over_chance"] is None
