"""The report's section on where attention goes: on sinks, on the window, on everything older, by layer and head."""

from typing import Any

from linearize.benchmarks import page
from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.heat import Grid, plot_heat
from linearize.benchmarks.page import Data, Section
from linearize.benchmarks.report_format import DASH, counted, share
from linearize.benchmarks.summary import percent

__all__ = ["attention_section"]

# Part -> what a map of it is called.
PARTS = {"sinks": "the sinks", "window": "the window", "older": "all that is older (in a student, its state)"}


def attention_section(result: dict[str, Any]) -> Section:
    """Means of every row, and the original beside the student as heat maps of layers by heads."""
    attention = result.get("attention")
    title = "Where attention goes"
    if attention is None:
        return page.section(title)
    rows = attention["rows"]
    body = []
    for name, row in rows.items():
        bypassed = row["bypassed"]
        told = DASH if bypassed is None or name == BASELINE else f"{bypassed['heads']} of {bypassed['of']}"
        body.append([name, *(percent(row["mean"][part]) for part in PARTS), told, f"{row['window']}, {row['sinks']}"])
    head = ["row", *PARTS, "heads that bypass the state", "window, sinks"]
    sequences = counted(attention["n_sequences"], "sequence")
    caption = f"Mean share of attention, on {sequences} of {attention['seq_len']} tokens of {attention['text']}"
    missing = "; ".join(f"{name}: {why}" for name, why in attention["not_measured"].items())
    shown = [name for name in (BASELINE, STUDENT) if name in rows]
    maps = [_map(part, name, rows[name]["layers"]) for part in PARTS for name in shown]
    return page.section(
        title,
        page.table(caption, head, body, strong=STUDENT, data=_data(rows)),
        page.paragraph(f"Not measured: {missing}.") if missing else "",
        page.figures(*maps),
        page.paragraph(
            "The stronger the colour, the more. Means over queries that have something older than the window to look "
            "at; the three shares sum to 100 %. A head bypasses the state where the original looks back there and the "
            "student does not: such a state carries nothing, whatever the perplexity says.",
            "small",
        ),
    )


def _map(part: str, name: str, layers: list[dict[str, Any]]) -> str:
    labels, values = [str(layer["layer"]) for layer in layers], [layer[part] for layer in layers]
    heads = [str(head) for head in range(max(map(len, values)))]
    title = f"{name}: share on {PARTS[part]}"
    key = f"attention-{part}-{page.slug(name)}"
    grid = Grid(labels, heads, values, low=0.0, high=1.0, row_title="layers", column_title="heads", form=share)
    data = Data(key, ["layer", *(f"head {head}" for head in heads)], [[n, *row] for n, row in zip(labels, values)])
    return page.figure(plot_heat(key, title, grid), f"{title}.", data)


def _data(rows: dict[str, Any]) -> Data:
    """One line a row of the comparison, layer and head."""
    lines = [
        [name, layer["layer"], head, *shares]
        for name, row in rows.items()
        for layer in row["layers"]
        for head, shares in enumerate(zip(*(layer[part] for part in PARTS)))
    ]
    return Data("attention", ["row", "layer", "head", *PARTS], lines)
