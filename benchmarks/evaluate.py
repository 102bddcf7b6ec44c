"""Quality of several models, the rows, on the same held-out text and questions.

`evaluate_rows` returns what `write_json` stores as evaluate.json. `null` stands for what was not measured and for what
cannot be computed, such as an interval of one sequence. All NLLs are in nats; a `ci95` is `[low, high]` or `null`.

    {"kind": "linearize.evaluate", "schema": 2,
     "baseline": "original", "rows": ["original", ...], "seed": 0,
     "seconds": {ROW: float},
     "seconds_by_measurement": {ROW: {MEASUREMENT: float}},             such as "perplexity wikitext2", "needle"
     "perplexity": null | PERPLEXITY,                                   of the first text at the first context
     "texts": {TEXT: {CONTEXT: PERPLEXITY}},                            contexts are written as in "1024"
     "choices": null | CHOICES,                                         the first task with choices
     "tasks": {TASK: CHOICES | WORDS},
     "task_mean": null | {                                              over all tasks, each weighing the same
        "tasks": int, "chance": float,
        "rows": {ROW: {"accuracy": float, "retention_over_chance": KEPT}}},
     "needle": null | {
        "candidates": 10, "chance_first": 0.1,
        "rows": {ROW: {FRACTIONS,
            "lengths": [{"length": int, FRACTIONS}, ...],
            "cells": [{"length": int, "depth": float, "keys": int, "kind": "digits" | "words", FRACTIONS}, ...]}}},
     "kl": null | {                                                     KL(original || row) per token
        "text": TEXT, "seq_len": int, "n_sequences": int, "n_tokens": int,
        "rows": {ROW: {"n_not_finite": int, "kl": float | null, "ci95": ci95,
            "by_position": [{"start", "end", "n_not_finite", "kl", "ci95"}, ...]}}},      without the original
     "generation": null | {                                             greedy answers
        "n_prompts": int, "max_new_tokens": int,
        "rows": {ROW: {
            "end_rate": float, "end_rate_ci95": ci95,                   answers that end themselves
            "repetition": float, "repetition_ci95": ci95,               mean share of 4-grams written before
            "loop_rate": float, "loop_rate_ci95": ci95,                 answers that end in a loop
            "mean_length": float,                                       tokens
            "length_ratio": float | null, "length_ratio_ci95": ci95,    over the original's
            "answers": [str, ...]}}},
     "recall": null | {                                                 see linearize.benchmarks.recall
        "probes": {PROBE: {                                             associative, copy, induction
            "n_prompts": int, "n_answers": int, "chance_first": float,
            "rows": {ROW: {RECALLED, "first_ci95": ci95, "greedy_ci95": ci95,
                "cells": [{"length": int, "pairs": int, "distance": float, "chance_first": float, "answers": int,
                           RECALLED}, ...]}},
            "comparisons": [{"row": ROW, "against": ROW,                above 0: the row is better
                             "first_difference": float, "first_ci95": ci95,
                             "greedy_difference": float, "greedy_ci95": ci95}, ...]}}},
     "letters": null | {TASK: {                                         choices by letter, in every cyclic order
        "n_items": int, "chance": float, "chance_consistency": float,
        "letters": [str, ...], "true": [float, ...],                    how often each is right
        "rows": {ROW: {"accuracy": float, "ci95": ci95,
            "letters": [float, ...],                                    how often each is chosen
            "letter_distance": float,                                   from `true`: half the sum of differences
            "consistency": float}},                                     items answered alike in all orders
        "comparisons": [{"row": ROW, "against": ROW, "accuracy_difference": float, "ci95": ci95}, ...]}},
     "attention": null | {                                              see linearize.benchmarks.attention_mass
        "text": TEXT, "seq_len": int, "n_sequences": int,
        "rows": {ROW: {"window": int, "sinks": int, "mean": {"sinks", "window", "older"},
            "layers": [{"layer": int, "sinks": [float, ...], "window": [float, ...], "older": [float, ...]}, ...],
            "bypassed": null | {"heads": int, "of": int}}},             of those that look back in the original
        "not_measured": {ROW: str}},                                    why not
     "lm_eval": null | {TASK: {                                         see linearize.benchmarks.harness
        "version", "n_samples": int | null, "chance": float | null,
        "rows": {ROW: {METRIC: {"value": float | null, "stderr": float | null,
                                "retention_over_chance": null | KEPT}}}}},
     "tokens_seen": {ROW: int},                                         trained on, where it is known
     "notes": [str, ...],
     "machine": {...}}                                                  see linearize.benchmarks.machine

    PERPLEXITY = {
        "seq_len": int, "n_sequences": int, "n_tokens": int,            scored tokens, the same for every row
        "rows": {ROW: {
            "n_not_finite": int,                                        scored tokens whose NLL is NaN or infinite
            "nll": float | null, "nll_ci95": ci95, "ppl": float | null, "ppl_ci95": ci95,
            "by_position": [{"start": int, "end": int,                  tokens with start <= tokens before it < end
                             "n_not_finite", "nll", "nll_ci95", "ppl", "ppl_ci95"}, ...]}},
        "comparisons": [{"row": ROW, "against": ROW,                    every row against the baseline,
                         "nll_difference": float | null,                and the student against every row;
                         "ci95": ci95}, ...]}                           below 0: the row is better
    CHOICES   = {"n_items": int, "chance": float,
                 "rows": {ROW: {"raw": SCORE, "normalised": SCORE}}}    by summed log-likelihood, and that per byte
    WORDS     = {"n_items": int, "chance": 0,
                 "rows": {ROW: {"raw": SCORE,                           greedy decoding writes the word
                                "log_likelihood": float | null, "log_likelihood_ci95": ci95}}}
    SCORE     = {"hits": str,                                           a 1 or 0 an item
                 "accuracy": float, "ci95": ci95, "retention": KEPT, "retention_over_chance": KEPT}
    KEPT      = {"value": float | null, "ci95": ci95}
    FRACTIONS = "trials": int, "greedy": float, "first": float, "mean_rank": float
    RECALLED  = "first": float, "greedy": float, "nll": float | null
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.benchmarks.attention_mass import attention_mass, summarise_attention
from linearize.benchmarks.choices import mean_retention, score_items, summarise_choices, summarise_words
from linearize.benchmarks.divergence import Reference, divergence, reference_states, summarise_divergence
from linearize.benchmarks.generation import answer, encode_prompts, load_prompts, summarise_answers
from linearize.benchmarks.harness import load_harness, summarise_harness
from linearize.benchmarks.inference import Rows, progress_bar
from linearize.benchmarks.items import LastWord, load_items, named_path
from linearize.benchmarks.letters import build_letters, choose_letters, lettered, summarise_letters
from linearize.benchmarks.machine import machine_info
from linearize.benchmarks.needle import build_needles, needle, summarise_needles
from linearize.benchmarks.perplexity import cut_sequences, perplexity_by_context, summarise_perplexity
from linearize.benchmarks.recall import build_recall, recall, summarise_recall
from linearize.benchmarks.work import Measured, Work, digest, digest_files
from linearize.console import note
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from linearize.distill.options import EvaluateOptions

__all__ = ["BASELINE", "KIND", "MEASUREMENTS", "STUDENT", "Measurement", "evaluate_rows", "plan_measurements"]

KIND = "linearize.evaluate"
BASELINE = "original"
STUDENT = "student"
MEASUREMENTS = ("perplexity", "choices", "needle", "kl", "generation", "recall", "letters", "attention", "lm-eval")
# Decimals of kept NLLs: far below what a float32 sum of thousands can tell apart.
DECIMALS = 6
# Of the first context, that attention is followed on: means over thousands of queries move little after that.
ATTENTION_SEQUENCES = 2


@dataclass(frozen=True)
class Measurement:
    """One thing to measure for every row.

    Attributes:
        kind: one of `MEASUREMENTS`.
        name: of its text or task; empty where there is but one.
        settings: JSON-able; all that the outcome depends on besides the row.
        measure: (model, reference) -> a JSON-able outcome. Only `kl` has a reference.
        summarise: row -> outcome, to its part of evaluate.json.
    """

    kind: str
    name: str
    settings: Any
    measure: Callable[[Any, Reference | None], Any]
    summarise: Callable[[dict[str, Any]], dict[str, Any]]

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}".strip()


def evaluate_rows(
    rows: Rows,
    tokenizer: Any,
    texts: Mapping[str, Tensor],
    options: "EvaluateOptions",
    seed: int = 0,
    work: Work | None = None,
    only: Collection[str] = MEASUREMENTS,
    conversion: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure every row; rows are entered one after the other, each at most once.

    Args:
        rows: name -> function without arguments whose context manager yields the model. One is `"original"`.
        tokenizer: shared by all rows.
        texts: name -> LongTensor (n,), held-out text that no row was trained on. Needles hide in the first, whose
            beginning `kl` reads too.
        options: all but the texts are read.
        seed: of the bootstrap, the choice of items and the needles.
        work: where finished measurements are kept, and found again. Without it nothing is kept.
        only: what is measured, among `MEASUREMENTS`. Others are in the result where `work` has them for all rows.
        conversion: JSON-able, of the rows' models. Of what is kept in `work`, where attention goes depends on it in
            every row: the original's is split at the student's window.

    Returns:
        JSON-able; the module's docstring has the keys.

    Raises:
        LinearizeError: no row `"original"`, an unknown measurement, too little text, a bad file of items or prompts,
            or tasks of lm-eval that are not there. Raised before a row is entered.
    """
    if BASELINE not in rows:
        raise LinearizeError(f"rows: {sorted(rows)} have no {BASELINE!r}; everything is compared with that row")
    for kind in only:
        if kind not in MEASUREMENTS:
            raise LinearizeError(f"only: {kind!r} is not measured; choose from {', '.join(MEASUREMENTS)}")
    plan = plan_measurements(tokenizer, texts, options, list(rows), seed, conversion)
    found: dict[tuple[str, str], Measured] = {}
    for measurement in plan:
        for row in _measured_rows(measurement, rows):
            held = work.read(row, measurement.title, measurement.settings) if work else None
            if held is not None:
                found[row, measurement.title] = held
    if work is not None and found:
        note(f"{len(found)} measurements are those of before, kept in {work.folder}; delete it to measure all again")
    missing = {
        row: [m for m in plan if m.kind in only and row in _measured_rows(m, rows) and (row, m.title) not in found]
        for row in rows
    }
    _measure(rows, missing, _kl_sequences(texts, options), found, work)
    return _result(list(rows), plan, found, texts, options, seed)


def _measured_rows(measurement: Measurement, rows: Collection[str]) -> list[str]:
    """Those that a measurement says something about: the original's distance from itself is 0."""
    return [row for row in rows if measurement.kind != "kl" or row != BASELINE]


def _measure(
    rows: Rows,
    missing: dict[str, list[Measurement]],
    sequences: Tensor,
    found: dict[tuple[str, str], Measured],
    work: Work | None,
) -> None:
    """Run what is missing, the original first, and put it into `found`."""
    compared = any(measurement.kind == "kl" for wanted in missing.values() for measurement in wanted)
    reference = None
    with progress_bar("evaluate", total=sum(map(len, missing.values())) + compared) as advance:
        for row in sorted(rows, key=lambda name: name != BASELINE):
            wanted, refer = missing[row], compared and row == BASELINE
            if not wanted and not refer:
                continue
            with rows[row]() as model:
                for measurement in wanted:
                    start = time.perf_counter()
                    outcome = measurement.measure(model, reference)
                    measured = Measured(outcome, round(time.perf_counter() - start, 1))
                    found[row, measurement.title] = measured
                    if work is not None:
                        work.write(row, measurement.title, measurement.settings, measured)
                    advance(f"{row}, {measurement.title}")
                if refer:
                    reference = reference_states(model, sequences)
                    advance(f"{row}, for kl")


def plan_measurements(
    tokenizer: Any,
    texts: Mapping[str, Tensor],
    options: "EvaluateOptions",
    rows: Sequence[str],
    seed: int,
    conversion: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """All that the options ask for, with prompts and items built: what is wrong with them shows here, without a model.

    Raises:
        LinearizeError: see `evaluate_rows`.
    """
    plan = [_perplexity(name, text, options, rows, seed) for name, text in texts.items()]
    taken: set[str] = set()
    for given in options.choices:
        name, path = named_path(given, "choices")
        if name in taken:
            raise LinearizeError(f"choices: two files are called {name!r}; write NAME={path} for one of them")
        taken.add(name)
        plan.append(_task(name, load_items(path, options.choices_limit, seed), tokenizer, seed))
    if options.needle_lengths and options.needle_depths:
        plan.append(_needles(tokenizer, next(iter(texts.values())), options, seed))
    if options.kl_tokens:
        plan.append(_divergence(texts, options, seed))
    if options.answers:
        plan.append(_generation(tokenizer, options, seed))
    if options.recall_lengths:
        plan.append(_recall(tokenizer, next(iter(texts.values())), options, rows, seed))
    if options.letters:
        plan += _letters(tokenizer, options, rows, seed)
    if options.attention:
        plan.append(_attention(texts, options, conversion))
    if options.lm_eval:
        plan += _harness(tokenizer, options, seed)
    return plan


def _cut(text: Tensor, options: "EvaluateOptions") -> Tensor:
    """As many whole sequences of the longest context as `tokens` are: the same tokens at each context that divides
    it."""
    return cut_sequences(text, max(options.contexts), options.tokens).flatten()


def _perplexity(name: str, text: Tensor, options: "EvaluateOptions", rows: Sequence[str], seed: int) -> Measurement:
    tokens = _cut(text, options)

    def measure(model: Any, _: Reference | None) -> dict[str, Any]:
        found = perplexity_by_context(model, tokens, options.contexts)
        return {str(context): _rounded(nll) for context, nll in found.items()}

    def summarise(outcomes: dict[str, Any]) -> dict[str, Any]:
        return {
            str(context): summarise_perplexity(
                {row: torch.tensor(outcome[str(context)]) for row, outcome in outcomes.items()},
                _comparisons(rows),
                seed,
            )
            for context in options.contexts
        }

    settings = {"tokens": digest(tokens.tolist()), "contexts": list(options.contexts)}
    return Measurement("perplexity", name, settings, measure, summarise)


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, DECIMALS) for value in row] for row in values.tolist()]


def _task(name: str, items: list[Any], tokenizer: Any, seed: int) -> Measurement:
    def summarise(outcomes: dict[str, Any]) -> dict[str, Any]:
        if isinstance(items[0], LastWord):
            words = {row: [(value, greedy) for ((value, greedy),) in outcome] for row, outcome in outcomes.items()}
            return summarise_words(words, BASELINE, seed)
        scores = {row: [[value for value, _ in item] for item in outcome] for row, outcome in outcomes.items()}
        return summarise_choices(scores, items, BASELINE, seed)

    settings = {"items": digest([asdict(item) for item in items])}
    return Measurement("choices", name, settings, lambda model, _: score_items(model, tokenizer, items), summarise)


def _needles(tokenizer: Any, text: Tensor, options: "EvaluateOptions", seed: int) -> Measurement:
    prompts = build_needles(
        tokenizer,
        text,
        options.needle_lengths,
        options.needle_depths,
        options.needle_trials,
        seed,
        options.needle_keys,
        options.needle_digits,
        options.needle_kind,
    )
    settings = {"prompts": digest([asdict(prompt) for prompt in prompts])}
    return Measurement("needle", "", settings, lambda model, _: needle(model, tokenizer, prompts), summarise_needles)


def _kl_sequences(texts: Mapping[str, Tensor], options: "EvaluateOptions") -> Tensor:
    tokens = _cut(next(iter(texts.values())), options)
    return cut_sequences(tokens, options.contexts[0], max(options.kl_tokens, options.contexts[0]))


def _divergence(texts: Mapping[str, Tensor], options: "EvaluateOptions", seed: int) -> Measurement:
    text = next(iter(texts))

    def measure(model: Any, reference: Reference | None) -> list[list[float]]:
        assert reference is not None, "the original is measured first"
        return _rounded(divergence(model, reference))

    def summarise(outcomes: dict[str, Any]) -> dict[str, Any]:
        values = {row: torch.tensor(outcome) for row, outcome in outcomes.items()}
        return {"text": text, **summarise_divergence(values, seed)}

    settings = {"sequences": digest(_kl_sequences(texts, options).tolist())}
    return Measurement("kl", "", settings, measure, summarise)


def _generation(tokenizer: Any, options: "EvaluateOptions", seed: int) -> Measurement:
    prompts = encode_prompts(tokenizer, load_prompts(options.prompts, options.answers))
    limit = options.answer_tokens

    def summarise(outcomes: dict[str, Any]) -> dict[str, Any]:
        return summarise_answers(outcomes, tokenizer, limit, BASELINE, seed)

    settings = {"prompts": digest(prompts), "max_new_tokens": limit}
    return Measurement("generation", "", settings, lambda model, _: answer(model, tokenizer, prompts, limit), summarise)


def _recall(tokenizer: Any, text: Tensor, options: "EvaluateOptions", rows: Sequence[str], seed: int) -> Measurement:
    prompts = build_recall(tokenizer, text, options.recall_lengths, seed)

    def summarise(outcomes: dict[str, Any]) -> dict[str, Any]:
        return summarise_recall(outcomes, prompts, _comparisons(rows), seed)

    settings = {"prompts": digest([asdict(prompt) for prompt in prompts])}
    return Measurement("recall", "", settings, lambda model, _: recall(model, prompts), summarise)


def _letters(tokenizer: Any, options: "EvaluateOptions", rows: Sequence[str], seed: int) -> list[Measurement]:
    """Of every task that can be asked by letter."""

    def plan(name: str, items: list[Any]) -> Measurement:
        prompts = build_letters(tokenizer, items)

        def summarise(outcomes: dict[str, Any]) -> dict[str, Any]:
            return summarise_letters(outcomes, items, _comparisons(rows), seed)

        settings = {"prompts": digest(prompts)}
        return Measurement("letters", name, settings, lambda model, _: choose_letters(model, prompts), summarise)

    tasks = [named_path(given, "choices") for given in options.choices]
    found = [(name, load_items(path, options.letters, seed)) for name, path in tasks]
    planned = [plan(name, items) for name, items in found if lettered(items)]
    if not planned:
        raise LinearizeError(
            f"letters: {options.letters} questions are asked by letter, and no file of choices has questions of three "
            "or more choices; name one with choices, or leave letters out"
        )
    return planned


def _attention(
    texts: Mapping[str, Tensor], options: "EvaluateOptions", conversion: Mapping[str, Any] | None
) -> Measurement:
    text, context = next(iter(texts)), options.contexts[0]
    sequences = cut_sequences(_cut(texts[text], options), context, ATTENTION_SEQUENCES * context)

    def summarise(outcomes: dict[str, Any]) -> dict[str, Any]:
        size = {"text": text, "seq_len": context, "n_sequences": len(sequences)}
        return {**size, **summarise_attention(outcomes, BASELINE)}

    settings = {"sequences": digest(sequences.tolist()), "conversion": conversion and dict(conversion)}
    return Measurement("attention", "", settings, lambda model, _: attention_mass(model, sequences), summarise)


def _harness(tokenizer: Any, options: "EvaluateOptions", seed: int) -> list[Measurement]:
    folder = options.lm_eval_tasks
    harness = load_harness(options.lm_eval, folder, options.lm_eval_limit)
    shared = {
        "version": harness.version,
        "limit": harness.limit,
        "folder": None if folder is None else digest_files(Path(folder)),
    }

    def plan(task: str) -> Measurement:
        def summarise(outcomes: dict[str, Any]) -> dict[str, Any]:
            return summarise_harness(outcomes, BASELINE, seed)

        settings = {"task": task, **shared}
        return Measurement(
            "lm-eval", task, settings, lambda model, _: harness.measure(model, tokenizer, task), summarise
        )

    return [plan(task) for task in options.lm_eval]


def _result(
    rows: list[str],
    plan: list[Measurement],
    found: dict[tuple[str, str], Measured],
    texts: Mapping[str, Tensor],
    options: "EvaluateOptions",
    seed: int,
) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {kind: {} for kind in MEASUREMENTS}
    for measurement in plan:
        own = _measured_rows(measurement, rows)
        if own and all((row, measurement.title) in found for row in own):
            outcomes = {row: found[row, measurement.title].outcome for row in own}
            parts[measurement.kind][measurement.name] = measurement.summarise(outcomes)
    seconds: dict[str, dict[str, float]] = {row: {} for row in rows}
    for (row, title), measured in found.items():
        seconds[row][title] = measured.seconds
    first = parts["perplexity"].get(next(iter(texts)))
    with_choices = (task for task in parts["choices"].values() if "normalised" in task["rows"][BASELINE])
    return {
        "kind": KIND,
        "schema": 2,
        "baseline": BASELINE,
        "rows": rows,
        "seed": seed,
        "seconds": {row: round(sum(by.values()), 1) for row, by in seconds.items()},
        "seconds_by_measurement": seconds,
        "perplexity": first and first[str(options.contexts[0])],
        "texts": parts["perplexity"],
        "choices": next(with_choices, None),
        "tasks": parts["choices"],
        "task_mean": mean_retention(list(parts["choices"].values()), BASELINE, seed) if parts["choices"] else None,
        "needle": parts["needle"].get(""),
        "kl": parts["kl"].get(""),
        "generation": parts["generation"].get(""),
        "recall": parts["recall"].get(""),
        "letters": parts["letters"] or None,
        "attention": parts["attention"].get(""),
        "lm_eval": {task: part for named in parts["lm-eval"].values() for task, part in named.items()} or None,
        "tokens_seen": {},
        "notes": [*_notes(texts, options), *_recall_notes(parts["recall"].get(""))],
        "machine": machine_info(seed),
    }


def _comparisons(rows: Sequence[str]) -> list[tuple[str, str]]:
    """Every row against the original, and the student against every other row."""
    pairs = [(row, BASELINE) for row in rows if row != BASELINE]
    if STUDENT in rows:
        pairs += [(STUDENT, row) for row in rows if row not in (STUDENT, BASELINE)]
    return pairs


def _notes(texts: Mapping[str, Tensor], options: "EvaluateOptions") -> list[str]:
    """What was done otherwise than asked."""
    return [
        f"{options.tokens} tokens were asked for, the text {name!r} has {len(text)}; {len(_cut(text, options))} "
        "were used."
        for name, text in texts.items()
        if len(text) < options.tokens
    ]


def _recall_notes(part: dict[str, Any] | None) -> list[str]:
    """Of a recall that has one probe less."""
    if part is None or "associative" in part["probes"]:
        return []
    return ["Associative recall was left out: the tokenizer has too few common words that are one token."]
