"""What is told when a disk does not take a file, and what is left then: nothing half written."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from linearize.console import human_bytes
from linearize.errors import LinearizeError

__all__ = ["writing"]


@contextmanager
def writing(path: Path, size: int, partial: Path | None = None) -> Iterator[None]:
    """Inside, `path` is written, `size` bytes or a few more; after a failure `partial`, file or folder, is gone.

    Raises:
        LinearizeError: in place of an OSError, with the bytes that are needed and free.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if partial is not None:
            _remove(partial)
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        try:
            free = human_bytes(shutil.disk_usage(path.parent).free)
        except OSError:
            free = "an unknown number of bytes"
        raise LinearizeError(
            f"{path}: cannot be written ({reason}); it needs {human_bytes(size)} and that disk has {free} free; make "
            "room, then the same command goes on from the last checkpoint"
        ) from error


def _remove(partial: Path) -> None:
    try:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
    except OSError:  # what failed once may fail again; the next write clears it
        pass
