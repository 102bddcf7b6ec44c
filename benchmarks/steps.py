"""Steps that survive each other: each runs in a worker process, so that a crash, a hang or a lost GPU costs one step.

After an illegal memory access every later call of CUDA fails in that process, and a kernel that never ends cannot be
interrupted from Python. So the parent hands steps by name to workers and reads one line of JSON for each; a worker that
dies, falls silent or reports that its GPU is lost is replaced, and the next step starts fresh.

A step's record:

    {"section": str, "step": str, "status": "passed" | "failed" | "skipped", "seconds": float,
     "reason": str | null,            why it failed or was skipped, one line
     "cut": bool,                     skipped for lack of time
     "traceback": str | null,         of an exception that nobody foresaw
     "values": {...}}                 what it measured; numbers that JSON cannot hold are strings
"""

import gc
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["CheckFailed", "Local", "Runner", "Section", "Skip", "Step", "Worker", "run_sections", "run_step", "serve"]

GRACE_S = 12.0  # beyond the time limit before the step in hand is stopped
STDERR_TAIL = 2000


class Skip(Exception):
    """A step has nothing to do here: its message says why."""


class CheckFailed(Exception):
    """A number is out of its bound. values: what was measured, for the record."""

    def __init__(self, message: str, values: dict[str, Any] | None = None):
        super().__init__(message)
        self.values = values or {}


@dataclass(frozen=True)
class Step:
    """run: returns what it measured; raises `Skip`, `CheckFailed`, or anything, which is a failure."""

    section: str
    name: str
    run: Callable[[], dict[str, Any]]

    @property
    def key(self) -> str:
        """What a worker is asked for."""
        return f"{self.section}: {self.name}"


@dataclass(frozen=True)
class Section:
    """Steps with a time budget in common.

    kind: "correctness" decides the verdict, "speed" does not, "essential" must pass or nothing else runs.
    seconds: of all its steps together; also the limit of one step. parallel: whether steps may run side by side.
    """

    name: str
    kind: str
    seconds: float
    steps: tuple[Step, ...]
    parallel: bool = False


class Runner(Protocol):
    """Runs steps one after the other."""

    def run(self, step: Step, seconds: float) -> dict[str, Any]:
        """The step's record, after `seconds` at most."""

    def close(self) -> None:
        """Nothing more will come."""


# --- in a worker ---------------------------------------------------------------------------------------------------


def run_step(step: Step) -> dict[str, Any]:
    """Run a step in this process. `lost` in the record: this process's GPU answers no more."""
    start = time.perf_counter()
    record = _record(step, "passed")
    try:
        record["values"] = step.run()
        if cuda := _cuda():
            cuda.synchronize()  # an error of the last kernel belongs to this step
    except Skip as skip:
        record |= {"status": "skipped", "reason": str(skip)}
    except CheckFailed as error:
        record |= {"status": "failed", "reason": str(error), "values": error.values}
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        record |= {"status": "failed", "reason": reason[:500], "traceback": traceback.format_exc()}
        record["lost"] = _gpu_is_lost()
    if (cuda := _cuda()) and not record.get("lost"):
        gc.collect()
        cuda.empty_cache()
    record["seconds"] = round(time.perf_counter() - start, 3)
    record["values"] = _clean(record["values"])
    return record


def serve(steps: Iterable[Step]) -> None:
    """A worker: a step's key a line on stdin, its record a line on stdout; ends with stdin, or when its GPU is lost."""
    by_key = {step.key: step for step in steps}
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print must not come between
        for line in sys.stdin:
            record = run_step(by_key[line.rstrip("\n")])
            answers.write(json.dumps(record) + "\n")
            answers.flush()
            if record.get("lost"):
                return


def _record(step: Step, status: str, reason: str | None = None) -> dict[str, Any]:
    return {
        "section": step.section,
        "step": step.name,
        "status": status,
        "seconds": 0.0,
        "reason": reason,
        "cut": False,
        "traceback": None,
        "values": {},
    }


def _cuda() -> Any:
    """torch.cuda, where this process uses it; steps that do not are not to wait for torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _gpu_is_lost() -> bool:
    cuda = _cuda()
    if cuda is None:
        return False
    try:
        cuda.synchronize()
        sys.modules["torch"].zeros(1, device="cuda").add_(1).item()
    except Exception:  # whatever it is, this process cannot go on
        return True
    return False


def _clean(value: Any) -> Any:
    """The same, for JSON: tuples are lists, NaN and infinities strings, and so is whatever else JSON does not know."""
    if isinstance(value, dict):
        return {str(name): _clean(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


# --- in the parent -------------------------------------------------------------------------------------------------


class Local:
    """Runs steps in this process: for debuggers. Nothing is stopped, and a crash ends everything."""

    def run(self, step: Step, seconds: float) -> dict[str, Any]:
        """See `Runner`."""
        return run_step(step)

    def close(self) -> None:
        """See `Runner`."""


class Worker:
    """Runs steps in a process that calls `serve`, started when it is first needed and again after it died.

    command: starts it. environment: beside this process's own.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None):
        self.command = list(command)
        self.environment = {**os.environ, "PYTHONFAULTHANDLER": "1", **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.stderr: Any = None

    def run(self, step: Step, seconds: float) -> dict[str, Any]:
        """See `Runner`. A step that takes longer, and one that takes its process with it, has failed."""
        start = time.monotonic()
        if self.process is None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(step.key.encode() + b"\n")
            self.process.stdin.flush()
            line = self._answer(start + seconds)
        except BrokenPipeError:
            line = b""
        if line:
            record = json.loads(line)
            if record.pop("lost", False):
                record["reason"] += " (the GPU was lost to this process; the next step has a new one)"
                self.close()
            return record
        record = _record(step, "failed")
        if line is None:
            record |= {"reason": f"no answer in {seconds:.0f} s; stopped", "silent": True}
        else:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            record["reason"] = f"its process ended with code {self.process.returncode}"
        self._kill()
        record["traceback"] = self._stderr_tail()
        record["seconds"] = round(time.monotonic() - start, 3)
        self.close()
        return record

    def close(self) -> None:
        """See `Runner`."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()
        self.process.stdout.close()
        self.stderr.close()
        self.process = None

    def _start(self) -> None:
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env=self.environment,
            start_new_session=True,  # so that it is stopped together with the compilers it started
        )

    def _answer(self, until: float) -> bytes | None:
        """A line; b"" where the process ended without one; None where it did not answer in time."""
        assert self.process is not None
        assert self.process.stdout is not None
        pipe, line = self.process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            more = os.read(pipe, 1 << 16)
            if not more:
                return b""
            line += more
        return line

    def _kill(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _stderr_tail(self) -> str:
        size = self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(0, size - STDERR_TAIL))
        return self.stderr.read().decode(errors="replace")


def run_sections(
    sections: Sequence[Section],
    make_runner: Callable[[], Runner],
    report: Callable[[dict[str, Any]], None],
    until: float,
    jobs: int = 1,
) -> None:
    """Run all steps in order, neighbouring parallel sections by up to `jobs` runners at once.

    Args:
        sections: by importance.
        make_runner: what runs steps; called once for each job.
        report: called with each record, by one thread at a time.
        until: `time.monotonic()` after which no step starts. What does not run is reported as skipped.
        jobs: how many steps may run side by side.
    """
    lock = threading.Lock()
    spent = {section.name: 0.0 for section in sections}
    stopped: list[str] = []
    errors: list[BaseException] = []

    def why_not(section: Section) -> str | None:
        if stopped:
            return f"{stopped[0]} failed"
        if time.monotonic() >= until:
            return "the time limit was reached"
        if spent[section.name] >= section.seconds:
            return f"the section's {section.seconds:.0f} s were used up"
        return None

    def run_one(runner: Runner, section: Section, step: Step) -> None:
        reason = why_not(section)
        if reason is None:
            left = until + GRACE_S - time.monotonic()
            record = runner.run(step, min(section.seconds, left))
            if record.pop("silent", False) and left < section.seconds:
                record |= {"status": "skipped", "cut": True, "reason": f"stopped by the time limit: {record['reason']}"}
        else:
            record = _record(step, "skipped", reason) | {"cut": not stopped}
        with lock:
            spent[section.name] += record["seconds"]
            if section.kind == "essential" and record["status"] != "passed":
                stopped.append(step.key)
            report(record)

    def work(waiting: "queue.SimpleQueue[tuple[Section, Step]]") -> None:
        runner = make_runner()
        try:
            while True:
                run_one(runner, *waiting.get_nowait())
        except queue.Empty:
            pass
        except BaseException as error:  # for the thread that waits
            errors.append(error)
        finally:
            runner.close()

    for group in _neighbours(sections):
        waiting: queue.SimpleQueue[tuple[Section, Step]] = queue.SimpleQueue()
        count = 0
        for section in group:
            for step in section.steps:
                waiting.put((section, step))
                count += 1
        threads = [
            threading.Thread(target=work, args=(waiting,), daemon=True)
            for _ in range(min(jobs if group[0].parallel else 1, count))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def _neighbours(sections: Sequence[Section]) -> list[list[Section]]:
    """Sections that run as one group: parallel ones side by side, the others in a row."""
    groups: list[list[Section]] = []
    for section in sections:
        if groups and groups[-1][0].parallel == section.parallel:
            groups[-1].append(section)
        else:
            groups.append([section])
    return groups
