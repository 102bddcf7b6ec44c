"""The report's line plots as inline SVG, drawn with matplotlib where it is installed.

Colours are placeholders in matplotlib and CSS variables in the SVG, so that a plot follows the page into dark mode.
Text stays text, in the page's font: it can be read aloud, searched and selected, and keeps files small. Figures are as
wide as a phone's column, so that their text stays readable where they are shown smallest.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.summary import CONTROL, STATE_OFF, WINDOW_OFF, WINDOW_SINKS, number

__all__ = ["COLORS", "Line", "Point", "available", "plot_curve", "plot_intervals", "plot_lines"]

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
    "--trained": "#01010a",
}
# Row -> colour, line style and marker: rows differ without colour too.
STYLES = {
    BASELINE: ("--original", "-", "o"),
    CONTROL: ("--control", "--", "s"),
    WINDOW_SINKS: ("--window-sinks", "-.", "^"),
    f"{WINDOW_SINKS}, trained": ("--trained", "-.", "<"),
    STUDENT: ("--student", "-", "D"),
    STATE_OFF: ("--state-off", ":", "v"),
    WINDOW_OFF: ("--window-off", ":", "P"),
}
OTHER = ("--other", "--", "x")
WIDTH, HEIGHT = 4.6, 3.3
LABEL_HEIGHT = 0.056  # of one line of a label, in parts of the axes' height
LABEL_CHARS = 16  # beside a line; longer labels are broken after a comma or a space
AXES_WIDTH = 195.0  # about, in points, beside labels
DIGIT_WIDTH = 6.5  # of ticks, in points


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        row: whose it is; gives the colour, line style and marker.
        x, y: its points, in order of x.
        low, high: ends of the interval at each point; none are drawn without them.
        label: what stands beside it; the row's name where empty.
        hollow: set off from another line of the same row by dashes and hollow markers.
    """

    row: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    label: str = ""
    hollow: bool = False

    @property
    def name(self) -> str:
        return self.label or self.row


@dataclass(frozen=True)
class Point:
    """One row of `plot_intervals`: a value and the ends of its interval, None without one."""

    row: str
    value: float
    ci95: Sequence[float] | None
    label: str = ""


def available() -> bool:
    """Whether matplotlib can be imported."""
    return find_spec("matplotlib") is not None


def _style(row: str, hollow: bool = False) -> dict[str, Any]:
    color, line, marker = STYLES.get(row, OTHER)
    style = {"color": COLORS[color], "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.5}
    return style | {"linestyle": "--", "markerfacecolor": "none"} if hollow else style


def _svg(name: str, title: str, description: str, draw: Callable[[Any], None], height: float = HEIGHT) -> str:
    """Draw on one pair of axes and return the SVG element.

    Args:
        name: prefix of every id in the SVG; several SVGs in one page must not share any.
        title, description: what the plot shows, for those who cannot see it.
        draw: given the axes.
        height: in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    ink, grid = COLORS["--ink"], COLORS["--grid"]
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a row's name may hold dollars
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
    }
    # rc_context, and a figure without pyplot: a user's own settings and backend stay what they are.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context({**defaults, **settings}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, title, description)


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """A whole SVG document -> an element for a page: own ids, CSS colours and font, a title, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"(font: [\d.]+px |font-family: )[^;\"]+", r"\1var(--sans)", svg)
    for variable, placeholder in COLORS.items():
        svg = svg.replace(placeholder, f"var({variable})")
    # matplotlib's stylesheet names every element of the page; its two properties go on the root instead.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None, "matplotlib writes a viewBox"
    root = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} role="img" '
    root += f'aria-labelledby="{name}-title {name}-desc" stroke-linejoin="round" stroke-linecap="butt">'
    root += f'<title id="{name}-title">{html.escape(title)}</title>'
    root += f'<desc id="{name}-desc">{html.escape(description)}</desc>'
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


def legible(ticks: Sequence[float], low: float, high: float) -> list[float]:
    """Those of the ticks, from the largest down, whose labels do not touch on a logarithmic axis from low to high."""
    kept: list[float] = []
    for tick in sorted(ticks, reverse=True):
        widths = [DIGIT_WIDTH * (len(f"{value:g}") + 1) for value in (tick, kept[-1] if kept else tick)]
        apart = AXES_WIDTH * math.log(kept[-1] / tick) / max(math.log(high / low), 1e-9) if kept else math.inf
        if apart >= sum(widths) / 2:
            kept.append(tick)
    return kept[::-1]


def _broken(label: str, chars: int = LABEL_CHARS) -> str:
    """A label of more than `chars` in two lines, broken after its last comma, or at its last space."""
    if len(label) <= chars or " " not in label:
        return label
    cut = label.rfind(", ") + 1 or label.rfind(" ", 0, chars + 1)
    return label if cut <= 0 else f"{label[:cut].rstrip()}\n{label[cut:].lstrip()}"


def spread_labels(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Middles of labels, as near to the wanted ones as they come without overlap, from `low` to `high`.

    Args:
        wanted, heights: one a label, in any order.
        low, high: where labels may stand; too many of them reach beyond `low`.
    """
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    # Groups of touching labels, each centred on the mean of what its members want.
    groups: list[tuple[list[int], float]] = []
    for index in order:
        members, bottom = [index], wanted[index] - heights[index] / 2
        while True:
            total = sum(heights[i] for i in members)
            bottom = max(min(bottom, high - total), low)
            if not groups or groups[-1][1] + sum(heights[i] for i in groups[-1][0]) <= bottom + 1e-9:
                break
            members = groups.pop()[0] + members
            offsets, at = [], 0.0
            for i in members:
                offsets.append(wanted[i] - at - heights[i] / 2)
                at += heights[i]
            bottom = sum(offsets) / len(offsets)
        groups.append((members, bottom))
    places = [0.0] * len(wanted)
    for members, bottom in groups:
        for index in members:
            places[index] = bottom + heights[index] / 2
            bottom += heights[index]
    return places


def _label_lines(axes: Any, lines: Sequence[Line]) -> None:
    """Names beside the ends of lines, in their colours, moved apart where they would overlap."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((line.x[-1], line.y[-1])) for line in lines]
    labels = [_broken(line.name) for line in lines]
    heights = [LABEL_HEIGHT * (1 + label.count("\n")) for label in labels]
    places = spread_labels([float(end[1]) for end in ends], heights, -0.12, 1.06)
    for line, label, end, place in zip(lines, labels, ends, places):
        color = _style(line.row)["color"]
        axes.annotate(
            label,
            xy=(float(end[0]), float(end[1])),
            xytext=(1.06, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            ha="left",
            fontsize=9,
            linespacing=1.05,
            color=color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": color, "shrinkA": 1, "shrinkB": 3},
        )


def plot_lines(
    name: str,
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    ticks: Sequence[float] | None = None,
) -> str:
    """Lines over logarithmic axes, each with its name beside it, with its intervals where it has them.

    Args:
        name: of the figure; see `_svg`.
        title: what it shows.
        lines: at least one; those without a point are left out.
        x_label, y_label: of the axes, with units.
        ticks: where the x axis is labelled, as far as there is room; by itself where None.

    Raises:
        ValueError: a number that is not above 0, for which such an axis has no place.
    """
    shown = [line for line in lines if len(line.x)]
    for line in shown:
        if min((*line.x, *line.y, *(line.low or ()))) <= 0:
            raise ValueError(f"{name}: {line.name} has a number that is not above 0")

    def draw(axes: Any) -> None:
        for line in shown:
            bars = None
            if line.low is not None and line.high is not None:
                bars = [
                    [max(y - low, 0.0) for y, low in zip(line.y, line.low)],
                    [max(high - y, 0.0) for y, high in zip(line.y, line.high)],
                ]
            axes.errorbar(
                line.x, line.y, yerr=bars, capsize=2, elinewidth=0.8, **_style(line.row, line.hollow), label=line.name
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        within = [x for line in shown for x in line.x]
        _plain_ticks(axes.xaxis, None if ticks is None else legible(ticks, min(within), max(within)))
        _plain_ticks(axes.yaxis)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _label_lines(axes, shown)

    said = " ".join(
        f"{line.name}: {number(line.y[0])} at {line.x[0]:g}"
        + (f", {number(line.y[-1])} at {line.x[-1]:g}." if len(line.x) > 1 else ".")
        for line in shown
    )
    return _svg(name, title, f"{y_label} over {x_label}, both logarithmic. {said}", draw)


def plot_intervals(name: str, title: str, points: Sequence[Point], x_label: str, neutral: float) -> str:
    """Values with their intervals, one below the other, beside a line at "no difference".

    Args:
        name: of the figure; see `_svg`.
        title: what it shows.
        points: from the top.
        x_label: of the axis, with its unit.
        neutral: 0 for differences, 1 for ratios.
    """

    def draw(axes: Any) -> None:
        places = range(len(points), 0, -1)
        for place, point in zip(places, points):
            bars = None
            if point.ci95 is not None:
                low, high = point.ci95
                bars = [[max(point.value - low, 0.0)], [max(high - point.value, 0.0)]]
            style = _style(point.row) | {"linestyle": "none", "markersize": 5}
            axes.errorbar([point.value], [place], xerr=bars, capsize=3, elinewidth=1.2, **style)
        axes.axvline(neutral, color=COLORS["--ink"], linewidth=0.8, zorder=1)
        axes.set_yticks(list(places), [_broken(point.label or point.row, 22) for point in points])
        axes.set_ylim(0.4, len(points) + 0.6)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(x_label)

    said = " ".join(
        f"{point.label or point.row}: {number(point.value)}"
        + ("." if point.ci95 is None else f" ({number(point.ci95[0])} to {number(point.ci95[1])}).")
        for point in points
    )
    return _svg(name, title, said, draw, height=0.75 + 0.33 * len(points))


def plot_curve(
    name: str, title: str, tokens: Sequence[float], values: Sequence[float], label: str, logarithmic: bool
) -> str:
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

    said = f"{label} from {number(values[0])} at {tokens[0]:g} tokens to {number(values[-1])} at {tokens[-1]:g}."
    return _svg(name, title, said, draw, height=2.6)
