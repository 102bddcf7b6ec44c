"""Heat maps as inline SVG, written by hand: colours that follow the page's theme, and few elements for many cells."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from linearize.benchmarks.summary import number

__all__ = ["SHADES", "Grid", "plot_heat"]

SHADES = 10
LEFT, RIGHT = 26.0, 440.0  # of the cells, in units of about a pixel; labels of rows stand left of them
CHAR = 6.4  # width of a character
LABEL_CHARS = 22  # longer labels of rows are cut; the table below a figure has them whole


@dataclass(frozen=True)
class Grid:
    """What a heat map shows: `values[i][j]` of row i and column j, None where there is none.

    Attributes:
        rows, columns: their labels. Two labels for more columns stand at the ends.
        groups: a label for so many columns each, from the left, below the columns' own; none where empty.
        values: one list a row, all equally long.
        low, high: values of the weakest and the strongest shade; those of the values where None.
        logarithmic: equal steps of shade are equal ratios; every value is above 0.
        row_title, column_title: what the labels are, in a word or two.
        form: a value as a cell says it.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    groups: Sequence[tuple[str, int]] = ()
    low: float | None = None
    high: float | None = None
    logarithmic: bool = False
    row_title: str = ""
    column_title: str = ""
    form: Callable[[float], str] = number


def plot_heat(name: str, title: str, grid: Grid) -> str:
    """The stronger the colour the higher, in `SHADES` equal steps; cells that are wide enough say their number.

    Args:
        name: prefix of every id in the SVG.
        title: what it shows.
        grid: see `Grid`.
    """
    known = [value for row in grid.values for value in row if value is not None]
    low = grid.low if grid.low is not None else min(known, default=0.0)
    high = grid.high if grid.high is not None else max(known, default=1.0)
    columns = max(map(len, grid.values), default=1)
    labels = [text if len(text) <= LABEL_CHARS else f"{text[: LABEL_CHARS - 1]}…" for text in grid.rows]
    left = LEFT + CHAR * max(0, max(map(len, labels), default=0) - 4)
    wide = (RIGHT - left) / columns
    told = wide >= CHAR * max((len(grid.form(value)) for value in known), default=0) + 4
    tall = 22 if told else 14 if len(grid.rows) <= 16 else 10 if len(grid.rows) < 40 else 7
    top, label = (16 if grid.row_title or grid.column_title else 0), "font: 11px var(--sans); fill: var(--ink)"
    cells: list[list[str]] = [[] for _ in range(SHADES)]
    parts: list[str] = []
    for index, row in enumerate(grid.values):
        for column, value in enumerate(row):
            if value is None:
                continue
            shade = _shade(value, low, high, grid.logarithmic)
            x, y = left + wide * column, top + tall * index
            cells[shade].append(f"M{x:.2f} {y}h{wide:.2f}v{tall}h-{wide:.2f}z")
            if told:
                ink = "var(--paper)" if shade >= SHADES * 0.6 else "var(--ink)"
                style = f"font: 11px var(--sans); fill: {ink}"
                parts.append(_text(x + wide / 2, y + tall / 2 + 3.5, grid.form(value), "middle", style))
    drawn = [
        f'<path style="fill: var(--student); fill-opacity: {_opacity(shade)}" d="{"".join(paths)}"/>'
        for shade, paths in enumerate(cells)
        if paths
    ]
    bottom = top + tall * len(grid.rows)
    every = max(1, -(-len(grid.rows) // 12)) if tall < 12 else 1
    for index, text in list(enumerate(labels))[::every]:
        parts.append(_text(left - 5, top + tall * index + tall / 2 + 4, text, "end", label))
    parts += _column_labels(grid, left, wide, columns, bottom, label)
    if grid.groups:
        at = left
        for text, count in grid.groups:
            parts.append(_text(at + wide * count / 2, bottom + 26, text, "middle", label))
            at += wide * count
            if at < RIGHT - 1:
                parts.append(f'<path style="stroke: var(--paper); stroke-width: 2" d="M{at:.2f} {top}V{bottom}"/>')
        bottom += 13
    if grid.row_title:
        parts.append(_text(0, 9, f"{grid.row_title} (down)", "start", label))
    if grid.column_title:
        parts.append(_text(RIGHT, 9, f"{grid.column_title} (across)", "end", label))
    parts += _scale(low, high, left, bottom, label)
    said = f"{len(grid.rows)} rows and {columns} columns; values from {number(low)} to {number(high)}."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {RIGHT + 4:g} {bottom + 40:g}" role="img" id="{name}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(said)}</desc>{"".join(drawn)}{"".join(parts)}</svg>'
    )


def _shade(value: float, low: float, high: float, logarithmic: bool) -> int:
    """0 to `SHADES` - 1. Values outside `low` to `high` have the shade of that end."""
    if logarithmic:
        share = math.log(value / low) / max(math.log(high / low), 1e-9)
    else:
        share = (value - low) / max(high - low, 1e-9)
    return min(max(int(SHADES * share), 0), SHADES - 1)


def _column_labels(grid: Grid, left: float, wide: float, columns: int, bottom: float, style: str) -> list[str]:
    """One under each column where there are as many and room for them; else from end to end."""
    widest = CHAR * max(map(len, grid.columns), default=0) + 4
    if len(grid.columns) == columns:
        every = max(1, math.ceil(widest / wide))
        return [
            _text(left + wide * (column + 0.5), bottom + 13, text, "middle", style)
            for column, text in list(enumerate(grid.columns))[::every]
        ]
    ends = [grid.columns[0], grid.columns[-1]] if len(grid.columns) > 1 else list(grid.columns)
    return [
        _text(x, bottom + 13, text, anchor, style) for x, text, anchor in zip((left, RIGHT), ends, ("start", "end"))
    ]


def _scale(low: float, high: float, left: float, bottom: float, style: str) -> list[str]:
    """The shades, with the values at both ends."""
    start = left + CHAR * len(number(low)) + 6
    parts = [_text(left, bottom + 34, number(low), "start", style)]
    for shade in range(SHADES):
        fill = f"fill: var(--student); fill-opacity: {_opacity(shade)}"
        parts.append(f'<path style="{fill}" d="M{start + 16 * shade:g} {bottom + 25:g}h16v10h-16z"/>')
    return [*parts, _text(start + 6 + 16 * SHADES, bottom + 34, number(high), "start", style)]


def _opacity(shade: int) -> str:
    return f"{0.05 + 0.95 * shade / (SHADES - 1):.2f}"


def _text(x: float, y: float, text: str, anchor: str, style: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" style="{style}">{html.escape(text)}</text>'
