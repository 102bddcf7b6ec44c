"""The table of a distillation: its columns, and cells that were not measured."""

import copy
import math

import pytest

from linearize.benchmarks.distillation_table import main, table
from linearize.benchmarks.evaluate import KIND
from linearize.benchmarks.files import write_json
from tests.benchmark_results import fabricate_evaluation

ROWS = {"original": 3.0, "student": 3.4}


def evaluation(**changes) -> dict:
    """An evaluate.json with one text and one task; the rest was not measured."""
    old = fabricate_evaluation(ROWS, right={"original": 0.8, "student": 0.5}, found={"original": 9, "student": 3})
    new = {"texts": {"wiki": {"1024": old["perplexity"] | {"seq_len": 1024}}}, "tasks": {"arc": old["choices"]}}
    return old | new | {"task_mean": None, "kl": None, "generation": None, "tokens_seen": {"original": 0}} | changes


def rows_of(text: str, number: int = 0) -> list[dict[str, str]]:
    """The lines of the first table, or of another one."""
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number].splitlines()]
    assert all(len(line) == len(lines[0]) for line in lines)
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_one_result():
    original, student = rows_of(table([("run", evaluation(notes=["A note."]))]))
    assert [original["row"], original["tokens seen"], student["tokens seen"]] == ["original", "0", "–"]
    assert original["wiki at 1k"].startswith("20.09 (")
    assert student["arc"].startswith("50.0 % (0.45, ")  # (.5 - .25) / (.8 - .25)
    assert original["arc"] == "80.0 %"
    assert [student[f"needle at {length}"] for length in ("256", "512", "1k")] == [
        "100 % (100 %)",
        "0 % (0 %)",
        "0 % (0 %)",
    ]
    assert "all tasks" not in student
    assert "A note." in table([("run", evaluation(notes=["A note."]))])


def test_several_results_have_the_columns_of_all():
    generation = {
        "end_rate": 0.25,
        "repetition": 0.5,
        "loop_rate": 0.125,
        "length_ratio": 1.5,
        "length_ratio_ci95": None,
    }
    more = evaluation(
        tokens_seen={"student": 1_234_567},
        kl={"rows": {"student": {"kl": 0.12345, "ci95": [0.1, 0.2]}}},
        generation={"rows": dict.fromkeys(ROWS, generation)},
        needle=None,
    )
    found = rows_of(table([("a", evaluation()), ("b", more)]))
    assert [row["row"] for row in found] == ["a: original", "a: student", "b: original", "b: student"]
    assert [row["KL"] for row in found] == ["–", "–", "0", "0.123 (0.100 to 0.200)"]
    assert [row["needle at 1k"] for row in found][2:] == ["–", "–"]
    last = found[-1]
    assert [last[head] for head in ("ended", "repeated", "loops", "length")] == ["25 %", "50 %", "12 %", "1.50"]
    assert last["tokens seen"] == "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"


def test_rows_that_are_the_same_in_all_results_stand_once():
    first = evaluation()
    second = copy.deepcopy(first)
    second["texts"]["wiki"]["1024"]["rows"]["student"]["ppl"] += 1
    found = rows_of(table([("a", first), ("b", second)]))
    assert [row["row"] for row in found] == ["original", "a: student", "b: student"]
    assert found[1] != found[2]


def test_what_the_student_is_compared_with():
    """One perplexity over another, by their paired difference: also of the row that has the student's near side."""
    rows = {"original": 3.0, "control": 2.9, "window + sinks, trained": 3.6, "student": 3.4}
    old = fabricate_evaluation(rows)["perplexity"] | {"seq_len": 1024}
    result = evaluation(texts={"wiki": {"1024": old}}, rows=[*rows], tasks={}, needle=None)
    found = {row["student"]: row["wiki at 1k"] for row in rows_of(table([("run", result)]), 1)}
    assert list(found) == [
        "over original",
        "over control",
        "over window + sinks, trained the same way: the state's worth",
    ]
    [worth] = [c for c in old["comparisons"] if (c["row"], c["against"]) == ("student", "window + sinks, trained")]
    low, high = (math.exp(end) for end in worth["ci95"])
    assert found["over window + sinks, trained the same way: the state's worth"] == (
        f"{math.exp(worth['nll_difference']):.3f} ({low:.3f} to {high:.3f})"
    )
    assert math.exp(worth["nll_difference"]) == pytest.approx(math.exp(-0.2), rel=1e-3)
    two = rows_of(table([("a", result), ("b", evaluation())]), 1)
    assert [row["student"] for row in two][-2:] == [
        "a, over window + sinks, trained the same way: the state's worth",
        "b, over original",
    ]


def test_the_command(tmp_path, capsys):
    path = write_json(tmp_path / "evaluate.json", evaluation())
    out = tmp_path / "table.md"
    main([f"all={path}", "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text(encoding="utf-8") == table([("all", evaluation())])
    write_json(path, {"kind": "something"})
    with pytest.raises(SystemExit, match=f"holds 'something', expected '{KIND}'"):
        main([str(path)])
