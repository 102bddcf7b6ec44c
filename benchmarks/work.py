"""Measurements kept on disk, one file each, so that an evaluation that was stopped goes on where it was.

A file is named after a digest of all that its numbers depend on; whatever changes, another file is looked for, so
nothing stale is ever read. Several evaluations can share a folder: what is the same in both is measured once.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from linearize._version import __version__
from linearize.benchmarks.files import write_text

__all__ = ["Measured", "Work", "digest", "digest_files"]

# Beyond this a file's size and time stand for its content: hashing gigabytes takes as long as measuring.
HASHED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Measured:
    """A measurement's JSON-able outcome and the seconds that it took."""

    outcome: Any
    seconds: float


def digest(value: Any) -> str:
    """16 hexadecimal digits that change with a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_files(folder: Path) -> str:
    """The same for what a folder holds, by its files' contents, those of large ones by size and time.

    Raises:
        FileNotFoundError: there is no such folder: all of those would have one digest.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    hashed = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()
        hashed.update(f"{path.relative_to(folder)}\n".encode())
        small = stat.st_size <= HASHED_BYTES
        hashed.update(path.read_bytes() if small else f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return hashed.hexdigest()[:16]


class Work:
    """A folder of measurements.

    Args:
        folder: made when the first measurement is written.
        identities: row name -> JSON-able, what the row's numbers depend on besides the settings of a measurement.
    """

    def __init__(self, folder: str | Path, identities: dict[str, Any]):
        self.folder = Path(folder)
        self.identities = identities

    def _place(self, row: str, measurement: str, settings: Any) -> tuple[Path, dict[str, Any]]:
        versions = {"linearize": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        key = {"row": self.identities[row], "measurement": measurement, "settings": settings, "versions": versions}
        slug = "".join(c if c.isalnum() else "-" for c in f"{measurement}--{row}")
        return self.folder / f"{slug}-{digest(key)}.json", key

    def read(self, row: str, measurement: str, settings: Any) -> Measured | None:
        """What was measured before, under this row's name or another's, or None. A file that cannot be read counts as
        not measured."""
        _, key = self._place(row, measurement, settings)
        for path in self.folder.glob(f"*-{digest(key)}.json"):
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            # JSON turns tuples into lists; the digest has done so too.
            if digest(held["key"]) == digest(key):
                return Measured(held["outcome"], held["seconds"])
        return None

    def write(self, row: str, measurement: str, settings: Any, measured: Measured) -> None:
        """Keep a measurement, atomically. Its file may hold NaN, which only Python's JSON reads."""
        path, key = self._place(row, measurement, settings)
        held = {"key": key, "seconds": measured.seconds, "outcome": measured.outcome}
        write_text(path, json.dumps(held, ensure_ascii=False) + "\n")
