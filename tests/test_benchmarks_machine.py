"""The record of a run's machine, and files that are never half written."""

import json
import os
import subprocess

import pytest
import torch

import linearize
from linearize.benchmarks import files, machine
from linearize.benchmarks.files import read_json, write_json, write_text
from linearize.errors import LinearizeError


def test_machine_info_is_complete_and_json():
    info = machine.machine_info(seed=7, command=["/somewhere/bin/linearize", "bench", "runs/a b"])
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert info["command"] == "linearize bench 'runs/a b'"
    assert info["seed"] == 7
    assert info["threads"] == torch.get_num_threads()
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["linearize"] == linearize.__version__
    assert 1 <= info["cpu"]["usable"] <= info["cpu"]["cores"]
    assert info["date"].endswith("+00:00")


def test_what_set_the_threads(monkeypatch):
    for name in machine.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert machine.machine_info()["threads_set"] == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.machine_info()["threads_set"] == {"OMP_NUM_THREADS": "3"}


def test_available_memory_is_the_less_of_the_machines_and_the_containers(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.available_memory(cpu) is None
    (tmp_path / "meminfo").write_text("MemTotal: 999 kB\nMemFree: 1 kB\nMemAvailable:     200 kB\n", encoding="utf-8")
    assert machine.available_memory(cpu) == 200 * 1024
    for name, text in (
        ("memory.max", "100000"),
        ("memory.current", "70000"),
        ("memory.stat", "anon 5\ninactive_file 9"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert machine.available_memory(cpu) == 30_000 + 9
    (tmp_path / "memory.current").write_text("200000", encoding="utf-8")
    assert machine.available_memory(cpu) == 0
    (tmp_path / "memory.max").write_text("max", encoding="utf-8")
    assert machine.available_memory(cpu) == 200 * 1024


def test_command_of_a_module():
    assert machine._command(["/a/linearize/__main__.py", "run", "demo"]) == "python -m linearize run demo"
    assert machine._command([]) == ""


def test_commit_of_a_checkout(tmp_path):
    assert machine._commit(tmp_path) is None

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("a", encoding="utf-8")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert machine._commit(tmp_path) == {"hash": commit, "changed": False}
    (tmp_path / "file").write_text("b", encoding="utf-8")
    assert machine._commit(tmp_path) == {"hash": commit, "changed": True}


def test_commit_without_git(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._commit(tmp_path) is None


def test_matmul_takes_time():
    assert machine.matmul_ms(torch.device("cpu")) > 0


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_json(tmp_path / "new" / "result.json", {"kind": "a", "value": 1})

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"kind": "a", "value": 2})
    monkeypatch.undo()
    assert read_json(path, "a") == {"kind": "a", "value": 1}
    assert os.listdir(path.parent) == ["result.json"]


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"kind": "a", "value": float("nan")})
    assert os.listdir(tmp_path) == []


def test_read_json_names_what_is_wrong(tmp_path):
    path = write_text(tmp_path / "a.json", "{")
    with pytest.raises(LinearizeError, match=r"a\.json: not a JSON file"):
        read_json(path, "a")
    write_text(path, '{"kind": "b"}')
    with pytest.raises(LinearizeError, match="holds 'b', expected 'a'"):
        read_json(path, "a")
    write_text(path, "[]")
    with pytest.raises(LinearizeError, match="holds None, expected 'a'"):
        read_json(path, "a")
