"""Quality of several models, the rows, on the same held-out text and questions.

`evaluate_rows` returns what `write_json` stores as evaluate.json. `null` stands for what cannot be computed, such as
an interval of one sequence. All NLLs are in nats; a `ci95` is `[low, high]` or `null`.

    {"kind": "linearize.evaluate", "schema": 1,
     "baseline": "original", "rows": ["original", ...], "seed": 0,
     "seconds": {ROW: float},
     "perplexity": {
        "seq_len": int, "n_sequences": int, "n_tokens": int,            scored tokens, the same for every row
        "rows": {ROW: {
            "n_not_finite": int,                                        scored tokens whose NLL is NaN or infinite
            "nll": float | null, "nll_ci95": ci95, "ppl": float | null, "ppl_ci95": ci95,
            "by_position": [{"start": int, "end": int,                  tokens with start <= tokens before it < end
                             "n_not_finite", "nll", "nll_ci95", "ppl", "ppl_ci95"}, ...]}},
        "comparisons": [{"row": ROW, "against": ROW,                    every row against the baseline,
                         "nll_difference": float | null,                and the student against every row;
                         "ci95": ci95}, ...]},                          below 0: the row is better
     "choices": null | {
        "n_items": int, "chance": float,
        "rows": {ROW: {"raw": SCORE, "normalised": SCORE}}},            by summed log-likelihood, and that per byte
     "needle": null | {
        "candidates": 10, "chance_first": 0.1,
        "rows": {ROW: {FRACTIONS, "cells": [{"length": int, "depth": float, FRACTIONS}, ...]}}},
     "notes": [str, ...],
     "machine": {...}}                                                  see linearize.benchmarks.machine

    SCORE     = {"accuracy": float, "ci95": ci95, "retention": KEPT, "retention_over_chance": KEPT}
    KEPT      = {"value": float | null, "ci95": ci95}
    FRACTIONS = "trials": int, "greedy": float, "first": float, "mean_rank": float
"""

import time
from typing import TYPE_CHECKING, Any

from torch import Tensor

from linearize.benchmarks.choices import load_items, multiple_choice, summarise_choices
from linearize.benchmarks.inference import Rows, progress_bar
from linearize.benchmarks.machine import machine_info
from linearize.benchmarks.needle import build_needles, needle, summarise_needles
from linearize.benchmarks.perplexity import cut_sequences, perplexity, summarise_perplexity
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from linearize.distill.recipe import EvaluateOptions

__all__ = ["BASELINE", "KIND", "STUDENT", "evaluate_rows"]

KIND = "linearize.evaluate"
BASELINE = "original"
STUDENT = "student"


def evaluate_rows(
    rows: Rows,
    tokenizer: Any,
    tokens: Tensor,
    options: "EvaluateOptions",
    seed: int = 0,
    needle_trials: int = 1,
) -> dict[str, Any]:
    """Measure every row; rows are entered one after the other, each once.

    Args:
        rows: name -> function without arguments whose context manager yields the model. One is `"original"`.
        tokenizer: shared by all rows.
        tokens: LongTensor (n,), held-out text that no row was trained on.
        options: `tokens`, `seq_len`, `choices`, `choices_limit`, `needle_lengths` and `needle_depths` are read.
        seed: of the bootstrap, the choice of items and the needles.
        needle_trials: prompts per cell of the needle grid.

    Returns:
        JSON-able; the module's docstring has the keys.

    Raises:
        LinearizeError: no row `"original"`, too little text, or a bad choices file. Raised before a row is entered.
    """
    if BASELINE not in rows:
        raise LinearizeError(f"rows: {sorted(rows)} have no {BASELINE!r}; everything is compared with that row")
    text = cut_sequences(tokens, options.seq_len, options.tokens).flatten()
    items = load_items(options.choices, options.choices_limit, seed) if options.choices is not None else []
    needles = (
        build_needles(tokenizer, tokens, options.needle_lengths, options.needle_depths, needle_trials, seed)
        if options.needle_lengths and options.needle_depths
        else []
    )
    nll, scores, found, seconds = {}, {}, {}, {}
    with progress_bar("evaluate", total=len(rows) * (1 + bool(items) + bool(needles))) as advance:
        for name, enter in rows.items():
            start = time.perf_counter()
            with enter() as model:
                nll[name] = perplexity(model, text, options.seq_len)
                advance(f"{name}, perplexity")
                if items:
                    scores[name] = multiple_choice(model, tokenizer, items)
                    advance(f"{name}, multiple choice")
                if needles:
                    found[name] = needle(model, tokenizer, needles)
                    advance(f"{name}, needle")
            seconds[name] = round(time.perf_counter() - start, 1)
    return {
        "kind": KIND,
        "schema": 1,
        "baseline": BASELINE,
        "rows": list(rows),
        "seed": seed,
        "seconds": seconds,
        "perplexity": summarise_perplexity(nll, _comparisons(list(rows)), seed),
        "choices": summarise_choices(scores, items, BASELINE, seed) if items else None,
        "needle": summarise_needles(found) if needles else None,
        "notes": _notes(len(text), len(tokens), options),
        "machine": machine_info(seed),
    }


def _comparisons(rows: list[str]) -> list[tuple[str, str]]:
    """Every row against the original, and the student against every other row."""
    pairs = [(row, BASELINE) for row in rows if row != BASELINE]
    if STUDENT in rows:
        pairs += [(STUDENT, row) for row in rows if row not in (STUDENT, BASELINE)]
    return pairs


def _notes(used: int, available: int, options: "EvaluateOptions") -> list[str]:
    """What was done otherwise than asked."""
    if available < options.tokens:
        return [f"{options.tokens} tokens were asked for, the held-out text has {available}; {used} were used."]
    return []
