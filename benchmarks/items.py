"""Questions for a language model, from files of one JSON object a line. The keys say which of three kinds it is:

{"query": str, "choices": [str, ...], "gold": int}               `Item`: which continuation of a text? (ARC, PIQA)
{"context_options": [str, ...], "continuation": str, "gold": int}    `Contexts`: after which text? (Winogrande)
{"context": str, "continuation": str}                            `LastWord`: what comes next? (LAMBADA)
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError

__all__ = ["AnyItem", "Contexts", "Item", "LastWord", "load_items", "named_path"]


@dataclass(frozen=True)
class Item:
    """One question: the text before, the continuations, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Contexts:
    """One continuation, the texts that it may follow, and the index of the right one."""

    contexts: tuple[str, ...]
    continuation: str
    gold: int


@dataclass(frozen=True)
class LastWord:
    """A text and the word that follows it."""

    context: str
    continuation: str


AnyItem = Item | Contexts | LastWord


def named_path(text: str, option: str) -> tuple[str, Path]:
    """`"name=path"` or `"path"`, whose name is the file's without its ending.

    Raises:
        LinearizeError: no such file; names `option`.
    """
    name, equals, rest = text.partition("=")
    # A path may hold an equals sign itself.
    path, name = (Path(text), "") if not equals or Path(text).is_file() else (Path(rest), name.strip())
    if not path.is_file():
        raise LinearizeError(f"{option}: {str(path)!r} is not a file; write its path, or NAME=path")
    return name or path.stem, path


def load_items(path: str | Path, limit: int | None = None, seed: int = 0) -> list[Any]:
    """Read items from a jsonl file; with `limit`, a random sample of that size (files are often sorted).

    Returns:
        A list of `Item`, of `Contexts` or of `LastWord`.

    Raises:
        LinearizeError: no such file, a line that is not an item, or lines of several kinds; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise LinearizeError(f"choices: {str(path)!r} is not a file; name a jsonl file of query, choices and gold")
    items: list[AnyItem] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            item = _parse(line, f"{path}:{number}")
            if items and type(item) is not type(items[0]):
                raise LinearizeError(f"{path}:{number}: another kind of item than those before; put it in its own file")
            items.append(item)
    if not items:
        raise LinearizeError(f"choices: {str(path)!r} holds no items; each line is an object of query, choices, gold")
    if limit is None or limit >= len(items):
        return items
    kept = random.Random(seed).sample(range(len(items)), limit)
    return [items[index] for index in sorted(kept)]


def _parse(line: str, where: str) -> AnyItem:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise LinearizeError(f"{where}: not JSON ({error}); each line is an object of query, choices, gold") from error
    for keys, build in _KINDS:
        if isinstance(record, dict) and keys <= record.keys():
            return build(record, where)
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise LinearizeError(
        f"{where}: has {found}, needs the keys query, choices and gold; context_options, continuation and gold; "
        "or context and continuation"
    )


def _item(record: dict[str, Any], where: str) -> Item:
    choices = _texts(record, "choices", where)
    return Item(_text(record, "query", where), choices, _gold(record, len(choices), where))


def _contexts(record: dict[str, Any], where: str) -> Contexts:
    contexts = _texts(record, "context_options", where)
    return Contexts(contexts, _text(record, "continuation", where, empty=False), _gold(record, len(contexts), where))


def _last_word(record: dict[str, Any], where: str) -> LastWord:
    return LastWord(_text(record, "context", where), _text(record, "continuation", where, empty=False))


_KINDS: tuple[tuple[set[str], Callable[[dict[str, Any], str], AnyItem]], ...] = (
    ({"query", "choices", "gold"}, _item),
    ({"context_options", "continuation", "gold"}, _contexts),
    ({"context", "continuation"}, _last_word),
)


def _text(record: dict[str, Any], key: str, where: str, empty: bool = True) -> str:
    value = record[key]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise LinearizeError(f"{where}: {key} is {value!r}, expected a text{'' if empty else ' that is not empty'}")
    return value


def _texts(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = record[key]
    if not (isinstance(value, list) and len(value) >= 2 and all(isinstance(text, str) and text for text in value)):
        raise LinearizeError(f"{where}: {key} is {value!r}, expected a list of two or more texts that are not empty")
    return tuple(value)


def _gold(record: dict[str, Any], choices: int, where: str) -> int:
    gold = record["gold"]
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < choices:
        raise LinearizeError(f"{where}: gold is {gold!r}, expected the index of a choice, 0 to {choices - 1}")
    return gold
