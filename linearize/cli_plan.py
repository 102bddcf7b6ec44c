"""`linearize plan`: what decoding would take at most fast on some GPU or here, original beside student."""

from typing import Annotated, Any

import typer

from linearize.cli_options import (
    DEFAULT,
    FeatureDim,
    Mix,
    Mixer,
    Sinks,
    SoftmaxLayers,
    Window,
    conversion,
    planned_conversion,
    quiet,
)
from linearize.console import human_bytes, human_tokens, parse_bytes, parse_tokens
from linearize.errors import LinearizeError

__all__ = ["plan"]

NAMES = "h100, h200, a100-80g, a10, l4, l40s, rtx4090, mi300x"


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for inspect; a student's folder too.")],
    context: Annotated[str, typer.Option(help="Tokens behind the new one; 1k = 1024.")] = "32k,128k",
    batch: Annotated[str, typer.Option(help="Sequences at once.")] = "1,16",
    gpu: Annotated[str, typer.Option(help=f"{NAMES}, or here, which measures this machine first.")] = "h100",
    mixer: Mixer = DEFAULT.mixer,
    window: Window = DEFAULT.window,
    sinks: Sinks = DEFAULT.sinks,
    mix: Mix = DEFAULT.mix,
    softmax_layers: SoftmaxLayers = "none",
    feature_dim: FeatureDim = None,
    memory: Annotated[
        str | None, typer.Option(help="For weights and caches, as 24GB or 20GiB; the device's own if left out.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights, keys and values: float32, bfloat16, float16.")] = "bfloat16",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Bound the time per token of a model and of its conversion, before anything is converted. Reads no weights.

    Example: linearize plan path/to/model --softmax-layers every:4 --context 32k,128k --batch 1,16 --gpu h100
    """
    config = conversion(mixer, window, sinks, mix, softmax_layers, feature_dim)
    contexts, batches = parse_tokens(context, "context"), _numbers(batch, "batch")
    limit = None if memory is None else parse_bytes(memory, "memory")
    quiet()
    import torch

    from linearize.benchmarks.decode_plan import plan_decode
    from linearize.benchmarks.roofline import HERE, bandwidth, measured_roof, named_roof
    from linearize.inspection import DTYPE_BYTES, inspect_config
    from linearize.models import load_config
    from linearize.tables import print_json

    if dtype not in DTYPE_BYTES:
        raise LinearizeError(f"dtype: {dtype!r} is not known; use one of {', '.join(DTYPE_BYTES)}")
    named = None if gpu == HERE else named_roof(gpu)
    config = planned_conversion(model, config)
    model_config = load_config(model)
    inspect_config(model_config, config, contexts, dtype, name=model)  # refuses before this machine is measured
    measurement = None
    if named is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        measurement = bandwidth(device, dtypes=[dtype])
        roof = measured_roof(device, found=measurement)
    else:
        roof = named
    found = plan_decode(model_config, config, contexts, batches, roof, dtype, limit, model, measurement)
    print_json(found) if json else _print(found)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """`"1,16"` -> (1, 16)."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise LinearizeError(f"{option}: {part!r} is not a number >= 1; write for example 1,16")
    return tuple(map(int, parts))


def _print(found: dict[str, Any]) -> None:
    """One line for each row of each context and batch, and what they come to."""
    from linearize.tables import print_table

    device, limit = found["device"], found["memory_bytes"]
    pairs: dict[tuple[int, int], dict[str, Any]] = {}
    for cell in found["cells"]:
        pairs.setdefault((cell["context"], cell["batch"]), {})[cell["row"]] = cell
    rows = []
    for (context, batch), pair in pairs.items():
        for row, cell in pair.items():
            gain = pair["original"]["ms_per_token"] / cell["ms_per_token"]
            rows.append(
                [
                    human_tokens(context),
                    str(batch),
                    row,
                    f"{cell['ms_per_token']:.3g}",
                    f"{cell['tokens_per_s']:.3g}" if cell["tokens_per_s"] < 1000 else f"{cell['tokens_per_s']:.0f}",
                    "-" if row == "original" else f"{gain:.2f}",
                    cell["limited_by"],
                    human_bytes(cell["weight_bytes"]),
                    human_bytes(cell["cache_bytes"]),
                    {True: "yes", False: "no", None: "?"}[cell["fits"]],
                ]
            )
    columns = ["context", "batch", "row", "ms per token, no faster than", "tokens/s, at most", "ratio of bounds"]
    columns += ["limited by", "weights", "cache", "fits"]
    source = "measured here" if device["measured"] else "data sheet"
    print_table(f"{found['model']}: {found['family']}, {found['dtype']}, on {device['name']} ({source})", columns, rows)
    for cell in found["largest_batch"]:
        if cell["row"] != "student":
            continue
        (before,) = (x for x in found["largest_batch"] if x["row"] == "original" and x["context"] == cell["context"])
        at = human_tokens(cell["context"])
        print(f"Largest batch at {at} in {human_bytes(limit)}: {_batch(before)} -> {_batch(cell)}")
    for cross in found["crossover"]:
        said = "at no context" if cross["context"] is None else f"from {cross['context']} tokens on"
        print(f"Batch {cross['batch']}: the student's bound is the lower one {said}.")
    print(
        "These are bounds, not measurements: every weight and cached byte once, at "
        f"{device['bandwidth_gb_s']:.4g} GB/s, or every operation, at {device['peak_tflop_s']:.3g} TFLOP/s."
    )
    print("No program is faster; launches, Python, copies of caches and prefill come on top.")
    print("Fits counts weights and caches only: allow for activations, and some GiB of a GPU's own.")
    if found["positions"] is not None and max(context for context, _ in pairs) > found["positions"]:
        print(f"The model was made for {found['positions']} tokens; longer contexts show the arithmetic only.")


def _batch(found: dict[str, Any]) -> str:
    """A largest batch with its rate."""
    if not found["batch"]:
        return "none"
    return f"{found['batch']} (at most {found['tokens_per_s']:.0f} tokens/s)"
