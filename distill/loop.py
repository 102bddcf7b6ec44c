"""The loop that every training stage shares: budget, schedule, log, checkpoints, progress."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from linearize.distill import checkpoints, processes
from linearize.distill.adam import Adam
from linearize.distill.data import Batch, TokenStream
from linearize.distill.options import Budget, DistillOptions, TransferOptions
from linearize.distill.tracking import Log, peak_memory
from linearize.errors import LinearizeError

__all__ = ["FINAL_LR", "Outcome", "agreed_checkpoint", "learning_rate", "progress_of", "train"]

TELL_EVERY = 30.0  # seconds between lines of progress where there is no terminal for a bar
FINAL_LR = 0.1  # of the peak, at the end of the cosine
# Diverging is a loss that stays far above what was reached: single documents are hard, 50 steps on end are not.
DIVERGING, PATIENCE, SETTLED = 4.0, 50, 10

StepLosses = dict[str, Tensor]
"""What a step reports, each a detached scalar: `loss`, and `layer.N` where layers have losses of their own."""


@dataclass
class Outcome:
    """What a stage did, all processes together.

    Attributes:
        steps, tokens, seconds: in all.
        first: the reported losses of the first step.
        last: their mean over about the last ten steps.
        best: the least that `last` has been.
        above: for how many steps on end the loss has been diverging: its `last` more than DIVERGING times its `best`
            and more than half of its `first`.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    above: int = 0


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
    optimizer: Adam | None = None,
) -> Outcome:
    """Train until the budget is used, from the newest checkpoint in `folder`/checkpoints/`stage` where there is one.

    A stage that was killed and called again ends with the weights of one that was not, but for a budget in minutes:
    the time between the last checkpoint and the kill does not count.

    In P processes a step is the next P * `accumulation` batches of the stream, every process taking each P-th, and its
    loss is the mean of theirs: each batch counts the same, however many of its tokens are real. So one process with P
    times the accumulation trains the same, up to rounding, and a stage may go on in another number of processes.

    Args:
        stage: its name in the log and among the checkpoints.
        step: `step(batch, backward)` computes losses, calls `backward` on them and returns what to report: the same
            names in every process.
        parameters: what is trained, by name.
        stream: where batches come from; its position is part of a checkpoint. Every process has its own, at the same
            position, and leaves it at the same one.
        options: budget, lr, warmup, checkpoint_minutes, log_every.
        folder: of the run; `train.jsonl` there gets a line every `log_every` steps, see `linearize.distill.tracking`.
        accumulation: batches an optimizer step, in each process.
        lr_scale: factor on the learning rate of a parameter, by its name.
        clip: limit on the norm of all gradients together; None is no limit.
        optimizer: `Adam` of these parameters, for a step that updates on its own as well;
            None makes one.

    Returns:
        Steps, tokens and seconds in all, and the reported losses at both ends.

    Raises:
        LinearizeError: a checkpoint that cannot be used, a loss or gradient that is no number, a loss that diverges, a
            disk that is full, or a way of launching that is not supported. The last good checkpoint stays.
    """
    accelerator = processes.open_accelerator()
    if optimizer is None:
        optimizer = Adam(parameters, lr_scale)
    saved = folder / "checkpoints" / stage
    outcome = Outcome()
    newest = agreed_checkpoint(saved)
    if newest is not None:
        state = checkpoints.restore(newest, optimizer.trained, optimizer)
        stream.load_state_dict(state["stream"])
        outcome = Outcome(**state["outcome"])
    processes.same_start(optimizer.trained.values())
    optimizer.round()
    log = Log(folder / "train.jsonl", stage, outcome.steps)
    saved_steps, saved_at = outcome.steps, time.perf_counter()

    def save() -> None:
        nonlocal saved_steps, saved_at
        if processes.rank() == 0:
            state = {"stream": stream.state_dict(), "outcome": vars(outcome)}
            checkpoints.write(saved, outcome.steps, optimizer.trained, optimizer, state)
        saved_steps, saved_at = outcome.steps, time.perf_counter()

    def way_out() -> str:
        kept = checkpoints.latest(saved)
        last = "there is no checkpoint yet" if kept is None else f"the last good checkpoint, {kept}, is kept"
        return f"{last}; lower lr ({options.lr}) and run it again, or set dtype to float32"

    start = time.perf_counter() - outcome.seconds
    told_at = time.perf_counter()
    with closing(optimizer), _progress(stage) as bar:
        task = bar.add_task(stage, total=1.0, loss="-", speed="-", left="-")
        while (done := progress_of(options.budget, outcome.steps, outcome.tokens, outcome.seconds)) < 1:
            rate = learning_rate(done, options.lr, options.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            sums: dict[str, Any] = {}
            tokens = 0
            for _ in range(accumulation):
                batch = {key: x.to(device) for key, x in _next_of_mine(stream).items()}
                with accelerator.autocast():
                    losses = step(batch, lambda loss: (loss / accumulation).backward())
                sums = {key: sums.get(key, 0.0) + x / accumulation for key, x in losses.items()}
                tokens += int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
            counts = {"tokens": tokens, "seconds": time.perf_counter() - start}
            reported = processes.means(sums | counts, device)
            seconds = reported.pop("seconds")
            tokens = round(reported.pop("tokens") * processes.count())
            optimizer.average()
            norm = _gradient_norm(optimizer, clip)
            if not all(math.isfinite(x) for x in (*reported.values(), norm)):
                raise LinearizeError(
                    f"{stage}: {_not_finite(reported, optimizer.trained)} at step {outcome.steps + 1}; {way_out()}"
                )
            optimizer.step()
            optimizer.zero_grad()

            outcome.steps += 1
            outcome.tokens += tokens
            outcome.seconds = seconds
            _follow(outcome, reported)
            if outcome.above >= PATIENCE:
                raise LinearizeError(f"{stage}: {_diverged(outcome)} at step {outcome.steps}; {way_out()}")
            done = progress_of(options.budget, outcome.steps, outcome.tokens, outcome.seconds)
            speed = outcome.tokens / outcome.seconds
            if outcome.steps == 1 or outcome.steps % options.log_every == 0 or done == 1:
                told = {"step": outcome.steps, "tokens": outcome.tokens, "seconds": round(seconds, 3)}
                told |= {"loss": reported["loss"], "lr": rate, "grad_norm": norm, "tokens_per_s": round(speed, 1)}
                told["peak_memory_bytes"] = int(processes.greatest(peak_memory(device), device))
                log.write(told, reported)
            left = outcome.seconds * (1 - done) / max(done, 1e-3)
            bar.update(task, completed=done, loss=f"{reported['loss']:.4f}", speed=f"{speed:.0f}", left=_minutes(left))
            if bar.disable and processes.rank() == 0 and time.perf_counter() - told_at > TELL_EVERY:
                print(
                    f"{stage}: {done:.0%}, step {outcome.steps}, loss {reported['loss']:.4f}, {speed:.0f} tokens/s, "
                    f"left {_minutes(left)}",
                    file=sys.stderr,
                    flush=True,
                )
                told_at = time.perf_counter()
            # What may be diverging does not replace what was good.
            if time.perf_counter() - saved_at > 60 * options.checkpoint_minutes and not outcome.above:
                save()
    if outcome.steps > saved_steps:
        save()
    log.end(outcome.steps)
    return outcome


def agreed_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a stage, that all processes go on from, or None.

    Raises:
        LinearizeError: the processes find different ones.
    """
    newest = checkpoints.latest(folder)
    found = [None if path is None else path.name for path in processes.gather(newest)]
    if len(set(found)) > 1:
        raise LinearizeError(
            f"checkpoints: the processes find different ones ({', '.join(map(str, found))}, by number); give an output "
            "folder that all machines share"
        )
    return newest


def _next_of_mine(stream: TokenStream) -> Batch:
    """This process's one of the next batches, of which each process takes one; afterwards all are behind them."""
    count, rank = processes.count(), processes.rank()
    if count == 1:
        return next(stream)
    stream.skip(rank)
    batch = next(stream)
    stream.skip(count - 1 - rank)
    return batch


def _gradient_norm(optimizer: Adam, clip: float | None) -> float:
    """The norm of all gradients together, which are then no larger than `clip`."""
    trained = list(optimizer.trained.values())
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
    return float(norm)


def _not_finite(reported: dict[str, float], trained: dict[str, nn.Parameter]) -> str:
    """Which losses, parameters and gradients are no numbers, in words."""
    parts = []
    layers = [key.removeprefix("layer.") for key, x in reported.items() if _bad(x) and key.startswith("layer.")]
    if _bad(reported["loss"]):
        parts.append(f"the loss is {reported['loss']}")
    if layers:
        parts.append(f"not finite is the loss of layer {_listed(layers)}")
    for what, tensors in (
        ("the parameter", {name: p.detach() for name, p in trained.items()}),
        ("the gradient of", {name: p.grad for name, p in trained.items() if p.grad is not None}),
    ):
        names = [name for name, x in tensors.items() if not bool(torch.isfinite(x).all())]
        if names:
            parts.append(f"not finite is {what} {_listed(names)}")
    return ", ".join(parts)


def _bad(value: float) -> bool:
    return not math.isfinite(value)


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _diverged(outcome: Outcome) -> str:
    """Which losses have left what they had reached, in words."""
    layers = [
        key.removeprefix("layer.")
        for key, best in outcome.best.items()
        if key.startswith("layer.") and outcome.last[key] > DIVERGING * best
    ]
    where = f", above all in layer {_listed(layers)}" if layers else ""
    return (
        f"the loss diverges{where}: it was {outcome.best['loss']:.4g} and is {outcome.last['loss']:.4g} since "
        f"{outcome.above} steps"
    )


def _follow(outcome: Outcome, reported: dict[str, float]) -> None:
    """Keep the first step's losses, a running mean of about the last ten, and the least that this has been."""
    if not outcome.first:
        outcome.first, outcome.last = dict(reported), dict(reported)
    share = max(0.1, 1 / outcome.steps)  # a plain mean at first, so that the first losses do not linger
    outcome.last = {key: (1 - share) * outcome.last[key] + share * value for key, value in reported.items()}
    if outcome.steps >= SETTLED:
        outcome.best = {key: min(outcome.best.get(key, x), x) for key, x in outcome.last.items()}
        # A loss that was nearly 0 and is so no more is no harm: it has to be back where it came from as well.
        worse = outcome.last["loss"] > max(DIVERGING * outcome.best["loss"], 0.5 * outcome.first["loss"])
        outcome.above = outcome.above + 1 if worse else 0


def _progress(stage: str) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
        console=console,
        disable=not console.is_terminal or processes.rank() != 0,
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
