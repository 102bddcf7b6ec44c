"""Sections of the report on single parts of the results: what the numbers are is what the page says."""

import copy

import pytest

from linearize.benchmarks import plots
from linearize.benchmarks.page import Cell, Data, Section, figure, page, section, slug, table
from linearize.benchmarks.report_attention import attention_section
from linearize.benchmarks.report_provenance import provenance_section
from linearize.benchmarks.report_quality import answers_section, divergence_section, perplexity_section
from linearize.benchmarks.report_recall import needles_section, recall_section
from linearize.benchmarks.report_speed import speed_section
from linearize.benchmarks.report_tasks import harness_section, letters_section, tasks_section
from tests.benchmark_results import fabricate_bench, fabricate_evaluation
from tests.html_page import Page

NLL = {"original": 3.0, "student": 3.4}
ROWS = list(NLL)


def read(part: Section) -> Page:
    assert part.body
    text = page("title", "subtitle", "", [part])
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    assert len(found.files) == text.count(" download=")
    return found


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)


@pytest.fixture
def result(plain):
    """An evaluation, without plots."""
    return fabricate_evaluation(NLL, {"original": 0.7, "student": 0.5}, {"original": 9, "student": 5})


class TestPage:
    def test_a_table_marks_in_words_and_offers_its_numbers(self):
        data = Data("times", ["row", "ms"], [["a, b", 1 / 3], ["c", None]])
        text = table("Times", ["row", "ms"], [["a, b", Cell("0.333", "bad")], ["c", "–"]], strong="c", data=data)
        found = Page(text)
        assert found.tables == [[["row", "ms"], ["a, b", "0.333✗, worse than the original"], ["c", "–"]]]
        assert found.files == {"times.csv": [["row", "ms"], ["a, b", repr(1 / 3)], ["c", ""]]}
        assert '<tr class="strong"><th scope="row">c' in text

    def test_a_figure_has_its_numbers_in_a_table_of_the_same_values(self):
        data = Data("n", ["row", "n", "x"], [["a", 12345, 0.123456], ["b", -1, None]])
        found = Page(figure("<svg></svg>", "Caption", data))
        assert found.tables[0][1:] == [["a", "12345", "0.123"], ["b", "−1", "–"]]
        assert found.files["n.csv"][1:] == [["a", "12345", "0.123456"], ["b", "-1", ""]]

    def test_sections_without_a_body_are_left_out_and_the_others_listed(self):
        text = page("t", "s", "d", [section("Full", "<p>x</p>"), section("Empty"), section("Also", "", "<p>y</p>")])
        found = Page(text)
        assert [reference for reference in found.references if reference != "#content"] == ["#full", "#also"]
        assert found.ids == ["content", "full", "full-title", "also", "also-title"]

    def test_slugs_are_safe_in_ids_and_file_names(self):
        assert slug("A <b> & “ü”/../x, 1.5×") == "a-b-x-1-5"


class TestPerplexity:
    def test_texts_and_contexts_are_columns(self, result):
        other = fabricate_evaluation({"original": 3.0, "student": 3.0}, seq_len=513)["perplexity"]
        result["texts"] = {"a": {"257": result["perplexity"], "513": other}}
        found = read(perplexity_section(result))
        first = found.tables[0]
        assert first[0] == ["row", "a, 257", "a, 513"]
        student = next(row for row in first if row[0] == "student")
        assert student[1].endswith("✗, worse than the original")
        assert "✗" not in student[2]
        rows = found.files["perplexity.csv"]
        assert len(rows) == 1 + 2 * 2
        values = {(row[1], row[2]): row for row in rows[1:]}
        assert float(values["513", "student"][4]) == other["rows"]["student"]["ppl"]
        assert float(values["257", "student"][7]) == pytest.approx(0.4)

    def test_not_measured_is_left_out(self, result):
        result["perplexity"] = None
        assert perplexity_section(result).body == ""


def test_divergence(result):
    assert divergence_section(result).body == ""
    part = {"start": 1, "end": 32, "n_not_finite": 0, "kl": 0.0, "ci95": [0.0, 0.0]}
    row = {"n_not_finite": 0, "kl": 0.0437, "ci95": [0.039, 0.051], "by_position": [part, {**part, "kl": 0.1}]}
    result["kl"] = {"text": "wiki", "seq_len": 64, "n_sequences": 1, "n_tokens": 64, "rows": {"student": row}}
    found = read(divergence_section(result))
    assert found.tables[0] == [["row", "KL", "95 % interval"], ["student", "0.0437", "0.0390 to 0.0510"]]
    assert "64 tokens in 1 sequence of 64" in found.text
    result["kl"]["rows"]["broken"] = {"n_not_finite": 3, "kl": None, "ci95": None, "by_position": []}
    assert read(divergence_section(result)).tables[0][2] == ["broken", "–", "–"]


def test_tasks_with_last_words_and_the_mean(result):
    assert tasks_section(fabricate_evaluation(NLL)).body == ""
    score = {"hits": "10", "accuracy": 0.5, "ci95": [0.4, 0.6]}
    whole = {"value": 1.0, "ci95": [1.0, 1.0]}
    less = {"value": 0.6, "ci95": [0.5, 0.7]}
    words = {
        "original": {"raw": {**score, "retention": whole, "retention_over_chance": whole}},
        "student": {"raw": {**score, "accuracy": 0.3, "retention": less, "retention_over_chance": less}},
    }
    result["tasks"] = {"questions": result["choices"], "words": {"n_items": 2, "chance": 0.0, "rows": words}}
    result["task_mean"] = {
        "tasks": 2,
        "chance": 0.125,
        "rows": {
            "original": {"accuracy": 0.6, "retention_over_chance": whole},
            "student": {"accuracy": 0.4, "retention_over_chance": less},
        },
    }
    found = read(tasks_section(result))
    assert found.tables[0][0] == ["row", "questions", "words", "mean", "kept above guessing", "95 % interval"]
    assert found.tables[0][1] == ["original", "70 %", "50 %", "60 %", "–", "–"]
    worse = "✗, worse than the original"
    assert found.tables[0][2] == ["student", f"50 %{worse}", f"30 %{worse}", "40 %", f"60 %{worse}", "50 % to 70 %"]
    assert "the word that greedy decoding writes (raw)" in found.text
    assert len(found.files["tasks.csv"]) == 1 + 2 * 2 + 2


class TestNeedles:
    def test_counts_by_length(self, result):
        found = read(needles_section(result))
        worse = "✗, worse than the original"
        assert found.tables[0] == [
            ["row", "all", "256", "512", "1024"],
            ["original", "9 of 9", "3 of 3", "3 of 3", "3 of 3"],
            ["student", f"5 of 9{worse}", "3 of 3", "2 of 3", f"0 of 3{worse}"],
        ]

    def test_kinds_and_keys_are_told_apart(self, result):
        for row in result["needle"]["rows"].values():
            cells = row["cells"]
            row["cells"] = [{**cell, "kind": "digits", "keys": 1} for cell in cells]
            row["cells"] += [{**cell, "kind": "words", "keys": 4, "greedy": 0.0, "first": 0.0} for cell in cells]
        found = read(needles_section(result))
        head, original, _ = found.tables[0]
        assert head[2:6] == ["digits, 1 key, 256", "digits, 1 key, 512", "digits, 1 key, 1024", "words, 4 keys, 256"]
        assert original[1] == "9 of 18"
        assert found.tags.count("svg") == 4
        assert found.files["needles-greedy.csv"][-1][1:4] == ["words", "4", "1024"]


def probes():
    def cells(high):
        base = {"length": 512, "pairs": 8, "distance": 200.0, "chance_first": 0.125, "answers": 16, "nll": 1.0}
        return [base | {"first": high, "greedy": high / 2}, base | {"pairs": 32, "first": high / 4, "greedy": 0.0}]

    def row(high):
        whole = {"first": high, "greedy": high / 2, "nll": 1.0}
        return {**whole, "first_ci95": [high - 0.1, high], "greedy_ci95": [0.0, high], "cells": cells(high)}

    pair = {"row": "student", "against": "original", "first_difference": -0.6, "first_ci95": [-0.7, -0.5]}
    pair |= {"greedy_difference": -0.3, "greedy_ci95": [-0.7, 0.1]}
    found = {"n_prompts": 4, "n_answers": 32, "chance_first": 0.08, "comparisons": [pair]}
    return {"probes": {"associative": {**found, "rows": {"original": row(0.9), "student": row(0.3)}}}}


def test_recall(result):
    assert recall_section(result).body == ""
    result["recall"] = probes()
    found = read(recall_section(result))
    assert "32 answers in 4 prompts; guessing ranks 8 % first" in found.text
    student = found.tables[0][2]
    assert student[:4] == ["student", "30 %✗, worse than the original", "20 % to 30 %", "15 %"]
    assert found.files["recall-associative.csv"][1] == [
        *("original", "512", "8", "200.0", "16", "0.125", "0.9", "0.45", "1.0")
    ]
    assert found.files["recall-associative-first.csv"][0] == ["row", "512, 8 pairs", "512, 32 pairs"]
    assert found.tags.count("svg") == 2


def test_letters(result):
    assert letters_section(result).body == ""
    row = {"accuracy": 0.6, "ci95": [0.5, 0.7], "letters": [0.3, 0.3, 0.4], "letter_distance": 0.07, "consistency": 0.5}
    pair = {"row": "student", "against": "original", "accuracy_difference": -0.25, "ci95": [-0.3, -0.2]}
    task = {"n_items": 20, "chance": 1 / 3, "chance_consistency": 1 / 9, "letters": list("ABC"), "true": [1 / 3] * 3}
    student = {**row, "accuracy": 0.35, "letters": [1.0, 0.0, 0.0], "letter_distance": 0.67, "consistency": 0.0}
    result["letters"] = {"arc": {**task, "rows": {"original": row, "student": student}, "comparisons": [pair]}}
    found = read(letters_section(result))
    assert found.tables[0][2] == [
        *("student", "35 %✗, worse than the original", "50 % to 70 %", "0 %", "67 %", "100 %", "0 %", "0 %")
    ]
    assert found.tables[0][3][0] == "where they are right"
    assert found.files["letters-arc.csv"][2][-3:] == ["1.0", "0.0", "0.0"]


def test_harness(result):
    assert harness_section(result).body == ""
    metric = {"value": 0.5, "stderr": 0.02, "retention_over_chance": None}
    kept = {"value": 0.5, "ci95": [0.4, 0.6]}
    rows = {"original": {"acc": metric, "ppl": metric}}
    rows["student"] = {
        "acc": {**metric, "value": 0.4, "retention_over_chance": kept},
        "ppl": {**metric, "stderr": None},
    }
    result["lm_eval"] = {"arc": {"version": 1, "n_samples": None, "chance": 0.25, "rows": rows}}
    found = read(harness_section(result))
    assert found.tables[0] == [
        ["task", "samples", "original", "student"],
        ["arc, acc", "all", "0.500 ± 0.0200", "0.400 ± 0.0200✗, worse than the original"],
        ["arc, ppl", "all", "0.500 ± 0.0200", "0.500"],
    ]
    assert len(found.files["lm-eval.csv"]) == 5


def test_attention(result):
    assert attention_section(result).body == ""
    layer = {"sinks": [0.5, 0.2], "window": [0.4, 0.2], "older": [0.1, 0.6]}
    original = {"window": 64, "sinks": 4, "mean": {"sinks": 0.35, "window": 0.3, "older": 0.35}, "bypassed": None}
    original["layers"] = [{"layer": 0, **layer}, {"layer": 3, **layer}]
    student = {**original, "layers": [{"layer": 3, **layer, "older": [0.0, 0.01]}], "bypassed": {"heads": 2, "of": 2}}
    result["attention"] = {"text": "wiki", "seq_len": 256, "n_sequences": 2, "not_measured": {"state off": "no state"}}
    result["attention"]["rows"] = {"original": original, "student": student}
    found = read(attention_section(result))
    assert found.tables[0][1] == ["original", "35 %", "30 %", "35 %", "–", "64, 4"]
    assert found.tables[0][2][4] == "2 of 2"
    assert "Not measured: state off: no state." in found.text
    assert found.tags.count("svg") == 6
    assert found.files["attention-older-student.csv"] == [["layer", "head 0", "head 1"], ["3", "0.0", "0.01"]]
    assert found.files["attention.csv"][-1] == ["student", "3", "1", "0.2", "0.2", "0.01"]


def test_answers(result):
    assert answers_section(result).body == ""
    row = {"end_rate": 0.5, "repetition": 0.2, "loop_rate": 0.1, "mean_length": 100.0, "length_ratio": 1.0}
    row |= {f"{key}_ci95": [0.0, 1.0] for key in ("end_rate", "repetition", "loop_rate", "length_ratio")}
    row["answers"] = ["<i>Hi</i>"]
    result["generation"] = {"n_prompts": 1, "max_new_tokens": 128, "rows": {"original": row, "student": row}}
    found = read(answers_section(result))
    shares = ["50 % (0 % to 100 %)", "20 % (0 % to 100 %)", "10 % (0 % to 100 %)", "100"]
    assert found.tables[0][1:] == [["original", *shares, "–"], ["student", *shares, "1.00 (0 to 1.00)"]]
    assert "<i>Hi</i>" in found.words
    assert "i" not in found.tags


TIMES = {"original": {512: 20.0, 2048: 40.0}, "static": {512: 22.0, 2048: 35.0}, "student": {512: 30.0, 2048: 30.0}}


class TestSpeed:
    @pytest.fixture
    def bench(self, monkeypatch, plain):
        return fabricate_bench(monkeypatch, TIMES)

    def test_several_batches(self, bench, monkeypatch):
        second = copy.deepcopy(bench)
        for part in ("cells", "comparisons", "blocks"):
            bench[part] += [{**one, "batch": 8} for one in second[part]]
        bench["batches"] = [1, 8]
        bench["cells"][-1]["prefill_ms"] = None
        bench["cells"][-1]["recompiles"] = 2
        found = read(speed_section(bench))
        times, prefill, held = found.tables
        assert times[0][:3] == prefill[0][:3] == held[0][:3] == ["row", "context", "batch"]
        assert times[-1][-1] == "5, compiled again"
        assert len(times) == 1 + 12
        assert len(prefill) == 1 + 11
        assert {row[0] for row in times[1:]} == {"original, static", "original, dynamic", "student"}
        words = read(provenance_section(None, bench, None)).text
        assert "compiled again student, dynamic" in words

    def test_an_interval_is_shown_where_there_is_one(self, bench):
        pair = next(pair for pair in bench["comparisons"] if pair["context"] == 512)
        pair["speedup"]["ci95"] = [0.5, 1.5]
        pair["verdict"] = "undecided"
        times = read(speed_section(bench)).tables[0]
        (student,) = [row for row in times if row[:2] == ["student", "512"]]
        assert student[7].endswith("(0.500 to 1.50)")

    @pytest.mark.skipif(not plots.available(), reason="needs matplotlib")
    def test_a_figure_of_each_kind_for_every_batch(self, bench, monkeypatch):
        monkeypatch.undo()
        second = copy.deepcopy(bench)
        for part in ("cells", "comparisons", "blocks"):
            bench[part] += [{**one, "batch": 8} for one in second[part]]
        bench["batches"] = [1, 8]
        found = read(speed_section(bench))
        assert found.tags.count("svg") == 7
        assert [row[:2] for row in found.files["speed-ups.csv"][1:]] == [
            [context, batch] for batch in ("1", "8") for context in ("512", "2048")
        ]
        assert "Time per token while decoding, batch 8" in found.text
        rows = found.files["decode-batch-8.csv"]
        assert rows[0] == ["row", "context", "ms per token", "low", "high"]
        student = {int(row[1]): float(row[2]) for row in rows if row[0] == "student"}
        assert student == {
            cell["context"]: cell["ms_per_token"]["p50"]
            for cell in bench["cells"]
            if (cell["row"], cell["batch"]) == ("student", 8)
        }

    def test_noise_is_told(self, bench):
        bench["blocks"][0]["moved"] = True
        bench["blocks"][1]["attempts"] = 2
        bench["skipped"] = [{"row": "student", "mode": "static+compile", "reason": "it cannot"}]
        bench["dropped"] = [{"what": "prefill", "context": 9999, "batch": 1, "reason": "too long"}]
        found = read(provenance_section(None, bench, None))
        assert "moved during 1 of 10 blocks; 1 were measured twice" in found.text
        assert "student, static+compile: it cannot" in found.text
        assert "prefill of 9999, batch 1: too long" in found.text
        assert found.files["blocks.csv"][1][-1] == "moved"
