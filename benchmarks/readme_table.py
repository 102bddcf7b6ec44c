"""README.md's table: a student beside its original and what it must be compared with, from one run's own files.

    python -m linearize.benchmarks.readme_table RUN                      prints it
    python -m linearize.benchmarks.readme_table RUN --write README.md    puts it between the two marks in that file

RUN holds evaluate.json and bench.json, as `linearize run` writes them. Nothing in the table is typed by hand.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from linearize.benchmarks.decode import read_bench
from linearize.benchmarks.distillation_table import grid, ratio_cell, with_interval
from linearize.benchmarks.evaluate import BASELINE, KIND, STUDENT
from linearize.benchmarks.files import read_json, write_text
from linearize.benchmarks.headline import headline, one_line, texts_of
from linearize.benchmarks.report_format import counted, span
from linearize.benchmarks.summary import (
    STATE_OFF,
    WINDOW_SINKS,
    cell_of,
    difference,
    number,
    percent,
    size,
    smallest_caches,
)
from linearize.console import human_tokens
from linearize.errors import LinearizeError
from linearize.rows import ORIGINAL_AGAIN

__all__ = ["BEGIN", "END", "main", "put", "readme_table"]

BEGIN = "<!-- begin: python -m linearize.benchmarks.readme_table RUN --write README.md -->"
END = "<!-- end -->"
ROWS = (BASELINE, WINDOW_SINKS, STUDENT, STATE_OFF)
Line = tuple[str, dict[str, str]]


def readme_table(quality: dict[str, Any], speed: dict[str, Any]) -> str:
    """A headline, the table and what it was measured on, as Markdown.

    Args:
        quality: an evaluate.json.
        speed: a bench.json.

    Raises:
        LinearizeError: no student was measured, or not the same rows in both.
    """
    for name, rows in (("evaluate.json", quality["rows"]), ("bench.json", speed["rows"])):
        if STUDENT not in rows:
            raise LinearizeError(f"{name}: it has no row {STUDENT!r} (rows: {', '.join(rows)}); measure a student")
    found = [*_perplexity(quality), *_needles(quality), *_accuracy(quality), *_decoding(speed), *_prefill(speed)]
    lines = [(name, {row: cells[row] for row in ROWS if row in cells}) for name, cells in found]
    return "\n\n".join([one_line(headline(quality, speed)), grid("", lines), _basis(quality, speed)])


def _per_row(result: dict[str, Any], cell: Callable[[str], str]) -> dict[str, str]:
    return {row: cell(row) for row in ROWS if row in result}


def _perplexity(quality: dict[str, Any]) -> Iterator[Line]:
    """Every text at its longest context, and what pairing its sequences tells beyond the intervals."""
    for text, contexts in texts_of(quality).items():
        part = contexts[max(contexts, key=int)]
        rows = part["rows"]
        name = f"perplexity, {text} at {human_tokens(part['seq_len'])} (95 %)"
        yield name, {row: with_interval(rows[row], "ppl", "ppl_ci95", 2) for row in ROWS if row in rows}
        pairs = {row: difference(part, row, BASELINE) for row in ROWS}
        yield (
            f"over the original's, {text} (95 %, paired)",
            {row: ratio_cell(pair) for row, pair in pairs.items() if pair},
        )


def _needles(quality: dict[str, Any]) -> Iterator[Line]:
    """Values written, of all prompts, and of those of the longest texts."""
    if quality["needle"] is None:
        return
    rows = quality["needle"]["rows"]

    def written(part: dict[str, Any]) -> str:
        return f"{round(part['greedy'] * part['trials'])} of {part['trials']}"

    yield "needles written", _per_row(rows, lambda row: written(rows[row]))
    longest = max(part["length"] for part in rows[BASELINE]["lengths"])
    yield (
        f"of these at {human_tokens(longest)}",
        {
            row: written(part)
            for row in ROWS
            if row in rows
            for part in rows[row]["lengths"]
            if part["length"] == longest
        },
    )


def _accuracy(quality: dict[str, Any]) -> Iterator[Line]:
    """The mean over all tasks, and what is kept of the original's above guessing."""
    mean = quality["task_mean"]
    if mean is None:
        return
    rows = mean["rows"]
    names = ", ".join(quality["tasks"])
    yield f"accuracy, mean of {names}", _per_row(rows, lambda row: percent(rows[row]["accuracy"]))

    def kept(row: str) -> str:
        found = rows[row]["retention_over_chance"]
        if found["value"] is None or found["ci95"] is None:
            return "cannot tell"
        return f"{percent(found['value'])} ({span(found['ci95'], percent)})"

    kept_by = _per_row(rows, kept)
    yield "kept above guessing (95 %)", {row: cell for row, cell in kept_by.items() if row != BASELINE}


def _decoding(speed: dict[str, Any]) -> Iterator[Line]:
    """Each context and batch: both in their best mode, then the quotient, then the caches that hold least."""
    pairs = [pair for pair in speed["comparisons"] if pair["row"] == STUDENT]
    pairs.sort(key=lambda pair: (pair["batch"], pair["context"]))
    held = smallest_caches(speed)
    for pair in pairs:
        place, modes = (pair["context"], pair["batch"]), {BASELINE: pair["baseline_mode"], STUDENT: pair["mode"]}
        cells = {row: cell_of(speed, row, *place, mode) for row, mode in modes.items()}
        yield (
            f"ms per token at {_place(speed, *place)}",
            {row: number(cell["ms_per_token"]["p50"]) for row, cell in cells.items()},
        )
        ratio = pair["speedup"]
        interval = f" ({span(ratio['ci95'], _ratio)})" if ratio["ci95"] else ""
        yield f"times as fast at {_place(speed, *place)} (95 %)", {STUDENT: f"{_ratio(ratio['p50'])}{interval}"}
    for pair in pairs:
        place = (pair["context"], pair["batch"])
        yield f"cache at {_place(speed, *place)}", {row: size(held[place][row]) for row in (BASELINE, STUDENT)}


def _prefill(speed: dict[str, Any]) -> Iterator[Line]:
    """The lengths that were asked for."""
    for length in sorted({part["length"] for part in speed["prefill"]}):
        found = {part["row"]: part for part in speed["prefill"] if part["length"] == length}
        yield (
            f"prefill of {human_tokens(length)}, s",
            {row: number(found[row]["ms"]["p50"] / 1000) for row in (BASELINE, STUDENT) if row in found},
        )


def _place(speed: dict[str, Any], context: int, batch: int) -> str:
    """A cell's place; the batch is said only where there are several."""
    return f"{human_tokens(context)}, batch {batch}" if len(speed["batches"]) > 1 else human_tokens(context)


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _basis(quality: dict[str, Any], speed: dict[str, Any]) -> str:
    """What the numbers were measured on, and how far the measurement of speed is from itself."""
    machine = speed["machine"]
    name = machine["cpu"]["model"] if str(speed["device"]).startswith("cpu") else machine["gpu"]["name"]
    dtypes = " and ".join(sorted(set(speed["dtypes"].values())))
    text = f"Time per token: {dtypes}, {name or 'unknown CPU'}, {counted(speed['threads'], 'thread')}, each row in its "
    text += "fastest mode"
    if any(cell["filled"] for cell in speed["cells"]):
        text += f"; contexts beyond {human_tokens(speed['fill'])} tokens filled in, not read"
    again = [pair for pair in speed["comparisons"] if pair["row"] == ORIGINAL_AGAIN]
    if again:
        most = max(abs(pair["speedup"]["p50"] - 1) for pair in again)
        text += f". The original timed twice differs from itself by up to {percent(most)}"
    commits = dict.fromkeys(str(result["machine"]["commit"]["hash"])[:7] for result in (quality, speed))
    return f"{text}. Code of commit {' and '.join(commits)}."


def put(text: str, table: str, where: str) -> str:
    """A file's text with the table between its two marks.

    Args:
        text: the file's.
        table: as `readme_table` gives it.
        where: the file's name, for the error.

    Raises:
        LinearizeError: the marks are not there once each, one after the other.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise LinearizeError(f"{where}: not one line {BEGIN!r} with {END!r} after it; write both where the table goes")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(words: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m linearize.benchmarks.readme_table", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder with evaluate.json and bench.json")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the file; standard output if left out")
    options = parser.parse_args(words)
    try:
        for name in ("evaluate.json", "bench.json"):
            if not (options.run / name).is_file():
                raise LinearizeError(f"run: {str(options.run)!r} has no {name}; `linearize run` writes both")
        table = readme_table(read_json(options.run / "evaluate.json", KIND), read_bench(options.run / "bench.json"))
        if options.write is None:
            print(table)
        else:
            text = put(options.write.read_text(encoding="utf-8"), table, str(options.write))
            print(write_text(options.write, text))
    except LinearizeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
