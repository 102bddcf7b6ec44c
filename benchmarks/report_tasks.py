"""The report's sections on tasks: multiple choice and last words, choices by letter, tasks of lm-eval."""

from collections.abc import Sequence
from typing import Any

from linearize.benchmarks import page, plots
from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.page import Cell, Data, Section
from linearize.benchmarks.plots import Point
from linearize.benchmarks.report_format import DASH, counted, ends, span
from linearize.benchmarks.summary import number, percent
from linearize.benchmarks.verdicts import of_interval, tone

__all__ = ["harness_section", "letters_section", "tasks_section"]


def tasks_section(result: dict[str, Any]) -> Section:
    """Accuracy on every task, what is kept of it above guessing, and both ways to score a choice."""
    found = result.get("tasks") or ({} if result.get("choices") is None else {"questions": result["choices"]})
    if not found:
        return page.section("Multiple choice and last words")
    rows, mean = result["rows"], result.get("task_mean")
    body = []
    for name in rows:
        line: list[str | Cell] = [name]
        for task in found.values():
            score = _score(task, name)
            # What the original keeps of itself says nothing.
            verdict = "" if name == BASELINE else tone(of_interval(score["retention"]["ci95"], 1, "higher"))
            line.append(Cell(percent(score["accuracy"]), verdict))
        if mean is not None:
            kept = mean["rows"][name]["retention_over_chance"]
            verdict = "" if name == BASELINE else tone(of_interval(kept["ci95"], 1, "higher"))
            line.append(percent(mean["rows"][name]["accuracy"]))
            line.append(DASH if name == BASELINE or kept["value"] is None else Cell(percent(kept["value"]), verdict))
            line.append(DASH if name == BASELINE else span(kept["ci95"], percent))
        body.append(line)
    head = ["row", *found]
    if mean is not None:
        head += ["mean", "kept above guessing", "95 % interval"]
    counts = "; ".join(
        f"{name}: {task['n_items']} questions; guessing gives {percent(task['chance'])}" for name, task in found.items()
    )
    figure = _kept_figure(rows, found, mean) if plots.available() else ""
    return page.section(
        "Multiple choice and last words",
        page.paragraph(f"{counts}."),
        page.table("Accuracy by task; higher is better", head, body, strong=STUDENT, data=_tasks_data(rows, found)),
        page.figures(figure),
        *(page.details(f"{name}, both ways to score", _task_tables(rows, name, task)) for name, task in found.items()),
        page.paragraph(
            "Choices are scored by log-likelihood per byte (normalised) and by log-likelihood (raw); last words by "
            "whether greedy decoding writes them. Kept is the row’s accuracy over the original’s; above guessing, "
            "after taking away from both what guessing gives. Marks follow the interval of what is kept. Where the "
            "original is not clearly above guessing, tables have a dash, and the task is left out of the figure.",
            "small",
        ),
    )


def _score(task: dict[str, Any], row: str) -> dict[str, Any]:
    scores = task["rows"][row]
    return scores.get("normalised", scores["raw"])


def _tasks_data(rows: Sequence[str], found: dict[str, Any]) -> Data:
    head = ["task", "items", "chance", "row", "score", "accuracy", "low", "high"]
    head += ["kept", "low", "high", "kept above guessing", "low", "high"]
    lines: list[list[Any]] = []
    for name, task in found.items():
        for row in rows:
            for kind in ("normalised", "raw"):
                score = task["rows"][row].get(kind)
                if score is not None:
                    line = [name, task["n_items"], task["chance"], row, kind, score["accuracy"], *ends(score["ci95"])]
                    for kept in (score["retention"], score["retention_over_chance"]):
                        line += [kept["value"], *ends(kept["ci95"])]
                    lines.append(line)
    return Data("tasks", head, lines)


def _kept_figure(rows: Sequence[str], found: dict[str, Any], mean: dict[str, Any] | None) -> str:
    """What the student keeps above guessing, task by task, and what every row keeps on average."""
    points = []
    if STUDENT in rows:
        for name, task in found.items():
            kept = _score(task, STUDENT)["retention_over_chance"]
            if kept["value"] is not None and kept["ci95"] is not None:
                points.append(Point(STUDENT, kept["value"], kept["ci95"], f"student, {name}"))
    for name in rows if mean is not None else ():
        kept = mean["rows"][name]["retention_over_chance"] if mean is not None else {}
        if name != BASELINE and kept["value"] is not None:
            points.append(Point(name, kept["value"], kept["ci95"], f"{name}, mean"))
    if not points:
        return ""
    title = "Accuracy kept above guessing"
    data = Data(
        "kept",
        ["what", "kept above guessing", "low", "high"],
        [[point.label, point.value, *ends(point.ci95)] for point in points],
    )
    svg = plots.plot_intervals("kept", title, points, "share of the original's; right is better", 1)
    return page.figure(svg, f"{title}, with 95 % intervals. At the line: as much as the original.", data)


def _task_tables(rows: Sequence[str], task_name: str, task: dict[str, Any]) -> str:
    tables = []
    for kind, how in (("normalised", "choice by log-likelihood per byte"), ("raw", "choice by log-likelihood")):
        if kind not in task["rows"][BASELINE]:
            continue
        if "normalised" not in task["rows"][BASELINE]:
            how = "the word that greedy decoding writes"
        body = []
        for name in rows:
            score = task["rows"][name][kind]
            line: list[str | Cell] = [name, percent(score["accuracy"]), span(score["ci95"], percent)]
            for kept in (score["retention"], score["retention_over_chance"]):
                if name == BASELINE or kept["value"] is None:
                    line += [DASH, DASH]
                else:
                    verdict = tone(of_interval(kept["ci95"], 1, "higher"))
                    line += [Cell(percent(kept["value"]), verdict), span(kept["ci95"], percent)]
            body.append(line)
        head = ["row", "accuracy", "95 % interval", "kept", "95 % interval", "kept above guessing", "95 % interval"]
        tables.append(page.table(f"{task_name}: {how} ({kind})", head, body, strong=STUDENT))
    return "\n".join(tables)


def letters_section(result: dict[str, Any]) -> Section:
    """Choices by letter: accuracy over all orders, and whether a row likes a letter rather than an answer."""
    letters = result.get("letters")
    title = "Choice by letter"
    if not letters:
        return page.section(title)
    parts = []
    for name, task in letters.items():
        pairs = {pair["row"]: pair for pair in task["comparisons"] if pair["against"] == BASELINE}
        body, rows = [], []
        for row_name in result["rows"]:
            row, pair = task["rows"][row_name], pairs.get(row_name)
            verdict = "" if pair is None else tone(of_interval(pair["ci95"], 0, "higher"))
            line: list[str | Cell] = [row_name, Cell(percent(row["accuracy"]), verdict), span(row["ci95"], percent)]
            line += [percent(row["consistency"]), percent(row["letter_distance"]), *map(percent, row["letters"])]
            body.append(line)
            shares = row["consistency"], row["letter_distance"], *row["letters"]
            rows.append([row_name, row["accuracy"], *ends(row["ci95"]), *shares])
        body.append(["where they are right", "", "", "", "", *map(percent, task["true"])])
        head = ["row", "accuracy", "95 % interval", "same in all orders", "off the right letters", *task["letters"]]
        columns = ["row", "accuracy", "low", "high", "consistency", "letter distance", *task["letters"]]
        guess = (
            f"guessing gives {percent(task['chance'])}, the same in all orders {percent(task['chance_consistency'])}"
        )
        caption = f"{name}: {counted(task['n_items'], 'question')} in every cyclic order of their choices; {guess}"
        data = Data(f"letters-{page.slug(name)}", columns, rows)
        parts.append(page.table(caption, head, body, strong=STUDENT, data=data))
    return page.section(
        title,
        *parts,
        page.paragraph(
            "The likeliest letter after the choices is the answer. The last columns say how often each letter is "
            "chosen: a row that likes one letter has lost the question. Off the right letters: half the sum of the "
            "differences between how often letters are chosen and are right. Marks: the 95 % interval of the paired "
            "difference in accuracy from the original leaves out zero.",
            "small",
        ),
    )


def harness_section(result: dict[str, Any]) -> Section:
    """Tasks of lm-evaluation-harness, every metric of every row."""
    tasks = result.get("lm_eval")
    title = "Tasks of lm-evaluation-harness"
    if not tasks:
        return page.section(title)
    rows = result["rows"]
    body, lines = [], []
    for name, task in tasks.items():
        for metric in task["rows"][BASELINE]:
            line: list[str | Cell] = [
                f"{name}, {metric}",
                "all" if task["n_samples"] is None else str(task["n_samples"]),
            ]
            for row in rows:
                found = task["rows"][row][metric]
                kept = found["retention_over_chance"] or {"value": None, "ci95": None}
                verdict = "" if row == BASELINE else tone(of_interval(kept["ci95"], 1, "higher"))
                error = "" if found["stderr"] is None else f" ± {number(found['stderr'])}"
                line.append(Cell(number(found["value"]) + error, verdict))
                about = name, task["version"], task["n_samples"], task["chance"], metric, row
                lines.append([*about, found["value"], found["stderr"], kept["value"], *ends(kept["ci95"])])
            body.append(line)
    columns = ["task", "version", "samples", "chance", "metric", "row", "value", "standard error"]
    data = Data("lm-eval", [*columns, "kept above chance", "low", "high"], lines)
    return page.section(
        title,
        page.table("Value ± standard error, by task and metric", ["task", "samples", *rows], body, data=data),
        page.paragraph(
            "As the library measures them, with its own prompts. Marks are on accuracies alone: the 95 % interval of "
            "what is kept above chance leaves out 100 %.",
            "small",
        ),
    )
