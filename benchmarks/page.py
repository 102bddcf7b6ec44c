"""The parts of the report page: HTML elements with escaped text.

A new section takes three steps: numbers as `Data`, a `figure` or a `table` of them, and `section(title, ...)` in the
list that `page` is given. Contents, downloads, keyboard focus and printing follow from that:

    def times_section(result):
        if result.get("times") is None:
            return page.section("Times")                       # without a body: left out
        lines = [Line(row, found["context"], found["ms"]) for row, found in result["times"].items()]
        svg = plots.plot_lines("times", "Time by context", lines, "context in tokens", "ms")
        rows = [[line.row, *pair] for line in lines for pair in zip(line.x, line.y)]
        data = Data("times", ["row", "context", "ms"], rows)
        return page.section("Times", page.figure(svg, "Time by context.", data))

A title is used once in a page, and so is the name of a figure and of `Data`.
"""

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from urllib.parse import quote

from linearize.benchmarks.headline import Claim
from linearize.benchmarks.page_style import STYLE
from linearize.benchmarks.summary import Sentence, number

__all__ = [
    "Cell",
    "Data",
    "Section",
    "claims",
    "definitions",
    "details",
    "figure",
    "figures",
    "page",
    "paragraph",
    "preformatted",
    "section",
    "sentences",
    "slug",
    "subsection",
    "table",
]

# What a sentence's mark says to those who do not see it.
TONES = {"good": ("+", "good: "), "bad": ("−", "bad: "), "open": ("?", "undecided: "), "note": ("·", "note: ")}
# What a claim's tone is called, in words for everyone.
VERDICTS = {
    "good": "+ better",
    "bad": "− worse",
    "open": "= no difference measured",
    "unclear": "? cannot tell",
    "missing": "· not measured",
}
# The mark after a number in a table: a sign besides the colour, and words for those who see neither.
MARKS = {"good": ("✓", ", better than the original"), "bad": ("✗", ", worse than the original")}

Value = str | int | float | None


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, and how it compares with the original.

    `tone` is `"good"`, `"bad"`, or empty where no difference was measured or there is nothing to compare with.
    """

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Data:
    """Numbers as they are, for a download and for the table below a figure.

    Attributes:
        name: of the file, without its ending; letters, digits and dashes.
        head: column titles.
        rows: one value a column; None for what is not known.
    """

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[Value]]

    def csv(self) -> str:
        """Comma-separated, every number with all its digits, None as an empty field."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([self.head, *self.rows])
        return file.getvalue()


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own; `anchor` is what the table of contents leads to."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        return slug(self.title)


def slug(text: str) -> str:
    """A title as an id or a file name: lower case, dashes for all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def escape(text: str) -> str:
    """Text for a page: escaped, and no line breaks between a number and its unit."""
    return html.escape(re.sub(r"(?<=\d) (?=(?:%|ms|bytes|KiB|MiB|GiB)(?!\w))", "\N{NO-BREAK SPACE}", text))


def section(title: str, *parts: str) -> Section:
    """A heading and what follows. Without parts `page` leaves it out."""
    return Section(title, "\n".join(part for part in parts if part))


def subsection(title: str, *parts: str) -> str:
    """A smaller heading and what follows; nothing at all without parts."""
    body = "\n".join(part for part in parts if part)
    return f"<h3>{escape(title)}</h3>\n{body}" if body else ""


def paragraph(text: str, css: str = "") -> str:
    """One paragraph of plain text."""
    attribute = f' class="{escape(css)}"' if css else ""
    return f"<p{attribute}>{escape(text)}</p>"


def sentences(found: Sequence[Sentence]) -> str:
    """Findings as a list, each with the mark of its tone."""
    items = []
    for sentence in found:
        mark, spoken = TONES[sentence.tone]
        items.append(
            f'<li class="{sentence.tone}"><span class="mark" aria-hidden="true">{mark}</span>'
            f'<span><span class="spoken">{spoken}</span>{escape(sentence.text)}</span></li>'
        )
    return f'<ul class="findings">\n{"".join(items)}\n</ul>' if items else ""


def claims(found: Sequence[Claim]) -> str:
    """The headline's numbers, each with its verdict in words and what it was measured on."""
    items = []
    for claim in found:
        value = f'<strong class="value">{escape(claim.value)}</strong> ' if claim.value else ""
        basis = f'<p class="basis">{escape(claim.basis)}</p>' if claim.basis else ""
        items.append(
            f'<li class="{claim.tone}"><h3>{escape(claim.topic)}</h3>'
            f'<p class="verdict">{VERDICTS[claim.tone]}</p>'
            f"<p>{value}{escape(claim.text)}</p>{basis}</li>"
        )
    return f'<ul class="claims">\n{"".join(items)}\n</ul>' if items else ""


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str | Cell]], strong: str = "", data: Data | None = None
) -> str:
    """A table in a box of its own that scrolls sideways on a narrow screen and can be reached with the keyboard.

    Args:
        caption: what it shows.
        head: column titles.
        rows: as many cells each; the first is the row's title.
        strong: rows with this title are set off.
        data: the same numbers with all their digits, offered as a file.
    """
    title = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = []
    for first, *rest in rows:
        text = first.text if isinstance(first, Cell) else first
        css = ' class="strong"' if text == strong else ""
        body.append(f'<tr{css}><th scope="row">{escape(text)}</th>{"".join(map(_cell, rest))}</tr>')
    link = "" if data is None else f" {_download(data)}"
    # The caption stands outside: inside, it would be as wide as the table and scroll away with it.
    return (
        f'<figure class="tabular"><figcaption>{escape(caption)}{link}</figcaption>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>\n'
        f"<thead><tr>{title}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table></div></figure>"
    )


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    if not cell.tone:
        return f"<td>{escape(cell.text)}</td>"
    mark, spoken = MARKS[cell.tone]
    return (
        f'<td class="{cell.tone}">{escape(cell.text)}<span class="sign" aria-hidden="true">{mark}</span>'
        f'<span class="spoken">{spoken}</span></td>'
    )


def _download(data: Data) -> str:
    """A link that saves the numbers as a file; they are in the page itself."""
    name = f"{data.name}.csv"
    return f'<a class="save" download="{name}" href="data:text/csv;charset=utf-8,{quote(data.csv())}">{name}</a>'


def figure(svg: str, caption: str, data: Data | None = None) -> str:
    """A plot with its caption, and its numbers as a table and as a file.

    Args:
        svg: trusted; it comes from `linearize.benchmarks.plots` or `linearize.benchmarks.heat`. It has its own title
            and description.
        caption: what it shows.
        data: what it was drawn from.
    """
    below = ""
    if data is not None:
        rows = [[_shown(value) for value in row] for row in data.rows]
        below = "\n" + details("The same as numbers", table(caption, data.head, rows, data=data), css="data")
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>{below}\n</figure>"


def _shown(value: Value) -> str:
    """Whole numbers in full, others with three digits."""
    if isinstance(value, int):
        return str(value).replace("-", "−")
    return number(value) if isinstance(value, float) or value is None else value


def figures(*found: str) -> str:
    """Figures side by side where there is room; nothing at all without figures."""
    body = "\n".join(part for part in found if part)
    return f'<div class="plots">\n{body}\n</div>' if body else ""


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """Terms and what they are; pairs with an empty text are left out."""
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in pairs if text)
    return f"<dl>{items}</dl>" if items else ""


def preformatted(summary: str, text: str) -> str:
    """A text as it stands in a file, folded away under a line that opens it."""
    box = f'<pre class="scroll" tabindex="0" role="region" aria-label="{escape(summary)}">{escape(text)}</pre>'
    return details(summary, box)


def details(summary: str, body: str, css: str = "") -> str:
    """Elements folded away under a line that opens them. Those of the class `data` are left out in print."""
    attribute = f' class="{escape(css)}"' if css else ""
    return f"<details{attribute}><summary>{escape(summary)}</summary>\n{body}\n</details>"


def page(title: str, subtitle: str, description: str, sections: Sequence[Section]) -> str:
    """The whole document. Needs nothing from outside: no script, no font, no image.

    Args:
        title: of the page.
        subtitle: the line below it.
        description: one sentence for those who list the page; browsers do not show it.
        sections: those without a body are left out.
    """
    shown = [part for part in sections if part.body]
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in shown)
    body = "\n".join(
        f'<section id="{part.anchor}" aria-labelledby="{part.anchor}-title">\n'
        f'<h2 id="{part.anchor}-title">{escape(part.title)}</h2>\n{part.body}\n</section>'
        for part in shown
    )
    return PAGE.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        description=escape(description),
        style=STYLE,
        links=links,
        body=body,
    )


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="description" content="$description">
<title>$title</title>
<style>$style</style>
</head>
<body>
<a class="skip" href="#content">Skip to the results</a>
<header>
<h1>$title</h1>
<p class="lead">$subtitle</p>
</header>
<nav aria-label="Contents"><ul>$links</ul></nav>
<main id="content" tabindex="-1">
$body
</main>
</body>
</html>
""")
