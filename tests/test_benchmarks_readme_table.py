"""README.md's table: its lines, cells that were not measured, and where it goes."""

import pytest

from linearize.benchmarks.evaluate import KIND
from linearize.benchmarks.files import write_json
from linearize.benchmarks.readme_table import BEGIN, END, main, put, readme_table
from linearize.errors import LinearizeError
from tests.benchmark_results import fabricate_bench, fabricate_evaluation

NLL = {"original": 3.0, "window + sinks": 3.9, "student": 3.4, "student, state off": 3.8}
TIMES = {
    "original": {512: 10.0, 8192: 60.0},
    "static": {512: 12.0, 8192: 40.0},
    "original again": {512: 10.0, 8192: 60.0},
    "student": {512: 15.0, 8192: 20.0},
}


@pytest.fixture
def quality() -> dict:
    found = {"original": 9, "window + sinks": 0, "student": 6, "student, state off": 1}
    right = {"original": 0.8, "window + sinks": 0.4, "student": 0.5, "student, state off": 0.3}
    old = fabricate_evaluation(NLL, right=right, found=found)
    mean = {"chance": 0.25, "rows": {row: part["normalised"] for row, part in old["choices"]["rows"].items()}}
    texts = {"wiki": {"256": old["perplexity"] | {"seq_len": 99}, "1024": old["perplexity"] | {"seq_len": 1024}}}
    return old | {"texts": texts, "tasks": {"arc": old["choices"]}, "task_mean": mean}


@pytest.fixture
def speed(monkeypatch) -> dict:
    return fabricate_bench(monkeypatch, TIMES, prefill=[4096])


def cells(table: str) -> dict[str, dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def test_every_cell_is_a_measured_one(quality, speed):
    table = readme_table(quality, speed)
    found = cells(table)
    assert list(found["needles written"]) == list(NLL)
    assert found["perplexity, wiki at 1k (95 %)"]["original"].startswith("20.09 (")
    assert found["perplexity, wiki at 1k (95 %)"]["student"].startswith("29.96 (")
    assert found["over the original's, wiki (95 %, paired)"]["student"].startswith("1.492 (1.4")  # exp(0.4)
    assert not any("99" in line for line in found)
    assert found["needles written"] == {
        "original": "9 of 9",
        "window + sinks": "0 of 9",
        "student": "6 of 9",
        "student, state off": "1 of 9",
    }
    assert found["of these at 1k"]["student"] == "0 of 3"
    assert found["accuracy, mean of arc"]["student"] == "50 %"
    kept = found["kept above guessing (95 %)"]
    assert kept["original"] == "–"
    assert kept["student"].startswith("45 % (")  # (.5 - .25) / (.8 - .25)
    # Each in its better mode: the static cache at 8k.
    at_8k = found["ms per token at 8k"]
    assert 39 < float(at_8k["original"]) < 41
    assert 19 < float(at_8k["student"]) < 21
    assert at_8k["window + sinks"] == at_8k["student, state off"] == "–"
    assert found["times as fast at 512 (95 %)"]["student"][:4] in ("0.66", "0.67", "0.68")
    assert found["cache at 8k"]["student"] == "4.77 MiB"
    assert found["prefill of 4k, s"] == {
        "original": "0.410",
        "window + sinks": "–",
        "student": "0.410",
        "student, state off": "–",
    }
    assert table.startswith("Decodes 2.0")
    assert "float32, " in table
    assert "The original timed twice differs from itself by up to " in table


def test_a_slower_original_again_is_told(quality, monkeypatch):
    times = TIMES | {"original again": {512: 13.0, 8192: 78.0}}
    assert "differs from itself by up to 23 %" in readme_table(
        quality, fabricate_bench(monkeypatch, times | {"static": {512: 10.0, 8192: 60.0}}, noise=0.0)
    )


def test_batches_are_told_apart(quality, monkeypatch):
    speed = fabricate_bench(monkeypatch, TIMES, batches=[1, 4])
    found = cells(readme_table(quality, speed))
    assert {"ms per token at 512, batch 1", "ms per token at 512, batch 4", "cache at 8k, batch 4"} <= found.keys()
    assert not any(line.startswith("prefill") for line in found)


def test_what_was_not_measured_has_no_line(quality, speed):
    found = cells(readme_table(quality | {"needle": None, "task_mean": None}, speed))
    assert not any(line.startswith(("needles", "of these", "accuracy", "kept")) for line in found)


def test_without_a_student(quality, speed, monkeypatch):
    with pytest.raises(LinearizeError, match=r"evaluate\.json: it has no row 'student'"):
        readme_table(quality | {"rows": ["original"]}, speed)
    with pytest.raises(LinearizeError, match=r"bench\.json: it has no row 'student'"):
        readme_table(quality, speed | {"rows": ["original"]})


def test_it_goes_between_its_marks():
    text = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    new = put(text, "new", "README.md")
    assert new == f"before\n\n{BEGIN}\n\nnew\n\n{END}\n\nafter\n"
    assert put(new, "new", "README.md") == new
    for wrong in ("nothing", f"{END}\n{BEGIN}", f"{BEGIN}\n", text + text, text + END):
        with pytest.raises(LinearizeError, match=r"README\.md: not one line"):
            put(wrong, "new", "README.md")


def test_the_command(quality, speed, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"has no evaluate\.json"):
        main([str(tmp_path)])
    write_json(tmp_path / "evaluate.json", quality)
    write_json(tmp_path / "bench.json", speed)
    main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == readme_table(quality, speed)
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    main([str(tmp_path), "--write", str(readme)])
    assert readme_table(quality, speed) in readme.read_text(encoding="utf-8")
    write_json(tmp_path / "evaluate.json", {"kind": "something"})
    with pytest.raises(SystemExit, match=f"holds 'something', expected '{KIND}'"):
        main([str(tmp_path)])
