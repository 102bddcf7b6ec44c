"""`linearize bench capacity`: how many sequences fit into a memory, how fast they are, what finished answers cost."""

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli_options import Device, DType, Seed, quiet
from linearize.console import human_bytes, human_tokens, note, parse_bytes, parse_tokens
from linearize.errors import LinearizeError

__all__ = ["capacity"]


def capacity(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A student's folder, or an original beside window + sinks.")
    ],
    memory: Annotated[str, typer.Option(help="For weights and caches, as 8GiB or 24GB.")],
    contexts: Annotated[str, typer.Option(help="Tokens that a sequence has room for; 1k = 1024.")] = "4k,32k",
    answer_tokens: Annotated[int, typer.Option(help="Tokens of a finished answer.")] = 512,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a prompt; what an answer leaves of the context if left out.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="The longest that one measurement may be expected to take.")] = 2.0,
    base: Annotated[
        str | None, typer.Option(help="The original below a student; the one it recorded if left out.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The JSON.")] = Path("capacity.json"),
    dtype: DType = "auto",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Find the largest batch under a memory limit, and measure or predict its speed and the cost of answers.

    Example: linearize bench capacity runs/demo/student --memory 8GiB --contexts 4k,32k --answer-tokens 512
    """
    lengths = parse_tokens(contexts, "contexts")
    limit = parse_bytes(memory, "memory")
    if out.is_dir():
        raise LinearizeError(f"out: {str(out)!r} is a folder; give a file, such as {str(out / 'capacity.json')!r}")
    quiet()
    from linearize.benchmarks.capacity import bench_capacity, check_capacity
    from linearize.benchmarks.files import write_json
    from linearize.models import load_model
    from linearize.rows import speed_rows
    from linearize.tasks import announce_dtype

    check_capacity(limit, lengths, answer_tokens, prompt_tokens, minutes)  # before the weights are read
    loaded, _ = load_model(model, announce_dtype(dtype, device), device, base=base)
    found = bench_capacity(speed_rows(loaded), limit, lengths, answer_tokens, prompt_tokens, minutes, seed)
    _print(found)
    note(f"written: {write_json(out, found)}")


def _print(found: dict[str, Any]) -> None:
    """A line for each row of each context, and where its numbers are from."""
    from linearize.tables import print_table

    rows, reasons = [], []
    for cell in found["cells"]:
        start = [human_tokens(cell["context"]), cell["row"], str(cell["batch"]), human_bytes(cell["cache_bytes"])]
        if not cell["batch"]:
            rows.append([*start, "-", "-", "does not fit", "-", "-", "-"])
            continue
        step, prefill = cell["step"], cell["prefill"]
        rows.append(
            [
                *start,
                f"{step['ms']:.3g}",
                f"{cell['tokens_per_s']:.0f}",
                step["how"],
                f"{prefill['ms'] / 1e3:.3g}",
                prefill["how"],
                f"{cell['seconds_per_1000_answers']:.0f}",
            ]
        )
        for name, part, unit in (("step", step, "sequences"), ("prefill", prefill, "tokens")):
            if part["reason"] is not None:
                at = f"from {part['at']} {unit}" if part["at"] else "nothing was measured"
                reasons.append(f"{start[0]}, {cell['row']}, {name}: {part['how']}, {at}: {part['reason']}")
    columns = ["context", "row", "largest batch", "caches", "ms a step", "tokens/s", "which is"]
    columns += ["prefill of one, s", "which is", f"s per 1000 answers of {found['answer_tokens']}"]
    where = f"{found['device']}, {found['machine']['threads']} threads, {found['dtype']}"
    print_table(f"capacity in {human_bytes(found['memory_bytes'])}, {where}", columns, rows)
    for reason in reasons:
        print(reason)
    print("Memory counts weights and caches only. Predicted: by what sequences cost between two smaller batches, or by")
    print("how much longer than its bound a shorter prompt took. Bound: no faster than that, nothing measured.")
