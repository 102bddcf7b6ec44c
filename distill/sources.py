"""Where training text comes from: each kind of source as a list of documents, in a train and a held-out part.

A document is a text, a list of chat messages or a list of token ids. The two parts of a source never share a
document: jsonl and datasets are divided by a hash of a document's content, so that a document that occurs twice is on
one side; text files by their last share; Python's topics in groups that share no paragraph.
"""

import glob
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from linearize.distill.options import Source
from linearize.errors import LinearizeError

__all__ = ["Content", "Documents", "FixedDocuments", "Part", "open_documents", "split_topics"]

Part = Literal["train", "held_out"]
Content = str | list[dict[str, str]] | list[int]

# A paragraph of at least this many characters that two topics share means that one quotes the other.
QUOTE_CHARS = 80
# Long texts are cut into passages of this many characters a token of seq_len: about four for English.
CHARS_PER_TOKEN = 4
# In packed rows a passage spans several rows, so that most rows hold text that belongs together.
ROWS_PER_PASSAGE = 4


class Documents(Protocol):
    """The documents of one part of one source.

    `signature` changes when the documents do: a checkpoint's position means nothing in other data. `get` returns None
    for a document that belongs to the other part.
    """

    signature: str

    def __len__(self) -> int: ...

    def get(self, index: int) -> Content | None: ...


class FixedDocuments:
    """Documents that are all at hand."""

    def __init__(self, contents: Sequence[Content]) -> None:
        self._contents = contents
        digest = hashlib.sha256()
        for content in contents:
            digest.update(json.dumps(content).encode())
        self.signature = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._contents)

    def get(self, index: int) -> Content:
        return self._contents[index]


def open_documents(source: Source, part: Part, held_out: float, seq_len: int, packing: str) -> Documents:
    """The documents of every kind of source but `generated`.

    Args:
        source: what to read.
        part: which side of the split.
        held_out: share of the held-out side.
        seq_len: tokens a row, which sets how long the passages of a text file are.
        packing: as in `DataOptions`.

    Raises:
        LinearizeError: files that are missing, empty or not of their kind.
    """
    if source.kind == "pydoc":
        train, held = split_topics(_python_topics(), held_out)
        return FixedDocuments(list((train if part == "train" else held).values()))
    assert source.path is not None
    if source.kind == "text":
        passage_chars = CHARS_PER_TOKEN * seq_len * (ROWS_PER_PASSAGE if packing == "packed" else 1)
        return FixedDocuments(_passages(source.path, part, held_out, passage_chars))
    if source.kind == "jsonl":
        return JsonlDocuments(source.path, source.field, part, held_out)
    return DatasetDocuments(source, part, held_out)


def split_topics(topics: Mapping[str, str], held_out: float) -> tuple[dict[str, str], dict[str, str]]:
    """Divide topics into train and held-out ones that share no paragraph.

    Python's topics quote each other: "compound statements" holds all of "if", "for" and "while". Topics that share a
    paragraph are kept together; the groups are taken in the order of a hash, as long as they fit into the share.

    Returns:
        The train and the held-out topics, together all of them.
    """
    group = {name: name for name in topics}
    owner: dict[str, str] = {}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for name, text in topics.items():
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = " ".join(paragraph.split())
            if len(paragraph) >= QUOTE_CHARS:
                group[root(name)] = root(owner.setdefault(paragraph, name))
    groups: dict[str, list[str]] = {}
    for name in sorted(topics):
        groups.setdefault(root(name), []).append(name)
    room = held_out * sum(map(len, topics.values()))
    held: set[str] = set()
    for names in sorted(groups.values(), key=lambda names: _share(names[0])):
        size = sum(len(topics[name]) for name in names)
        if size <= room:
            room -= size
            held.update(names)
    parts = ({name: topics[name] for name in topics if (name in held) is side} for side in (False, True))
    train, held_topics = parts
    return train, held_topics


class JsonlDocuments:
    """One JSON object a line. The files are checked once, then lines are read when they are asked for."""

    def __init__(self, pattern: str, field: str | None, part: Part, held_out: float) -> None:
        self._files = _files(pattern)
        self._field = field
        self._spans: list[tuple[int, int]] = []  # of the lines in this part: where each starts and ends
        self._ends: list[int] = []  # how many lines the files up to each one have
        digest = hashlib.sha256()
        for file in self._files:
            start = 0
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    end = start + len(line)
                    if line.strip():
                        content = self._parse(line, f"{file}, line {number}")
                        digest.update(line)
                        if _on_side(content, part, held_out):
                            self._spans.append((start, end))
                    start = end
            self._ends.append(len(self._spans))
        self.signature = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._spans)

    def get(self, index: int) -> Content:
        file = self._files[bisect_right(self._ends, index)]
        start, end = self._spans[index]
        with file.open("rb") as lines:
            lines.seek(start)
            return self._parse(lines.read(end - start), f"{file}, byte {start}")

    def _parse(self, line: bytes, where: str) -> Content:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            shown = line[:40].decode("utf-8", "replace").strip()
            raise LinearizeError(
                f"{where}: not JSON ({error}): {shown!r}; write one JSON object a line, or use kind: text"
            ) from None
        return _content(record, self._field, where)


class DatasetDocuments:
    """A Hugging Face dataset, read row by row as it is needed."""

    def __init__(self, source: Source, part: Part, held_out: float) -> None:
        assert source.path is not None
        self._rows = _load_dataset(source.path, source.name, source.split or "train")
        self._field = source.field
        self._where = f"dataset {source.path!r}"
        self._part = part
        self._held_out = held_out
        self.signature = f"{len(self._rows)} {getattr(self._rows, '_fingerprint', '')}"

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, index: int) -> Content | None:
        content = _content(self._rows[index], self._field, f"{self._where}, row {index}")
        return content if _on_side(content, self._part, self._held_out) else None


def _python_topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise LinearizeError(
            "data source pydoc: this Python comes without pydoc_data (some distributions package it apart); "
            "install it or use another kind of source"
        ) from None
    return topics


def _passages(pattern: str, part: Part, held_out: float, size: int) -> list[Content]:
    """The passages of text files: cut at blank lines where there are some, about `size` characters each."""
    passages: list[Content] = []
    for file in _files(pattern):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LinearizeError(f"{file}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None
        border = _cut(text, 0, round(len(text) * (1 - held_out)))
        start, stop = (0, border) if part == "train" else (border, len(text))
        while start < stop:
            # The last passage may be longer by half: better than a scrap.
            end = stop if stop - start <= size * 1.5 else _cut(text, start, start + size)
            if text[start:end].strip():
                passages.append(text[start:end].strip("\n"))
            start = end
    return passages


def _cut(text: str, start: int, wanted: int) -> int:
    """The best place to cut in the second half of text[start:wanted]: a blank line, else a line's or a word's end."""
    if wanted >= len(text):
        return len(text)
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, start + (wanted - start) // 2, wanted)
        if found >= 0:
            return found + len(mark)
    return wanted


def _files(pattern: str) -> list[Path]:
    """The files that a path or a glob names, in a fixed order; none of them empty."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise LinearizeError(f"data source {pattern}: a folder, not a file; name its files with a glob: {path / '*'}")
    # A file whose name has brackets is not a glob.
    found = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in found if file.is_file()]
    if not files:
        raise LinearizeError(f"data source {pattern}: no such file in {Path.cwd()}; give a file or a glob that matches")
    for file in files:
        if file.stat().st_size == 0:
            raise LinearizeError(f"{file}: the file is empty (0 bytes); remove it or leave it out of the glob")
    return files


def _load_dataset(path: str, name: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise LinearizeError(
            f"data source dataset {path!r}: the library 'datasets' is not installed; "
            "pip install 'linearize[data]', or use kind: jsonl or text"
        ) from None
    try:
        saved = any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json"))
        if not saved:
            return datasets.load_dataset(path, name, split=split)
        rows = datasets.load_from_disk(path)
        if not isinstance(rows, datasets.DatasetDict):
            return rows
        if split in rows:
            return rows[split]
    except Exception as error:  # the library raises a dozen kinds: network, cache, format, missing split
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LinearizeError(f"data source dataset {path!r}, split {split!r}: {reason}") from error
    raise LinearizeError(f"data source dataset {path!r}: no split {split!r}; it has {', '.join(rows)}")


def _content(record: object, field: str | None, where: str) -> Content:
    """The text or the chat of one record."""
    if not isinstance(record, Mapping):
        raise LinearizeError(f"{where}: a JSON object is expected, got {type(record).__name__}; write {{'text': ...}}")
    has = ", ".join(map(str, record)) or "no fields"
    if field is not None:
        if field not in record:
            raise LinearizeError(f"{where}: no field {field!r}; it has {has}: set the source's 'field' to one of them")
        return _messages(record[field], field, where)
    for known in ("text", "messages"):
        if known in record:
            return _messages(record[known], known, where)
    for question, answer in (("prompt", "response"), ("instruction", "output")):
        if question in record and answer in record:
            asked = record[question]
            if question == "instruction" and record.get("input"):
                asked = f"{asked}\n\n{record['input']}"
            chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": record[answer]}]
            return _messages(chat, f"{question} + {answer}", where)
    raise LinearizeError(
        f"{where}: none of text, messages, prompt + response, instruction + output; it has {has}: "
        "set the source's 'field' to the one to read"
    )


def _messages(value: object, field: str, where: str) -> Content:
    if isinstance(value, str):
        return value
    fits = isinstance(value, list) and all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )
    if not fits or not value:
        raise LinearizeError(
            f"{where}: field {field!r} is neither a text nor a list of messages, each with the texts 'role' and "
            f"'content': {str(value)[:40]!r}"
        )
    assert isinstance(value, list)
    return [{key: message[key] for key in ("role", "content")} for message in value]


def _on_side(content: Content, part: Part, held_out: float) -> bool:
    key = content if isinstance(content, str) else json.dumps(content)
    return (_share(key) < held_out) is (part == "held_out")


def _share(key: str) -> float:
    """A number in [0, 1) that depends on the text only, on every machine and Python."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56
