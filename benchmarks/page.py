"""The parts of the report page: HTML elements with escaped text, and the stylesheet."""

import html
import re
from collections.abc import Sequence
from string import Template

from linearize.benchmarks.summary import Sentence

__all__ = [
    "definitions",
    "details",
    "figure",
    "page",
    "paragraph",
    "preformatted",
    "section",
    "sentences",
    "subsection",
    "table",
]

# What a sentence's mark says to those who do not see it.
TONES = {"good": ("+", "good: "), "bad": ("−", "bad: "), "open": ("?", "undecided: "), "note": ("·", "note: ")}


def escape(text: str) -> str:
    """Text for a page: escaped, and no line breaks between a number and its unit."""
    return html.escape(re.sub(r"(?<=\d) (?=(?:%|ms|bytes|KiB|MiB|GiB)(?!\w))", "\N{NO-BREAK SPACE}", text))


def section(title: str, *parts: str) -> str:
    """A heading and what follows; nothing at all without parts."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


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


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], strong: str = "") -> str:
    """A table in a container of its own that scrolls sideways on a narrow screen.

    Args:
        caption: what it shows.
        head: column titles.
        rows: as many texts each; the first is the row's title.
        strong: rows with this title are set off.
    """
    title = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = []
    for first, *rest in rows:
        css = ' class="strong"' if first == strong else ""
        cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
        body.append(f'<tr{css}><th scope="row">{escape(first)}</th>{cells}</tr>')
    # The caption stands outside: inside, it would be as wide as the table and scroll away with it.
    return (
        f'<p class="caption">{escape(caption)}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>\n'
        f"<thead><tr>{title}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )


def figure(svg: str, caption: str) -> str:
    """A plot with its caption. `svg` is trusted: it comes from `linearize.benchmarks.plots`."""
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """Terms and what they are; pairs with an empty text are left out."""
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in pairs if text)
    return f"<dl>{items}</dl>" if items else ""


def preformatted(summary: str, text: str) -> str:
    """A text as it stands in a file, folded away under a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n<pre>{escape(text)}</pre></details>"


def details(summary: str, body: str) -> str:
    """Elements folded away under a line that opens them."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def page(title: str, subtitle: str, body: Sequence[str]) -> str:
    """The whole document. Needs nothing from outside: no script, no font, no image."""
    return PAGE.substitute(
        title=escape(title), subtitle=escape(subtitle), style=STYLE, body="\n".join(part for part in body if part)
    )


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p class="lead">$subtitle</p>
</header>
$body
</main>
</body>
</html>
""")

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfcf9; --raised: #f5f3ec; --ink: #1f1e1b; --soft: #66625a; --grid: #d9d5ca;
  --good: #1d6f42; --bad: #a8321f; --open: #8a6100;
  --original: #55524b; --control: #2f6db3; --window-sinks: #b26a00; --student: #b0234b;
  --state-off: #7a4fb0; --window-off: #12807a; --other: #8a857a;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Sitka Text", Cambria, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #171614; --raised: #211f1c; --ink: #e9e6df; --soft: #a49f94; --grid: #3c3933;
    --good: #74c793; --bad: #f0907d; --open: #dfb356;
    --original: #bdb8ac; --control: #7fb2ea; --window-sinks: #e5a44a; --student: #f2839f;
    --state-off: #bb9bea; --window-off: #5cc5bd; --other: #8f897d;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1.0625rem/1.55 var(--serif); }
main { max-width: 62rem; margin: 0 auto; padding: clamp(1.25rem, 5vw, 3.5rem) clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.4rem); line-height: 1.15; letter-spacing: -0.012em; font-weight: 600;
  margin: 0; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.25; font-weight: 600; margin: 0 0 0.9rem; }
h3 { font: 600 0.95rem/1.4 var(--sans); color: var(--soft); margin: 1.25rem 0 0.3rem; }
section { margin-top: 2.75rem; padding-top: 1.25rem; border-top: 1px solid var(--grid); }
p { margin: 0 0 0.9rem; max-width: 42rem; text-wrap: pretty; }
.lead { color: var(--soft); margin-top: 0.6rem; overflow-wrap: anywhere; }
.small { font: 0.85rem/1.5 var(--sans); color: var(--soft); }
.findings { list-style: none; margin: 0 0 1rem; padding: 0; max-width: 46rem; }
.findings li { display: flex; gap: 0.7rem; padding: 0.35rem 0; }
.findings li > span:last-child { text-wrap: pretty; }
.mark { flex: none; width: 1.4rem; height: 1.4rem; margin-top: 0.12rem; border-radius: 50%; border: 1px solid;
  font: 600 0.85rem/1.3rem var(--sans); text-align: center; }
.good .mark { color: var(--good); }
.bad .mark { color: var(--bad); }
.open .mark { color: var(--open); }
.note { color: var(--soft); }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.scroll { overflow-x: auto; margin: 0 0 1.5rem; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--control); outline-offset: 2px; }
table { border-collapse: collapse; font: 0.875rem/1.4 var(--sans); font-variant-numeric: tabular-nums lining-nums;
  min-width: 100%; }
.caption { font: 0.875rem/1.45 var(--sans); color: var(--soft); margin: 1rem 0 0.4rem; }
th, td { padding: 0.42rem 0 0.42rem 1.25rem; text-align: right; white-space: nowrap; }
thead th { font-weight: 500; color: var(--soft); border-bottom: 1px solid var(--ink); vertical-align: bottom;
  white-space: normal; min-width: 4.2rem; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
th:first-child { text-align: left; padding-left: 0; padding-right: 0.5rem; position: sticky; left: 0;
  background: var(--paper); font-weight: 500; }
.strong > *, .strong > th:first-child { font-weight: 700; }
.plots { display: grid; margin: 1.25rem 0; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem 2rem; }
figure { margin: 0; min-width: 0; }
figure { margin-bottom: 1rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 30rem; }
figcaption { font: 0.85rem/1.45 var(--sans); color: var(--soft); max-width: 30rem;
  margin-top: 0.3rem; }
dl { font: 0.875rem/1.5 var(--sans); margin: 0 0 1.25rem; }
dl div { display: grid; grid-template-columns: 9rem 1fr; gap: 0 1rem; padding: 0.3rem 0;
  border-bottom: 1px solid var(--grid); }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { margin: 0 0 1rem; }
summary { cursor: pointer; font: 0.95rem/1.5 var(--sans); }
pre { font: 0.8rem/1.5 var(--mono); background: var(--raised); padding: 0.9rem 1rem; border-radius: 4px;
  overflow-x: auto; }
@media (max-width: 30rem) {
  body { font-size: 1rem; }
  th, td { padding-left: 0.9rem; }
  /* Long row titles would leave no room to scroll under. */
  th:first-child { max-width: 7.5rem; white-space: normal; }
  dl div { grid-template-columns: 1fr; }
}
@media print {
  .scroll { overflow: visible; }
  section, figure, tr { break-inside: avoid; }
}
"""
