"""What the transfer stage costs beside the teacher's plain forward pass: time and memory of both, in one run.

    python -m linearize.benchmarks.transfer_cost MODEL --text FILE [--seq-len 1024] [--repeats 5] [--out FILE]

teacher     one forward pass of the original with its language head, without gradients
transfer    one step of the stage: the teacher's pass, every layer's loss and gradient, and the optimizer's step

Repeats are interleaved, teacher and transfer in turn on the same rows, so that a machine that slows down slows both.
Memory comes first, in a step that makes the optimizer's state: the weights and the most bytes of tensors alive at once,
from PyTorch's record of every allocation on a CPU and from its allocator on a GPU. `bench_transfer` returns

    {"kind": "linearize.bench_transfer", "schema": 1, "model": str, "objective": str, "local_steps": int,
     "seq_len": int, "repeats": int, "dtype": str, "device": str,
     "rows": {"teacher" | "transfer": {"seconds": SPREAD, "processor_seconds": SPREAD, "tokens_per_s": float,
                                       "peak_bytes": int}},
                                       SPREAD as in linearize.benchmarks.speed; processor_seconds are of this process,
                                       which other programs on the machine do not move much; tokens_per_s of the median
     "speed_ratio": float,             tokens/s of transfer over the teacher's: the median of the repeats' own ratios
     "processor_ratio": float,         the same in processor time
     "memory_ratio": float,            peak_bytes of transfer over the teacher's
     "load": [float, float, float] | null, "machine": {...}}            see linearize.benchmarks.machine
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from linearize.benchmarks.files import write_json
from linearize.benchmarks.machine import machine_info, synchronize
from linearize.benchmarks.peak import peak_bytes
from linearize.benchmarks.speed import spread
from linearize.config import LinearizeConfig
from linearize.convert import added_parameters, convert, original_attention
from linearize.distill.adam import Adam
from linearize.distill.calibration import mix_lr_scale
from linearize.distill.data import Batch, build_stream
from linearize.distill.objectives import OBJECTIVES
from linearize.distill.options import DataOptions, Source
from linearize.distill.transfer import check_taught, transfer_step
from linearize.errors import LinearizeError
from linearize.models import load_model, resolve_dtype

__all__ = ["KIND", "bench_transfer", "main"]

KIND = "linearize.bench_transfer"
ROWS = ("teacher", "transfer")


def bench_transfer(
    model: Any, batches: Sequence[Batch], objective: str = "decomposed", local_steps: int = 1
) -> dict[str, Any]:
    """Measure a converted model, in evaluation mode.

    Args:
        model: converted; its weights stay what they are (the learning rate is 0), and only mixers and mixes are left
            asking for gradients.
        batches: one for memory, one to warm up, and one for each repeat.
        objective, local_steps: as in `TransferOptions`.

    Returns:
        JSON-able; the module's docstring has the keys, of which `model` and `dtype` are the caller's to add.
    """
    device = next(model.parameters()).device
    batches = [{key: x.to(device) for key, x in batch.items()} for batch in batches]
    parameters = added_parameters(model)
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = Adam(parameters, mix_lr_scale)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def teacher(batch: Batch) -> None:
        with original_attention(model), torch.no_grad():
            model(input_ids=batch["input_ids"], use_cache=False)

    def transfer(batch: Batch) -> None:
        transfer_step(model, batch, objective, lambda loss: loss.backward(), update, local_steps)
        update()

    runs = dict(zip(ROWS, (teacher, transfer)))
    memory = {name: peak_bytes(partial(run, batches[0]), device) for name, run in runs.items()}
    weights = 0 if device.type == "cuda" else sum(p.numel() * p.element_size() for p in model.parameters())
    for run in runs.values():
        run(batches[1])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for batch in batches[2:]:
        for name, run in runs.items():
            times[name].append(_timed(partial(run, batch), device))
    tokens = batches[0]["input_ids"].numel()
    rows: dict[str, dict[str, Any]] = {
        name: {
            "seconds": spread([wall for wall, _ in found]),
            "processor_seconds": spread([processor for _, processor in found]),
            "tokens_per_s": tokens / median(wall for wall, _ in found),
            "peak_bytes": weights + memory[name],
        }
        for name, found in times.items()
    }
    ratios = [
        median(plain[clock] / step[clock] for plain, step in zip(times["teacher"], times["transfer"]))
        for clock in (0, 1)
    ]
    return {
        "kind": KIND,
        "schema": 1,
        "objective": objective,
        "local_steps": local_steps,
        "seq_len": batches[0]["input_ids"].shape[1],
        "repeats": len(batches) - 2,
        "device": str(device),
        "rows": rows,
        "speed_ratio": ratios[0],
        "processor_ratio": ratios[1],
        "memory_ratio": rows["transfer"]["peak_bytes"] / rows["teacher"]["peak_bytes"],
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "machine": machine_info(),
    }


def _timed(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and of this process's threads on processors."""
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - processor


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a model by name, print the two rows and write the JSON; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m linearize.benchmarks.transfer_cost", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", help="the original: a folder, a hub name or a GGUF file")
    parser.add_argument("--text", action="append", required=True, help="a text file or a glob; many times")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a row")
    parser.add_argument("--batch-size", type=int, default=1, help="rows a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), default="decomposed")
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--window", type=int, default=LinearizeConfig().window)
    parser.add_argument("--sinks", type=int, default=LinearizeConfig().sinks)
    parser.add_argument("--feature-dim", type=int, default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default=None)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on a CPU")
    parser.add_argument("--out", type=Path, default=Path("transfer_cost.json"))
    asked = parser.parse_args(arguments)
    try:
        for name in ("repeats", "local_steps", "threads", "batch_size"):
            if getattr(asked, name) < 1:
                raise LinearizeError(f"{name}: {getattr(asked, name)} is less than 1; give a number from 1 on")
        result = _measure(asked)
    except LinearizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, row in result["rows"].items():
        print(f"{name:<9} {row['tokens_per_s']:8.1f} tokens/s  {row['peak_bytes'] / 2**20:8.0f} MiB")
    print(
        f"transfer is {result['speed_ratio']:.2f} times as fast ({result['processor_ratio']:.2f} by processor time) "
        f"and takes {result['memory_ratio']:.2f} times the memory"
    )
    print(write_json(asked.out, result))
    return 0


def _measure(asked: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(asked.threads)
    config = LinearizeConfig(window=asked.window, sinks=asked.sinks, feature_dim=asked.feature_dim)
    check_taught(config, asked.seq_len, "transfer_cost")
    dtype, _ = resolve_dtype(asked.dtype, asked.device)
    model, tokenizer = load_model(asked.model, dtype, asked.device)
    sources = tuple(Source(kind="text", path=path) for path in asked.text)
    options = DataOptions(sources=sources, seq_len=asked.seq_len, batch_size=asked.batch_size)
    stream = build_stream(options, tokenizer, seed=0)
    batches = [{"input_ids": next(stream)["input_ids"]} for _ in range(asked.repeats + 2)]
    measured = bench_transfer(convert(model, config), batches, asked.objective, asked.local_steps)
    return {
        **measured,
        "model": asked.model,
        "dtype": str(dtype).removeprefix("torch."),
        "conversion": config.to_dict(),
    }


if __name__ == "__main__":
    sys.exit(main())
