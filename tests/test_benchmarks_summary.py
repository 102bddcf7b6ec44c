"""The summary's sentences follow the numbers in both directions, and stay undecided where the numbers do."""

import pytest

from linearize.benchmarks.summary import number, percent, quality_sentences, size, speed_sentences
from tests.benchmark_results import fabricate_bench, fabricate_evaluation, sentence_about

NLL = {
    "original": 3.0,
    "control": 2.9,
    "window + sinks": 3.8,
    "student": 3.4,
    "student, state off": 3.9,
    "student, window off": 6.0,
}
WINDOW_SINKS = "Window + sinks alone"
STATE = "With the state switched off"
WINDOW = "With the window switched off"


def quality(changes=None, **options):
    return quality_sentences(fabricate_evaluation({**NLL, **(changes or {})}, **options))


def test_a_student_that_works():
    found = quality()
    first = sentence_about(found, "Perplexity of the student")
    assert first.tone == "bad"
    assert first.text.startswith("Perplexity of the student: 30.")
    assert "of the original: 20." in first.text
    assert "1.49 times the original's" in first.text
    assert sentence_about(found, WINDOW_SINKS).tone == "good"
    assert sentence_about(found, WINDOW_SINKS).text.endswith("The student is better than this free baseline.")
    assert sentence_about(found, STATE).tone == "good"
    assert sentence_about(found, STATE).text.endswith("The state carries information.")
    assert sentence_about(found, WINDOW).text.endswith("The student needs its window.")
    assert sentence_about(found, "The student closes").text.startswith("The student closes 50 % of the gap")
    assert "improve the original itself" in sentence_about(found, "The same steps").text


@pytest.mark.parametrize(
    ("changes", "start", "tone", "end"),
    [
        ({"student": 3.9}, WINDOW_SINKS, "bad", "The student is worse than this free baseline."),
        ({"student": 3.8}, WINDOW_SINKS, "bad", "No gain over this free baseline was measured."),
        ({"student, state off": 3.4}, STATE, "bad", "The state does nothing that could be measured."),
        ({"student, state off": 3.2}, STATE, "bad", "The state does harm: the student is better without it."),
        ({"student, window off": 3.4}, WINDOW, "bad", "The window does nothing that could be measured."),
        ({"student, window off": 3.3}, WINDOW, "bad", "The window does harm: the student is better without it."),
        ({"student": 3.0}, "Perplexity of the student", "open", "; no difference measured."),
        ({"student": 2.8}, "Perplexity of the student", "good", "0.819 times the original's."),
        ({"student": 3.9}, "The student closes", "bad", "none of the gap between window + sinks and the original."),
        ({"control": 3.1}, "The same steps", "note", "make the original itself worse"),
        ({"control": 3.0}, "The same steps", "note", "leave the original as it was"),
    ],
)
def test_a_student_that_does_not(changes, start, tone, end):
    sentence = sentence_about(quality(changes), start)
    assert sentence.tone == tone
    assert end in sentence.text


def test_no_share_of_a_gap_that_may_not_be_there():
    found = quality({"window + sinks": 3.0})
    assert not [sentence for sentence in found if "the gap" in sentence.text]


def test_one_sequence_decides_nothing():
    found = quality(sequences=1)
    for start in ("Perplexity of the student", WINDOW_SINKS, STATE):
        assert sentence_about(found, start).tone == "open"
        assert "one sequence cannot tell" in sentence_about(found, start).text
    assert sentence_about(found, "Perplexity rests on one sequence of 257 tokens")


def test_few_sequences_are_mentioned_and_many_are_not():
    assert sentence_about(quality(sequences=8), "Perplexity rests on 8 sequences")
    assert not [sentence for sentence in quality(sequences=16) if sentence.text.startswith("Perplexity rests")]


def test_a_missing_control_is_mentioned():
    nll = {name: value for name, value in NLL.items() if name != "control"}
    found = quality_sentences(fabricate_evaluation(nll))
    assert sentence_about(found, "There is no control row")


def test_numbers_that_are_not_finite_come_first():
    found = quality({"student": float("nan")})
    assert found[0].tone == "bad"
    assert found[0].text == "student: 4096 of 4096 predictions are not finite numbers."
    assert not [sentence for sentence in found if "free baseline" in sentence.text]
    found = quality({"window + sinks": float("inf"), "control": float("nan")})
    assert len([sentence for sentence in found if "not finite" in sentence.text]) == 2
    assert sentence_about(found, STATE).tone == "good"
    assert not [sentence for sentence in found if sentence.text.startswith((WINDOW_SINKS, "There is no control"))]


def test_without_a_student_nothing_is_claimed():
    found = quality_sentences(fabricate_evaluation({"original": 3.0, "window + sinks": 3.8}))
    assert found[0].text == "No student was measured."


@pytest.mark.parametrize(
    ("student", "original", "tone", "part"),
    [
        (0.45, 0.75, "bad", "above guessing, the student keeps 40 %"),
        (0.75, 0.75, "open", "the student keeps 100 % (95 % interval 100 % to 100 %). No difference from the original"),
        (0.85, 0.75, "good", "above guessing, the student keeps 120 %"),
        (0.25, 0.75, "bad", "It is not clearly above guessing."),
        (0.30, 0.27, "open", "The original is not clearly above guessing, so this set cannot tell."),
        (0.30, 0.20, "open", "The original is not clearly above guessing, so this set cannot tell."),
    ],
)
def test_multiple_choice(student, original, tone, part):
    sentence = sentence_about(quality(right=dict.fromkeys(NLL, original) | {"student": student}), "Multiple choice")
    assert sentence.tone == tone
    assert part in sentence.text


@pytest.mark.parametrize(
    ("student", "original", "tone"),
    [(2, 9, "bad"), (7, 9, "open"), (9, 9, "open"), (9, 4, "good"), (1, 1, "open"), (9, 0, "open")],
)
def test_needle(student, original, tone):
    found = quality(found=dict.fromkeys(NLL, 1) | {"student": student, "original": original})
    sentence = sentence_about(found, "Needle: of 9 hidden numbers")
    assert sentence.tone == tone
    assert f"the student writes {student}, the original {original};" in sentence.text
    assert "1 (window + sinks) and 1 (student, state off)" in sentence.text


def test_a_student_that_becomes_faster(monkeypatch):
    result = fabricate_bench(
        monkeypatch,
        {
            "original": {1024: 20.0, 4096: 40.0, 8192: 70.0},
            "static": {1024: 22.0, 4096: 35.0, 8192: 60.0},
            "student": {1024: 30.0, 4096: 30.0, 8192: 30.0},
        },
    )
    found = speed_sentences(result)
    short = sentence_about(found, "At 1024 tokens")
    assert short.tone == "bad"
    assert "ms (dynamic): 1.5" in short.text
    assert "times slower" in short.text
    long = sentence_about(found, "At 8192 tokens")
    assert long.tone == "good"
    assert "ms (static): 2.0" in long.text or "ms (static): 1.9" in long.text
    assert "times faster" in long.text
    assert "(95 % interval 1.9" in long.text
    assert ", 5 repeats)" in long.text
    crossing = sentence_about(found, "The student becomes faster at about")
    assert crossing.tone == "good"
    assert 3000 < result["crossover"][0]["context"] < 3200
    assert sentence_about(found, "Prefill of 8192 tokens").tone == "good"
    assert sentence_about(found, "Cache at 8192 tokens").tone == "good"


def test_a_student_that_stays_slower(monkeypatch):
    times = {"original": {64: 20.0, 100: 21.0}, "static": {64: 22.0, 100: 22.0}, "student": {64: 40.0, 100: 42.0}}
    found = speed_sentences(fabricate_bench(monkeypatch, times))
    assert [sentence.tone for sentence in found] == ["bad"] * 5
    assert sentence_about(found, "By the medians").text.endswith("is not faster at any context up to 100 tokens.")
    assert "times slower" in sentence_about(found, "Prefill of 100 tokens").text
    assert "the student's cache is not smaller" in sentence_about(found, "Cache at 100 tokens").text


def test_a_student_as_fast_as_the_original(monkeypatch):
    times = {"original": {64: 20.0}, "static": {64: 30.0}, "student": {64: 20.0}}
    found = speed_sentences(fabricate_bench(monkeypatch, times, noise=0.2))
    assert sentence_about(found, "At 64 tokens").tone == "open"
    assert sentence_about(found, "At 64 tokens").text.endswith("no difference, the repeats disagree.")
    assert sentence_about(found, "Prefill of 64 tokens").tone == "open"


def test_other_crossovers(monkeypatch):
    faster = {"original": {64: 20.0, 128: 20.0}, "static": {64: 30.0, 128: 30.0}, "student": {64: 10.0, 128: 10.0}}
    found = speed_sentences(fabricate_bench(monkeypatch, faster))
    assert "from the first context on, up to 128 tokens" in sentence_about(found, "By the medians").text
    mixed = faster | {"student": {64: 10.0, 128: 40.0}}
    found = speed_sentences(fabricate_bench(monkeypatch, mixed))
    assert sentence_about(found, "Faster at some contexts").tone == "open"


def test_what_went_wrong_with_the_measurement_is_said(monkeypatch):
    times = {"original": {64: 20.0}, "static": {64: 30.0}, "student": {64: 10.0}}
    result = fabricate_bench(monkeypatch, times, repeats=1)
    once = sentence_about(speed_sentences(result), "At 64 tokens")
    assert once.tone == "open"
    assert once.text.endswith("times faster, by one repeat, which has no spread.")
    assert not [sentence for sentence in speed_sentences(result) if sentence.tone == "note"]
    reason = "not one repeat of all rows fitted into 2 minutes"
    result["dropped"] = [{"what": "decode", "context": 8192, "batch": 1, "reason": reason}]
    result["skipped"] = [{"row": "original", "mode": "static+compile", "reason": "there is no compiler"}]
    result["cells"][0]["recompiles"] = 2
    result["repeats_asked"] = 3
    result["blocks"][0]["moved"] = True
    notes = [sentence.text for sentence in speed_sentences(result) if sentence.tone == "note"]
    assert notes == [
        "Context 8192 was dropped: not one repeat of all rows fitted into 2 minutes.",
        "Context 64: time was up before all 3 repeats were done.",
        "Original, static+compile was not measured: there is no compiler.",
        "The machine's own speed moved by more than 10 % during 1 of 1 blocks.",
    ]
    spoilt = sentence_about(speed_sentences(result), "Compiled again during timed steps")
    assert spoilt.tone == "bad"
    assert "original, dynamic" in spoilt.text


def test_several_batches_are_told_apart_and_filled_contexts_have_no_prefill(monkeypatch):
    times = {"original": {64: 20.0, 1024: 40.0}, "static": {64: 30.0, 1024: 50.0}, "student": {64: 30.0, 1024: 30.0}}
    found = speed_sentences(fabricate_bench(monkeypatch, times, batches=[1, 4], fill=300))
    assert sentence_about(found, "At 1024 tokens of context, batch 4 the student").tone == "good"
    assert sum("becomes faster at about 5" in sentence.text and "batch 1." in sentence.text for sentence in found) == 1
    assert sentence_about(found, "Prefill of 64 tokens").tone == "bad"
    assert sentence_about(found, "Cache at 1024 tokens, batch 1").tone == "good"


def test_prefill_of_lengths_of_their_own(monkeypatch):
    times = {"original": {64: 20.0}, "static": {64: 30.0}, "student": {64: 30.0}}
    found = speed_sentences(fabricate_bench(monkeypatch, times, prefill=[4096, 16384], repeats=2))
    assert sentence_about(found, "Prefill of 16384 tokens").tone == "open"
    growth = sentence_about(
        found, "From 4096 to 16384 tokens, 4.00 times as many, the student's prefill grows 4.00 times"
    )
    assert growth.tone == "note"


def test_without_a_student_no_speed_is_claimed(monkeypatch):
    result = fabricate_bench(monkeypatch, {"original": {64: 20.0}, "static": {64: 30.0}, "control": {64: 10.0}})
    assert speed_sentences(result)[0].text == "No student was timed."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (35.123, "35.1"),
        (0.0213, "0.0213"),
        (100, "100"),
        (999.9, "1\N{NARROW NO-BREAK SPACE}000"),
        (12345, "12\N{NARROW NO-BREAK SPACE}300"),
        (0, "0"),
        (-1.5, "−1.50"),
        (None, "–"),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_size_and_percent():
    assert [size(n) for n in (512, 2048, 5 * 2**20, 3 * 2**30)] == ["512 bytes", "2.00 KiB", "5.00 MiB", "3.00 GiB"]
    assert (percent(0.456), percent(-0.1)) == ("46 %", "−10 %")
