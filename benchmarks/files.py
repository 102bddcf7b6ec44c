"""Reading and writing results: a file is either the old one or the whole new one, never half of it."""

import json
import os
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError

__all__ = ["read_json", "write_json", "write_text"]


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 through a temporary file beside `path`, then rename. Missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers of one path from sharing a temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, data: Any) -> Path:
    """Write `data` as JSON, atomically. Raises ValueError on NaN or infinity, which JSON cannot hold."""
    return write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, kind: str, schema: int | None = None) -> dict[str, Any]:
    """Read a result that `write_json` wrote.

    Args:
        path: the file.
        kind: the value that its `"kind"` key must have, such as `"linearize.evaluate"`.
        schema: the value that its `"schema"` key must have; None takes any.

    Raises:
        LinearizeError: the file is not JSON, or holds another kind of result, or one in another form.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LinearizeError(f"{path}: not a JSON file ({error}); write it again with `linearize`") from error
    found = data.get("kind") if isinstance(data, dict) else None
    if found != kind:
        raise LinearizeError(f"{path}: holds {found!r}, expected {kind!r}; write it again with `linearize`")
    if schema is not None and data.get("schema") != schema:
        raise LinearizeError(
            f"{path}: schema {data.get('schema')!r} of {kind!r} was written by another version of linearize, and this "
            f"one reads {schema}; measure again"
        )
    return data
