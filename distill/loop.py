"""The loop that every training stage shares: budget, schedule, log, checkpoints, progress."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from linearize.distill import checkpoints
from linearize.distill.data import Batch, TokenStream
from linearize.distill.options import Budget, DistillOptions, TransferOptions
from linearize.errors import LinearizeError

__all__ = ["FINAL_LR", "Extra", "Outcome", "learning_rate", "make_optimizer", "progress_of", "train"]

TELL_EVERY = 30.0  # seconds between lines of progress where there is no terminal for a bar
FINAL_LR = 0.1  # of the peak, at the end of the cosine

StepLosses = dict[str, Tensor]
"""What a step reports, each a detached scalar: `loss`, and `layer.N` where layers have losses of their own."""


class Extra(Protocol):
    """What a stage keeps beside its parameters: part of every checkpoint, and told what each step reported."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""

    def after_step(self, reported: dict[str, float]) -> None:
        """The losses of an optimizer step that was done, means over its batches and over all processes: what a stage
        decides by them it decides alike in every process."""


@dataclass
class Outcome:
    """What a stage did. `first` and `last` are the reported losses of the first step and the mean of the last ones."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


def progress_of(budget: Budget, steps: int, tokens: int, seconds: float) -> float:
    """How much of the budget is used, 0 .. 1: the largest share among its limits."""
    shares = [
        used / limit
        for used, limit in ((steps, budget.steps), (tokens, budget.tokens), (seconds / 60, budget.minutes))
        if limit is not None
    ]
    return min(max(shares), 1.0)


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear from 0 over `warmup`, then a cosine down to FINAL_LR of the peak. `progress` and `warmup` in 0 .. 1."""
    if progress < warmup:
        return peak * (progress + 1e-3) / (warmup + 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (FINAL_LR + (1 - FINAL_LR) * cosine)


def make_optimizer(
    parameters: dict[str, nn.Parameter], lr_scale: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """AdamW without weight decay. `train` sets the learning rate, times `lr_scale` of a parameter's name."""
    groups = [{"params": [p], "scale": lr_scale(name)} for name, p in parameters.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)


def train(
    stage: str,
    step: Callable[[Batch, Callable[[Tensor], None]], StepLosses],
    parameters: dict[str, nn.Parameter],
    stream: TokenStream,
    options: TransferOptions | DistillOptions,
    folder: Path,
    *,
    accumulation: int = 1,
    device: torch.device | str = "cpu",
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    clip: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Extra | None = None,
) -> Outcome:
    """Train until the budget is used, from the newest checkpoint in `folder`/checkpoints/`stage` where there is one.

    A stage that was killed and called again ends with the weights of one that was not, but for a budget in minutes:
    the time between the last checkpoint and the kill does not count.

    Args:
        stage: its name in the log and among the checkpoints.
        step: `step(batch, backward)` computes losses, calls `backward` on them and returns what to report.
        parameters: what is trained, by name.
        stream: where batches come from; its position is part of a checkpoint.
        options: budget, lr, warmup, checkpoint_minutes, log_every.
        folder: of the run; `train.jsonl` there gets a line every `log_every` steps.
        accumulation: batches an optimizer step.
        lr_scale: factor on the learning rate of a parameter, by its name.
        clip: limit on the norm of all gradients together; None is no limit.
        optimizer: what `make_optimizer` returned for these parameters, for a step that updates on its own as well;
            None makes one.
        extra: state of the stage's own that checkpoints keep.

    Returns:
        Steps, tokens and seconds in all, and the reported losses at both ends.

    Raises:
        LinearizeError: a checkpoint that cannot be used, or a loss that is no number.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1 or accelerator.mixed_precision != "no":
        raise LinearizeError(
            f"accelerate: {accelerator.num_processes} processes with mixed precision {accelerator.mixed_precision!r} "
            "are configured, but training runs in one process, in the recipe's dtype; start it without "
            "`accelerate launch`"
        )
    if optimizer is None:
        optimizer = make_optimizer(parameters, lr_scale)
    saved = folder / "checkpoints" / stage
    log = _Log(folder / "train.jsonl", stage)
    outcome = Outcome()
    newest = checkpoints.latest(saved)
    if newest is not None:
        state = checkpoints.restore(newest, parameters, optimizer)
        stream.load_state_dict(state["stream"])
        outcome = Outcome(**state["outcome"])
        if extra is not None:
            extra.load_state_dict(state["extra"])
    log.keep(outcome.steps)

    saved_steps, saved_at = outcome.steps, time.perf_counter()

    def save() -> None:
        nonlocal saved_steps, saved_at
        state = {"stream": stream.state_dict(), "outcome": vars(outcome)}
        if extra is not None:
            state["extra"] = extra.state_dict()
        checkpoints.write(saved, outcome.steps, parameters, optimizer, state)
        saved_steps, saved_at = outcome.steps, time.perf_counter()

    start = time.perf_counter() - outcome.seconds
    told_at = time.perf_counter()
    with _progress(stage) as bar:
        task = bar.add_task(stage, total=1.0, loss="-", speed="-", left="-")
        while (done := progress_of(options.budget, outcome.steps, outcome.tokens, outcome.seconds)) < 1:
            rate = learning_rate(done, options.lr, options.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            sums: dict[str, Tensor] = {}
            for _ in range(accumulation):
                batch = {key: x.to(device) for key, x in next(stream).items()}
                losses = step(batch, lambda loss: accelerator.backward(loss / accumulation))
                sums = {key: sums.get(key, 0.0) + x / accumulation for key, x in losses.items()}
                outcome.tokens += int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
            reported = {key: float(x) for key, x in sums.items()}
            if not math.isfinite(reported["loss"]):
                raise LinearizeError(
                    f"{stage}: the loss is {reported['loss']} at step {outcome.steps + 1}; lower lr ({options.lr}), or "
                    "set dtype to float32"
                )
            if clip is not None:
                accelerator.clip_grad_norm_(parameters.values(), clip)
            optimizer.step()
            optimizer.zero_grad()

            outcome.steps += 1
            outcome.seconds = time.perf_counter() - start
            _follow(outcome, reported)
            if extra is not None:
                extra.after_step(reported)
            done = progress_of(options.budget, outcome.steps, outcome.tokens, outcome.seconds)
            speed = outcome.tokens / outcome.seconds
            if outcome.steps == 1 or outcome.steps % options.log_every == 0 or done == 1:
                log.write(outcome, reported, rate, speed)
            left = outcome.seconds * (1 - done) / max(done, 1e-3)
            bar.update(task, completed=done, loss=f"{reported['loss']:.4f}", speed=f"{speed:.0f}", left=_minutes(left))
            if bar.disable and time.perf_counter() - told_at > TELL_EVERY:
                print(
                    f"{stage}: {done:.0%}, step {outcome.steps}, loss {reported['loss']:.4f}, {speed:.0f} tokens/s, "
                    f"left {_minutes(left)}",
                    file=sys.stderr,
                    flush=True,
                )
                told_at = time.perf_counter()
            if time.perf_counter() - saved_at > 60 * options.checkpoint_minutes:
                save()
    if outcome.steps > saved_steps:
        save()
    return outcome


def _follow(outcome: Outcome, reported: dict[str, float]) -> None:
    """Keep the first step's losses, and a running mean of about the last ten."""
    if not outcome.first:
        outcome.first, outcome.last = dict(reported), dict(reported)
    share = max(0.1, 1 / outcome.steps)  # a plain mean at first, so that the first losses do not linger
    outcome.last = {key: (1 - share) * outcome.last[key] + share * value for key, value in reported.items()}


class _Log:
    """The lines of one stage in train.jsonl."""

    def __init__(self, path: Path, stage: str):
        self.path = path
        self.stage = stage

    def keep(self, steps: int) -> None:
        """Drop this stage's lines after `steps`: they are of a run that was killed after its last checkpoint."""
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
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, outcome: Outcome, reported: dict[str, float], rate: float, speed: float) -> None:
        layers = {key.removeprefix("layer."): x for key, x in reported.items() if key.startswith("layer.")}
        record: dict[str, Any] = {
            "stage": self.stage,
            "step": outcome.steps,
            "tokens": outcome.tokens,
            "loss": reported["loss"],
            "lr": rate,
            "tokens_per_s": round(speed, 1),
        }
        if layers:
            record["losses_per_layer"] = layers
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _progress(stage: str) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
