"""The report's section on recall: needles in long texts."""

from collections.abc import Sequence
from typing import Any

from linearize.benchmarks import page
from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.heat import Grid, plot_heat
from linearize.benchmarks.page import Cell, Data, Section
from linearize.benchmarks.report_format import counted
from linearize.benchmarks.summary import percent
from linearize.benchmarks.verdicts import of_counts, tone

__all__ = ["needles_section"]


def needles_section(result: dict[str, Any]) -> Section:
    """Numbers hidden in long texts: a heat map of rows by length and depth, and both scores as tables."""
    needle = result.get("needle")
    if needle is None:
        return page.section("Needle in a haystack")
    rows, first = result["rows"], next(iter(needle["rows"].values()))
    trials = sorted({cell["trials"] for cell in first["cells"]})
    parts = []
    for score, title in (("greedy", "Written"), ("first", "Ranked first")):
        caption = f"{title}, by tokens of the text and depth; prompts a cell: {' or '.join(map(str, trials))}"
        data = Data(
            f"needles-{score}",
            ["row", "kind", "keys", "length", "depth", "trials", title.lower()],
            [
                [name, *_kind(cell), cell["length"], cell["depth"], cell["trials"], cell[score]]
                for name in rows
                for cell in needle["rows"][name]["cells"]
            ],
        )
        table = _needle_table(rows, needle, score, caption, data)
        parts.append(page.subsection(title, table, _needle_maps(rows, needle, score)))
    return page.section(
        "Needle in a haystack",
        *parts,
        page.paragraph(
            "A sentence with a number hides in held-out text. Written: greedy decoding repeats it exactly. "
            f"Ranked first: it is likelier than {needle['candidates'] - 1} other numbers; guessing gives "
            f"{percent(needle['chance_first'])}. Depth 0 % is the start of the text. A needle near the end may still "
            "be in the window: compare with the row window + sinks. Marks: the 95 % interval of the difference from "
            "the original's share leaves out zero (Newcombe's, prompts taken as independent).",
            "small",
        ),
    )


Kind = tuple[str, int | None]


def _kind(cell: dict[str, Any]) -> Kind:
    """What hides in a cell: the kind of needle and how many keys; nothing of it in older files."""
    return str(cell.get("kind", "")), cell.get("keys")


def _kind_title(kind: Kind) -> str:
    name, keys = kind
    return ", ".join(part for part in (name, "" if keys is None else counted(keys, "key")) if part)


def _needle_table(rows: Sequence[str], needle: dict[str, Any], score: str, caption: str, data: Data) -> str:
    """All prompts, then every length, of each kind where there are several."""
    first = next(iter(needle["rows"].values()))["cells"]
    groups = list(dict.fromkeys((_kind(cell), cell["length"]) for cell in first))
    several = len({kind for kind, _ in groups}) > 1

    def counts(name: str, group: tuple[Kind, int] | None) -> tuple[int, int]:
        cells = [cell for cell in needle["rows"][name]["cells"] if group in (None, (_kind(cell), cell["length"]))]
        return sum(round(cell[score] * cell["trials"]) for cell in cells), sum(cell["trials"] for cell in cells)

    body = []
    for name in rows:
        line: list[str | Cell] = [name]
        for group in (None, *groups):
            hits, trials = counts(name, group)
            verdict = "" if name == BASELINE else tone(of_counts(hits, counts(BASELINE, group)[0], trials))
            line.append(Cell(f"{hits} of {trials}", verdict))
        body.append(line)
    titles = [f"{_kind_title(kind)}, {length}" if several else str(length) for kind, length in groups]
    return page.table(caption, ["row", "all", *titles], body, strong=STUDENT, data=data)


def _needle_maps(rows: Sequence[str], needle: dict[str, Any], score: str) -> str:
    """One picture a kind: rows down, depths of every length across."""
    pictures = []
    first = next(iter(needle["rows"].values()))["cells"]
    for index, kind in enumerate(dict.fromkeys(map(_kind, first))):
        found = {name: [cell for cell in needle["rows"][name]["cells"] if _kind(cell) == kind] for name in rows}
        cells = found[rows[0]]
        if len(cells) < 2:
            continue
        lengths = [cell["length"] for cell in cells]
        values = [[cell[score] for cell in found[name]] for name in rows]
        grid = Grid(
            rows,
            [percent(cell["depth"]) for cell in cells],
            values,
            groups=[(f"{length} tokens", lengths.count(length)) for length in dict.fromkeys(lengths)],
            low=0.0,
            high=1.0,
            column_title="depth",
        )
        title = "Share of needles found, by length and depth" + (f": {_kind_title(kind)}" if _kind_title(kind) else "")
        svg = plot_heat(f"needles-{score}{index}", title, grid)
        head = ["row", *(f"{cell['length']} at {percent(cell['depth'])}" for cell in cells)]
        data = Data(f"needles-{score}-map{index}", head, [[name, *row] for name, row in zip(rows, values)])
        pictures.append(page.figure(svg, f"{title}. The stronger the colour, the more.", data))
    return page.figures(*pictures)
