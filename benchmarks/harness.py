"""Tasks of lm-evaluation-harness, so that figures can be held against published ones.

Its own Python interface does the work, with its own prompts, few-shot examples and metrics: the model of a row is
handed to it as it is. It is an extra, `pip install 'linearize[eval]'`, and nothing here needs it otherwise. Its tasks
mostly read data sets from the hub; a folder of task files of one's own may name local ones (`dataset_path: json` with
`dataset_kwargs: {data_files: {...}}`).

Where a metric is accuracy, what a row keeps is given above chance as for `choices`: guessing is right once in as many
times as a question has choices, and never where a text has to be written.
"""

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from linearize.benchmarks.choices import retention
from linearize.benchmarks.inference import inference
from linearize.errors import LinearizeError

__all__ = ["Harness", "load_harness", "summarise_harness"]

BATCH = 8
# Metrics that are 0 or 1 a sample, of which the share that a row keeps is known.
ACCURACIES = ("acc", "acc_norm")


class Harness:
    """The library with its index of tasks, which takes seconds to build.

    Attributes:
        version: of the library.
        limit: questions of each task, its first ones; None is all.
    """

    def __init__(self, library: Any, manager: Any, limit: int | None):
        self.library = library
        self.manager = manager
        self.limit = limit
        self.version: str = library.__version__

    def measure(self, model: Any, tokenizer: Any, task: str) -> dict[str, Any]:
        """Run one task or group of tasks.

        Returns:
            JSON-able: task -> `{"metrics": {METRIC: {"value", "stderr"}}, "hits": {METRIC: [float, ...]}, "version",
            "n_samples", "chance": float | None}`. A group has its tasks beside it, and no hits of its own.
        """
        from lm_eval.models.huggingface import HFLM

        with inference(model):
            with _warnings_off():  # it warns that a model that is loaded already is taken as it is
                wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
            found = self.library.simple_evaluate(
                model=wrapped,
                tasks=[task],
                limit=self.limit,
                task_manager=self.manager,
                log_samples=True,
            )
        return {name: _outcome(found, name) for name in found["results"]}


def load_harness(tasks: Sequence[str], folder: str | None = None, limit: int | None = None) -> Harness:
    """Import the library and find the tasks, before a model is loaded.

    Args:
        tasks: names of tasks, groups or tags.
        folder: of task files (YAML) of one's own, besides those that the library has.
        limit: questions of each task.

    Raises:
        LinearizeError: the library is not installed, no such folder, or no such task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LinearizeError(
            f"lm_eval: {', '.join(tasks)} are tasks of lm-evaluation-harness, which cannot be imported ({error}); "
            "install it with: pip install 'linearize[eval]'"
        ) from error
    if folder is not None and not Path(folder).is_dir():
        raise LinearizeError(f"lm_eval_tasks: {folder!r} is not a folder; give one of task files in YAML")
    manager = _task_manager(TaskManager, folder)
    for task in tasks:
        if task not in manager.all_tasks:
            local = "" if folder is None else f" and {folder!r}"
            raise LinearizeError(
                f"lm_eval: there is no task {task!r} among the {len(manager.all_tasks)} of lm-eval "
                f"{lm_eval.__version__}{local}; `lm-eval ls tasks` lists them, and --lm-eval-tasks adds a folder"
            )
    return Harness(lm_eval, manager, limit)


@functools.cache
def _task_manager(make: Any, folder: str | None) -> Any:
    """Once a process: it reads thousands of files."""
    return make(include_path=folder)


@contextmanager
def _warnings_off() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _outcome(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One task's part of what the library returns, or a group's."""
    metrics: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        metric, comma, kept = key.partition(",")  # such as "acc,none": of which answers, after which filter
        if comma and not metric.endswith("_stderr"):
            error = found["results"][name].get(f"{metric}_stderr,{kept}")
            metrics[metric if kept == "none" else key] = {"value": _number(value), "stderr": _number(error)}
    samples = found.get("samples", {}).get(name, [])
    # A sample stands there once for each filter.
    samples = sorted((s for s in samples if s["filter"] == samples[0]["filter"]), key=lambda s: s["doc_id"])
    return {
        "metrics": metrics,
        "hits": {
            metric: [float(sample[metric]) for sample in samples]
            for metric in ACCURACIES
            if samples and metric in metrics and metric in samples[0]
        },
        "version": found["versions"].get(name),
        "n_samples": len(samples) or None,
        "chance": _chance(found["configs"][name]["output_type"], samples) if samples else None,
    }


def _number(value: Any) -> float | None:
    """None for what is no finite number: a standard error that is unknown is a text there."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _chance(output_type: str, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """How likely a guess is right; None where the kind of task does not tell."""
    if output_type == "multiple_choice":
        return sum(1 / len(sample["filtered_resps"]) for sample in samples) / len(samples)
    return 0.0 if output_type in ("loglikelihood", "generate_until") else None


def summarise_harness(outcomes: Mapping[str, Mapping[str, Any]], baseline: str, seed: int = 0) -> dict[str, Any]:
    """The rows of each task side by side.

    Args:
        outcomes: row name -> what `Harness.measure` returned for one task or group.
        baseline: the row that retention compares with.
        seed: of the bootstrap over samples.

    Returns:
        task -> its part of `"lm_eval"` in evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    tasks = {}
    for task, theirs in outcomes[baseline].items():
        chance, rows = theirs["chance"], {}
        for row, found in outcomes.items():
            rows[row] = {name: {**own, "retention_over_chance": None} for name, own in found[task]["metrics"].items()}
            for metric, wanted in theirs["hits"].items():
                hits, reference = (torch.tensor(x, dtype=torch.float64) for x in (found[task]["hits"][metric], wanted))
                if chance is not None:
                    kept = retention(hits, reference, torch.full_like(hits, chance), seed)
                    rows[row][metric]["retention_over_chance"] = kept
        tasks[task] = {"version": theirs["version"], "n_samples": theirs["n_samples"], "chance": chance, "rows": rows}
    return tasks
