"""What speculative decoding with a student is worth: acceptance length, time per token, and whether texts are equal.

    python -m linearize.benchmarks.speculative STUDENT --prompts FILE [--contexts 1k,4k,8k] [--equality 200]

STUDENT is a student, or an original, which is converted here and drafts untrained. Speed is measured where contexts are
given: a prompt is exchanges of the files, one after another up to that many tokens, with a question at its end, and
greedy decoding goes on for `--new-tokens` whatever they are. Repeats are interleaved and every one has a prompt of its
own, the same for both sides.

original      the model in transformers' own class, a token a step, in every mode that it has (see
              `linearize.benchmarks.modes`) without the loop of `generate` around it: the best is compared
speculative   `linearize.speculative_generate`, all of it after the prompt is read

Equality (`--equality N`) is of N short prompts: greedy `generate` of the original beside `speculative_generate`, up to
the end of text. Where the two part, the margin says by how much the original preferred its token in the block's pass:
a margin of the size of rounding is a tie. For scale, the original is held against itself: one pass over what it
generated token by token, and how often its likeliest token there is another one.

Result:

    {"kind": "linearize.bench_speculative", "schema": 1, "student": str, "trained": bool, "conversion": {...},
     "weights": 1 | 2,                 sets in memory: 2 where the original stands apart
     "draft_tokens": int | "auto", "dtype": str, "device": str, "threads": int, "seed": int, "prompts": [FILE, ...],
     "new_tokens": int, "repeats": int,
     "cells": [{"context": int,
                "original": {MODE: {"ms_per_token": SPREAD, "prefill_ms": SPREAD}}, "mode": MODE,        the best
                "speculative": {"ms_per_token": SPREAD, "prefill_ms": SPREAD,                SPREAD over repeats
                                "draft_ms": float, "verify_ms": float,                       medians, of a block
                                "acceptance_length": float, "acceptance_rate": float, "draft_length": float},
                "speedup": {SPREAD, "ci95": [low, high] | null}, "verdict": str,             original / speculative
                "matmul_ms": [float, ...]}, ...],                                            before each repeat
     "equality": {"prompts": int, "new_tokens": int, "tokens": int,         tokens that the original generated
                  "equal": int, "differences": [{"prompt": int, "token": int, "margin": float}, ...],
                  "smallest_margin": float | null,                          of all tokens before a difference
                  "acceptance_length": float, "acceptance_rate": float,     of all blocks
                  "original_against_itself": {"prompts": int, "tokens": int}} | null,      that differ
     "seconds": float, "machine": {...}}                                    see linearize.benchmarks.machine
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from linearize.benchmarks.files import write_json
from linearize.benchmarks.generation import encode_prompts, load_prompts
from linearize.benchmarks.inference import inference, progress_bar
from linearize.benchmarks.machine import machine_info, matmul_ms
from linearize.benchmarks.measurement import WARMUP, Run, measure
from linearize.benchmarks.modes import Mode, compile_obstacle, modes_of
from linearize.benchmarks.speed import ratio_interval, spread, verdict
from linearize.config import LinearizeConfig
from linearize.console import parse_tokens
from linearize.convert import base_model, convert
from linearize.errors import LinearizeError
from linearize.models import load_model, recorded_conversion, resolve, resolve_dtype
from linearize.speculative import AUTO, Speculation, speculative_generate

__all__ = ["KIND", "compare_texts", "main", "time_speculation"]

KIND = "linearize.bench_speculative"


def compare_texts(
    student: Any,
    original: Any,
    apart: bool,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    draft_tokens: int | str = AUTO,
) -> dict[str, Any]:
    """Greedy text of the original by itself and with a student that drafts.

    Args:
        student: a converted model, or a PeftModel around one.
        original: the original in transformers' own class.
        apart: whether it decides, too; if not, the student's own weights do.
        prompts: of tokens.
        new_tokens: of the longest answer.
        draft_tokens: as in `speculative_generate`.

    Returns:
        "equality" of the module's docstring.
    """
    found: list[Speculation] = []
    differences: list[dict[str, Any]] = []
    before: list[float] = []
    moved: list[int] = []
    tokens = 0
    with inference(original), inference(student), progress_bar("equality", len(prompts)) as tick:
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=original.device)
            wanted = original.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
            decided = original if apart else None
            got = speculative_generate(
                student, ids, max_new_tokens=new_tokens, draft_tokens=draft_tokens, original=decided
            )
            assert got.margins is not None
            found.append(got)
            ours, theirs = (x[0, len(prompt) :].tolist() for x in (got.sequences, wanted))
            tokens += len(theirs)
            at = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), None)
            before += got.margins[:at]
            if at is not None:
                differences.append({"prompt": number, "token": at, "margin": got.margins[at]})
            moved.append(_moved(original, wanted, len(prompt)))
            tick(f"{len(differences)} differ")
    return {
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "tokens": tokens,
        "equal": len(prompts) - len(differences),
        "differences": differences,
        "smallest_margin": min(before, default=None),
        **_acceptance(found),
        "original_against_itself": {"prompts": sum(count > 0 for count in moved), "tokens": sum(moved)},
    }


def _moved(original: Any, ids: torch.Tensor, start: int) -> int:
    """How many tokens from `start` on are not the likeliest in one pass over all of them; ids (1, T)."""
    logits = original(input_ids=ids[:, :-1], use_cache=False).logits[0, start - 1 :]
    return int((logits.argmax(-1) != ids[0, start:]).sum())


def _acceptance(found: Sequence[Speculation]) -> dict[str, float | None]:
    blocks, drafted = sum(len(one.drafted) for one in found), sum(sum(one.drafted) for one in found)
    return {
        "acceptance_length": sum(one.new_tokens - 1 for one in found) / blocks if blocks else None,
        "acceptance_rate": sum(sum(one.accepted) for one in found) / drafted if drafted else None,
    }


def time_speculation(
    student: Any,
    original: Any,
    apart: bool,
    prompts: Mapping[int, Sequence[Sequence[int]]],
    new_tokens: int,
    draft_tokens: int | str = AUTO,
    modes: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Time per token of both sides.

    Args:
        prompts: context -> a prompt of so many tokens for each repeat.
        modes: names of those that the original is timed in, if it has them; None is all.
        the others: as in `compare_texts`.

    Returns:
        "cells" of the module's docstring.
    """
    device = original.device
    asked = [mode for mode in modes_of(original) if modes is None or mode.name in modes]
    timed = [mode for mode in asked if not (mode.compiled and compile_obstacle(device))]
    if not timed:
        raise LinearizeError(
            f"modes: the original has none of {', '.join(modes or ())} here; it has "
            f"{', '.join(mode.name for mode in modes_of(original))}"
        )
    plain: dict[tuple[int, str], list[tuple[float, float]]] = {}
    drafted: dict[int, list[Speculation]] = {context: [] for context in prompts}
    products: dict[int, list[float]] = {context: [] for context in prompts}
    repeats = len(next(iter(prompts.values())))
    with (
        inference(original, torch.no_grad),
        inference(student, torch.no_grad),
        progress_bar("bench", repeats * len(prompts)) as tick,
    ):
        for repeat in range(repeats):
            for context, rows in prompts.items():
                products[context].append(matmul_ms(device))
                ids = torch.tensor([rows[repeat]], device=device)
                sides: list[Mode | None] = [*timed, None]
                for side in sides[repeat % len(sides) :] + sides[: repeat % len(sides)]:
                    if side is None:
                        drafted[context].append(
                            speculative_generate(
                                student,
                                ids,
                                max_new_tokens=new_tokens,
                                draft_tokens=draft_tokens,
                                eos_token_id=[],
                                original=original if apart else None,
                            )
                        )
                        continue
                    run = Run(side, ids, 0, context + WARMUP + new_tokens, new_tokens)
                    sample = measure(original, run)
                    times = fmean(sample.step_ms), float(sample.prefill_ms or 0)
                    plain.setdefault((context, side.name), []).append(times)
                tick(f"{context} tokens")
    return [
        _cell(context, {mode.name: plain[context, mode.name] for mode in timed}, drafted[context])
        | {"matmul_ms": products[context]}
        for context in prompts
    ]


def _cell(context: int, plain: dict[str, list[tuple[float, float]]], drafted: Sequence[Speculation]) -> dict[str, Any]:
    """plain: of each mode and repeat, ms per token and of the prefill."""
    ours = [1e3 * (one.draft_seconds + one.verify_seconds) / (one.new_tokens - 1) for one in drafted]
    best = min(plain, key=lambda mode: median(step for step, _ in plain[mode]))
    ratios = [theirs / our for (theirs, _), our in zip(plain[best], ours, strict=True)]
    interval = ratio_interval(ratios)
    return {
        "context": context,
        "original": {
            mode: {
                "ms_per_token": spread([step for step, _ in found]),
                "prefill_ms": spread([prefill for _, prefill in found]),
            }
            for mode, found in plain.items()
        },
        "mode": best,
        "speculative": {
            "ms_per_token": spread(ours),
            "prefill_ms": spread([1e3 * one.prefill_seconds for one in drafted]),
            "draft_ms": median(1e3 * one.draft_seconds / len(one.drafted) for one in drafted),
            "verify_ms": median(1e3 * one.verify_seconds / len(one.drafted) for one in drafted),
            **_acceptance(drafted),
            "draft_length": sum(sum(one.drafted) for one in drafted) / sum(len(one.drafted) for one in drafted),
        },
        "speedup": spread(ratios) | {"ci95": interval},
        "verdict": verdict(interval),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a student by name, print what was found and write the JSON; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m linearize.benchmarks.speculative",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = LinearizeConfig()
    parser.add_argument("student", help="a student, or an original, which is converted here and drafts untrained")
    parser.add_argument("--base", help="the original of a whole student, or of an adapter if not the recorded one")
    parser.add_argument("--prompts", action="append", required=True, help="jsonl of chats or prompts; many times")
    parser.add_argument("--contexts", default=None, help="prompts whose speed is measured, in tokens, as in 1k,4k,8k")
    parser.add_argument("--equality", type=int, default=0, help="short prompts whose texts are compared")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--draft-tokens", default=AUTO, help="k, or auto")
    parser.add_argument("--modes", default=None, help="of the original, such as dynamic,static; all if left out")
    parser.add_argument("--apart", action="store_true", help="LoRA merged, and the original a model of its own")
    parser.add_argument("--window", type=int, default=default.window, help="of an original that is converted here")
    parser.add_argument("--sinks", type=int, default=default.sinks)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("speculative.json"))
    asked = parser.parse_args(arguments)
    try:
        result = _measure(asked)
    except LinearizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in _lines(result):
        print(line)
    print(write_json(asked.out, result))
    return 0


def _measure(asked: argparse.Namespace) -> dict[str, Any]:
    for name in ("new_tokens", "repeats"):
        if getattr(asked, name) < 2:
            raise LinearizeError(f"{name}: {getattr(asked, name)} is less than 2; give a number from 2 on")
    if not asked.contexts and asked.equality < 1:
        raise LinearizeError(
            "contexts: neither they nor --equality are given, so nothing is measured; give one of them"
        )
    contexts = parse_tokens(asked.contexts, "contexts") if asked.contexts else ()
    draft: int | str = asked.draft_tokens
    if draft != AUTO:
        if not asked.draft_tokens.isdecimal():
            raise LinearizeError(f"draft_tokens: {draft!r} is neither a number nor {AUTO!r}; give one of them")
        draft = int(asked.draft_tokens)
    begun = time.perf_counter()
    dtype, _ = resolve_dtype(asked.dtype, asked.device)
    student, original, tokenizer, apart = _load(asked, dtype)
    equality = None
    if asked.equality > 0:
        tokens = encode_prompts(tokenizer, _questions(asked.prompts, asked.equality))
        equality = compare_texts(student, original, apart, tokens, asked.new_tokens, draft)
    cells = []
    if contexts:
        prompts = {context: _long_prompts(tokenizer, asked.prompts, context, asked.repeats) for context in contexts}
        modes = asked.modes.split(",") if asked.modes else None
        cells = time_speculation(student, original, apart, prompts, asked.new_tokens, draft, modes)
    return {
        "kind": KIND,
        "schema": 1,
        "student": asked.student,
        "trained": recorded_conversion(asked.student) is not None,
        "conversion": base_model(student).config.linearize,
        "weights": 2 if apart else 1,
        "draft_tokens": draft,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(original.device),
        "threads": torch.get_num_threads(),
        "seed": asked.seed,
        "prompts": [Path(path).name for path in asked.prompts],
        "new_tokens": asked.new_tokens,
        "repeats": asked.repeats,
        "cells": cells,
        "equality": equality,
        "seconds": round(time.perf_counter() - begun, 1),
        "machine": machine_info(asked.seed),
    }


def _load(asked: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any, Any, bool]:
    """(student, original in transformers' own class, tokenizer, whether that original decides)."""
    kind = resolve(asked.student).kind
    if recorded_conversion(asked.student) is None:
        torch.manual_seed(asked.seed)
        original, tokenizer = load_model(asked.student, dtype, asked.device)
        student, _ = load_model(asked.student, dtype, asked.device)
        convert(student, LinearizeConfig(window=asked.window, sinks=asked.sinks))
        return student, original, tokenizer, asked.apart
    if kind != "adapter" and asked.base is None:
        raise LinearizeError(f"base: {asked.student!r} is a whole student; name its original with --base")
    apart = asked.apart or kind != "adapter"
    base = asked.base if kind == "adapter" else None
    student, tokenizer = load_model(asked.student, dtype, asked.device, base=base, merge=apart)
    original, _ = load_model(asked.base or base_model(student).config.name_or_path, dtype, asked.device)
    return student, original, tokenizer, apart


def _questions(paths: Sequence[str], count: int) -> list[str]:
    """The first `count`, the files in turn."""
    files = [load_prompts(path, count) for path in paths]
    turns = [file[place] for place in range(count) for file in files if place < len(file)]
    if len(turns) < count:
        raise LinearizeError(f"prompts: the files have {len(turns)} but --equality asks for {count}; ask for fewer")
    return turns[:count]


def _long_prompts(tokenizer: Any, paths: Sequence[str], context: int, count: int) -> list[list[int]]:
    """`count` prompts of `context` tokens, of different exchanges."""
    exchanges = _exchanges(tokenizer, paths)
    prompts = []
    for _ in range(count):
        history: list[int] = []
        while len(history) < context:
            question, answer = next(exchanges)
            history += question + answer
        question, _ = next(exchanges)
        if len(question) > context:
            raise LinearizeError(f"contexts: {context} tokens are less than a question; give longer ones")
        prompts.append(history[: context - len(question)] + question)
    return prompts


def _exchanges(tokenizer: Any, paths: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of question and answer, over and over."""
    while True:
        for path in paths:
            questions = load_prompts(path, sys.maxsize)
            lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
            for question, line in zip(questions, lines, strict=True):
                messages = json.loads(line).get("messages", [])
                answer = next((one["content"] for one in messages if one["role"] == "assistant"), "")
                yield encode_prompts(tokenizer, [question])[0], tokenizer(f"{answer}\n")["input_ids"]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """What a person reads."""
    equality = result["equality"]
    if equality is not None:
        yield (
            f"{equality['equal']} of {equality['prompts']} texts equal; {equality['acceptance_length']:.2f} tokens a "
            f"block; the original's own pass over its text differs in {equality['original_against_itself']['prompts']}"
        )
        for one in equality["differences"]:
            yield f"  prompt {one['prompt']} parts at token {one['token']}, margin {one['margin']:.2g}"
    for cell in result["cells"]:
        ours = cell["speculative"]
        yield (
            f"{cell['context']:7} tokens: {cell['original'][cell['mode']]['ms_per_token']['p50']:.1f} ms a token alone "
            f"({cell['mode']}), {ours['ms_per_token']['p50']:.1f} with drafts: {cell['speedup']['p50']:.2f} times as "
            f"fast, {ours['acceptance_length']:.2f} tokens a block"
        )


if __name__ == "__main__":
    sys.exit(main())
