"""The report's sections on what a model predicts and writes: perplexity, divergence from the original, answers.

Each function takes a whole evaluate.json and gives one section, without a body where its part was not measured.
"""

from collections.abc import Sequence
from typing import Any

from linearize.benchmarks import page, plots
from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.headline import texts_of
from linearize.benchmarks.page import Cell, Data, Section
from linearize.benchmarks.plots import Line, Point
from linearize.benchmarks.report_format import DASH, counted, ends, signed, span
from linearize.benchmarks.summary import difference, number, percent
from linearize.benchmarks.verdicts import of_interval, tone

__all__ = ["answers_section", "divergence_section", "perplexity_section"]


def perplexity_section(result: dict[str, Any]) -> Section:
    """Every text at every context, the paired differences, and where in the sequence they come from."""
    texts = texts_of(result)
    if not texts:
        return page.section("Perplexity")
    data = _perplexity_data(result["rows"], texts)
    several = sum(map(len, texts.values())) > 1
    parts = [_contexts_table(result["rows"], texts, data)] if several else []
    for index, (text, contexts) in enumerate(texts.items()):
        longest = contexts[max(contexts, key=int)]
        body = [_paired_table(result["rows"], text, longest, None if several else data)]
        if plots.available():
            figures = _differences_figure(index, text, longest), _positions_figure(index, text, longest)
            body.append(page.figures(*figures))
        else:
            body.append(_positions_table(result["rows"], text, longest))
        title = f"{text}, {longest['seq_len']} tokens" if several else ""
        parts.append(page.subsection(title, *body) if title else "\n".join(body))
    return page.section(
        "Perplexity",
        *parts,
        page.paragraph(
            "The same tokens for every row. Intervals are bootstrapped over sequences; those of two rows may overlap "
            "and the rows still differ: the paired difference tells, and marks follow it. NLL is in nats per token.",
            "small",
        ),
    )


def _perplexity_data(rows: Sequence[str], texts: dict[str, dict[str, dict[str, Any]]]) -> Data:
    """One line a text, context and row."""
    head = ["text", "context", "row", "tokens", "perplexity", "low", "high"]
    head += ["NLL minus the original's", "low", "high"]
    lines: list[list[Any]] = []
    for text, contexts in texts.items():
        for context, found in contexts.items():
            for name in rows:
                row, pair = found["rows"][name], difference(found, name, BASELINE)
                line = [text, int(context), name, found["n_tokens"], row["ppl"], *ends(row["ppl_ci95"])]
                line += [None, None, None] if pair is None else [pair["nll_difference"], *ends(pair["ci95"])]
                lines.append(line)
    return Data("perplexity", head, lines)


def _verdict(found: dict[str, Any], row: str) -> str:
    pair = difference(found, row, BASELINE)
    return "" if pair is None else tone(of_interval(pair["ci95"], 0, "lower"))


def _contexts_table(rows: Sequence[str], texts: dict[str, dict[str, dict[str, Any]]], data: Data) -> str:
    columns = [(text, context) for text, contexts in texts.items() for context in contexts]
    body = []
    for name in rows:
        cells: list[str | Cell] = [name]
        for text, context in columns:
            found = texts[text][context]
            cells.append(Cell(number(found["rows"][name]["ppl"]), _verdict(found, name)))
        body.append(cells)
    head = ["row", *(f"{text}, {context}" for text, context in columns)]
    caption = "Perplexity, by text and tokens of a sequence; lower is better"
    return page.table(caption, head, body, strong=STUDENT, data=data)


def _paired_table(rows: Sequence[str], text: str, found: dict[str, Any], data: Data | None) -> str:
    body = []
    for name in rows:
        row, pair = found["rows"][name], difference(found, name, BASELINE)
        line: list[str | Cell] = [name, number(row["ppl"]), span(row["ppl_ci95"])]
        if pair is None:
            line += [DASH, DASH]
        else:
            line += [Cell(signed(pair["nll_difference"]), _verdict(found, name)), span(pair["ci95"])]
        body.append(line)
    head = ["row", "perplexity", "95 % interval", "NLL minus the original’s", "95 % interval, paired"]
    count = found["n_sequences"]
    sequences = f"{counted(count, 'sequence')} of {found['seq_len']}"
    caption = f"{text}: perplexity on {found['n_tokens']} held-out tokens in {sequences}, the same for every row"
    return page.table(caption, head, body, strong=STUDENT, data=data)


def _differences_figure(index: int, text: str, found: dict[str, Any]) -> str:
    pairs = [pair for pair in found["comparisons"] if pair["against"] == BASELINE]
    points = [
        Point(pair["row"], pair["nll_difference"], pair["ci95"]) for pair in pairs if pair["nll_difference"] is not None
    ]
    if not points:
        return ""
    title = f"{text}: NLL minus the original's, paired"
    data = Data(
        f"nll-differences-{page.slug(text)}",
        ["row", "NLL minus the original's", "low", "high"],
        [[point.row, point.value, *ends(point.ci95)] for point in points],
    )
    svg = plots.plot_intervals(f"differences{index}", title, points, "nats per token; right is worse", 0)
    return page.figure(svg, f"{title}, with 95 % intervals. At the line: as good as the original.", data)


def _positions_figure(index: int, text: str, found: dict[str, Any]) -> str:
    lines, rows = [], []
    for name, row in found["rows"].items():
        bins = [part for part in row["by_position"] if part["ppl"] is not None]
        rows += [[name, part["start"], part["end"], part["ppl"], *ends(part["ppl_ci95"])] for part in bins]
        if bins:
            # A bin stands at its geometric middle.
            middles = [(part["start"] * part["end"]) ** 0.5 for part in bins]
            lines.append(Line(name, middles, [part["ppl"] for part in bins]))
    if not lines:
        return ""
    edges = [part["start"] for part in next(iter(found["rows"].values()))["by_position"]]
    title = f"{text}: perplexity by position in the sequence"
    svg = plots.plot_lines(
        f"positions{index}",
        title,
        lines,
        "tokens before the predicted one",
        "perplexity",
        ticks=[*edges[1:], found["seq_len"]] if len(edges) > 1 else None,
    )
    data = Data(f"positions-{page.slug(text)}", ["row", "from", "to below", "perplexity", "low", "high"], rows)
    return page.figure(svg, f"{title}. Lower is better.", data)


def _positions_table(rows: Sequence[str], text: str, found: dict[str, Any]) -> str:
    """What stands for the figure where there is none."""
    bins = next(iter(found["rows"].values()))["by_position"]
    body = [[name, *(number(part["ppl"]) for part in found["rows"][name]["by_position"])] for name in rows]
    head = ["row", *(f"{part['start']}–{part['end'] - 1}" for part in bins)]
    caption = f"{text}: perplexity by the number of tokens before the predicted one"
    return page.table(caption, head, body, strong=STUDENT)


def divergence_section(result: dict[str, Any]) -> Section:
    """KL to the original per token."""
    kl = result.get("kl")
    if kl is None:
        return page.section("Divergence from the original")
    body, rows, points = [], [], []
    for name, row in kl["rows"].items():
        body.append([name, number(row["kl"]), span(row["ci95"])])
        rows.append([name, row["kl"], *ends(row["ci95"])])
        if row["kl"] is not None:
            points.append(Point(name, row["kl"], row["ci95"]))
    data = Data("divergence", ["row", "KL", "low", "high"], rows)
    count = kl["n_sequences"]
    caption = (
        f"KL(original || row) in nats per token, on {kl['text']}: {kl['n_tokens']} tokens in {count} "
        f"sequence{'' if count == 1 else 's'} of {kl['seq_len']}; 0 is the original itself"
    )
    lines = []
    for name, row in kl["rows"].items():
        # The axis is logarithmic, and rows with the original's weights agree exactly while their window covers all.
        bins = [part for part in row["by_position"] if part["kl"]]
        if bins:
            middles = [(part["start"] * part["end"]) ** 0.5 for part in bins]
            lines.append(Line(name, middles, [part["kl"] for part in bins]))
    figure = ""
    if lines and plots.available():
        title = "KL to the original by position in the sequence"
        svg = plots.plot_lines("kl", title, lines, "tokens before the predicted one", "KL, nats per token")
        by_position = Data(
            "divergence-positions",
            ["row", "from", "to below", "KL", "low", "high"],
            [
                [name, part["start"], part["end"], part["kl"], *ends(part["ci95"])]
                for name, row in kl["rows"].items()
                for part in row["by_position"]
            ],
        )
        figure = page.figure(svg, f"{title}. Lower is nearer.", by_position)
    return page.section(
        "Divergence from the original",
        page.table(caption, ["row", "KL", "95 % interval"], body, strong=STUDENT, data=data),
        page.figures(figure),
    )


def answers_section(result: dict[str, Any]) -> Section:
    """Whether greedy answers end, repeat themselves, and are as long as the original's; with some of them to read."""
    generation = result.get("generation")
    if generation is None:
        return page.section("Greedy answers")
    shares = {"end_rate": "end by themselves", "repetition": "repeated 4-grams", "loop_rate": "end in a loop"}
    body, rows = [], []
    for name, row in generation["rows"].items():
        ratio = DASH if name == BASELINE else number(row["length_ratio"])
        if name != BASELINE and row["length_ratio_ci95"] is not None:
            ratio += f" ({span(row['length_ratio_ci95'])})"
        told = [f"{percent(row[key])} ({span(row[f'{key}_ci95'], percent)})" for key in shares]
        body.append([name, *told, number(row["mean_length"]), ratio])
        line: list[Any] = [name]
        for key in shares:
            line += [row[key], *ends(row[f"{key}_ci95"])]
        rows.append([*line, row["mean_length"], row["length_ratio"], *ends(row["length_ratio_ci95"])])
    head = ["row", *shares.values(), "tokens, mean", "over the original’s"]
    columns = ["row", *(column for title in shares.values() for column in (title, "low", "high"))]
    columns += ["tokens, mean", "over the original's", "low", "high"]
    prompts, limit = counted(generation["n_prompts"], "prompt"), generation["max_new_tokens"]
    caption = f"Greedy answers to {prompts}, at most {limit} tokens; 95 % intervals"
    pairs = [
        (name, generation["rows"][name]["answers"][0])
        for name in generation["rows"]
        if generation["rows"][name]["answers"]
    ]
    return page.section(
        "Greedy answers",
        page.table(caption, head, body, strong=STUDENT, data=Data("answers", columns, rows)),
        page.details("Every row's answer to the first prompt", page.definitions(pairs)) if pairs else "",
    )
