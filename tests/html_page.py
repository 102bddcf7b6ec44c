"""A page's HTML, checked for nesting and taken apart."""

import csv
import io
from html.parser import HTMLParser
from urllib.parse import unquote

__all__ = ["Page"]

VOID = {"meta", "br", "hr", "img", "link", "input"}
CSV = "data:text/csv;charset=utf-8,"


class Page(HTMLParser):
    """Checks that elements nest, and collects what tests ask for.

    Attributes:
        tags: every element's name, in order.
        elements: (name, attributes) of every element, in order.
        ids, references: values of `id`; of `href`, `src` and their like, data URIs left out.
        words: pieces of text.
        files: name -> rows of every CSV file that is offered, as texts.
        tables: rows of every table, as texts, with plain spaces before units.
    """

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.elements, self.ids, self.references, self.words = [], [], [], [], [], []
        self.files, self.tables = {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "srcset", "poster", "data", "action"):
                if value.startswith(CSV):
                    self.files[dict(attributes)["download"]] = list(csv.reader(io.StringIO(unquote(value[len(CSV) :]))))
                else:
                    self.references.append(value)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def text(self) -> str:
        """All words, with single spaces."""
        return " ".join(" ".join(self.words).split())
