"""The tables of speculative decoding, from results as the measurement writes them."""

import pytest

from linearize.benchmarks.files import write_json
from linearize.benchmarks.speculative import KIND
from linearize.benchmarks.speculative_table import equality_table, main, speed_table


def spread(low, middle, high):
    return {"p50": middle, "min": low, "max": high}


CELL = {
    "context": 8192,
    "original": {
        "dynamic": {"ms_per_token": spread(90, 91, 92), "prefill_ms": spread(1, 2, 3)},
        "static": {"ms_per_token": spread(70, 71.26, 75), "prefill_ms": spread(1, 2, 3)},
    },
    "mode": "static",
    "speculative": {
        "ms_per_token": spread(50, 55.55, 60),
        "prefill_ms": spread(1, 2, 3),
        "draft_ms": 200.0,
        "verify_ms": 88.0,
        "acceptance_length": 4.321,
        "acceptance_rate": 0.876,
        "draft_length": 4.0,
    },
    "speedup": spread(1.1, 1.283, 1.5) | {"ci95": [0.9, 1.6]},
}
EQUALITY = {
    "prompts": 200,
    "tokens": 6000,
    "equal": 198,
    "differences": [
        {"prompt": 3, "token": 4, "margin": 2.34e-6},
        {"prompt": 8, "token": 1, "margin": 0.0},
    ],
    "acceptance_length": 3.2,
    "acceptance_rate": 0.7,
    "original_against_itself": {"prompts": 2, "tokens": 3},
}


def result(**changes):
    return {"kind": KIND, "schema": 1, "cells": [], "equality": None} | changes


def test_speed():
    assert speed_table([("a student", result(cells=[CELL])), ("none", result())]).splitlines() == [
        "| drafts by | original alone, ms a token | in a growing cache | with drafts | times as fast (range) | tokens "
        "a block | drafts that stand | a draft, ms | a pass of the original, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a student, 8k tokens | 71.3 (static) | 91.0 | 55.5 | 1.28 (1.10 to 1.50) | 4.32 | 88% | 50.0 | 88.0 |",
    ]


def test_equality():
    equal = EQUALITY | {"equal": 200, "differences": []}
    table = equality_table([("a", result(equality=EQUALITY)), ("b", result(equality=equal)), ("none", result())])
    assert table.splitlines() == [
        "| drafts by | texts equal | tokens | largest margin where they part | tokens a block | drafts that stand | "
        "the original's own pass differs in |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 198 of 200 | 6000 | 2e-06 | 3.20 | 70% | 3 tokens of 2 texts |",
        "| b | 200 of 200 | 6000 |  | 3.20 | 70% | 3 tokens of 2 texts |",
    ]


def test_command(tmp_path, capsys):
    write_json(tmp_path / "one.json", result(cells=[CELL]))
    write_json(tmp_path / "two.json", result(equality=EQUALITY))
    assert main([f"a={tmp_path / 'one.json'}", f"b={tmp_path / 'two.json'}"]) == 0
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert "| a, 8k tokens |" in first
    assert "| b | 198 of 200 |" in second
    assert main(["one.json"]) == 2
    assert "error: results: 'one.json' is not LABEL=FILE; give each file a label" in capsys.readouterr().err


@pytest.mark.parametrize("table", [speed_table, equality_table])
def test_nothing(table):
    assert table([("a", result())]) == ""
