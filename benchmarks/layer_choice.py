"""The ways to choose the layers that stay softmax, judged by what each choice together leaves of the original.

    python -m linearize.benchmarks.layer_choice MODEL --text FILES [--keep 25% --keep 50%] [--out FILE.json]

Every score of `linearize.distill.selection` is measured once. Each choice is then judged on other text: all layers but
the chosen ones see window + sinks, untrained. `bench_layer_choice` returns

    {"kind": "linearize.bench_layer_choice", "schema": 1, "model": str, "dtype": str,
     "window": int, "sinks": int, "seq_len": int, "rows": int,
     "gaps": [int, ...],                              tokens between a number and the question for it
     "scores": {"lazy" | "swap" | "recall": {LAYER: float}},
     "choices": [{"by": str, "kept": [int, ...], "kl": float,      KL(original || model), mean over all tokens, nats
                  "recall": [float, ...]}, ...],                   share of the digits that come first, for each gap
     "seconds": float, "machine": {...}}              see linearize.benchmarks.machine

and the command prints it as a Markdown table.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linearize.benchmarks.files import write_json
from linearize.benchmarks.machine import machine_info
from linearize.config import LinearizeConfig
from linearize.convert import base_model, convert, converted_layers, original_attention
from linearize.distill.data import TokenStream, build_stream
from linearize.distill.logit_losses import kl_divergence
from linearize.distill.options import DataOptions, Source
from linearize.distill.selection import (
    ROWS_AT_ONCE,
    Facts,
    draw_facts,
    draw_texts,
    lazy_scores,
    only_converted,
    recall_scores,
    swap_scores,
)
from linearize.errors import LinearizeError
from linearize.models import load_model, load_tokenizer, resolve_dtype
from linearize.selection import choose_layers, parse_keep, uniform_layers

__all__ = ["KIND", "bench_layer_choice", "main", "markdown"]

KIND = "linearize.bench_layer_choice"
GAPS = (600, 1500)
ALL, NONE = "all", "none"  # layers kept


def bench_layer_choice(
    model: Any,
    tokenizer: Any,
    stream: TokenStream,
    counts: Sequence[int],
    rows: int = 2,
    gaps: Sequence[int] = GAPS,
    seed: int = 0,
) -> dict[str, Any]:
    """Choose by every score and judge the choices.

    Args:
        model: converted with mixer `"none"`, every layer that can be.
        tokenizer: of the model.
        stream: text; `rows` rows and the text between numbers are taken for the scores, then as many for judging.
        counts: how many layers are kept, one comparison each.
        rows: rows of text.
        gaps: in the texts that judge recall.
        seed: of the numbers.

    Returns:
        JSON-able; the module's docstring has the keys, of which `model` and `dtype` are the caller's to add.

    Raises:
        LinearizeError: no rows, gaps that the window spans, or so little text that a part would be read twice.
    """
    start = time.perf_counter()
    if rows < 1:
        raise LinearizeError(f"rows: {rows} is out of range; give a value at least 1")
    config = next(iter(converted_layers(model).values())).linearize_config
    if min(gaps) < 2 * config.window:
        raise LinearizeError(
            f"window: {config.window} reaches over up to {2 * config.window - 1} tokens, recall is judged over gaps of "
            f"{', '.join(map(str, gaps))}; use a smaller window"
        )
    texts, facts = draw_texts(tokenizer, stream, rows, seed)
    judged = [next(stream)["input_ids"] for _ in range(rows)]
    asked = draw_facts(tokenizer, stream, gaps, seed + 1)
    if any(position[0] for position in stream.state_dict()["positions"]):
        raise LinearizeError(
            "text: it ends before everything is drawn, and would be judged on what was scored; give more"
        )
    scores = {
        "lazy": lazy_scores(model, texts),
        "swap": swap_scores(model, texts),
        "recall": recall_scores(model, facts),
    }
    layers = sorted(converted_layers(model))
    choices: dict[str, list[tuple[int, ...]]] = {ALL: [tuple(layers)], NONE: [()]}
    for count in counts:
        choices.setdefault("uniform", []).append(uniform_layers(layers, count))
        for by, of_layers in scores.items():
            choices.setdefault(by, []).append(choose_layers(of_layers, count))
    kept = [(by, kept) for by, lists in choices.items() for kept in lists]
    judgements = _judge(model, [[x for x in layers if x not in of] for _, of in kept], judged, asked)
    found = [{"by": by, "kept": list(of)} | judgement for (by, of), judgement in zip(kept, judgements, strict=True)]
    return {
        "kind": KIND,
        "schema": 1,
        "window": config.window,
        "sinks": config.sinks,
        "seq_len": stream.seq_len,
        "rows": rows,
        "gaps": list(gaps),
        "scores": {by: {str(layer): score for layer, score in of.items()} for by, of in scores.items()},
        "choices": sorted(found, key=lambda choice: (-len(choice["kept"]), choice["kl"])),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine_info(seed),
    }


@torch.no_grad()
def _judge(
    model: Any, choices: Sequence[Sequence[int]], rows: Sequence[torch.Tensor], facts: Sequence[Facts]
) -> list[dict[str, Any]]:
    """For each choice of converted layers, KL on rows and recall on facts."""
    device = base_model(model).device
    divergences = [0.0] * len(choices)
    for row in rows:
        with original_attention(model):
            taught = model(input_ids=row.to(device), use_cache=False).logits.flatten(0, 1)
        for number, converted in enumerate(choices):
            with only_converted(model, converted):
                said = model(input_ids=row.to(device), use_cache=False).logits.flatten(0, 1)
            parts = zip(said.split(ROWS_AT_ONCE), taught.split(ROWS_AT_ONCE), strict=True)
            divergences[number] += sum(float(kl_divergence(*part, None, 1.0).sum()) for part in parts)
    judgements = []
    for converted, divergence in zip(choices, divergences, strict=True):
        recall = []
        for text in facts:
            with only_converted(model, converted):
                likeliest = model(input_ids=text.tokens.to(device), use_cache=False).logits[0].argmax(-1).cpu()
            where = text.positions
            recall.append(float((likeliest[where - 1] == text.tokens[0, where]).float().mean()))
        judgements.append({"kl": divergence / sum(row.numel() for row in rows), "recall": recall})
    return judgements


def markdown(result: dict[str, Any]) -> str:
    """A table, a line a choice."""
    heads = ["kept", "by", "layers", "KL", *(f"recall at {gap}" for gap in result["gaps"])]
    lines = [heads, ["---:", "---", "---", *["---:"] * (len(heads) - 3)]]
    for choice in result["choices"]:
        layers = "" if choice["by"] in (ALL, NONE) else ", ".join(map(str, choice["kept"]))
        shares = [f"{share:.2f}" for share in choice["recall"]]
        lines.append([str(len(choice["kept"])), choice["by"], layers, f"{choice['kl']:.3f}", *shares])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m linearize.benchmarks.layer_choice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="the original: a folder, a hub name or a .gguf file")
    parser.add_argument("--text", action="append", required=True, metavar="FILES", help="a file or a glob; many times")
    parser.add_argument("--keep", action="append", help="how many stay: 8 or 25%%; many times; 25%% and 50%% if none")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON")
    asked = parser.parse_args(words)
    try:
        dtype, _ = resolve_dtype(asked.dtype)
        tokenizer = load_tokenizer(asked.model)
        sources = tuple(Source(kind="text", path=path) for path in asked.text)
        stream = build_stream(DataOptions(sources=sources, seq_len=asked.seq_len), tokenizer, asked.seed)
        model, _ = load_model(asked.model, dtype)
        convert(model, LinearizeConfig(mixer="none", window=asked.window, sinks=asked.sinks))
        counts = [parse_keep(keep, len(converted_layers(model))) for keep in asked.keep or ("25%", "50%")]
        result = bench_layer_choice(model, tokenizer, stream, counts, asked.rows, seed=asked.seed)
        result |= {"model": asked.model, "dtype": str(dtype).removeprefix("torch.")}
        if asked.out is not None:
            write_json(asked.out, result)
    except LinearizeError as error:
        sys.exit(f"error: {error}")
    print(markdown(result), end="")


if __name__ == "__main__":
    main()
