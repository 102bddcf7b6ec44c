"""Check every Triton kernel on this machine's GPU and measure its speed: one command, nothing to install.

    python -m linearize.benchmarks.gpu_check [--minutes 8.5] [--out FOLDER]        (`make gpu-check` in a checkout)

needs torch, triton and a GPU; transformers and flash-linear-attention are used where they are there. In order of
importance: that a kernel runs at all, attention forward and backward against the formula in float64, decoding and its
CUDA graph, attention transfer, PyTorch's operators and compiler, a converted Llama, fla's kernels; then speed beside
SDPA, torch.compile and fla, each kernel's time, and what tuned blocks gain. `gpu.attention` states the bounds.

Every step runs in a worker process: one that fails, crashes, hangs or loses the GPU is recorded and the rest goes on
(`steps`). `gpu-NAME.json` and `gpu-NAME.md`, NAME the GPU's, are written anew after each step:

    {"kind": "linearize.gpu_check", "schema": 1, "verdict": str, "finished": bool, "rehearsal": bool, "seconds": float,
     "minutes": float, "counts": {"passed": int, "failed": int, "skipped": int},
     "sections": [{"name": str, "kind": str, "steps": [record, ...]}, ...]}      records: see `steps`

Exit status: 0 every correctness step passed or had nothing to do; 1 one failed, or no kernel runs here; 2 none failed,
but the time limit left some out; 3 the arguments are wrong. Speed decides nothing.

`--rehearse` runs the same on a CPU in Triton's interpreter, with tiny shapes in float32: it tests this program, not the
kernels. What needs a GPU is then marked as skipped. (Triton 3.6 interprets nothing under numpy 2.4.)
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linearize.errors import LinearizeError

from .files import write_json, write_text
from .gpu.plan import make_sections
from .gpu.summary import markdown
from .steps import Local, Runner, Section, Worker, run_sections, serve

__all__ = ["KIND", "Report", "main"]

KIND = "linearize.gpu_check"
MINUTES = 8.5
LEAST_S = 20.0  # of a time limit: less does not start torch
JOBS = 6  # correctness steps side by side: they wait for compilers, not for the GPU
OUT = Path(__file__).resolve().parent / "results"


class Report:
    """Takes records as they come, prints a line for each, and keeps both files up to date."""

    def __init__(self, sections: Sequence[Section], folder: Path, minutes: float, rehearsal: bool):
        self.folder = folder
        self.start = time.monotonic()
        self.by_section: dict[str, list[dict[str, Any]]] = {section.name: [] for section in sections}
        self.sections = sections
        self.minutes = minutes
        self.rehearsal = rehearsal
        self.name = "rehearsal" if rehearsal else "unknown"

    def add(self, record: dict[str, Any]) -> None:
        """Take a step's record."""
        self.by_section[record["section"]].append(record)
        device = record["values"].get("device")
        if device is not None:
            self.name = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
        print(_line(record), flush=True)
        if record["status"] == "failed" and record["traceback"]:
            print("    " + record["traceback"].strip().replace("\n", "\n    "), flush=True)
        self.write(finished=False)

    @property
    def status(self) -> int:
        """The exit status: see the module."""
        decisive = [
            record for section in self.sections if section.kind != "speed" for record in self.by_section[section.name]
        ]
        if any(record["status"] == "failed" for record in decisive):
            return 1
        left_out = sum(len(section.steps) for section in self.sections if section.kind != "speed") - len(decisive)
        return 2 if left_out or any(record["cut"] for record in decisive) else 0

    @property
    def verdict(self) -> str:
        """The exit status in words."""
        failed = [
            f"{record['section']}: {record['step']}"
            for section in self.sections
            for record in self.by_section[section.name]
            if record["status"] == "failed" and section.kind != "speed"
        ]
        if failed:
            return f"failed correctness steps ({len(failed)}): {'; '.join(failed)}"
        if self.status == 2:
            return "no correctness step failed, but some were left out for lack of time"
        return "every correctness step passed"

    def data(self, finished: bool) -> dict[str, Any]:
        """What is written; see the module."""
        records = [record for found in self.by_section.values() for record in found]
        statuses = [record["status"] for record in records]
        return {
            "kind": KIND,
            "schema": 1,
            "verdict": self.verdict,
            "finished": finished,
            "rehearsal": self.rehearsal,
            "seconds": round(time.monotonic() - self.start, 1),
            "minutes": self.minutes,
            "counts": {status: statuses.count(status) for status in ("passed", "failed", "skipped")},
            "sections": [
                {"name": section.name, "kind": section.kind, "steps": self.by_section[section.name]}
                for section in self.sections
            ],
        }

    def write(self, finished: bool) -> tuple[Path, Path]:
        """Both files, each as a whole."""
        data = self.data(finished)
        json_path = write_json(self.folder / f"gpu-{self.name}.json", data)
        return json_path, write_text(self.folder / f"gpu-{self.name}.md", markdown(data))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing here has done yet
    device = torch.device("cpu" if options.rehearse else "cuda")
    try:
        sections = _chosen(make_sections(device, options.rehearse), options)
    except LinearizeError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 3
    if options.worker:
        serve([step for section in sections for step in section.steps])
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no GPU" if built else f"torch {torch.__version__} is built for the CPU only"
        print(f"gpu-check: {why}; run it where there is one, or try it out with --rehearse", file=sys.stderr)
        return 1
    report = Report(sections, Path(options.out), options.minutes, options.rehearse)
    until = report.start + 60 * options.minutes

    def make_runner() -> Runner:
        if options.in_process:
            return Local()
        own = ["--worker", *(["--rehearse"] if options.rehearse else [])]
        return Worker([sys.executable, "-m", "linearize.benchmarks.gpu_check", *own])

    run_sections(sections, make_runner, report.add, until, 1 if options.in_process else options.jobs)
    paths = report.write(finished=True)
    print(f"\n{report.verdict}; {report.data(True)['seconds']:.0f} s\n" + "\n".join(map(str, paths)))
    return report.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Check every Triton kernel on this machine's GPU and measure its speed."
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit of everything (%(default)s)")
    parser.add_argument("--out", default=str(OUT), help="folder of the results (%(default)s)")
    parser.add_argument("--only", action="append", metavar="SECTION", help="this section; again for more")
    parser.add_argument("--jobs", type=int, default=max(1, min(JOBS, (os.cpu_count() or 1) // 2)),
                        help="correctness steps side by side (%(default)s)")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes: tests this program")
    parser.add_argument("--in-process", action="store_true", help="without worker processes, for debuggers")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _chosen(sections: list[Section], options: argparse.Namespace) -> list[Section]:
    """The sections that were asked for, with those that must pass before any other; checks the options."""
    known = [section.name for section in sections]
    for name in options.only or ():
        if name not in known:
            raise LinearizeError(f"--only: {name!r} is no section; use one of {', '.join(map(repr, known))}")
    if not 60 * options.minutes >= LEAST_S:
        least = f"{LEAST_S / 60:.2f}"
        raise LinearizeError(f"--minutes: {options.minutes} is too short; use {least} or more, best {MINUTES}")
    if options.jobs < 1:
        raise LinearizeError(f"--jobs: {options.jobs} is below 1; use 1 for one step at a time")
    return [x for x in sections if not options.only or x.name in options.only or x.kind == "essential"]


def _line(record: dict[str, Any]) -> str:
    """A record on the screen."""
    reason = f": {record['reason']}" if record["reason"] else ""
    errors = record["values"].get("errors", {})
    used = max((x[0] / x[1] for x in errors.values() if x[1] and not isinstance(x[0], str)), default=None)
    bound = f", {100 * used:.0f} % of the bound" if used is not None and record["status"] == "passed" else ""
    return f"{record['status']:8} {record['seconds']:6.1f} s  {record['section']}: {record['step']}{bound}{reason}"


if __name__ == "__main__":
    sys.exit(main())
