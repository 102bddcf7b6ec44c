"""The cost of transfer beside the teacher's pass, on a tiny model."""

import json
from contextlib import nullcontext

import pytest
import torch

from linearize import LinearizeConfig, convert
from linearize.benchmarks.files import read_json
from linearize.benchmarks.transfer_cost import KIND, ROWS, bench_transfer, main
from linearize.convert import added_parameters
from tests.saved_models import save_tiny_model
from tests.tiny_models import make_model
from tests.tiny_training import TokenRows


@pytest.fixture
def student():
    return convert(make_model("llama"), LinearizeConfig(window=8, sinks=2))


def measure(student, length=256, **options):
    rows = TokenRows(1, length)
    return bench_transfer(student, [next(rows) for _ in range(4)], **options)


def test_rows_and_ratios(student):
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    found = measure(student)
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["seq_len"], found["repeats"]) == (KIND, 256, 2)
    assert tuple(found["rows"]) == ROWS
    teacher, transfer = found["rows"].values()
    assert found["memory_ratio"] == transfer["peak_bytes"] / teacher["peak_bytes"] > 1
    for row in (teacher, transfer):
        assert row["tokens_per_s"] == 256 / row["seconds"]["p50"]
        assert row["peak_bytes"] > sum(p.numel() * 4 for p in student.parameters())
    assert 0 < found["processor_ratio"] < 1
    assert 0 < found["speed_ratio"] < 1
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert {name for name, p in student.named_parameters() if p.requires_grad} == added_parameters(student).keys()


def test_peak_counts_what_is_alive_at_once():
    from linearize.benchmarks.peak import peak_bytes

    def run(together):
        for _ in range(4):
            x = torch.zeros(1 << 20)
            (kept.append(x) if together else nullcontext())

    kept: list[torch.Tensor] = []
    assert 4 << 20 <= peak_bytes(lambda: run(False), torch.device("cpu")) < 9 << 20
    assert peak_bytes(lambda: run(True), torch.device("cpu")) >= 16 << 20


def test_more_local_steps_cost_more(student):
    one, four = (
        measure(student, local_steps=steps)["rows"]["transfer"]["processor_seconds"]["min"] for steps in (1, 6)
    )
    assert four > 1.5 * one


class TestCommand:
    def test_writes_a_result(self, tmp_path, capsys):
        threads = torch.get_num_threads()
        model, text = save_tiny_model(tmp_path / "model"), tmp_path / "text.txt"
        text.write_text("In a small house near the far hill they keep what they saw. " * 200)
        words = [model, "--text", text, "--seq-len", 64, "--window", 8, "--repeats", 1, "--dtype", "float32"]
        try:
            assert main([str(word) for word in [*words, "--out", tmp_path / "cost.json"]]) == 0
        finally:
            torch.set_num_threads(threads)
        found = read_json(tmp_path / "cost.json", KIND)
        assert (found["model"], found["dtype"], found["conversion"]["window"]) == (str(model), "float32", 8)
        assert "times the memory" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--repeats", "0"], "repeats: 0 is less than 1"),
            (["--seq-len", "100"], "data.seq_len: in rows of 100 tokens nothing has left a window of 64"),
        ],
    )
    def test_refusals(self, words, message, tmp_path, capsys):
        assert main(["absent", "--text", "absent.txt", "--out", str(tmp_path / "x.json"), *words]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x.json").exists()


def test_what_was_freed_between_two_measurements_does_not_count():
    """The profiler's own total goes on where its last use in the process ended."""
    from linearize.benchmarks.peak import peak_bytes

    kept = []
    assert peak_bytes(lambda: kept.append(torch.zeros(1 << 20)), torch.device("cpu")) >= 4 << 20
    kept.clear()
    for _ in range(2):
        assert 1 << 20 <= peak_bytes(lambda: torch.zeros(1 << 18), torch.device("cpu")) < 2 << 20
