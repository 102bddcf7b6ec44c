"""Several processes that train together, on CPUs over gloo, as a launcher starts them."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linearize.distill.options import Budget, DistillOptions, TransferOptions
from tests.tiny_models import make_student, pad
from tests.tiny_training import TokenRows, in_child

__all__ = ["UnevenRows", "launch", "train_stage"]


class UnevenRows(TokenRows):
    """Rows of 32 tokens, of which each batch pads another number. Stops like a user's Ctrl-C before batch `stop`."""

    def __init__(self, stop: int | None = None, lost: int | None = None):
        super().__init__(1, 32)
        self.stop, self.lost = stop, lost

    def at(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.lost:
            raise OSError("the file is gone")
        if self.stop is not None and index >= self.stop:
            raise KeyboardInterrupt
        rows, mask = pad(super().at(index)["input_ids"], [(5 * index) % 17], "right")
        return {"input_ids": rows, "attention_mask": mask}


def train_stage(
    kind: str,
    folder: Path,
    accumulation: int,
    rows: TokenRows | None = None,
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A stage on a tiny student, with a checkpoint at every step; returns the student."""
    from linearize.distill.end_to_end import run_distill
    from linearize.distill.transfer import run_transfer

    rows = UnevenRows() if rows is None else rows
    named: dict[str, Any] = {"budget": Budget(steps=steps), "lr": 1e-2, "checkpoint_minutes": 1e-6, "log_every": 1}
    student = make_student("llama", "normalizer", dtype)
    torch.manual_seed(0)  # of LoRA
    if kind == "transfer":
        settings = TransferOptions(**named | {"calibration_tokens": 0} | options)
        run_transfer(student, rows, settings, folder, accumulation=accumulation)
        return student
    distill = DistillOptions(**named | {"lora_rank": 2, "ce_weight": 0.5} | options)
    return run_distill(student, rows, distill, folder, accumulation=accumulation)[0]


def launch(run: Callable[..., None], count: int, *args: Any, **environment: str) -> list[multiprocessing.Process]:
    """Start `run(*args)` in `count` processes with the environment that a launcher gives them. What one prints or
    raises goes to `args[0]`/rank-N.txt, args[0] being a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "1"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    args[0].mkdir(parents=True, exist_ok=True)
    return [in_child(_as_rank, shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, run, args) for r in range(count)]


def _as_rank(environment: dict[str, str], run: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        run(*args)
    except BaseException:
        (args[0] / f"rank-{environment['RANK']}.txt").write_text(traceback.format_exc())
        raise
