"""One Markdown table of evaluations: what a distillation kept, row by row, beside all that it must be compared with.

Run it as `python -m linearize.benchmarks.distillation_table [LABEL=]evaluate.json ... --out table.md`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path
from typing import Any

from linearize.benchmarks.evaluate import BASELINE, KIND, STUDENT
from linearize.benchmarks.files import read_json, write_text
from linearize.benchmarks.items import named_path
from linearize.console import human_tokens
from linearize.errors import LinearizeError

__all__ = ["grid", "main", "ratio_cell", "ratios", "table", "with_interval"]

NOTHING = "–"
Cell = Callable[[str], str]
# What the student's perplexity is divided by, and what the quotient says.
OVER = {
    BASELINE: "original",
    "control": "control",
    "window + sinks": "window + sinks, untrained",
    "window + sinks, trained": "window + sinks, trained the same way: the state's worth",
    "student, state off": "itself with the state off",
}

LEGEND = """\
Perplexity: with its 95 % interval, bootstrapped over sequences. Tasks: accuracy; in brackets what is kept of the \
original's above guessing, (s - r) / (t - r), with a paired 95 % interval. Needle: the hidden number is written \
greedily; in brackets, ranked first of ten. KL: from the original, nats per token. Ended, repeated, loops: greedy \
answers that end themselves, mean share of 4-grams written before, answers that end in a loop. Length: of an answer, \
over the original's."""


def table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The table, what its cells hold, and the student's perplexity over that of other rows.

    Args:
        results: (label, evaluate.json). Columns are those of all results together; a result without one has a dash.
            Rows that are the same in all of them, as an original and its control are, stand once, first.
    """
    measured = [
        {row: {head: cell(row) for head, cell in _columns(result).items()} for row in result["rows"]}
        for _, result in results
    ]
    shared = [row for row in measured[0] if all(rows.get(row) == measured[0][row] for rows in measured)]
    lines = [(row, measured[0][row]) for row in shared]
    quotients: list[tuple[str, dict[str, str]]] = []
    for (label, result), rows in zip(results, measured, strict=True):
        lines += [(f"{label}: {row}", cells) for row, cells in rows.items() if row not in shared]
        for row, what in OVER.items():
            name = f"{label}, over {what}" if len(results) > 1 else f"over {what}"
            if cells := ratios(result, row):
                quotients.append((name, cells))
    notes = dict.fromkeys(note for _, result in results for note in result["notes"])
    parts = [grid("row", lines), LEGEND, *notes]
    if quotients:
        told = "Perplexity of the student over that of another row, with a paired 95 % interval:"
        parts += [told, grid("student", quotients)]
    return "\n\n".join(parts) + "\n"


def grid(corner: str, lines: Sequence[tuple[str, dict[str, str]]]) -> str:
    """A Markdown table: a line for each (name, head -> cell), the columns of all lines together."""
    heads = list(dict.fromkeys(head for _, cells in lines for head in cells))
    written = [[corner, *heads], ["---", *["---:"] * len(heads)]]
    written += [[name, *(cells.get(head, NOTHING) for head in heads)] for name, cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in written)


def ratios(result: dict[str, Any], row: str) -> dict[str, str]:
    """For each text and context the student's perplexity over that of a row; nothing where they were not compared."""
    return {
        f"{text} at {human_tokens(part['seq_len'])}": ratio_cell(found)
        for text, by_context in result["texts"].items()
        for part in by_context.values()
        for found in part["comparisons"]
        if (found["row"], found["against"]) == (STUDENT, row)
    }


def ratio_cell(comparison: dict[str, Any]) -> str:
    """`0.98 (0.97 to 0.99)`: the quotient of two perplexities by their difference in nats, as far as it is known."""
    if comparison["nll_difference"] is None:
        return NOTHING
    known = f"{exp(comparison['nll_difference']):.3f}"
    if comparison["ci95"] is None:
        return known
    return f"{known} ({' to '.join(f'{exp(end):.3f}' for end in comparison['ci95'])})"


def _columns(result: dict[str, Any]) -> dict[str, Cell]:
    """Head -> what the cell of a row says."""
    columns: dict[str, Cell] = {"tokens seen": lambda row: _tokens(result["tokens_seen"].get(row))}
    for text, by_context in result["texts"].items():
        for part in by_context.values():
            columns[f"{text} at {human_tokens(part['seq_len'])}"] = _perplexity(part)
    for name, task in result["tasks"].items():
        columns[name] = _task(task)
    if result["task_mean"] and len(result["tasks"]) > 1:
        columns["all tasks"] = _kept(result["task_mean"])
    needle, kl, generation = result["needle"], result["kl"], result["generation"]
    if needle:
        for place, length in enumerate(part["length"] for part in needle["rows"][BASELINE]["lengths"]):
            columns[f"needle at {human_tokens(length)}"] = _needle(needle, place)
    if kl:
        columns["KL"] = lambda row: "0" if row == BASELINE else with_interval(kl["rows"][row], "kl", "ci95", 3)
    if generation:
        rows = generation["rows"]
        columns["ended"] = lambda row: _percent(rows[row]["end_rate"])
        columns["repeated"] = lambda row: _percent(rows[row]["repetition"])
        columns["loops"] = lambda row: _percent(rows[row]["loop_rate"])
        columns["length"] = lambda row: with_interval(rows[row], "length_ratio", "length_ratio_ci95", 2)
    return columns


def _perplexity(part: dict[str, Any]) -> Cell:
    return lambda row: with_interval(part["rows"][row], "ppl", "ppl_ci95", 2)


def _task(task: dict[str, Any]) -> Cell:
    def cell(row: str) -> str:
        score = task["rows"][row].get("normalised", task["rows"][row]["raw"])
        return _accuracy(score, row)

    return cell


def _kept(mean: dict[str, Any]) -> Cell:
    return lambda row: _accuracy(mean["rows"][row], row)


def _accuracy(score: dict[str, Any], row: str) -> str:
    kept = score["retention_over_chance"]
    # What the original keeps of itself says nothing.
    text = "" if row == BASELINE else f" ({with_interval(kept, 'value', 'ci95', 2)})"
    return f"{100 * score['accuracy']:.1f} %{text}"


def _needle(needle: dict[str, Any], place: int) -> Cell:
    def cell(row: str) -> str:
        part = needle["rows"][row]["lengths"][place]
        return f"{_percent(part['greedy'])} ({_percent(part['first'])})"

    return cell


def _tokens(count: int | None) -> str:
    return NOTHING if count is None else f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def with_interval(part: dict[str, Any], value: str, ends: str, decimals: int) -> str:
    """`23.61 (17.08 to 29.42)`, as far as it is known."""
    if part[value] is None:
        return NOTHING
    known = f"{part[value]:.{decimals}f}"
    if part[ends] is None:
        return known
    joint = ", " if value == "value" else " ("
    span = " to ".join(f"{end:.{decimals}f}" for end in part[ends])
    return f"{known}{joint}{span}{'' if value == 'value' else ')'}"


def main(words: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m linearize.benchmarks.distillation_table", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="[LABEL=]RESULT", help="what `linearize evaluate` wrote")
    parser.add_argument("--out", type=Path, help="the Markdown file; standard output if left out")
    options = parser.parse_args(words)
    try:
        results = []
        for given in options.results:
            label, path = named_path(given, "results")
            results.append((label, read_json(path, KIND)))
        text = table(results)
    except LinearizeError as error:
        sys.exit(f"error: {error}")
    if options.out is None:
        print(text, end="")
    else:
        print(write_text(options.out, text))


if __name__ == "__main__":
    main()
