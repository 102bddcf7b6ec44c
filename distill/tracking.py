"""The numbers of a training, as they come: `train.jsonl`, and the trackers that accelerate knows.

train.jsonl has a line for the first step of a stage, for every `log_every`-th and for the last:

    stage, step, tokens, seconds      seen so far in this stage, by all processes together
    loss, lr, tokens_per_s            of this step; tokens_per_s since the stage began
    grad_norm                         norm of all gradients at the end of the step, before clipping
    peak_memory_bytes                 the most that a process has held: of its GPU, else of its main memory
    losses_per_layer                  layer index -> loss, where layers have losses of their own
"""

import json
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, LoggerType, get_available_trackers

from linearize.distill import processes
from linearize.distill.disk import writing
from linearize.errors import LinearizeError

__all__ = ["Log", "peak_memory", "tracked"]

TRACKERS = tuple(sorted(str(kind.value) for kind in LoggerType if kind.value != "all"))

_accelerator: Any = None  # of the trackers that are open
_steps_before = 0  # trackers want steps that never go back; stages count their own


@contextmanager
def tracked(trackers: Sequence[str | GeneralTracker], folder: Path, config: dict[str, Any]) -> Iterator[None]:
    """Inside, every training also reports to these trackers, each number under `<stage>/<name>`.

    Args:
        trackers: names that accelerate knows (`TRACKERS`), or trackers of one's own.
        folder: where trackers that keep files put them, under `trackers`.
        config: what the run was asked for; nested maps become `a.b`.

    Raises:
        LinearizeError: an unknown name, or one whose package is not installed.
    """
    global _accelerator, _steps_before
    if not trackers:
        yield
        return
    available = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    for tracker in trackers:
        if isinstance(tracker, GeneralTracker):
            continue
        if tracker not in TRACKERS:
            raise LinearizeError(f"track: {tracker!r} is unknown; choose from {', '.join(TRACKERS)}")
        if tracker not in available:
            raise LinearizeError(f"track: the package for {tracker!r} is not installed; install it with pip")
    files = folder / "trackers"
    accelerator = processes.open_accelerator(log_with=list(trackers), project_dir=str(files))
    if processes.rank() == 0:
        files.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("linearize", config=dict(_flat(config)))
    _accelerator, _steps_before = accelerator, 0
    try:
        yield
    finally:
        _accelerator = None
        # Not `end_training`: it would also take the processes apart, which is not the trackers' business.
        for tracker in accelerator.trackers:
            tracker.finish()


def _flat(values: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> ("a.b", 1); what is no number, bool or text becomes its text."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{where}.{key}" if where else str(key))
    elif isinstance(values, (list, tuple)):
        for index, value in enumerate(values):
            yield from _flat(value, f"{where}[{index}]")
    else:
        yield where, values if isinstance(values, (bool, int, float, str)) else str(values)


class Log:
    """One stage's lines. Process 0 writes them; every process may call.

    Args:
        path: of train.jsonl, made where it is missing.
        stage: its name.
        steps: how many were done when it goes on; lines after them are of a run that was killed after its last
            checkpoint, and are dropped.

    Raises:
        LinearizeError: the disk does not take them.
    """

    def __init__(self, path: Path, stage: str, steps: int):
        self.path = path
        self.stage = stage
        if processes.rank() == 0:
            self._keep(steps)

    def _keep(self, steps: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the line that a kill cut off
                continue
            if record["stage"] != self.stage or record["step"] <= steps:
                kept.append(line + "\n")
        partial = self.path.with_name(self.path.name + ".partial")
        text = "".join(kept)
        with writing(self.path, len(text), partial):
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.path)

    def write(self, record: dict[str, Any], losses: dict[str, float]) -> None:
        """Add a line.

        Args:
            record: `step` and what else is told, in the line's order.
            losses: by name; `layer.N` among them are those of layers.
        """
        if processes.rank() != 0:
            return
        layers = {key.removeprefix("layer."): x for key, x in losses.items() if key.startswith("layer.")}
        line = json.dumps({"stage": self.stage} | record | ({"losses_per_layer": layers} if layers else {})) + "\n"
        size = self.path.stat().st_size if self.path.is_file() else 0
        with writing(self.path, len(line)):
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError:
                os.truncate(self.path, size)  # no half line
                raise
        if _accelerator is not None:
            values = {key: x for key, x in record.items() if key != "step"} | losses
            _accelerator.log(
                {f"{self.stage}/{key}": x for key, x in values.items()}, step=_steps_before + record["step"]
            )

    def end(self, steps: int) -> None:
        """The stage is over; the next one's steps count from here for the trackers."""
        global _steps_before
        _steps_before += steps


def peak_memory(device: torch.device | str) -> int:
    """The most bytes that this process has held at once: tensors on its GPU, or all of it in main memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
