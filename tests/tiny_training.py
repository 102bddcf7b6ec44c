"""Training in tests: rows of tokens without a tokenizer, log lines, and children that can be killed."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linearize.errors import LinearizeError
from tests.tiny_models import make_student, make_tokens, pad


class TokenRows:
    """Endless batches of random tokens; the position is the number of batches drawn. `padded`: tokens of padding in
    each row, one number a row, at `side`."""

    def __init__(self, batch: int, length: int, padded: list[int] | None = None, side: str = "right"):
        self.batch, self.seq_len = batch, length
        self.padded, self.side = padded, side
        self.drawn = 0

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = self.at(self.drawn)
        self.drawn += 1
        return batch

    def skip(self, batches: int) -> None:
        self.drawn += batches

    def at(self, index: int) -> dict[str, torch.Tensor]:
        """Row r of batch i is number i * batch + r of one endless list, whatever the batch."""
        numbers = range(index * self.batch, (index + 1) * self.batch)
        rows = torch.cat([make_tokens(1, self.seq_len, seed=1000 + number) for number in numbers])
        if self.padded is None:
            return {"input_ids": rows}
        rows, mask = pad(rows, self.padded, self.side)
        return {"input_ids": rows, "attention_mask": mask}

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "shape": [self.batch, self.seq_len]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["shape"] != [self.batch, self.seq_len]:
            raise LinearizeError("data: another shape")
        self.drawn = state["drawn"]


class OneText(TokenRows):
    """The same batch again and again: what random weights can learn of random tokens in a few steps."""

    def at(self, index: int) -> dict[str, torch.Tensor]:
        return super().at(0)


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """What train.jsonl holds."""
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def in_child(run: Callable[..., None], *args: Any) -> multiprocessing.Process:
    """Start `run(*args)` in a process of its own. It is forked from a server that has imported all, but computed
    nothing, so that it starts at once and no thread of the test's own is in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.__module__, "linearize.distill.end_to_end", "peft"])
    child = context.Process(target=run, args=args)
    child.start()
    return child


def finish(run: Callable[..., None], *args: Any) -> None:
    """`run(*args)` in a child, to its end."""
    child = in_child(run, *args)
    child.join(120)
    assert child.exitcode == 0


def kill_while_training(child: multiprocessing.Process, folder: Path, chance: random.Random) -> bool:
    """SIGKILL the child at a moment of chance, a few steps after now; returns False if it had ended by then."""

    def logged() -> int:
        file = folder / "train.jsonl"
        return file.read_text().count("\n") if file.is_file() else 0

    deadline = time.monotonic() + 120
    # A child that goes on drops the lines after its checkpoint first: only lines that come on top of those count.
    enough = logged() + chance.randint(1, 5)
    while logged() < enough and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(chance.random() * 0.03)
    child.kill()
    child.join(60)
    assert child.exitcode in (0, -9)
    print(
        f"exit code {child.exitcode} after {logged()} steps:", *sorted(p.name for p in folder.glob("checkpoints/*/*"))
    )
    return child.exitcode == -9


def chance_of_now() -> random.Random:
    """A random generator that is another in each run; its seed is printed, to repeat a failure by."""
    seed = time.time_ns() % 10**9
    print(f"seed {seed}, process {os.getpid()}")
    return random.Random(seed)


def train_student(kind: str, folder: Path, steps: int) -> None:
    """A whole stage, "transfer" or "distill", on a tiny student, with a checkpoint at every step; the weights go to
    `folder`/final.safetensors. For children."""
    from safetensors.torch import save_file

    from linearize.distill.checkpoints import latest
    from linearize.distill.end_to_end import run_distill
    from linearize.distill.options import Budget, DistillOptions, TransferOptions
    from linearize.distill.transfer import run_transfer

    torch.set_num_threads(1)
    shared: dict[str, Any] = {
        "budget": Budget(steps=steps),
        "lr": 1e-2,
        "checkpoint_minutes": 1e-6,
        "log_every": 1,
    }
    student = make_student("llama", "normalizer")
    if kind == "transfer":
        run_transfer(student, TokenRows(1, 32), TransferOptions(**shared, calibration_tokens=64), folder)
    else:
        # LoRA starts from random numbers: another process has others unless the checkpoint brings them. A stage that
        # was killed before its first one begins as a run does, from the run's seed.
        torch.manual_seed(time.time_ns() % 10**9 if latest(folder / "checkpoints" / kind) else 0)
        student, _ = run_distill(student, TokenRows(1, 32), DistillOptions(**shared, lora_rank=2), folder)
    save_file({name: p.detach().clone() for name, p in student.named_parameters()}, folder / "final.safetensors")
