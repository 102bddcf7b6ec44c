"""The report's plots as inline SVG, drawn with matplotlib where it is installed; heat maps without it.

Colours are placeholders in matplotlib and CSS variables in the SVG, so that a plot follows the page into dark mode.
Figures are as wide as a phone's column, so that their text stays readable where they are shown smallest.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.summary import CONTROL, STATE_OFF, WINDOW_OFF, WINDOW_SINKS
from linearize.benchmarks.training_log import HeatMap

__all__ = [
    "COLORS",
    "attention_map",
    "available",
    "plot_cache",
    "plot_curve",
    "plot_decode",
    "plot_heat",
    "plot_positions",
]

# CSS variable -> the placeholder that matplotlib draws with. No two alike, none used by matplotlib itself.
COLORS = {
    "--ink": "#010101",
    "--grid": "#010102",
    "--original": "#010103",
    "--control": "#010104",
    "--window-sinks": "#010105",
    "--student": "#010106",
    "--state-off": "#010107",
    "--window-off": "#010108",
    "--other": "#010109",
}
# Row -> colour, line style and marker: rows differ without colour too.
STYLES = {
    BASELINE: ("--original", "-", "o"),
    CONTROL: ("--control", "--", "s"),
    WINDOW_SINKS: ("--window-sinks", "-.", "^"),
    STUDENT: ("--student", "-", "D"),
    STATE_OFF: ("--state-off", ":", "v"),
    WINDOW_OFF: ("--window-off", ":", "P"),
}
OTHER = ("--other", "--", "x")
WIDTH, HEIGHT = 4.6, 3.1
SHADES = 10  # of a heat map


def available() -> bool:
    """Whether matplotlib can be imported."""
    return find_spec("matplotlib") is not None


def _style(row: str) -> dict[str, Any]:
    color, line, marker = STYLES.get(row, OTHER)
    return {"color": COLORS[color], "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.5}


def _svg(name: str, label: str, draw: Callable[[Any], None]) -> str:
    """Draw on one pair of axes and return the SVG element.

    Args:
        name: prefix of every id in the SVG; several SVGs in one page must not share any.
        label: what the plot shows, for those who cannot see it.
        draw: given the axes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    ink, grid = COLORS["--ink"], COLORS["--grid"]
    settings = {
        "svg.fonttype": "path",
        "svg.hashsalt": name,
        "font.size": 10,
        "axes.edgecolor": grid,
        "axes.labelcolor": ink,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "text.color": ink,
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 2.6,
    }
    # rc_context, and a figure without pyplot: a user's own settings and backend stay what they are.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context({**defaults, **settings}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    """A whole SVG document -> an element for a page: own ids, CSS colours, a label, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    for variable, placeholder in COLORS.items():
        svg = svg.replace(placeholder, f"var({variable})")
    # matplotlib's stylesheet names every element of the page; its two properties go on the root instead.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None, "matplotlib writes a viewBox"
    root = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} '
    root += f'role="img" aria-label="{label}" stroke-linejoin="round" stroke-linecap="butt">'
    return root + svg[svg.index(">") + 1 :].strip()


def _plain_ticks(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Labels like 30 and 4096 on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if ticks is not None:
        axis.set_ticks(list(ticks))
        axis.set_minor_locator(NullLocator())
    else:
        low, high = axis.get_view_interval()
        subs = (1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Any, rows: int) -> None:
    """Above the plot, where it covers no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2 if rows > 1 else 1, borderaxespad=0.2)


def plot_positions(perplexity: dict[str, Any]) -> str:
    """Perplexity by position in the sequence; both axes logarithmic."""

    def draw(axes: Any) -> None:
        shown = 0
        for name, row in perplexity["rows"].items():
            bins = [b for b in row["by_position"] if b["ppl"] is not None]
            if bins:
                # A bin stands at its geometric middle.
                middles = [(b["start"] * b["end"]) ** 0.5 for b in bins]
                axes.plot(middles, [b["ppl"] for b in bins], label=name, **_style(name))
                shown += 1
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        edges = [b["start"] for b in next(iter(perplexity["rows"].values()))["by_position"]]
        _plain_ticks(axes.xaxis, [*edges[1:], perplexity["seq_len"]] if len(edges) > 1 else None)
        _plain_ticks(axes.yaxis)
        axes.set_xlabel("tokens before the predicted one")
        axes.set_ylabel("perplexity")
        if shown:
            _legend(axes, shown)

    return _svg("positions", "Perplexity by position, one line a row", draw)


def plot_curve(name: str, tokens: Sequence[float], values: Sequence[float], label: str, logarithmic: bool) -> str:
    """One number of a stage over the tokens read; `logarithmic` where it is above 0 throughout."""

    def draw(axes: Any) -> None:
        axes.plot(tokens, values, color=COLORS["--student"], linewidth=1.3)
        if logarithmic and min(values) > 0:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        elif not logarithmic:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)

    return _svg(name, f"{label} by tokens read", draw)


def plot_heat(name: str, heat: HeatMap) -> str:
    """Losses of layers over the tokens read, the darker the higher, in `SHADES` equal steps of the logarithm.

    Written by hand, because matplotlib has no colours that follow the page's theme, and no element for many cells.
    """
    known = [loss for losses in heat.losses for loss in losses if loss is not None]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    steps = max(math.log(high / low), 1e-9)
    columns = len(heat.edges) - 1
    row, left, right, label = 10 if len(heat.layers) < 40 else 7, 26, 440, "font: 10px var(--sans); fill: var(--ink)"
    wide, bottom = (right - left) / columns, row * len(heat.layers)
    cells: list[list[str]] = [[] for _ in range(SHADES)]
    for index, losses in enumerate(heat.losses):
        for column, loss in enumerate(losses):
            if loss is not None:
                shade = min(int(SHADES * math.log(loss / low) / steps), SHADES - 1)
                cells[shade].append(f"M{left + wide * column:.2f} {row * index}h{wide:.2f}v{row}h-{wide:.2f}z")
    parts = [
        f'<path style="fill: var(--student); fill-opacity: {_opacity(shade)}" d="{"".join(drawn)}"/>'
        for shade, drawn in enumerate(cells)
        if drawn
    ]
    every = max(1, -(-len(heat.layers) // 12))
    for index, layer in list(enumerate(heat.layers))[::every]:
        parts.append(_text(left - 5, row * index + row - 1, html.escape(layer), "end", label))
    first, last = (f"{edge:,.0f}".replace(",", " ") for edge in (heat.edges[0], heat.edges[-1]))
    parts.append(_text(left, bottom + 13, first, "start", label))
    parts.append(_text(right, bottom + 13, f"{last} tokens", "end", label))
    parts.append(_text(left, bottom + 34, f"{low:.3g}", "start", label))
    for shade in range(SHADES):
        style = f"fill: var(--student); fill-opacity: {_opacity(shade)}"
        parts.append(f'<path style="{style}" d="M{left + 56 + 16 * shade} {bottom + 25}h16v10h-16z"/>')
    parts.append(_text(left + 62 + 16 * SHADES, bottom + 34, f"{high:.3g}", "start", label))
    said = f"Loss of {len(heat.layers)} layers over {columns} spans of tokens, from {low:.3g} to {high:.3g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 4} {bottom + 40}" role="img" id="{name}" '
        f'aria-label="{said}">{"".join(parts)}</svg>'
    )


def attention_map(attention: dict[str, Any], rows: Sequence[str], part: str = "older", name: str = "attention") -> str:
    """How much attention each head of each layer gives to one part, one panel a row of the comparison, the darker the
    more, in `SHADES` equal steps from 0 to 1.

    Beside the original's, a student's panel of what is `"older"` than the window shows whether its state is read.

    Args:
        attention: the part of evaluate.json.
        rows: those of its rows that are shown, from left to right, two or three on a narrow page.
        part: `"sinks"`, `"window"` or `"older"`.
        name: the id of the SVG; several in one page must not share it.
    """
    shown = {row: attention["rows"][row]["layers"] for row in rows}
    layers = sorted({layer["layer"] for found in shown.values() for layer in found})
    height, top, left, right, gap = 10 if len(layers) < 40 else 7, 18, 26, 440, 10
    label = "font: 10px var(--sans); fill: var(--ink)"
    panel, bottom = (right - left - gap * (len(shown) - 1)) / len(shown), top + height * len(layers)
    cells: list[list[str]] = [[] for _ in range(SHADES)]
    parts, said = [], []
    for number, (row, found) in enumerate(shown.items()):
        begin = left + number * (panel + gap)
        parts.append(_text(begin, top - 6, html.escape(row), "start", label))
        for layer in found:
            wide, y = panel / len(layer[part]), top + height * layers.index(layer["layer"])
            for head, share in enumerate(layer[part]):
                shade = min(int(SHADES * share), SHADES - 1)
                cells[shade].append(f"M{begin + wide * head:.2f} {y}h{wide:.2f}v{height}h-{wide:.2f}z")
        said.append(f"{row} {attention['rows'][row]['mean'][part]:.2f}")
    parts += [
        f'<path style="fill: var(--student); fill-opacity: {_opacity(shade)}" d="{"".join(drawn)}"/>'
        for shade, drawn in enumerate(cells)
        if drawn
    ]
    for index, layer in list(enumerate(layers))[:: max(1, -(-len(layers) // 12))]:
        parts.append(_text(left - 5, top + height * index + height - 1, str(layer), "end", label))
    parts.append(_text(left, bottom + 13, "layers down, heads across", "start", label))
    parts.append(_text(left, bottom + 34, "0", "start", label))
    for shade in range(SHADES):
        style = f"fill: var(--student); fill-opacity: {_opacity(shade)}"
        parts.append(f'<path style="{style}" d="M{left + 12 + 16 * shade} {bottom + 25}h16v10h-16z"/>')
    parts.append(_text(left + 18 + 16 * SHADES, bottom + 34, "1", "start", label))
    title = html.escape(f"Attention on {part}, by layer and head, on the mean: {', '.join(said)}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 4} {bottom + 40}" role="img" id="{name}" '
        f'aria-label="{title}">{"".join(parts)}</svg>'
    )


def _opacity(shade: int) -> str:
    return f"{0.05 + 0.95 * shade / (SHADES - 1):.2f}"


def _text(x: float, y: float, text: str, anchor: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" style="{style}">{text}</text>'


def _series(result: dict[str, Any], batch: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        if cell["batch"] == batch:
            series.setdefault((cell["row"], cell["mode"]), []).append(cell)
    return series


def _contexts(axes: Any, result: dict[str, Any]) -> None:
    axes.set_xscale("log", base=2)
    _plain_ticks(axes.xaxis, result["contexts"])
    axes.set_xlabel("context in tokens")


# Mode -> line style; the first is the row's own.
MODE_LINES = {"static": "--", "static+compile": "-.", "compile": ":"}


def plot_decode(result: dict[str, Any], batch: int) -> str:
    """Milliseconds per token by context at one batch, with the range of the repeats."""

    def draw(axes: Any) -> None:
        series = _series(result, batch)
        for (row, mode), cells in series.items():
            times = [cell["ms_per_token"] for cell in cells]
            below = [t["p50"] - min(t["min"], t["p50"]) for t in times]
            above = [max(t["max"], t["p50"]) - t["p50"] for t in times]
            style = _style(row)
            if mode in MODE_LINES:
                style |= {"linestyle": MODE_LINES[mode], "markerfacecolor": "none"}
            label = row if len(result["modes"][row]) == 1 else f"{row}, {mode}"
            middles = [t["p50"] for t in times]
            contexts = [cell["context"] for cell in cells]
            axes.errorbar(contexts, middles, yerr=[below, above], label=label, capsize=2, elinewidth=0.8, **style)
        _contexts(axes, result)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("ms per token")
        _legend(axes, len(series))

    return _svg(f"decode{batch}", "Milliseconds per token by context, one line a row and mode", draw)


def plot_cache(result: dict[str, Any]) -> str:
    """Bytes of each row's smallest cache by context at the smallest batch, both axes logarithmic."""

    def draw(axes: Any) -> None:
        held: dict[str, dict[int, float]] = {}
        for (row, _), cells in _series(result, result["batches"][0]).items():
            for cell in cells:
                total, known = cell["cache_bytes"]["total"] / 2**20, held.setdefault(row, {})
                known[cell["context"]] = min(known.get(cell["context"], total), total)
        for row, by_context in held.items():
            axes.plot(list(by_context), list(by_context.values()), label=row, **_style(row))
        _contexts(axes, result)
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
        axes.set_ylabel("cache, MiB")
        _legend(axes, 2)

    return _svg("cache", "Bytes of the cache by context, one line a row", draw)
