"""`make gpu-check`, rehearsed on the CPU: its checks pass and can fail, and no step takes the others with it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linearize.benchmarks import gpu_check, steps
from linearize.benchmarks.gpu import attention, decode, integration, plan
from linearize.benchmarks.gpu.summary import markdown
from linearize.benchmarks.steps import CheckFailed, Local, Section, Skip, Step, Worker, run_sections, run_step

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, and a rehearsal interprets them"),
]
CPU = torch.device("cpu")


def rehearse(folder: Path, *arguments: str) -> tuple[int, dict]:
    """(exit status, JSON) of a rehearsal in this process."""
    status = gpu_check.main(["--rehearse", "--in-process", "--out", str(folder), *arguments])
    return status, json.loads((folder / "gpu-rehearsal.json").read_text())


def statuses(data: dict) -> dict[str, str]:
    """ "section: step" -> status."""
    return {f"{x['name']}: {step['step']}": step["status"] for x in data["sections"] for step in x["steps"]}


class TestRehearsal:
    def test_everything_passes(self, tmp_path, capsys):
        status, data = rehearse(tmp_path)
        assert status == 0, capsys.readouterr().out
        assert data["kind"] == gpu_check.KIND
        assert data["finished"]
        assert data["verdict"] == "every correctness step passed"
        sections = {section.name: section for section in plan.make_sections(CPU, rehearse=True)}
        assert list(sections) == [section["name"] for section in data["sections"]]
        for section in data["sections"]:
            assert [step["step"] for step in section["steps"]] == [
                step.name for step in sections[section["name"]].steps
            ]
            for step in section["steps"]:
                # What does not run says that it is for want of a GPU.
                why = step["reason"] or ""
                assert step["status"] == "passed" or (step["status"] == "skipped" and ("GPU" in why or "CPU" in why))
                errors = step["values"].get("errors", {})
                assert all(0 <= error <= bound for error, bound in errors.values())
        passed = [name for name, found in statuses(data).items() if found == "passed"]
        assert {name.split(":")[0] for name in passed} == {
            *("environment", "attention", "decode", "transfer", "operators", "converted Llama", "prefill"),
            "decode step",
        }
        page = (tmp_path / "gpu-rehearsal.md").read_text()
        assert "**every correctness step passed**" in page
        assert "A rehearsal on a CPU" in page
        for section in data["sections"]:
            # What speed measured stands in tables of its own; what it did not measure is named.
            assert all(
                step["step"] in page for step in section["steps"] if section["kind"] != "speed" or step["reason"]
            )
        assert "| near-and-far step |" in page

    def test_a_step_that_raises(self, tmp_path, monkeypatch, capsys):
        def broken(*arguments):
            raise RuntimeError("a | planted\nfailure")

        monkeypatch.setattr(plan, "check_split", broken)
        status, data = rehearse(tmp_path, "--only", "transfer", "--only", "prefill")
        assert status == 1
        found = statuses(data)
        assert found["transfer: float32, softmax in two parts"] == "failed"
        assert sorted(found.values()).count("passed") == len(found) - 1 == 3
        (step,) = (x for x in data["sections"][1]["steps"] if x["status"] == "failed")
        assert step["reason"] == "RuntimeError: a | planted failure"
        assert "in broken" in step["traceback"]
        assert data["verdict"].startswith("failed correctness steps (1): transfer: float32, softmax")
        page = (tmp_path / "gpu-rehearsal.md").read_text()
        assert "RuntimeError: a \\| planted failure" in page
        assert "## Failure: transfer, float32, softmax in two parts" in page
        assert "in broken" in capsys.readouterr().out

    def test_a_wrong_kernel(self, tmp_path, monkeypatch):
        right = attention.near_far_attention

        def wrong(*arguments, backend, **options):
            out = right(*arguments, backend=backend, **options)
            return out * 1.001 if backend == "triton" else out

        monkeypatch.setattr(attention, "near_far_attention", wrong)
        status, data = rehearse(tmp_path, "--only", "attention")
        assert status == 1
        found = data["sections"][1]["steps"]
        assert [step["status"] for step in found] == ["failed"] * len(found)
        assert all(step["reason"].startswith("error of out ") and step["values"]["errors"] for step in found)

    def test_no_kernel_runs(self, tmp_path, monkeypatch):
        def broken(*arguments, **options):
            raise ValueError("no compiler")

        monkeypatch.setattr(plan, "near_far_attention", broken)
        status, data = rehearse(tmp_path, "--only", "attention")
        assert status == 1
        first, *rest = (step for section in data["sections"] for step in section["steps"])
        assert (first["status"], first["reason"]) == ("failed", "ValueError: no compiler")
        assert first["values"]["doctor"]
        assert {(step["status"], step["reason"]) for step in rest} == {
            ("skipped", "environment: Triton kernels run here failed")
        }

    def test_bare_python(self, tmp_path):
        """With torch, triton and transformers alone, in worker processes, from the checkout."""
        (tmp_path / "sitecustomize.py").write_text(BARE)
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", "linearize.benchmarks.gpu_check", "--rehearse", "--out", str(tmp_path)]
        command += ["--only", "converted Llama", "--only", "flash-linear-attention", "--jobs", "1"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        found = statuses(json.loads((tmp_path / "gpu-rehearsal.json").read_text()))
        assert found["environment: Triton kernels run here"] == "passed"
        assert found["converted Llama: generate"] == "passed"
        assert "flash-linear-attention is not installed" in done.stdout
        assert "every correctness step passed" in done.stdout


# Read by Python at its start: to this process the packages do not exist.
BARE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"pytest", "_pytest", "typer", "rich", "peft", "accelerate", "fla", "matplotlib", "datasets", "gguf", "click"}


class Bare:
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


class TestChecks:
    """Cases of the GPU's own list, in 16 bits, and that their bounds are no formality."""

    CASES = (attention.CASES[5], attention.CASES[6], attention.CASES[15])

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_attention(self, case):
        errors = attention.check_attention(case, CPU)["errors"]
        assert {"out", "d q", "d k", "d v", "d mix_logit", "d query_weight", "d key_weight"} == set(errors)

    @pytest.mark.parametrize("case", [x for x in attention.CASES if x.length <= 300], ids=lambda case: case.name)
    def test_the_plain_form_is_the_formula(self, case):
        """In float64, where only the order of sums differs."""
        inputs = attention.make_inputs(case, CPU)
        leaves, mixer = inputs.leaves(torch.float64, torch.float64)
        arguments = leaves["q"], leaves["k"], leaves["v"], mixer, leaves.get("mix_logit")
        out = attention.plain_attention(case, inputs, *arguments).detach()
        truth = attention.run_attention(case, inputs, "truth")["out"]
        assert float((out - truth).abs().max()) <= 1e-12 * max(1.0, float(truth.abs().max()))

    def test_decode(self):
        case = decode.DECODED[4]
        assert "out" in decode.check_decode(case, CPU, None, 3)["errors"]
        with pytest.raises(Skip, match="GPU"):
            decode.check_graph(case, CPU)

    def test_a_step_that_forgets(self, monkeypatch):
        """The memory is not what the rows held: found at the first step."""
        case = decode.REHEARSED_DECODED[0]
        right = decode.start_stream

        def forgetful(*arguments):
            stream, memory = right(*arguments)
            memory.near_v[:, :, 3] = 0
            return stream, memory

        monkeypatch.setattr(decode, "start_stream", forgetful)
        with pytest.raises(CheckFailed, match="error of out"):
            decode.check_decode(case, CPU, None, 2)

    def test_transfer_in_bfloat16(self):
        assert set(integration.check_divergence(torch.bfloat16, CPU, True)["errors"]) == {
            *("divergence", "log_mass", "d phi_q", "d phi_k")
        }
        integration.check_split(torch.bfloat16, CPU, True)

    def test_not_a_number(self):
        with pytest.raises(CheckFailed, match="out nan") as caught:
            attention.compare({"out": torch.tensor([float("nan")])}, {"out": torch.ones(1)}, torch.float32)
        record = run_step(Step("s", "n", lambda: attention.judge(caught.value.values["errors"])))
        assert record["values"]["errors"]["out"][0] == "nan"
        page = markdown(data_of([Section("s", "correctness", 1, ())], [record]))
        assert "| n | failed | 0.0 | out | nan |" in page


def test_resources_of_kernels(monkeypatch):
    """Read once from Triton's cache of what it compiled, and on the page the spilling ones first."""

    def compiled(name: str, registers: int | None, spilled: int) -> SimpleNamespace:
        metadata = SimpleNamespace(name=name, num_warps=4, num_stages=2, shared=1024)
        return SimpleNamespace(metadata=metadata, n_regs=registers, n_spills=spilled)

    cache = {"a": compiled("calm", 90, 0), "b": compiled("spilling", 255, 8), "c": compiled("never launched", None, 0)}
    module = SimpleNamespace(kernel=SimpleNamespace(device_caches={0: (cache, None)}), number=1)
    monkeypatch.setitem(sys.modules, "linearize.kernels.made_up", module)
    record = run_step(Step("s", "n", lambda: {"kernels": attention.new_kernels()}))
    assert [x["kernel"] for x in record["values"]["kernels"]] == ["calm", "spilling"]
    assert record["values"]["kernels"][1]["local_bytes"] == 32
    assert attention.new_kernels() == []
    page = markdown(data_of([Section("s", "speed", 1, ())], [record]))
    assert "| spilling | 4 | 2 | 255 | 32 | 1024 | n |\n| calm | 4 | 2 | 90 | 0 | 1024 | n |" in page


def data_of(sections: list[Section], records: list[dict]) -> dict:
    """What a report of these records would write."""
    report = gpu_check.Report(sections, Path(), 1.0, False)
    for record in records:
        report.by_section[record["section"]].append(record)
    return report.data(finished=True)


def sleep(seconds: float) -> dict:
    time.sleep(seconds)
    return {}


def run_all(sections: list[Section], runner, seconds: float, jobs: int = 1) -> list[dict]:
    """The records of `run_sections`."""
    records: list[dict] = []
    run_sections(sections, runner, records.append, time.monotonic() + seconds, jobs)
    return records


class TestTimeLimit:
    def test_what_does_not_fit_is_named(self, tmp_path):
        waits = Section("waits", "correctness", 9, (Step("waits", "one", lambda: sleep(0.3)),))
        late = Section("late", "correctness", 9, tuple(Step("late", name, dict) for name in ("two", "three")))
        report = gpu_check.Report([waits, late], tmp_path, 0.1, False)
        run_sections([waits, late], Local, report.add, time.monotonic() + 0.2)
        assert report.status == 2
        data = json.loads((tmp_path / "gpu-unknown.json").read_text())
        assert statuses(data) == {"waits: one": "passed", "late: two": "skipped", "late: three": "skipped"}
        page = (tmp_path / "gpu-unknown.md").read_text()
        assert "| two | skipped | 0.0 |  |  |  | the time limit was reached |" in page
        assert "left out for lack of time" in page

    def test_a_section_has_its_own(self):
        slow = Section("slow", "speed", 0.1, tuple(Step("slow", name, lambda: sleep(0.15)) for name in "abc"))
        after = Section("after", "speed", 1, (Step("after", "d", dict),))
        records = run_all([slow, after], Local, 5)
        assert [record["status"] for record in records] == ["passed", "skipped", "skipped", "passed"]
        assert records[1]["reason"] == "the section's 0 s were used up"

    def test_side_by_side(self):
        steps_ = tuple(Step("s", name, lambda: sleep(0.3)) for name in "abcd")
        start = time.monotonic()
        records = run_all([Section("s", "speed", 9, steps_, parallel=True)], Local, 5, jobs=4)
        assert len(records) == 4
        assert time.monotonic() - start < 0.9

    def test_left_out_steps_are_no_success(self, tmp_path):
        section = Section("s", "correctness", 1, (Step("s", "a", dict), Step("s", "b", dict)))
        report = gpu_check.Report([section], tmp_path, 1.0, False)
        report.add(run_step(section.steps[0]))
        assert report.status == 2
        report.add(run_step(section.steps[1]))
        assert report.status == 0

    def test_speed_decides_nothing(self, tmp_path):
        section = Section("s", "speed", 1, (Step("s", "a", lambda: 1 / 0),))
        report = gpu_check.Report([section], tmp_path, 1.0, False)
        report.add(run_step(section.steps[0]))
        assert report.status == 0
        assert report.data(True)["counts"]["failed"] == 1


WORKER = """
import os, sys, time
from linearize.benchmarks.steps import CheckFailed, Skip, Step, run_step, serve
from linearize.benchmarks import steps

def crash():
    print("last words", file=sys.stderr, flush=True)
    os._exit(9)

def chatter():
    print("noise on stdout")
    os.write(1, b"more noise")
    return {"pid": os.getpid(), "nan": float("nan")}

def lose():
    steps._gpu_is_lost = lambda: True
    raise RuntimeError("illegal memory access")

runs = {"chatter": chatter, "crash": crash, "hang": lambda: time.sleep(60), "lose": lose}
serve([Step("s", name, run) for name, run in runs.items()])
"""


class TestWorker:
    def test_a_step_does_not_take_the_others_with_it(self, tmp_path):
        script = tmp_path / "worker.py"
        script.write_text(WORKER)
        names = ("chatter", "crash", "chatter", "lose", "chatter", "hang", "chatter")
        section = Section("s", "correctness", 3.0, tuple(Step("s", name, dict) for name in names))
        worker = Worker([sys.executable, str(script)], {"PYTHONPATH": str(ROOT)})
        records = []
        for step in section.steps:
            records.append(worker.run(step, 1.0 if step.name == "hang" else 20.0))
        worker.close()
        assert [record["status"] for record in records] == [
            *("passed", "failed", "passed", "failed", "passed", "failed", "passed")
        ]
        assert records[1]["reason"] == "its process ended with code 9"
        assert "last words" in records[1]["traceback"]
        assert "illegal memory access (the GPU was lost to this process" in records[3]["reason"]
        assert records[5]["reason"] == "no answer in 1 s; stopped"
        pids = {record["values"]["pid"] for record in records[::2]}
        assert len(pids) == 4
        assert records[0]["values"]["nan"] == "nan"
        assert worker.process is None

    def test_a_hang_at_the_time_limit_is_cut(self, tmp_path, monkeypatch):
        script = tmp_path / "worker.py"
        script.write_text(WORKER)
        monkeypatch.setattr(steps, "GRACE_S", 1.0)
        section = Section("s", "correctness", 60.0, (Step("s", "hang", dict), Step("s", "chatter", dict)))
        records = run_all([section], lambda: Worker([sys.executable, str(script)], {"PYTHONPATH": str(ROOT)}), 1.0)
        assert [(record["status"], record["cut"]) for record in records] == [("skipped", True)] * 2
        assert records[0]["reason"].startswith("stopped by the time limit: no answer")


class TestCommandLine:
    def test_without_a_gpu(self, capsys):
        assert gpu_check.main([]) == 1
        assert "with --rehearse" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--only", "nothing"], "--only: 'nothing' is no section; use one of 'environment', 'attention'"),
            (["--minutes", "0.1"], "--minutes: 0.1 is too short; use 0.33 or more, best 8.5"),
            (["--minutes", "nan"], "--minutes: nan is too short"),
            (["--jobs", "0"], "--jobs: 0 is below 1"),
        ],
    )
    def test_wrong_arguments(self, arguments, message, capsys):
        assert gpu_check.main(["--rehearse", *arguments]) == 3
        assert message in capsys.readouterr().err

    def test_the_parent_leaves_triton_alone(self):
        """TRITON_INTERPRET counts where triton is imported, and a GPU's memory belongs to the workers."""
        code = (
            "import sys; from linearize.benchmarks import gpu_check; from linearize.benchmarks.gpu import plan; "
            "import torch; plan.make_sections(torch.device('cpu'), True); print('triton' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.stdout == "False\n", done.stderr

    def test_make_lists_it(self):
        text = (ROOT / "Makefile").read_text()
        assert "\ngpu-check: ## " in text
        assert "-m linearize.benchmarks.gpu_check $(ARGS)" in text
