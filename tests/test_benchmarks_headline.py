"""The headline follows the numbers in both directions, and leaves nothing out that speaks against the student."""

import re

import pytest

from linearize.benchmarks.headline import headline, one_line
from tests.benchmark_results import fabricate_bench, fabricate_evaluation

NLL = {"original": 3.0, "window + sinks": 3.8, "student": 3.4}
TIMES = {
    "original": {512: 20.0, 2048: 40.0, 8192: 70.0},
    "static": {512: 22.0, 2048: 35.0, 8192: 60.0},
    "student": {512: 30.0, 2048: 30.0, 8192: 30.0},
}


def topics(claims):
    return {claim.topic: claim for claim in claims}


def quality(nll=None, **options):
    return topics(headline(fabricate_evaluation({**NLL, **(nll or {})}, **options), None))


def speed(monkeypatch, times=TIMES, **options):
    return topics(headline(None, fabricate_bench(monkeypatch, times, **options)))


def test_speed_shows_the_best_and_the_worst(monkeypatch):
    found = speed(monkeypatch)
    best, worst = found["Decoding at 8192 tokens"], found["Decoding at 512 tokens"]
    assert (best.tone, worst.tone) == ("good", "bad")
    assert best.value in ("1.99×", "2.00×", "2.01×")
    assert worst.value in ("0.66×", "0.67×", "0.68×")
    assert best.basis.startswith("Best of 3 measured; batch 1, float32 on cpu")
    assert best.basis.endswith("each in its better mode: dynamic, the original static.")
    assert worst.basis.endswith("each in its better mode: dynamic, the original dynamic.")
    assert "Decoding at 2048 tokens" not in found
    # Neither is quoted without the other.
    assert best.brief == f"decodes {best.value} as fast at 8192 tokens, {worst.value} at 512 tokens"
    assert worst.brief == ""


def test_a_student_that_is_slower_everywhere(monkeypatch):
    found = speed(monkeypatch, TIMES | {"student": dict.fromkeys(TIMES["student"], 90.0)})
    decoding = [claim for topic, claim in found.items() if topic.startswith("Decoding")]
    assert [claim.tone for claim in decoding] == ["bad", "bad"]
    assert found["Prefill of 8192 tokens"].tone == "bad"


def test_one_context_and_no_difference(monkeypatch):
    times = {"original": {64: 20.0}, "static": {64: 30.0}, "student": {64: 20.0}}
    found = speed(monkeypatch, times, noise=0.2)
    (decoding,) = [claim for topic, claim in found.items() if topic.startswith("Decoding")]
    assert decoding.tone == "open"
    assert decoding.brief.endswith("at 64 tokens (no difference measured)")
    assert decoding.basis.startswith("Batch 1")
    assert found["Prefill of 64 tokens"].tone == "open"
    assert found["Cache at 64 tokens"].tone == "bad"  # more bytes than the original's at so short a context
    assert found["Cache at 64 tokens"].value == "170 %"


def test_one_repeat_has_no_spread(monkeypatch):
    assert "one repeat, no spread" in speed(monkeypatch, repeats=1)["Decoding at 8192 tokens"].text


def batched(result):
    """The same at two batches, the student four times slower at the second; prefills of it were not read."""
    cells, pairs = [], []
    for batch, slower in ((1, 1.0), (8, 4.0)):
        for cell in result["cells"]:
            cells.append({**cell, "batch": batch, "weight_bytes": 2**28})
            if batch == 8:
                cells[-1]["prefill_ms"] = None
        for pair in result["comparisons"]:
            ratio = {key: pair["speedup"][key] / slower for key in ("p50", "min", "max")}
            interval = [0.9 * ratio["min"], 1.1 * ratio["max"]]
            verdict = "faster" if interval[0] > 1 else "slower" if interval[1] < 1 else "undecided"
            pairs.append({**pair, "batch": batch, "speedup": {**ratio, "ci95": interval}, "verdict": verdict})
    return {**result, "schema": 2, "batches": [1, 8], "cells": cells, "comparisons": pairs}


def test_batches_are_told_apart(monkeypatch):
    found = topics(headline(None, batched(fabricate_bench(monkeypatch, TIMES))))
    assert found["Decoding at 8192 tokens, batch 1"].tone == "good"
    worst = found["Decoding at 512 tokens, batch 8"]
    assert worst.tone == "bad"
    assert worst.value in ("0.16×", "0.17×")
    assert worst.basis.startswith("Worst of 6 measured; batch 8")
    assert re.search(r"\(0\.15 to 0\.1[89] in 5 repeats\)", worst.text)  # the interval, not the range
    assert found["Prefill of 8192 tokens, batch 1"].tone == "good"
    assert "the student's are 256 MiB" in found["Cache at 8192 tokens, batch 1"].basis


def test_spare_room_of_a_preallocated_cache_is_nobodys_merit(monkeypatch):
    result = fabricate_bench(monkeypatch, TIMES)
    for cell in result["cells"]:
        if cell["mode"] == "static":
            cell["cache_bytes"] = {"total": 2**40}
    assert topics(headline(None, result))["Cache at 8192 tokens"].text.endswith("4.77 MiB against 360 MiB")


def test_prefills_of_lengths_asked_for_count(monkeypatch):
    result = batched(fabricate_bench(monkeypatch, TIMES))
    for row, middle in (("student", 900.0), ("original", 300.0)):
        ms = {"p50": middle, "min": middle - 1, "max": middle + 1}
        result["prefill"].append({"row": row, "length": 16384, "batch": 1, "repeats": 4, "ms": ms})
    claim = topics(headline(None, result))["Prefill of 16384 tokens, batch 1"]
    assert (claim.tone, claim.value) == ("bad", "0.33×")


@pytest.mark.parametrize(
    ("student", "tone", "value"), [(3.4, "bad", "1.49×"), (2.8, "good", "0.82×"), (3.0, "open", "1.00×")]
)
def test_perplexity(student, tone, value):
    claim = quality({"student": student})["Perplexity on held-out text"]
    assert (claim.tone, claim.value) == (tone, value)
    assert "16 sequences of 257 tokens" in claim.basis
    assert "trained in the same way" not in claim.basis


def test_a_better_perplexity_stands_beside_the_controls():
    claim = quality({"student": 2.8, "control": 2.7})["Perplexity on held-out text"]
    assert claim.tone == "good"
    assert "The original, trained in the same way: 14.9." in claim.basis


def test_one_sequence_cannot_tell():
    claim = quality(sequences=1)["Perplexity on held-out text"]
    assert claim.tone == "unclear"
    assert "(no interval)" in claim.text


def test_perplexity_that_is_not_finite():
    claim = quality({"student": float("nan")})["Perplexity on held-out text"]
    assert claim.tone == "bad"
    assert "student: 4096 of 4096" in claim.text
    assert claim.brief == "perplexity on held-out text not finite"


def test_every_text_at_its_longest_context():
    result = fabricate_evaluation(NLL)
    worse = fabricate_evaluation({**NLL, "student": 3.8}, seq_len=1025)
    result["texts"] = {
        "a": {"257": result["perplexity"], "1025": worse["perplexity"]},  # the longest, and the first in the alphabet
        "b": {"257": fabricate_evaluation({**NLL, "student": 2.9})["perplexity"]},
    }
    found = topics(headline(result, None))
    assert (found["Perplexity on a"].value, found["Perplexity on a"].tone) == ("2.23×", "bad")
    assert (found["Perplexity on b"].value, found["Perplexity on b"].tone) == ("0.90×", "good")


@pytest.mark.parametrize(
    ("student", "original", "tone", "value"),
    [
        (0.45, 0.75, "bad", "40 %"),
        (0.90, 0.75, "good", "130 %"),
        (0.75, 0.75, "open", "100 %"),
        (0.30, 0.20, "unclear", ""),
    ],
)
def test_accuracy(student, original, tone, value):
    claim = quality(right=dict.fromkeys(NLL, original) | {"student": student})["Accuracy on tasks"]
    assert (claim.tone, claim.value) == (tone, value)
    assert "100 questions; guessing gives 25 %" in claim.basis


@pytest.mark.parametrize(
    ("student", "original", "tone", "value"),
    [
        # The last three of nine are those of the longest text.
        (6, 9, "bad", "0 of 3"),
        (8, 9, "open", "2 of 3"),
        (9, 9, "open", "3 of 3"),
        (9, 6, "unclear", "3 of 3"),
    ],
)
def test_needles_at_the_longest_text(student, original, tone, value):
    claim = quality(found=dict.fromkeys(NLL, 1) | {"student": student, "original": original})["Needles at 1024 tokens"]
    assert (claim.tone, claim.value) == (tone, value)


def test_what_is_missing_is_a_claim():
    found = headline(None, None)
    assert [(claim.topic, claim.tone) for claim in found] == [("Speed and memory", "missing"), ("Quality", "missing")]
    assert one_line(found) == "Speed and memory: not measured; quality: not measured."
    found = topics(headline(fabricate_evaluation({"original": 3.0}), None))
    assert found["Quality"].text == "No student was measured."
    assert [topic for topic, claim in quality().items() if claim.tone == "missing"] == [
        "Speed and memory",
        "Accuracy on tasks",
        "Needles",
    ]


def test_without_a_student_no_speed_is_claimed(monkeypatch):
    times = {"original": {64: 20.0}, "static": {64: 30.0}, "control": {64: 10.0}}
    assert speed(monkeypatch, times)["Speed and memory"].text == "No student was timed beside the original."


def test_the_one_line_is_a_sentence(monkeypatch):
    bench = fabricate_bench(monkeypatch, TIMES)
    line = one_line(headline(fabricate_evaluation(NLL), bench))
    assert line.startswith("Decodes ")
    assert line.endswith("needles: not measured.")
    assert one_line([]) == ""
