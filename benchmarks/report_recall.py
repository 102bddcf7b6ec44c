"""The report's sections on recall: needles in long texts, and the probes of `linearize.benchmarks.recall`."""

from collections.abc import Sequence
from typing import Any

from linearize.benchmarks import page
from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.heat import Grid, plot_heat
from linearize.benchmarks.page import Cell, Data, Section
from linearize.benchmarks.report_format import counted, share, span
from linearize.benchmarks.summary import number, percent
from linearize.benchmarks.verdicts import of_counts, of_interval, tone

__all__ = ["needles_section", "recall_section"]


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
            "A sentence with a value, a number or a word, hides in held-out text; with several keys there are as many "
            "such sentences, and one is asked for. Written: greedy decoding repeats it exactly. "
            f"Ranked first: it is likelier than {needle['candidates'] - 1} others; guessing gives "
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
            form=share,
        )
        title = "Share of needles found, by length and depth" + (f": {_kind_title(kind)}" if _kind_title(kind) else "")
        svg = plot_heat(f"needles-{score}{index}", title, grid)
        head = ["row", *(f"{cell['length']} at {percent(cell['depth'])}" for cell in cells)]
        data = Data(f"needles-{score}-map{index}", head, [[name, *row] for name, row in zip(rows, values)])
        pictures.append(page.figure(svg, f"{title}. The stronger the colour, the more.", data))
    return page.figures(*pictures)


PROBES = {
    "associative": "pairs of words in a list, then asked for by their keys",
    "copy": "random tokens, then the same again",
    "induction": "pairs among random tokens; after the first of one, the second follows",
}
SCORES = {"first": "likelier than all other candidates", "greedy": "likeliest of the whole vocabulary"}


def recall_section(result: dict[str, Any]) -> Section:
    """Associative recall, copies and induction: what each row finds again, by length and number of pairs."""
    recall = result.get("recall")
    title = "Recall without training"
    if recall is None:
        return page.section(title)
    parts = []
    for probe, found in recall["probes"].items():
        told = PROBES.get(probe, "")
        intro = f"{told}: " if told else ""
        intro += f"{counted(found['n_answers'], 'answer')} in {counted(found['n_prompts'], 'prompt')}; guessing ranks "
        intro += f"{percent(found['chance_first'])} first."
        pictures = [_recall_map(result["rows"], probe, found, score) for score in SCORES]
        table = _recall_table(result["rows"], probe, found)
        intro = intro[0].upper() + intro[1:]
        parts.append(page.subsection(probe.capitalize(), page.paragraph(intro), table, page.figures(*pictures)))
    return page.section(
        title,
        *parts,
        page.paragraph(
            "First: the answer is " + SCORES["first"] + ". Written: it is the " + SCORES["greedy"] + ". Marks: the "
            "95 % interval of the paired difference from the original leaves out zero. The distance is the mean number "
            "of tokens from where an answer was said to where it is asked for; inside the window it needs no state.",
            "small",
        ),
    )


def _recall_table(rows: Sequence[str], probe: str, found: dict[str, Any]) -> str:
    pairs = {pair["row"]: pair for pair in found["comparisons"] if pair["against"] == BASELINE}
    columns = {"length": "length", "pairs": "pairs", "distance": "distance", "answers": "answers"}
    columns |= {"chance of first": "chance_first", "first": "first", "written": "greedy", "NLL": "nll"}
    body, lines = [], []
    for name in rows:
        row, pair = found["rows"][name], pairs.get(name)
        line: list[str | Cell] = [name]
        for score in SCORES:
            verdict = "" if pair is None else tone(of_interval(pair[f"{score}_ci95"], 0, "higher"))
            line += [Cell(percent(row[score]), verdict), span(row[f"{score}_ci95"], percent)]
        body.append([*line, number(row["nll"])])
        for cell in row["cells"]:
            lines.append([name, *(cell[key] for key in columns.values())])
    head = ["row", "first", "95 % interval", "written", "95 % interval", "NLL of the answers"]
    data = Data(f"recall-{page.slug(probe)}", ["row", *columns], lines)
    return page.table(f"{probe}: share of answers found", head, body, strong=STUDENT, data=data)


def _recall_map(rows: Sequence[str], probe: str, found: dict[str, Any], score: str) -> str:
    """Rows down, lengths and numbers of pairs across; nothing where there is one cell, which the table has."""
    cells = found["rows"][rows[0]]["cells"]
    if len(cells) < 2:
        return ""
    lengths = [cell["length"] for cell in cells]
    several = len({cell["pairs"] for cell in cells}) > 1
    columns = [f"{cell['pairs']} pairs" if several else f"{cell['distance']:.0f} back" for cell in cells]
    values = [[cell[score] for cell in found["rows"][name]["cells"]] for name in rows]
    groups = [(f"{length} tokens", lengths.count(length)) for length in dict.fromkeys(lengths)]
    title = f"{probe}: share of answers {'ranked first' if score == 'first' else 'written'}"
    svg = plot_heat(
        f"recall-{page.slug(probe)}-{score}",
        title,
        Grid(rows, columns, values, groups=groups, low=0.0, high=1.0, form=share),
    )
    head = ["row", *(f"{cell['length']}, {column}" for cell, column in zip(cells, columns))]
    data = Data(f"recall-{page.slug(probe)}-{score}", head, [[name, *row] for name, row in zip(rows, values)])
    return page.figure(svg, f"{title}. The stronger the colour, the more.", data)
