"""The table of a distillation: its columns, and cells that were not measured."""

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


def rows_of(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
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


def test_the_command(tmp_path, capsys):
    path = write_json(tmp_path / "evaluate.json", evaluation())
    out = tmp_path / "table.md"
    main([f"all={path}", "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text(encoding="utf-8") == table([("all", evaluation())])
    write_json(path, {"kind": "something"})
    with pytest.raises(SystemExit, match=f"holds 'something', expected '{KIND}'"):
        main([str(path)])
