"""A choice among candidates by measurement, made once and kept in a file.

Without LINEARIZE_TUNE=1 nothing is ever timed: the first candidate, or what an earlier measurement chose, is taken at
once, so that a first call costs one compilation. The file is `linearize/tuning.json` in $XDG_CACHE_HOME (~/.cache).
"""

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

__all__ = ["choose", "remember", "tuning_file"]


def tuning_file() -> Path:
    """Where choices are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linearize" / "tuning.json"


def choose(key: str, count: int, time: Callable[[int], float] | None) -> int:
    """The index, below `count`, of the candidate to use for `key`.

    time: milliseconds of a candidate (infinity where it does not run), called for each only under LINEARIZE_TUNE=1
    and only where no choice is known; None never measures.
    """
    known = _choices().get(key)
    if known is not None and 0 <= known < count:
        return known
    if time is None or os.environ.get("LINEARIZE_TUNE") != "1" or count == 1:
        return 0
    times = [time(i) for i in range(count)]
    best = min(range(count), key=times.__getitem__)
    remember(key, best)
    return best


def remember(key: str, choice: int) -> None:
    """Keep a choice for this process and, where the file can be written, for later ones."""
    choices = _choices()
    choices[key] = choice
    path = tuning_file()
    choices |= _read() | {key: choice}  # what other processes have found meanwhile
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:  # a read-only home: the choice still holds for this process
        return


@lru_cache(maxsize=1)
def _choices() -> dict[str, int]:
    """What this process knows: the file's content when it was first asked, and its own findings."""
    return _read()


def _read() -> dict[str, int]:
    """The file's content; a file that is missing or no such table counts as empty."""
    try:
        found = json.loads(tuning_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    sequences = isinstance(found, dict) and all(isinstance(x, int) for x in found.values())
    return found if sequences else {}
